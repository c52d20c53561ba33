"""How a step ends: once, and the same answer for ever."""

import hashlib

import pytest

from coordinator.actions.end_unheard import UNENDED
from coordinator.settings import Settings
from tests.factories import ON_SQLITE, Api, HeldOverHttp, Mill, a_spec, a_step, together


def state_of(held: HeldOverHttp) -> dict[str, object]:
    steps = held.client.get(f"/api/builds/{held.claim['buildId']}").json()["steps"]
    found: dict[str, object] = next(step for step in steps if step["id"] == held.step_id)
    return found


def test_a_success_is_recorded(api: Api) -> None:
    held = api.a_running_step()

    answer = held.complete(exitCode=0)

    assert answer.status_code == 200
    assert answer.json() == {"success": True, "stepStatus": "SUCCESS", "buildComplete": True}
    assert state_of(held)["exitCode"] == 0
    assert api.build(held.claim["buildId"])["status"] == "SUCCESS"


def test_a_failure_is_recorded_with_its_reason(api: Api) -> None:
    held = api.a_running_step()

    answer = held.complete("failed", exitCode=143, reason="timeout", detail="ran for 3600 s", oom=True)

    assert answer.json() == {"success": True, "stepStatus": "FAILED", "buildComplete": True}
    step = state_of(held)
    assert (step["status"], step["reason"], step["exitCode"]) == ("FAILED", "timeout", 143)
    attempt = step["attempts"][0]  # type: ignore[index]
    assert (attempt["outcome"], attempt["detail"], attempt["oom"]) == ("failed", "ran for 3600 s", True)
    assert api.build(held.claim["buildId"])["statusReason"] == "timeout"


@pytest.mark.threat("I03")
def test_the_same_completion_fifty_times_at_once_is_one_end(api: Api, mill: Mill) -> None:
    held = api.a_running_step(a_spec(test=[], behind=["test"]))

    answers = together(*[lambda: held.complete(exitCode=0)] * 50)

    said = {(answer.status_code, answer.text) for answer in answers}  # type: ignore[union-attr]
    assert said == {(200, '{"success":true,"stepStatus":"SUCCESS","buildComplete":false}')}
    assert len(mill.audited("step.finished")) == 1
    assert [step["status"] for step in api.build(held.claim["buildId"])["steps"]] == ["SUCCESS", "PENDING"]


@pytest.mark.threat("I03")
@pytest.mark.parametrize(("first", "second"), [("success", "failed"), ("failed", "success")])
def test_the_first_word_counts(api: Api, first: str, second: str) -> None:
    held = api.a_running_step()
    held.complete(first)

    answer = held.complete(second)

    status = {"success": "SUCCESS", "failed": "FAILED"}[first]
    assert answer.status_code == 200
    assert answer.json() == {"success": False, "stepStatus": status, "buildComplete": True}
    assert state_of(held)["status"] == status


