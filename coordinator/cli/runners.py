"""`buildmill runners`: who does the steps, and by which tokens machines become runners."""

from typing import Any

import click

from coordinator.cli.administer import Desk, administers, segment
from coordinator.rules.enrolment import MAX_LIFETIME, MAX_USES


@click.group()
def runners() -> None:
    """Runners as the coordinator knows them; `buildmill runner` is the one of this machine."""


@runners.command("list")
@click.option("--tenant", "account", help="Only those that take the steps of this account.")
@administers
def list_runners(desk: Desk, account: str | None) -> None:
    """Show the runners: id, name, whose steps they take, labels and how they stand."""
    for found in desk.ask("GET", "/api/runners", tenant=_tenant_id(desk, account)):
        labels = ",".join(found["labels"]) or "-"
        standing = ", ".join(_standing(found)) or "ready"
        click.echo(f"{found['id']}  {found['name']}  {_owner(found)}  {labels}  {standing}")


def _standing(found: dict[str, Any]) -> list[str]:
    said = [
        ("never heard", "lastSeenAt" not in found),
        ("draining", found["draining"]),
        ("low disk", found["lowDisk"]),
        ("pauses", "pausedUntil" in found),
        ("new secret wanted", "rotateRequestedAt" in found),
    ]
    return [word for word, is_so in said if is_so]


@runners.command("rotate")
@click.argument("runner_id")
@administers
def rotate_runner(desk: Desk, runner_id: str) -> None:
    """Ask a runner to take a new secret; the old one counts until it does."""
    desk.ask("POST", f"/api/runners/{segment(runner_id)}/rotate")
    click.echo(f"{runner_id} takes a new secret with its next heartbeat")


@runners.command("revoke")
@click.argument("runner_id")
@administers
def revoke_runner(desk: Desk, runner_id: str) -> None:
    """Let a runner be one no more; the steps it holds go to others."""
    desk.ask("DELETE", f"/api/runners/{segment(runner_id)}")
    click.echo(f"{runner_id} is no runner any more")


@runners.command("enrol")
@click.argument("name")
@click.option("--tenant", "account", help="Account whose steps the runners take.")
@click.option("--shared", is_flag=True, help="Instead: they take the steps of every tenant.")
@click.option("--label", "labels", multiple=True, help="A label they may have; may be given often.")
@click.option("--no-labels", is_flag=True, help="They may have none; else, without --label, any.")
@click.option("--uses", type=click.IntRange(1, MAX_USES), default=1, show_default=True, help="How many.")
@click.option(
    "--hours",
    type=click.IntRange(1, MAX_LIFETIME.days * 24),
    default=24,
    show_default=True,
    help="How long the token counts.",
)
@administers
def enrol(
    desk: Desk,
    name: str,
    account: str | None,
    shared: bool,
    labels: tuple[str, ...],
    no_labels: bool,
    uses: int,
    hours: int,
) -> None:
    """Make a token by which machines become runners, and show it, this once."""
    if shared == bool(account):
        raise click.UsageError("name either --tenant or --shared")
    if labels and no_labels:
        raise click.UsageError("name either --label or --no-labels")
    body: dict[str, Any] = {
        "name": name,
        "maxUses": uses,
        "expiresInSeconds": hours * 3600,
        "shared": shared,
    }
    if labels or no_labels:
        body["labels"] = list(labels)
    made = desk.ask("POST", "/api/enrolment-tokens", tenant=_tenant_id(desk, account), json=body)
    click.echo(made["token"])


@runners.group("tokens")
def tokens() -> None:
    """Enrolment tokens: what lets machines become runners."""


@tokens.command("list")
@click.option("--tenant", "account", help="Only those of this account.")
@administers
def list_tokens(desk: Desk, account: str | None) -> None:
    """Show the tokens: id, state, uses, end, whose, labels and name, never the token."""
    for found in desk.ask("GET", "/api/enrolment-tokens", tenant=_tenant_id(desk, account)):
        labels = ",".join(found["labels"]) or "no labels" if "labels" in found else "any labels"
        uses = f"{found['uses']}/{found['maxUses']}"
        click.echo(
            f"{found['id']}  {found['state']}  {uses}  until {found['expiresAt']}  "
            f"{_owner(found)}  {labels}  {found['name']}"
        )


@tokens.command("revoke")
@click.argument("token_id")
@administers
def revoke_token(desk: Desk, token_id: str) -> None:
    """Let a token admit nobody any more; the runners that came by it stay."""
    desk.ask("DELETE", f"/api/enrolment-tokens/{segment(token_id)}")
    click.echo(f"{token_id} lets nobody in any more")


def _tenant_id(desk: Desk, account: str | None) -> str | None:
    return str(desk.tenant(account)["id"]) if account else None


def _owner(found: dict[str, Any]) -> str:
    return "shared" if found["isShared"] else str(found.get("accountId", ""))
