"""What a runner tells of its attempts: that one starts, that one is over, or both of several at once."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import structlog
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
from coordinator.errors import LogIncomplete
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
OUTPUTS_OF_AN_ACTION = 10  # so many rows take about as long as a usual action
SUCCESS = "success"
log = structlog.get_logger()
Reported = ReportedStart | ReportedCompletion
Answered = StartAnswer | Completed | Refusal
R = TypeVar("R", StartReport, CompletionReport)


async def start(call: Call, step_id: str, proof: LeaseProof, said: Start) -> StartAnswer:
    """One attempt is about to run its script."""
    # a later attempt may end the log of one that was lost, and the event loop should wait for no file
    write = call.write_shortly if proof.attempt == 1 else call.write
    return await write(start_step, call.state.site, call.caller, step_id, proof, said)


async def complete(
    call: Call, step_id: str, proof: LeaseProof | None, said: Completion, sealed: SealedLog | None = None
) -> Completed:
    """One attempt is over; without a proof, the step of a caller that holds no lease.

    `sealed` is its log, where that is known already.
    """
    site = call.state.site
    if proof is None:
        verdict = await call.write(complete_bare_step, site, call.caller, step_id, said)
    else:
        sealed = sealed or await _seal(call, step_id, proof, said)
        write = call.write if _takes_long(said, proof, sealed) else call.write_shortly
        verdict = await write(complete_step, site, call.caller, step_id, proof, said, sealed)
    return _completed(call, step_id, said.status, verdict)


async def answer_reports(call: Call) -> Response:
    """Each report as if it had come alone, and what is plain in one transaction."""
    reports: Reports = call.body
    said: list[Reported] = [*reports.starts, *reports.completions]
    logs = await _seal_plain(call, said)
    answers = await _take_plain(call, said, logs)
    others = [place for place in range(len(said)) if place not in answers]
    alone = await asyncio.gather(*(_answer_alone(call, said[place], logs.get(place)) for place in others))
    answers |= zip(others, alone, strict=True)
    count = len(reports.starts)
    return json_answer(
        ReportAnswers(
            starts=[_report(StartReport, answers[place]) for place in range(count)],
            completions=[_report(CompletionReport, answers[place]) for place in range(count, len(said))],
        )
    )


async def _take_plain(
    call: Call, said: Sequence[Reported], logs: Mapping[int, SealedLog]
) -> dict[int, Answered]:
    """The answers of those that went together, by their place; nothing when that came to nothing."""
    told = {
        place: Told(said[place].step_id, _proof(said[place]), said[place], sealed)
        for place, sealed in logs.items()
    }
    if not told:
        return {}
    try:
        taken = await call.write(take_reports, call.state.site, call.caller, told, weight=_weight_of(said))
    except Exception as error:  # noqa: BLE001 - each is told by itself, and hears why
        log.info("reports_not_taken_together", count=len(told), cause=str(error))
        return {}
    return {
        place: _completed(call, told[place].step_id, SUCCESS, outcome)
        if isinstance(outcome, Verdict)
        else outcome
        for place, outcome in taken.items()
    }


def _weight_of(said: Sequence[Reported]) -> int:
    outputs = sum(len(report.artifacts) for report in said if isinstance(report, ReportedCompletion))
    return len(said) + outputs // OUTPUTS_OF_AN_ACTION


async def _answer_alone(call: Call, report: Reported, sealed: SealedLog | None) -> Answered:
    try:
        if isinstance(report, ReportedStart):
            return await start(call, report.step_id, _proof(report), report)
        return await complete(call, report.step_id, _proof(report), report, sealed)
    except Exception as error:  # noqa: BLE001 - it is answered, and is no matter of the other reports
        return await call.refuse(error)


def _proof(report: Reported) -> LeaseProof:
    return LeaseProof(report.attempt, report.lease)


def _report(model: type[R], answer: Any) -> R:
    if isinstance(answer, Refusal):
        return model(status=answer.status, refused=_refused(answer))
    return model(status=200, answer=answer)


def _refused(refusal: Refusal) -> Refused:
    details = [RefusedDetail(path=fault.path, reason=fault.reason) for fault in refusal.details]
    wished = refusal.headers.get("Retry-After")
    return Refused(
        error=refusal.sentence,
        code=refusal.code,
        details=details,
        retry_after=int(wished) if wished else None,
        **refusal.extra,
    )


def _takes_long(said: Completion, proof: LeaseProof, sealed: SealedLog) -> bool:
    """True when the event loop should not wait for its transaction: many rows, or a line in a log.

    A later attempt that ends before it starts may end the log of one that was lost before it.
    """
    is_log_unsaid = said.log_size is None and sealed.size > 0
    is_log_ended = said.log_gap is not None or is_log_unsaid or proof.attempt > 1
    return is_log_ended or len(said.artifacts) > MOST_OUTPUTS_AT_ONCE


async def _seal_plain(call: Call, said: Sequence[Reported]) -> dict[int, SealedLog]:
    """The logs, by place, of the reports that may go together; of a start it is empty."""
    logs: dict[int, SealedLog | None] = {}
    needed: dict[int, ReportedCompletion] = {}
    for place, report in enumerate(said):
        if isinstance(report, ReportedStart) or (_may_be_plain(report) and report.log_size == 0):
            logs[place] = EMPTY_LOG
        elif _may_be_plain(report):
            needed[place] = report
    sealed = await asyncio.gather(*(_seal_if_possible(call, report) for report in needed.values()))
    logs |= zip(needed, sealed, strict=True)
    return {place: found for place, found in logs.items() if found is not None}


def _may_be_plain(report: ReportedCompletion) -> bool:
    """Of what can be seen before its step is: the rest is told by itself."""
    is_whole = report.log_size is not None and not report.log_gap
    return report.status == SUCCESS and is_whole and len(report.artifacts) <= MOST_OUTPUTS_AT_ONCE


async def _seal_if_possible(call: Call, report: ReportedCompletion) -> SealedLog | None:
    """None when it cannot be sealed: told by itself the report hears why."""
    try:
        return await _seal(call, report.step_id, _proof(report), report)
    except Exception as error:  # noqa: BLE001 - as it says above
        log.info("log_not_sealed", step=report.step_id, cause=str(error))
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
