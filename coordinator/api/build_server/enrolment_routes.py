"""Who lets machines in: the tokens by which they become runners."""

from datetime import timedelta

from starlette.responses import Response

from coordinator.actions.create_enrolment_token import create_enrolment_token as create_action
from coordinator.actions.list_enrolment_tokens import list_enrolment_tokens as list_action
from coordinator.actions.revoke_enrolment_token import revoke_enrolment_token as revoke_action
from coordinator.api.build_server.enrolment_shapes import (
    EnrolmentCreate,
    EnrolmentCreated,
    EnrolmentOut,
    enrolment_created,
    enrolment_out,
)
from coordinator.api.build_server.operations import USER, operation
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.rules.access import Policy, Scope


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
]
