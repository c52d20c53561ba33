"""The runner protocol: enrolment, leases, logs, blobs and completions."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from coordinator.actions.acquire_steps import acquire_steps, may_wait
from coordinator.actions.append_log import Appended
from coordinator.actions.append_log import append_log as append_log_action
from coordinator.actions.bind_source import bind_source as bind_source_action
from coordinator.actions.complete_step import require_step
from coordinator.actions.hear_stops import hear_stops
from coordinator.actions.record_cleaning import record_cleaning as record_cleaning_action
from coordinator.actions.register_runner import register_runner as register_runner_action
from coordinator.actions.release_step import release_step as release_step_action
from coordinator.actions.renew_leases import renew_leases, resume_attempts
from coordinator.actions.say_bye import say_bye as say_bye_action
from coordinator.actions.show_script import show_script
from coordinator.actions.store_blob import expect_blob, find_input_blob, store_blob
from coordinator.api import streams
from coordinator.api.build_server.operations import RUNNER, error, operation
from coordinator.api.build_server.shapes import AppendQuery, ReceivedOut
from coordinator.api.build_server.step_reports import answer_reports, complete, start
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.bell import READY, STOPS, build_log_topic, log_topic
from coordinator.errors import BlobGone, Invalid, NotFound, TooLarge
from coordinator.rules.access import Audience, Policy, Scope
from shared.paths import MAX_APPEND_BYTES, SCRIPT_DIGEST_HEADER
from shared.protocol import (
    Acquire,
    Claims,
    Cleaned,
    Completed,
    Completion,
    Heartbeat,
    Listen,
    LogAccepted,
    News,
    Ok,
    Orders,
    Registered,
    Registration,
    Release,
    ReportAnswers,
    Reports,
    Resume,
    SourceBound,
    SourceResolved,
    Start,
    StartAnswer,
)
from shared.script import script_digest

MAX_INFLATED = 8 * MAX_APPEND_BYTES
LOOK_S = 2.0  # for what another coordinator, or the watch, has told a step; the bell rings for the rest
COMPLETION_BODY = 16 * 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")


async def register_runner(call: Call) -> Response:
    return json_answer(await call.write(register_runner_action, call.caller, call.body), 201)


async def acquire(call: Call) -> Response:
    """Claims at once, or as soon as there are some within the wait."""
    said: Acquire = call.body
    loop = asyncio.get_running_loop()
    deadline = loop.time() + said.wait
    nothing = Response(status_code=204, headers={"Retry-After": "1"})
    polls, runner_id = call.state.polls, call.caller.runner_id or ""
    polls.take(runner_id, now=loop.time())
    while True:
        ear = call.state.bell.listen(READY)
        try:
            claims = await call.write(acquire_steps, call.state.site, call.caller, said)
            if claims:
                call.state.tally.claims += len(claims)
                polls.give_back(runner_id, now=loop.time())
                return json_answer(Claims(claims=claims))
            left = deadline - loop.time()
            if left <= 0 or call.state.bell.is_closed or not await call.read(may_wait, call.caller, said):
                return nothing
            await ear.wait(min(left, 1.0))
            if await call.request.is_disconnected():
                return nothing  # a step is not for who is gone
        finally:
            ear.close()


async def heartbeat(call: Call) -> Response:
    return json_answer(await call.write_shortly(renew_leases, call.state.site, call.caller, call.body))


async def events(call: Call) -> Response:
    """News at once, or as soon as one of the runner's steps is to stop; none within the wait is 204."""
    said: Listen = call.body
    loop = asyncio.get_running_loop()
    deadline = loop.time() + said.wait
    call.state.polls.take(call.caller.runner_id or "", now=loop.time())
    while True:
        ear = call.state.bell.listen(STOPS)
        try:
            news = await call.read(hear_stops, call.caller, said)
            if news is not None:
                return json_answer(news)
            left = deadline - loop.time()
            if left <= 0 or call.state.bell.is_closed:
                return Response(status_code=204)
            await ear.wait(min(left, LOOK_S))
            if await call.request.is_disconnected():
                return Response(status_code=204)
        finally:
            ear.close()


async def resume(call: Call) -> Response:
    return json_answer(await call.write(resume_attempts, call.state.site, call.caller, call.body))


async def bye(call: Call) -> Response:
    await call.write(say_bye_action, call.state.site, call.caller)
    call.state.bell.ring(READY)
    return json_answer(Ok())


async def get_step_script(call: Call) -> Response:
    text = await call.read(show_script, call.state.site, call.caller, call.path["stepId"], call.maybe_proof())
    digest = script_digest(text)
    return Response(
        text,
        media_type="text/plain",
        headers={"ETag": f'"{digest}"', SCRIPT_DIGEST_HEADER: digest},
    )


async def start_step(call: Call) -> Response:
    return json_answer(await start(call, call.path["stepId"], call.proof(), call.body))


