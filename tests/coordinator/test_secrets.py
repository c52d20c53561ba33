"""Secrets of projects: set, listed by name, handed to the steps that name them, and never shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import Session

from coordinator.actions.delete_project import delete_project
from coordinator.actions.forget_secrets import GRACE, forget_secrets
from coordinator.actions.give_secrets import give_secrets
from coordinator.actions.renew_leases import resume_attempts
from coordinator.actions.set_secret import set_secret
from coordinator.app import create_app
from coordinator.errors import NotFound
from coordinator.keys import SECRETS_KEY, UnusableKeys
from coordinator.sealing import CannotOpen, Place, Sealed, SecretKeys
from coordinator.settings import Settings
from coordinator.store import project_secrets, projects
from coordinator.store.dialect import Database
from shared.protocol import Order, Resume
from tests.coordinator.test_stop_races import overtaken
from tests.factories import LOCAL, ON_POSTGRES, ON_SQLITE, Api, Held, Mill, a_step

VALUE = "canary-3141592653589793"


def put(api: Api, project_id: str, name: str = "TOKEN", value: Any = VALUE) -> Any:
    return api.client.put(f"/api/projects/{project_id}/secrets/{name}", json={"value": value})


def keep(mill: Mill, project_id: str, name: str = "TOKEN", value: str = VALUE) -> None:
    mill.now(set_secret, mill.site, LOCAL, project_id, name=name, value=value)


def a_held_step(mill: Mill, project_id: str, names: list[str], **request: Any) -> Held:
    mill.a_build([a_step(secrets=names)], project_id=project_id, **request)
    return mill.acquire(mill.a_runner())[0]


def resumed(mill: Mill, held: Held) -> Order:
    said = Resume(session="the-next-life", attempts=[held.report()])
    return mill.now(resume_attempts, mill.site, held.runner.caller, said).attempts[0]


# What users see


def test_a_secret_is_listed_by_its_name_and_times_alone(api: Api) -> None:
    project = api.a_project()["id"]

    made, again = put(api, project, "B"), put(api, project, "B", "another value")
    put(api, project, "A")

    assert (made.status_code, again.status_code) == (201, 204)
    assert set(made.json()) == {"name", "createdAt", "updatedAt"}
    listed = api.get(f"/api/projects/{project}/secrets")
    assert [one["name"] for one in listed] == ["A", "B"]
    assert all(set(one) == {"name", "createdAt", "updatedAt"} for one in listed)


def test_a_deleted_secret_is_gone_and_one_that_never_was_is_unknown(api: Api) -> None:
    project = api.a_project()["id"]
    put(api, project)

    answers = [api.client.delete(f"/api/projects/{project}/secrets/TOKEN").status_code for _ in range(2)]

    assert answers == [204, 404]
    assert api.get(f"/api/projects/{project}/secrets") == []
    assert put(api, project).status_code == 201


def test_secrets_go_with_their_project(api: Api, mill: Mill) -> None:
    project, other = api.a_project()["id"], api.a_project()["id"]
    put(api, project)
    put(api, other)

    assert api.client.delete(f"/api/projects/{project}").status_code == 204

    assert put(api, project).status_code == 404
    assert mill.tx(
        lambda tx: tx.connection().execute(text("SELECT project_id FROM project_secrets")).all()
    ) == [(other,)]


@pytest.mark.threat("G08")
@pytest.mark.parametrize(
    "name",
    ["lower", "9A", "A-B", "A" * 65, "BUILDMILL_X", "LD_PRELOAD", "BASH_ENV", "IFS", "CI", "UID", "A B"],
)
@ON_SQLITE
def test_a_name_that_no_variable_can_have_is_refused_and_not_repeated(api: Api, name: str) -> None:
    answer = put(api, api.a_project()["id"], name)

    assert answer.status_code == 400
    assert [fault["path"] for fault in answer.json()["details"]] == ["name"]
    assert name not in answer.text


@pytest.mark.threat("G08")
@pytest.mark.parametrize(
    "body",
    [
        {"value": VALUE + "x" * 65536},
        {"value": VALUE + "é" * 40000},
        {"value": VALUE + "\0"},
        {"value": [VALUE]},
        {"value": {"of": VALUE}},
        {"value": VALUE, "more": VALUE},
        {"Value": VALUE},
        [VALUE],
        VALUE,
    ],
)
@ON_SQLITE
def test_no_refusal_repeats_any_of_the_value(api: Api, body: Any) -> None:
    project = api.a_project()["id"]

    answer = api.client.put(f"/api/projects/{project}/secrets/TOKEN", json=body)

    assert answer.status_code == 400
    assert VALUE not in answer.text
    assert api.get(f"/api/projects/{project}/secrets") == []


@pytest.mark.threat("G06")
@ON_SQLITE
def test_the_value_has_bounds_in_bytes(api: Api) -> None:
    project = api.a_project()["id"]

    assert put(api, project, value="").status_code == 400
    assert put(api, project, value="x").status_code == 201
    assert put(api, project, value="é" * 32768).status_code == 204
    assert put(api, project, value="é" * 32769).status_code == 400
    broken = {"content": b'{"value": "\xff\xfe canary"}', "headers": {"Content-Type": "application/json"}}
    assert api.client.put(f"/api/projects/{project}/secrets/TOKEN", **broken).status_code == 400
    large = json.dumps({"value": "x" * 600_000})
    answer = api.client.put(
        f"/api/projects/{project}/secrets/TOKEN",
        content=large,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 413


@pytest.mark.threat("G08")
def test_the_trail_tells_of_names_and_never_of_values(api: Api) -> None:
    project = api.a_project()["id"]
    put(api, project)
    put(api, project, value=VALUE + "2")
    api.client.delete(f"/api/projects/{project}/secrets/TOKEN")

    trail = api.client.get(f"/api/audit-logs?projectId={project}")

    told = [(row["action"], row["details"]) for row in reversed(trail.json()["auditLogs"])]
    about = {"name": "TOKEN"}
    assert told[1:] == [("secret.created", about), ("secret.changed", about), ("secret.deleted", about)]
    assert VALUE not in trail.text


# What is stored


@pytest.mark.threat("G08")
def test_the_database_and_the_data_folder_hold_no_value_in_clear(
    mill: Mill, database: Database, tmp_path: Path
) -> None:
    project = mill.a_project()
    keep(mill, project)
    held = a_held_step(mill, project, ["TOKEN"])
    assert held.claim.secrets == {"TOKEN": VALUE}

    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    dumped = mill.tx(_dump_of_every_table)

    assert not [path for path in stored if VALUE.encode() in path.read_bytes()]
    assert VALUE not in dumped and VALUE.encode().hex() not in dumped
    assert "TOKEN" in dumped


def _dump_of_every_table(tx: Session) -> str:
    from coordinator.tables import Row

    rows = [tx.connection().execute(table.select()).all() for table in Row.metadata.sorted_tables]
    return repr(
        [
            [value.hex() if isinstance(value, bytes) else value for value in row]
            for table in rows
            for row in table
        ]
    )


def test_a_sealed_value_opens_at_its_own_place_only() -> None:
    keys = SecretKeys([b"k" * 32])
    here = Place("row", "project", "NAME")
    sealed = keys.seal(VALUE, here)

    assert keys.open(sealed, here) == VALUE
    assert keys.seal(VALUE, here).sealed != sealed.sealed
    flipped = Sealed(sealed.key_id, sealed.sealed[:-1] + bytes([sealed.sealed[-1] ^ 1]))
    for found, place in (
        (sealed, Place("row", "project", "OTHER")),
        (sealed, Place("row", "other", "NAME")),
        (sealed, Place("other", "project", "NAME")),
        (flipped, here),
        (Sealed(sealed.key_id, b"short"), here),
        (Sealed("unknown", sealed.sealed), here),
    ):
        with pytest.raises(CannotOpen):
            keys.open(found, place)


def test_a_row_that_was_moved_to_another_project_opens_for_nobody(mill: Mill) -> None:
    rich, poor = mill.a_project(), mill.a_project()
    keep(mill, rich)
    mill.tx(
        lambda tx: tx.connection().execute(text("UPDATE project_secrets SET project_id = :p"), {"p": poor})
    )

    mill.a_build([a_step(secrets=["TOKEN"])], project_id=poor)
    assert mill.acquire(mill.a_runner()) == []

    assert mill.audited("step.finished")[-1].details["reason"] == "bad_config"


# What steps are given


def test_a_step_is_given_what_it_names_as_it_is_set_when_it_is_claimed(mill: Mill) -> None:
    project = mill.a_project()
    for name in ("A", "B", "C"):
        keep(mill, project, name, f"old {name}")
    build = mill.a_build([a_step(secrets=["C", "A"])], project_id=project)
    keep(mill, project, "A", "new A")

    held = mill.acquire(mill.a_runner())[0]

    assert held.claim.secrets == {"C": "old C", "A": "new A"}
    assert held.claim.secret_names == ["C", "A"]
    assert mill.a_build(project_id=project) is not build
    assert mill.acquire(mill.a_runner())[0].claim.secrets == {}


def test_a_repeated_request_is_given_the_same_values(mill: Mill) -> None:
    project, runner = mill.a_project(), mill.a_runner()
    keep(mill, project)
    mill.a_build([a_step(secrets=["TOKEN"])], project_id=project)

    first = mill.acquire(runner, request_id="the-request")[0]
    keep(mill, project, value="another value")
    second = mill.acquire(runner, request_id="the-request")[0]

    assert second.claim == first.claim
    assert first.claim.secrets == {"TOKEN": VALUE}


def test_an_unknown_secret_fails_its_step_alone_and_is_named(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project)
    steps = [a_step("one", secrets=["MISSING"]), a_step("two", secrets=["TOKEN"])]
    build = mill.a_build(steps, project_id=project)

    claims = mill.acquire(mill.a_runner(), slots=2)

    assert [held.claim.name for held in claims] == ["two"]
    assert mill.states(build)["one"] == "failed"
    (attempt,) = mill.attempts(build.steps["one"])
    assert (attempt.reason, attempt.detail) == ("bad_config", "the project has no secret MISSING")


def test_a_row_that_cannot_be_opened_fails_its_step_alone(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project, "GOOD")
    keep(mill, project, "BAD")
    mill.tx(
        lambda tx: tx.connection().execute(
            text("UPDATE project_secrets SET sealed = :junk WHERE name = 'BAD'"), {"junk": b"x" * 60}
        )
    )
    build = mill.a_build(
        [a_step("one", secrets=["BAD"]), a_step("two", secrets=["GOOD"])], project_id=project
    )

    claims = mill.acquire(mill.a_runner(), slots=2)

    assert [held.claim.name for held in claims] == ["two"]
    (attempt,) = mill.attempts(build.steps["one"])
    assert attempt.reason == "bad_config"
    assert "BAD" in attempt.detail


def test_a_step_is_given_64_kib_of_secrets_and_not_a_byte_more(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project, "LARGE", "x" * 65536)
    keep(mill, project, "SMALL", "y")
    steps = [a_step("all", secrets=["LARGE", "SMALL"]), a_step("less", secrets=["LARGE"])]
    build = mill.a_build(steps, project_id=project)

    assert [held.claim.name for held in mill.acquire(mill.a_runner(), slots=2)] == ["less"]

    assert mill.attempts(build.steps["all"])[0].reason == "bad_config"


@pytest.mark.threat("G09")
def test_a_build_of_another_repository_is_given_no_secret(api: Api) -> None:
    project = api.a_project()["id"]
    put(api, project)
    ours, fork = "https://git.example/ours/p", "https://git.example/fork/p"
    api.client.patch(f"/api/projects/{project}", json={"repoUrl": ours, "defaultBranch": "main"})
    workflow = api.a_workflow([a_step(secrets=["TOKEN"])], project)
    runner = api.a_runner()

    def claimed(**request: Any) -> tuple[list[Any], dict[str, Any]]:
        body = {"workflowId": workflow["id"], **request}
        made = api.post(f"/api/projects/{project}/builds", body)
        return api.acquire(runner), api.build(made["id"])["steps"][0]

    claims, step = claimed(repoUrl=fork, branch="main")
    assert claims == []
    assert (step["status"], step["reason"]) == ("FAILED", "bad_config")
    assert "repository" in step["attempts"][0]["detail"]
    for request in ({"repoUrl": ours, "branch": "main"}, {"branch": "side"}, {}):
        (claim,), _ = claimed(**request)
        assert claim["secrets"] == {"TOKEN": VALUE}, request


@pytest.mark.threat("G09")
@ON_SQLITE
def test_a_step_cannot_say_of_itself_where_it_comes_from(api: Api) -> None:
    api.an_image()
    project = api.a_project()["id"]
    for name in ("BUILDMILL_BRANCH", "BUILDMILL_COMMIT"):
        body = {"name": "w", "steps": [a_step(secrets=["TOKEN"], env={name: "main"})]}
        assert api.client.post(f"/api/projects/{project}/workflows", json=body).status_code == 400


# A runner that has restarted


def test_a_restarted_runner_is_given_again_what_the_attempt_was_given(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project)
    held = a_held_step(mill, project, ["TOKEN"])
    mill.start(held)
    keep(mill, project, value="another value")
    mill.clock.advance(GRACE.total_seconds() * 2)
    mill.now(forget_secrets)

    order = resumed(mill, held)

    assert (order.action, order.secrets) == ("continue", {"TOKEN": VALUE})


def test_a_heartbeat_and_a_lost_lease_are_given_none(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project)
    held = a_held_step(mill, project, ["TOKEN"])

    assert mill.heartbeat(held.runner, held)[0].secrets == {}
    stranger = Held(held.claim, mill.a_runner())
    order = resumed(mill, stranger)
    assert (order.action, order.secrets) == ("abandon", {})


def test_what_was_replaced_is_deleted_once_no_attempt_has_it(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project)
    held = a_held_step(mill, project, ["TOKEN"])
    mill.start(held)
    keep(mill, project, value="another value")
    keep(mill, project, value="a third one")
    mill.clock.advance(GRACE.total_seconds() + 1)

    while_it_runs = mill.now(forget_secrets)
    mill.complete(held)
    after_it = mill.now(forget_secrets)

    assert (while_it_runs, after_it) == (1, 1)
    assert [row.name for row in mill.tx(project_secrets.list_current, project)] == ["TOKEN"]


def test_what_is_not_there_any_more_is_not_given_again(mill: Mill) -> None:
    project = mill.a_project()
    keep(mill, project)
    held = a_held_step(mill, project, ["TOKEN"])
    mill.start(held)
    mill.tx(project_secrets.delete_all, project)

    order = resumed(mill, held)

    assert (order.action, order.secrets) == ("continue", {})


# The key file


def reopened(settings: Settings, database: Database) -> None:
    create_app(settings, database=database).state.coordinator.lanes.close()


def key_file(settings: Settings) -> Path:
    return settings.data / "keys" / SECRETS_KEY


def test_the_key_is_made_at_the_first_start_and_stays(
    mill: Mill, settings: Settings, database: Database
) -> None:
    path = key_file(settings)
    before = path.read_text()

    reopened(settings, database)

    assert path.read_text() == before
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_missing_key_is_made_anew_only_while_no_secret_is_stored(
    mill: Mill, settings: Settings, database: Database
) -> None:
    key_file(settings).unlink()
    reopened(settings, database)
    keep(mill, mill.a_project())
    key_file(settings).unlink()

    with pytest.raises(UnusableKeys, match="put it back"):
        reopened(settings, database)

    assert not key_file(settings).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0" * 64 + "\n", "lacks a key"),
        ("not a key\n", "64 hexadecimal digits"),
        ("", "64 hexadecimal digits"),
    ],
)
def test_a_wrong_key_file_is_refused_at_the_start(
    mill: Mill, settings: Settings, database: Database, content: str, message: str
) -> None:
    keep(mill, mill.a_project())
    key_file(settings).write_text(content)

    with pytest.raises(UnusableKeys, match=message):
        reopened(settings, database)


def test_a_key_that_others_may_read_is_refused(mill: Mill, settings: Settings, database: Database) -> None:
    key_file(settings).chmod(0o640)

    with pytest.raises(UnusableKeys, match="chmod 600"):
        reopened(settings, database)


def test_a_new_first_line_seals_and_the_old_one_still_opens(
    mill: Mill, settings: Settings, database: Database, clock: Any
) -> None:
    project = mill.a_project()
    keep(mill, project, "OLD")
    path = key_file(settings)
    path.write_text("ab" * 32 + "\n" + path.read_text())

    app = create_app(settings, database=database, clock=clock)
    try:
        after = Mill(app.state.coordinator, clock)
        keep(after, project, "NEW")
        held = a_held_step(after, project, ["OLD", "NEW"])
        rows = {row.name: row.key_id for row in after.tx(project_secrets.list_current, project)}
        given = after.tx(
            give_secrets, after.site, after.step(held.step_id), after.build(held.claim.build_id), ["OLD"]
        )
    finally:
        app.state.coordinator.lanes.close()

    assert held.claim.secrets == {"OLD": VALUE, "NEW": VALUE}
    assert given == {"OLD": VALUE}
    assert rows["OLD"] != rows["NEW"]


@ON_POSTGRES
def test_a_project_that_is_deleted_meanwhile_gets_no_secret(mill: Mill, database: Database) -> None:
    project_id = mill.a_project()

    with pytest.raises(NotFound):
        overtaken(
            mill,
            database,
            lambda: keep(mill, project_id),
            holding=lambda tx: projects.lock_project(tx, project_id),
            by=lambda tx: delete_project(tx, LOCAL, project_id, now=mill.clock()),
        )

    with database.reader.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM project_secrets")).scalar_one() == 0
