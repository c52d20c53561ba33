"""A secret of a project gets its value."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.errors import Invalid
from coordinator.rules.access import Caller
from coordinator.sealing import Place
from coordinator.site import Site
from coordinator.store import audit, project_secrets, projects
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, secret_name, secret_value

MAX_SECRETS_OF_A_PROJECT = 1000


def set_secret(
    tx: Session, site: Site, caller: Caller, project_id: str, *, name: str, value: str, now: datetime
) -> tuple[dict[str, Any], bool]:
    """Seal and store the value; returns the row and whether the name is new. No refusal repeats the value."""
    project = projects.get_project(tx, caller, project_id)
    _refuse_what_is_wrong(name, value)
    projects.lock_project(tx, project.id)
    before = project_secrets.find_current(tx, project.id, [name]).get(name)
    if before is None and project_secrets.count_current(tx, project.id) >= MAX_SECRETS_OF_A_PROJECT:
        raise Invalid(f"a project has at most {MAX_SECRETS_OF_A_PROJECT} secrets")
    project_secrets.retire(tx, project.id, name, now=now)
    place = Place(new_id(), project.id, name)
    sealed = site.secret_keys.seal(value, place)
    row = {
        "id": place.row_id,
        "project_id": project.id,
        "name": name,
        "key_id": sealed.key_id,
        "sealed": sealed.sealed,
        "created_at": before.created_at if before is not None else now,
        "updated_at": now,
    }
    project_secrets.insert_secret(tx, row)
    audit.record(
        tx,
        caller,
        "secret.changed" if before is not None else "secret.created",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        name=name,
    )
    return row, before is None


def _refuse_what_is_wrong(name: str, value: str) -> None:
    checks: tuple[tuple[str, Callable[[str], str], str], ...] = (
        ("name", secret_name, name),
        ("value", secret_value, value),
    )
    faults = []
    for path, check, text in checks:
        try:
            check(text)
        except InvalidReference as error:
            faults.append(Fault(path, str(error)))
    if faults:
        raise Invalid("the secret is not valid", details=tuple(faults))
