"""How transactions run."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from coordinator.errors import Conflict, Invalid, Unavailable
from coordinator.store.dialect import Database
from coordinator.store.lanes import Lanes
from coordinator.tables import Tenant, table_of
from tests.factories import ON_POSTGRES, ON_SQLITE, together
from tests.fakes import MORNING

TENANTS = table_of(Tenant)
TIME_LIMIT = 20.0
SHORT_OR_NOT = pytest.mark.parametrize("short", [False, True], ids=["long", "short"])


def store(name: str) -> Callable[[Session], str]:
    def action(tx: Session) -> str:
        tx.connection().execute(insert(TENANTS), {"id": name, "account": name, "created_at": MORNING})
        return name

    return action


def stored_in(database: Database) -> set[str]:
    with database.reader.connect() as connection:
        return set(connection.execute(select(TENANTS.c.id)).scalars())


class Gate:
    """An action that holds its lane until it is let go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, tx: Session) -> None:
        self.reached.set()
        assert self.opened.wait(TIME_LIMIT)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, TIME_LIMIT)


async def as_one_group(lanes: Lanes, *actions: Callable[[Session], Any], short: bool = False) -> list[Any]:
    """Hand in all actions while the lane is held, so that one writer finds them waiting together."""
    gate = Gate()
    held = asyncio.create_task(lanes.write(gate))
    await gate.is_reached()
    write = lanes.write_shortly if short else lanes.write
    waiting = [asyncio.create_task(write(action)) for action in actions]
    await asyncio.sleep(0)  # each task hands its action in and waits
    gate.opened.set()
    answers = await asyncio.gather(held, *waiting, return_exceptions=True)
    return list(answers[1:])


async def test_what_was_answered_is_committed(lanes: Lanes, database: Database) -> None:
    for number in range(20):
        name = await lanes.write(store(f"tenant-{number}"))

        assert name in stored_in(database)


@ON_SQLITE
async def test_no_answer_is_given_before_the_commit_of_its_group(lanes: Lanes, database: Database) -> None:
    first, last = Gate(), Gate()
    held = asyncio.create_task(lanes.write(first))
    await first.is_reached()
    early = asyncio.create_task(lanes.write(store("early")))
    late = asyncio.create_task(lanes.write(last))
    await asyncio.sleep(0)
    first.opened.set()

    await last.is_reached()  # the action of `early` has run

    assert not early.done()
    assert "early" not in stored_in(database)
    last.opened.set()
    await asyncio.gather(held, early, late)
    assert "early" in stored_in(database)


@SHORT_OR_NOT
async def test_a_failing_action_does_not_touch_its_neighbours(
    lanes: Lanes, database: Database, short: bool
) -> None:
    def refuses(tx: Session) -> None:
        store("refused")(tx)
        raise Conflict("no")

    await lanes.write(store("one"))
    answers = await as_one_group(lanes, refuses, store("two"), store("one"), store("three"), short=short)

    assert isinstance(answers[0], Conflict)
    assert answers[1] == "two"
    assert isinstance(answers[2], Exception)  # its key is taken
    assert answers[3] == "three"
    assert stored_in(database) == {"one", "two", "three"}


async def test_an_object_that_cannot_be_stored_does_not_touch_its_neighbours(
    lanes: Lanes, database: Database
) -> None:
    def store_object(name: str) -> Callable[[Session], None]:
        return lambda tx: tx.add(Tenant(id=name, account=name, created_at=MORNING))

    def store_both(tx: Session) -> None:
        store("by-statement")(tx)
        store_object("one")(tx)

    await lanes.write(store_object("one"))
    answers = await as_one_group(lanes, store_object("two"), store_both, store("three"))

    assert [type(answer) for answer in answers] == [type(None), IntegrityError, str]
    assert stored_in(database) == {"one", "two", "three"}


async def test_an_action_sees_no_object_of_the_one_before(lanes: Lanes, database: Database) -> None:
    await lanes.write(store("one"))

    def rename(tx: Session) -> None:
        tx.get_one(Tenant, "one").account = "renamed"
        raise Conflict("no")

    _, seen = await as_one_group(lanes, rename, lambda tx: tx.get_one(Tenant, "one").account)

    assert seen == "one"


@SHORT_OR_NOT
async def test_an_unforeseen_error_reaches_its_own_caller_only(
    lanes: Lanes, database: Database, short: bool
) -> None:
    def breaks(tx: Session) -> None:
        raise ZeroDivisionError

    answers = await as_one_group(lanes, store("one"), breaks, store("two"), short=short)

    assert isinstance(answers[1], ZeroDivisionError)
    assert stored_in(database) == {"one", "two"}


