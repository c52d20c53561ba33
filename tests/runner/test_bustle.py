import threading

import pytest

from runner.executor.bustle import SETTLED_S, Bustle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_is_quiet_before_anything_has_happened(clock: Clock) -> None:
    assert Bustle(cores=1, clock=clock).until_quiet() == 0.0


def test_it_is_quiet_a_moment_after_the_last_sign_of_an_attempt(clock: Clock) -> None:
    bustle = Bustle(cores=2, clock=clock)
    bustle.note("one")
    clock.now += SETTLED_S / 2
    before = bustle.until_quiet()

    clock.now += SETTLED_S / 2 + 0.001

    assert before == pytest.approx(SETTLED_S / 2)
    assert bustle.until_quiet() == 0.0


def test_it_is_never_quiet_while_an_attempt_is_worked_on(clock: Clock) -> None:
    bustle = Bustle(cores=2, clock=clock)

    with bustle.working_on("one"):
        clock.now += 1000
        during = bustle.until_quiet()

    assert during == pytest.approx(SETTLED_S)
    assert bustle.until_quiet() == pytest.approx(SETTLED_S)


def test_a_few_attempts_do_not_disturb_a_machine_with_many_cores(clock: Clock) -> None:
    bustle = Bustle(cores=8, clock=clock)
    for name in ("one", "two", "three"):
        bustle.note(name)
    with_three = bustle.until_quiet()
    clock.now += 0.1

    bustle.note("four")

    assert with_three == 0.0
    assert bustle.until_quiet() == pytest.approx(SETTLED_S - 0.1)  # then the first three have settled


def test_quiet_is_waited_for_no_longer_than_was_said() -> None:
    bustle = Bustle(cores=1)

    with bustle.working_on("one"):
        bustle.wait_for_quiet(0.05)


def test_nobody_waits_once_it_is_over() -> None:
    bustle = Bustle(cores=1)
    with bustle.working_on("one"):
        waiting = threading.Thread(target=bustle.wait_for_quiet, args=(1000.0,))
        waiting.start()

        bustle.end()

        waiting.join(10)
    assert not waiting.is_alive()
