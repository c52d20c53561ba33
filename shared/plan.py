"""A workflow as it was sent becomes a plan, or InvalidPlan with every fault at once.

Coordinator and command line both plan: what is refused here is refused before anything is stored.
"""

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shared.faults import Fault, join_path
from shared.references import (
    InvalidReference,
    display_name,
    env_name,
    env_value,
    environment,
    label,
    secret_name,
    slug,
)
from shared.step_paths import cache_dir, output_pattern, overlaps
from shared.workflow import MAX_SECRETS, MAX_STEPS, StepSpec

MAX_FAULTS = 1_000
MAX_DEPENDENCIES = 20_000
MAX_PATHS = 10_000


class InvalidPlan(ValueError):
    """The workflow cannot be planned; `faults` names everything that is wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = tuple(faults)


@dataclass(frozen=True)
class PlannedStep:
    """A step in its place: `rank` is its turn in a topological order, `depends_on` holds positions."""

    position: int
    rank: int
    depends_on: tuple[int, ...]
    spec: StepSpec


@dataclass(frozen=True)
class Plan:
    """What a build is made of, in the workflow's order."""

    steps: tuple[PlannedStep, ...]

    @property
    def image_slugs(self) -> frozenset[str]:
        return frozenset(step.spec.image_slug for step in self.steps)


def plan_steps(raw: object, *, known_images: Callable[[Collection[str]], Collection[str]]) -> Plan:
    """Plan the `steps` of a workflow; `known_images` says which of the slugs it is asked about exist."""
    if not isinstance(raw, list):
        raise InvalidPlan([Fault("steps", "must be a list")])
    if not 1 <= len(raw) <= MAX_STEPS:
        raise InvalidPlan([Fault("steps", f"must hold 1 to {MAX_STEPS} steps, not {len(raw)}")])
    wishes = [_list_field(step, "dependsOn") for step in raw]
    faults = _too_much(raw, wishes)
    if faults:
        raise InvalidPlan(faults)  # the rest could take long to judge
    specs = []
    for position, step in enumerate(raw):
        specs.append(_read_step(step, position, faults))
        if len(faults) > MAX_FAULTS:
            raise InvalidPlan(_bounded(faults))
    names = [_text_field(step, "name") for step in raw]
    faults += _repeated_names(names)
    dependencies = _resolve_dependencies(names, wishes, faults)
    faults += _unknown_images([_text_field(step, "imageSlug") for step in raw], known_images)
    ranks, circles = _rank(names, dependencies)
    faults += circles
    if faults:
        raise InvalidPlan(_bounded(faults))
    return Plan(
        tuple(
            PlannedStep(position, ranks[position], tuple(sorted(dependencies[position])), spec)
            for position, spec in enumerate(specs)
            if spec is not None
        )
    )


def shape_faults(error: ValidationError, *, prefix: Sequence[str | int] = ()) -> list[Fault]:
    """What pydantic found, in our own form and without echoing the input."""
    return [
        Fault(join_path([*prefix, *item["loc"]]), _plain(item))
        for item in error.errors(include_url=False, include_context=True, include_input=False)[:MAX_FAULTS]
    ]


_PLAIN = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "none_required": "must be null",
}


