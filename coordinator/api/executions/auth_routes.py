"""Logins: an address and a password become a token, which is renewed, and called back."""

from starlette.responses import Response

from coordinator.actions.change_password import begin_change
from coordinator.actions.change_password import change_password as change_password_action
from coordinator.actions.log_in import WRONG, begin_login
from coordinator.actions.log_in import log_in as log_in_action
from coordinator.actions.log_out import log_out as log_out_action
from coordinator.actions.refresh_login import refresh_login as refresh_login_action
from coordinator.actions.show_account import show_account as show_account_action
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.api.executions import auth_shapes
from coordinator.api.executions.operations import error, operation
from coordinator.errors import CoordinatorError, Denied, Invalid, Unauthenticated
from coordinator.passwords import WeakPassword, require_strong
from coordinator.rules.access import Audience, Policy
from shared.faults import Fault


async def log_in(call: Call) -> Response:
    body: auth_shapes.LoginIn = call.body
    site, address = call.state.site, call.caller.address
    user_id, stored = await call.write(begin_login, site, body.email, address=address)
    is_right = await call.state.passwords.is_password(stored, body.password)
    if user_id is None or stored is None or not is_right:
        raise Unauthenticated(WRONG)
    opened = await call.write(log_in_action, site, user_id, stored, address=address)
    return json_answer(auth_shapes.login_out(opened))


async def refresh_login(call: Call) -> Response:
    opened = await call.write(
        refresh_login_action, call.state.site, call.body.refresh_token, address=call.caller.address
    )
    if isinstance(opened, CoordinatorError):
        call.state.rights.have_changed()
        raise opened
    return json_answer(auth_shapes.login_out(opened))


async def log_out(call: Call) -> Response:
    everywhere = call.body.everywhere if call.body is not None else False
    await call.write(log_out_action, call.caller, everywhere=everywhere)
    call.state.rights.have_changed()
    return Response(status_code=204)


async def show_account(call: Call) -> Response:
    return json_answer(auth_shapes.account_out(await call.read(show_account_action, call.caller)))


async def change_password(call: Call) -> Response:
    body: auth_shapes.PasswordIn = call.body
    try:
        require_strong(body.new_password)  # before anything counts as a guess
    except WeakPassword as error:
        raise Invalid("the password is not valid", details=(Fault("new_password", str(error)),)) from error
    before = await call.write(begin_change, call.state.site, call.caller)
    if not await call.state.passwords.is_password(before, body.current_password):
        raise Denied("the current password is wrong")
    after = await call.state.passwords.hash_password(body.new_password)
    await call.write(change_password_action, call.caller, before, after)
    call.state.rights.have_changed()
    return Response(status_code=204)


_LOGIN = Policy(Audience.ANYONE, "login:create")
_REFUSALS = {
    401: error("Not these credentials"),
    429: error("Too many failed logins, or too many requests; see Retry-After"),
    503: error("Cannot be answered now; see Retry-After"),
}
_OWN = Policy(Audience.USER, "account:read")
_TAG = "Authentication"

ENDPOINTS: list[Endpoint] = [
    operation(
        "POST",
        "/auth/login",
        log_in,
        "Log in",
        description="The token goes into the Authorization header; the refresh token makes the next one.",
        tag=_TAG,
        policy=_LOGIN,
        body=auth_shapes.LoginIn,
        errors=_REFUSALS,
        ok={200: Answer("The login", auth_shapes.LoginOut)},
    ),
    operation(
        "POST",
        "/auth/refresh",
        refresh_login,
        "Renew a login",
        description="Each refresh token counts once. One that comes again later ends its login.",
        tag=_TAG,
        policy=_LOGIN,
        body=auth_shapes.RefreshIn,
        errors=_REFUSALS,
        ok={200: Answer("The login", auth_shapes.LoginOut)},
    ),
    operation(
        "POST",
        "/auth/logout",
        log_out,
        "Log out",
        description="The tokens of this login, or of all logins of the user, stop to count.",
        tag=_TAG,
        policy=Policy(Audience.USER, "login:end"),
        body=auth_shapes.LogoutIn,
        body_is_optional=True,
        ok={204: Answer("Logged out")},
    ),
    operation(
        "GET",
        "/auth/me",
        show_account,
        "Get who is calling",
        tag=_TAG,
        policy=_OWN,
        ok={200: Answer("The caller", auth_shapes.AccountOut)},
    ),
    operation(
        "POST",
        "/auth/password",
        change_password,
        "Change one's own password",
        description="Ends every login of the user.",
        tag=_TAG,
        policy=Policy(Audience.USER, "login:change"),
        body=auth_shapes.PasswordIn,
        ok={204: Answer("Changed")},
    ),
]
