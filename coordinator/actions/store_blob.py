"""Bytes of an output arrive, and which blobs a runner may read."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_leased_step
from coordinator.errors import NotFound, TooLarge, Unavailable
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import artifacts
from coordinator.store.dialect import hold_names


def expect_blob(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, sha256: str, *, size: int
) -> tuple[str, bool]:
    """The project the blob will belong to, and whether it has it already."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    if size > site.settings.artifact_limit:
        raise TooLarge(
            f"an output may have {site.settings.artifact_limit} bytes", limit=site.settings.artifact_limit
        )
    stored = artifacts.find_blob_size(tx, step.project_id, sha256)
    return step.project_id, stored is not None and site.blobs.has(sha256, stored)


def store_blob(
    tx: Session,
    site: Site,
    caller: Caller,
    step_id: str,
    proof: LeaseProof,
    sha256: str,
    *,
    size: int,
    now: datetime,
) -> None:
    """The project has these bytes from now on; they lie verified in the store already."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    hold_names(tx, [sha256])
    if not site.blobs.has(sha256, size):
        raise Unavailable("these bytes have just been deleted; send them again")
    artifacts.insert_blob(tx, project_id=step.project_id, sha256=sha256, size=size, now=now)


def find_input_blob(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, sha256: str
) -> int:
    """The size of a blob that is named among the inputs of this step; no other is shown."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    size = artifacts.find_input_size(tx, step.build_id, step.id, sha256)
    if size is None:
        raise NotFound("no such blob among the inputs of this step")
    return size
