"""The published Build Execution contract, as its examples, tables and drawings tell it."""

import re
from typing import Any
from uuid import uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator

from coordinator.actions.change_project import change_project
from coordinator.api.openapi import specification
from coordinator.app import ALL_ENDPOINTS
from tests.contract.published import DATE_TIME
from tests.factories import LOCAL, ON_SQLITE, Held, MadeRunner, Mill, a_spec

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
BUILD_FIELDS = {"id", "project_id", "build_number", "git_branch", "status", "created_at", "updated_at"}
SERVED = specification(ALL_ENDPOINTS, "test")


def check_answer(method: str, path: str, answer: httpx.Response) -> None:
    """The answer is one that our own specification tells of."""
    [operation] = [
        one for place, one in SERVED["paths"].items() if re.fullmatch(re.sub("{.+}", "[^/]+", place), path)
    ]
    told = operation[method.lower()]["responses"][str(answer.status_code)]
    if answer.content:
        schema = told["content"][answer.headers["content-type"]]["schema"]
        whole = {**schema, "components": SERVED["components"]}
        Draft202012Validator(whole, format_checker=DATE_TIME).validate(answer.json())
    else:
        assert "content" not in told


class Caller:
    """A client with its two headers, that holds each answer against the specification."""

    def __init__(self, client: httpx.Client, headers: dict[str, str]) -> None:
        self.client = client
        self.headers = headers

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        more.setdefault("headers", {})
        more["headers"] = {**self.headers, **more["headers"]}
        answer = self.client.request(method, f"/api/v1{path}", **more)
        check_answer(method, f"/api/v1{path}".partition("?")[0], answer)
        return answer

    def a_build(self, project_id: str, **said: Any) -> dict[str, Any]:
        answer = self("POST", "/builds", json={"project_id": project_id, "git_branch": "main", **said})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def a_started_build(self, project_id: str, **said: Any) -> dict[str, Any]:
        build = self.a_build(project_id, **said)
        started: dict[str, Any] = self("POST", f"/builds/{build['id']}/start").json()
        return started

    def status_of(self, build: dict[str, Any]) -> str:
        return str(self("GET", f"/builds/{build['id']}").json()["status"])

    def numbers(self, query: str = "") -> list[int]:
        answer = self("GET", f"/builds?{query}")
        assert answer.status_code == 200, answer.text
        return [build["build_number"] for build in answer.json()["builds"]]


@pytest.fixture
def ask(client: httpx.Client, mill: Mill) -> Caller:
    """A developer of the tenant acme."""
    return Caller(client, mill.a_member(role="developer"))


@pytest.fixture
def project(mill: Mill) -> str:
    return a_project(mill)


def a_project(mill: Mill, spec: list[dict[str, Any]] | None = None, account: str = "acme") -> str:
    """With a repository and one workflow."""
    project_id = mill.a_project(account)
    mill.now(change_project, mill.site, LOCAL, project_id, {"repo_url": "https://git.example/owner/name"})
    mill.a_workflow(project_id, spec or a_spec(build=[], test=["build"]))
    return project_id


def run_a_step(mill: Mill, runner: MadeRunner, status: str = "success") -> Held:
    [held] = mill.acquire(runner)
    mill.start(held)
    mill.complete(held, status)
    return held


def refusal(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), answer.text
    assert body.keys() == {"error", "code", "timestamp", "trace_id", "details"}
    assert MOMENT.fullmatch(body["timestamp"])
    assert re.fullmatch(r"[0-9a-f]{32}", body["trace_id"])
    assert all(isinstance(reason, str) for reason in body["details"].values())
    return body


def without_trace(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("timestamp", "trace_id")}


# Making builds


def test_a_build_is_made_queued_as_in_the_example(ask: Caller, project: str) -> None:
    answer = ask("POST", "/builds", json={"project_id": project, "git_branch": "main"})

    build = answer.json()
    assert answer.status_code == 201
    assert build.keys() == BUILD_FIELDS | {"workflow_id"}
    assert (build["project_id"], build["git_branch"], build["status"]) == (project, "main", "queued")
    assert build["build_number"] == 1
    assert MOMENT.fullmatch(build["created_at"])
    assert build["updated_at"] == build["created_at"]


def test_a_commit_is_kept(ask: Caller, project: str) -> None:
    assert ask.a_build(project, git_commit="ABCDEF1")["git_commit"] == "abcdef1"
    assert ask.a_build(project, git_commit="a" * 40)["git_commit"] == "a" * 40
    assert "git_commit" not in ask.a_build(project, git_commit=None)


