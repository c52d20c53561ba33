"""Real processes that are killed without a warning, at every place, and started again on what they left."""

import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.journal import JournalPhase
from tests.factories import ON_SQLITE, a_step
from tests.runner.state_folder import a_state_folder
from tests.trip.lives import AFTER as AFTER_EFFECT
from tests.trip.lives import BEFORE as BEFORE_EFFECT
from tests.trip.lives import deaths_in
from tests.trip.stage import Process, User, free_port, said_in, steps_of, until

NUMBERS = "".join(f"{number}\n" for number in range(300))
LOST_AFTER_S = 3
ONCE = ["step.claimed", "step.started", "step.finished"]


@contextmanager
def closing(*things):
    try:
        yield
    finally:
        for thing in things:
            thing.close()


class Machines:
    """A coordinator and a runner, each a process that can be killed and started again."""

    def __init__(
        self, folder: Path, database: str = "", *, deaths: Path | None = None, executor: str = "process"
    ) -> None:
        self.folder = folder
        self._executor = executor
        self.others: list[Process] = []
        self.port = free_port()
        self._database = ["--database", database] if database else []
        self.user = User(f"http://127.0.0.1:{self.port}")
        self.coordinator = self.start_coordinator(deaths=deaths)
        self.runner = self.start_runner()

    def start_coordinator(self, *, deaths: Path | None = None) -> Process:
        """With `deaths` it is one that dies at the places which `lives` has for it."""
        options = ["--port", str(self.port), "--data", str(self.folder / "data"), *self._database]
        env = {"BUILDMILL_HEARTBEAT": "0.5", "BUILDMILL_LOST_AFTER": str(LOST_AFTER_S)}
        if deaths is None:
            self.coordinator = Process(self.folder, "coordinator", *options, env=env)
        else:
            words = [str(deaths), "coordinator", *options]
            self.coordinator = Process(self.folder, *words, env=env, module="tests.trip.lives")
        until(self.user.is_answered, told=lambda: self.coordinator.output)
        return self.coordinator

    def start_runner(self) -> Process:
        self.runner = self._a_runner("r")
        return self.runner

    def start_another_runner(self) -> Process:
        self.others.append(self._a_runner(f"r{len(self.others)}"))
        return self.others[-1]

    def _a_runner(self, name: str) -> Process:
        options = ["--coordinator", self.user.address, "--state", str(self.folder / name)]
        return Process(self.folder, "runner", *options, "--executor", self._executor)

    def close(self) -> None:
        for runner in (self.runner, *self.others):
            runner.close()
        self.coordinator.close()
        self.user.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def machines(request):
    database = ""
    if request.param == "postgres":
        database = request.getfixturevalue("new_postgres_url")(f"crash_{abs(hash(request.node.nodeid))}")
    with a_state_folder() as folder:
        made = Machines(folder, database)
        with closing(made):
            yield made


def a_talking_spec(folder):
    """Steps that talk for a while and write down that they ran."""
    talk = "for n in $(seq 0 299); do echo $n; sleep 0.005; done"
    return [
        a_step("a", runScript=f"echo a >> {folder}/ran; {talk}; echo out > out", outputPaths=["out"]),
        a_step("b", ["a"], runScript=f"echo b >> {folder}/ran; cat out; {talk}"),
    ]


def assert_ran_once_and_whole(machines, build):
    steps = steps_of(build)
    assert build["status"] == "SUCCESS", machines.user.tell(build["id"])
    assert (machines.folder / "ran").read_text() == "a\nb\n"
    assert said_in(machines.user.log(steps["a"]["id"])) == NUMBERS.encode()
    assert said_in(machines.user.log(steps["b"]["id"])) == b"out\n" + NUMBERS.encode()
    assert [machines.user.transitions(step["id"]) for step in build["steps"]] == [ONCE, ONCE]


def test_a_coordinator_that_is_killed_again_and_again_loses_nothing(machines):
    build = machines.user.submit(a_talking_spec(machines.folder))
    steps = steps_of(build)

    machines.user.await_log(steps["a"]["id"], b"\n100\n")
    machines.coordinator.kill()
    machines.start_coordinator()
    machines.user.await_log(steps["b"]["id"], b"\n50\n")
    machines.coordinator.kill()
    machines.start_coordinator()
    build = machines.user.await_end(build["id"])

    assert_ran_once_and_whole(machines, build)


def test_both_may_be_killed_at_once(machines):
    build = machines.user.submit(a_talking_spec(machines.folder))
    machines.user.await_log(steps_of(build)["a"]["id"], b"\n100\n")

    machines.runner.kill()
    machines.coordinator.kill()
    machines.start_runner()  # comes first, and has to wait
    machines.start_coordinator()
    build = machines.user.await_end(build["id"])

    assert_ran_once_and_whole(machines, build)


