"""Who is a runner: the tokens by which machines become one, new secrets, and the end of it."""

from datetime import timedelta

from starlette.responses import Response

from coordinator.actions.create_enrolment_token import create_enrolment_token as create_action
from coordinator.actions.list_enrolment_tokens import list_enrolment_tokens as list_action
from coordinator.actions.revoke_enrolment_token import revoke_enrolment_token as revoke_action
from coordinator.actions.revoke_runner import revoke_runner as revoke_runner_action
from coordinator.actions.rotate_runner import rotate_runner as rotate_runner_action
from coordinator.actions.take_secret import take_secret as take_secret_action
from coordinator.api.build_server.enrolment_shapes import (
    EnrolmentCreate,
    EnrolmentCreated,
    EnrolmentOut,
    enrolment_created,
    enrolment_out,
)
from coordinator.api.build_server.operations import RUNNER, USER, error, operation
from coordinator.api.build_server.shapes import RunnerOut, runner_out
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.bell import READY
from coordinator.rules.access import Policy, Scope
from shared.protocol import NewSecret, Ok


async def create_enrolment_token(call: Call) -> Response:
    body: EnrolmentCreate = call.body
    token, secret, account = await call.write(
        create_action,
        call.caller,
        name=body.name,
        labels=body.labels,
        max_uses=body.max_uses,
        lifetime=timedelta(seconds=body.expires_in_seconds),
        shared=body.shared,
    )
    return json_answer(enrolment_created(token, account, secret, now=call.state.clock()), 201)


async def list_enrolment_tokens(call: Call) -> Response:
    now = call.state.clock()
    found = await call.read(list_action, call.caller)
    return json_answer([enrolment_out(token, account, now=now) for token, account in found])


async def revoke_enrolment_token(call: Call) -> Response:
    await call.write(revoke_action, call.caller, call.path["id"])
    return Response(status_code=204)


async def rotate_runner(call: Call) -> Response:
    return json_answer(runner_out(*await call.write(rotate_runner_action, call.caller, call.path["id"])))


async def revoke_runner(call: Call) -> Response:
    await call.write(revoke_runner_action, call.state.site, call.caller, call.path["id"])
    call.state.rights.have_changed()
    call.state.bell.ring(READY)
    return Response(status_code=204)


async def take_secret(call: Call) -> Response:
    await call.write(take_secret_action, call.caller, call.body.secret_sha256)
    return json_answer(Ok())


ENDPOINTS: list[Endpoint] = [
    operation(
        "POST",
        "/api/enrolment-tokens",
        create_enrolment_token,
        "Make an enrolment token",
        description="The token is shown in this answer and nowhere else.",
        tag="Runner",
        policy=Policy(USER, "enrolment:create", Scope.TENANT),
        body=EnrolmentCreate,
        ok={201: Answer("The token and what it lets in", EnrolmentCreated)},
    ),
    operation(
        "GET",
        "/api/enrolment-tokens",
        list_enrolment_tokens,
        "Get the enrolment tokens",
        description="The newest 1000, also those that do not count any more. No token is shown.",
        tag="Runner",
        policy=Policy(USER, "enrolment:list", Scope.TENANT),
        ok={200: Answer("List of enrolment tokens", list[EnrolmentOut])},
    ),
    operation(
        "DELETE",
        "/api/enrolment-tokens/{id}",
        revoke_enrolment_token,
        "Revoke an enrolment token",
        description="Runners that came by it stay.",
        tag="Runner",
        policy=Policy(USER, "enrolment:delete", Scope.RESOURCE),
        ok={204: Answer("It lets nobody in any more")},
    ),
    operation(
        "POST",
        "/api/runners/{id}/rotate",
        rotate_runner,
        "Ask a runner to take a new secret",
        description="It hears so with its next heartbeat. The old secret counts until the new one is used.",
        tag="Runner",
        policy=Policy(USER, "runner:rotate", Scope.RESOURCE),
        ok={200: Answer("The runner, asked", RunnerOut)},
    ),
    operation(
        "DELETE",
        "/api/runners/{id}",
        revoke_runner,
        "Revoke a runner",
        description="Its secret counts no more, and the steps it holds go to others.",
        tag="Runner",
        policy=Policy(USER, "runner:delete", Scope.RESOURCE),
        ok={204: Answer("It is no runner any more")},
    ),
    operation(
        "POST",
        "/api/runner/rotate",
        take_secret,
        "Take a new secret",
        description="Only when one was asked for. The runner tells the digest of the secret it has made.",
        tag="Runner",
        policy=Policy(RUNNER, "runner:work"),
        body=NewSecret,
        ok={200: Answer("The new secret counts", Ok)},
        errors={409: error("No new secret was asked for")},
    ),
]
