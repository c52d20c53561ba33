"""Runners take steps: each one once, and the same answer to the same question."""

import pytest
from sqlalchemy import update

from coordinator.actions import render_claim
from coordinator.actions.acquire_steps import may_wait
from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.renew_leases import resume_attempts
from coordinator.errors import SessionSuperseded, Unauthenticated
from coordinator.rules.access import Audience, Caller
from coordinator.tables import Runner, Step, table_of
from shared.ids import new_id
from shared.protocol import Acquire, Resume
from tests.factories import LOCAL, ON_POSTGRES, Held, Mill, a_spec, a_step, together

STEPS = table_of(Step)


def test_a_runner_gets_what_is_ready_oldest_first(mill: Mill) -> None:
    old = mill.a_build(a_spec(one=[], two=["one"]))
    mill.clock.advance(1)
    young = mill.a_build()

    held = mill.acquire(mill.a_runner(), slots=8)

    assert [one.step_id for one in held] == [old.steps["one"], young.steps["test"]]
    assert [one.claim.attempt for one in held] == [1, 1]
    assert mill.build(old.id).state == "running"
    assert mill.build(old.id).started_at == mill.clock()


def test_nobody_gets_more_than_its_slots(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[], three=[]))

    assert len(mill.acquire(mill.a_runner(), slots=2)) == 2


def test_a_claim_says_everything_its_runner_needs(mill: Mill) -> None:
    spec = [
        a_step(
            "test",
            runScript="make test",
            cacheDirs=[".cache"],
            outputPaths=["out/"],
            env={"LEVEL": "3"},
            timeoutSeconds=77,
            resources={"cpus": 1.5, "memoryMb": 64},
            network="none",
            exclusive=True,
        )
    ]
    build = mill.a_build(spec, repo_url="https://example.org/r.git", branch="main")

    claim = mill.acquire(mill.a_runner())[0].claim

    assert (claim.build_id, claim.project_id, claim.name) == (build.id, build.project_id, "test")
    assert "make test" in claim.script and "LEVEL" in claim.script
    assert claim.image == "busybox:1"
    assert [mount.path for mount in claim.mounts] == [".cache"]
    assert claim.output_paths == ["out"]
    assert claim.limits.timeout_s == 77
    assert (claim.limits.cpus, claim.limits.memory_mb) == (1.5, 64)
    assert (claim.network, claim.exclusive) == ("none", True)
    assert claim.source is not None
    assert (claim.source.repo_url, claim.source.branch) == ("https://example.org/r.git", "main")


@pytest.mark.threat("I06")
def test_a_claim_says_what_silence_means(mill: Mill) -> None:
    mill.a_build([a_step("a")])
    runner = mill.a_runner()
    mill.clock.advance(30)

    timings = mill.acquire(runner)[0].claim.timings

    settings = mill.site.settings
    assert (timings.lost_after_s, timings.amnesty_s) == (settings.lost_after, settings.amnesty - 30)


def test_two_runners_that_ask_together_never_get_the_same_step(mill: Mill) -> None:
    """200 steps for two runners: each is claimed exactly once."""
    mill.a_build(a_spec(**{f"step-{number}": [] for number in range(200)}))
    runners = [mill.a_runner(), mill.a_runner()]
    got: list[str] = []

    def work(runner: int) -> list[str]:
        mine = []
        while held := mill.acquire(runners[runner], slots=1 + runner):
            mine += [one.step_id for one in held]
        return mine

    for answer in together(lambda: work(0), lambda: work(1)):
        assert not isinstance(answer, Exception), answer
        got += answer

    assert len(got) == 200
    assert len(set(got)) == 200


def test_of_two_runners_that_ask_for_the_last_step_one_gets_it(mill: Mill) -> None:
    runners = [mill.a_runner(), mill.a_runner()]
    for _ in range(10):
        mill.a_build()

        answers = together(*[lambda runner=runner: mill.acquire(runner) for runner in runners])

        held = [one for answer in answers for one in answer]  # type: ignore[union-attr]
        assert len(held) == 1
        mill.complete(held[0])


@pytest.mark.threat("I06")
def test_fifty_runners_that_ask_for_fifty_steps_all_get_one(mill: Mill) -> None:
    mill.a_build(a_spec(**{f"step-{number}": [] for number in range(50)}))
    runners = [mill.a_runner() for _ in range(50)]

    answers = together(*[lambda runner=runner: mill.acquire(runner) for runner in runners])

    assert len({answer[0].step_id for answer in answers}) == 50  # type: ignore[index]


