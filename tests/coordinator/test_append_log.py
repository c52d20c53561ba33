"""A log grows byte for byte as it was sent, whatever is sent twice, too early, too late or not at all."""

import gzip
import hashlib
from typing import Any

import pytest

from coordinator.settings import Settings
from tests.factories import ON_SQLITE, Api, HeldOverHttp, together


@pytest.fixture
def held(api: Api) -> HeldOverHttp:
    return api.a_running_step()


def log_of(held: HeldOverHttp) -> bytes:
    answer = held.client.get(f"/api/steps/{held.step_id}/log")
    assert answer.status_code == 200
    return answer.content


def test_bytes_at_the_end_are_appended(held: HeldOverHttp) -> None:
    assert held.append(0, b"one\n").json() == {"size": 4, "action": "continue"}
    assert held.append(4, b"two\n").json() == {"size": 8, "action": "continue"}

    assert log_of(held) == b"one\ntwo\n"


@ON_SQLITE
def test_bytes_are_kept_as_they_came(held: HeldOverHttp) -> None:
    data = bytes(range(256)) * 3

    held.append(0, data)

    assert log_of(held) == data


@pytest.mark.parametrize(
    ("offset", "data", "size"),
    [
        (0, b"hello\n", 6),  # all of it again
        (2, b"llo\n", 6),  # a part again
        (0, b"he", 6),  # a shorter part
        (4, b"o\nworld\n", 12),  # overlapping the end
        (0, b"hello\nworld\n", 12),
        (6, b"", 6),
        (0, b"", 6),
    ],
)
def test_what_was_sent_before_changes_nothing(
    held: HeldOverHttp, offset: int, data: bytes, size: int
) -> None:
    held.append(0, b"hello\n")

    answer = held.append(offset, data)

    assert (answer.status_code, answer.json()["size"]) == (200, size)
    assert log_of(held) == b"hello\nworld\n"[:size]


@pytest.mark.parametrize(("offset", "data"), [(0, b"jello\n"), (5, b"X"), (4, b"o?more"), (0, b"hello\r\n")])
def test_other_bytes_at_a_place_that_is_taken_are_refused(
    held: HeldOverHttp, offset: int, data: bytes
) -> None:
    held.append(0, b"hello\n")

    answer = held.append(offset, data)

    assert answer.status_code == 409
    assert (answer.json()["code"], answer.json()["size"]) == ("log_conflict", 6)
    assert log_of(held) == b"hello\n"


def test_a_gap_is_refused_and_says_where_the_log_ends(held: HeldOverHttp) -> None:
    held.append(0, b"hello\n")

    answer = held.append(7, b"x")

    assert answer.status_code == 416
    assert (answer.json()["code"], answer.json()["size"]) == ("log_gap", 6)


@ON_SQLITE
@pytest.mark.threat("L08")
@pytest.mark.parametrize(
    "offset", ["-1", str(2**63), str(2**64), str(10**30), "1e3", "0x1", "+1", "", " ", "1.0"]
)
def test_an_offset_that_is_none_is_refused(held: HeldOverHttp, offset: str) -> None:
    assert held.append(offset, b"x").status_code == 400
    assert log_of(held) == b""


@ON_SQLITE
@pytest.mark.threat("L09")
@pytest.mark.parametrize("query", ["", "?offset=0&offset=1", "?offset[]=0", "?offset=0&more=1"])
def test_an_offset_is_given_once_and_nothing_else(held: HeldOverHttp, query: str) -> None:
    answer = held.client.post(held.path("log") + query, content=b"x", headers=held.headers)

    assert answer.status_code == 400


def test_a_huge_offset_is_a_gap(held: HeldOverHttp) -> None:
    assert held.append(2**53, b"x").status_code == 416


def test_a_compressed_piece_is_inflated(held: HeldOverHttp) -> None:
    data = b"line\n" * 10_000

    answer = held.append(0, gzip.compress(data), **{"Content-Encoding": "gzip"})

    assert answer.json()["size"] == len(data)
    assert log_of(held) == data


@ON_SQLITE
@pytest.mark.parametrize(
    "body",
    [
        b"no gzip",
        gzip.compress(b"x" * 100, mtime=0)[:-4],
        gzip.compress(b"x", mtime=0) + b"more",
        gzip.compress(b"x", mtime=0) * 2,
        b"",
    ],
)
def test_what_is_not_one_whole_stream_of_gzip_is_refused(held: HeldOverHttp, body: bytes) -> None:
    answer = held.append(0, body, **{"Content-Encoding": "gzip"})

    assert answer.status_code == 400
    assert log_of(held) == b""


@ON_SQLITE
@pytest.mark.parametrize("encoding", ["deflate", "br", "gzip, gzip", "zstd"])
def test_no_other_compression_is_taken(held: HeldOverHttp, encoding: str) -> None:
    assert held.append(0, b"x", **{"Content-Encoding": encoding}).status_code == 415


