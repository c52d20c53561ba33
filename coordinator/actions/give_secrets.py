"""A step's secrets on their way to the runner that holds it; nothing else opens them."""

from collections.abc import Sequence
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.sealing import CannotOpen, Place, Sealed
from coordinator.site import Site
from coordinator.store import project_secrets
from shared.references import SECRETS_TOTAL_LIMIT

log = structlog.get_logger()


class SecretsRefused(Exception):
    """The step cannot be given what it names; the message names the secret and tells nothing of a value."""


def give_secrets(tx: Session, site: Site, step: Any, build: Any, names: Sequence[str]) -> dict[str, str]:
    """The values that are set now, written down for the attempt; asked again, the same values."""
    if build.repo_url and not build.is_project_repository:
        raise SecretsRefused(
            "only builds of the project's own repository are given secrets, and this is another one"
        )
    given = project_secrets.list_given(tx, step.id, step.attempt)
    if given:
        rows = {row.name: row for row in project_secrets.list_by_id(tx, step.project_id, given)}
    else:
        rows = project_secrets.find_current(tx, step.project_id, names)
    missing = next((name for name in names if name not in rows), None)
    if missing is not None:
        raise SecretsRefused(f"the project has no secret {missing}")
    values = {name: _open(site, rows[name]) for name in names}
    if sum(len(value.encode()) for value in values.values()) > SECRETS_TOTAL_LIMIT:
        raise SecretsRefused(f"the step's secrets are longer than {SECRETS_TOTAL_LIMIT} bytes together")
    if not given:
        project_secrets.note_given(tx, step.id, step.attempt, [rows[name].id for name in names])
    return values


def give_secrets_again(tx: Session, site: Site, step: Any) -> dict[str, str]:
    """What the current attempt was given, for a runner that has restarted and must mask it.

    What can no longer be had is missing: the runner then sends no log.
    """
    rows = project_secrets.list_by_id(
        tx, step.project_id, project_secrets.list_given(tx, step.id, step.attempt)
    )
    try:
        return {row.name: _open(site, row) for row in rows}
    except SecretsRefused as error:
        log.warning("secrets_not_given_again", step=step.id, cause=str(error))
        return {}


def _open(site: Site, row: Any) -> str:
    try:
        return site.secret_keys.open(
            Sealed(row.key_id, bytes(row.sealed)), Place(row.id, row.project_id, row.name)
        )
    except CannotOpen as error:
        raise SecretsRefused(f"the secret {row.name} cannot be opened: {error}") from error
