"""Builds that are retried, with a runner at work."""

from tests.factories import a_step
from tests.trip.stage import said_in, steps_of


def retry(stage, build_id, which="failed"):
    return stage.api.post(f"/api/builds/{build_id}/retry", {"steps": which}, status=200)


def rounds_of(build):
    return {name: step["round"] for name, step in steps_of(build).items()}


def test_only_what_failed_and_what_is_behind_it_runs_again_upon_the_outputs_that_are_there(stage):
    record, flag = stage.folder / "record", stage.folder / "flag"
    stage.a_runner()

    def noting(name, behind=(), script="true"):
        run = f"echo {name} >> {record}; {script}; cat {' '.join(behind)} | tee {name}; echo {name} >> {name}"
        return a_step(name, behind, runScript=run, outputPaths=[name])

    build = stage.run(
        [
            noting("base", script="exec < /dev/null"),
            noting("flaky", ["base"], f"test -e {flag}"),
            noting("beside", ["base"]),
            noting("last", ["flaky", "beside"]),
        ]
    )
    before = steps_of(build)
    kept = stage.artifacts(build["id"])
    assert build["status"] == "FAILED"
    assert set(kept) == {"base", "beside"}

    flag.touch()
    answer = retry(stage, build["id"])
    build = stage.await_end(build["id"])

    after = steps_of(build)
    assert answer["round"] == build["round"] == 2
    assert (build["status"], build.get("statusReason")) == ("SUCCESS", None), stage.tell(build["id"])
    assert sorted(record.read_text().split()) == ["base", "beside", "flaky", "flaky", "last"]
    assert rounds_of(build) == {"base": 1, "flaky": 2, "beside": 1, "last": 2}
    assert (after["base"], after["beside"]) == (before["base"], before["beside"])
    assert said_in(stage.log(after["last"]["id"])) == b"base\nflaky\nbase\nbeside\n"
    artifacts = stage.artifacts(build["id"])
    assert set(artifacts) == {"base", "beside", "flaky", "last"}
    assert {path: artifacts[path] for path in kept} == kept
    assert stage.log(before["flaky"]["id"])
    for step in (before["flaky"], after["flaky"]):
        assert stage.transitions(step["id"]).count("step.finished") == 1


def test_a_step_that_still_runs_is_carried_on_and_ends_in_the_new_round(stage):
    go, flag = stage.folder / "go", stage.folder / "flag"
    stage.a_runner()
    build = stage.submit(
        [
            a_step("slow", runScript=f"echo begun; while ! test -e {go}; do sleep 0.02; done; echo done"),
            a_step("flaky", runScript=f"test -e {flag}"),
            a_step("last", ["slow", "flaky"], runScript="echo last"),
        ]
    )
    slow = steps_of(build)["slow"]
    stage.await_log(slow["id"], b"begun")
    stage.await_step(build["id"], "flaky", "FAILED")
    assert stage.api.build(build["id"])["status"] == "RUNNING"

    flag.touch()
    answer = retry(stage, build["id"])
    stage.await_step(build["id"], "flaky", "SUCCESS")
    go.touch()
    build = stage.await_end(build["id"])

    steps = steps_of(build)
    assert (answer["status"], answer["round"]) == ("RUNNING", 2)
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert (steps["slow"]["id"], steps["slow"]["attempt"]) == (slow["id"], 1)
    assert said_in(stage.log(slow["id"])) == b"begun\ndone\n"
    assert rounds_of(build) == {"slow": 2, "flaky": 2, "last": 2}
    every = stage.api.get(f"/api/builds/{build['id']}?rounds=all")["steps"]
    assert sorted((step["name"], step["round"], step["status"]) for step in every) == [
        ("flaky", 1, "FAILED"),
        ("flaky", 2, "SUCCESS"),
        ("last", 1, "SKIPPED"),
        ("last", 2, "SUCCESS"),
        ("slow", 2, "SUCCESS"),
    ]
