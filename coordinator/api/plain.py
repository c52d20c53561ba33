"""What belongs to no surface: health, readiness, metrics, the specification and a page to try it."""

from datetime import timedelta

from starlette.responses import Response

from coordinator.actions.take_measure import take_measure
from coordinator.api import metrics, try_page
from coordinator.api.build_server.operations import error, operation
from coordinator.api.build_server.shapes import Health
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.errors import Unavailable
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.store.health import is_answering

_ANYONE = Policy(Audience.ANYONE, "health:read")
_WATCHER = Policy(Audience.USER, "metrics:read", Scope.INSTALLATION)
_READER = Policy(Audience.ANYONE, "specification:read")


async def healthz(_call: Call) -> Response:
    """The process lives."""
    return json_answer(Health(status="ok"))


async def readyz(call: Call) -> Response:
    """The database answers."""
    if not await call.read(is_answering):
        raise Unavailable("the database does not answer")
    return json_answer(Health(status="ready"))


async def show_specification(call: Call) -> Response:
    """What this coordinator accepts and answers, made once at the start."""
    return Response(call.state.specification, media_type="application/json")


async def show_try_page(_call: Call) -> Response:
    """A page that reads the specification and sends what one fills in."""
    return Response(
        try_page.HTML,
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": try_page.CONTENT_SECURITY_POLICY},
    )


async def show_metrics(call: Call) -> Response:
    """Counts for whoever watches from outside."""
    lost_after = timedelta(seconds=call.state.settings.lost_after)
    measure = await call.read(take_measure, now=call.state.clock(), lost_after=lost_after)
    text = metrics.render_metrics(measure, call.state.tally, call.state.lanes.waiting)
    return Response(text, media_type=metrics.MEDIA_TYPE)


PLAIN_ENDPOINTS: list[Endpoint] = [
    operation(
        "GET",
        "/healthz",
        healthz,
        "Is the process alive",
        tag="Health",
        policy=_ANYONE,
        ok={200: Answer("It is", Health)},
    ),
    operation(
        "GET",
        "/readyz",
        readyz,
        "Can requests be answered",
        tag="Health",
        policy=_ANYONE,
        ok={200: Answer("They can", Health)},
        errors={503: error("The database does not answer")},
    ),
    operation(
        "GET",
        "/openapi.json",
        show_specification,
        "The specification of this API",
        tag="Specification",
        policy=_READER,
        ok={200: Answer("An OpenAPI 3.1 document", dict)},
    ),
    operation(
        "GET",
        "/docs",
        show_try_page,
        "A page to try this API",
        tag="Specification",
        policy=_READER,
        ok={200: Answer("The page", str, "text/html")},
    ),
    operation(
        "GET",
        "/metrics",
        show_metrics,
        "Counts in the text format of Prometheus",
        tag="Health",
        policy=_WATCHER,
        ok={200: Answer("Every count with its meaning", str, "text/plain")},
    ),
]
