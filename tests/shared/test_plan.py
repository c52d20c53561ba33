"""A workflow becomes a plan, or a list of everything that is wrong with it."""

import time
from collections.abc import Collection
from typing import Any

import pytest

from shared.plan import MAX_FAULTS, InvalidPlan, Plan, plan_steps
from shared.script import render_step_script
from shared.workflow import MAX_STEPS

IMAGES = {"box", "python"}


def known_images(slugs: Collection[str]) -> Collection[str]:
    return IMAGES & set(slugs)


def a_step(name: object = "test", depends_on: object = (), /, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "imageSlug": "box",
        "dependsOn": list(depends_on) if isinstance(depends_on, tuple | list) else depends_on,
        "runScript": "echo hello",
        "cacheDirs": [],
        "outputPaths": [],
        **fields,
    }


def plan(*steps: Any) -> Plan:
    return plan_steps(list(steps), known_images=known_images)


def faults_of(*steps: Any) -> dict[str, str]:
    """Path to reason of everything that is wrong."""
    with pytest.raises(InvalidPlan) as caught:
        plan(*steps)
    return {fault.path: fault.reason for fault in caught.value.faults}


def test_steps_keep_their_place_and_get_their_turn() -> None:
    made = plan(a_step("last", ["first", "middle"]), a_step("middle", ["first"]), a_step("first"))

    assert [(step.spec.name, step.position, step.rank) for step in made.steps] == [
        ("last", 0, 2),
        ("middle", 1, 1),
        ("first", 2, 0),
    ]
    assert made.steps[0].depends_on == (1, 2)
    assert made.image_slugs == {"box"}


def test_among_steps_that_could_all_be_next_the_workflows_order_decides() -> None:
    made = plan(a_step("c"), a_step("a"), a_step("b", ["c"]), a_step("d"))

    assert [step.rank for step in made.steps] == [0, 1, 2, 3]


def test_what_a_step_does_not_say_has_a_default() -> None:
    spec = plan(a_step()).steps[0].spec

    assert (spec.timeout_seconds, spec.network, spec.user, spec.exclusive) == (3600, "bridge", "root", False)
    assert (spec.env, spec.labels) == ({}, [])


def test_paths_and_labels_take_their_canonical_form() -> None:
    spec = (
        plan(
            a_step(
                "test",
                cacheDirs=["./cache/", "/workspace/other"],
                outputPaths=["out/", "./out", "logs/*.txt"],
                labels=["b", "a", "b"],
            )
        )
        .steps[0]
        .spec
    )

    assert spec.cache_dirs == ["cache", "other"]
    assert spec.output_paths == ["out", "logs/*.txt"]
    assert spec.labels == ["a", "b"]


@pytest.mark.parametrize("raw", [None, {}, "steps", 3, []])
def test_what_is_no_list_of_steps_is_refused(raw: object) -> None:
    with pytest.raises(InvalidPlan) as caught:
        plan_steps(raw, known_images=known_images)

    assert [fault.path for fault in caught.value.faults] == ["steps"]


# Everything at once


def test_every_fault_is_named_at_once() -> None:
    found = faults_of(
        a_step("", ["b"]),
        a_step("b", ["zz", "b"]),
        a_step("c", ["d"], imageSlug="unknown"),
        a_step("d", ["c"], cacheDirs=["../x"], outputPaths=["/abs"], timeoutSeconds=0),
        a_step("d", runScript="a\0b", env={"1X": "v", "LD_PRELOAD": "v"}, labels=["no label!"]),
        "no step",
        {"name": 3, "more": 1},
    )

    assert set(found) == {
        "steps[0].name",
        "steps[1].dependsOn[0]",
        "steps[1].dependsOn[1]",
        "steps[2].imageSlug",
        "steps[2].dependsOn",
        "steps[3].cacheDirs[0]",
        "steps[3].outputPaths[0]",
        "steps[3].timeoutSeconds",
        "steps[4].name",
        "steps[4].runScript",
        "steps[4].env.1X",
        "steps[4].env.LD_PRELOAD",
        "steps[4].labels[0]",
        "steps[5]",
        "steps[6].name",
        "steps[6].more",
        "steps[6].imageSlug",
        "steps[6].dependsOn",
        "steps[6].runScript",
        "steps[6].cacheDirs",
        "steps[6].outputPaths",
    }


