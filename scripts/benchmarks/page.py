"""Puts the table of a run into docs/performance.md, between its two markers."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from scripts.benchmarks.figure import Figure

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table_of(figures: Sequence[Figure]) -> str:
    """The figures as a table in Markdown."""
    rows = [("what", "ours", "against", "goal", "")]
    rows += [
        (one.name, one.ours, one.rival, one.goal, "met" if one.is_met else "**missed**") for one in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def describe_machine() -> str:
    """The machine in one line."""
    model = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE)
    parts = [
        f"{len(os.sched_getaffinity(0))} cores" + (f" of {model[1].strip()}" if model else ""),
        f"{int(memory[1]) // 1024**2} GiB of memory" if memory else "",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        _engine(),
    ]
    return ", ".join(part for part in parts if part)


def write_table(figures: Sequence[Figure], command: str, seconds: float, page: Path = PAGE) -> None:
    """Replace what stands between the markers; the rest of the page is written by people."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have each of its two markers once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    said = [
        f"Command: `{command}`, {seconds:.0f} s, on {datetime.now(UTC):%Y-%m-%d},"
        f" load {os.getloadavg()[0]:.1f} at the end.",
        f"Machine: {describe_machine()}.",
    ]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(said) + f"\n\n{table_of(figures)}\n{END}{after}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""  # another kind of system; its line says less


def _engine() -> str:
    try:
        answer = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except FileNotFoundError:
        return ""
    return f"Docker {answer.stdout.strip()}" if answer.returncode == 0 else ""
