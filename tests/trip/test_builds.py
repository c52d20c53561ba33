"""Whole builds through the REST API with a runner at work, on both databases."""

import hashlib

import pytest

from tests.factories import ON_SQLITE, a_step
from tests.trip.stage import a_stage, said_in, steps_of, until


def test_steps_run_in_the_order_of_their_dependencies(stage):
    record = stage.folder / "order"
    stage.a_runner(slots=2)

    def noting(name, behind=()):
        return a_step(name, behind, runScript=f"echo {name}-begins >> {record}; echo {name}-ends >> {record}")

    build = stage.run(
        [noting("d", ["b", "c"]), noting("b", ["a"]), noting("c", ["a"]), noting("a"), noting("e", ["d"])]
    )

    seen = record.read_text().split()
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert seen[:2] == ["a-begins", "a-ends"]
    assert seen[-4:] == ["d-begins", "d-ends", "e-begins", "e-ends"]
    assert sorted(seen[2:-4]) == ["b-begins", "b-ends", "c-begins", "c-ends"]
    assert {step["attempt"] for step in steps_of(build).values()} == {1}


def test_outputs_of_all_dependencies_stand_in_the_workspace_and_the_later_one_wins(stage):
    stage.a_runner()

    build = stage.run(
        [
            a_step("a", runScript="mkdir -p out; echo a | tee out/a out/all mine", outputPaths=["out/**"]),
            a_step("b", ["a"], runScript="echo b | tee out/b out/all out/both", outputPaths=["out/*"]),
            a_step("c", ["a"], runScript="echo c >out/both; chmod 755 out/both", outputPaths=["out/both"]),
            a_step("d", ["c", "b"], runScript="cd out; cat a all b both; test -x both; ls ../mine || ls"),
        ]
    )

    log = stage.log(steps_of(build)["d"]["id"])
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert said_in(log).startswith(b"a\nb\nb\nc\n")
    assert said_in(log).endswith(b"a\nall\nb\nboth\n")  # what no step named as an output is not there
    assert b"[buildmill] warning: out/all of step b overwrites that of step a\n" in log
    assert b"[buildmill] warning: out/both of step c overwrites that of step b\n" in log
    assert set(stage.artifacts(build["id"])) == {"out/a", "out/all", "out/b", "out/both"}


@ON_SQLITE
def test_a_file_and_a_folder_at_one_path_end_the_step_that_would_see_both(stage):
    stage.a_runner()

    build = stage.run(
        [
            a_step("a", runScript="echo a > out", outputPaths=["out"]),
            a_step("b", runScript="mkdir out; echo b > out/b", outputPaths=["out/**"]),
            a_step("c", ["a", "b"]),
        ]
    )

    step = steps_of(build)["c"]
    assert (step["status"], step["reason"]) == ("FAILED", "output_conflict")
    assert b"steps a and b deliver a file and a directory at out" in stage.log(step["id"])


@ON_SQLITE
def test_the_second_build_finds_what_the_first_left_in_its_cache(stage):
    stage.a_runner()
    spec = [a_step("a", runScript="cat cache/count || echo none; echo x >> cache/count", cacheDirs=["cache"])]
    project_id = stage.a_project()
    workflow = stage.api.a_workflow(spec, project_id)
    logs = []

    for _ in range(3):
        build = stage.await_end(stage.build_again(workflow)["id"])
        logs.append(said_in(stage.log(build["steps"][0]["id"])))
    elsewhere = stage.run(spec)

    assert logs[0].endswith(b"none\n")
    assert logs[1:] == [b"x\n", b"x\nx\n"]
    assert said_in(stage.log(elsewhere["steps"][0]["id"])).endswith(b"none\n"), "another project's cache"


def test_a_failed_step_skips_everything_behind_it_and_nothing_else(stage):
    stage.a_runner()

    build = stage.run(
        [
            a_step("bad", runScript="echo before; false; echo after"),
            a_step("behind", ["bad"]),
            a_step("far-behind", ["behind", "good"]),
            a_step("good"),
            a_step("behind-good", ["good"]),
        ]
    )

    steps = steps_of(build)
    assert build["status"] == "FAILED"
    assert build["statusReason"] == "exit_nonzero"
    assert {name: step["status"] for name, step in steps.items()} == {
        "bad": "FAILED",
        "behind": "SKIPPED",
        "far-behind": "SKIPPED",
        "good": "SUCCESS",
        "behind-good": "SUCCESS",
    }
    assert (steps["bad"]["reason"], steps["bad"]["exitCode"]) == ("exit_nonzero", 1)
    assert said_in(stage.log(steps["bad"]["id"])) == b"before\n"


