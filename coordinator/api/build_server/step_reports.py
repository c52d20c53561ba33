"""What a runner tells of its attempts: that one starts, that one is over, or both of several at once."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from coordinator.actions.append_log import forget_log
from coordinator.actions.check_completion import EMPTY_LOG, SealedLog
from coordinator.actions.complete_step import Verdict, complete_bare_step, complete_step, log_to_seal
from coordinator.actions.leased_step import LeaseProof
from coordinator.actions.start_step import start_step
from coordinator.actions.take_reports import Told, take_reports
from coordinator.api.build_server.shapes import STEP_STATUS
from coordinator.api.endpoint import Call, json_answer
from coordinator.api.problems import Refusal
from coordinator.bell import READY, log_topic
from coordinator.errors import CoordinatorError, LogIncomplete
from shared.protocol import (
    Completed,
    Completion,
    CompletionReport,
    Refused,
    RefusedDetail,
    ReportAnswers,
    ReportedCompletion,
    ReportedStart,
    Reports,
    Start,
    StartAnswer,
    StartReport,
)

MOST_OUTPUTS_AT_ONCE = 50
SUCCESS = "success"
Reported = ReportedStart | ReportedCompletion
Answered = StartAnswer | Completed | Refusal


async def start(call: Call, step_id: str, proof: LeaseProof, said: Start) -> StartAnswer:
    """One attempt is about to run its script."""
    # a later attempt may end the log of one that was lost, and the event loop should wait for no file
    write = call.write_shortly if proof.attempt == 1 else call.write
    return await write(start_step, call.state.site, call.caller, step_id, proof, said)


async def complete(call: Call, step_id: str, proof: LeaseProof | None, said: Completion) -> Completed:
    """One attempt is over; without a proof, the step of a caller that holds no lease."""
    site = call.state.site
    if proof is None:
        verdict = await call.write(complete_bare_step, site, call.caller, step_id, said)
    else:
        sealed = await _seal(call, step_id, proof, said)
        write = call.write if _takes_long(said, proof, sealed) else call.write_shortly
        verdict = await write(complete_step, site, call.caller, step_id, proof, said, sealed)
    return _completed(call, step_id, said.status, verdict)


async def answer_reports(call: Call) -> Response:
    """Each report as if it had come alone, and what is plain in one transaction."""
    reports: Reports = call.body
    said: list[Reported] = [*reports.starts, *reports.completions]
    plain = await _take_plain(call, said)
    others = [place for place in range(len(said)) if place not in plain]
    alone = await asyncio.gather(*(_answer_alone(call, said[place]) for place in others))
    answers = plain | dict(zip(others, alone, strict=True))
    count = len(reports.starts)
    return json_answer(
        ReportAnswers(
            starts=[_start_report(answers[place]) for place in range(count)],
            completions=[_completion_report(answers[place]) for place in range(count, len(said))],
        )
    )


async def _take_plain(call: Call, said: Sequence[Reported]) -> dict[int, Answered]:
    """The answers of those that went together, by their place; nothing when that was refused."""
    logs = await _seal_each(call, said)
    told = {
        place: Told(report.step_id, _proof(report), report, logs[place])
        for place, report in enumerate(said)
        if place in logs
    }
    if not told:
        return {}
    try:
        taken = await call.write(take_reports, call.state.site, call.caller, told, weight=len(told))
    except CoordinatorError:
        return {}  # each is told by itself, and hears why
    return {
        place: _completed(call, told[place].step_id, SUCCESS, outcome)
        if isinstance(outcome, Verdict)
        else outcome
        for place, outcome in taken.items()
    }


async def _answer_alone(call: Call, report: Reported) -> Answered:
    try:
        if isinstance(report, ReportedStart):
            return await start(call, report.step_id, _proof(report), report)
        return await complete(call, report.step_id, _proof(report), report)
    except Exception as error:  # noqa: BLE001 - it is answered, and is no matter of the other reports
        return await call.refuse(error)


def _proof(report: Reported) -> LeaseProof:
    return LeaseProof(report.attempt, report.lease)


def _start_report(answer: Any) -> StartReport:
    if isinstance(answer, Refusal):
        return StartReport(status=answer.status, refused=_refused(answer))
    return StartReport(status=200, answer=answer)


def _completion_report(answer: Any) -> CompletionReport:
    if isinstance(answer, Refusal):
        return CompletionReport(status=answer.status, refused=_refused(answer))
    return CompletionReport(status=200, answer=answer)


def _refused(refusal: Refusal) -> Refused:
    details = [RefusedDetail(path=fault.path, reason=fault.reason) for fault in refusal.details]
    return Refused(error=refusal.sentence, code=refusal.code, details=details, **refusal.extra)


def _takes_long(said: Completion, proof: LeaseProof, sealed: SealedLog) -> bool:
    """True when the event loop should not wait for its transaction: many rows, or a line in a log.

    A later attempt that ends before it starts may end the log of one that was lost before it.
    """
    is_log_unsaid = said.log_size is None and sealed.size > 0
    is_log_ended = said.log_gap is not None or is_log_unsaid or proof.attempt > 1
    return is_log_ended or len(said.artifacts) > MOST_OUTPUTS_AT_ONCE


async def _seal_each(call: Call, said: Sequence[Reported]) -> dict[int, SealedLog]:
    """The logs by place, without those that cannot be sealed: their reports are told alone."""
    needed = {
        place: report
        for place, report in enumerate(said)
        if isinstance(report, ReportedCompletion) and report.log_size != 0
    }
    sealed = await asyncio.gather(*(_seal_if_possible(call, report) for report in needed.values()))
    logs: dict[int, SealedLog | None] = dict.fromkeys(range(len(said)), EMPTY_LOG)
    logs |= zip(needed, sealed, strict=True)
    return {place: log for place, log in logs.items() if log is not None}


async def _seal_if_possible(call: Call, report: ReportedCompletion) -> SealedLog | None:
    try:
        return await _seal(call, report.step_id, _proof(report), report)
    except CoordinatorError:
        return None


async def _seal(call: Call, step_id: str, proof: LeaseProof, said: Completion) -> SealedLog:
    """Force the log to the disk, and see what it is there."""
    if said.log_size == 0:
        return EMPTY_LOG
    step = (call.state.site, call.caller, step_id, proof)
    size, path = await call.read(log_to_seal, *step)
    digest = await asyncio.to_thread(call.state.site.logs.seal, path, size)
    if said.log_sha256 and said.log_size == size and said.log_sha256 != digest:
        # as long as the runner's and not the same: it was spoilt on our disk, so ask for all of it again
        await call.change(forget_log, *step)
        raise LogIncomplete(0)
    return SealedLog(size, digest)


def _completed(call: Call, step_id: str, status: str, verdict: Verdict) -> Completed:
    """The answer; who waits for something to do, or for the log, hears of it."""
    call.state.tally.completions[status] += 1
    call.state.bell.ring(READY, log_topic(step_id))
    return Completed(
        success=verdict.is_same,
        step_status=STEP_STATUS[verdict.state],
        build_complete=verdict.is_build_complete,
    )