@pytest.mark.threat("G01")
@pytest.mark.threat("G10")
def test_a_secret_stays_masked_when_everybody_is_killed_and_it_gets_another_value_meanwhile(machines):
    api, canary = machines.user.api, "canary-1618033988749"
    project = machines.user.a_project()
    path = f"/api/projects/{project}/secrets/TOKEN"
    assert api.client.put(path, json={"value": canary}).status_code == 201
    # cut in the middle of the secret, too, at the very moment of the kill
    talk = 'printf %s "${TOKEN%????}"; sleep 2; echo "${TOKEN#????????????????}"'
    script = f'echo begun; {talk}; for n in $(seq 0 299); do echo "$n $TOKEN"; sleep 0.005; done'
    build = machines.user.submit([a_step("a", runScript=script, secrets=["TOKEN"])], project_id=project)
    step = steps_of(build)["a"]

    machines.user.await_log(step["id"], b"\nbegun\n")
    machines.runner.kill()
    assert api.client.put(path, json={"value": "something else"}).status_code == 204
    machines.coordinator.kill()
    machines.start_runner()
    machines.start_coordinator()
    machines.user.await_log(step["id"], b"\n100 ")
    machines.runner.kill()
    machines.start_runner()
    build = machines.user.await_end(build["id"])

    log = machines.user.log(step["id"])
    assert build["status"] == "SUCCESS", machines.user.tell(build["id"])
    lines = b"".join(b"%d ***\n" % n for n in range(300))
    assert said_in(log) == b"begun\n***\n" + lines
    assert machines.user.transitions(step["id"]) == ONCE
    for process in (machines.runner, machines.coordinator):
        assert canary not in process.output


@pytest.fixture
def folder():
    with a_state_folder() as folder:
        yield folder


def test_a_coordinator_killed_around_the_effect_of_each_request_loses_nothing(folder):
    """What is committed is found again by the runner that repeats itself; what is not is done then."""
    deaths = folder / "deaths"
    with closing(machines := Machines(folder, deaths=deaths)):
        build = machines.user.submit(a_talking_spec(folder))
        until(lambda: machines.runner.output.count("step_completed") == 2, 90)
        build = machines.user.await_end(build["id"])

        assert_ran_once_and_whole(machines, build)
        machines.coordinator.kill()
    places = [f"before-{verb}" for verb in BEFORE_EFFECT] + [f"after-{verb}" for verb in AFTER_EFFECT]
    assert sorted(death.place for death in deaths_in(deaths)) == sorted(places)


def test_a_coordinator_that_is_told_to_stop_does_not_wait_for_those_who_wait_for_it(folder):
    go = folder / "go"
    script = f"echo begun; until test -e {go}; do sleep 0.02; done; echo ended"
    with closing(machines := Machines(folder)):
        user, coordinator = machines.user, machines.coordinator
        waiting = machines.start_another_runner()  # it waits for steps, the first one for events
        build = user.submit([a_step("a", runScript=script)])
        step_id = build["steps"][0]["id"]
        user.await_log(step_id, b"begun")
        until(lambda: "runner: " in waiting.output)

        with user.api.client.stream("GET", f"/api/steps/{step_id}/log?follow=true") as followed:
            lines = followed.iter_lines()
            assert "begun" in "".join(next(lines) for _ in range(3))
            coordinator.send(signal.SIGTERM)
            told = time.monotonic()
            coordinator.wait(20)
        took_s = time.monotonic() - told
        machines.start_coordinator()
        go.touch()
        build = user.await_end(build["id"])

        assert took_s < 4, coordinator.output
        assert "Traceback" not in coordinator.output, coordinator.output
        assert build["status"] == "SUCCESS", user.tell(build["id"])
        assert user.transitions(step_id) == ONCE


