"""What may go, decided from values alone: by age, by count, by size, and what is kept whatever they say."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum

MEGABYTE = 1024 * 1024
DELETED_PROJECT_DAYS = 30


class Part(StrEnum):
    """What of a build goes; each goes with what stands before it."""

    ARTIFACTS = "artifacts"
    LOGS = "logs"
    BUILD = "build"


class Why(StrEnum):
    """The rule that lets it go."""

    AGE = "age"
    COUNT = "count"
    SIZE = "size"
    PROJECT_DELETED = "project_deleted"


@dataclass(frozen=True)
class Retention:
    """How long and how much is kept; 0 keeps for ever."""

    log_days: int = 0
    artifact_days: int = 0
    build_days: int = 0
    builds: int = 0
    megabytes: int = 0

    def overridden_by(self, own: dict[str, int] | None) -> "Retention":
        """These rules with those that a project has of its own."""
        known = {field.name for field in fields(self)}
        return Retention(
            **{name: getattr(self, name) for name in known}
            | {name: days for name, days in (own or {}).items() if name in known}
        )

    @property
    def keeps_everything(self) -> bool:
        return self == Retention()


@dataclass(frozen=True)
class BuildFacts:
    """What the rules look at in one build; bytes count for the newest build that refers to them."""

    id: str
    number: int
    workflow_id: str
    branch: str | None
    has_ended: bool
    has_succeeded: bool
    finished_at: datetime | None
    has_artifacts: bool
    has_logs: bool
    artifact_bytes: int = 0
    log_bytes: int = 0


@dataclass(frozen=True)
class Expiry:
    """One thing that goes, and why."""

    build_id: str
    number: int
    part: Part
    why: Why
    finished_at: datetime | None


def kept_for_ever(builds: Iterable[BuildFacts], *, default_branch: str | None) -> set[str]:
    """What no rule touches: builds that have not ended and the last successes.

    Those are the last success of each workflow and the last one on the default branch; a project that
    names no default branch keeps the last one on every branch.
    """
    kept: set[str] = set()
    seen: set[tuple[str, ...]] = set()
    for build in sorted(builds, key=lambda build: -build.number):
        if not build.has_ended:
            kept.add(build.id)
        if not build.has_succeeded:
            continue
        counts_for: list[tuple[str, ...]] = [(build.workflow_id,)]
        if default_branch is None or build.branch == default_branch:
            counts_for.append((build.workflow_id, build.branch or ""))
        if not seen.issuperset(counts_for):
            kept.add(build.id)
            seen.update(counts_for)
    return kept


def what_expires(
    rules: Retention,
    builds: Sequence[BuildFacts],
    kept: Collection[str],
    *,
    kept_bytes: int = 0,
    now: datetime,
) -> list[Expiry]:
    """Everything that goes, oldest build first: artifacts, then logs, then builds.

    `kept_bytes` are those that no rule can free. A build that goes takes artifacts and logs along.
    """
    newest_first = sorted(builds, key=lambda build: -build.number)
    position = {build.id: place for place, build in enumerate(newest_first)}
    going: dict[tuple[str, Part], Expiry] = {}
    may_go = [build for build in reversed(newest_first) if build.id not in kept and build.has_ended]

    def let_go(build: BuildFacts, part: Part, why: Why) -> None:
        going[build.id, part] = Expiry(build.id, build.number, part, why, build.finished_at)

    for build in may_go:
        if _is_older(build, rules.build_days, now):
            let_go(build, Part.BUILD, Why.AGE)
        elif rules.builds and position[build.id] >= rules.builds:
            let_go(build, Part.BUILD, Why.COUNT)
        else:
            if build.has_artifacts and _is_older(build, rules.artifact_days, now):
                let_go(build, Part.ARTIFACTS, Why.AGE)
            if build.has_logs and _is_older(build, rules.log_days, now):
                let_go(build, Part.LOGS, Why.AGE)
    if rules.megabytes:
        _shrink(rules.megabytes * MEGABYTE, kept_bytes, may_go, going)
    order = list(Part)
    return sorted(going.values(), key=lambda one: (order.index(one.part), one.number))


def everything(builds: Iterable[BuildFacts]) -> list[Expiry]:
    """What is left of a project that was deleted."""
    return [
        Expiry(build.id, build.number, Part.BUILD, Why.PROJECT_DELETED, build.finished_at)
        for build in sorted(builds, key=lambda build: build.number)
        if build.has_ended
    ]


def _is_older(build: BuildFacts, days: int, now: datetime) -> bool:
    return bool(days) and build.finished_at is not None and build.finished_at <= now - timedelta(days=days)


def _shrink(
    limit: int,
    kept_bytes: int,
    oldest_first: Sequence[BuildFacts],
    going: dict[tuple[str, Part], Expiry],
) -> None:
    """Let artifacts go until the rest fits, oldest first, and logs only when that was not enough.

    A build whose bytes count for a newer one goes before that one all the same, or nothing would be freed.
    """
    staying = [build for build in oldest_first if (build.id, Part.BUILD) not in going]
    total = kept_bytes
    for build in staying:
        total += build.artifact_bytes if (build.id, Part.ARTIFACTS) not in going else 0
        total += build.log_bytes if (build.id, Part.LOGS) not in going else 0
    for part in (Part.ARTIFACTS, Part.LOGS):
        for build in staying:
            if total <= limit:
                return
            has_any, size = (
                (build.has_artifacts, build.artifact_bytes)
                if part is Part.ARTIFACTS
                else (build.has_logs, build.log_bytes)
            )
            if has_any and (build.id, part) not in going:
                going[build.id, part] = Expiry(build.id, build.number, part, Why.SIZE, build.finished_at)
                total -= size
