"""The published pair for callers that hold no lease: get a script, say how it ended."""

import hashlib
from typing import Any

import httpx
import pytest

from tests.factories import ON_SQLITE, Api, Mill, a_spec, a_step


def complete(client: httpx.Client, step_id: str, **said: Any) -> httpx.Response:
    return client.post(f"/api/runner/{step_id}/complete", json={"status": "success", **said})


def by_name(build: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["id"] for step in build["steps"]}


# The script


def test_a_script_is_text_with_its_digest(api: Api) -> None:
    step_id = api.a_build([a_step("test", runScript="make test")])["steps"][0]["id"]

    answer = api.client.get(f"/api/runner/{step_id}")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    digest = hashlib.sha256(answer.content).hexdigest()
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["x-script-sha256"] == digest
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "make test" in answer.text


def test_reading_a_script_changes_nothing(api: Api, mill: Mill) -> None:
    build = api.a_build()
    before = (api.build(build["id"]), len(mill.audited()))

    first = api.client.get(f"/api/runner/{build['steps'][0]['id']}")
    second = api.client.get(f"/api/runner/{build['steps'][0]['id']}")

    assert first.text == second.text
    assert (api.build(build["id"]), len(mill.audited())) == before


@ON_SQLITE
@pytest.mark.parametrize("step_id", ["nope", "0" * 36, "00000000-0000-7000-8000-000000000000", "a" * 300])
def test_a_script_of_no_step_is_404(api: Api, step_id: str) -> None:
    answer = api.client.get(f"/api/runner/{step_id}")

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.threat("I14")
def test_a_script_with_a_proof_is_for_its_holder_only(api: Api) -> None:
    held = api.an_acquired_step()
    path = f"/api/runner/{held.step_id}"

    assert api.client.get(path, headers=held.headers).status_code == 200
    proof = {name: held.headers[name] for name in ("X-Attempt", "X-Lease")}
    assert api.client.get(path, headers={**api.a_runner(), **proof}).status_code == 409
    assert api.client.get(path, headers={**held.headers, "X-Attempt": "2"}).status_code == 409
    assert api.client.get(path, headers=proof).status_code == 401


def test_the_script_of_a_claim_is_the_one_that_can_be_read(api: Api) -> None:
    held = api.an_acquired_step()

    answer = api.client.get(f"/api/runner/{held.step_id}", headers=held.headers)

    assert answer.text == held.claim["script"]
    assert answer.headers["x-script-sha256"] == held.claim["scriptSha256"]


# The completion, rule by rule in their order


@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (b'{"status": "success"}', "application/json"),
        (b"no json", "application/json"),
        (b'{"status": "odd"}', "application/json"),
        (b"", "application/json"),
        (b"status=success", "text/plain"),
    ],
)
def test_an_unknown_step_is_404_whatever_is_said_of_it(api: Api, body: bytes, media_type: str) -> None:
    answer = api.client.post("/api/runner/nope/complete", content=body, headers={"Content-Type": media_type})

    assert answer.status_code == 404


@ON_SQLITE
@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"status": "odd"}',
        b'{"status": 1}',
        b'{"status": "success", "status": "failed"}',
        b'{"status": "success", "logs": 1}',
        b'{"status": "success", "outputPaths": ["ok", 1]}',
        b'{"status": "success", "outputPaths": ["/etc/passwd"]}',
        b'{"status": "success", "outputPaths": ["../x"]}',
        b'{"status": "success", "outputPaths": ["a/../../x"]}',
        b'{"status": "success", "outputPaths": [""]}',
        b'{"status": "success", "outputPaths": ["a\\u0000b"]}',
        b'{"status": "success", "logs": "\\ud800"}',
        b'{"status": "success", "more": 1}',
    ],
)
def test_a_completion_that_is_none_is_400_and_changes_nothing(api: Api, body: bytes) -> None:
    build = api.a_build()
    step_id = build["steps"][0]["id"]

    answer = api.client.post(
        f"/api/runner/{step_id}/complete", content=body, headers={"Content-Type": "application/json"}
    )

    assert answer.status_code == 400
    assert answer.json()["details"]
    assert api.build(build["id"])["status"] == "PENDING"


def test_a_path_has_its_limits(api: Api) -> None:
    step_id = api.a_build()["steps"][0]["id"]

    assert complete(api.client, step_id, outputPaths=["a" * 4097]).status_code == 400
    assert complete(api.client, step_id, outputPaths=["a"] * 1001).status_code == 400
    assert complete(api.client, step_id, outputPaths=["a"] * 1000).status_code == 200


def test_a_step_whose_dependencies_are_unmet_is_400(api: Api) -> None:
    build = api.a_build(a_spec(one=[], two=["one"]))

    answer = complete(api.client, by_name(build)["two"])

    assert (answer.status_code, answer.json()["code"]) == (400, "not_runnable")
    assert api.build(build["id"])["status"] == "PENDING"