async def bind_source(call: Call) -> Response:
    commit = await call.write(
        bind_source_action,
        call.state.site,
        call.caller,
        call.path["stepId"],
        call.proof(),
        commit=call.body.commit,
    )
    return json_answer(SourceBound(commit=commit))


async def append_log(call: Call) -> Response:
    data = await streams.read_append(
        call.request,
        limit=MAX_APPEND_BYTES,
        inflated_limit=MAX_INFLATED,
        deadline_s=call.state.settings.body_deadline,
    )
    step_id = call.path["stepId"]
    appended: Appended = await call.write(
        append_log_action,
        call.state.site,
        call.caller,
        step_id,
        call.proof(),
        offset=call.query.offset,
        data=data,
    )
    call.state.bell.ring(log_topic(step_id))
    if appended.build_id is not None:
        call.state.bell.ring(build_log_topic(appended.build_id))
    if appended.is_full:
        limit = call.state.settings.log_limit
        raise TooLarge(f"the log limit of {limit} bytes is reached", limit=limit, size=appended.size)
    return json_answer(LogAccepted(size=appended.size, action=appended.action))


def _digest(call: Call) -> str:
    if not _SHA256.fullmatch(call.path["sha256"]):
        raise NotFound("no such blob")
    return call.path["sha256"]


async def has_blob(call: Call) -> Response:
    _, is_there = await call.read(
        expect_blob, call.state.site, call.caller, call.path["stepId"], call.proof(), _digest(call), size=0
    )
    return Response(status_code=200 if is_there else 404)


async def put_blob(call: Call) -> Response:
    """The bytes of an output, whole or in parts; visible only once a completion names them."""
    sha256, site = _digest(call), call.state.site
    part = streams.content_range(call.request)
    size = part[2] if part else _content_length(call)
    step = (site, call.caller, call.path["stepId"], call.proof(), sha256)
    _, is_there = await call.read(expect_blob, *step, size=size)
    if is_there:
        return json_answer(Ok())
    received = await _receive(call, sha256, size, part)
    if received is not None:
        return received
    await call.write(store_blob, *step, size=size)
    return json_answer(Ok(), 201)


async def _receive(call: Call, sha256: str, size: int, part: tuple[int, int, int] | None) -> Response | None:
    """Take the bytes in; None when the blob is whole and stored, else the answer that asks for more."""
    blobs = call.state.site.blobs
    # not in a thread: given up meanwhile, nobody would let go of what the thread has locked
    step_id, attempt = call.path["stepId"], call.proof().attempt
    incoming = blobs.part(step_id, attempt, sha256) if part else blobs.incoming()
    try:
        if part and part[0] != incoming.received:
            return _received(incoming.received)
        expected = part[1] - part[0] + 1 if part else size
        before = incoming.received
        async for chunk in streams.receive_chunks(call.request, limit=expected):
            await asyncio.to_thread(incoming.write, chunk)
        if incoming.received - before != expected:
            raise Invalid(f"{incoming.received - before} bytes came where {expected} were announced")
        if incoming.received < size:
            return _received(incoming.received)
        await asyncio.to_thread(incoming.commit, sha256)
        return None
    finally:
        await asyncio.to_thread(incoming.release)


def _received(size: int) -> Response:
    return json_answer(ReceivedOut(received=size), 308)


def _content_length(call: Call) -> int:
    said = call.request.headers.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,16}", said):
        raise Invalid("a Content-Length header is needed")
    return int(said)


async def get_blob(call: Call) -> Response:
    sha256, site = _digest(call), call.state.site
    size = await call.read(find_input_blob, site, call.caller, call.path["stepId"], call.proof(), sha256)
    if not await asyncio.to_thread(site.blobs.has, sha256, size):
        raise BlobGone("the bytes of this blob are gone")
    return streams.file_answer(
        call.request,
        site.blobs.path(sha256),
        size,
        media_type="application/octet-stream",
        headers={},
        etag=sha256,
    )


async def require_bare_step(call: Call) -> None:
    """An unknown step is 404 whatever the body of a caller without a lease holds."""
    if call.maybe_proof() is None:
        await call.read(require_step, call.caller, call.path["stepId"])


async def complete_step(call: Call) -> Response:
    return json_answer(await complete(call, call.path["stepId"], call.maybe_proof(), call.body))


async def record_cleaning(call: Call) -> Response:
    await call.write(
        record_cleaning_action,
        call.state.site,
        call.caller,
        call.path["stepId"],
        call.proof(),
        call.body,
    )
    return json_answer(Ok())


async def release_step(call: Call) -> Response:
    await call.write(
        release_step_action,
        call.state.site,
        call.caller,
        call.path["stepId"],
        call.proof(),
        reason=call.body.reason,
    )
    call.state.bell.ring(READY)
    return json_answer(Ok())


