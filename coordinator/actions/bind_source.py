"""The first step that resolves the branch binds the whole build to its commit."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_leased_step
from coordinator.errors import Invalid
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, builds
from shared.faults import Fault


def bind_source(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, *, commit: str, now: datetime
) -> str:
    """The commit that binds every step of the build; the first one named wins."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    build = builds.get_build(tx, step.build_id)
    wanted = build.requested_commit
    if wanted and not commit.startswith(wanted):
        raise Invalid(
            "the commit is not the one that was asked for",
            details=(Fault("commit", f"must begin with {wanted}"),),
        )
    bound, is_new = builds.bind_commit(tx, step.build_id, commit, now=now)
    if is_new:
        about = {"buildId": build.id, "commit": bound}
        audit.record(tx, caller, "build.commit_bound", now=now, project_id=build.project_id, **about)
    return bound
