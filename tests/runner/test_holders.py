import itertools
import threading
from collections.abc import Iterator

import pytest

from runner.errors import EngineUnavailable
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

    def wait_for_quiet(_longest_s: float) -> None:
        asked.set()
        assert is_quiet.wait(10)

    pool = HolderPool(engine.make, engine.remove, ahead={"bridge": 1}, wait_for_quiet=wait_for_quiet)
    assert asked.wait(10)

    taken = pool.take("bridge")

    assert (taken, pool.count_ready("bridge")) == ("bridge-1", 0)
    is_quiet.set()
    assert pool.wait_until_full(10)
    pool.close()
