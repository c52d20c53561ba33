"""A runner whose steps do nothing: takes steps, starts them, completes them, until none are left.

    python -m scripts.benchmarks.noop_runner HOST PORT SLOTS together|alone SECRET...

It runs one runner per secret, each in a thread with a connection of its own. What it has to tell of the steps
that it took together it tells together, or each of it in a request of its own. It says "ready", waits for a
line on its standard input, and in the end prints one line of JSON: when it began, when it ended, how many.
"""

import json
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from scripts.benchmarks.line import BadAnswer, Line, Reply
from shared import paths
from shared.protocol import (
    Acquire,
    Claim,
    Claims,
    Completion,
    ReportAnswers,
    ReportedCompletion,
    ReportedStart,
    Reports,
    Start,
)

LONGEST_S = 300.0
TOGETHER, ALONE = "together", "alone"
_START = Start(container="none").model_dump_json(by_alias=True, exclude_none=True).encode()
_DONE = Completion(status="success", exit_code=0, log_size=0)
_COMPLETE = _DONE.model_dump_json(by_alias=True, exclude_none=True).encode()


class NoopRunner:
    """One runner on one connection."""

    def __init__(self, host: str, port: int, secret: str) -> None:
        self._line = Line(host, port, secret)
        self._session = secrets.token_hex(8)

    def acquire(self, slots: int, wait: int = 0) -> list[Claim]:
        said = Acquire(request_id=secrets.token_hex(8), session=self._session, slots=slots, wait=wait)
        reply = self._line.post(paths.ACQUIRE, said.model_dump_json(by_alias=True).encode())
        if reply.status == 204:
            return []
        return Claims.model_validate_json(_expect(reply)).claims

    def start(self, claim: Claim) -> None:
        _expect(self._line.post(paths.START.format(step_id=claim.step_id), _START, _proof(claim)))

    def complete(self, claim: Claim) -> None:
        _expect(self._line.post(paths.COMPLETE.format(step_id=claim.step_id), _COMPLETE, _proof(claim)))

    def start_all(self, claims: list[Claim]) -> None:
        self._report(Reports(starts=[ReportedStart(container="none", **_named(claim)) for claim in claims]))

    def complete_all(self, claims: list[Claim]) -> None:
        ends = [
            ReportedCompletion(status="success", exit_code=0, log_size=0, **_named(claim)) for claim in claims
        ]
        self._report(Reports(completions=ends))

    def _report(self, said: Reports) -> None:
        body = said.model_dump_json(by_alias=True, exclude_defaults=True).encode()
        answers = ReportAnswers.model_validate_json(_expect(self._line.post(paths.REPORTS, body)))
        for answer in (*answers.starts, *answers.completions):
            if answer.status != 200:
                raise BadAnswer(f"{answer.status}: {answer.refused}")

    def close(self) -> None:
        self._line.close()


def _expect(reply: Reply) -> bytes:
    if reply.status != 200:
        raise BadAnswer(f"{reply.status}: {reply.body[:500]!r}")
    return reply.body


def _proof(claim: Claim) -> str:
    return f"{paths.ATTEMPT_HEADER}: {claim.attempt}\r\n{paths.LEASE_HEADER}: {claim.lease}\r\n"


def _named(claim: Claim) -> dict[str, Any]:
    return {"step_id": claim.step_id, "attempt": claim.attempt, "lease": claim.lease}


def _work(runner: NoopRunner, slots: int, together: bool) -> int:
    """Take steps until none are left; returns how many it were."""
    done = 0
    while claims := runner.acquire(slots):
        if together:
            runner.start_all(claims)
            runner.complete_all(claims)
        else:
            for claim in claims:
                runner.start(claim)
                runner.complete(claim)
        done += len(claims)
    runner.close()
    return done


def main(host: str, port: int, slots: int, together: bool, keys: list[str]) -> None:
    runners = [NoopRunner(host, port, key) for key in keys]
    with ThreadPoolExecutor(len(runners)) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        done = list(pool.map(partial(_work, slots=slots, together=together), runners, timeout=LONGEST_S))
    print(json.dumps({"began": began, "ended": time.monotonic(), "done": sum(done)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == TOGETHER, sys.argv[5:])