def test_a_step_goes_only_to_a_runner_with_all_its_labels(stage):
    plain = stage.a_runner("plain", labels="linux")
    build = stage.submit([a_step("a", labels=["gpu", "linux"]), a_step("b", labels=["linux"])])
    stage.await_step(build["id"], "b", "SUCCESS")
    assert steps_of(stage.api.build(build["id"]))["a"]["status"] == "PENDING"

    stage.a_runner("fast", labels="linux,gpu,big")
    build = stage.await_end(build["id"])

    names = {runner["id"]: runner["name"] for runner in stage.api.get("/api/runners")}
    assert build["status"] == "SUCCESS"
    assert {step["name"]: names[step["runnerId"]] for step in build["steps"]} == {"a": "fast", "b": "plain"}
    assert plain.wire.sent["complete"] == 1


@ON_SQLITE
def test_a_step_that_runs_too_long_is_ended(stage):
    stage.a_runner()

    build = stage.run([a_step("a", runScript="echo begun; sleep 600", timeoutSeconds=1)])

    step = build["steps"][0]
    assert (build["status"], step["status"], step["reason"]) == ("FAILED", "FAILED", "timeout")
    assert b"the time limit of 1 s is over" in stage.log(step["id"])


def test_a_cancelled_script_hears_term_and_what_it_says_last_is_kept(stage):
    stage.a_runner()
    build = stage.submit(
        [
            a_step(
                "a", runScript="trap 'echo goodbye; exit 9' TERM; echo begun; while :; do sleep 0.05; done"
            ),
            a_step("b", ["a"]),
        ]
    )
    step_id = steps_of(build)["a"]["id"]
    stage.await_log(step_id, b"begun")

    stage.cancel(build["id"])
    build = stage.await_end(build["id"])

    steps = steps_of(build)
    assert (build["status"], build["statusReason"]) == ("FAILED", "cancelled")
    assert {name: step["status"] for name, step in steps.items()} == {"a": "CANCELLED", "b": "CANCELLED"}
    assert b"goodbye\n" in stage.log(step_id)
    assert steps["a"]["exitCode"] == 9
    assert stage.transitions(step_id).count("step.finished") == 1


@ON_SQLITE
def test_a_cancelled_script_that_ignores_term_is_killed_after_the_grace(stage):
    stage.a_runner()
    build = stage.submit([a_step("a", runScript="trap '' TERM; echo begun; while :; do sleep 0.2; done")])
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")

    stage.cancel(build["id"])
    build = stage.await_end(build["id"], timeout_s=20)

    assert build["steps"][0]["status"] == "CANCELLED"


@ON_SQLITE
def test_a_build_is_cancelled_while_it_waits_for_a_runner(stage):
    build = stage.submit([a_step("a"), a_step("b", ["a"])])

    stage.cancel(build["id"])

    build = stage.api.build(build["id"])
    assert (build["status"], build["statusReason"]) == ("FAILED", "cancelled")
    assert {step["status"] for step in build["steps"]} == {"CANCELLED"}


@ON_SQLITE
def test_a_missing_output_fails_the_step_and_keeps_its_exit_code(stage):
    stage.a_runner()

    build = stage.run([a_step("a", runScript="echo fine", outputPaths=["nothing-*", "report.txt"])])

    step = build["steps"][0]
    assert (step["status"], step["reason"], step["exitCode"]) == ("FAILED", "output_missing", 0)
    assert b"report.txt" in stage.log(step["id"])
    assert stage.artifacts(build["id"]) == {}


def test_a_script_that_cannot_be_parsed_is_told_from_one_that_ends_with_2(stage):
    stage.a_runner()

    build = stage.run(
        [a_step("broken", runScript="echo never\nif true; then"), a_step("two", runScript="echo ran; exit 2")]
    )

    found = {step["name"]: (step["reason"], step["exitCode"]) for step in build["steps"]}
    assert found == {"broken": ("syntax_error", 2), "two": ("exit_nonzero", 2)}