@ON_SQLITE
@SHORT_OR_NOT
async def test_a_lost_transaction_refuses_its_whole_group(
    lanes: Lanes, database: Database, short: bool
) -> None:
    def loses(tx: Session) -> None:
        tx.connection().connection.cursor().execute("ROLLBACK")

    answers = await as_one_group(lanes, store("one"), loses, store("two"), short=short)

    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert stored_in(database) == set()
    assert await lanes.write(store("after")) == "after"
    assert stored_in(database) == {"after"}


@ON_POSTGRES
async def test_an_action_that_lost_its_connection_is_refused_and_the_next_one_gets_a_fresh_one(
    lanes: Lanes, database: Database
) -> None:
    def dies(tx: Session) -> None:
        tx.connection().execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    for number in range(8):  # each lane may have met it
        with pytest.raises(Unavailable):
            await lanes.write(dies)
        assert await lanes.write(store(f"after-{number}")) == f"after-{number}"


async def test_two_that_wait_for_each_other_both_succeed_in_the_end(lanes: Lanes, database: Database) -> None:
    await lanes.write(store("left"))
    await lanes.write(store("right"))
    meeting = threading.Barrier(2)

    def touch(*names: str) -> Callable[[Session], None]:
        is_first_try = True

        def action(tx: Session) -> None:
            nonlocal is_first_try
            for name in names:
                tx.connection().execute(update(TENANTS).where(TENANTS.c.id == name).values(account=name))
                if is_first_try and not database.is_sqlite:
                    is_first_try = False
                    meeting.wait(TIME_LIMIT)

        return action

    answers = await asyncio.gather(
        lanes.write(touch("left", "right")), lanes.write(touch("right", "left")), return_exceptions=True
    )

    assert list(answers) == [None, None]


def test_many_writers_lose_no_change(lanes: Lanes, database: Database) -> None:
    lanes.write_and_wait(store("counted"))

    def one_more(tx: Session) -> None:
        tx.connection().execute(
            update(TENANTS).where(TENANTS.c.id == "counted").values(account=TENANTS.c.account + "+")
        )

    def twenty_more() -> None:
        for _ in range(20):
            lanes.write_and_wait(one_more)

    answers = together(*[twenty_more] * 8)

    assert answers == [None] * 8
    with database.reader.connect() as connection:
        assert connection.execute(select(TENANTS.c.account)).scalar_one() == "counted" + "+" * 160


@pytest.mark.threat("L04")
async def test_text_that_no_database_can_hold_is_refused_or_stored_as_it_is(lanes: Lanes) -> None:
    try:
        await lanes.write(store("nul\0byte"))
    except Invalid as error:
        assert "stored" in str(error)


async def test_closing_finishes_what_was_handed_in_and_takes_no_more(database: Database) -> None:
    lanes = Lanes(database)
    gate = Gate()
    held = asyncio.create_task(lanes.write(gate))
    await gate.is_reached()
    waiting = [asyncio.create_task(lanes.write(store(f"tenant-{number}"))) for number in range(10)]
    await asyncio.sleep(0)

    closing = asyncio.create_task(asyncio.to_thread(lanes.close))
    gate.opened.set()
    await closing

    await held
    assert {await task for task in waiting} == stored_in(database)
    with pytest.raises(Unavailable):
        await lanes.write(store("late"))


async def test_a_caller_that_has_gone_does_not_disturb_the_lane(lanes: Lanes, database: Database) -> None:
    gate = Gate()
    leaving = asyncio.create_task(lanes.write(gate))
    await gate.is_reached()
    leaving.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving

    assert await lanes.write(store("next")) == "next"


async def test_a_fault_of_the_library_costs_its_job_and_not_the_lane(lanes: Lanes) -> None:
    def break_it(tx: Session) -> None:
        raise sqlalchemy.exc.PendingRollbackError("the library says no")

    with pytest.raises((Unavailable, sqlalchemy.exc.PendingRollbackError)):
        await lanes.write(break_it)

    assert await lanes.write(lambda tx: 7) == 7


@ON_SQLITE
async def test_short_actions_run_in_the_event_loop_and_long_ones_never(lanes: Lanes) -> None:
    def thread(tx: Session) -> int:
        return threading.get_ident()

    here = threading.get_ident()
    alone = await lanes.write_shortly(thread)
    together_ = await asyncio.gather(*[lanes.write_shortly(thread) for _ in range(5)])
    mixed = await asyncio.gather(lanes.write_shortly(thread), lanes.write(thread))

    assert [alone, *together_] == [here] * 6
    assert here not in mixed


async def test_short_actions_are_answered_after_their_commit(lanes: Lanes, database: Database) -> None:
    for number in range(20):
        assert await lanes.write_shortly(store(f"tenant-{number}")) in stored_in(database)