@pytest.mark.threat("I07")
def test_an_answer_that_was_lost_can_be_asked_for_again(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))
    runner = mill.a_runner()

    first = mill.acquire(runner, slots=2, request_id="the-request")
    again = mill.acquire(runner, slots=2, request_id="the-request")

    assert [held.claim for held in again] == [held.claim for held in first]
    assert len(mill.audited("step.claimed")) == 2


def test_the_same_request_sent_twice_at_once_gets_one_step(mill: Mill) -> None:
    runner = mill.a_runner()
    mill.acquire(runner)
    for number in range(6):
        mill.a_build(a_spec(one=[], two=[], three=[]))
        request = f"request-{number}"

        answers = together(*[lambda request=request: mill.acquire(runner, request_id=request)] * 3)

        assert len({answer[0].step_id for answer in answers}) == 1  # type: ignore[index]


def test_a_request_whose_steps_were_used_gets_none(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))
    runner = mill.a_runner()
    held = mill.acquire(runner, request_id="the-request")[0]
    mill.heartbeat(runner, held)

    assert mill.acquire(runner, request_id="the-request") == []

    mill.complete(held)
    assert mill.acquire(runner, request_id="the-request") == []
    assert len(mill.acquire(runner)) == 1


def test_a_request_of_another_runner_is_another_request(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))

    first = mill.acquire(mill.a_runner(), request_id="the-request")[0]
    other = mill.acquire(mill.a_runner(), request_id="the-request")[0]

    assert first.step_id != other.step_id


@pytest.mark.parametrize(
    ("wanted", "offered", "registered", "is_taken"),
    [
        ([], [], [], True),
        ([], ["gpu"], ["gpu"], True),
        (["gpu"], ["gpu"], ["gpu"], True),
        (["gpu", "big"], ["big", "gpu", "x"], ["x", "big", "gpu"], True),
        (["gpu"], [], ["gpu"], False),
        (["gpu", "big"], ["gpu"], ["gpu", "big"], False),
        (["gpu"], ["gpu2"], ["gpu2"], False),
    ],
)
def test_a_runner_gets_steps_whose_labels_it_has_all(
    mill: Mill, wanted: list[str], offered: list[str], registered: list[str], is_taken: bool
) -> None:
    mill.a_build([a_step("test", labels=wanted)])

    held = mill.acquire(mill.a_runner(*registered), labels=offered)

    assert bool(held) is is_taken


@pytest.mark.threat("I09")
def test_a_runner_for_labelled_steps_gets_none_that_ask_for_no_label(mill: Mill) -> None:
    mill.a_build([a_step("for-anybody"), a_step("for-gpus", labels=["gpu"])])
    runner = mill.a_runner("gpu")

    claimed = mill.acquire(runner, slots=5, labels=["gpu"], only_labelled=True)

    assert [held.claim.name for held in claimed] == ["for-gpus"]
    assert [held.claim.name for held in mill.acquire(runner, slots=5)] == ["for-anybody"]


def test_a_label_that_was_not_given_at_registration_does_not_count(mill: Mill) -> None:
    mill.a_build([a_step("test", labels=["privileged"])])

    assert mill.acquire(mill.a_runner(), labels=["privileged"]) == []


def test_a_runner_that_drains_gets_nothing_new_and_keeps_what_it_asked_for(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))
    runner = mill.a_runner()
    held = mill.acquire(runner, request_id="the-request")

    assert mill.acquire(runner, draining=True) == []
    again = mill.acquire(runner, request_id="the-request", draining=True)
    assert [one.step_id for one in again] == [one.step_id for one in held]


def test_a_poll_from_before_the_runner_was_told_to_stop_gets_nothing_either(mill: Mill) -> None:
    mill.a_build()
    runner = mill.a_runner()

    mill.heartbeat(runner, draining=True)

    assert mill.acquire(runner, draining=False) == []
    mill.heartbeat(runner, draining=False)
    assert len(mill.acquire(runner)) == 1


def test_nobody_waits_for_a_request_that_had_its_answer_or_a_runner_that_drains(mill: Mill) -> None:
    mill.a_build()
    runner = mill.a_runner()

    def waits(request_id: str, *, draining: bool = False) -> bool:
        said = Acquire(request_id=request_id, session=runner.session, draining=draining)
        return mill.tx(may_wait, runner.caller, said)

    assert waits("the-request")
    assert not waits("the-request", draining=True)
    mill.acquire(runner, request_id="the-request")
    assert not waits("the-request")
    assert waits("the-next-request")
    mill.heartbeat(runner, draining=True)
    assert not waits("the-next-request")