@ON_SQLITE
def test_a_script_that_fails_says_so_even_when_its_outputs_are_missing(stage):
    stage.a_runner()

    build = stage.run([a_step("a", runScript="exit 42", outputPaths=["report.txt"])])

    step = build["steps"][0]
    assert (step["reason"], step["exitCode"]) == ("exit_nonzero", 42)


def test_the_log_holds_every_byte_whatever_it_is(stage):
    stage.a_runner()
    binary = bytes(range(256)) * 64
    line = b"x" * 5_000_000
    (stage.folder / "binary").write_bytes(binary)
    (stage.folder / "line").write_bytes(line)

    build = stage.run(
        [
            a_step("binary", runScript=f"cat {stage.folder}/binary"),
            a_step("line", runScript=f"cat {stage.folder}/line"),
            a_step("order", runScript="for n in 1 2 3 4 5; do echo $n; echo $n >&2; done; printf end"),
        ]
    )

    steps = steps_of(build)
    assert build["status"] == "SUCCESS"
    assert said_in(stage.log(steps["binary"]["id"])) == binary
    assert said_in(stage.log(steps["line"]["id"])) == line
    assert said_in(stage.log(steps["order"]["id"])) == b"1\n1\n2\n2\n3\n3\n4\n4\n5\n5\nend"
    for step in steps.values():
        log = stage.log(step["id"])
        told = step["attempts"][0]
        assert (told["logSize"], told["logSha256"]) == (len(log), hashlib.sha256(log).hexdigest())


def test_a_log_beyond_its_limit_keeps_its_head_and_the_step_goes_on(database):
    with a_stage(database, log_limit=65536) as stage:
        stage.a_runner()
        (stage.folder / "numbers").write_text("".join(f"{n}\n" for n in range(200_000)))

        build = stage.run(
            [a_step("a", runScript=f"cat {stage.folder}/numbers; echo x > out", outputPaths=["out"])]
        )

        step = build["steps"][0]
        log = stage.log(step["id"])
        head, _, notice = log.partition(b"\n[buildmill] the log limit")
        assert (step["status"], step["attempts"][0]["logState"]) == ("SUCCESS", "truncated")
        assert len(head) == 65536
        assert notice == b" of 65536 bytes is reached; what follows is not kept\n"
        assert b"\n0\n1\n2\n3\n" in head
        assert "out" in stage.artifacts(build["id"])


@pytest.mark.threat("C13")
def test_all_steps_of_a_build_see_one_commit_whatever_is_pushed_meanwhile(stage):
    repository = stage.a_repository()
    first = repository.commit({"version": "one\n"})
    go = stage.folder / "go"
    waiting = f"while ! test -e {go}; do sleep 0.02; done; cat version"
    stage.a_runner()
    build = stage.submit(
        [
            a_step("a", runScript=f"echo begun; {waiting}"),
            a_step("b", ["a"], runScript="cat version; echo $BUILDMILL_COMMIT"),
        ],
        repoUrl=repository.url,
        branch="main",
    )
    stage.await_log(steps_of(build)["a"]["id"], b"begun")

    repository.git("commit", "-q", "--amend", "--allow-empty", "-m", "another history")
    second = repository.commit({"version": "two\n"})
    go.touch()
    build = stage.await_end(build["id"])
    after = stage.run([a_step("a", runScript="cat version")], repoUrl=repository.url, branch="main")

    logs = {name: said_in(stage.log(step["id"])) for name, step in steps_of(build).items()}
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert build["commitHash"] == first
    assert logs == {"a": b"begun\none\n", "b": b"one\n%s\n" % first.encode()}
    assert after["commitHash"] == second
    assert said_in(stage.log(after["steps"][0]["id"])) == b"two\n"


@ON_SQLITE
def test_a_commit_that_is_nowhere_fails_the_build_and_says_so(stage):
    repository = stage.a_repository()
    repository.commit({"a": "a"})
    stage.a_runner()

    build = stage.run([a_step("a")], repoUrl=repository.url, commitHash="0" * 39 + "1")

    assert (build["status"], build["statusReason"]) == ("FAILED", "commit_not_found")
    assert build["steps"][0]["attempt"] == 1