@pytest.mark.threat("F08")
def test_names_are_given_once() -> None:
    assert faults_of(a_step("a"), a_step("b"), a_step("a"), a_step("a")) == {
        "steps[2].name": "repeats the name of steps[0]",
        "steps[3].name": "repeats the name of steps[0]",
    }


@pytest.mark.threat("F08")
def test_a_step_depends_neither_on_itself_nor_on_what_is_not_there_nor_twice() -> None:
    assert faults_of(a_step("a", ["a", "nope"]), a_step("b", ["a", "a"])) == {
        "steps[0].dependsOn[0]": "a step cannot depend on itself",
        "steps[0].dependsOn[1]": "names no step of this workflow",
        "steps[1].dependsOn[1]": "names the same step twice",
    }


@pytest.mark.threat("F08")
def test_a_circle_is_named_step_by_step() -> None:
    found = faults_of(a_step("start"), a_step("a", ["start", "c"]), a_step("b", ["a"]), a_step("c", ["b"]))

    assert found == {"steps[1].dependsOn": "closes a circle: a -> c -> b -> a"}


def test_what_hangs_behind_a_circle_is_not_blamed_for_it() -> None:
    found = faults_of(a_step("behind", ["a"]), a_step("a", ["b"]), a_step("b", ["a"]))

    assert found == {"steps[1].dependsOn": "closes a circle: a -> b -> a"}


def test_every_circle_is_named_at_once() -> None:
    found = faults_of(
        a_step("a", ["b"]),
        a_step("b", ["a"]),
        a_step("between", ["a", "c"]),
        a_step("c", ["e"]),
        a_step("d", ["c"]),
        a_step("e", ["d", "b"]),
    )

    assert found == {
        "steps[0].dependsOn": "closes a circle: a -> b -> a",
        "steps[3].dependsOn": "closes a circle: c -> e -> d -> c",
    }


def test_a_long_circle_is_cut_when_it_is_shown() -> None:
    steps = [a_step(f"s{number}", [f"s{(number + 1) % 50}"]) for number in range(50)]

    reason = faults_of(*steps)["steps[0].dependsOn"]

    assert reason.startswith("closes a circle: s0 -> s1 -> s2")
    assert reason.endswith("-> ...")


