"""What a runner says of its own health is kept with it and shown."""

from datetime import timedelta

from shared.clock import to_wire
from tests.factories import Api, Mill


def shown(api: Api) -> dict:
    [one] = api.client.get("/api/runners").json()
    return one


def beat(api: Api, runner, **said) -> None:
    answer = api.client.post("/api/runner/heartbeat", json={"session": "the-session", **said}, headers=runner)
    assert answer.status_code == 200, answer.text


def test_a_pause_is_shown_as_a_moment_on_the_coordinators_clock(api: Api, mill: Mill) -> None:
    runner = api.a_runner()

    beat(api, runner, pausedForS=60, pauseReason="3 failures in a row, the last one disk_full")

    said = shown(api)
    assert said["pauseReason"] == "3 failures in a row, the last one disk_full"
    assert said["pausedUntil"] == to_wire(mill.clock() + timedelta(seconds=60))


def test_a_pause_that_is_over_is_forgotten(api: Api) -> None:
    runner = api.a_runner()
    beat(api, runner, pausedForS=60, pauseReason="it failed")

    beat(api, runner)

    assert not shown(api).get("pausedUntil")
    assert shown(api)["pauseReason"] == ""


def test_a_runner_without_room_is_told_from_one_that_has_some(api: Api) -> None:
    runner = api.a_runner()
    beat(api, runner)
    before = shown(api)["lowDisk"]

    beat(api, runner, lowDisk=True, diskFree=5)

    assert (before, shown(api)["lowDisk"]) == (False, True)
