"""What is done again and again is done again and again, whatever happened the last time."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal
from sqlmodel import Session
from starlette.applications import Starlette
from starlette.testclient import TestClient

from coordinator import watch as watching
from coordinator.app import create_app
from coordinator.chores import do_chores
from coordinator.errors import Unavailable
from coordinator.settings import Settings
from coordinator.store.dialect import Database
from coordinator.watch import Watch
from tests.factories import ON_SQLITE, Mill
from tests.fakes import SettableClock

TIME_LIMIT = 20.0


class FailingClock(SettableClock):
    """Works until it is broken; says when it has been asked again after that."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = 0
        self.asked = asyncio.Event()

    def __call__(self) -> datetime:
        if self.faults:
            self.faults -= 1
            raise ArithmeticError("no time")
        self.asked.set()
        return super().__call__()


@pytest.fixture
def clock() -> FailingClock:
    return FailingClock()


@ON_SQLITE
async def test_chores_go_on_after_an_error_that_nobody_foresaw(
    app: Starlette, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.chores.EVERY_S", 0.01)
    chores = asyncio.create_task(do_chores(app.state.coordinator))
    await asyncio.sleep(0)  # they begin

    clock.faults = 2
    clock.asked.clear()
    await asyncio.wait_for(clock.asked.wait(), TIME_LIMIT)

    assert not chores.done()
    chores.cancel()
    await asyncio.gather(chores, return_exceptions=True)


@pytest.mark.parametrize(
    "error", [ArithmeticError("unforeseen"), OSError(30, "read-only"), Unavailable("away")]
)
def test_a_look_that_fails_does_not_keep_the_others_from_looking(
    mill: Mill, portal: BlockingPortal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(tx: Session, site: Any, *, now: datetime, since: datetime | None = None) -> int:
        raise error

    monkeypatch.setattr(watching, "LOOKS", (fail, *watching.LOOKS))
    mill.clock.advance(100)
    held = mill.a_running_step()
    watch = Watch(mill.state)
    watch._since = mill.clock() - timedelta(hours=1)

    moved = 0
    for _ in range(7):
        mill.clock.advance(10)
        moved += portal.call(watch.look)

    assert moved == 1
    assert mill.step(held.step_id).reason == "runner_lost"


@ON_SQLITE
def test_a_background_task_that_has_failed_does_not_leave_the_database_open(
    settings: Settings, database: Database, clock: Any
) -> None:
    app = create_app(settings, database=database, clock=clock)
    lanes = app.state.coordinator.lanes
    clock.faults = 10**6

    with TestClient(app, base_url="http://localhost"):
        pass

    with pytest.raises(Unavailable, match="stopping"):
        lanes.write_and_wait(lambda tx: None)
