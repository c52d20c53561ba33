"""The only file with HTTP: one method per endpoint, an answer or an error of ours, no retries."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from runner.errors import LeaseLost, LogLimit, LogRewind, Refused, Revoked, Unauthorized, Unreachable
from runner.proof import Proof
from runner.reporter import Answered, Report, Reporter, Said
from shared import paths
from shared.protocol import (
    Acquire,
    Claims,
    Cleaned,
    Completed,
    Completion,
    CompletionReport,
    Heartbeat,
    Listen,
    LogAccepted,
    News,
    NewSecret,
    Ok,
    Orders,
    Registered,
    Registration,
    Release,
    ReportAnswers,
    ReportedCompletion,
    ReportedStart,
    Reports,
    Resume,
    SourceBound,
    SourceResolved,
    Start,
    StartAnswer,
    StartReport,
)

M = TypeVar("M", bound=BaseModel)

CHUNK = 1024 * 1024
MOST_CONNECTIONS = 64
MOST_VITAL_CONNECTIONS = 4
MAX_RETRY_AFTER_S = 600.0
_TRANSIENT = frozenset({408, 425, 429})
_UNWELCOME = frozenset({401, 403})
UNWELCOME_RETRY_S = 300.0
_UNKNOWN = "unauthenticated"
_REVOKED = "revoked"
_BLOB_GONE = "blob_gone"  # the step is still ours, and can never have its inputs
_STALE_CODES = frozenset({"stale_attempt", "abandoned", "released", "conflict"})
_GONE_CODES = frozenset({"not_found", "gone", "expired"})
SHOWN_FAULTS = 5


class Client:
    """Speaks for one runner. Any number of threads may use it."""

    def __init__(
        self, coordinator: str, secret: str = "", *, transport: httpx.BaseTransport | None = None
    ) -> None:
        def connect(most: int) -> httpx.Client:
            return httpx.Client(
                base_url=coordinator,
                headers=_headers(secret),
                timeout=httpx.Timeout(30.0, connect=5.0, write=60.0),
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=(most + 1) // 2),
                follow_redirects=False,
                trust_env=False,
                transport=transport,
            )

        self._http = connect(MOST_CONNECTIONS)
        # Uploads may take every connection there is; what keeps the attempts alive never waits for one.
        self._vital = connect(MOST_VITAL_CONNECTIONS)
        self._secret = secret
        self._is_away = False
        self._returns = 0
        self._reporter = Reporter(self._send_report, self._send_reports)

    def close(self) -> None:
        self._http.close()
        self._vital.close()

    def register(self, said: Registration, token: str) -> Registered:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._post(paths.REGISTER, said, Registered, headers=headers)

    def rotate(self, said: NewSecret) -> None:
        self._post(paths.ROTATE, said, Ok, through=self._vital)

    def use_secret(self, secret: str) -> None:
        """From the next request on; what is under way with the former one may be refused."""
        self._secret = secret
        for http in (self._http, self._vital):
            http.headers = httpx.Headers(_headers(secret))  # at once: other threads are sending

    def acquire(self, said: Acquire) -> Claims:
        answer = self._send(
            "POST",
            paths.ACQUIRE,
            through=self._vital,
            content=_body(said),
            headers=_JSON,
            timeout=float(said.wait) + 15.0,
        )
        return Claims(claims=[]) if answer.status_code == 204 else _read(answer, Claims)

    def heartbeat(self, said: Heartbeat) -> Orders:
        """Also the watch on whether the coordinator is there: others need not find out by themselves."""
        try:
            orders = self._post(paths.HEARTBEAT, said, Orders, through=self._vital)
        except Unreachable:
            self._is_away = True
            raise
        if self._is_away:
            self._is_away = False
            self._returns += 1
        return orders

    def listen(self, said: Listen) -> News | None:
        answer = self._send(
            "POST",
            paths.EVENTS,
            through=self._vital,
            content=_body(said),
            headers=_JSON,
            timeout=float(said.wait) + 15.0,
        )
        return None if answer.status_code == 204 else _read(answer, News)

    def resume(self, said: Resume) -> Orders:
        return self._post(paths.RESUME, said, Orders, through=self._vital)

    def bye(self) -> None:
        self._send("POST", paths.BYE)

    def start(self, proof: Proof, said: Start) -> StartAnswer:
        """May wait for other reports of this runner, and go with them."""
        return _expect(StartAnswer, self._reporter.tell(proof, said))

    def bind_source(self, proof: Proof, commit: str) -> str:
        said = SourceResolved(commit=commit)
        return self._post(paths.SOURCE, said, SourceBound, proof=proof).commit

    def append_log(self, proof: Proof, offset: int, data: bytes) -> LogAccepted:
        answer = self._send(
            "POST",
            paths.LOG.format(step_id=proof.step_id),
            params={"offset": offset},
            content=data,
            headers={**proof.headers(), "Content-Type": "application/octet-stream"},
        )
        return _read(answer, LogAccepted)

    def has_blob(self, proof: Proof, sha256: str) -> bool:
        answer = self._send("HEAD", _blob(proof, sha256), headers=proof.headers(), accept={404})
        return answer.status_code == 200

    def put_blob(
        self,
        proof: Proof,
        sha256: str,
        path: Path,
        size: int,
        *,
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a file whole or, when it is large, in parts that go on where the last one ended.

        `before_each` piece of it may raise and so end the sending.
        """
        if size <= paths.BLOB_PART_BYTES:
            self._put(proof, sha256, path, 0, size, size, before_each)
            return
        offset, tries = 0, 0
        while offset < size:
            end = min(size, offset + paths.BLOB_PART_BYTES)
            received = self._put(proof, sha256, path, offset, end, size, before_each)
            if received is None:
                return
            tries = 0 if received > offset else tries + 1
            if tries > 3:
                raise Unreachable(f"the upload of {sha256} does not get beyond {received} bytes")
            offset = received

    def _put(
        self,
        proof: Proof,
        sha256: str,
        path: Path,
        start: int,
        end: int,
        size: int,
        before_each: Callable[[], None],
    ) -> int | None:
        headers = {**proof.headers(), "Content-Length": str(end - start)}
        if (start, end) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        answer = self._send(
            "PUT",
            _blob(proof, sha256),
            content=_read_part(path, start, end, before_each),
            headers=headers,
            accept={308},
        )
        if answer.status_code != 308:
            return None
        received = _json(answer).get("received")
        if not isinstance(received, int) or not 0 <= received <= size:
            raise Unreachable("the coordinator does not say how much has arrived")
        return received

    def get_blob(self, proof: Proof, sha256: str, write: Callable[[bytes], None]) -> None:
        """Hand the bytes of an input to `write`, piece by piece."""
        secret = self._secret
        try:
            with self._http.stream("GET", _blob(proof, sha256), headers=proof.headers()) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refusal(answer, secret)
                for chunk in answer.iter_raw(CHUNK):  # as it is: nothing that was packed is unpacked here
                    write(chunk)
        except httpx.HTTPError as error:
            raise Unreachable(f"GET blob: {error or type(error).__name__}") from error

    def complete(self, proof: Proof, said: Completion) -> Completed:
        """May wait for other reports of this runner, and go with them."""
        return _expect(Completed, self._reporter.tell(proof, said))

    def _send_report(self, proof: Proof, said: Said) -> Answered:
        if isinstance(said, Start):
            return self._post(paths.START, said, StartAnswer, proof=proof)
        return self._post(paths.COMPLETE, said, Completed, proof=proof)

    def _send_reports(self, reports: Sequence[Report]) -> list[Answered | Exception]:
        """The answer to each, or the error that its own request would have raised."""
        starts = [report for report in reports if isinstance(report.said, Start)]
        ends = [report for report in reports if isinstance(report.said, Completion)]
        told = Reports(
            starts=[ReportedStart(**_told(report)) for report in starts],
            completions=[ReportedCompletion(**_told(report)) for report in ends],
        )
        answers = self._post(paths.REPORTS, told, ReportAnswers)
        if (len(answers.starts), len(answers.completions)) != (len(starts), len(ends)):
            raise Unreachable(f"{paths.REPORTS} did not answer each report")
        begun, ended = iter(answers.starts), iter(answers.completions)
        return [
            self._outcome(report, next(begun) if isinstance(report.said, Start) else next(ended))
            for report in reports
        ]

    def _outcome(self, report: Report, answer: StartReport | CompletionReport) -> Answered | Exception:
        if answer.answer is not None:
            return answer.answer
        what = f"the report of step {report.proof.step_id} was answered {answer.status}"
        refused = answer.refused
        if answer.status < 500 and answer.status not in _TRANSIENT and refused is not None:
            return _meaning(answer.status, refused.model_dump(exclude_none=True), what)
        wished = refused.retry_after if refused is not None else None
        wished_s = None if wished is None else min(float(wished), MAX_RETRY_AFTER_S)
        return Unreachable(what, retry_after_s=wished_s, is_back=self._watch_for_return())

    def cleaned(self, proof: Proof, said: Cleaned) -> None:
        self._send(
            "POST",
            paths.CLEANED.format(step_id=proof.step_id),
            content=_body(said),
            headers={**_JSON, **proof.headers()},
        )

    def release(self, proof: Proof, reason: str) -> None:
        self._send(
            "POST",
            paths.RELEASE.format(step_id=proof.step_id),
            content=_body(Release(reason=reason[:200])),
            headers={**_JSON, **proof.headers()},
        )

    def _post(
        self,
        path: str,
        said: BaseModel,
        model: type[M],
        *,
        proof: Proof | None = None,
        headers: Mapping[str, str] = {},
        through: httpx.Client | None = None,
    ) -> M:
        if proof is not None:
            path = path.format(step_id=proof.step_id)
            headers = {**headers, **proof.headers()}
        answer = self._send("POST", path, through=through, content=_body(said), headers={**_JSON, **headers})
        return _read(answer, model)

    def _send(
        self,
        method: str,
        path: str,
        *,
        accept: frozenset[int] | set[int] = frozenset(),
        through: httpx.Client | None = None,
        **more: Any,
    ) -> httpx.Response:
        secret = self._secret
        try:
            answer = (through or self._http).request(method, path, **more)
        except httpx.HTTPError as error:
            what = f"{method} {path}: {error or type(error).__name__}"
            raise Unreachable(what, is_back=self._watch_for_return()) from error
        if answer.is_success or answer.status_code in accept:
            return answer
        refused = self._refusal(answer, secret)
        if isinstance(refused, Unreachable) and refused.retry_after_s is None:
            refused.is_back = self._watch_for_return()
        raise refused

    def _refusal(self, answer: httpx.Response, secret: str) -> Exception:
        refused = _error(answer)
        if isinstance(refused, Unauthorized) and self._secret != secret:
            return Unreachable(f"{refused}: it came with the former secret")  # the next one comes with ours
        return refused

    def _watch_for_return(self) -> Callable[[], bool]:
        returns = self._returns
        return lambda: self._returns > returns


