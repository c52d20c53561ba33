"""What may go, decided from values alone."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from coordinator.rules.retention import (
    MEGABYTE,
    BuildFacts,
    Part,
    Retention,
    Why,
    everything,
    kept_for_ever,
    what_expires,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def a_build(number: int, *, days: float = 0, **facts: object) -> BuildFacts:
    """A failed build that ended so many days ago, with artifacts and logs."""
    made = BuildFacts(
        id=f"build-{number}",
        number=number,
        workflow_id="workflow",
        branch="main",
        has_ended=True,
        has_succeeded=False,
        finished_at=NOW - timedelta(days=days),
        has_artifacts=True,
        has_logs=True,
    )
    return replace(made, **facts)  # type: ignore[arg-type]


def going(
    rules: Retention, *builds: BuildFacts, default_branch: str | None = "main"
) -> list[tuple[int, str]]:
    kept = kept_for_ever(builds, default_branch=default_branch)
    return [(one.number, str(one.part)) for one in what_expires(rules, builds, kept, now=NOW)]


def kept(*builds: BuildFacts, default_branch: str | None = "main") -> set[int]:
    ids = kept_for_ever(builds, default_branch=default_branch)
    return {build.number for build in builds if build.id in ids}


def test_without_rules_nothing_goes() -> None:
    assert Retention().keeps_everything
    assert going(Retention(), a_build(1, days=30000)) == []


def test_each_part_goes_at_its_own_age() -> None:
    builds = [a_build(1, days=40), a_build(2, days=20), a_build(3, days=10), a_build(4, days=9.99)]

    assert going(Retention(artifact_days=10, log_days=20, build_days=40), *builds) == [
        (2, "artifacts"),
        (3, "artifacts"),
        (2, "logs"),
        (1, "build"),
    ]


def test_all_but_the_newest_go_when_their_count_is_limited() -> None:
    builds = [a_build(number) for number in (1, 2, 3, 4)]

    assert going(Retention(builds=2), *builds) == [(1, "build"), (2, "build")]


def test_builds_that_have_not_ended_stay_and_count() -> None:
    unfinished = a_build(3, has_ended=False, finished_at=None)
    builds = [a_build(1, days=50), a_build(2, days=50), unfinished]

    assert kept(*builds) == {3}
    assert going(Retention(builds=1), *builds) == [(1, "build"), (2, "build")]
    assert going(Retention(build_days=1), replace(unfinished, finished_at=NOW - timedelta(days=9))) == []


def test_the_last_success_of_every_workflow_and_of_the_default_branch_stays() -> None:
    builds = [
        a_build(1, has_succeeded=True),
        a_build(2, has_succeeded=True),
        a_build(3, has_succeeded=True, branch="topic"),
        a_build(4, has_succeeded=True, branch="topic"),
        a_build(5, has_succeeded=True, workflow_id="other", branch="topic"),
        a_build(6),
    ]

    assert kept(*builds) == {2, 4, 5}
    assert going(Retention(builds=1), *builds) == [(1, "build"), (3, "build")]


def test_without_a_default_branch_the_last_success_of_every_branch_stays() -> None:
    builds = [
        a_build(1, has_succeeded=True),
        a_build(2, has_succeeded=True, branch="topic"),
        a_build(3, has_succeeded=True, branch="topic"),
        a_build(4, has_succeeded=True, branch=None),
    ]

    assert kept(*builds, default_branch=None) == {1, 3, 4}


def test_artifacts_go_before_logs_and_the_oldest_first_until_the_rest_fits() -> None:
    builds = [a_build(n, artifact_bytes=3 * MEGABYTE, log_bytes=MEGABYTE) for n in (1, 2, 3)]

    assert going(Retention(megabytes=12), *builds) == []
    assert going(Retention(megabytes=9), *builds) == [(1, "artifacts")]
    assert going(Retention(megabytes=2), *builds) == [
        (1, "artifacts"),
        (2, "artifacts"),
        (3, "artifacts"),
        (1, "logs"),
    ]


def test_bytes_that_count_for_a_newer_build_are_freed_with_it() -> None:
    builds = [a_build(1), a_build(2, artifact_bytes=MEGABYTE), a_build(3, artifact_bytes=2 * MEGABYTE)]

    assert going(Retention(megabytes=2), *builds) == [(1, "artifacts"), (2, "artifacts")]


def test_what_goes_by_age_counts_no_more_for_the_size() -> None:
    old = a_build(1, days=50, artifact_bytes=5 * MEGABYTE, log_bytes=5 * MEGABYTE)
    young = a_build(2, artifact_bytes=5 * MEGABYTE)

    assert going(Retention(build_days=20, megabytes=5), old, young) == [(1, "build")]
    assert going(Retention(artifact_days=20, log_days=20, megabytes=5), old, young) == [
        (1, "artifacts"),
        (1, "logs"),
    ]


def test_what_cannot_be_freed_counts_for_the_size() -> None:
    builds = [a_build(1, artifact_bytes=MEGABYTE)]

    assert what_expires(Retention(megabytes=5), builds, set(), kept_bytes=4 * MEGABYTE, now=NOW) == []
    (gone,) = what_expires(Retention(megabytes=5), builds, set(), kept_bytes=5 * MEGABYTE, now=NOW)
    assert (gone.part, gone.why) == (Part.ARTIFACTS, Why.SIZE)


def test_a_build_is_named_once_with_its_first_reason() -> None:
    (gone,) = what_expires(Retention(build_days=1, builds=1), [a_build(1, days=9)], set(), now=NOW)

    assert (gone.part, gone.why) == (Part.BUILD, Why.AGE)


def test_of_a_deleted_project_every_build_that_has_ended_goes() -> None:
    builds = [a_build(2, has_succeeded=True), a_build(1), a_build(3, has_ended=False)]

    assert [(one.number, one.why) for one in everything(builds)] == [
        (1, Why.PROJECT_DELETED),
        (2, Why.PROJECT_DELETED),
    ]


@pytest.mark.parametrize(
    ("own", "rules"),
    [
        (None, Retention(log_days=7, builds=9)),
        ({"log_days": 0}, Retention(builds=9)),
        ({"builds": 3, "megabytes": 5}, Retention(log_days=7, builds=3, megabytes=5)),
        ({"of_another_version": 3}, Retention(log_days=7, builds=9)),
    ],
)
def test_rules_of_a_project_replace_the_defaults_one_by_one(
    own: dict[str, int] | None, rules: Retention
) -> None:
    assert Retention(log_days=7, builds=9).overridden_by(own) == rules
