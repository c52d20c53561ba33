"""Who there is and what they may: tenants, users, members and the tokens of programs."""

import secrets
from datetime import timedelta

from starlette.responses import Response

from coordinator.actions.change_user import UserChanges
from coordinator.actions.change_user import change_user as change_user_action
from coordinator.actions.create_tenant import create_tenant as create_tenant_action
from coordinator.actions.create_token import create_token as create_token_action
from coordinator.actions.create_user import create_user as create_user_action
from coordinator.actions.list_members import list_members as list_members_action
from coordinator.actions.list_tenants import list_tenants as list_tenants_action
from coordinator.actions.list_tokens import list_tokens as list_tokens_action
from coordinator.actions.list_users import list_users as list_users_action
from coordinator.actions.remove_member import remove_member as remove_member_action
from coordinator.actions.revoke_token import revoke_token as revoke_token_action
from coordinator.actions.set_member import set_member as set_member_action
from coordinator.api.build_server import account_shapes as shapes
from coordinator.api.build_server.operations import USER, error, operation
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.errors import Invalid
from coordinator.passwords import WeakPassword
from coordinator.rules.access import Policy, Scope
from shared.faults import Fault


async def list_tenants(call: Call) -> Response:
    page = call.query
    found = await call.read(
        list_tenants_action, call.caller, account=page.account, limit=page.limit, offset=page.offset
    )
    return json_answer([shapes.tenant_out(tenant) for tenant in found])


async def create_tenant(call: Call) -> Response:
    tenant = await call.write(create_tenant_action, call.caller, account=call.body.account_id)
    return json_answer(shapes.tenant_out(tenant), 201)


async def list_users(call: Call) -> Response:
    page = call.query
    found = await call.read(
        list_users_action, call.caller, email=page.email, limit=page.limit, offset=page.offset
    )
    return json_answer([shapes.user_out(user) for user in found])


async def create_user(call: Call) -> Response:
    body: shapes.UserIn = call.body
    password = body.password or secrets.token_urlsafe(18)
    user = await call.write(
        create_user_action,
        call.caller,
        email=body.email,
        name=body.name,
        password_hash=await _hashed(call, password),
        is_admin=body.is_admin,
    )
    return json_answer(shapes.user_out(user, None if body.password else password), 201)


async def change_user(call: Call) -> Response:
    body: shapes.UserPatch = call.body
    changes = UserChanges(
        name=body.name,
        password_hash=await _hashed(call, body.password) if body.password else None,
        is_disabled=body.is_disabled,
        is_admin=body.is_admin,
    )
    user = await call.write(change_user_action, call.caller, call.path["id"], changes)
    call.state.rights.have_changed()
    return json_answer(shapes.user_out(user))


async def list_members(call: Call) -> Response:
    found = await call.read(list_members_action, call.caller, call.path["id"])
    return json_answer([shapes.member_out(row) for row in found])


async def set_member(call: Call) -> Response:
    who = (call.path["id"], call.path["userId"], call.body.role)
    member, is_new = await call.write(set_member_action, call.caller, *who)
    call.state.rights.have_changed()
    return json_answer(shapes.member_out(member), 201 if is_new else 200)


async def remove_member(call: Call) -> Response:
    await call.write(remove_member_action, call.caller, call.path["id"], call.path["userId"])
    call.state.rights.have_changed()
    return Response(status_code=204)


async def list_tokens(call: Call) -> Response:
    page = call.query
    found = await call.read(list_tokens_action, call.caller, limit=page.limit, offset=page.offset)
    return json_answer([shapes.token_out(token) for token in found])


async def create_token(call: Call) -> Response:
    body: shapes.TokenIn = call.body
    token, secret = await call.write(
        create_token_action,
        call.caller,
        name=body.name,
        permissions=body.permissions,
        lifetime=timedelta(seconds=body.expires_in_seconds),
    )
    return json_answer(shapes.token_out(token, secret), 201)


async def revoke_token(call: Call) -> Response:
    await call.write(revoke_token_action, call.caller, call.path["id"])
    call.state.rights.have_changed()
    return Response(status_code=204)