async def test_short_and_long_actions_in_any_order_are_all_done(lanes: Lanes, database: Database) -> None:
    names = [f"tenant-{number}" for number in range(200)]

    async def write(number: int, name: str) -> str:
        await asyncio.sleep(number % 7 / 1000)
        return await (lanes.write_shortly if number % 3 else lanes.write)(store(name))

    elsewhere = asyncio.create_task(
        asyncio.to_thread(lambda: [lanes.write_and_wait(store(f"other-{number}")) for number in range(50)])
    )
    done = await asyncio.wait_for(
        asyncio.gather(*[write(number, name) for number, name in enumerate(names)]), TIME_LIMIT
    )

    others = await elsewhere

    assert done == names
    assert stored_in(database) == {*names, *others}


def test_a_loop_that_closed_with_a_short_action_waiting_does_not_keep_the_lane(
    lanes: Lanes, database: Database
) -> None:
    async def leave_it() -> None:
        waiting = asyncio.ensure_future(lanes.write_shortly(store("left")))
        await asyncio.sleep(0)  # handed in; the loop ends before it comes to it
        waiting.cancel()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_it())
    loop.close()

    assert lanes.write_and_wait(store("next"), timeout_s=TIME_LIMIT) == "next"
    assert "next" in stored_in(database)


@ON_SQLITE
async def test_the_event_loop_does_not_wait_for_another_program_that_holds_the_database(
    lanes: Lanes, database: Database
) -> None:
    await lanes.write_shortly(store("before"))
    with database.reader.connect() as other:
        other.connection.cursor().execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(lanes.write_shortly(store("meanwhile")))
        began = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0.01)
        waited = time.monotonic() - began
        was_done = writing.done()
        other.connection.cursor().execute("ROLLBACK")

    assert await asyncio.wait_for(writing, TIME_LIMIT) == "meanwhile"
    assert not was_done
    assert waited < 2
    assert await lanes.write_shortly(store("after")) == "after"


@ON_SQLITE
@SHORT_OR_NOT
async def test_whatever_an_action_does_to_the_connection_the_lane_goes_on(
    lanes: Lanes, database: Database, short: bool
) -> None:
    write = lanes.write_shortly if short else lanes.write

    def break_it(tx: Session) -> None:
        tx.connection().connection.dbapi_connection.close()  # type: ignore[union-attr]

    with pytest.raises(Unavailable):
        await asyncio.wait_for(write(break_it), TIME_LIMIT)

    assert await asyncio.wait_for(write(store("after")), TIME_LIMIT) == "after"
    assert stored_in(database) == {"after"}


@ON_SQLITE
async def test_a_short_action_whose_loop_has_closed_is_done_behind_a_long_one(
    lanes: Lanes, database: Database
) -> None:
    gate = Gate()
    held = asyncio.create_task(lanes.write(gate))
    await gate.is_reached()

    def leave_one() -> None:
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(lanes.write_shortly(store("left")))
        loop.run_until_complete(asyncio.sleep(0))
        waiting.cancel()
        loop.run_until_complete(asyncio.wait([waiting]))
        loop.close()

    await asyncio.to_thread(leave_one)
    gate.opened.set()

    await held
    deadline = time.monotonic() + TIME_LIMIT / 2
    while stored_in(database) != {"left"}:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@ON_POSTGRES
@SHORT_OR_NOT
async def test_a_database_that_may_only_be_read_is_away_for_now(
    lanes: Lanes, database: Database, short: bool
) -> None:
    def write(tx: Session) -> str:
        tx.connection().execute(text("SET TRANSACTION READ ONLY"))
        return store("refused")(tx)

    with pytest.raises(Unavailable):
        await (lanes.write_shortly if short else lanes.write)(write)

    assert await lanes.write(store("later")) == "later"
    assert stored_in(database) == {"later"}


@ON_SQLITE
async def test_a_damaged_file_is_a_database_that_is_away_for_now(
    lanes: Lanes, database: Database, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not what it was " * 1024)

    def read(tx: Session) -> Any:
        return tx.connection().execute(text(f"ATTACH DATABASE '{damaged}' AS damaged"))

    with pytest.raises(Unavailable):
        await lanes.write(read)

    assert await lanes.write(store("later")) == "later"


@ON_POSTGRES
@pytest.mark.parametrize("sqlstate", ["25006", "25P03", "08006", "53100", "57P01", "58030"])
async def test_what_the_server_suffers_from_is_no_fault_of_the_statement(lanes: Lanes, sqlstate: str) -> None:
    def suffer(tx: Session) -> None:
        tx.connection().execute(text(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$"))

    with pytest.raises(Unavailable):
        await lanes.write(suffer)
