"""Group I, what runners can try with steps that are, or were, or never were theirs: on both databases."""

from collections.abc import Callable
from typing import Any

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.renew_leases import renew_leases
from coordinator.actions.show_cancel import show_cancel
from coordinator.errors import StaleAttempt
from shared.protocol import Action, Heartbeat, Phase
from tests.factories import LOCAL, Api, Held, HeldOverHttp, Mill, a_step, together

REACHABLE_S, SILENT_S = 15, 120


def beat(mill: Mill, held: Held, phase: Phase) -> Action:
    said = Heartbeat(session=held.runner.session, attempts=[held.report(phase)])
    return mill.now(renew_leases, mill.site, held.runner.caller, said).attempts[0].action


def queued(mill: Mill) -> tuple[str, Held | None]:
    return mill.a_build().id, None


def unacknowledged(mill: Mill) -> tuple[str, Held | None]:
    held = mill.an_acquired_step()
    return held.claim.build_id, held


def pulling(mill: Mill) -> tuple[str, Held | None]:
    held = mill.an_acquired_step()
    beat(mill, held, Phase.PULLING)
    return held.claim.build_id, held


def running(mill: Mill) -> tuple[str, Held | None]:
    held = mill.a_running_step()
    beat(mill, held, Phase.RUNNING)
    return held.claim.build_id, held


def uploading(mill: Mill) -> tuple[str, Held | None]:
    held = mill.a_running_step()
    beat(mill, held, Phase.UPLOADING)
    return held.claim.build_id, held


def completing(mill: Mill) -> tuple[str, Held | None]:
    held = mill.a_running_step()
    mill.append(held, 0, b"all of it\n")
    beat(mill, held, Phase.COMPLETING)
    return held.claim.build_id, held


STAGES = pytest.mark.parametrize(
    "stage",
    [queued, unacknowledged, pulling, running, uploading, completing],
    ids=lambda stage: stage.__name__,
)
Stage = Callable[[Mill], tuple[str, Held | None]]


def assert_cancelled_once(mill: Mill, build_id: str) -> None:
    build = mill.build(build_id)
    assert (build.state, build.reason) == ("cancelled", "cancelled")
    assert len([row for row in mill.audited("build.finished") if row.details["buildId"] == build_id]) == 1
    assert mill.acquire(mill.a_runner()) == []


