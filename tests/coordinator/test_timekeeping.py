"""A restart of the coordinator moves no lease and no limit, whatever was done to the time of day."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import func, select
from starlette.testclient import TestClient

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_project import change_project
from coordinator.app import create_app
from coordinator.cli.main import main
from coordinator.settings import Settings
from coordinator.store import clock_marks
from coordinator.store.dialect import Database, open_database
from coordinator.tables import ClockMark, table_of
from coordinator.timekeeping import THIS_MACHINE, Machine, mark_time
from shared.clock import SteadyClock, utc_now
from shared.protocol import Action
from tests.factories import LOCAL, Held, Mill

SECOND = 1_000_000_000
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = 3600.0
JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR])


class Lives:
    """The processes of one coordinator, one after the other, on a machine whose clock is set."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.day = int(NOON.timestamp()) * SECOND
        self.passed = 500 * SECOND
        self.boots = 1
        self.machine = Machine(
            day=lambda: self.day, passing=lambda: self.passed, boot_id=lambda: f"boot-{self.boots}"
        )
        self._settings = settings
        self._database = database
        self.mill = self._begin()

    def _begin(self) -> Mill:
        state = create_app(self._settings, database=self._database, machine=self.machine).state.coordinator
        return Mill(state, state.clock)

    @property
    def clock(self) -> SteadyClock:
        clock: Any = self.mill.clock
        return clock

    def wait(self, seconds: float) -> datetime:
        self.day += int(seconds * SECOND)
        self.passed += int(seconds * SECOND)
        return self.clock()

    def keep(self) -> None:
        self.mill.tx(mark_time, self.clock, self.machine)

    def restart(self, *, set_by: float = 0, seconds: float = 10, boots: bool = False) -> Mill:
        """Killed, and there again after so long."""
        self.end()
        self.day += int((seconds + set_by) * SECOND)
        self.passed += int(seconds * SECOND)
        if boots:
            self.boots, self.passed = self.boots + 1, 20 * SECOND
        self.mill = self._begin()
        return self.mill

    def end(self) -> None:
        self.mill.state.lanes.close()

    def live(self, held: Held, seconds: int) -> list[Action]:
        """So much time, in which the runner says every 5 s that it lives, and the watch looks."""
        told = []
        for _ in range(seconds // 5):
            self.wait(5)
            told.append(self.mill.heartbeat(held.runner, held)[0].action)
            self.mill.expire()
        return told


@pytest.fixture
def lives(settings: Settings, database: Database) -> Iterator[Lives]:
    lives = Lives(settings, database)
    yield lives
    lives.end()


# --- the machine has stayed up


@JUMPS
def test_a_restart_moves_the_clock_by_what_has_passed(lives: Lives, jump: float) -> None:
    lives.keep()
    before = lives.wait(3)  # since it was written down

    lives.restart(set_by=jump, seconds=10)

    assert lives.clock() == before + timedelta(seconds=10)


@JUMPS
def test_a_dead_runner_is_lost_soon_after_a_restart(lives: Lives, jump: float) -> None:
    held = lives.mill.a_running_step()
    lives.keep()

    again = lives.restart(set_by=jump)
    lives.wait(89)
    assert again.expire() == 0
    lives.wait(2)
    assert again.expire() == 1

    assert again.step(held.step_id).reason == "runner_lost"


@JUMPS
def test_a_step_that_waits_for_its_retry_waits_as_long_as_ever(lives: Lives, jump: float) -> None:
    held = lives.mill.a_running_step()
    lives.mill.complete(held, "failed", reason="daemon_error")
    lives.keep()

    again = lives.restart(set_by=jump, seconds=5)
    runner = again.a_runner()
    assert again.acquire(runner) == []
    lives.wait(11)

    assert [one.step_id for one in again.acquire(runner)] == [held.step_id]


@JUMPS
def test_a_claim_that_nobody_took_up_is_ready_again(lives: Lives, jump: float) -> None:
    held = lives.mill.an_acquired_step()
    lives.keep()

    again = lives.restart(set_by=jump)
    lives.wait(21)
    assert again.expire() == 1

    assert again.step(held.step_id).state == "ready"


@JUMPS
def test_a_build_ends_at_its_limit_and_not_before(lives: Lives, jump: float) -> None:
    lives.mill.a_build(timeout_seconds=600)
    (held,) = lives.mill.acquire(lives.mill.a_runner())
    lives.mill.start(held)
    lives.live(held, 60)
    lives.keep()

    lives.restart(set_by=jump)

    told = lives.live(held, 600)
    left = 600 - 60 - 10
    assert abs(told.index(Action.CANCEL) * 5 - left) <= left / 100 + 5


@JUMPS
def test_a_cancel_is_forced_at_its_time(lives: Lives, jump: float) -> None:
    held = lives.mill.a_running_step()
    lives.mill.now(cancel_build, lives.mill.site, LOCAL, lives.mill.step(held.step_id).build_id)
    lives.keep()
    planned = lives.mill.step(held.step_id).cancel_force_at

    lives.restart(set_by=jump, seconds=1)
    while lives.mill.step(held.step_id).state == "running" and lives.clock() < planned + timedelta(hours=2):
        lives.live(held, 5)

    assert timedelta(0) <= lives.clock() - planned <= timedelta(seconds=10)


@JUMPS
def test_restarts_one_after_the_other_add_nothing_up(lives: Lives, jump: float) -> None:
    before = lives.clock()
    for _ in range(5):
        lives.keep()
        lives.restart(set_by=jump)
        jump = -jump

    assert lives.clock() == before + timedelta(seconds=50)


def test_a_time_of_day_more_than_a_day_ahead_was_set_right_and_counts_from_the_next_start(
    lives: Lives,
) -> None:
    lives.keep()

    lives.restart(set_by=400 * 24 * HOUR)

    assert lives.clock() == NOON + timedelta(days=400, seconds=10)


# --- the machine has booted


def test_after_a_boot_time_never_goes_back(lives: Lives) -> None:
    shown = lives.wait(HOUR)
    lives.keep()

    lives.restart(set_by=-HOUR, boots=True)
    assert lives.clock() == shown
    lives.wait(100)

    assert shown + timedelta(seconds=99) <= lives.clock() <= shown + timedelta(seconds=100)


def test_after_a_boot_the_time_of_day_says_how_long_the_machine_was_off(lives: Lives) -> None:
    shown = lives.wait(HOUR)
    lives.keep()

    lives.restart(seconds=300, boots=True)

    assert lives.clock() == shown + timedelta(seconds=300)


def test_a_machine_that_does_not_tell_its_boot_counts_as_booted(lives: Lives) -> None:
    shown = lives.wait(HOUR)
    lives.machine = Machine(day=lives.machine.day, passing=lives.machine.passing, boot_id=lambda: "")
    lives.keep()

    lives.restart(set_by=-HOUR)

    assert lives.clock() == shown


def test_a_machine_that_was_put_back_to_an_earlier_state_counts_as_booted(lives: Lives) -> None:
    lives.keep()

    lives.restart(seconds=-100, set_by=HOUR)

    assert lives.clock() == NOON + timedelta(seconds=HOUR - 100)


def test_marks_of_boots_long_ago_are_removed(lives: Lives) -> None:
    for _ in range(4):
        lives.keep()
        lives.restart(seconds=20 * 24 * HOUR, boots=True)
    lives.keep()

    count = select(func.count()).select_from(table_of(ClockMark))
    assert lives.mill.tx(lambda tx: tx.connection().execute(count).scalar_one()) == 2


# --- who writes it down


def test_a_coordinator_that_serves_writes_down_where_its_clock_stands(
    settings: Settings, database: Database
) -> None:
    app = create_app(settings, database=database)
    look: Callable[[], Any] = lambda: app.state.coordinator.lanes.write_and_wait(clock_marks.find_latest)  # noqa: E731
    assert look() is None

    with TestClient(app) as client:
        for _ in range(200):
            if look() is not None:
                break
            client.get("/healthz")
        assert abs(look() - utc_now()) < timedelta(seconds=60)


def test_the_command_that_deletes_has_the_clock_of_the_coordinator(tmp_path: Any) -> None:
    settings = Settings(data=tmp_path / "data")
    os.makedirs(settings.data)
    database = open_database(settings.database_url)
    ahead = Machine(day=lambda: THIS_MACHINE.day() + int(HOUR) * SECOND)
    state = create_app(settings, database=database, machine=ahead).state.coordinator
    mill = Mill(state, state.clock)
    held = mill.a_running_step()
    mill.complete(held)
    build = mill.build(mill.step(held.step_id).build_id)
    mill.now(change_project, mill.site, LOCAL, build.project_id, {"retention": {"builds": 1}})
    mill.tx(mark_time, state.clock, ahead)
    mill.another_build(build.project_id, build.workflow_id)
    (other,) = mill.acquire(held.runner)
    mill.start(other)
    mill.complete(other)
    state.lanes.close()
    database.dispose()

    answer = CliRunner().invoke(main, ["retention", "--data", str(settings.data)])

    assert answer.exit_code == 0, answer.output
    database = open_database(settings.database_url)
    with database.writer.connect() as connection:
        expired_at = connection.exec_driver_sql("SELECT expired_at FROM tombstones LIMIT 1").scalar_one()
    database.dispose()
    assert datetime.fromisoformat(expired_at).replace(tzinfo=UTC) > utc_now() + timedelta(minutes=55)
