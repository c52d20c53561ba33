import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from runner.errors import EngineUnavailable
from runner.executor import holders
from runner.executor.holders import HolderPool


class Engine:
    """Makes holders with numbers; remembers what was removed; can be away."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.removed: list[str] = []
        self.is_away = threading.Event()

    def make(self, kind: str) -> str:
        if self.is_away.is_set():
            raise EngineUnavailable("away")
        return f"{kind}-{next(self.numbers)}"

    def remove(self, holder: str) -> None:
        self.removed.append(holder)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def pool(engine: Engine) -> Iterator[HolderPool]:
    made = HolderPool(engine.make, engine.remove, ahead={"bridge": 2})
    assert made.wait_until_full(10)
    yield made
    made.close()


@pytest.mark.threat("E07")
def test_no_two_attempts_ever_get_the_same_holder(pool: HolderPool) -> None:
    taken = [pool.take("bridge") for _ in range(20)]

    assert len(set(taken)) == 20


def test_what_was_taken_is_made_again(pool: HolderPool) -> None:
    pool.take("bridge")

    assert pool.wait_until_full(10)
    assert pool.count_ready("bridge") == 2


def test_a_kind_that_is_not_kept_is_made_on_the_spot(pool: HolderPool) -> None:
    assert pool.take("none").startswith("none-")


def test_closing_removes_what_is_ready_and_spares_what_was_taken(engine: Engine) -> None:
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 2})
    pool.wait_until_full(10)
    taken = pool.take("bridge")
    pool.wait_until_full(10)

    pool.close()

    assert taken not in engine.removed
    assert len(engine.removed) == 2


def test_an_engine_that_was_away_is_asked_again(engine: Engine) -> None:
    engine.is_away.set()
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 1})

    engine.is_away.clear()

    assert pool.wait_until_full(10)
    pool.close()


def test_making_ahead_waits_for_quiet_but_who_takes_does_not(engine: Engine) -> None:
    asked, is_quiet = threading.Event(), threading.Event()

    def until_quiet() -> float:
        asked.set()
        return 0.0 if is_quiet.is_set() else 0.01

    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 1}, until_quiet=until_quiet)
    assert asked.wait(10)

    taken = pool.take("bridge")

    assert (taken, pool.count_ready("bridge")) == ("bridge-1", 0)
    is_quiet.set()
    assert pool.wait_until_full(10)
    pool.close()


def test_quiet_is_not_waited_for_without_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "LONGEST_QUIET_S", 0.2)

    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 2}, until_quiet=lambda: 0.01)

    assert pool.wait_until_full(10)
    pool.close()


def test_steps_in_a_rush_do_not_wait_for_quiet(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "LONGEST_QUIET_S", 1000.0)
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 1}, until_quiet=lambda: 1000.0)

    taken = [pool.take("bridge") for _ in range(2)]

    assert len(set(taken)) == 2
    until_one_is_ready(pool)
    pool.close()


def test_who_finds_one_under_way_waits_for_it_and_makes_no_other(engine: Engine) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def make(kind: str) -> str:
        begun.set()
        assert may_end.wait(10)
        return engine.make(kind)

    pool = HolderPool(make, engine.remove, ahead={"bridge": 1})
    assert begun.wait(10)
    taken: list[str] = []
    taker = threading.Thread(target=lambda: taken.append(pool.take("bridge")))
    taker.start()

    may_end.set()
    taker.join(10)

    assert taken == ["bridge-1"]
    pool.close()


def test_who_waited_in_vain_makes_one_on_the_spot(engine: Engine) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def make(kind: str) -> str:
        if threading.current_thread().name == "holders":
            begun.set()
            assert may_end.wait(10)
            raise EngineUnavailable("away")
        return engine.make(kind)

    pool = HolderPool(make, engine.remove, ahead={"bridge": 1})
    assert begun.wait(10)
    taken: list[str] = []
    taker = threading.Thread(target=lambda: taken.append(pool.take("bridge")))
    taker.start()

    may_end.set()
    taker.join(10)

    assert taken == ["bridge-1"]
    pool.close()


@pytest.mark.parametrize(("taken", "kept"), [(1, 2), (5, 5), (50, 8)])
def test_as_many_are_kept_as_were_taken_lately_but_not_without_bound(
    engine: Engine, taken: int, kept: int
) -> None:
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 2})
    assert pool.wait_until_full(10)

    for _ in range(taken):
        pool.take("bridge")

    assert pool.wait_until_full(10)
    assert pool.count_ready("bridge") == kept
    pool.close()


def test_what_nobody_will_want_soon_is_removed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "LOOK_S", 0.01)
    now = [0.0]
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 2}, clock=lambda: now[0])
    for _ in range(4):
        pool.take("bridge")
    assert pool.wait_until_full(10)

    now[0] = holders.BUSY_S + 1

    until = time.monotonic() + 10
    while len(engine.removed) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    pool.close()
    assert engine.removed[:2] == sorted(engine.removed)[:2]
    assert len(engine.removed) == 4  # the other two when it was closed


def test_what_was_taken_is_spared_until_its_step_must_have_joined_it(engine: Engine) -> None:
    now = [0.0]
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 1}, clock=lambda: now[0])
    assert pool.wait_until_full(10)

    taken = pool.take("bridge")
    spared = pool.list_spared()
    now[0] = holders.JOINED_S + 1

    assert pool.wait_until_full(10)
    assert taken in spared
    assert pool.list_spared() == pool.list_ready()
    pool.close()


def test_none_is_kept_where_none_is_wanted_ahead(engine: Engine) -> None:
    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 0})

    for _ in range(3):
        pool.take("bridge")

    assert pool.wait_until_full(0)
    assert pool.list_ready() == []
    pool.close()


def until_one_is_ready(pool: HolderPool) -> None:
    until = time.monotonic() + 10
    while not pool.list_ready():
        assert time.monotonic() < until
        time.sleep(0.01)