_STALE = {409: error("The attempt is not current, or not yours")}
_LEASED: Mapping[str, Any] = {"tag": "Runner", "policy": Policy(RUNNER, "runner:work"), "errors": _STALE}
_STEP = Policy(Audience.STEP, "step:complete", Scope.RESOURCE)

ENDPOINTS: list[Endpoint] = [
    operation(
        "POST",
        "/api/runners",
        register_runner,
        "Register a runner",
        description="The runner's secret is shown in this answer and nowhere else.",
        tag="Runner",
        policy=Policy(Audience.ENROLMENT, "runner:register"),
        body=Registration,
        ok={201: Answer("The runner's identity", Registered)},
    ),
    operation(
        "POST",
        "/api/runner/acquire",
        acquire,
        "Take ready steps",
        body=Acquire,
        ok={200: Answer("Steps for this runner", Claims), 204: Answer("None now")},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/heartbeat",
        heartbeat,
        "Say that the runner and its attempts are alive",
        body=Heartbeat,
        ok={200: Answer("What to do with each attempt", Orders)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/events",
        events,
        "Wait until an attempt is to stop",
        body=Listen,
        ok={200: Answer("The next heartbeat says which", News), 204: Answer("None within the wait")},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/resume",
        resume,
        "Take over from a former process of this runner",
        body=Resume,
        ok={200: Answer("What to do with each attempt", Orders)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/bye",
        bye,
        "Leave; claims that were not begun are ready again",
        ok={200: Answer("Done", Ok)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/reports",
        answer_reports,
        "Start and complete several attempts at once",
        description="Each report counts by itself, and is answered as its own request would be.",
        body=Reports,
        body_limit=COMPLETION_BODY,
        ok={200: Answer("An answer for each report, in their order", ReportAnswers)},
        **_LEASED,
    ),
    operation(
        "GET",
        "/api/runner/{stepId}",
        get_step_script,
        "Get build step script",
        description="Returns the bash script for a build step that workers will execute",
        tag="Runner",
        policy=Policy(Audience.STEP, "step:read", Scope.RESOURCE),
        ok={200: Answer("Bash script for the build step", str, "text/plain")},
        errors=_STALE,
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/complete",
        complete_step,
        "Complete a build step",
        description="Marks a build step as completed and updates the build status",
        tag="Runner",
        policy=_STEP,
        before_body=require_bare_step,
        body=Completion,
        body_limit=COMPLETION_BODY,
        ok={200: Answer("Step completed successfully", Completed)},
        errors=_STALE,
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/start",
        start_step,
        "Say that the script is about to run",
        body=Start,
        ok={200: Answer("Go, or not", StartAnswer)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/source",
        bind_source,
        "Name the commit a branch stands for",
        body=SourceResolved,
        ok={200: Answer("The commit that binds the build", SourceBound)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/log",
        append_log,
        "Append to the log",
        query=AppendQuery,
        takes_stream=True,
        ok={200: Answer("How long the log is now", LogAccepted)},
        **{**_LEASED, "errors": {**_STALE, 416: error("Bytes before this offset are missing")}},
    ),
    operation(
        "HEAD",
        "/api/runner/{stepId}/blobs/{sha256}",
        has_blob,
        "Ask whether a blob is there",
        ok={200: Answer("It is")},
        takes_stream=True,
        **_LEASED,
    ),
    operation(
        "PUT",
        "/api/runner/{stepId}/blobs/{sha256}",
        put_blob,
        "Upload a blob, whole or in parts",
        takes_stream=True,
        ok={
            200: Answer("It is there already", Ok),
            201: Answer("Stored", Ok),
            308: Answer("So many bytes have arrived; send the rest", ReceivedOut),
        },
        **{**_LEASED, "errors": {**_STALE, 422: error("The bytes have another digest")}},
    ),
    operation(
        "GET",
        "/api/runner/{stepId}/blobs/{sha256}",
        get_blob,
        "Download a blob named among the step's inputs",
        ok={
            200: Answer("The bytes", bytes, "application/octet-stream"),
            206: Answer("The range of bytes that was asked for", bytes, "application/octet-stream"),
            304: Answer("Not changed"),
        },
        **{**_LEASED, "errors": {**_STALE, 416: error("The range lies outside the blob")}},
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/cleaned",
        record_cleaning,
        "Say that what an attempt needed is gone",
        description="Also of an attempt that has ended, or that another has replaced. "
        "Ages are seconds before now.",
        body=Cleaned,
        ok={200: Answer("Written down", Ok)},
        **_LEASED,
    ),
    operation(
        "POST",
        "/api/runner/{stepId}/release",
        release_step,
        "Give the step back before any of its script has run",
        body=Release,
        ok={200: Answer("Done", Ok)},
        **_LEASED,
    ),
]
