"""What of a project would go now, and why; nothing changes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.rules.retention import (
    DELETED_PROJECT_DAYS,
    BuildFacts,
    Expiry,
    Part,
    Retention,
    everything,
    kept_for_ever,
    what_expires,
)
from coordinator.settings import Settings
from coordinator.store import retention

ASKED_BY_ID = 500


@dataclass(frozen=True)
class RetentionPlan:
    """The rules that hold for a project and what they let go, in the order in which it goes."""

    rules: Retention
    expiries: list[Expiry]


@dataclass(frozen=True)
class Weighed:
    """One thing that goes, and how much it is."""

    expiry: Expiry
    files: int
    size: int


def plan_retention(tx: Session, settings: Settings, project: Any, *, now: datetime) -> RetentionPlan:
    rules = default_rules(settings).overridden_by(project.retention)
    if project.deleted_at is not None:
        is_over = project.deleted_at <= now - timedelta(days=DELETED_PROJECT_DAYS)
        return RetentionPlan(rules, everything(retention.list_facts(tx, project.id)) if is_over else [])
    if rules.keeps_everything:
        return RetentionPlan(rules, [])
    builds = retention.list_facts(tx, project.id)
    kept = kept_for_ever(builds, default_branch=project.default_branch)
    kept_bytes = 0
    if rules.megabytes:
        builds, kept_bytes = _weighed(tx, project.id, builds, kept)
    return RetentionPlan(rules, what_expires(rules, builds, kept, kept_bytes=kept_bytes, now=now))


def weigh(tx: Session, project_id: str, expiries: Iterable[Expiry]) -> list[Weighed]:
    """The same with files and bytes; bytes that several builds share count for each of them."""
    going = list(expiries)
    few = {one.build_id for one in going} if len(going) <= ASKED_BY_ID else None
    usage = retention.list_usage(tx, project_id, few)
    nothing = retention.Usage()
    weighed = []
    for one in going:
        held = usage.get(one.build_id, nothing)
        files = (0 if one.part is Part.LOGS else held.files) + (
            0 if one.part is Part.ARTIFACTS else held.logs
        )
        size = (0 if one.part is Part.LOGS else held.artifact_bytes) + (
            0 if one.part is Part.ARTIFACTS else held.log_bytes
        )
        weighed.append(Weighed(one, files, size))
    return weighed


def default_rules(settings: Settings) -> Retention:
    """The rules of projects that have none of their own."""
    return Retention(
        log_days=settings.retain_log_days,
        artifact_days=settings.retain_artifact_days,
        build_days=settings.retain_build_days,
        builds=settings.retain_builds,
        megabytes=settings.retain_megabytes,
    )


def _weighed(
    tx: Session, project_id: str, builds: list[BuildFacts], kept: set[str]
) -> tuple[list[BuildFacts], int]:
    """The builds with their bytes, and the bytes of those that are kept."""
    usage = retention.list_usage(tx, project_id)
    logs = {build_id: held.log_bytes for build_id, held in usage.items()}
    files, kept_bytes = retention.weigh_artifacts(tx, project_id, kept)
    weighed = [
        replace(build, artifact_bytes=files.get(build.number, 0), log_bytes=logs.get(build.id, 0))
        for build in builds
    ]
    return weighed, kept_bytes + sum(build.log_bytes for build in weighed if build.id in kept)