def test_images_are_asked_for_together_and_only_those_that_could_be_one() -> None:
    asked: list[Collection[str]] = []

    def ask(slugs: Collection[str]) -> Collection[str]:
        asked.append(slugs)
        return known_images(slugs)

    steps = [a_step("a"), a_step("b", imageSlug="nope"), a_step("c", imageSlug="Not A Slug"), a_step("d")]
    with pytest.raises(InvalidPlan) as caught:
        plan_steps(steps, known_images=ask)

    assert asked == [{"box", "nope"}]
    assert [fault.path for fault in caught.value.faults] == ["steps[2].imageSlug", "steps[1].imageSlug"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"cacheDirs": ["a", "a/b"]}, "cacheDirs[1]"),
        ({"cacheDirs": ["a", "./a/"]}, "cacheDirs[1]"),
        ({"cacheDirs": ["/opt/x", "/opt"]}, "cacheDirs[1]"),
        ({"cacheDirs": ["a"], "outputPaths": ["a/b"]}, "outputPaths[0]"),
        ({"cacheDirs": ["a/b"], "outputPaths": ["a"]}, "outputPaths[0]"),
        ({"cacheDirs": ["a/b"], "outputPaths": ["a/*"]}, "outputPaths[0]"),
        ({"cacheDirs": ["/etc"]}, "cacheDirs[0]"),
        ({"cacheDirs": ["/workspace"]}, "cacheDirs[0]"),
        ({"cacheDirs": [".git"]}, "cacheDirs[0]"),
        ({"cacheDirs": ["a/*"]}, "cacheDirs[0]"),
        ({"outputPaths": ["a/../../b"]}, "outputPaths[0]"),
        ({"outputPaths": ["~/x"]}, "outputPaths[0]"),
        ({"outputPaths": ["a**"]}, "outputPaths[0]"),
    ],
)
def test_paths_that_overlap_or_lead_elsewhere_are_refused(fields: dict[str, Any], path: str) -> None:
    assert list(faults_of(a_step("test", **fields))) == [f"steps[0].{path}"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": "n" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"imageSlug": "s" * 51}, "imageSlug"),
        ({"runScript": ""}, "runScript"),
        ({"timeoutSeconds": 7 * 24 * 3600 + 1}, "timeoutSeconds"),
        ({"timeoutSeconds": -1}, "timeoutSeconds"),
        ({"timeoutSeconds": 10**30}, "timeoutSeconds"),
        ({"timeoutSeconds": "60"}, "timeoutSeconds"),
        ({"timeoutSeconds": True}, "timeoutSeconds"),
        ({"resources": {"cpus": 0}}, "resources.cpus"),
        ({"resources": {"memoryMb": 5}}, "resources.memoryMb"),
        ({"resources": {"pids": 15}}, "resources.pids"),
        ({"resources": {"gpus": 1}}, "resources.gpus"),
        ({"network": "host"}, "network"),
        ({"user": "nobody"}, "user"),
        ({"exclusive": "yes"}, "exclusive"),
        ({"cacheDirs": ["d"] * 33}, "cacheDirs"),
        ({"labels": ["l"] * 33}, "labels"),
        ({"env": {"A": 1}}, "env.A"),
        ({"env": {"A": "x" * (256 * 1024)}}, "env.A"),
        ({"dependsOn": [3]}, "dependsOn[0]"),
        ({"dependsOn": None}, "dependsOn"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_is_out_of_bounds_is_named(fields: dict[str, Any], path: str) -> None:
    assert f"steps[0].{path}" in faults_of({**a_step(), **fields})


@pytest.mark.parametrize(
    ("env", "path"),
    [
        ({"A": "x" * 131071}, "env"),
        ({"A" * 256: "x" * (131071 - 256)}, "env"),
        ({"A": "\u00e9" * 65535}, "env"),
        (dict.fromkeys("ABC", "€" * 30000), "env"),
        ({"A": "\u00e9" * 70000}, "env.A"),
        ({"A": "\ud800"}, "env.A"),
    ],
)
def test_variables_are_counted_in_bytes_with_their_names(env: dict[str, str], path: str) -> None:
    assert list(faults_of(a_step(env=env))) == [f"steps[0].{path}"]


@pytest.mark.parametrize(
    "fields",
    [
        {"env": {"A": "x" * (131071 - 2)}},
        {"env": {"A": "\u00e9" * ((131071 - 2) // 2)}},
        {"env": dict.fromkeys("ABC", "€" * 29000)},
        {"env": {"GRUSS": "gr\u00fc\u00df dich \U0001f600'\n"}, "runScript": "echo \u20ac\u2028\x01"},
    ],
)
def test_what_is_accepted_can_always_be_rendered(fields: dict[str, Any]) -> None:
    spec = plan({**a_step(), **fields}).steps[0].spec

    script = render_step_script(name=spec.name, run_script=spec.run_script, env=spec.env, variables={})

    assert all(value.split("'")[0] in script for value in spec.env.values())


def test_a_script_that_is_no_text_is_refused() -> None:
    assert list(faults_of(a_step(runScript="echo \ud800"))) == ["steps[0].runScript"]


# Size


@pytest.mark.threat("F08")
def test_so_many_steps_are_planned_and_one_more_is_not() -> None:
    steps = [a_step(f"s{number}") for number in range(MAX_STEPS + 1)]

    assert len(plan(*steps[:-1]).steps) == MAX_STEPS
    assert list(faults_of(*steps)) == ["steps"]


@pytest.mark.threat("F08")
@pytest.mark.parametrize(
    "kind",
    [
        "chain",
        "wide",
        "dense",
        "circle",
        "circles",
        "million",
        "nonsense",
        "numbers",
        "paths",
        "variables",
        "labels",
    ],
)
def test_no_shape_of_a_workflow_takes_long(kind: str) -> None:
    names = [f"s{number}" for number in range(MAX_STEPS)]
    steps: list[Any] = {
        "chain": lambda: [a_step(name, names[at - 1 : at]) for at, name in enumerate(names)],
        "wide": lambda: [a_step(name, names[:1] if at else []) for at, name in enumerate(names)],
        "dense": lambda: [a_step(name, names[max(0, at - 20) : at]) for at, name in enumerate(names)],
        "circle": lambda: [a_step(name, [names[at - 1]]) for at, name in enumerate(names)],
        "circles": lambda: [
            a_step(name, [names[at ^ 1], *names[at + 2 : at + 20]]) for at, name in enumerate(names)
        ],
        "million": lambda: [None] * 1_000_000,
        "nonsense": lambda: [a_step(3, ["x"] * 20, env={"1": 1}) for _ in names],
        "numbers": lambda: [a_step("a", [1] * 999) for _ in names],
        "paths": lambda: [
            a_step(name, cacheDirs=[f"c{n}" for n in range(32)], outputPaths=[f"o{n}" for n in range(at)])
            for at, name in zip(range(1000, 0, -111), names, strict=False)
        ],
        "variables": lambda: [a_step(name, env={f"V{n}": "x" for n in range(150)}) for name in names],
        "labels": lambda: [a_step(name, labels=[f"l{n}" for n in range(32)]) for name in names],
    }[kind]()

    began = time.process_time()
    try:
        plan(*steps)
    except InvalidPlan as error:
        assert len(error.faults) <= MAX_FAULTS + 1
    assert time.process_time() - began < 3  # well below one second on an idle machine


@pytest.mark.threat("F08")
def test_more_dependencies_or_paths_than_can_be_judged_in_time_are_refused_unread() -> None:
    names = [f"s{number}" for number in range(MAX_STEPS)]

    assert faults_of(*[a_step(name, ["x"] * 21) for name in names]) == {
        "steps": "hold 21000 dependencies; at most 20000 are possible"
    }
    assert faults_of(*[a_step(name, outputPaths=["o"] * 11) for name in names]) == {
        "steps": "hold 11000 paths; at most 10000 are possible"
    }


def test_faults_beyond_measure_are_counted_and_not_listed() -> None:
    with pytest.raises(InvalidPlan) as caught:
        plan(*[a_step(f"s{number}", ["nope"] * 5) for number in range(MAX_STEPS)])

    assert len(caught.value.faults) == MAX_FAULTS + 1
    assert caught.value.faults[-1].reason == f"and {5 * MAX_STEPS - MAX_FAULTS} more faults"


def test_no_fault_repeats_what_was_sent() -> None:
    secret = "hunter2-" * 30

    for fault in faults_of(a_step(secret, [secret], imageSlug=secret, env={"A": 3}, unknown=secret)).values():
        assert secret not in fault


def test_a_step_names_the_secrets_it_is_given() -> None:
    planned = plan(a_step(secrets=["DEPLOY_KEY", "_TOKEN9"]))

    assert planned.steps[0].spec.secrets == ["DEPLOY_KEY", "_TOKEN9"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lower",
        "9A",
        "A-B",
        "A" * 65,
        "A\n",
        "BUILDMILL_X",
        "LD_PRELOAD",
        "BASH_ENV",
        "IFS",
        "PS4",
        "UID",
        "CI",
    ],
)
def test_a_secret_that_no_variable_can_hold_is_refused(name: str) -> None:
    assert list(faults_of(a_step(secrets=[name]))) == ["steps[0].secrets[0]"]


def test_a_secret_is_named_once_and_is_not_in_env_too() -> None:
    faults = faults_of(a_step(secrets=["A", "B", "A"], env={"B": "b"}))

    assert faults == {
        "steps[0].secrets[1]": "is also the name of a variable in env",
        "steps[0].secrets[2]": "names the same secret twice",
    }


def test_a_step_is_given_at_most_a_hundred_secrets() -> None:
    assert len(plan(a_step(secrets=[f"S{n}" for n in range(100)])).steps[0].spec.secrets) == 100
    assert list(faults_of(a_step(secrets=[f"S{n}" for n in range(101)]))) == ["steps[0].secrets"]