@pytest.mark.parametrize(
    "branch", ["m", "main", "feature/one", "größe", "a-b_c.d", "x" * 255, "ü" * 255, "/".join(["ab"] * 85)]
)
@ON_SQLITE
def test_a_branch_is_any_valid_reference_of_1_to_255_letters(ask: Caller, project: str, branch: str) -> None:
    assert ask.a_build(project, git_branch=branch)["git_branch"] == branch


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"project_id": "nope"}, {"project_id"}),
        ({"project_id": "550e8400e29b41d4a716446655440000"}, {"project_id"}),
        ({"project_id": None}, {"project_id"}),
        ({"project_id": 7}, {"project_id"}),
        ({"git_branch": ""}, {"git_branch"}),
        ({"git_branch": "x" * 256}, {"git_branch"}),
        ({"git_branch": "-x"}, {"git_branch"}),
        ({"git_branch": "a..b"}, {"git_branch"}),
        ({"git_branch": "a b"}, {"git_branch"}),
        ({"git_branch": "a\0b"}, {"git_branch"}),
        ({"git_branch": "a@{b"}, {"git_branch"}),
        ({"git_branch": None}, {"git_branch"}),
        ({"git_commit": "abc123"}, {"git_commit"}),
        ({"git_commit": "a" * 41}, {"git_commit"}),
        ({"git_commit": "HEAD~12"}, {"git_commit"}),
        ({"git_commit": "abcdef1\n"}, {"git_commit"}),
        ({"git_comit": "abcdef1"}, {"git_comit"}),
        ({"status": "success"}, {"status"}),
        (
            {"project_id": "nope", "git_branch": "-x", "git_commit": "g"},
            {"project_id", "git_branch", "git_commit"},
        ),
    ],
)
@ON_SQLITE
def test_every_field_at_fault_is_named(
    ask: Caller, project: str, fields: dict[str, Any], named: set[str]
) -> None:
    body = {"project_id": project, "git_branch": "main", **fields}

    said = refusal(ask("POST", "/builds", json=body), 400, "INVALID_REQUEST")

    assert said["details"].keys() == named
    assert not any("alue error" in reason for reason in said["details"].values())
    assert ask.numbers() == []


@ON_SQLITE
def test_required_fields_are_required(ask: Caller) -> None:
    said = refusal(ask("POST", "/builds", json={}), 400, "INVALID_REQUEST")

    assert said["details"] == {"project_id": "is required", "git_branch": "is required"}


def test_the_id_of_a_project_may_be_written_in_capitals(ask: Caller, project: str) -> None:
    assert ask.a_build(project.upper())["project_id"] == project


def test_a_project_that_cannot_be_built_says_what_it_lacks(ask: Caller, mill: Mill) -> None:
    bare = mill.a_project()
    no_source = mill.a_project()
    mill.a_workflow(no_source, a_spec())
    several = a_project(mill)
    mill.a_workflow(several, a_spec())

    for project_id, lack in ((bare, "workflow"), (no_source, "repository"), (several, "workflows")):
        answer = ask("POST", "/builds", json={"project_id": project_id, "git_branch": "main"})
        said = refusal(answer, 400, "INVALID_REQUEST")
        assert lack in said["error"]
        assert lack in said["details"]["project_id"]


def test_an_unknown_project_and_a_foreign_one_read_the_same(ask: Caller, mill: Mill) -> None:
    foreign = a_project(mill, account="other")

    said = [
        refusal(ask("POST", "/builds", json={"project_id": one, "git_branch": "main"}), 404, "NOT_FOUND")
        for one in (foreign, str(uuid4()))
    ]

    assert without_trace(said[0]) == without_trace(said[1])


def test_a_creation_that_is_sent_again_makes_one_build(ask: Caller, project: str) -> None:
    body = {"project_id": project, "git_branch": "main"}
    key = {"Idempotency-Key": "once"}

    first, second = (ask("POST", "/builds", json=body, headers=key) for _ in range(2))
    other = ask("POST", "/builds", json={**body, "git_branch": "dev"}, headers=key)

    assert first.json() == second.json()
    refusal(other, 409, "CONFLICT")
    assert ask.numbers() == [1]


# The life of a build


