"""Whether all that a completion speaks of has arrived, and is not too much."""

import hashlib
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.errors import Invalid, LogIncomplete, OutputsIncomplete
from coordinator.site import Site
from coordinator.store import artifacts, attempts
from shared.protocol import Completion
from shared.step_paths import is_pattern


@dataclass(frozen=True)
class SealedLog:
    """The log as it was found on the disk right before: so many bytes with this digest."""

    size: int
    sha256: str


EMPTY_LOG = SealedLog(0, hashlib.sha256().hexdigest())


def check_completion(tx: Session, site: Site, step: Any, said: Completion, sealed: SealedLog) -> None:
    """LogIncomplete, OutputsIncomplete or Invalid when the attempt cannot end like this, or not yet."""
    _require_whole_log(tx, step, said, sealed)
    if said.status == "success":
        _require_within_limits(site, said)
        _require_outputs(tx, step, said)


def _require_whole_log(tx: Session, step: Any, said: Completion, sealed: SealedLog) -> None:
    has_all = step.log_size == said.log_size == sealed.size
    if said.log_size is None or (has_all and said.log_sha256 in (None, sealed.sha256)):
        return
    row = attempts.find_attempt(tx, step.id, step.attempt)
    if row is None or row.log_state != "truncated":
        raise LogIncomplete(0 if has_all else step.log_size)


def _require_within_limits(site: Site, said: Completion) -> None:
    settings = site.settings
    if len(said.artifacts) > settings.artifact_count:
        raise Invalid(f"a step may have {settings.artifact_count} outputs, not {len(said.artifacts)}")
    total = sum(entry.size for entry in said.artifacts)
    if total > settings.artifact_limit:
        raise Invalid(f"the outputs of a step may have {settings.artifact_limit} bytes, not {total}")


def _require_outputs(tx: Session, step: Any, said: Completion) -> None:
    missing = [
        pattern
        for pattern in step.spec["outputPaths"]
        if not is_pattern(pattern)
        and not any(entry.path == pattern or entry.path.startswith(pattern + "/") for entry in said.artifacts)
    ]
    if missing:
        raise OutputsIncomplete(
            f"the completion lacks {len(missing)} required outputs, such as {missing[0]!r}"
        )
    files = [entry for entry in said.artifacts if entry.type == "file"]
    sizes = artifacts.list_blob_sizes(tx, step.project_id, [entry.sha256 for entry in files])
    absent = [entry.path for entry in files if sizes.get(entry.sha256) != entry.size]
    if absent:
        raise OutputsIncomplete(f"{len(absent)} blobs have not arrived, such as that of {absent[0]!r}")