def test_opposite_words_at_once_leave_one_outcome(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    for _ in range(4):
        held = api.an_acquired_step(runner=runner)

        answers = together(lambda: held.complete(), lambda: held.complete("failed"))  # noqa: B023

        assert sorted(answer.json()["success"] for answer in answers) == [False, True]  # type: ignore[union-attr]
        assert len({answer.json()["stepStatus"] for answer in answers}) == 1  # type: ignore[union-attr]
    assert len(mill.audited("step.finished")) == 4


def test_a_step_that_ends_before_its_start_was_recorded_has_run(api: Api) -> None:
    held = api.an_acquired_step()

    assert held.complete().json()["stepStatus"] == "SUCCESS"


@pytest.mark.threat("I01")
def test_who_does_not_hold_the_attempt_completes_nothing(api: Api) -> None:
    held = api.a_running_step()
    other = api.a_runner()
    proof = {name: held.headers[name] for name in ("X-Attempt", "X-Lease")}
    path, body = held.path("complete"), {"status": "success"}

    def status(**headers: str) -> int:
        return held.client.post(path, json=body, headers=headers).status_code

    assert status(**{**other, **proof}) == 409
    assert status(**{**held.headers, "X-Lease": "x" * 43}) == 409
    assert status(**{**held.headers, "X-Lease": ""}) == 409
    assert status(**{**held.headers, "X-Attempt": "2"}) == 409
    assert status(**{**held.headers, "X-Attempt": "0"}) == 409
    assert status(**{**held.headers, "X-Attempt": "one"}) == 400
    assert status(**{**held.runner, "X-Attempt": "1"}) == 400
    assert status(**proof) == 401
    assert status(**{**proof, "Authorization": "Bearer nonsense"}) == 401
    assert status(**{**proof, "Authorization": "Basic x"}) == 401
    assert state_of(held)["status"] == "RUNNING"


@pytest.mark.threat("I02")
def test_no_word_of_a_body_says_who_speaks(api: Api) -> None:
    held = api.a_running_step()

    answer = held.post("complete", {"status": "success", "runnerId": "somebody"})

    assert answer.status_code == 400
    assert answer.json()["details"] == [{"path": "runnerId", "reason": "is not a known field"}]


@ON_SQLITE
@pytest.mark.threat("I12")
@pytest.mark.parametrize(
    "exit_code", ['"0"', "256", "-1", str(2**63), str(10**30), "0.0", "true", "[0]", "NaN"]
)
def test_an_exit_code_that_is_none_is_refused_and_the_attempt_goes_on(api: Api, exit_code: str) -> None:
    held = api.a_running_step()
    body = f'{{"status": "failed", "exitCode": {exit_code}}}'

    answer = held.client.post(
        held.path("complete"), content=body, headers={**held.headers, "Content-Type": "application/json"}
    )

    assert answer.status_code == 400
    assert state_of(held)["status"] == "RUNNING"


@ON_SQLITE
@pytest.mark.parametrize(
    "said",
    [
        {"status": "SUCCESS"},
        {"status": ""},
        {"status": None},
        {"status": "success", "exitCode": 1},
        {"status": "success", "reason": "timeout"},
        {"status": "failed", "reason": "bad luck"},
        {"status": "success", "logSize": -1},
        {"status": "success", "logSha256": "X" * 64},
        {"status": "success", "outputPaths": "a"},
        {},
        [],
        "success",
    ],
)
def test_what_contradicts_itself_or_is_no_completion_is_refused(api: Api, said: object) -> None:
    held = api.a_running_step()

    assert held.post("complete", said).status_code == 400
    assert state_of(held)["status"] == "RUNNING"


# The log


def test_a_completion_waits_for_the_whole_log(api: Api) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    for size in (5, 7):
        answer = held.complete(logSize=size)
        assert (answer.status_code, answer.json()["code"], answer.json()["size"]) == (
            409,
            "log_incomplete",
            6,
        )
    assert state_of(held)["status"] == "RUNNING"
    held.append(6, b"!")

    assert held.complete(logSize=7).status_code == 200
    attempt = state_of(held)["attempts"][0]  # type: ignore[index]
    assert (attempt["logSize"], attempt["logState"]) == (7, "complete")
    assert attempt["logSha256"] == hashlib.sha256(b"hello\n!").hexdigest()


def test_a_completion_whose_digest_differs_is_refused(api: Api) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    answer = held.complete(logSize=6, logSha256=hashlib.sha256(b"jello\n").hexdigest())

    assert (answer.status_code, answer.json()["code"]) == (409, "log_incomplete")


def test_a_log_with_a_gap_is_never_said_to_be_complete(api: Api) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    assert held.complete(logSize=6, logGap=True).status_code == 200

    attempt = state_of(held)["attempts"][0]  # type: ignore[index]
    assert (attempt["logSize"], attempt["logState"]) == (6, "gap")
    assert held.client.get(f"/api/steps/{held.step_id}/log").content == b"hello\n"


def test_a_log_whose_end_cannot_be_delivered_ends_with_a_line_that_says_so(api: Api) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    assert held.complete(logGap=True).status_code == 200

    log = held.client.get(f"/api/steps/{held.step_id}/log").content
    attempt = state_of(held)["attempts"][0]  # type: ignore[index]
    assert (attempt["logSize"], attempt["logState"]) == (len(log), "gap")
    assert log.startswith(b"hello\n\n[buildmill] error: bytes are missing here, behind byte 6: ")


@pytest.mark.parametrize(("status", "state"), [("success", "SUCCESS"), ("failed", "FAILED")])
def test_a_log_whose_size_nobody_names_ends_with_a_line_that_says_so(
    api: Api, status: str, state: str
) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    assert [held.complete(status).status_code for _ in range(2)] == [200, 200]

    log = held.client.get(f"/api/steps/{held.step_id}/log").content
    step = state_of(held)
    attempt = step["attempts"][0]  # type: ignore[index]
    assert log == b"hello\n" + UNENDED % 6
    assert (step["status"], attempt["logSize"], attempt["logState"]) == (state, len(log), "gap")


def test_a_log_without_a_byte_is_complete_also_when_nobody_names_its_size(api: Api) -> None:
    held = api.a_running_step()

    assert held.complete().status_code == 200

    attempt = state_of(held)["attempts"][0]  # type: ignore[index]
    assert (attempt["logSize"], attempt["logState"]) == (0, "complete")


def test_the_log_that_a_bare_completion_brings_is_complete(api: Api) -> None:
    build = api.a_build()
    step_id = build["steps"][0]["id"]

    api.post(f"/api/runner/{step_id}/complete", {"status": "success", "logs": "all of it\n"}, 200)

    (attempt,) = api.build(build["id"])["steps"][0]["attempts"]
    assert (attempt["logSize"], attempt["logState"]) == (10, "complete")
    assert api.client.get(f"/api/steps/{step_id}/log").content == b"all of it\n"


def test_a_step_that_printed_nothing_has_an_empty_log(api: Api) -> None:
    held = api.a_running_step()

    digest = hashlib.sha256(b"").hexdigest()
    assert held.complete(logSize=0, logSha256=digest).status_code == 200
    assert held.client.get(f"/api/steps/{held.step_id}/log").content == b""


# The outputs


def an_output(path: str, data: bytes, **fields: object) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    return {"path": path, "type": "file", "mode": 420, "size": len(data), "sha256": digest, **fields}


@pytest.mark.threat("I13")
def test_a_success_without_its_required_outputs_is_refused(api: Api) -> None:
    held = api.a_running_step([a_step("test", outputPaths=["out", "report.xml", "*.log"])])
    held.put_blob(hashlib.sha256(b"data").hexdigest(), b"data")

    for entries in ([], [an_output("out/x", b"data")], [an_output("outside", b"data")]):
        answer = held.complete(artifacts=entries)
        assert (answer.status_code, answer.json()["code"]) == (409, "outputs_incomplete")

    both = [an_output("out/x", b"data"), an_output("report.xml", b"data")]
    assert held.complete(artifacts=both).status_code == 200


@pytest.mark.threat("I13")
def test_a_success_that_names_bytes_which_never_came_is_refused(api: Api) -> None:
    held = api.a_running_step([a_step("test", outputPaths=["out"])])
    held.put_blob(hashlib.sha256(b"data").hexdigest(), b"data")

    for entry in (an_output("out", b"other"), an_output("out", b"data", size=5)):
        answer = held.complete(artifacts=[entry])
        assert (answer.status_code, answer.json()["code"]) == (409, "outputs_incomplete")

    assert state_of(held)["status"] == "RUNNING"
    assert api.get(f"/api/builds/{held.claim['buildId']}/artifacts") == []


def test_a_failure_needs_no_outputs_and_shows_none(api: Api) -> None:
    held = api.a_running_step([a_step("test", outputPaths=["out"])])
    held.put_blob(hashlib.sha256(b"data").hexdigest(), b"data")

    assert held.complete("failed", artifacts=[an_output("out", b"data")]).status_code == 200

    assert api.get(f"/api/builds/{held.claim['buildId']}/artifacts") == []


def test_outputs_are_seen_once_their_completion_was_accepted(api: Api) -> None:
    held = api.a_running_step([a_step("test", outputPaths=["out"])])
    held.put_blob(hashlib.sha256(b"data").hexdigest(), b"data")
    build = held.claim["buildId"]
    assert api.get(f"/api/builds/{build}/artifacts") == []

    entries = [
        an_output("out/file", b"data"),
        {"path": "out/link", "type": "link", "target": "file"},
        {"path": "out/folder", "type": "directory", "mode": 493},
    ]
    held.complete(artifacts=entries)

    shown = api.get(f"/api/builds/{build}/artifacts")
    assert [(one["path"], one["type"]) for one in shown] == [
        ("out/file", "file"),
        ("out/folder", "directory"),
        ("out/link", "link"),
    ]
    assert {one["stepId"] for one in shown} == {held.step_id}


@ON_SQLITE
@pytest.mark.parametrize(
    "entry",
    [
        {"path": "/etc/passwd", "type": "directory"},
        {"path": "../x", "type": "directory"},
        {"path": "a/../../x", "type": "directory"},
        {"path": "a//b", "type": "directory"},
        {"path": "a/./b", "type": "directory"},
        {"path": "a\nb", "type": "directory"},
        {"path": "", "type": "directory"},
        {"path": "a" * 4097, "type": "directory"},
        {"path": "a", "type": "device"},
        {"path": "a", "type": "directory", "mode": 0o4755},
        {"path": "a", "type": "file"},
        {"path": "a", "type": "link"},
        {"path": "a", "type": "link", "target": "/etc/passwd"},
        {"path": "a", "type": "link", "target": "../x"},
        {"path": "a/b", "type": "link", "target": "../../x"},
        {"path": "a/b", "type": "link", "target": "x/../../../b"},
    ],
)
def test_an_output_that_points_out_of_the_workspace_is_refused(api: Api, entry: dict[str, object]) -> None:
    held = api.a_running_step()

    assert held.complete(artifacts=[entry]).status_code == 400
    assert state_of(held)["status"] == "RUNNING"


@ON_SQLITE
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a\x7fb", "must not hold the character U+007F"),
        ("a\u202eb", "must not hold the character U+202E"),
        ("a\u2028b", "must not hold the character U+2028"),
        ("x/" + "a" * 256, "must not hold a name of more than 255 bytes"),
        ("x/" + "ä" * 128, "must not hold a name of more than 255 bytes"),
    ],
)
def test_an_output_has_a_name_that_can_be_shown_and_kept(api: Api, path: str, reason: str) -> None:
    held = api.a_running_step()

    answer = held.complete(artifacts=[{"path": path, "type": "directory"}])

    assert answer.status_code == 400
    assert answer.json()["details"] == [{"path": "artifacts[0].path", "reason": reason}]
    assert held.complete(artifacts=[{"path": "ä" * 127, "type": "directory"}]).status_code == 200