@STAGES
@pytest.mark.threat("I16")
def test_a_cancel_at_any_moment_ends_a_reachable_step_within_seconds(mill: Mill, stage: Stage) -> None:
    build_id, held = stage(mill)
    mill.now(cancel_build, mill.site, LOCAL, build_id)
    begun = mill.clock()

    for _ in range(SILENT_S // 5):
        if held is None or mill.build(build_id).state == "cancelled":
            break
        mill.clock.advance(5)
        phase = Phase(mill.step(held.step_id).phase or Phase.PULLING)
        assert beat(mill, held, phase) is Action.CANCEL
        mill.complete(held, "success" if stage is completing else "failed")
        mill.expire()

    assert (mill.clock() - begun).total_seconds() <= REACHABLE_S
    assert_cancelled_once(mill, build_id)


@STAGES
@pytest.mark.threat("I16")
def test_a_cancel_at_any_moment_ends_the_step_of_a_dead_runner(mill: Mill, stage: Stage) -> None:
    build_id, held = stage(mill)
    mill.now(cancel_build, mill.site, LOCAL, build_id)
    begun = mill.clock()

    for _ in range(SILENT_S // 5):
        if mill.build(build_id).state == "cancelled":
            break
        mill.clock.advance(5)
        mill.expire()

    assert (mill.clock() - begun).total_seconds() <= SILENT_S
    assert_cancelled_once(mill, build_id)
    if held is not None:
        with pytest.raises(StaleAttempt):
            mill.append(held, 100, b"late")
        assert mill.complete(held).state == "cancelled"
        assert mill.build(build_id).state == "cancelled"


@pytest.mark.threat("I16")
def test_a_cancel_is_no_sign_of_life(mill: Mill) -> None:
    _, held = running(mill)
    assert held is not None
    seen = mill.step(held.step_id).last_seen_at
    mill.clock.advance(7)

    mill.now(cancel_build, mill.site, LOCAL, held.claim.build_id)

    assert mill.step(held.step_id).last_seen_at == seen


@pytest.mark.threat("I16")
def test_a_completion_that_was_there_first_stays(mill: Mill) -> None:
    spec = [a_step("first"), a_step("second")]
    build = mill.a_build(spec)
    first, second = mill.acquire(mill.a_runner(), slots=2)
    for held in (first, second):
        mill.start(held)
    mill.complete(first)

    cancel_id = mill.now(cancel_build, mill.site, LOCAL, build.id).cancel_id or ""
    mill.complete(second)

    assert mill.states(build) == {"first": "succeeded", "second": "cancelled"}
    assert [step.row.name for step in mill.now(show_cancel, LOCAL, cancel_id).steps] == ["second"]


@pytest.mark.threat("I16")
def test_many_cancels_at_once_give_one_receipt(mill: Mill) -> None:
    _, held = running(mill)
    assert held is not None

    cancelled = together(
        *[lambda: mill.now(cancel_build, mill.site, LOCAL, held.claim.build_id).cancel_id] * 8
    )

    assert len(set(cancelled)) == 1
    assert len(mill.audited("build.cancelled")) == 1


# --- words of who never had the step


@pytest.mark.threat("I01")
def test_who_speaks_of_another_ones_attempt_is_refused_and_written_down(api: Api) -> None:
    held = api.a_running_step()
    thief = api.a_runner()

    for stolen in (
        HeldOverHttp(held.client, held.claim, thief),
        HeldOverHttp(held.client, {**held.claim, "lease": "x" * 43}, held.runner),
        HeldOverHttp(held.client, {**held.claim, "attempt": 7}, held.runner),
    ):
        answer = stolen.complete()
        assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt")

    assert api.build(held.claim["buildId"])["steps"][0]["status"] == "RUNNING"
    told = {"method": "POST", "path": "/api/runner/{stepId}/complete", "status": 409}
    denied = denials(api)
    assert [row["details"] for row in denied] == [told, told], "one row a second for each who spoke"
    assert all(row["actor"].startswith("runner:") for row in denied)


@pytest.mark.threat("I01")
def test_a_runner_that_is_merely_late_is_refused_and_not_accused(mill: Mill, api: Api) -> None:
    mill.clock.advance(100)
    held = api.a_running_step()
    mill.clock.advance(61)
    mill.expire()
    mill.clock.advance(10)
    assert api.acquire(api.a_runner())

    assert held.complete().status_code == 409

    assert denials(api) == []


def denials(api: Api) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get("/api/audit-logs?action=access.denied")["auditLogs"]
    return found


@pytest.mark.threat("I04")
@pytest.mark.parametrize("word", ["log", "blob", "start", "release", "complete"])
def test_nothing_that_a_zombie_says_reaches_the_attempt_of_its_successor(
    mill: Mill, api: Api, word: str
) -> None:
    mill.clock.advance(100)
    zombie = api.a_running_step()
    mill.clock.advance(61)
    mill.expire()
    mill.clock.advance(10)
    runner = api.a_runner()
    held = HeldOverHttp(api.client, api.acquire(runner)[0], runner)
    assert held.post("start", {}).status_code == 200
    before = api.build(held.claim["buildId"])

    answer = {
        "log": lambda: zombie.append(0, b"from the dead"),
        "blob": lambda: zombie.put_blob("0" * 64, b"from the dead"),
        "start": lambda: zombie.post("start", {}),
        "release": lambda: zombie.post("release", {}),
        "complete": zombie.complete,
    }[word]()

    assert answer.status_code == 409
    assert api.build(held.claim["buildId"]) == before
    said = {"session": "the-session", "attempts": [attempt_of(zombie)]}
    orders = api.client.post("/api/runner/heartbeat", json=said, headers=zombie.runner).json()
    assert orders["attempts"][0]["action"] == "abandon"
    assert zombie.post("cleaned", {"cleanedAgeS": 0}).status_code == 200
    assert held.complete().status_code == 200


def attempt_of(held: HeldOverHttp) -> dict[str, Any]:
    return {
        "stepId": held.step_id,
        "attempt": held.claim["attempt"],
        "lease": held.claim["lease"],
        "phase": "running",
    }