_JSON = {"Content-Type": "application/json"}


def _headers(secret: str) -> dict[str, str]:
    who = {"Authorization": f"Bearer {secret}"} if secret else {}
    return {"Accept-Encoding": "identity", **who}


def _blob(proof: Proof, sha256: str) -> str:
    return paths.BLOB.format(step_id=proof.step_id, sha256=sha256)


def _body(said: BaseModel) -> bytes:
    return said.model_dump_json(by_alias=True, exclude_none=True).encode()


def _read_part(path: Path, start: int, end: int, before_each: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = end - start
        while left > 0 and (data := file.read(min(CHUNK, left))):
            before_each()
            left -= len(data)
            yield data


def _read(answer: httpx.Response, model: type[M]) -> M:
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        raise Unreachable(f"{answer.request.url.path} answered what cannot be read") from error


def _expect(model: type[M], answer: Answered) -> M:
    if not isinstance(answer, model):
        raise Unreachable(f"the coordinator answered {type(answer).__name__} where {model.__name__} is due")
    return answer


def _told(report: Report) -> dict[str, Any]:
    proof = {"step_id": report.proof.step_id, "attempt": report.proof.attempt, "lease": report.proof.lease}
    return {name: getattr(report.said, name) for name in report.said.model_fields_set} | proof


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        said = json.loads(answer.content)
    except ValueError as error:
        raise Unreachable(f"{answer.request.url.path} answered {answer.status_code} without JSON") from error
    return said if isinstance(said, dict) else {}


def _error(answer: httpx.Response) -> Exception:
    """What an answer that is no success means for the caller: the one place where that is decided.

    A body that is not ours comes from something in between, whatever its status: try again.
    """
    status = answer.status_code
    what = f"{answer.request.method} {answer.request.url.path} answered {status}"
    if status >= 500 or status in _TRANSIENT:
        return Unreachable(what, retry_after_s=_retry_after(answer))
    if answer.request.method == "HEAD":
        return LeaseLost(what) if status == 409 else Unreachable(what)  # no body says whose word it is
    try:
        said = _json(answer)
    except Unreachable as error:
        return error
    return _meaning(status, said, what)


def _meaning(status: int, said: dict[str, Any], what: str) -> Exception:
    """The same for a status below 500 and the body that came with it."""
    if not _is_ours(said):
        return Unreachable(f"{what} in words that are not the coordinator's")
    code, sentence = str(said["code"]), str(said["error"])
    size = said.get("size")
    if (status, code) == (401, _REVOKED):
        return Revoked(f"{what}: {sentence}", retry_after_s=UNWELCOME_RETRY_S)
    if status in _UNWELCOME:
        is_unknown = (status, code) == (401, _UNKNOWN)
        return Unauthorized(f"{what}: {sentence}", retry_after_s=UNWELCOME_RETRY_S, is_unknown=is_unknown)
    if isinstance(size, int) and code in ("log_incomplete", "log_conflict", "log_gap"):
        return LogRewind(size)
    if status == 413 and "limit" in said:
        return LogLimit(int(said["limit"]), size if isinstance(size, int) else 0)
    if status in (404, 410) and code != _BLOB_GONE:
        lost = code in _GONE_CODES
        return LeaseLost(f"{what}: {sentence}") if lost else Unreachable(f"{what}: {code}, {sentence}")
    if status == 409 and code in _STALE_CODES:
        return LeaseLost(f"{what}: {sentence}")
    return Refused(f"{what}: {sentence}{_named_faults(said['details'])}", status=status, code=code)


def _named_faults(details: list[Any]) -> str:
    """The first few faults that a refusal names, to stand behind its sentence."""
    named = [fault for fault in details[:SHOWN_FAULTS] if isinstance(fault, dict)]
    told = "; ".join(f"{fault.get('path')}: {fault.get('reason')}"[:300] for fault in named)
    return f" ({told})" if told else ""


def _is_ours(said: dict[str, Any]) -> bool:
    """Every refusal of the coordinator has these three; gateways have words of their own."""
    return (
        isinstance(said.get("error"), str)
        and isinstance(said.get("code"), str)
        and isinstance(said.get("details"), list)
    )


def _retry_after(answer: httpx.Response) -> float | None:
    said = answer.headers.get("retry-after", "")
    return min(float(said), MAX_RETRY_AFTER_S) if said.isascii() and said.isdigit() else None
