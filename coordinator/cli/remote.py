"""Commands that speak to a coordinator over its REST API and need nothing else."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import httpx

from coordinator.cli.administer import read_token, segment

POLL_S = 0.5
PATIENCE_S = 600.0
MARKS = {
    "PENDING": ".",
    "RUNNING": ">",
    "SUCCESS": "+",
    "FAILED": "x",
    "CANCELLED": "-",
    "SKIPPED": "~",
}
COLOURS = {"SUCCESS": "green", "FAILED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}


@click.command()
@click.argument("build_id")
@click.option(
    "--coordinator",
    default="http://127.0.0.1:3000",
    show_default=True,
    help="Address of the coordinator that has the build.",
)
@click.option(
    "--token-file", type=click.File(), help="File with a token, for a coordinator with --auth token."
)
@click.option("--logs/--no-logs", default=True, show_default=True, help="Show the steps' live logs.")
def watch(build_id: str, coordinator: str, token_file: Any, logs: bool) -> None:
    """Follow a build: its graph, its steps and their logs.

    The exit code is 0 when the build has succeeded and 1 when it has not. A coordinator that goes away on
    the way is waited for; a build that is retried on the way is followed into its new round.
    """
    if not coordinator.startswith(("http://", "https://")):
        raise click.BadParameter("must begin with http:// or https://", param_hint="--coordinator")
    token = read_token(token_file) if token_file else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=coordinator, headers=headers, timeout=30.0, trust_env=False) as client:
        sys.exit(0 if Watcher(client, build_id, show_logs=logs).run() else 1)


@dataclass
class Watcher:
    """Shows a build until it has ended; a coordinator that goes away is waited for."""

    client: httpx.Client
    build_id: str
    show_logs: bool = True
    _shown: dict[str, str] = field(default_factory=dict)
    _followers: list[threading.Thread] = field(default_factory=list)
    _say: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> bool:
        """True when the build succeeded."""
        build = self._look(is_first=True)
        shown_round = 0
        while True:
            if build["round"] != shown_round:
                shown_round = build["round"]
                self._say_line(f"{title(build)}: {graph_line(build['steps'])}")
            self._show_changes(build)
            if build["status"] in ("SUCCESS", "FAILED"):
                break
            time.sleep(POLL_S)
            build = self._look()
        for follower in self._followers:
            follower.join(30)
        reason = f" ({build['statusReason']})" if build.get("statusReason") else ""
        self._say_line(click.style(f"{title(build)} {build['status']}{reason}", bold=True))
        return bool(build["status"] == "SUCCESS")

    def _look(self, *, is_first: bool = False) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        said = False
        while True:
            try:
                answer = self.client.get(f"/api/builds/{segment(self.build_id)}")
                if answer.status_code < 500:
                    break
            except httpx.HTTPError as error:
                if is_first:
                    raise click.ClickException(
                        f"no coordinator answers at {self.client.base_url}: {error}"
                    ) from error
                # it is restarting: the loop below says so once and asks again
            if time.monotonic() > deadline:
                raise click.ClickException("the coordinator does not come back")
            if not said:
                self._say_line("the coordinator does not answer; waiting for it")
                said = True
            time.sleep(1.0)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"error", "steps"} & found.keys():
            raise click.ClickException(f"what answers at {self.client.base_url} is no coordinator")
        if answer.status_code != 200:
            raise click.ClickException(f"{answer.status_code}: {found.get('error', '')}")
        return found

    def _show_changes(self, build: dict[str, Any]) -> None:
        for step in build["steps"]:
            if self._shown.get(step["id"]) == step["status"]:
                continue
            self._shown[step["id"]] = step["status"]
            if step["status"] == "PENDING":
                continue
            self._say_line(f"{progress_line(build['steps'])}  {step_line(step)}")
            if self.show_logs and step["status"] not in ("SKIPPED", "CANCELLED"):
                self._follow(step)

    def _follow(self, step: dict[str, Any]) -> None:
        name = f"log-{step['id']}"
        if any(follower.name == name for follower in self._followers):
            return
        follower = threading.Thread(target=self._show_log, args=(step,), name=name, daemon=True)
        self._followers.append(follower)
        follower.start()

    def _show_log(self, step: dict[str, Any]) -> None:
        rest, seen = "", ""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                for event, identity, said in self._events(step["id"], seen):
                    seen = identity
                    if event in ("attempt", "end") and rest:
                        self._say_line(log_line(step["name"], rest))
                        rest = ""
                    if event == "end":
                        return
                    if event == "attempt":
                        self._say_line(log_line(step["name"], f"attempt {said['attempt']} begins anew"))
                        continue
                    *lines, rest = (rest + said["text"]).split("\n")
                    for line in lines:
                        self._say_line(log_line(step["name"], line))
            except httpx.HTTPError:
                time.sleep(1.0)  # resumes where it was, by the last event's id

    def _events(self, step_id: str, seen: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        headers = {"Last-Event-ID": seen} if seen else {}
        url = f"/api/steps/{step_id}/log?follow=true"
        with self.client.stream("GET", url, headers=headers, timeout=60.0) as answer:
            answer.raise_for_status()
            event, identity = "", seen
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "id":
                    identity = value
                elif name == "data":
                    yield event, identity, json.loads(value)

    def _say_line(self, line: str) -> None:
        with self._say:
            click.echo(line)


def title(build: dict[str, Any]) -> str:
    """What the build is called; its round only when it was retried."""
    return f"build {build['number']}" + (f" round {build['round']}" if build["round"] > 1 else "")


def graph_line(steps: list[dict[str, Any]]) -> str:
    """The graph by levels: what stands between arrows can run at the same time."""
    level: dict[str, int] = {}
    waiting = list(steps)
    while waiting:
        placed = [step for step in waiting if all(name in level for name in step["dependsOn"])]
        for step in placed:
            level[step["name"]] = max((level[name] + 1 for name in step["dependsOn"]), default=0)
        waiting = [step for step in waiting if step["name"] not in level]
    depth = max(level.values(), default=-1) + 1
    rows = [[name for name, at in level.items() if at == number] for number in range(depth)]
    return " -> ".join(f"[{' | '.join(row)}]" if len(row) > 1 else row[0] for row in rows)


def progress_line(steps: list[dict[str, Any]]) -> str:
    """One mark a step: . waits, > runs, + succeeded, x failed, - cancelled, ~ skipped."""
    return "".join(MARKS[step["status"]] for step in steps)


def step_line(step: dict[str, Any]) -> str:
    said = click.style(step["status"], fg=COLOURS.get(step["status"]), bold=True)
    reason = f" {step['reason']}" if step.get("reason") else ""
    code = f" (exit code {step['exitCode']})" if step.get("exitCode") else ""
    attempt = f" attempt {step['attempt']}" if step["attempt"] > 1 else ""
    return f"{step['name']}: {said}{reason}{code}{attempt}"


def log_line(name: str, line: str) -> str:
    """A line of a step's log, harmless for a terminal."""
    shown = "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line.rstrip("\r"))
    return f"  {click.style(name[:14].rjust(14), dim=True)} | {shown[:2000]}"
