"""A request is repeated until it is answered, and for no longer than anybody wants it."""

import threading
import time

import pytest
from tenacity import Future, RetryCallState

from runner.errors import LeaseLost, Refused, Unreachable
from runner.insistence import GaveUp, TooLate, insist, pause_after


class Answers:
    """Raises what it is given, one after the other; what is no error is the answer."""

    def __init__(self, *answers):
        self.left = list(answers)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        answer = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_state(tries, error):
    state = RetryCallState(None, None, (), {})
    state.attempt_number = tries
    state.outcome = Future(tries)
    state.outcome.set_exception(error)
    return state


def test_it_asks_again_until_there_is_an_answer():
    ask = Answers(Unreachable("no"), Unreachable("no"), "yes")

    assert insist(ask, given_up=threading.Event(), longest_s=0.01) == "yes"
    assert ask.asked == 3


@pytest.mark.parametrize("error", [LeaseLost("gone"), Refused("never", status=400, code="invalid")])
def test_an_answer_that_is_final_is_not_asked_for_again(error):
    ask = Answers(error)

    with pytest.raises(type(error)):
        insist(ask, given_up=threading.Event())

    assert ask.asked == 1


def test_what_nobody_wants_any_more_ends_at_once_even_in_a_long_pause():
    given_up = threading.Event()
    ask = Answers(Unreachable("no", retry_after_s=600))
    threading.Timer(0.1, given_up.set).start()
    began = time.monotonic()

    with pytest.raises(LeaseLost):
        insist(ask, given_up=given_up)

    assert time.monotonic() - began < 10


def test_a_process_that_ends_tries_once_and_leaves_the_rest_to_the_next():
    stopping = threading.Event()
    stopping.set()
    ask = Answers(Unreachable("no"))

    with pytest.raises(GaveUp):
        insist(ask, given_up=threading.Event(), stopping=stopping)
    assert ask.asked == 1

    assert insist(Answers("yes"), given_up=threading.Event(), stopping=stopping) == "yes"


def test_a_long_pause_ends_when_the_coordinator_is_back():
    """Somebody else has heard it: after an outage nobody sits out the rest of a minute."""
    back = threading.Event()
    threading.Timer(0.1, back.set).start()
    ask = Answers(Unreachable("no", retry_after_s=600, is_back=back.is_set), "yes")

    assert insist(ask, given_up=threading.Event()) == "yes"


def test_last_words_are_repeated_for_a_moment():
    stopping = threading.Event()
    stopping.set()
    ask = Answers(Unreachable("no", retry_after_s=600), "yes")
    assert insist(ask, given_up=threading.Event(), stopping=stopping, last_words_s=30) == "yes"

    began = time.monotonic()
    with pytest.raises(GaveUp):
        insist(Answers(Unreachable("no")), given_up=threading.Event(), stopping=stopping, last_words_s=0.3)
    assert time.monotonic() - began < 10


def test_who_is_told_to_stop_in_a_long_pause_asks_again_at_once():
    stopping = threading.Event()
    threading.Timer(0.1, stopping.set).start()
    ask = Answers(Unreachable("no", retry_after_s=600), "yes")

    assert insist(ask, given_up=threading.Event(), stopping=stopping, last_words_s=30) == "yes"


def test_after_its_patience_it_gives_up():
    with pytest.raises(TooLate):
        insist(Answers(Unreachable("no")), given_up=threading.Event(), patience_s=0.05, longest_s=0.02)


def test_pauses_grow_to_a_minute_and_are_spread():
    late = [pause_after(a_state(30, Unreachable("no"))) for _ in range(300)]
    early = [pause_after(a_state(1, Unreachable("no"))) for _ in range(300)]

    assert max(early) <= 1.0
    assert 30 < max(late) <= 60
    assert min(late) < 20


def test_the_coordinators_wish_is_a_lower_bound():
    pauses = [pause_after(a_state(1, Unreachable("busy", retry_after_s=42))) for _ in range(20)]

    assert min(pauses) >= 42
