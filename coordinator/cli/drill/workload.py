"""The synthetic build: every step prints numbered lines that say who they are, and keeps them in a file.

A line is `drill:<drill>:<step>:<attempt>:<run>:<number>`; `run` is drawn anew whenever the script starts, so
a script that ran twice in one attempt gives itself away in its log and in its output.
"""

import re
from collections.abc import Sequence
from typing import Any

ABREAST = 3

_SCRIPT = """\
run=$(cat /proc/sys/kernel/random/uuid)
mkdir -p out
for input in {inputs}; do
  echo "drill-input:{drill}:$BUILDMILL_STEP:$input:$(sha256sum < "out/$input.txt" | cut -d ' ' -f 1)"
done
number=0
while [ $number -lt {lines} ]; do
  number=$((number + 1))
  line=drill:{drill}:$BUILDMILL_STEP:$BUILDMILL_ATTEMPT:$run:$number
  echo $line
  {keep}
  [ $((number % {burst})) -ne 0 ] || sleep {pause_s:g}
done
"""
_LINE = re.compile(rb"drill:([^:]+):([^:]+):(\d+):([^:]+):(\d+)")
_INPUT = re.compile(rb"drill-input:([^:]+):([^:]+):([^:]+):([0-9a-f]*)")


def numbered_step(
    drill: str,
    name: str,
    *,
    lines: int,
    depends_on: Sequence[str] = (),
    burst: int = 1,
    pause_s: float = 0.1,
    keeps: bool = True,
) -> dict[str, Any]:
    """A step that prints numbered lines, `burst` at once; one that `keeps` them has them as output."""
    script = _SCRIPT.format(
        drill=drill,
        inputs=" ".join(depends_on),
        lines=lines,
        burst=burst,
        pause_s=pause_s,
        keep='echo $line >> "out/$BUILDMILL_STEP.txt"' if keeps else ":",
    )
    return a_step(drill, name, script, depends_on=depends_on, outputs=[output_of(name)] if keeps else [])


def a_step(
    drill: str,
    name: str,
    script: str,
    *,
    depends_on: Sequence[str] = (),
    outputs: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A step that only runners of this drill get."""
    return {
        "name": name,
        "imageSlug": drill,
        "labels": [drill],
        "dependsOn": list(depends_on),
        "runScript": script,
        "cacheDirs": [],
        "outputPaths": list(outputs),
        "timeoutSeconds": 240,
        **more,
    }


def layered_build(drill: str, steps: int, *, lines: int, pause_s: float = 0.1) -> list[dict[str, Any]]:
    """So many steps in layers, each step behind all of the layer before."""
    names = [f"s{number}" for number in range(1, steps + 1)]
    layers = [names[at : at + ABREAST] for at in range(0, steps, ABREAST)]
    return [
        numbered_step(
            drill, name, lines=lines, depends_on=layers[depth - 1] if depth else [], pause_s=pause_s
        )
        for depth, layer in enumerate(layers)
        for name in layer
    ]


def output_of(name: str) -> str:
    return f"out/{name}.txt"


def numbered_line(drill: str, name: str, attempt: int, run: str, number: int) -> bytes:
    """A line as the script prints it."""
    return f"drill:{drill}:{name}:{attempt}:{run}:{number}".encode()


def read_line(line: bytes) -> tuple[str, str, int, str, int] | None:
    """Drill, step, attempt, run and number of a numbered line; None for any other."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    drill, name, attempt, run, number = (part.decode(errors="replace") for part in found.groups())
    return drill, name, int(attempt), run, int(number)


def read_input(line: bytes) -> tuple[str, str, str, str] | None:
    """Drill, step, dependency and the digest that the step found; None for any other line."""
    found = _INPUT.fullmatch(line)
    if found is None:
        return None
    drill, name, dependency, sha256 = (part.decode(errors="replace") for part in found.groups())
    return drill, name, dependency, sha256