async def _hashed(call: Call, password: str) -> str:
    try:
        return await call.state.passwords.hash_password(password)
    except WeakPassword as error:
        raise Invalid("the user is not valid", details=(Fault("password", str(error)),)) from error


def _operator(permission: str) -> Policy:
    return Policy(USER, permission, Scope.INSTALLATION)


def _member(permission: str) -> Policy:
    return Policy(USER, permission, Scope.RESOURCE)


def _token(permission: str) -> Policy:
    return Policy(USER, permission, Scope.TENANT)


_TAKEN = {409: error("The name is taken")}
_LAST = {409: error("It is the last owner")}

ENDPOINTS: list[Endpoint] = [
    operation(
        "GET",
        "/api/tenants",
        list_tenants,
        "Get the tenants",
        tag="Accounts",
        policy=_operator("tenant:list"),
        query=shapes.TenantQuery,
        ok={200: Answer("The tenants by account", list[shapes.TenantOut])},
    ),
    operation(
        "POST",
        "/api/tenants",
        create_tenant,
        "Create a tenant",
        tag="Accounts",
        policy=_operator("tenant:create"),
        body=shapes.TenantIn,
        ok={201: Answer("The tenant", shapes.TenantOut)},
        errors=_TAKEN,
    ),
    operation(
        "GET",
        "/api/tenants/{id}/members",
        list_members,
        "Get the members of a tenant",
        tag="Accounts",
        policy=_member("member:list"),
        ok={200: Answer("The members by address", list[shapes.MemberOut])},
    ),
    operation(
        "PUT",
        "/api/tenants/{id}/members/{userId}",
        set_member,
        "Give a user a role in a tenant",
        description="Nobody gives or takes more than they have; a tenant that has an owner keeps one.",
        tag="Accounts",
        policy=_member("member:set"),
        body=shapes.MemberIn,
        ok={200: Answer("The member", shapes.MemberOut), 201: Answer("The new member", shapes.MemberOut)},
        errors=_LAST,
        parameters={"userId": "User identifier"},
    ),
    operation(
        "DELETE",
        "/api/tenants/{id}/members/{userId}",
        remove_member,
        "Remove a user from a tenant",
        tag="Accounts",
        policy=_member("member:delete"),
        ok={204: Answer("Done")},
        errors=_LAST,
        parameters={"userId": "User identifier"},
    ),
    operation(
        "GET",
        "/api/users",
        list_users,
        "Get the users",
        tag="Accounts",
        policy=_operator("user:list"),
        query=shapes.UserQuery,
        ok={200: Answer("The users, oldest first", list[shapes.UserOut])},
    ),
    operation(
        "POST",
        "/api/users",
        create_user,
        "Create a user",
        description="Without a password one is made up and shown in this answer and nowhere else.",
        tag="Accounts",
        policy=_operator("user:create"),
        body=shapes.UserIn,
        ok={201: Answer("The user", shapes.UserOut)},
        errors=_TAKEN,
    ),
    operation(
        "PATCH",
        "/api/users/{id}",
        change_user,
        "Change a user",
        description="Another password, or a right less, ends every login of the user.",
        tag="Accounts",
        policy=_operator("user:change"),
        body=shapes.UserPatch,
        ok={200: Answer("The user as it is now", shapes.UserOut)},
    ),
    operation(
        "GET",
        "/api/tokens",
        list_tokens,
        "Get the tokens of programs",
        description="One's own; for administrators all of the tenant.",
        tag="Accounts",
        policy=_token("token:list"),
        query=shapes.PageQuery,
        ok={200: Answer("The tokens, oldest first", list[shapes.TokenOut])},
    ),
    operation(
        "POST",
        "/api/tokens",
        create_token,
        "Create a token for a program",
        description="The token is shown in this answer and nowhere else.",
        tag="Accounts",
        policy=_token("token:create"),
        body=shapes.TokenIn,
        ok={201: Answer("The token", shapes.TokenOut)},
    ),
    operation(
        "DELETE",
        "/api/tokens/{id}",
        revoke_token,
        "Revoke a token",
        tag="Accounts",
        policy=_token("token:delete"),
        ok={204: Answer("Revoked")},
    ),
]