def test_a_ready_step_is_begun_and_ended_at_once(api: Api) -> None:
    build = api.a_build(a_spec(one=[], two=["one"]))
    steps = by_name(build)

    first = complete(api.client, steps["one"], logs="hello\n", outputPaths=["out", "out", "a/b"])
    second = complete(api.client, steps["two"])

    assert first.json() == {"success": True, "stepStatus": "SUCCESS", "buildComplete": False}
    assert second.json() == {"success": True, "stepStatus": "SUCCESS", "buildComplete": True}
    shown = api.build(build["id"])
    assert shown["status"] == "SUCCESS"
    attempt = shown["steps"][0]["attempts"][0]
    assert attempt["outputPaths"] == ["out", "a/b"]
    assert "runnerId" not in attempt
    assert api.client.get(f"/api/steps/{steps['one']}/log").text == "hello\n"
    assert api.get(f"/api/builds/{build['id']}/artifacts") == []


def test_a_failure_skips_what_is_behind(api: Api) -> None:
    build = api.a_build(a_spec(one=[], two=["one"]))

    answer = complete(api.client, by_name(build)["one"], status="failed")

    assert answer.json() == {"success": True, "stepStatus": "FAILED", "buildComplete": True}
    assert [step["status"] for step in api.build(build["id"])["steps"]] == ["FAILED", "SKIPPED"]


def test_null_is_the_same_as_absent(api: Api) -> None:
    step_id = api.a_build()["steps"][0]["id"]

    assert complete(api.client, step_id, logs=None, outputPaths=None).status_code == 200


@pytest.mark.threat("I01")
def test_a_step_that_a_runner_holds_cannot_be_ended_by_its_id_alone(api: Api) -> None:
    held = api.an_acquired_step()

    for status in ("success", "failed"):
        answer = complete(api.client, held.step_id, status=status)
        assert (answer.status_code, answer.json()["code"]) == (400, "leased")
    assert held.complete().status_code == 200


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("success", "success", {"success": True, "stepStatus": "SUCCESS", "buildComplete": True}),
        ("success", "failed", {"success": False, "stepStatus": "SUCCESS", "buildComplete": True}),
        ("failed", "failed", {"success": True, "stepStatus": "FAILED", "buildComplete": True}),
        ("failed", "success", {"success": False, "stepStatus": "FAILED", "buildComplete": True}),
    ],
)
def test_a_step_that_has_ended_answers_as_it_ended(
    api: Api, first: str, second: str, expected: dict[str, Any]
) -> None:
    build = api.a_build()
    step_id = build["steps"][0]["id"]
    complete(api.client, step_id, status=first)
    before = api.build(build["id"])

    answer = complete(api.client, step_id, status=second, logs="more", outputPaths=["more"])

    assert (answer.status_code, answer.json()) == (200, expected)
    assert api.build(build["id"]) == before


def test_a_cancelled_step_answers_that_it_was_cancelled(api: Api) -> None:
    build = api.a_build()
    api.client.post(f"/api/builds/{build['id']}/cancel")

    answer = complete(api.client, build["steps"][0]["id"])

    assert answer.json() == {"success": False, "stepStatus": "CANCELLED", "buildComplete": True}


def test_a_step_that_waits_again_after_its_runner_was_lost_may_be_ended(api: Api, mill: Mill) -> None:
    mill.clock.advance(100)
    held = api.a_running_step()
    mill.clock.advance(61)
    mill.expire()

    assert complete(api.client, held.step_id).status_code == 200
    assert held.complete().status_code == 409


def test_logs_beyond_the_limit_are_cut_and_not_refused(new_app: Any, new_client: Any, settings: Any) -> None:
    app = new_app(settings.model_copy(update={"log_limit": 65536}))
    api = Api(new_client(app))
    step_id = api.a_build()["steps"][0]["id"]

    assert complete(api.client, step_id, logs="x" * 70_000).status_code == 200

    log = api.client.get(f"/api/steps/{step_id}/log").text
    assert log.startswith("x" * 65536 + "\n[buildmill] the log limit")


def test_a_header_that_says_attempt_makes_a_caller_a_runner(api: Api) -> None:
    step_id = api.a_build()["steps"][0]["id"]

    answer = api.client.post(
        f"/api/runner/{step_id}/complete", json={"status": "success"}, headers={"X-Attempt": "1"}
    )

    assert answer.status_code == 401


@ON_SQLITE
@pytest.mark.parametrize("word", ["acquire", "heartbeat", "events", "reports", "resume", "bye"])
def test_the_words_of_the_protocol_are_no_steps(api: Api, word: str) -> None:
    assert api.client.get(f"/api/runner/{word}").status_code == 405
    assert complete(api.client, word).status_code == 404