@ON_SQLITE
def test_nothing_lies_below_an_output_that_is_no_directory(api: Api) -> None:
    held = api.a_running_step()
    held.put_blob(hashlib.sha256(b"data").hexdigest(), b"data")
    below = an_output("o/x/y", b"data")

    for above in (an_output("o", b"data"), {"path": "o/x", "type": "link", "target": "y"}):
        for entries, index in (([above, below], 1), ([below, above], 0)):
            answer = held.complete(artifacts=entries)
            assert answer.status_code == 400
            assert answer.json()["details"] == [
                {"path": f"artifacts[{index}].path", "reason": f"lies below {above['path']!r}, no directory"}
            ]

    beside = [an_output("o.x", b"data"), {"path": "o", "type": "directory"}, below]
    assert held.complete(artifacts=beside).status_code == 200


def test_an_output_is_named_once(api: Api) -> None:
    held = api.a_running_step()
    entry = {"path": "a", "type": "directory"}

    answer = held.complete(artifacts=[entry, entry])

    assert answer.status_code == 400
    assert answer.json()["details"] == [{"path": "artifacts[1].path", "reason": "names a path twice"}]


# A branch becomes a commit


def test_the_first_commit_that_is_named_binds_every_step_of_the_build(api: Api) -> None:
    made = api.a_build(a_spec(one=[], two=[]), repoUrl="https://example.org/r.git", branch="main")
    runner = api.a_runner()
    one, two = (HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=2))

    assert one.post("source", {"commit": "a" * 40}).json() == {"commit": "a" * 40}
    assert two.post("source", {"commit": "b" * 40}).json() == {"commit": "a" * 40}

    assert api.build(made["id"])["commitHash"] == "a" * 40


