"""`buildmill tenant`, `user` and `token`: who there is, and what they may."""

import sys
from typing import Any

import click

from coordinator.cli.administer import Desk, administers, segment
from coordinator.rules.permissions import PERMISSIONS, Role

ROLES = [str(role) for role in Role]
_role = click.option(
    "--role", type=click.Choice(ROLES), default="developer", show_default=True, help="What the member may."
)


@click.group()
def tenant() -> None:
    """Tenants and their members.

    A tenant is whose projects, images and runners these are; its account is the `accountId` of the API.
    """


@tenant.command("list")
@administers
def list_tenants(desk: Desk) -> None:
    """Show all tenants: id and account."""
    for found in desk.pages("/api/tenants"):
        click.echo(f"{found['id']}  {found['accountId']}")


@tenant.command("create")
@click.argument("account")
@administers
def create_tenant(desk: Desk, account: str) -> None:
    """Make a tenant of this account and show its id."""
    click.echo(desk.ask("POST", "/api/tenants", json={"accountId": account})["id"])


@tenant.command("members")
@click.argument("account")
@administers
def list_members(desk: Desk, account: str) -> None:
    """Show who belongs to a tenant, in which role."""
    for member in desk.ask("GET", f"/api/tenants/{desk.tenant(account)['id']}/members"):
        disabled = "  (disabled)" if member["isDisabled"] else ""
        click.echo(f"{member['role']:<10} {member['email']}{disabled}")


@tenant.command("add")
@click.argument("account")
@click.argument("email")
@_role
@administers
def add_member(desk: Desk, account: str, email: str, role: str) -> None:
    """Give a user a role in a tenant, or another one."""
    path = f"/api/tenants/{desk.tenant(account)['id']}/members/{desk.user(email)['id']}"
    member = desk.ask("PUT", path, json={"role": role})
    click.echo(f"{member['email']} is {member['role']} of {account}")


@tenant.command("remove")
@click.argument("account")
@click.argument("email")
@administers
def remove_member(desk: Desk, account: str, email: str) -> None:
    """Take a user out of a tenant. The last owner stays."""
    desk.ask("DELETE", f"/api/tenants/{desk.tenant(account)['id']}/members/{desk.user(email)['id']}")
    click.echo(f"{email} does not belong to {account} any more")


@click.group()
def user() -> None:
    """Users: people who log in."""


@user.command("list")
@administers
def list_users(desk: Desk) -> None:
    """Show all users: id, address and what is special."""
    for found in desk.pages("/api/users"):
        marks = [word for word, is_so in _marks(found) if is_so]
        click.echo(f"{found['id']}  {found['email']}{'  ' if marks else ''}{', '.join(marks)}")


def _marks(found: dict[str, Any]) -> list[tuple[str, bool]]:
    return [("operator", found["isAdmin"]), ("disabled", found["isDisabled"])]


@user.command("create")
@click.argument("email")
@click.option("--name", default="", help="Name to show.")
@click.option("--tenant", "account", help="Account of a tenant to belong to.")
@_role
@click.option("--operator", is_flag=True, help="Administers the whole installation.")
@click.option("--password-stdin", is_flag=True, help="Read the password; else one is made up and shown.")
@administers
def create_user(
    desk: Desk, email: str, name: str, account: str | None, role: str, operator: bool, password_stdin: bool
) -> None:
    """Make a user, who may belong to a tenant at once."""
    tenant_id = desk.tenant(account)["id"] if account else None
    body: dict[str, Any] = {"email": email, "name": name, "isAdmin": operator}
    if password_stdin:
        body["password"] = _password()
    made = desk.ask("POST", "/api/users", json=body)
    click.echo(f"{made['id']}  {made['email']}")
    if "password" in made:
        click.echo(f"password (shown this once): {made['password']}")
    if tenant_id is not None:
        desk.ask("PUT", f"/api/tenants/{tenant_id}/members/{made['id']}", json={"role": role})
        click.echo(f"{made['email']} is {role} of {account}")


@user.command("password")
@click.argument("email")
@administers
def set_password(desk: Desk, email: str) -> None:
    """Set a user's password, read from standard input; ends every login of the user."""
    desk.ask("PATCH", f"/api/users/{desk.user(email)['id']}", json={"password": _password()})
    click.echo(f"{email} has a new password and is logged out everywhere")


@user.command("disable")
@click.argument("email")
@administers
def disable_user(desk: Desk, email: str) -> None:
    """Let a user do nothing any more, from now on."""
    desk.ask("PATCH", f"/api/users/{desk.user(email)['id']}", json={"isDisabled": True})
    click.echo(f"{email} may not log in any more; logins and tokens have ended")


@user.command("enable")
@click.argument("email")
@administers
def enable_user(desk: Desk, email: str) -> None:
    """Let a user log in again."""
    desk.ask("PATCH", f"/api/users/{desk.user(email)['id']}", json={"isDisabled": False})
    click.echo(f"{email} may log in again")


def _password() -> str:
    if sys.stdin.isatty():
        entered: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
        return entered
    return sys.stdin.readline().rstrip("\n")


@click.group()
def token() -> None:
    """Tokens: what programs show instead of a password."""


@token.command("list")
@click.option("--tenant", "account", default="default", show_default=True, help="Account of the tenant.")
@administers
def list_tokens(desk: Desk, account: str) -> None:
    """Show the tokens of a tenant: id, end and name, never the token."""
    for found in desk.pages("/api/tokens", tenant=desk.tenant(account)["id"]):
        click.echo(f"{found['id']}  until {found.get('expiresAt', 'revoked')}  {found['name']}")


@token.command("create")
@click.argument("name")
@click.option("--tenant", "account", default="default", show_default=True, help="Account of the tenant.")
@click.option("--permission", "permissions", multiple=True, help="What it may do; may be given often.")
@click.option("--role", type=click.Choice(ROLES), help="Instead: all that a member of this role may.")
@click.option(
    "--days", type=click.IntRange(1, 366), default=90, show_default=True, help="How long it counts."
)
@administers
def create_token(
    desk: Desk, name: str, account: str, permissions: tuple[str, ...], role: str | None, days: int
) -> None:
    """Make a token and show it, this once."""
    if bool(permissions) == bool(role):
        raise click.UsageError("name either --permission or --role")
    wanted = sorted(PERMISSIONS[Role(role)]) if role else list(permissions)
    body = {"name": name, "permissions": wanted, "expiresInSeconds": days * 86400}
    made = desk.ask("POST", "/api/tokens", tenant=desk.tenant(account)["id"], json=body)
    click.echo(made["token"])


@token.command("revoke")
@click.argument("token_id")
@administers
def revoke_token(desk: Desk, token_id: str) -> None:
    """Let a token count no more."""
    desk.ask("DELETE", f"/api/tokens/{segment(token_id)}")
    click.echo(f"{token_id} does not count any more")