def _plain(item: Any) -> str:
    if item["type"] in _PLAIN:
        return _PLAIN[item["type"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    return message if message[1:2].isupper() else message[:1].lower() + message[1:]


def _read_step(raw: object, position: int, faults: list[Fault]) -> StepSpec | None:
    here = ("steps", position)
    if not isinstance(raw, dict):
        faults.append(Fault(join_path(here), "must be an object"))
        return None
    try:
        spec = StepSpec.model_validate(raw, by_alias=True, by_name=False)
    except ValidationError as error:
        faults += shape_faults(error, prefix=here)
        _judge_texts(raw, here, faults)
        return None
    before = len(faults)
    canonical = _judge_texts(raw, here, faults)
    return spec.model_copy(update=canonical) if len(faults) == before else None


def _judge_texts(raw: dict[str, Any], here: Sequence[str | int], faults: list[Fault]) -> dict[str, Any]:
    """Check every text of the step; returns the canonical forms of its paths."""
    judge = _Judge(here, faults)
    name = _text_field(raw, "name")
    if name and len(name) <= 100:
        judge.text("name", display_name, name)
    image = _text_field(raw, "imageSlug")
    if image and len(image) <= 50:
        judge.text("imageSlug", slug, image)
    script = _text_field(raw, "runScript")
    if script and "\0" in script:
        judge.say("must not hold a NUL character", "runScript")
    judge.environment(raw.get("env"))
    judge.secrets(_list_field(raw, "secrets")[:MAX_SECRETS], raw.get("env"))
    judge.texts("labels", label, _list_field(raw, "labels")[:32])
    caches = judge.texts("cacheDirs", cache_dir, _list_field(raw, "cacheDirs")[:32])
    outputs = judge.texts("outputPaths", output_pattern, _list_field(raw, "outputPaths")[:1000])
    judge.apart(caches, outputs)
    return {
        "cache_dirs": [path for path in caches if path],
        "output_paths": list(dict.fromkeys(path for path in outputs if path)),
        "labels": sorted({text for text in _list_field(raw, "labels") if isinstance(text, str)}),
    }


class _Judge:
    """Collects the faults of one step."""

    def __init__(self, here: Sequence[str | int], faults: list[Fault]) -> None:
        self._here = here
        self._faults = faults

    def say(self, reason: str, *where: str | int) -> None:
        self._faults.append(Fault(join_path([*self._here, *where]), reason))

    def text(self, field: str, check: Callable[[str], str], value: str, *where: str | int) -> str | None:
        try:
            return check(value)
        except InvalidReference as error:
            self.say(str(error), field, *where)
            return None

    def texts(self, field: str, check: Callable[[str], str], values: Sequence[object]) -> list[str | None]:
        return [
            self.text(field, check, value, index) if isinstance(value, str) else None
            for index, value in enumerate(values)
        ]

    def environment(self, env: object) -> None:
        if not isinstance(env, dict):
            return
        before = len(self._faults)
        variables = dict(list(env.items())[:1000])
        for name, value in variables.items():
            self.text("env", env_name, name, name[:64])
            if isinstance(value, str):
                self.text("env", env_value, value, name[:64])
        are_texts = all(isinstance(value, str) for value in variables.values())
        if are_texts and len(self._faults) == before:
            try:
                environment(variables)  # what is accepted here is what a script can be written of
            except InvalidReference as error:
                self.say(str(error), "env")

    def secrets(self, names: Sequence[object], env: object) -> None:
        self.texts("secrets", secret_name, names)
        first: dict[object, int] = {}
        for index, name in enumerate(names):
            if not isinstance(name, str):
                continue
            if first.setdefault(name, index) != index:
                self.say("names the same secret twice", "secrets", index)
            elif isinstance(env, dict) and name in env:
                self.say("is also the name of a variable in env", "secrets", index)

    def apart(self, caches: Sequence[str | None], outputs: Sequence[str | None]) -> None:
        for index, one in enumerate(caches):
            for earlier in caches[:index]:
                if one and earlier and overlaps(one, earlier):
                    self.say(f"overlaps {earlier!r}", "cacheDirs", index)
        for index, path in enumerate(outputs):
            for cache in caches:
                if path and cache and not cache.startswith("/") and overlaps(path, cache):
                    self.say(f"overlaps the cache directory {cache!r}", "outputPaths", index)


def _text_field(raw: object, field: str) -> str | None:
    value = raw.get(field) if isinstance(raw, dict) else None
    return value if isinstance(value, str) else None


def _list_field(raw: object, field: str) -> list[Any]:
    value = raw.get(field) if isinstance(raw, dict) else None
    return value if isinstance(value, list) else []


def _too_much(raw: Sequence[object], wishes: Sequence[list[Any]]) -> list[Fault]:
    """What is refused unread, as judging it would take long for nothing."""
    dependencies = sum(map(len, wishes))
    paths = sum(len(_list_field(step, "outputPaths")) + len(_list_field(step, "cacheDirs")) for step in raw)
    faults = []
    if dependencies > MAX_DEPENDENCIES:
        faults.append(
            Fault("steps", f"hold {dependencies} dependencies; at most {MAX_DEPENDENCIES} are possible")
        )
    if paths > MAX_PATHS:
        faults.append(Fault("steps", f"hold {paths} paths; at most {MAX_PATHS} are possible"))
    return faults


def _repeated_names(names: Sequence[str | None]) -> list[Fault]:
    first: dict[str, int] = {}
    faults = []
    for position, name in enumerate(names):
        if name is None:
            continue
        if name in first:
            reason = f"repeats the name of steps[{first[name]}]"
            faults.append(Fault(f"steps[{position}].name", reason))
        else:
            first[name] = position
    return faults


def _resolve_dependencies(
    names: Sequence[str | None], wishes: Sequence[list[Any]], faults: list[Fault]
) -> list[set[int]]:
    positions = {name: position for position, name in reversed(list(enumerate(names))) if name is not None}
    resolved: list[set[int]] = [set() for _ in names]
    for position, wished in enumerate(wishes):
        for index, name in enumerate(wished[:MAX_STEPS]):
            if not isinstance(name, str):
                continue
            where = f"steps[{position}].dependsOn[{index}]"
            if name == names[position]:
                faults.append(Fault(where, "a step cannot depend on itself"))
            elif name not in positions:
                faults.append(Fault(where, "names no step of this workflow"))
            elif positions[name] in resolved[position]:
                faults.append(Fault(where, "names the same step twice"))
            else:
                resolved[position].add(positions[name])
    return resolved


def _unknown_images(
    slugs: Sequence[str | None], known_images: Callable[[Collection[str]], Collection[str]]
) -> list[Fault]:
    asked = {text for text in slugs if text and len(text) <= 50 and _is_slug(text)}
    known = set(known_images(asked)) if asked else set()
    return [
        Fault(f"steps[{position}].imageSlug", "names no docker image")
        for position, text in enumerate(slugs)
        if text in asked and text not in known
    ]


def _is_slug(text: str) -> bool:
    try:
        slug(text)
    except InvalidReference:
        return False
    return True


def _rank(names: Sequence[str | None], dependencies: Sequence[set[int]]) -> tuple[list[int], list[Fault]]:
    """Kahn's order, the workflow's own order deciding among steps that could all be next."""
    dependents: list[list[int]] = [[] for _ in names]
    missing = [len(wanted) for wanted in dependencies]
    for position, wanted in enumerate(dependencies):
        for other in wanted:
            dependents[other].append(position)
    free = [position for position, count in enumerate(missing) if count == 0]
    heapq.heapify(free)
    ranks = [-1] * len(names)
    circles = []
    for rank in range(len(names)):
        if not free:
            circle = _circle(dependencies, ranks)
            circles.append(_circle_fault(names, circle))
            for position in circle:  # as if it were none, so that the circles behind it are found too
                missing[position] = 0
                heapq.heappush(free, position)
        position = heapq.heappop(free)
        ranks[position] = rank
        for other in dependents[position]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(free, other)
    return ranks, circles


def _circle(dependencies: Sequence[set[int]], ranks: Sequence[int]) -> list[int]:
    """Follow unranked dependencies until one comes back: every unranked step has one."""
    here = next(position for position, rank in enumerate(ranks) if rank < 0)
    seen: dict[int, int] = {}
    path: list[int] = []
    while here not in seen:
        seen[here] = len(path)
        path.append(here)
        here = min(other for other in dependencies[here] if ranks[other] < 0)
    return path[seen[here] :]


def _circle_fault(names: Sequence[str | None], circle: Sequence[int]) -> Fault:
    closed = [*circle, circle[0]]
    shown = " -> ".join(str(names[position]) for position in closed[:20])
    more = " -> ..." if len(closed) > 20 else ""
    return Fault(f"steps[{circle[0]}].dependsOn", f"closes a circle: {shown}{more}")


def _bounded(faults: list[Fault]) -> list[Fault]:
    if len(faults) <= MAX_FAULTS:
        return faults
    rest = len(faults) - MAX_FAULTS
    return [*faults[:MAX_FAULTS], Fault("steps", f"and {rest} more faults")]