def test_a_build_keeps_the_workflow_it_was_made_from(stage):
    workflow = stage.api.a_workflow([a_step("a", runScript="echo old"), a_step("b", ["a"])])
    build = stage.build_again(workflow)
    path = f"/api/projects/{workflow['projectId']}/workflows/{workflow['id']}"
    changed = stage.api.client.put(
        path, json={"name": "changed", "steps": [a_step("a", runScript="echo new")]}
    )
    assert changed.status_code == 200, changed.text

    stage.a_runner()
    build = stage.await_end(build["id"])
    again = stage.await_end(stage.build_again(workflow)["id"])

    assert set(steps_of(build)) == {"a", "b"}
    assert said_in(stage.log(steps_of(build)["a"]["id"])) == b"old\n"
    assert [said_in(stage.log(step["id"])) for step in again["steps"]] == [b"new\n"]


def test_a_bare_client_and_a_runner_work_on_one_build_without_harm(stage):
    go = stage.folder / "go"
    waiting = f"echo begun; while ! test -e {go}; do sleep 0.02; done"
    stage.a_runner()
    build = stage.submit(
        [
            a_step("ours", runScript=waiting),
            a_step("theirs", runScript="echo hello", labels=["nobody-has-this"]),
            a_step("last", ["ours", "theirs"]),
        ]
    )
    steps = steps_of(build)
    stage.await_log(steps["ours"]["id"], b"begun")
    client = stage.api.client

    script = client.get(f"/api/runner/{steps['theirs']['id']}")
    hijacked = client.post(f"/api/runner/{steps['ours']['id']}/complete", json={"status": "success"})
    early = client.post(f"/api/runner/{steps['last']['id']}/complete", json={"status": "success"})
    done = client.post(
        f"/api/runner/{steps['theirs']['id']}/complete", json={"status": "success", "logs": "by hand\n"}
    )
    again = client.post(f"/api/runner/{steps['theirs']['id']}/complete", json={"status": "failed"})
    go.touch()
    build = stage.await_end(build["id"])

    assert script.status_code == 200
    assert "echo hello" in script.text
    assert (hijacked.status_code, hijacked.json()["code"]) == (400, "leased")
    assert (early.status_code, early.json()["code"]) == (400, "not_runnable")
    assert done.json() == {"success": True, "stepStatus": "SUCCESS", "buildComplete": False}
    assert again.json() == {"success": False, "stepStatus": "SUCCESS", "buildComplete": False}
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert stage.log(steps["theirs"]["id"]) == b"by hand\n"
    assert [stage.transitions(step["id"]).count("step.finished") for step in build["steps"]] == [1, 1, 1]


@ON_SQLITE
def test_a_runner_told_once_ends_when_nothing_is_left(stage):
    build = stage.submit([a_step("a"), a_step("b", ["a"])])

    runner = stage.a_runner(once=True)
    runner.join(30)

    assert stage.api.build(build["id"])["status"] == "SUCCESS"


@ON_SQLITE
def test_two_runners_hand_each_other_their_outputs(stage):
    one = stage.a_runner("one", labels="one")
    two = stage.a_runner("two", labels="two")
    large = 3_000_000

    build = stage.run(
        [
            a_step(
                "a",
                runScript=f"mkdir out; head -c {large} /dev/urandom > out/large; ln -s large out/link; "
                "chmod 700 out/large; sha256sum <out/large > sum",
                outputPaths=["out", "sum"],
                labels=["one"],
            ),
            a_step(
                "b",
                ["a"],
                runScript="sha256sum <out/link | cmp - sum; test -x out/large; test -L out/link",
                labels=["two"],
            ),
        ]
    )

    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert one.wire.sent["put_blob"] == 2
    assert two.wire.sent["get_blob"] == 2


@ON_SQLITE
def test_nothing_of_a_finished_build_stays_in_the_runners_folder(stage):
    runner = stage.a_runner()
    stage.run([a_step("a", runScript="mkdir -p deep/er; echo x > deep/er/x; chmod 000 deep")])

    def is_clean():
        return not list((runner.state / "a").glob("*/*")) and not list((runner.state / "processes").iterdir())

    until(is_clean, 10, told=lambda: list((runner.state / "a").glob("*/*")))
