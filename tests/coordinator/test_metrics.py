"""The metrics are well-formed, tell what there is, and tell it to nobody who may not look."""

import re

import httpx
import pytest

from coordinator.actions.seal_trail import seal_trail
from coordinator.api.metrics import MEDIA_TYPE
from tests.factories import ON_SQLITE, Api, Mill, a_spec

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"')
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? ([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels; the text has to be exactly what the format allows."""
    assert text.endswith("\n")
    family, kind, samples, families = "", "", {}, set()
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            _, _, family, meaning = line.split(" ", 3)
            assert family not in families, "a family stands in one piece"
            assert meaning
            families.add(family)
            kind = ""
        elif line.startswith("# TYPE "):
            _, _, named, kind = line.split(" ", 3)
            assert named == family
            assert kind in ("gauge", "counter")
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            name, inner, value = match.groups()
            assert name == family and kind, line
            key = (name, frozenset(labels_of(inner or "")))
            assert key not in samples, line
            samples[key] = float(value)
    return samples


def labels_of(text: str) -> list[tuple[str, str]]:
    found, rest = [], text
    while rest:
        match = LABEL.match(rest)
        assert match is not None, text
        value = re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), match[2])
        found.append((match[1], value))
        rest = rest[match.end() :]
        assert not rest or rest.startswith(","), text
        rest = rest.removeprefix(",")
    assert len({name for name, _ in found}) == len(found)
    return found


def look(client: httpx.Client) -> dict[str, float]:
    """Samples under `name` or `name{a="b"}` without the ids of runners."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == MEDIA_TYPE
    plain = {}
    for (name, labels), value in parse(answer.text).items():
        kept = ",".join(f"{key}={text}" for key, text in sorted(labels) if key != "id")
        plain[f"{name.removeprefix('buildmill_')}[{kept}]"] = value
    return plain


def test_they_tell_builds_steps_runners_and_what_was_done(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    api.a_running_step(a_spec(build=[], test=["build"]))
    api.a_build()
    mill.clock.advance(30)
    held = api.acquire(runner)
    beat = {"session": "the-session", "slots": 3, "diskFree": 5, "lowDisk": True, "pausedForS": 60}
    api.client.post("/api/runner/heartbeat", json=beat, headers=runner)

    said = look(api.client)

    assert held
    assert said["builds[state=running]"] == 2
    assert said["builds[state=succeeded]"] == 0
    assert said["steps[state=running]"] == 1
    assert said["steps[state=claimed]"] == 1
    assert said["runners[condition=online]"] == 2
    assert said["runners[condition=paused]"] == 1
    assert said["runners[condition=low_disk]"] == 1
    assert said["runners[condition=draining]"] == 0
    assert said["claims_total[]"] == 2
    assert "database_waiting[lane=write]" in said


def test_they_tell_how_long_the_oldest_step_has_waited(api: Api, mill: Mill) -> None:
    before = look(api.client)["oldest_ready_step_age_seconds[]"]
    api.a_build()
    mill.clock.advance(90)

    after = look(api.client)["oldest_ready_step_age_seconds[]"]

    assert (before, after) == (0, 90)


def test_they_tell_how_long_the_audit_trail_has_waited_to_be_sealed(api: Api, mill: Mill) -> None:
    api.a_project()
    mill.clock.advance(5)
    api.a_project("other")
    waiting = look(api.client)
    mill.tx(seal_trail, limit=10)

    sealed = look(api.client)

    names = ("audit_unsealed_rows[]", "audit_unsealed_age_seconds[]")
    assert [waiting[name] for name in names] == [2, 5]
    assert [sealed[name] for name in names] == [0, 0]


def test_they_count_completions(api: Api) -> None:
    api.a_running_step().complete()

    assert look(api.client)["completions_total[status=success]"] == 1


def test_a_runner_that_is_silent_is_not_online_and_is_forgotten_after_a_day(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    api.client.post("/api/runner/heartbeat", json={"session": "the-session"}, headers=runner)
    heard = look(api.client)
    mill.clock.advance(61)
    silent = look(api.client)
    mill.clock.advance(86_400)
    forgotten = look(api.client)

    name = "runner_online[name=a runner]"
    assert (heard[name], silent[name]) == (1, 0)
    assert name not in forgotten
    assert silent["runners[condition=online]"] == 0


@ON_SQLITE
@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "x} 1", 'a,b="c"', "ünï"])
def test_a_name_cannot_forge_a_sample(api: Api, name: str) -> None:
    made = api.post("/api/runners", {"name": name})
    runner = {"Authorization": f"Bearer {made['runnerSecret']}"}
    api.client.post("/api/runner/heartbeat", json={"session": "the-session"}, headers=runner)

    found = [
        dict(labels) for (sample, labels) in parse(api.client.get("/metrics").text) if "online" in sample
    ]

    assert found == [{"id": made["runnerId"], "name": name}]


@ON_SQLITE
def test_they_hold_no_secret(api: Api) -> None:
    runner = api.a_runner()
    api.a_running_step()

    text = api.client.get("/metrics").text

    assert runner["Authorization"].split()[1] not in text
