"""The trail is closed behind what happens, in the order of commits, whoever dies meanwhile."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import Session
from starlette.applications import Starlette
from structlog.testing import capture_logs

from coordinator import sealer as sealing
from coordinator.actions.seal_trail import seal_trail
from coordinator.api.state import AppState
from coordinator.keys import UnusableKeys, checkpoints_path, load_audit_key
from coordinator.rules.audit_chain import NO_TENANT, START, Checkpoint, Link, link_after
from coordinator.sealer import Sealer, seal_the_trail
from coordinator.settings import Settings
from coordinator.store import audit, audit_chain
from coordinator.store.checkpoint_file import CheckpointFile, CheckpointsBusy, read_lines
from coordinator.store.dialect import Database
from coordinator.store.lanes import Lanes
from tests.factories import LOCAL, ON_POSTGRES, ON_SQLITE, Mill
from tests.fakes import MORNING

KEY = b"k" * 32
TIME_LIMIT = 30.0
InTx = Callable[[Callable[[Session], Any]], Any]


def write_rows(tx: Session, count: int, tenant_id: str | None = "t") -> None:
    for number in range(count):
        audit.record(tx, LOCAL, "project.created", now=MORNING, tenant_id=tenant_id, n=number)


def chain_in(tx: Session, chain: str) -> list[Any]:
    rows = audit_chain.list_sealed(tx, chain, after=audit_chain.BEFORE_ALL, limit=10_000)
    return [(row.seq, row.id, row.hash) for row in rows]


def is_whole(tx: Session, chain: str) -> bool:
    last = START
    for row in audit_chain.list_sealed(tx, chain, after=audit_chain.BEFORE_ALL, limit=10_000):
        last = link_after(last, chain, row)
        if last != Link(row.seq, row.hash):
            return False
    return True


@pytest.fixture
def checkpoints(coordinator: AppState) -> CheckpointFile:
    data = coordinator.settings.data
    return CheckpointFile(checkpoints_path(data), load_audit_key(data))


@pytest.fixture
def sealer(app: Starlette, coordinator: AppState, checkpoints: CheckpointFile) -> Sealer:
    return Sealer(coordinator, app.state.denials, checkpoints)


def lines_of(state: AppState) -> list[str]:
    return list(read_lines(checkpoints_path(state.settings.data)))


# --- places


def test_each_tenant_has_a_chain_and_so_has_what_belongs_to_none(in_tx: InTx) -> None:
    for tenant_id in ("t", "u", None, "t"):
        in_tx(lambda tx, tenant_id=tenant_id: write_rows(tx, 1, tenant_id))

    sealed = in_tx(lambda tx: seal_trail(tx, limit=10))

    assert sealed.rows == 4
    assert {chain: end.seq for chain, end in sealed.ends.items()} == {"t": 2, "u": 1, NO_TENANT: 1}
    assert all(in_tx(lambda tx, chain=chain: is_whole(tx, chain)) for chain in sealed.ends)


def test_a_chain_goes_on_where_it_ended(in_tx: InTx) -> None:
    in_tx(lambda tx: write_rows(tx, 5))
    for _ in range(3):
        in_tx(lambda tx: seal_trail(tx, limit=2))
    in_tx(lambda tx: write_rows(tx, 1))
    in_tx(lambda tx: seal_trail(tx, limit=2))

    assert [seq for seq, _, _ in in_tx(lambda tx: chain_in(tx, "t"))] == [1, 2, 3, 4, 5, 6]
    assert in_tx(lambda tx: is_whole(tx, "t"))


@ON_POSTGRES
def test_a_row_that_is_committed_later_comes_later(database: Database, in_tx: InTx) -> None:
    with Session(database.writer) as slow:
        write_rows(slow, 1)
        in_tx(lambda tx: write_rows(tx, 1))
        in_tx(lambda tx: seal_trail(tx, limit=10))
        slow.commit()

    in_tx(lambda tx: seal_trail(tx, limit=10))

    (_, first, _), (_, second, _) = in_tx(lambda tx: chain_in(tx, "t"))
    assert second < first
    assert in_tx(lambda tx: is_whole(tx, "t"))


@ON_POSTGRES
def test_of_several_coordinators_one_seals_and_the_others_do_not_wait(
    database: Database, in_tx: InTx
) -> None:
    in_tx(lambda tx: write_rows(tx, 3))
    with Session(database.writer) as first:
        assert seal_trail(first, limit=2).rows == 2

        assert in_tx(lambda tx: seal_trail(tx, limit=2)).rows == 0

        first.commit()
    assert in_tx(lambda tx: seal_trail(tx, limit=2)).rows == 1
    assert in_tx(lambda tx: is_whole(tx, "t"))


def test_several_that_seal_and_write_at_once_make_one_chain(lanes: Lanes, in_tx: InTx) -> None:
    def work() -> None:
        for _ in range(15):
            lanes.write_and_wait(lambda tx: write_rows(tx, 3))
            lanes.write_and_wait(lambda tx: seal_trail(tx, limit=4))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIME_LIMIT)
    while in_tx(lambda tx: seal_trail(tx, limit=200)).rows:
        pass

    assert [seq for seq, _, _ in in_tx(lambda tx: chain_in(tx, "t"))] == list(range(1, 181))
    assert in_tx(lambda tx: is_whole(tx, "t"))


@ON_SQLITE
def test_a_row_that_cannot_be_read_holds_nobody_up(database: Database, in_tx: InTx) -> None:
    with database.writer.begin() as connection:
        for number, details in enumerate(("no json", "{}")):
            row = f"'{number}', 't', 'a', 'b', '', '{details}', '2026-03-01 08:00:00.000000'"
            insert = "INSERT INTO audit_logs (id, tenant_id, action, actor, address, details, created_at)"
            connection.execute(text(f"{insert} VALUES ({row})"))

    with capture_logs() as logs:
        assert in_tx(lambda tx: seal_trail(tx, limit=1)).rows == 1
        assert in_tx(lambda tx: seal_trail(tx, limit=1)).rows == 1

    assert [(line["event"], line["id"]) for line in logs] == [("audit_row_unreadable", "0")]


# --- the background task


async def test_rows_are_sealed_within_a_second_while_the_task_runs(
    coordinator: AppState, sealer: Sealer
) -> None:
    task = asyncio.create_task(seal_the_trail(sealer))
    await coordinator.lanes.write(lambda tx: write_rows(tx, 500))

    async with asyncio.timeout(TIME_LIMIT):
        while await coordinator.lanes.read(audit_chain.has_unsealed):
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert await coordinator.lanes.read(lambda tx: is_whole(tx, "t"))
    assert sealing.EVERY_S < 1


async def test_what_happens_last_is_sealed_and_written_down_when_the_coordinator_stops(
    coordinator: AppState, sealer: Sealer
) -> None:
    task = asyncio.create_task(seal_the_trail(sealer))
    await asyncio.sleep(0)
    await coordinator.lanes.write(lambda tx: write_rows(tx, 3))

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert not await coordinator.lanes.read(audit_chain.has_unsealed)
    assert any('"chain":"t","seq":3' in line for line in lines_of(coordinator))


async def test_the_task_goes_on_after_an_error_that_nobody_foresaw(
    coordinator: AppState, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "EVERY_S", 0.01)
    faults = [ArithmeticError("no"), OSError("full")]

    async def look(self: Sealer) -> None:
        if faults:
            raise faults.pop()
        await self.seal()

    monkeypatch.setattr(Sealer, "look", look)
    task = asyncio.create_task(seal_the_trail(sealer))
    await coordinator.lanes.write(lambda tx: write_rows(tx, 1))

    async with asyncio.timeout(TIME_LIMIT):
        while await coordinator.lanes.read(audit_chain.has_unsealed):
            await asyncio.sleep(0.01)

    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@ON_SQLITE
@pytest.mark.parametrize(
    "damage", ["DELETE FROM audit_logs WHERE seq = 3", "UPDATE audit_logs SET hash = x'00' WHERE seq = 3"]
)
@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_chain_whose_end_was_changed_is_told_in_the_log(
    coordinator: AppState, sealer: Sealer, checkpoints: CheckpointFile, damage: str, is_restarted: bool
) -> None:
    await coordinator.lanes.write(lambda tx: write_rows(tx, 3))
    await sealer.begin()
    await sealer.seal()
    await sealer.checkpoint()
    with coordinator.lanes.database.writer.begin() as connection:
        for name in ("delete", "change"):
            connection.execute(text(f"DROP TRIGGER audit_logs_no_{name}"))
        connection.execute(text(damage))

    with capture_logs() as logs:
        if is_restarted:
            sealer = Sealer(coordinator, sealer._denials, checkpoints)
            await sealer.begin()
        else:
            await coordinator.lanes.write(lambda tx: write_rows(tx, 1))
            await sealer.seal()

    assert [(line["event"], line["chain"]) for line in logs] == [("audit_trail_was_changed", "t")]


# --- checkpoints


async def test_only_chains_that_have_grown_get_a_checkpoint(coordinator: AppState, sealer: Sealer) -> None:
    await coordinator.lanes.write(lambda tx: write_rows(tx, 1))
    await coordinator.lanes.write(lambda tx: write_rows(tx, 1, "u"))
    await sealer.seal()
    await sealer.checkpoint()
    await coordinator.lanes.write(lambda tx: write_rows(tx, 1, "u"))
    await sealer.seal()

    await sealer.checkpoint()
    await sealer.checkpoint()

    assert [line.split(',"hash"')[0] for line in lines_of(coordinator)] == [
        '{"chain":"t","seq":1',
        '{"chain":"u","seq":1',
        '{"chain":"u","seq":2',
    ]


async def test_after_a_kill_the_next_start_writes_down_what_was_sealed_last(
    coordinator: AppState, sealer: Sealer, checkpoints: CheckpointFile
) -> None:
    await coordinator.lanes.write(lambda tx: write_rows(tx, 2))
    await sealer.seal()

    for _ in range(2):
        again = Sealer(coordinator, sealer._denials, checkpoints)
        await again.begin()
        await again.checkpoint()

    assert len(lines_of(coordinator)) == 1


def a_mark(seq: int) -> Checkpoint:
    return Checkpoint("t", seq, bytes([seq]) * 32, MORNING)


def test_a_line_that_was_never_finished_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "checkpoints"
    file = CheckpointFile(path, KEY)
    file.append([a_mark(1), a_mark(2)])
    whole = path.read_text()
    path.write_text(whole + '{"chain":"t","se')

    assert list(read_lines(path)) == whole.splitlines()
    file.append([a_mark(3)])

    assert path.read_text().startswith(whole)
    assert file.find_lately() == {"t": Link(3, b"\3" * 32)}
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_are_added_however_long_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    file = CheckpointFile(path, KEY)
    for _ in range(3):
        file.append([a_mark(1)] * 3000)

    file.append([a_mark(2)])

    assert len(list(read_lines(path))) == 9001
    assert file.find_lately() == {"t": Link(2, b"\2" * 32)}


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    file = CheckpointFile(path, KEY)
    file.append([a_mark(1)])
    holder = (
        "import fcntl, sys; fcntl.flock(f := open(sys.argv[1]), fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()

        with pytest.raises(CheckpointsBusy):
            file.append([a_mark(2)])

        other.communicate(b"\n", timeout=TIME_LIMIT)
    file.append([a_mark(2)])
    assert file.find_lately()["t"].seq == 2


def test_a_lost_key_is_not_made_anew_where_it_has_sealed_something(tmp_path: Path) -> None:
    load_audit_key(tmp_path)
    (tmp_path / "keys" / "audit-key").unlink()
    key = load_audit_key(tmp_path)
    CheckpointFile(checkpoints_path(tmp_path), key).append([a_mark(1)])
    (tmp_path / "keys" / "audit-key").unlink()

    with pytest.raises(UnusableKeys, match="audit-key is missing"):
        load_audit_key(tmp_path)


# --- kill -9

KILLED = """
import sys
from sqlmodel import Session
from pathlib import Path
from coordinator.actions.seal_trail import seal_trail
from coordinator.rules.audit_chain import Checkpoint
from coordinator.store.checkpoint_file import CheckpointFile
from coordinator.store.dialect import open_database
from coordinator.store.lanes import Lanes
from datetime import datetime, UTC
lanes = Lanes(open_database(sys.argv[1]), writers=1)
file = CheckpointFile(Path(sys.argv[2]), b"k" * 32)
print("begun", flush=True)
while (sealed := lanes.write_and_wait(lambda tx: seal_trail(tx, limit=3))).rows:
    file.append([Checkpoint(c, e.seq, e.hash, datetime.now(UTC)) for c, e in sealed.ends.items()])