@ON_SQLITE
@pytest.mark.threat("D14")
def test_a_small_body_that_inflates_beyond_all_measure_is_refused(held: HeldOverHttp) -> None:
    bomb = gzip.compress(b"\0" * (64 * 1024 * 1024))
    assert len(bomb) < 100_000

    answer = held.append(0, bomb, **{"Content-Encoding": "gzip"})

    assert answer.status_code == 413
    assert answer.json()["limit"] == 8 * 1024 * 1024
    assert log_of(held) == b""


@ON_SQLITE
def test_a_piece_of_more_than_a_mebibyte_is_refused(held: HeldOverHttp) -> None:
    assert held.append(0, b"x" * (1024 * 1024)).status_code == 200
    assert held.append(1024 * 1024, b"x" * (1024 * 1024 + 1)).status_code == 413


def test_a_log_takes_so_much_and_then_one_notice(new_app: Any, new_client: Any, settings: Settings) -> None:
    limit = 65536
    app = new_app(settings.model_copy(update={"log_limit": limit}))
    held = Api(new_client(app)).a_running_step()
    held.append(0, b"x" * (limit - 4))

    answer = held.append(limit - 4, b"abcdefgh")

    assert answer.status_code == 413
    assert answer.json()["limit"] == limit
    log = log_of(held)
    assert log.startswith(b"x" * (limit - 4) + b"abcd\n[buildmill] the log limit")
    assert answer.json()["size"] == len(log)
    again = held.append(limit + 4, b"more")
    assert (again.status_code, again.json()["size"]) == (413, len(log))
    assert log_of(held).count(b"[buildmill]") == 1
    assert held.complete(logSize=limit + 8).status_code == 200
    shown = held.client.get(f"/api/builds/{held.claim['buildId']}").json()["steps"][0]["attempts"][0]
    assert (shown["logState"], shown["logSize"]) == ("truncated", len(log))
    assert shown["logSha256"] == hashlib.sha256(log).hexdigest()


def test_after_the_end_nothing_is_added(held: HeldOverHttp) -> None:
    held.append(0, b"hello\n")
    assert held.complete(logSize=6).status_code == 200

    answer = held.append(6, b"late\n")

    assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt")
    assert log_of(held) == b"hello\n"


def test_a_runner_that_did_not_hear_the_end_may_say_its_log_again(held: HeldOverHttp) -> None:
    """It was killed before the answer; who refused it would let it take its own success for another's."""
    held.append(0, b"hello\n")
    assert held.complete(logSize=6).status_code == 200

    answer = held.append(2, b"llo\n")

    assert (answer.status_code, answer.json()) == (200, {"size": 6, "action": "continue"})
    assert log_of(held) == b"hello\n"


def test_each_attempt_has_its_own_log(api: Api, held: HeldOverHttp) -> None:
    held.append(0, b"first\n")
    assert held.complete("failed", reason="internal", logSize=6).status_code == 200
    api.client.post("/api/runner/bye", headers=held.runner)

    shown = held.client.get(f"/api/steps/{held.step_id}/log?attempt=1")

    assert shown.content == b"first\n"
    assert held.append(6, b"stale\n").status_code == 409
    assert held.client.get(f"/api/steps/{held.step_id}/log?attempt=2").status_code == 404


@pytest.mark.threat("I01")
def test_nobody_else_may_write_into_a_log(api: Api, held: HeldOverHttp) -> None:
    other = api.a_runner()
    proof = {name: held.headers[name] for name in ("X-Attempt", "X-Lease")}
    path = held.path("log?offset=0")

    assert held.client.post(path, content=b"x", headers={**other, **proof}).status_code == 409
    assert held.client.post(path, content=b"x", headers=proof).status_code == 401
    assert held.client.post(path, content=b"x", headers=held.runner).status_code == 400
    wrong = {**held.headers, "X-Lease": "x" * 43}
    assert held.client.post(path, content=b"x", headers=wrong).status_code == 409
    ahead = {**held.headers, "X-Attempt": "2"}
    assert held.client.post(path, content=b"x", headers=ahead).status_code == 409
    assert log_of(held) == b""


def test_senders_that_race_leave_the_bytes_of_one_order(held: HeldOverHttp) -> None:
    whole = b"".join(b"line %d of the log\n" % number for number in range(400))
    pieces = [(start, whole[start : start + 700]) for start in range(0, len(whole), 500)]

    def send_all() -> None:
        at = 0
        while at < len(pieces):
            answer = held.append(*pieces[at])
            assert answer.status_code in (200, 416), answer.text
            if answer.status_code == 200:
                at += 1
            else:
                at = answer.json()["size"] // 500

    assert together(*[send_all] * 4) == [None] * 4

    assert log_of(held) == whole
    digest = hashlib.sha256(whole).hexdigest()
    assert held.complete(logSize=len(whole), logSha256=digest).status_code == 200


def test_the_answer_tells_of_the_cancel(api: Api, held: HeldOverHttp) -> None:
    held.client.post(f"/api/builds/{held.claim['buildId']}/cancel")

    assert held.append(0, b"x").json() == {"size": 1, "action": "cancel"}
