"""A runner that asks in vain without end is told to come back later; nobody else is."""

import pytest

from coordinator.api.poll_limit import BURST, PER_SECOND, PollLimit
from coordinator.errors import TooMany
from shared.ids import new_id
from tests.factories import ON_SQLITE, Api, a_step


def takes(limit: PollLimit, runner: str, now: float, most: int = 1000) -> int:
    """How many polls this runner is allowed at that moment."""
    for count in range(most):
        try:
            limit.take(runner, now=now)
        except TooMany:
            return count
    return most


def test_a_storm_is_cut_and_comes_through_again_at_a_bearable_pace() -> None:
    limit = PollLimit()

    assert takes(limit, "one", 0.0) == BURST
    assert takes(limit, "one", 0.05) == 0
    assert takes(limit, "one", 2.0) == 2 * PER_SECOND


def test_the_storm_of_one_runner_is_no_other_ones() -> None:
    limit = PollLimit()
    takes(limit, "one", 0.0)

    assert takes(limit, "other", 0.0) == BURST


def test_polls_that_get_steps_cost_nothing() -> None:
    limit = PollLimit()
    for _ in range(1000):
        limit.take("one", now=0.0)
        limit.give_back("one", now=0.0)

    assert takes(limit, "one", 0.0) == BURST


@ON_SQLITE
@pytest.mark.threat("I15")
def test_a_poll_storm_is_429_with_a_time_to_come_back(api: Api) -> None:
    runner = api.a_runner()

    def poll() -> int:
        wish = {"requestId": new_id(), "session": "the-session", "slots": 1}
        return api.client.post("/api/runner/acquire", json=wish, headers=runner).status_code

    answers = [poll() for _ in range(150)]
    assert answers[0] == 204
    assert 429 in answers
    for _ in range(1000):
        wish = {"requestId": new_id(), "session": "the-session", "slots": 1}
        refused = api.client.post("/api/runner/acquire", json=wish, headers=runner)
        if refused.status_code == 429:
            break

    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["code"] == "too_many"


@ON_SQLITE
def test_the_other_runners_get_their_steps_in_a_storm(api: Api) -> None:
    wild, calm = api.a_runner(), api.a_runner()
    for _ in range(150):
        wish = {"requestId": new_id(), "session": "the-session", "slots": 1}
        api.client.post("/api/runner/acquire", json=wish, headers=wild)
    api.a_build([a_step("test")])

    assert len(api.acquire(calm)) == 1
