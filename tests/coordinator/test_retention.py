"""What retention lets go is gone, and nothing else: rows, files, bytes that builds share."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import event, func, insert, select, update
from sqlmodel import Session

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_project import change_project
from coordinator.actions.create_unstarted_build import create_unstarted_build
from coordinator.actions.delete_build import delete_build
from coordinator.actions.delete_project import delete_project
from coordinator.actions.drop_blobs import drop_blobs
from coordinator.actions.refuse_expired import refuse_expired
from coordinator.actions.repeat_build import repeat_build
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.actions.store_blob import expect_blob, store_blob
from coordinator.app import create_app
from coordinator.cli.main import main
from coordinator.errors import Conflict, Expired, Unavailable
from coordinator.rules.access import Audience, Caller
from coordinator.store import artifacts, retention
from coordinator.store.dialect import Database, hold_names, open_database
from coordinator.tables import (
    Artifact,
    Blob,
    Build,
    LogAppend,
    Project,
    Row,
    Step,
    StepAttempt,
    StepDependency,
    Tombstone,
    table_of,
)
from coordinator.upkeep import Done, Upkeep
from shared.ids import new_id
from tests.factories import (
    LOCAL,
    ON_POSTGRES,
    ON_SQLITE,
    Api,
    Held,
    HeldOverHttp,
    Mill,
    a_spec,
    a_step,
    together,
)

BUILDS, STEPS, ATTEMPTS, APPENDS, ARTIFACTS, BLOBS, ARROWS, TOMBSTONES = (
    table_of(row) for row in (Build, Step, StepAttempt, LogAppend, Artifact, Blob, StepDependency, Tombstone)
)
PROJECTS = table_of(Project)
DAY = 24 * 3600
MEGABYTE = 1024 * 1024


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Shop:
    """A project whose builds end at once, with the artifacts and logs they are given."""

    mill: Mill
    project_id: str
    workflow_id: str
    runner: Any

    def build(
        self, *outputs: bytes, log: bytes = b"a line\n", status: str = "failed", branch: str = "main"
    ) -> str:
        made = self.mill.another_build(self.project_id, self.workflow_id, branch=branch)
        (held,) = self.mill.acquire(self.runner)
        self.mill.start(held)
        if log:
            self.mill.append(held, 0, log)
        if outputs:
            status = "success"
        self.mill.complete(held, status, artifacts=[self.upload(held, data) for data in outputs])
        return made.id

    def upload(self, held: Held, data: bytes) -> dict[str, Any]:
        sha256 = digest_of(data)
        incoming = self.mill.site.blobs.incoming()
        incoming.write(data)
        incoming.commit(sha256)
        step = (self.mill.site, held.runner.caller, held.step_id, held.proof, sha256)
        self.mill.now(store_blob, *step, size=len(data))
        return {"path": f"out/{sha256}", "type": "file", "size": len(data), "sha256": sha256, "mode": 0o644}

    def running(self) -> Held:
        self.mill.another_build(self.project_id, self.workflow_id, branch="main")
        (held,) = self.mill.acquire(self.runner)
        self.mill.start(held)
        return held

    def rules(self, **rules: int) -> None:
        self.mill.now(change_project, self.mill.site, LOCAL, self.project_id, {"retention": rules})

    # What happens

    def upkeep(self, lanes: Any = None) -> Upkeep:
        state = self.mill.state
        site = state.site
        return Upkeep(lanes or state.lanes, state.settings, site.logs, site.blobs, state.clock, pause_s=0)

    def expire(self) -> Done:
        return asyncio.run(self.upkeep().expire())

    def sweep(self) -> Done:
        return asyncio.run(self.upkeep().sweep())

    # What can be seen

    def count(self, table: Any, *where: Any) -> int:
        statement = select(func.count()).select_from(table).where(*where)
        return self.mill.tx(lambda tx: int(tx.connection().execute(statement).scalar_one()))

    def numbers(self) -> list[int]:
        statement = select(BUILDS.c.number).where(BUILDS.c.expired_at.is_(None)).order_by(BUILDS.c.number)
        return self.mill.tx(lambda tx: list(tx.connection().execute(statement).scalars()))

    def with_artifacts(self) -> list[int]:
        return self._numbers_with(ARTIFACTS.c.build_id)

    def with_logs(self) -> list[int]:
        return self._numbers_with(APPENDS.c.build_id)

    def _numbers_with(self, column: Any) -> list[int]:
        statement = select(BUILDS.c.number).where(BUILDS.c.id.in_(select(column))).order_by(BUILDS.c.number)
        return self.mill.tx(lambda tx: list(tx.connection().execute(statement).scalars()))

    def log_files(self) -> list[Path]:
        return [path for path in (self.mill.site.data / "logs").rglob("*") if path.is_file()]

    def blob_files(self) -> set[str]:
        return {path.name for path in (self.mill.site.data / "blobs").rglob("*") if path.is_file()}

    def require_nothing_dangling(self) -> None:
        """No row that somebody can see points at bytes that are not there."""

        def look(tx: Session) -> tuple[list[Any], ...]:
            run = tx.connection().execute
            named = select(ARTIFACTS)
            logs = (
                select(ATTEMPTS, BUILDS.c.id.label("build_id"), STEPS.c.round, BUILDS.c.logs_expired_round)
                .join(STEPS, STEPS.c.id == ATTEMPTS.c.step_id)
                .join(BUILDS, BUILDS.c.id == STEPS.c.build_id)
                .where(BUILDS.c.expired_at.is_(None))
            )
            return list(run(named)), list(run(select(BLOBS))), list(run(logs))

        named, stored, logs = self.mill.tx(look)
        blobs = {row.sha256: row.size for row in stored}
        assert all(self.mill.site.blobs.has(sha256, size) for sha256, size in blobs.items())
        assert {row.sha256 for row in named} <= set(blobs)
        for row in logs:
            if row.round > row.logs_expired_round:
                path = self.mill.site.logs.path(row.build_id, row.step_id, row.attempt)
                assert self.mill.site.logs.size(path) == row.log_size


@pytest.fixture
def shop(mill: Mill) -> Shop:
    project_id = mill.a_project()
    mill.now(change_project, mill.site, LOCAL, project_id, {"default_branch": "main"})
    return Shop(mill, project_id, mill.a_workflow(project_id, a_spec()), mill.a_runner())


# By age, count and size


def test_by_default_everything_is_kept_for_ever(shop: Shop) -> None:
    shop.build(b"output")
    shop.build()
    shop.mill.clock.advance(10_000 * DAY)

    assert shop.expire() == Done()

    assert shop.numbers() == shop.with_logs() == [1, 2]
    assert shop.with_artifacts() == [1]


def test_artifacts_logs_and_builds_go_at_their_age(shop: Shop) -> None:
    shop.rules(artifact_days=2, log_days=4, build_days=6)
    shop.build(b"output of the first")
    shop.mill.clock.advance(DAY)
    shop.build(b"output of the second")
    seen = []

    for _ in range(7):
        shop.expire()
        seen.append((shop.numbers(), shop.with_artifacts(), shop.with_logs()))
        shop.mill.clock.advance(DAY)

    assert seen == [
        ([1, 2], [1, 2], [1, 2]),
        ([1, 2], [2], [1, 2]),
        ([1, 2], [2], [1, 2]),
        ([1, 2], [2], [2]),
        ([1, 2], [2], [2]),
        ([2], [2], [2]),
        ([2], [2], [2]),
    ], "the second is the last success"


def test_the_files_of_logs_go_with_their_rows(shop: Shop) -> None:
    shop.rules(log_days=1)
    shop.build(log=b"x" * 1000)
    shop.mill.clock.advance(DAY)
    young = shop.build(log=b"y" * 1000)

    done = shop.expire()

    (left,) = shop.log_files()
    assert young in str(left)
    assert (done.logs, done.files, done.bytes) == (1, 1, 1000)


def test_of_too_many_builds_the_newest_stay_and_the_last_success(shop: Shop) -> None:
    shop.rules(builds=2)
    for outputs in ((b"one",), (b"two",), (), (), ()):
        shop.build(*outputs)

    shop.expire()

    assert shop.numbers() == [2, 4, 5]
    assert shop.count(STEPS) == shop.count(ATTEMPTS) == 3
    assert len(shop.log_files()) == 3
    assert shop.with_artifacts() == [2]


def test_artifacts_of_the_oldest_go_until_the_rest_fits(shop: Shop) -> None:
    shop.rules(megabytes=3)
    for letter in b"abcd":
        shop.build(bytes([letter]) * MEGABYTE, log=b"")

    shop.expire()

    assert shop.with_artifacts() == [2, 3, 4]
    assert shop.numbers() == [1, 2, 3, 4]


def test_bytes_that_builds_share_count_once(shop: Shop) -> None:
    shop.rules(megabytes=2)
    for _ in range(5):
        shop.build(b"s" * MEGABYTE, log=b"")

    assert shop.expire() == Done()

    shop.build(b"t" * MEGABYTE, log=b"")
    shop.build(b"u" * MEGABYTE, log=b"")
    shop.expire()
    assert shop.with_artifacts() == [6, 7]


def test_a_build_that_has_not_ended_is_not_touched(shop: Shop) -> None:
    shop.rules(artifact_days=1, log_days=1, build_days=1, builds=1, megabytes=1)
    held = shop.running()
    shop.mill.append(held, 0, b"still running\n")
    shop.mill.clock.advance(100 * DAY)
    shop.build()
    shop.build()

    shop.expire()

    assert shop.numbers() == [1, 3]
    assert shop.mill.append(held, 14, b"and on\n").size == 21
    assert shop.mill.complete(held).is_build_complete


def test_rules_of_a_project_go_before_those_of_the_coordinator(
    new_app: Any, settings: Any, clock: Any
) -> None:
    app = new_app(settings.model_copy(update={"retain_builds": 1}))
    mill = Mill(app.state.coordinator, clock)
    shops = []
    for rules in ({}, {"builds": 0}, {"builds": 2}):
        project_id = mill.a_project()
        shops.append(Shop(mill, project_id, mill.a_workflow(project_id, a_spec()), mill.a_runner()))
        shops[-1].rules(**rules)
        for _ in range(3):
            shops[-1].build()

    shops[0].expire()

    assert [shop.count(BUILDS, BUILDS.c.project_id == shop.project_id) for shop in shops] == [1, 3, 2]


def test_what_a_deleted_project_had_goes_a_month_later(shop: Shop) -> None:
    shop.build(b"output")
    shop.mill.now(delete_project, LOCAL, shop.project_id)
    shop.mill.clock.advance(29 * DAY)
    shop.expire()
    assert shop.count(BUILDS) == 1

    shop.mill.clock.advance(DAY)
    shop.expire()
    shop.mill.clock.advance(DAY)
    shop.expire()

    assert shop.count(BUILDS) == shop.count(ARTIFACTS) == shop.count(BLOBS) == 0
    assert shop.log_files() == [] and shop.blob_files() == set()


# A dry run


def test_a_dry_run_changes_nothing_and_says_what_the_run_then_does(shop: Shop, client: Any) -> None:
    shop.rules(artifact_days=3, log_days=5, build_days=8, builds=10, megabytes=1)
    for day in range(7):
        shop.build(f"output {day}".encode(), b"shared", log=b"l" * day)
        shop.build(b"z" * 300_000 + bytes([day]))
        shop.mill.clock.advance(DAY)
    rows = [shop.count(table) for table in Row.metadata.sorted_tables]
    path = f"/api/projects/{shop.project_id}/retention"

    said = client.get(path).json()

    assert client.get(path).json() == said
    assert [shop.count(table) for table in Row.metadata.sorted_tables] == rows
    done = shop.expire()
    per_part = {"artifacts": done.artifacts, "logs": done.logs, "build": done.builds}
    assert {part: sum(one["part"] == part for one in said["expires"]) for part in per_part} == per_part
    assert said["total"] == len(said["expires"]) == sum(per_part.values()) > 0
    assert said["bytes"] == sum(one["bytes"] for one in said["expires"]) == done.bytes
    assert sum(one["files"] for one in said["expires"]) == done.files
    gone = {one["number"] for one in said["expires"] if one["part"] == "build"}
    assert shop.numbers() == [number for number in range(1, 15) if number not in gone]
    bare = {one["number"] for one in said["expires"] if one["part"] == "artifacts"}
    assert bare and bare.isdisjoint(shop.with_artifacts())
    assert client.get(path).json()["expires"] == []


def test_a_dry_run_names_rule_and_size(shop: Shop, client: Any) -> None:
    shop.rules(build_days=1)
    build_id = shop.build(log=b"12345")
    shop.mill.clock.advance(DAY)

    said = client.get(f"/api/projects/{shop.project_id}/retention").json()

    assert said["rules"] == {"logDays": 0, "artifactDays": 0, "buildDays": 1, "builds": 0, "megabytes": 0}
    assert said["expires"] == [
        {"buildId": build_id, "number": 1, "part": "build", "reason": "age", "files": 1, "bytes": 5}
    ]


@ON_SQLITE
def test_a_project_is_given_rules_and_they_are_cleared(api: Api) -> None:
    path = f"/api/projects/{api.a_project()['id']}"

    def patch(rules: Any) -> Any:
        return api.client.patch(path, json={"retention": rules})

    assert patch({"logDays": 3, "builds": None}).json()["retention"] == {"logDays": 3}
    assert api.get(path)["retention"] == {"logDays": 3}
    assert "retention" not in patch(None).json()
    assert "retention" not in patch({}).json()
    for wrong in ({"logDays": -1}, {"logDays": 1.5}, {"logDays": "1"}, {"days": 1}, {"builds": 10**10}, 3):
        assert patch(wrong).status_code == 400
    assert api.client.get("/api/projects/nope/retention").status_code == 404


# Bytes


def test_bytes_stay_while_a_build_of_the_project_names_them(shop: Shop) -> None:
    shop.rules(artifact_days=5)
    shop.build(b"shared", b"only here")
    shop.mill.clock.advance(3 * DAY)
    shop.build(b"shared")
    shop.build(b"last success")
    shop.mill.clock.advance(2 * DAY)

    shop.expire()
    shop.mill.clock.advance(DAY)
    shop.expire()

    assert shop.with_artifacts() == [2, 3]
    assert shop.blob_files() == {digest_of(b"shared"), digest_of(b"last success")}
    shop.mill.clock.advance(2 * DAY)
    shop.expire()
    shop.mill.clock.advance(DAY)
    done = shop.expire()
    assert (done.blobs, done.blob_bytes) == (1, len(b"shared"))
    assert shop.blob_files() == {digest_of(b"last success")}


def test_bytes_that_another_project_has_stay_on_the_disk(shop: Shop, mill: Mill) -> None:
    project_id = mill.a_project()
    other = Shop(mill, project_id, mill.a_workflow(project_id, a_spec()), shop.runner)
    other.build(b"shared")
    shop.rules(artifact_days=1)
    shop.build(b"shared")
    shop.build(b"last success")
    for _ in range(3):
        mill.clock.advance(DAY)
        shop.expire()

    assert shop.count(BLOBS, BLOBS.c.sha256 == digest_of(b"shared")) == 1
    assert digest_of(b"shared") in shop.blob_files()
    shop.require_nothing_dangling()


def test_bytes_are_freed_a_day_after_nobody_needs_them(shop: Shop) -> None:
    shop.rules(artifact_days=1)
    shop.build(b"old")
    shop.build(b"last success")
    shop.mill.clock.advance(DAY)
    shop.expire()
    shop.mill.clock.advance(DAY - 1)

    assert shop.expire().blobs == 0
    shop.mill.clock.advance(1)
    assert shop.expire().blobs == 1
    assert shop.blob_files() == {digest_of(b"last success")}


def test_an_upload_that_no_completion_names_is_freed(shop: Shop) -> None:
    held = shop.running()
    shop.upload(held, b"never named")
    shop.mill.complete(held, "failed")
    shop.build(b"named")

    for _ in range(2):
        shop.mill.clock.advance(DAY + 1)
        shop.sweep()
        shop.expire()

    assert shop.blob_files() == {digest_of(b"named")}
    assert shop.count(BLOBS) == 1


def test_bytes_that_are_about_to_go_are_sent_again_and_stay(shop: Shop) -> None:
    shop.rules(artifact_days=1)
    shop.build(b"wanted again")
    shop.build(b"last success")
    shop.mill.clock.advance(DAY)
    shop.expire()
    held = shop.running()
    step = (shop.mill.site, held.runner.caller, held.step_id, held.proof, digest_of(b"wanted again"))

    _, is_there = shop.mill.tx(expect_blob, *step, size=12)
    entry = shop.upload(held, b"wanted again")
    shop.mill.clock.advance(2 * DAY)
    shop.expire()

    assert not is_there
    assert shop.mill.complete(held, "success", artifacts=[entry]).is_same
    shop.require_nothing_dangling()


def test_bytes_that_a_late_completion_names_stay(shop: Shop) -> None:
    shop.rules(artifact_days=5)
    held = shop.running()
    entry = shop.upload(held, b"uploaded early")
    shop.build(b"last success")
    shop.mill.clock.advance(DAY + 1)
    shop.sweep()
    assert shop.count(BLOBS, BLOBS.c.unused_since.is_not(None)) == 1

    shop.mill.complete(held, "success", artifacts=[entry])
    shop.mill.clock.advance(DAY)
    shop.expire()

    assert shop.count(BLOBS, BLOBS.c.unused_since.is_not(None)) == 0
    assert shop.with_artifacts() == [1, 2]
    shop.require_nothing_dangling()


# Uploads that race with the deletion


def test_an_upload_whose_file_was_just_deleted_is_refused_for_now(shop: Shop) -> None:
    held = shop.running()
    sha256 = digest_of(b"data")
    incoming = shop.mill.site.blobs.incoming()
    incoming.write(b"data")
    incoming.commit(sha256)
    for path in shop.mill.tx(drop_blobs, shop.mill.site.blobs, {sha256}):
        path.unlink()

    with pytest.raises(Unavailable, match="send them again"):
        shop.mill.now(
            store_blob, shop.mill.site, held.runner.caller, held.step_id, held.proof, sha256, size=4
        )

    assert shop.count(BLOBS) == 0


def test_uploads_and_deletions_at_the_same_moment_leave_no_row_without_its_file(
    new_app: Any, new_client: Any, settings: Any, clock: Any
) -> None:
    app = new_app(settings.model_copy(update={"retain_unused_hours": 0}))
    mill, api = Mill(app.state.coordinator, clock), Api(new_client(app))
    held = api.a_running_step()
    project_id = mill.step(held.step_id).project_id
    shop = Shop(mill, project_id, mill.a_workflow(project_id, a_spec()), mill.a_runner())

    def delete() -> int:
        gone, _ = mill.tx(retention.delete_unused_blobs, before=clock(), limit=100)
        aside = mill.tx(drop_blobs, mill.site.blobs, {sha256 for _, sha256, _ in gone} | {sha})
        for path in aside:
            path.unlink()
        return 0

    for turn in range(15):
        data = f"bytes {turn}".encode()
        sha = digest_of(data)
        assert held.put_blob(sha, data).status_code == 201
        mill.now(retention.mark_unused, project_id, {sha})

        answers = together(lambda data=data, sha=sha: held.put_blob(sha, data).status_code, delete)

        assert answers[0] in (200, 201, 503)
        assert answers[1] == 0
        shop.require_nothing_dangling()
        if answers[0] != 503:
            assert shop.count(BLOBS, BLOBS.c.sha256 == sha) == 1


@ON_POSTGRES
def test_bytes_that_a_completion_is_about_to_name_are_passed_over(shop: Shop) -> None:
    held = shop.running()
    shop.upload(held, b"data")
    shop.mill.now(retention.mark_unused, shop.project_id, {digest_of(b"data")})
    looked, may_end = threading.Event(), threading.Event()

    def complete(tx: Session) -> dict[str, int]:
        found = artifacts.list_blob_sizes(tx, shop.project_id, [digest_of(b"data")])
        looked.set()
        assert may_end.wait(30)
        return found

    def delete() -> Any:
        assert looked.wait(30)
        try:
            return shop.mill.tx(retention.delete_unused_blobs, before=shop.mill.clock(), limit=10)
        finally:
            may_end.set()

    sizes, deleted = together(lambda: shop.mill.tx(complete), delete)

    assert sizes == {digest_of(b"data"): 4}
    assert deleted == ([], 0)


@ON_POSTGRES
def test_an_upload_waits_until_the_file_of_the_same_bytes_has_gone(shop: Shop) -> None:
    held = shop.running()
    sha256 = digest_of(b"data")
    incoming = shop.mill.site.blobs.incoming()
    incoming.write(b"data")
    incoming.commit(sha256)
    holds, may_delete = threading.Event(), threading.Event()

    def drop(tx: Session) -> int:
        hold_names(tx, [sha256])
        holds.set()
        may_delete.wait(0.5)  # the upload would have been written down long ago
        return len(drop_blobs(tx, shop.mill.site.blobs, {sha256}))

    def store() -> None:
        assert holds.wait(30)
        step = (shop.mill.site, held.runner.caller, held.step_id, held.proof, sha256)
        shop.mill.now(store_blob, *step, size=4)
        may_delete.set()

    dropped, stored = together(lambda: shop.mill.tx(drop), store)

    assert dropped == 1
    assert isinstance(stored, Unavailable)


@ON_POSTGRES
def test_an_upload_that_meets_the_deletion_of_its_row_writes_it_anew(shop: Shop) -> None:
    held = shop.running()
    shop.upload(held, b"data")
    shop.mill.now(retention.mark_unused, shop.project_id, {digest_of(b"data")})
    deleted = []

    def delete_right_before(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE blobs") and not deleted:
            deleted.append(1)
            gone, _ = shop.mill.tx(retention.delete_unused_blobs, before=shop.mill.clock(), limit=10)
            deleted.extend(gone)

    writer = shop.mill.state.lanes.database.writer
    event.listen(writer, "before_cursor_execute", delete_right_before)
    try:
        entry = shop.upload(held, b"data")
    finally:
        event.remove(writer, "before_cursor_execute", delete_right_before)

    assert len(deleted) == 2
    assert shop.mill.complete(held, "success", artifacts=[entry]).is_same
    shop.require_nothing_dangling()


# Killed in between


class Killed(BaseException):
    """The process is gone."""


class DyingLanes:
    """Lanes of a process that dies right before, or right after, it has written so often."""

    def __init__(self, mill: Mill, writes: int, *, after: bool) -> None:
        self.lanes, self.left, self.after = mill.state.lanes, writes, after

    async def read(self, action: Callable[[Session], Any]) -> Any:
        return await self.lanes.read(action)

    async def write(self, action: Callable[[Session], Any]) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        answer = await self.lanes.write(action)
        if self.left == 0 and self.after:
            raise Killed
        return answer


@pytest.mark.parametrize("after", [False, True], ids=["before a write", "after a commit"])
def test_killed_after_any_batch_the_next_run_finishes_and_nothing_dangles(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("coordinator.actions.delete_expired.ARTIFACTS_AT_ONCE", 1)
    monkeypatch.setattr("coordinator.upkeep.MARKS_AT_ONCE", 1)
    monkeypatch.setattr("coordinator.upkeep.BLOBS_AT_ONCE", 1)
    shop.rules(artifact_days=5, log_days=5, builds=3)
    for data in (b"one", b"two", b"three"):
        shop.build(data, b"shared", b"more of " + data)
    shop.build()
    shop.mill.clock.advance(5 * DAY)

    for days in (0, 2):
        shop.mill.clock.advance(days * DAY)
        for _ in range(18):  # each life has one batch: every place in between is tried
            with pytest.raises(Killed):
                asyncio.run(shop.upkeep(DyingLanes(shop.mill, 1, after=after)).expire())
            shop.require_nothing_dangling()
        assert shop.expire() == Done()

    assert shop.numbers() == [2, 3, 4]
    assert shop.with_artifacts() == [3]
    assert shop.with_logs() == [3]
    assert shop.count(BLOBS) == 3
    assert len(shop.log_files()) == 1
    shop.require_nothing_dangling()
    age(shop.mill.site.data, seconds=DAY + 60)
    shop.sweep()
    assert shop.blob_files() == {digest_of(data) for data in (b"three", b"shared", b"more of three")}


def test_files_that_nobody_knows_are_found_when_they_are_a_day_old(shop: Shop) -> None:
    build_id = shop.build(b"known")
    stray = shop.mill.site.blobs.path(digest_of(b"stray"))
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"stray")
    lost = shop.mill.site.logs.path(new_id(), new_id(), 1)
    shop.mill.site.logs.write(lost, 0, b"lost")
    assert shop.sweep().orphans == 0

    age(shop.mill.site.data, seconds=DAY + 60)
    done = shop.sweep()

    assert done.orphans == 2
    assert not stray.exists() and not lost.exists()
    assert shop.blob_files() == {digest_of(b"known")}
    assert build_id in str(shop.log_files()[0])
    shop.require_nothing_dangling()


def age(folder: Path, *, seconds: float) -> None:
    import os

    for path in folder.rglob("*"):
        before = path.stat()
        os.utime(path, (before.st_atime - seconds, before.st_mtime - seconds))


def test_a_large_project_shrinks_in_short_batches(shop: Shop) -> None:
    many_builds(shop, 300, artifacts_each=5, appends_each=20)
    shop.rules(builds=10)
    written: list[int] = []

    class Counting(DyingLanes):
        async def write(self, action: Callable[[Session], Any]) -> Any:
            written.append(1)
            return await self.lanes.write(action)

    done = asyncio.run(shop.upkeep(Counting(shop.mill, 0, after=False)).expire())

    assert done.builds == 290
    assert shop.numbers() == list(range(291, 301))
    assert shop.count(ARTIFACTS) == 50 and shop.count(APPENDS) == 200
    assert len(written) > 290
    assert len(shop.mill.audited("build.expired")) == 6


def many_builds(shop: Shop, count: int, *, artifacts_each: int, appends_each: int) -> None:
    """Failed builds as rows alone."""
    now = shop.mill.clock()
    template = shop.mill.build(shop.build(log=b""))
    step = shop.mill.tx(lambda tx: dict(tx.connection().execute(select(STEPS)).one()._mapping))
    builds, steps, names, appends = [], [], [], []
    for number in range(2, count + 1):
        build_id, step_id = new_id(), new_id()
        builds.append({**template.model_dump(), "id": build_id, "number": number})
        steps.append({**step, "id": step_id, "build_id": build_id})
        names += [
            {
                "id": new_id(),
                "build_id": build_id,
                "step_id": step_id,
                "attempt": 1,
                "path": str(place),
                "type": "directory",
                "mode": 0o755,
                "size": 0,
                "sha256": "",
                "target": "",
                "created_at": now,
            }
            for place in range(artifacts_each)
        ]
        appends += [
            {
                "build_id": build_id,
                "seq": seq,
                "step_id": step_id,
                "attempt": 1,
                "byte_offset": seq,
                "byte_length": 1,
                "at": now,
            }
            for seq in range(appends_each)
        ]

    def write(tx: Session) -> None:
        for table, rows in ((BUILDS, builds), (STEPS, steps), (ARTIFACTS, names), (APPENDS, appends)):
            tx.connection().execute(insert(table), rows)

    shop.mill.tx(write)


# What has gone


def answers_expired(client: Any, method: str, path: str, **more: Any) -> bool:
    answer = client.request(method, path, **more)
    body = answer.json()
    assert set(body) == {"error", "code", "details"}
    assert answer.status_code == 404, (method, path, body)
    return bool(body["code"] == "expired")


def routes_of_build(shop: Shop, build_id: str) -> list[tuple[str, str, dict[str, Any]]]:
    step_id = shop.mill.tx(
        lambda tx: (
            tx.connection().execute(select(STEPS.c.id).where(STEPS.c.build_id == build_id)).scalar_one()
        )
    )
    return [
        ("GET", f"/api/builds/{build_id}", {}),
        ("GET", f"/api/builds/{build_id}/artifacts", {}),
        ("POST", f"/api/builds/{build_id}/cancel", {}),
        ("POST", f"/api/builds/{build_id}/retry", {"json": {"steps": "all"}}),
        ("GET", f"/api/steps/{step_id}/log", {}),
        ("GET", f"/api/runner/{step_id}", {}),
        ("POST", f"/api/runner/{step_id}/complete", {"json": {"status": "failed"}}),
    ]


def artifact_ids(shop: Shop, build_id: str) -> list[str]:
    statement = select(ARTIFACTS.c.id).where(ARTIFACTS.c.build_id == build_id)
    return shop.mill.tx(lambda tx: list(tx.connection().execute(statement).scalars()))


def test_a_build_that_has_gone_answers_expired_on_every_route(shop: Shop, client: Any) -> None:
    shop.rules(builds=1)
    build_id = shop.build(b"output")
    routes = routes_of_build(shop, build_id)
    routes += [("GET", f"/api/artifacts/{one}", {}) for one in artifact_ids(shop, build_id)]
    shop.build(b"last success")

    asyncio.run(expire_marks_only(shop))
    marked = [answers_expired(client, method, path, **more) for method, path, more in routes]
    page = client.get(f"/api/projects/{shop.project_id}/builds").json()
    shop.expire()
    gone = [answers_expired(client, method, path, **more) for method, path, more in routes]

    assert len(routes) == 8
    assert marked == gone == [True] * 8
    assert [build["number"] for build in page["builds"]] == [2]
    assert page["pagination"]["total"] == 1
    assert not answers_expired(client, "GET", f"/api/builds/{new_id()}")


async def expire_marks_only(shop: Shop) -> None:
    """A run that is killed as soon as something is marked."""
    with pytest.raises(Killed):
        await shop.upkeep(DyingLanes(shop.mill, 1, after=True)).expire()


def test_a_log_or_an_artifact_that_has_gone_answers_expired_and_its_build_says_so(
    shop: Shop, client: Any
) -> None:
    shop.rules(artifact_days=1, log_days=1)
    build_id = shop.build(b"output")
    (artifact_id,) = artifact_ids(shop, build_id)
    log = next(path for _, path, _ in routes_of_build(shop, build_id) if path.endswith("/log"))
    shop.build(b"last success")
    shop.mill.clock.advance(DAY)

    asyncio.run(expire_marks_only(shop))
    assert answers_expired(client, "GET", f"/api/artifacts/{artifact_id}")
    assert client.get(f"/api/builds/{build_id}/artifacts").json() == []
    shop.expire()

    assert answers_expired(client, "GET", f"/api/artifacts/{artifact_id}")
    assert answers_expired(client, "GET", log)
    assert answers_expired(client, "GET", log + "?attempt=1")
    assert answers_expired(client, "GET", log + "?follow=true")
    assert client.get(f"/api/builds/{build_id}/artifacts").json() == []
    shown = client.get(f"/api/builds/{build_id}").json()
    assert shown["artifactsExpiredAt"] == shown["logsExpiredAt"] > shown["finishedAt"]
    assert shown["status"] == "SUCCESS"


def test_what_a_stranger_may_not_see_has_not_expired_for_them(shop: Shop) -> None:
    shop.rules(builds=1)
    build_id = shop.build()
    shop.build()
    shop.expire()
    stranger = Caller(actor="stranger", audience=Audience.USER, tenant_id=new_id())

    shop.mill.tx(refuse_expired, stranger, build_id)
    with pytest.raises(Expired, match="this build has expired"):
        shop.mill.tx(refuse_expired, LOCAL, build_id)


def test_what_ran_again_after_its_logs_had_gone_has_its_new_log(shop: Shop, client: Any) -> None:
    shop.rules(log_days=1)
    build_id = shop.build(log=b"first\n")
    shop.mill.clock.advance(DAY)
    shop.expire()
    shop.mill.clock.advance(60)
    assert client.post(f"/api/builds/{build_id}/retry", json={"steps": "all"}).status_code < 300
    (held,) = shop.mill.acquire(shop.runner)
    shop.mill.start(held)
    shop.mill.append(held, 0, b"second\n")
    shop.mill.complete(held, "failed")
    shop.expire()

    assert client.get(f"/api/steps/{held.step_id}/log").text == "second\n"
    shop.mill.clock.advance(DAY)
    assert shop.expire().logs == 1
    assert shop.log_files() == []
    assert answers_expired(client, "GET", f"/api/steps/{held.step_id}/log")


def test_tombstones_go_in_their_turn(shop: Shop, client: Any) -> None:
    shop.rules(builds=1)
    build_id = shop.build(b"output")
    shop.build(b"last success")
    shop.expire()
    assert shop.count(TOMBSTONES) == 3

    shop.mill.clock.advance(366 * DAY)
    assert shop.expire().tombstones == 3

    assert shop.count(TOMBSTONES) == 0
    assert not answers_expired(client, "GET", f"/api/builds/{build_id}")


def test_what_goes_is_written_down_with_counts_and_bytes(shop: Shop) -> None:
    shop.rules(artifact_days=1, log_days=1, builds=3)
    for data in (b"one", b"two", b"three", b"four"):
        shop.build(data, log=b"12345")
    shop.mill.clock.advance(DAY)

    shop.expire()

    def told(action: str) -> Sequence[tuple[Any, ...]]:
        names = ("builds", "numbers", "reasons", "files", "bytes")
        return [
            (row.project_id, row.actor, *(row.details[name] for name in names))
            for row in shop.mill.audited(action)
        ]

    who = (shop.project_id, "system")
    assert told("artifacts.expired") == [(*who, 2, [2, 3], ["age"], 2, 8)]
    assert told("logs.expired") == [(*who, 2, [2, 3], ["age"], 2, 10)]
    assert told("build.expired") == [(*who, 1, [1], ["count"], 2, 8)]


@ON_SQLITE
def test_every_table_that_points_at_a_build_goes_with_it(database: Database) -> None:
    """A table that refers to builds or steps names them in columns by which its rows are found."""
    belonging = {
        table for table in Row.metadata.sorted_tables if retention._belongs(table, "some build") is not None
    }

    for table in Row.metadata.sorted_tables:
        for key in table.foreign_keys:
            assert key.column.table not in belonging or table in belonging, table.name
    assert {BUILDS, STEPS, ATTEMPTS, APPENDS, ARTIFACTS, ARROWS} <= belonging
    assert TOMBSTONES not in belonging


def test_a_retry_that_came_first_keeps_the_build(shop: Shop) -> None:
    shop.rules(builds=1)
    build_id = shop.build()
    shop.build()
    upkeep = shop.upkeep()

    class Late(DyingLanes):
        async def write(self, action: Callable[[Session], Any]) -> Any:
            if self.left:
                self.left = 0
                finished = shop.mill.clock() + timedelta(seconds=1)
                change = BUILDS.update().where(BUILDS.c.id == build_id).values(finished_at=finished)
                await self.lanes.write(lambda tx: tx.connection().execute(change).rowcount)
            return await self.lanes.write(action)

    upkeep.lanes = Late(shop.mill, 1, after=False)  # type: ignore[assignment]
    done = asyncio.run(upkeep.expire())

    assert done.builds == 0
    assert shop.numbers() == [1, 2]


# The command


def test_the_command_lists_and_then_deletes_and_leaves_a_running_coordinator_alone(
    tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.cli.serve import only_process
    from coordinator.settings import Settings

    settings = Settings(data=tmp_path / "data")
    settings.data.mkdir()
    database = open_database(settings.database_url)
    app = create_app(settings, database=database, clock=clock)
    mill = Mill(app.state.coordinator, clock)
    project_id = mill.a_project()
    shop = Shop(mill, project_id, mill.a_workflow(project_id, a_spec()), mill.a_runner())
    for _ in range(3):
        build_id = shop.build(log=b"x" * 2048)
    app.state.coordinator.lanes.close()
    database.dispose()
    monkeypatch.setenv("BUILDMILL_RETAIN_BUILDS", "1")

    def retain(*words: str) -> Any:
        return CliRunner().invoke(main, ["retention", "--data", str(settings.data), *words])

    rehearsed = retain("--dry-run")
    with only_process(settings):
        refused = retain()
    done = retain()

    assert rehearsed.exit_code == 0, rehearsed.output
    lines = rehearsed.output.splitlines()
    assert lines[0] == f"project a project ({project_id})"
    assert lines[1].endswith("all of it, 1 files, 2.0 KiB, by count")
    assert lines[-1] == "2 would go, 4.0 KiB; nothing was changed"
    assert refused.exit_code == 1
    assert "does this by itself" in refused.output
    assert done.exit_code == 0, done.output
    assert "2 builds, logs of 0 and artifacts of 0 more: 2 files, 4.0 KiB" in done.output
    assert f"project a project ({project_id}): 2 builds dealt with" in done.output
    (left,) = [path for path in (settings.data / "logs").rglob("*") if path.is_file()]
    assert build_id in str(left)
    assert retain("--dry-run").output == "0 would go, 0 bytes; nothing was changed\n"


def test_the_command_makes_no_data_folder(tmp_path: Path) -> None:
    answer = CliRunner().invoke(main, ["retention", "--data", str(tmp_path / "nowhere")])

    assert answer.exit_code == 1
    assert "there is no data folder" in answer.output
    assert not (tmp_path / "nowhere").exists()


def test_bytes_put_over_http_are_asked_for_again_once_unused(api: Api, mill: Mill) -> None:
    held: HeldOverHttp = api.a_running_step()
    sha256 = digest_of(b"data")
    held.put_blob(sha256, b"data")
    mill.now(retention.mark_unused, mill.step(held.step_id).project_id, {sha256})

    before = held.client.head(held.path(f"blobs/{sha256}"), headers=held.headers).status_code
    again = held.put_blob(sha256, b"data").status_code
    after = held.client.head(held.path(f"blobs/{sha256}"), headers=held.headers).status_code

    assert (before, again, after) == (404, 201, 200)


def test_what_ran_again_with_the_clock_set_back_keeps_its_new_outputs_and_logs(
    mill: Mill, client: Any
) -> None:
    spec = [a_step("make", outputPaths=["out"]), a_step("use", ["make"])]
    project_id = mill.a_project()
    shop = Shop(mill, project_id, mill.a_workflow(project_id, spec), mill.a_runner())
    shop.rules(artifact_days=1, log_days=1)

    def run(data: bytes) -> Held:
        (held,) = mill.acquire(shop.runner)
        mill.start(held)
        mill.append(held, 0, data)
        mill.complete(held, artifacts=[shop.upload(held, data)] if held.claim.name == "make" else [])
        return held

    builds = [mill.another_build(project_id, shop.workflow_id, branch="main").id for _ in range(2)]
    for _ in range(4):
        run(b"old")
    mill.clock.advance(2 * DAY)
    shop.expire()
    (at,) = [one for one in builds if client.get(f"/api/builds/{one}/artifacts").json() == []]

    mill.clock.advance(-3600)
    assert client.post(f"/api/builds/{at}/retry", json={"steps": "all"}).status_code < 300
    made = run(b"new")
    shop.expire()

    assert client.get(f"/api/steps/{made.step_id}/log").text == "new"
    (output,) = client.get(f"/api/builds/{at}/artifacts").json()
    assert client.get(f"/api/artifacts/{output['id']}").status_code == 200
    used = run(b"used")
    assert [one.path for one in used.claim.inputs] == [output["path"]]
    shop.require_nothing_dangling()


# What stands in the way


def test_a_project_that_cannot_be_dealt_with_does_not_stop_the_others(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects = sorted([shop.project_id, shop.mill.a_project("second")])
    shops = [Shop(shop.mill, one, shop.mill.a_workflow(one, a_spec()), shop.runner) for one in projects]
    for one in shops:
        one.rules(builds=1)
        one.build()
        one.build()
    broken = {"builds": 1, "log_days": "never"}
    statement = update(PROJECTS).where(PROJECTS.c.id == projects[0]).values(retention=broken)
    shop.mill.tx(lambda tx: tx.connection().execute(statement))

    done = shop.expire()

    assert (done.builds, done.failed) == (1, 1)
    assert shop.count(BUILDS, BUILDS.c.project_id == projects[1]) == 1
    assert shop.count(BUILDS, BUILDS.c.project_id == projects[0]) == 2


def test_more_builds_are_kept_than_a_statement_may_have_parameters(shop: Shop) -> None:
    shop.rules(megabytes=1)
    build_id = shop.build(b"x" * MEGABYTE)
    many = [new_id() for _ in range(70_000)]

    def weigh(tx: Session) -> Any:
        return retention.weigh_artifacts(tx, shop.project_id, [*many, build_id])

    assert shop.mill.tx(weigh) == ({}, MEGABYTE)
    assert shop.mill.tx(retention.weigh_artifacts, shop.project_id, many) == ({1: MEGABYTE}, 0)
    assert shop.mill.tx(retention.weigh_artifacts, shop.project_id, []) == ({1: MEGABYTE}, 0)


def test_the_receipt_of_a_build_that_has_gone_answers_expired(shop: Shop, client: Any) -> None:
    shop.rules(builds=1)
    made = shop.mill.another_build(shop.project_id, shop.workflow_id)
    cancel_id = shop.mill.now(cancel_build, shop.mill.site, LOCAL, made.id).cancel_id
    shop.build()

    asyncio.run(expire_marks_only(shop))
    assert answers_expired(client, "GET", f"/api/cancels/{cancel_id}")
    shop.expire()

    assert shop.count(BUILDS) == 1
    assert answers_expired(client, "GET", f"/api/cancels/{cancel_id}")
    assert not answers_expired(client, "GET", f"/api/cancels/{new_id()}")


# By hand


def test_what_is_deleted_by_hand_goes_with_all_that_is_its_own(shop: Shop) -> None:
    kept, deleted = shop.build(b"shared", log=b"kept\n"), shop.build(b"shared", b"own", log=b"gone\n")

    shop.mill.now(delete_build, LOCAL, deleted)
    hidden = shop.numbers()
    shop.expire()
    shop.mill.clock.advance(2 * DAY)
    shop.expire()

    assert hidden == shop.numbers() == [1]
    assert shop.count(BUILDS) == shop.count(STEPS) == shop.count(ATTEMPTS) == 1
    assert shop.with_logs() == shop.with_artifacts() == [1]
    assert [path.parent.parent.name for path in shop.log_files()] == [kept]
    assert shop.blob_files() == {digest_of(b"shared")}
    with pytest.raises(Expired, match="was deleted"):
        shop.mill.tx(refuse_expired, LOCAL, deleted)
    shop.require_nothing_dangling()


def test_the_last_success_can_be_deleted_by_hand(shop: Shop) -> None:
    only = shop.build(status="success")

    shop.mill.now(delete_build, LOCAL, only)

    assert shop.numbers() == []


def test_a_build_that_was_deleted_before_its_start_does_not_keep_its_project(shop: Shop) -> None:
    shop.mill.now(change_project, shop.mill.site, LOCAL, shop.project_id, {"repo_url": "https://h/o/n"})
    where = (shop.mill.site, LOCAL, shop.project_id)
    build = shop.mill.now(create_unstarted_build, *where, branch="main", commit=None)

    shop.mill.now(delete_build, LOCAL, build.id)
    shop.mill.now(delete_project, LOCAL, shop.project_id)
    shop.expire()

    assert shop.count(BUILDS) == shop.count(STEPS) == 0


def test_of_a_deletion_and_a_retry_at_the_same_moment_one_is_refused(shop: Shop) -> None:
    for number in range(1, 6):
        build = shop.build()

        said = together(
            lambda build=build: shop.mill.now(delete_build, LOCAL, build),
            lambda build=build: shop.mill.now(retry_build, LOCAL, build, StepsToRetry.ALL),
        )

        refused = [one for one in said if isinstance(one, Exception)]
        assert [type(one) for one in refused] in ([Conflict], [Expired])
        assert (number in shop.numbers()) == isinstance(refused[0], Conflict)
        finish_all(shop)


def test_retries_of_both_kinds_at_the_same_moment_do_not_block_each_other(shop: Shop) -> None:
    for _ in range(5):
        build = shop.build()

        new_round, new_build = together(
            lambda build=build: shop.mill.now(retry_build, LOCAL, build, StepsToRetry.ALL),
            lambda build=build: shop.mill.now(repeat_build, shop.mill.site, LOCAL, build),
        )

        assert not isinstance(new_round, Exception)
        assert not isinstance(new_build, Exception) or type(new_build) is Conflict
        finish_all(shop)


def finish_all(shop: Shop) -> None:
    for held in shop.mill.acquire(shop.runner, slots=10):
        shop.mill.start(held)
        shop.mill.complete(held)
