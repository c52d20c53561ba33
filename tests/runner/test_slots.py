"""A runner does so many things at once and no more."""

import threading

from runner.slots import Slots


def test_work_takes_a_slot_and_gives_it_back():
    slots, go = Slots(2), threading.Event()

    slots.run("one", lambda _release: go.wait(10))
    slots.run("two", lambda _release: go.wait(10))

    assert (slots.free, slots.busy) == (0, 2)
    assert not slots.wait_until_free(0.01)
    go.set()
    assert slots.wait_until_idle(10)
    assert (slots.free, slots.busy) == (2, 0)


def test_what_was_adopted_may_be_more_than_there_are_slots():
    slots, go = Slots(1), threading.Event()

    for name in ("one", "two", "three"):
        slots.run(name, lambda _release: go.wait(10))

    assert (slots.free, slots.busy) == (0, 3)
    go.set()
    assert slots.wait_until_idle(10)
    assert slots.free == 1


def test_work_that_breaks_gives_its_slot_back():
    slots = Slots(1)

    def break_down(_release):
        raise RuntimeError("broken")

    slots.run("one", break_down)

    assert slots.wait_until_idle(10)
    assert slots.wait_until_free(0)


def test_a_released_slot_takes_other_work_while_the_rest_is_cleaned_up():
    slots, cleaned = Slots(1), threading.Event()

    def work(release):
        release()
        cleaned.wait(10)

    slots.run("one", work)

    assert slots.wait_until_free(10)
    assert not slots.wait_until_idle(0.01)
    cleaned.set()
    assert slots.wait_until_idle(10)
    assert slots.free == 1
