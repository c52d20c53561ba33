"""One thing that is wrong with an input, and where."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`path` names the field, such as `steps[3].dependsOn[0]`; `reason` is a sentence without a period."""

    path: str
    reason: str


def join_path(parts: Sequence[str | int]) -> str:
    """`("steps", 3, "dependsOn", 0)` becomes `steps[3].dependsOn[0]`."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