def test_an_outcome_waits_on_the_disk_for_the_coordinator_and_for_the_runner(folder):
    """The outage is longer than the time after which a silent runner is given up."""
    go = folder / "go"
    script = f"echo x >> {folder}/ran; echo begun; until test -e {go}; do sleep 0.02; done; echo x > out"
    with closing(machines := Machines(folder)):
        user = machines.user
        build = user.submit([a_step("a", runScript=f"{script}; echo ended", outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        user.await_log(step_id, b"begun")

        machines.coordinator.kill()
        outage = time.monotonic()
        go.touch()
        until(lambda: "uploading" in phases_in(folder / "r"))
        machines.runner.kill()
        machines.start_runner()
        until(lambda: time.monotonic() - outage > LOST_AFTER_S + 1)
        machines.start_coordinator()
        build = user.await_end(build["id"])

        assert build["status"] == "SUCCESS", user.tell(build["id"])
        assert (folder / "ran").read_text() == "x\n"
        assert said_in(user.log(step_id)) == b"begun\nended\n"
        assert user.transitions(step_id) == ONCE


# A runner that is killed at every phase.

BEFORE = ["acquire", "source", "start", "log", "head_blob", "put_blob", "complete"]
AFTER = ["acquire", "source", "start", "log", "put_blob", "complete"]
PHASES = [phase for phase in JournalPhase if phase is not JournalPhase.CLEANING]
# The first phase has a line for the commit and one for who may write its caches.
LINES = {JournalPhase.CLAIMED: 3}
PLACES = [("before", verb) for verb in BEFORE] + [("after", verb) for verb in AFTER]


def phases_in(state: Path) -> list[str]:
    found = []
    for journal in (state / "a").glob("*/*/journal.json"):
        try:
            found.append(json.loads(journal.read_bytes())["phase"])
        except FileNotFoundError:
            continue  # it has just been removed
    return found


def a_chain(folder, names, **fields):
    """A step for each name, in a row; each writes down that it ran."""
    chain = []
    for index, name in enumerate(names):
        behind = [names[index - 1]] if index else []
        script = f"echo {name} >> {folder}/ran; cat {folder}/numbers; echo {name} | tee out-{name}; cat file"
        chain.append(a_step(name, behind, runScript=script, outputPaths=[f"out-{name}"], **fields))
    return chain


def assert_each_ran_once(stage, build, names):
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert (stage.folder / "ran").read_text().split() == names
    for step in build["steps"]:
        told = NUMBERS + step["name"] + "\ncontent"
        assert said_in(stage.log(step["id"])) == told.encode(), step["name"]
        assert stage.transitions(step["id"]) == ONCE, step["name"]
        assert step["attempt"] == 1


@pytest.fixture
def repository(stage):
    (stage.folder / "numbers").write_text(NUMBERS)
    repository = stage.a_repository()
    repository.commit({"file": "content"})
    return repository


@ON_SQLITE
def test_a_runner_killed_at_each_request_goes_on_where_it_was(stage, repository):
    """Each step of the build is interrupted at another place, before the request or after its effect."""
    names = [f"{when}-{verb}" for when, verb in PLACES]
    build = stage.submit(a_chain(stage.folder, names), repoUrl=repository.url, branch="main")
    seen = []

    for when, verb in PLACES:
        hold = stage.gate.hold_before if when == "before" else stage.gate.hold_after
        arrived = hold(verb)
        runner = stage.a_runner_process()
        assert arrived.wait(30), f"{when} {verb}: {runner.output}"
        seen.append(phases_in(stage.folder / "r"))
        runner.kill()
        stage.gate.open()
    stage.a_runner_process()
    build = stage.await_end(build["id"], 90)

    assert_each_ran_once(stage, build, names)
    assert {phase for phases in seen for phase in phases} >= {
        "claimed",
        "creating",
        "uploading",
        "completing",
    }


@ON_SQLITE
def test_a_runner_killed_before_and_after_each_line_of_its_journal_goes_on_where_it_was(stage, repository):
    """Twenty deaths in one build; the next life begins at once, as it does when one hands over to another."""
    deaths = stage.folder / "deaths"
    names = [
        f"{when}-{phase}-{line}"
        for phase in PHASES
        for line in range(1, LINES.get(phase, 1) + 1)
        for when in ("before", "after")
    ]
    build = stage.submit(a_chain(stage.folder, names, cacheDirs=["c"]), repoUrl=repository.url, branch="main")

    runner = stage.a_runner_with_many_lives(deaths)
    build = stage.await_end(build["id"], 100)

    assert_each_ran_once(stage, build, names)
    # the last two deaths come when the build has ended
    until(lambda: [death.place for death in deaths_in(deaths)] == names, 20, told=lambda: runner.output)
    until(lambda: len(stage.gate.times_of("resume")) > len(names), 20)
    resumed = stage.gate.times_of("resume")
    for death in deaths_in(deaths):
        assert any(0 < came - death.at < 10 for came in resumed), death
    until(lambda: phases_in(stage.folder / "r") == [], 10)


@ON_SQLITE
def test_a_runner_killed_while_it_cleans_up_what_was_cancelled_leaves_nothing(stage):
    deaths, pids = stage.folder / "deaths", stage.folder / "pids"
    names = [f"{when}-cleaning-{line}" for line in (1, 2) for when in ("before", "after")]
    script = f"echo $$ >> {pids}; echo begun; sleep 600"
    build = stage.submit([a_step(name, runScript=script) for name in names])
    runner = stage.a_runner_with_many_lives(deaths, "--slots", str(len(names)))
    for step in build["steps"]:
        stage.await_log(step["id"], b"begun")

    stage.cancel(build["id"])
    build = stage.await_end(build["id"])

    until(
        lambda: sorted(death.place for death in deaths_in(deaths)) == sorted(names),
        told=lambda: runner.output,
    )
    until(lambda: list((stage.folder / "r" / "a").glob("*/*")) == [], told=lambda: runner.output)
    assert {step["status"] for step in build["steps"]} == {"CANCELLED"}
    assert [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()] == []