def test_a_build_goes_from_queued_over_in_progress_to_success(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_build(project)
    runner = mill.a_runner()
    seen = [ask.status_of(build)]

    assert mill.acquire(runner) == []
    started = ask("POST", f"/builds/{build['id']}/start")
    seen.append(started.json()["status"])
    run_a_step(mill, runner)
    seen.append(ask.status_of(build))
    run_a_step(mill, runner)
    ended = ask("GET", f"/builds/{build['id']}").json()

    assert started.status_code == 200
    assert [*seen, ended["status"]] == ["queued", "in_progress", "in_progress", "success"]
    assert ended.keys() == BUILD_FIELDS | {"workflow_id", "started_at", "finished_at"}


def test_a_build_that_fails_says_why(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_started_build(project)
    run_a_step(mill, mill.a_runner(), "failed")

    ended = ask("GET", f"/builds/{build['id']}").json()

    assert (ended["status"], ended["reason"]) == ("failed", "exit_nonzero")


def test_a_build_is_started_once_and_never_after_its_end(ask: Caller, mill: Mill, project: str) -> None:
    running = ask.a_started_build(project)
    cancelled = ask.a_build(project)
    ask("POST", f"/builds/{cancelled['id']}/cancel")

    for build in (running, cancelled):
        refusal(ask("POST", f"/builds/{build['id']}/start"), 409, "CONFLICT")
    assert ask.status_of(cancelled) == "cancelled"


def test_a_build_can_be_cancelled_until_it_has_ended(ask: Caller, mill: Mill, project: str) -> None:
    queued, started, running = ask.a_build(project), ask.a_started_build(project), None
    runner = mill.a_runner()

    at_once = [ask("POST", f"/builds/{build['id']}/cancel").json()["status"] for build in (queued, started)]
    running = ask.a_started_build(project)
    [held] = mill.acquire(runner)
    mill.start(held)
    asked = [ask("POST", f"/builds/{running['id']}/cancel") for _ in range(2)]
    mill.complete(held, "failed")

    assert at_once == ["cancelled", "cancelled"]
    assert [(answer.status_code, answer.json()["status"]) for answer in asked] == [(200, "in_progress")] * 2
    assert ask.status_of(running) == "cancelled"
    for build in (queued, started, running):
        refusal(ask("POST", f"/builds/{build['id']}/cancel"), 409, "CONFLICT")


def test_a_retry_makes_a_new_build_that_is_queued_and_linked(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_started_build(project, git_branch="dev", git_commit="abcdef1")
    run_a_step(mill, mill.a_runner(), "failed")
    before = ask("GET", f"/builds/{build['id']}").json()

    answer = ask("POST", f"/builds/{build['id']}/retry")

    again = answer.json()
    assert answer.status_code == 201
    assert (again["status"], again["retry_of"], again["build_number"]) == ("queued", build["id"], 2)
    assert {name: again[name] for name in ("git_branch", "git_commit", "project_id", "workflow_id")} == {
        name: build[name] for name in ("git_branch", "git_commit", "project_id", "workflow_id")
    }
    assert ask("GET", f"/builds/{build['id']}").json() == before
    assert mill.acquire(mill.a_runner()) == []


@ON_SQLITE
def test_what_is_wrong_with_a_body_is_named_in_its_own_words(ask: Caller, mill: Mill, project: str) -> None:
    whole = refusal(ask("POST", "/builds", json=[]), 400, "INVALID_REQUEST")
    head = {"project_id": project, "git_branch": "HEAD"}
    capitals = refusal(ask("POST", "/builds", json=head), 400, "INVALID_REQUEST")
    bare = {"project_id": mill.a_project(), "git_branch": "main"}
    unsettled = refusal(ask("POST", "/builds", json=bare), 400, "INVALID_REQUEST")

    assert whole["details"] == {"body": "must be an object"}
    assert capitals["details"] == {"git_branch": "HEAD is not the name of a branch"}
    assert unsettled["details"] == {"project_id": "names a project that has no workflow"}


def test_only_what_failed_or_was_cancelled_can_be_retried(ask: Caller, mill: Mill, project: str) -> None:
    runner = mill.a_runner()
    succeeded = ask.a_started_build(project)
    run_a_step(mill, runner), run_a_step(mill, runner)
    cancelled = ask.a_build(project)
    ask("POST", f"/builds/{cancelled['id']}/cancel")
    queued, started = ask.a_build(project), ask.a_started_build(project)

    assert ask("POST", f"/builds/{cancelled['id']}/retry").status_code == 201
    for build in (succeeded, queued, started):
        refusal(ask("POST", f"/builds/{build['id']}/retry"), 409, "CONFLICT")


@pytest.mark.parametrize("verb", ["start", "cancel"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 200),
        ({"content": b""}, 200),
        ({"json": {}}, 200),
        ({"json": {"force": True}}, 400),
        ({"json": []}, 400),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
    ],
)
@ON_SQLITE
def test_a_move_needs_no_body_and_takes_an_empty_one(
    ask: Caller, project: str, verb: str, body: dict[str, Any], status: int
) -> None:
    build = ask.a_build(project)

    assert ask("POST", f"/builds/{build['id']}/{verb}", **body).status_code == status


# How far it is


def test_the_status_shows_progress_as_in_the_example(ask: Caller, mill: Mill) -> None:
    project = a_project(mill, a_spec(a=[], b=["a"], c=["b"]))
    build = ask.a_started_build(project)
    run_a_step(mill, mill.a_runner())

    answer = ask("GET", f"/builds/{build['id']}/status")

    said = answer.json()
    assert answer.status_code == 200
    assert said.keys() == {"build_id", "status", "progress", "started_at", "estimated_completion"}
    assert (said["build_id"], said["status"]) == (build["id"], "in_progress")
    assert said["progress"] == {"current_step": 1, "total_steps": 3, "percentage": 33}
    assert MOMENT.fullmatch(said["started_at"])
    assert said["estimated_completion"] is None


def test_a_build_that_is_queued_has_no_start_and_no_estimated_end(ask: Caller, project: str) -> None:
    build = ask.a_build(project)

    assert ask("GET", f"/builds/{build['id']}/status").json() == {
        "build_id": build["id"],
        "status": "queued",
        "progress": {"current_step": 0, "total_steps": 2, "percentage": 0},
        "estimated_completion": None,
    }


def test_the_end_is_estimated_from_former_builds(ask: Caller, mill: Mill) -> None:
    project = a_project(mill, a_spec(only=[]))
    runner = mill.a_runner()
    for _ in range(2):
        build = ask.a_started_build(project)
        [held] = mill.acquire(runner)
        mill.start(held)
        if build["build_number"] == 1:
            mill.clock.advance(600)
            mill.heartbeat(runner, held)
            mill.complete(held)

    said = ask("GET", f"/builds/{build['id']}/status").json()

    assert said["status"] == "in_progress"
    assert MOMENT.fullmatch(said["estimated_completion"])
    assert said["estimated_completion"] > said["started_at"]


def test_skipped_steps_have_ended_too(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_started_build(project)
    run_a_step(mill, mill.a_runner(), "failed")

    said = ask("GET", f"/builds/{build['id']}/status").json()

    assert said["status"] == "failed"
    assert said["progress"] == {"current_step": 2, "total_steps": 2, "percentage": 100}


# The list


def test_a_page_is_as_the_contract_shows_it(ask: Caller, project: str) -> None:
    for _ in range(3):
        ask.a_build(project)

    first = ask("GET", "/builds?page=1&limit=2").json()
    last = ask("GET", "/builds?page=2&limit=2").json()
    beyond = ask("GET", "/builds?page=2147483647&limit=100").json()
    default = ask("GET", "/builds").json()

    assert {name: first[name] for name in ("total_count", "page", "limit", "has_more")} == {
        "total_count": 3,
        "page": 1,
        "limit": 2,
        "has_more": True,
    }
    assert [build["build_number"] for build in first["builds"]] == [3, 2]
    assert ([build["build_number"] for build in last["builds"]], last["has_more"]) == ([1], False)
    assert (beyond["builds"], beyond["total_count"], beyond["has_more"]) == ([], 3, False)
    assert (default["page"], default["limit"]) == (1, 20)
    assert first["builds"][0] == ask("GET", f"/builds/{first['builds'][0]['id']}").json()


def test_builds_are_filtered_by_status_and_project(ask: Caller, mill: Mill, project: str) -> None:
    other = a_project(mill)
    queued = ask.a_build(project)
    in_progress = ask.a_started_build(project)
    cancelled = ask.a_build(other)
    ask("POST", f"/builds/{cancelled['id']}/cancel")

    def ids(query: str) -> list[str]:
        return [build["id"] for build in ask("GET", f"/builds?{query}").json()["builds"]]

    assert ids("status=queued") == [queued["id"]]
    assert ids("status=in_progress") == [in_progress["id"]]
    assert ids("status=cancelled") == [cancelled["id"]]
    assert ids("status=success") == ids("status=failed") == []
    assert ids(f"project_id={other}") == [cancelled["id"]]
    assert ids(f"project_id={project.upper()}&status=queued") == [queued["id"]]
    assert ids(f"project_id={uuid4()}") == []


def test_builds_are_sorted_as_asked(ask: Caller, mill: Mill, project: str) -> None:
    builds = []
    for _ in range(3):
        mill.clock.advance(1)
        builds.append(ask.a_build(project))
    mill.clock.advance(1)
    ask("POST", f"/builds/{builds[0]['id']}/start")

    assert ask.numbers() == ask.numbers("sort_by=created_at&sort_order=desc") == [3, 2, 1]
    assert ask.numbers("sort_order=asc") == [1, 2, 3]
    assert ask.numbers("sort_by=build_number&sort_order=asc") == [1, 2, 3]
    assert ask.numbers("sort_by=updated_at") == [1, 3, 2]
    assert ask.numbers("sort_by=updated_at&sort_order=asc") == [2, 3, 1]


@pytest.mark.parametrize("sort_by", ["created_at", "updated_at", "build_number"])
@pytest.mark.parametrize("sort_order", ["asc", "desc"])
def test_pages_do_not_repeat_builds_that_are_equal(
    ask: Caller, mill: Mill, sort_by: str, sort_order: str
) -> None:
    made = {ask.a_build(project)["id"] for project in [a_project(mill) for _ in range(7)]}

    pages = [
        ask("GET", f"/builds?limit=2&page={page}&sort_by={sort_by}&sort_order={sort_order}").json()
        for page in range(1, 5)
    ]

    seen = [build["id"] for page in pages for build in page["builds"]]
    assert seen == sorted(made, reverse=sort_order == "desc")


@pytest.mark.threat("L08")
@pytest.mark.threat("L09")
@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("page=0", "page"),
        ("page=-1", "page"),
        ("page=1.0", "page"),
        ("page=01", "page"),
        (f"page={2**63}", "page"),
        (f"page={10**30}", "page"),
        ("page=1&page=2", "page"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit[]=1", "limit[]"),
        ("status=running", "status"),
        ("status=", "status"),
        ("status=queued&status=failed", "status"),
        ("sort_by=id", "sort_by"),
        ("sort_by=created_at;drop", "sort_by"),
        ("sort_order=up", "sort_order"),
        ("project_id=1", "project_id"),
        ("offset=0", "offset"),
    ],
)
@ON_SQLITE
def test_a_query_that_makes_no_sense_is_refused_and_named(ask: Caller, query: str, named: str) -> None:
    said = refusal(ask("GET", f"/builds?{query}"), 400, "INVALID_REQUEST")

    assert list(said["details"]) == [named]


def test_builds_of_the_other_surface_are_listed_and_can_be_handled(
    ask: Caller, mill: Mill, client: httpx.Client
) -> None:
    made = mill.a_build(project_id=mill.a_project())

    [shown] = ask("GET", "/builds").json()["builds"]
    cancelled = ask("POST", f"/builds/{made.id}/cancel").json()

    assert (shown["id"], shown["status"]) == (made.id, "in_progress")
    assert shown.keys() == (BUILD_FIELDS - {"git_branch"}) | {"workflow_id"}
    assert cancelled["status"] == "cancelled"


def test_the_other_surface_shows_such_builds_as_pending_and_cancels_them(
    ask: Caller, client: httpx.Client, project: str
) -> None:
    build = ask.a_build(project)
    path = f"/api/builds/{build['id']}"

    listed = client.get(f"/api/projects/{project}/builds").json()["builds"]
    retried = client.post(f"{path}/retry", json={"steps": "all"})
    cancelled = client.post(f"{path}/cancel")

    assert [(one["id"], one["status"]) for one in listed] == [(build["id"], "PENDING")]
    assert retried.status_code == 409
    assert cancelled.status_code == 202
    assert client.get(path).json()["status"] == "FAILED"
    assert client.get(path).json()["statusReason"] == "cancelled"


# Deleting


def test_a_deleted_build_is_gone_at_once_and_its_number_is_not_given_again(
    ask: Caller, client: httpx.Client, project: str
) -> None:
    build = ask.a_build(project)
    path = f"/builds/{build['id']}"

    deleted = ask("DELETE", path)

    assert (deleted.status_code, deleted.content) == (204, b"")
    for method, place in (
        ("GET", path),
        ("GET", f"{path}/status"),
        ("POST", f"{path}/start"),
        ("POST", f"{path}/cancel"),
        ("POST", f"{path}/retry"),
        ("DELETE", path),
    ):
        refusal(ask(method, place), 404, "NOT_FOUND")
    assert client.get(f"/api/builds/{build['id']}").status_code == 404
    assert ask.numbers() == []
    assert ask.a_build(project)["build_number"] == 2


def test_what_was_started_and_has_not_ended_is_not_deleted(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_started_build(project)
    [held] = mill.acquire(mill.a_runner())
    mill.start(held)

    refusal(ask("DELETE", f"/builds/{build['id']}"), 409, "CONFLICT")
    ask("POST", f"/builds/{build['id']}/cancel")
    refusal(ask("DELETE", f"/builds/{build['id']}"), 409, "CONFLICT")
    mill.complete(held, "failed")

    assert ask("DELETE", f"/builds/{build['id']}").status_code == 204


# Who may


def test_the_order_of_refusals_is_credential_tenant_permission_thing(
    ask: Caller, client: httpx.Client, mill: Mill, project: str
) -> None:
    build = ask.a_build(project)
    token = {"Authorization": ask.headers["Authorization"]}
    viewer = mill.a_member(role="viewer")
    nowhere = str(uuid4())

    for method, path in (
        ("GET", "/api/v1/builds"),
        ("POST", "/api/v1/builds"),
        ("GET", f"/api/v1/builds/{build['id']}"),
        ("DELETE", f"/api/v1/builds/{build['id']}"),
        ("POST", f"/api/v1/builds/{build['id']}/start"),
        ("POST", f"/api/v1/builds/{nowhere}/cancel"),
        ("POST", f"/api/v1/builds/{nowhere}/retry"),
        ("GET", f"/api/v1/builds/{nowhere}/status"),
    ):
        refusal(client.request(method, path), 401, "UNAUTHORIZED")
        said = refusal(client.request(method, path, headers=token), 400, "INVALID_REQUEST")
        assert said["details"].keys() == {"X-Tenant-ID"}
        foreign = {**token, "X-Tenant-ID": mill.a_tenant("other")}
        refusal(client.request(method, path, headers=foreign), 403, "FORBIDDEN")
        if method != "GET":
            refusal(client.request(method, path, headers=viewer), 403, "FORBIDDEN")


def test_a_viewer_sees_and_changes_nothing(
    ask: Caller, client: httpx.Client, mill: Mill, project: str
) -> None:
    build = ask.a_build(project)
    viewer = Caller(client, mill.a_member(role="viewer"))

    assert viewer.numbers() == [1]
    assert viewer("GET", f"/builds/{build['id']}").json() == build
    assert viewer("GET", f"/builds/{build['id']}/status").status_code == 200


def test_a_foreign_build_reads_as_one_that_never_was(ask: Caller, client: httpx.Client, mill: Mill) -> None:
    theirs = Caller(client, mill.a_member("other"))
    foreign = theirs.a_build(a_project(mill, account="other"))["id"]

    for method, rest in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/status"),
        ("POST", "/start"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
    ):
        said = [refusal(ask(method, f"/builds/{one}{rest}"), 404, "NOT_FOUND") for one in (foreign, uuid4())]
        assert without_trace(said[0]) == without_trace(said[1])
    assert ask.numbers() == []
    assert theirs.status_of({"id": foreign}) == "queued"


def test_an_id_of_any_shape_that_is_not_there_is_404(ask: Caller) -> None:
    for odd in ("nope", str(2**63), "x" * 500, "%F0%9F%90%88", "'"):
        refusal(ask("GET", f"/builds/{odd}"), 404, "NOT_FOUND")


# The trail


def test_every_change_is_written_down_with_who_did_it(ask: Caller, mill: Mill, project: str) -> None:
    build = ask.a_build(project)["id"]
    ask("POST", f"/builds/{build}/start")
    ask("POST", f"/builds/{build}/cancel")
    again = ask("POST", f"/builds/{build}/retry").json()["id"]
    ask("DELETE", f"/builds/{build}")

    actions = ("build.created", "build.started", "build.cancelled", "build.retried", "build.deleted")
    rows = [row for row in mill.audited() if row.action in actions]

    assert [(row.action, row.details["buildId"]) for row in rows] == [
        ("build.created", build),
        ("build.started", build),
        ("build.cancelled", build),
        ("build.created", again),
        ("build.retried", build),
        ("build.deleted", build),
    ]
    assert rows[3].details["retryOf"] == build
    assert rows[4].details["retriedBy"] == again
    assert all(row.actor.startswith("user:") for row in rows)
    assert {row.tenant_id for row in rows} == {mill.a_tenant("acme")}