def test_what_cannot_be_handed_out_fails_alone(mill: Mill) -> None:
    poisoned = mill.a_build(a_spec(bad=[], behind=["bad"]))
    good = mill.a_build()

    def poison(tx: object) -> None:
        tx.connection().execute(  # type: ignore[attr-defined]
            update(STEPS).where(STEPS.c.id == poisoned.steps["bad"]).values(spec={"name": 3})
        )

    mill.tx(poison)
    held = mill.acquire(mill.a_runner(), slots=2)

    assert [one.step_id for one in held] == [good.steps["test"]]
    assert mill.states(poisoned) == {"bad": "failed", "behind": "skipped"}
    assert mill.build(poisoned.id).state == "failed"
    assert mill.build(poisoned.id).reason == "bad_config"
    attempt = mill.attempts(poisoned.steps["bad"])[0]
    assert (attempt.outcome, attempt.reason) == ("failed", "bad_config")
    assert attempt.finished_at == mill.clock()


def test_a_step_with_too_many_inputs_fails_alone_and_says_why(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given two steps that hand on two directories each, and a third behind both
    monkeypatch.setattr(render_claim, "MAX_INPUTS", 3)
    full = mill.a_build(a_spec(one=[], two=["one"], three=["two"]))
    good = mill.a_build()
    runner = mill.a_runner()
    outputs = [{"path": path, "type": "directory"} for path in ("a", "b")]
    for name in ("one", "two"):
        held = next(one for one in mill.acquire(runner, slots=1) if one.claim.name == name)
        mill.complete(held, artifacts=outputs)
        mill.clock.advance(-1)  # what comes next is ready before the other build

    # when a runner asks for all that is ready
    claimed = mill.acquire(runner, slots=2)

    # then the step fails, and the other build goes on
    assert [one.step_id for one in claimed] == [good.steps["test"]]
    assert mill.states(full) == {"one": "succeeded", "two": "succeeded", "three": "failed"}
    attempt = mill.attempts(full.steps["three"])[0]
    assert (attempt.outcome, attempt.reason) == ("failed", "disk_limit")
    assert attempt.detail == "the steps before this one hand on 4 outputs; a step takes at most 3"


def test_a_former_process_of_a_runner_gets_nothing_once_a_newer_one_has_resumed(mill: Mill) -> None:
    mill.a_build()
    runner = mill.a_runner()
    mill.acquire(runner, request_id="the-request")

    mill.now(resume_attempts, mill.site, runner.caller, Resume(session="a-newer-process"))

    with pytest.raises(SessionSuperseded):
        mill.acquire(runner)
    assert mill.acquire(runner, session="a-newer-process") == []


@pytest.mark.threat("I11")
def test_a_revoked_runner_gets_nothing(mill: Mill) -> None:
    mill.a_build()
    runner = mill.a_runner()

    def revoke(tx: object) -> None:
        table = table_of(Runner)
        tx.connection().execute(update(table).values(revoked_at=mill.clock()))  # type: ignore[attr-defined]

    mill.tx(revoke)

    with pytest.raises(Unauthenticated):
        mill.acquire(runner)


def test_who_is_no_runner_gets_nothing(mill: Mill) -> None:
    stranger = Caller(actor="runner:x", audience=Audience.RUNNER, runner_id=new_id())
    runner = mill.a_runner()

    with pytest.raises(Unauthenticated):
        mill.acquire(type(runner)(stranger.runner_id or "", "", runner.session))


def test_a_step_that_waits_for_its_retry_is_not_given_out_before(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.complete(held, "failed", reason="internal")

    assert mill.acquire(held.runner) == []
    mill.clock.advance(10)
    again = mill.acquire(held.runner)
    assert [(one.step_id, one.claim.attempt) for one in again] == [(held.step_id, 2)]


def test_nothing_of_a_cancelled_build_is_given_out(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=[]))
    mill.now(cancel_build, mill.site, LOCAL, build.id)

    assert mill.acquire(mill.a_runner(), slots=2) == []


@ON_POSTGRES
def test_a_hundred_claims_in_a_row_take_no_more_than_was_asked_for(mill: Mill) -> None:
    """A claim that looks twice, as a plain sub-select with a limit may, would take too many."""
    mill.a_build(a_spec(**{f"step-{number}": [] for number in range(120)}))
    runners = [mill.a_runner() for _ in range(4)]

    def work(number: int) -> list[int]:
        return [len(mill.acquire(runners[number], slots=3)) for _ in range(8)]

    for answer in together(*[lambda number=number: work(number) for number in range(4)]):
        assert not isinstance(answer, Exception), answer
        assert max(answer) <= 3


def test_each_lease_is_another_one(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))

    held: list[Held] = mill.acquire(mill.a_runner(), slots=2)

    assert held[0].claim.lease != held[1].claim.lease
    assert len(held[0].claim.lease) == 43