def test_a_commit_must_be_the_one_that_was_asked_for(api: Api) -> None:
    api.a_build(repoUrl="https://example.org/r.git", commitHash="abc1234")
    runner = api.a_runner()
    held = HeldOverHttp(api.client, api.acquire(runner)[0], runner)

    assert held.post("source", {"commit": "d" * 40}).status_code == 400
    full = "abc1234" + "0" * 33
    assert held.post("source", {"commit": full}).json() == {"commit": full}


@ON_SQLITE
@pytest.mark.parametrize("commit", ["main", "abc1234", "A" * 40, "a" * 41, "-" + "a" * 39, ""])
def test_a_commit_is_a_whole_hash(api: Api, commit: str) -> None:
    held = api.an_acquired_step()

    assert held.post("source", {"commit": commit}).status_code == 400


def test_nobody_else_binds_the_commit(api: Api) -> None:
    held = api.an_acquired_step()
    wrong = {**held.headers, "X-Lease": "x" * 43}

    answer = held.client.post(held.path("source"), json={"commit": "a" * 40}, headers=wrong)

    assert answer.status_code == 409


def test_outputs_beyond_the_limits_in_sum_are_refused(api: Api, settings: Settings) -> None:
    held = api.a_running_step(a_spec(test=[], behind=["test"]))
    half = settings.artifact_limit // 2 + 1
    entries = [{"path": name, "type": "file", "size": half, "sha256": "0" * 64} for name in ("a", "b")]

    answer = held.complete(exitCode=0, artifacts=entries)

    assert answer.status_code == 400
    assert state_of(held)["status"] == "RUNNING"