"""


@pytest.fixture
def killed(database: Database, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    url = database.writer.url.render_as_string(hide_password=False)
    arguments = [sys.executable, "-c", KILLED, url, str(tmp_path / "checkpoints")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=root) as process:
        yield process
        process.kill()


def test_a_kill_in_the_midst_of_sealing_is_harmless(
    database: Database, in_tx: InTx, tmp_path: Path, killed: subprocess.Popen[bytes]
) -> None:
    for _ in range(3):
        in_tx(lambda tx: write_rows(tx, 1000))
    assert killed.stdout is not None
    killed.stdout.readline()
    while not in_tx(lambda tx: audit_chain.find_last(tx, "t").seq):
        assert killed.poll() is None

    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(TIME_LIMIT)

    assert in_tx(audit_chain.has_unsealed)
    while in_tx(lambda tx: seal_trail(tx, limit=200)).rows or in_tx(audit_chain.has_unsealed):
        pass  # the server may hold the name for a moment longer than its client lives
    assert [seq for seq, _, _ in in_tx(lambda tx: chain_in(tx, "t"))] == list(range(1, 3001))
    assert in_tx(lambda tx: is_whole(tx, "t"))
    file = CheckpointFile(tmp_path / "checkpoints", KEY)
    file.append([a_mark(7)])
    assert file.find_lately() == {"t": Link(7, b"\7" * 32)}


# --- who did it


def test_what_the_coordinator_and_runners_do_belongs_to_the_tenant_of_the_project(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.complete(held)

    tenants = {row.action: row.tenant_id for row in mill.audited() if row.project_id}

    assert set(tenants) >= {"step.claimed", "step.started", "step.finished", "build.finished"}
    assert len(set(tenants.values())) == 1
    assert None not in tenants.values()


@ON_SQLITE
def test_a_start_makes_the_key_of_the_checkpoints(app: Starlette, settings: Settings) -> None:
    key = settings.data / "keys" / "audit-key"

    assert key.stat().st_mode & 0o777 == 0o600
