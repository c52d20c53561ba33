"""What each answer of the coordinator, or of something in between, means for the runner."""

import gzip
import hashlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from runner.client import Client
from runner.errors import LeaseLost, LogLimit, LogRewind, Refused, Revoked, Unauthorized, Unreachable
from runner.proof import Proof
from shared.paths import BLOB_PART_BYTES
from shared.protocol import Acquire, Completion, Heartbeat, Phase, Registration, Resume, Start
from tests.runner.claims import a_claim
from tests.runner.conftest import ADDRESS

PROOF = Proof("step-1", 2, "the-lease")
OURS = {"error": "a sentence", "details": []}


def complete(client):
    return client.complete(PROOF, Completion(status="success"))


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (409, {**OURS, "code": "stale_attempt"}, LeaseLost),
        (409, {**OURS, "code": "abandoned"}, LeaseLost),
        (409, {**OURS, "code": "released"}, LeaseLost),
        (404, {**OURS, "code": "not_found"}, LeaseLost),
        (410, {**OURS, "code": "gone"}, LeaseLost),
        (404, {**OURS, "code": "blob_gone"}, Refused),
        (410, {**OURS, "code": "blob_gone"}, Refused),
        (409, {**OURS, "code": "log_incomplete", "size": 7}, LogRewind),
        (409, {**OURS, "code": "log_conflict", "size": 7}, LogRewind),
        (416, {**OURS, "code": "log_gap", "size": 7}, LogRewind),
        (413, {**OURS, "code": "too_large", "limit": 100, "size": 90}, LogLimit),
        (413, {**OURS, "code": "too_large"}, Refused),
        (400, {**OURS, "code": "invalid"}, Refused),
        (422, {**OURS, "code": "digest_mismatch"}, Refused),
        (409, {**OURS, "code": "outputs_incomplete"}, Refused),
        (401, {**OURS, "code": "unauthenticated"}, Unreachable),
        (401, {**OURS, "code": "revoked"}, Revoked),
        (403, {**OURS, "code": "forbidden"}, Unreachable),
        (408, OURS, Unreachable),
        (425, OURS, Unreachable),
        (429, OURS, Unreachable),
        (500, OURS, Unreachable),
        (502, "<html>bad gateway</html>", Unreachable),
        (503, OURS, Unreachable),
        (504, "", Unreachable),
        (200, "<html>sign in to this network</html>", Unreachable),
        (200, "", Unreachable),
        (200, '{"success": true', Unreachable),
        (403, "<html>blocked by the proxy</html>", Unreachable),
        (404, "<html>not here</html>", Unreachable),
        (404, {"message": "no Route matched with those values"}, Unreachable),
        (404, {"error": "not found"}, Unreachable),
        (404, {**OURS, "code": "another_word"}, Unreachable),
        (410, {"code": "gone", "message": "gone"}, Unreachable),
        (409, {"code": "conflict"}, Unreachable),
        (400, {"message": "blocked"}, Unreachable),
        (401, {"message": "No API key found in request"}, Unreachable),
        (413, {"limit": "much"}, Unreachable),
        (409, "conflict", Unreachable),
        (400, "<html>bad request</html>", Unreachable),
        (302, "", Unreachable),
    ],
)
def test_every_answer_has_one_meaning(network, client, status, body, error):
    answer = (
        httpx.Response(status, json=body) if isinstance(body, dict) else httpx.Response(status, text=body)
    )
    network.post("/api/runner/step-1/complete").mock(return_value=answer)

    with pytest.raises(error):
        complete(client)


@pytest.mark.parametrize("failure", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_a_network_that_fails_is_never_more_than_unreachable(network, client, failure):
    network.post("/api/runner/step-1/complete").mock(side_effect=failure("the network"))

    with pytest.raises(Unreachable):
        complete(client)


@pytest.mark.parametrize(
    ("status", "said", "wished"),
    [
        (503, "7", 7.0),
        (429, "999999", 600.0),
        (503, "9" * 400, 600.0),
        (503, "\xb2", None),
        (503, "soon", None),
        (503, "", None),
        (503, "-1", None),
    ],
)
def test_the_wish_to_be_left_alone_for_a_while_is_heard(network, client, status, said, wished):
    network.post("/api/runner/step-1/complete").respond(
        status, json=OURS, headers={"Retry-After": said.encode("latin-1")}
    )

    with pytest.raises(Unreachable) as caught:
        complete(client)

    assert caught.value.retry_after_s == wished


def test_an_unknown_credential_is_tried_again_after_five_minutes(network, client):
    network.post("/api/runner/step-1/complete").respond(401, json={**OURS, "code": "unauthenticated"})

    with pytest.raises(Unreachable) as caught:
        complete(client)

    assert caught.value.retry_after_s == 300.0


def test_a_gateway_that_refuses_is_not_taken_for_the_coordinator(network, client):
    network.post("/api/runner/step-1/complete").respond(401, json={"message": "No API key found"})

    with pytest.raises(Unreachable) as caught:
        complete(client)

    assert not isinstance(caught.value, Unauthorized)
    assert caught.value.retry_after_s is None


def test_every_write_proves_its_lease_and_names_the_runner_by_its_secret(network, client):
    network.post("/api/runner/step-1/start").respond(
        200, json={"action": "go", "timeoutS": 60, "graceS": 10, "unknown": "field"}
    )

    answer = client.start(PROOF, Start(container="c"))

    sent = network.calls.last.request
    assert (answer.action, answer.timeout_s) == ("go", 60)
    assert sent.headers["authorization"] == "Bearer the-secret"
    assert (sent.headers["x-attempt"], sent.headers["x-lease"]) == ("2", "the-lease")


def test_no_secret_follows_a_redirect(network, client):
    elsewhere = network.route(host="elsewhere.test").respond(200, json={})
    network.post("/api/runner/step-1/complete").respond(307, headers={"Location": "http://elsewhere.test/"})

    with pytest.raises((Refused, Unreachable)):
        complete(client)

    assert not elsewhere.called


def test_nothing_to_do_is_no_claims(network, client):
    network.post("/api/runner/acquire").respond(204)

    assert client.acquire(Acquire(request_id="request-1", session="session-1", wait=1)).claims == []


def test_claims_are_read_whole_or_not_at_all(network, client):
    whole = a_claim().model_dump(mode="json", by_alias=True)
    said = Acquire(request_id="request-1", session="session-1")

    network.post("/api/runner/acquire").respond(200, json={"claims": [whole]})
    assert client.acquire(said).claims == [a_claim()]

    network.post("/api/runner/acquire").respond(200, json={"claims": [whole, {"stepId": "x"}]})
    with pytest.raises(Unreachable):
        client.acquire(said)


def test_bytes_of_a_log_are_sent_as_they_are(network, client):
    route = network.post("/api/runner/step-1/log", params={"offset": "5"})
    route.respond(200, json={"size": 8, "action": "cancel"})

    answer = client.append_log(PROOF, 5, b"\x00\xff\n")

    assert network.calls.last.request.content == b"\x00\xff\n"
    assert (answer.size, answer.action) == (8, "cancel")


def test_a_blob_is_there_or_not_or_nobody_knows(network, client):
    digest = "a" * 64
    route = network.head(f"/api/runner/step-1/blobs/{digest}")

    route.respond(200)
    assert client.has_blob(PROOF, digest)
    route.respond(404)
    assert not client.has_blob(PROOF, digest)
    route.respond(409)
    with pytest.raises(LeaseLost):
        client.has_blob(PROOF, digest)
    route.respond(410)
    with pytest.raises(Unreachable):
        client.has_blob(PROOF, digest)
    route.respond(503)
    with pytest.raises(Unreachable):
        client.has_blob(PROOF, digest)


def test_a_large_blob_goes_in_parts_and_on_from_where_the_coordinator_stands(network, client, tmp_path):
    size = 2 * BLOB_PART_BYTES + 5
    path = tmp_path / "blob"
    path.write_bytes(bytes(size))
    received, seen = [1000, BLOB_PART_BYTES + 1000, size], []

    def answer(request):
        seen.append(request.headers["content-range"])
        request.read()
        at = received[len(seen) - 1]
        return httpx.Response(308, json={"received": at}) if at < size else httpx.Response(201)

    network.put(f"/api/runner/step-1/blobs/{'b' * 64}").mock(side_effect=answer)

    client.put_blob(PROOF, "b" * 64, path, size)

    part = BLOB_PART_BYTES
    assert seen == [
        f"bytes 0-{part - 1}/{size}",
        f"bytes 1000-{part + 999}/{size}",
        f"bytes {part + 1000}-{size - 1}/{size}",
    ]


def test_an_upload_that_gets_nowhere_is_given_up_for_now(network, client, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(bytes(BLOB_PART_BYTES + 1))
    route = network.put(re.compile(".*/blobs/.*")).respond(308, json={"received": 0})

    with pytest.raises(Unreachable, match="does not get beyond 0 bytes"):
        client.put_blob(PROOF, "c" * 64, path, BLOB_PART_BYTES + 1)

    assert route.call_count < 10


def test_the_bytes_of_an_input_arrive_in_order(network, client):
    content = bytes(range(256)) * 5000
    digest = hashlib.sha256(content).hexdigest()
    network.get(f"/api/runner/step-1/blobs/{digest}").respond(200, content=content)
    pieces = []

    client.get_blob(PROOF, digest, pieces.append)

    assert b"".join(pieces) == content


@pytest.mark.threat("D14")
def test_an_input_that_comes_packed_is_not_unpacked(network, client):
    bomb = gzip.compress(bytes(50_000_000))
    network.get(f"/api/runner/step-1/blobs/{'0' * 64}").respond(
        200, content=bomb, headers={"Content-Encoding": "gzip"}
    )
    pieces = []

    client.get_blob(PROOF, "0" * 64, pieces.append)

    assert sum(len(piece) for piece in pieces) == len(bomb)
    assert network.calls.last.request.headers["accept-encoding"] == "identity"


def test_a_registration_shows_the_token_only_where_there_is_one(network):
    network.post("/api/runners").respond(201, json={"runnerId": "r", "runnerSecret": "s"})
    client = Client(ADDRESS)

    client.register(Registration(name="r"), "")
    assert "authorization" not in network.calls.last.request.headers
    client.register(Registration(name="r"), "token")
    assert network.calls.last.request.headers["authorization"] == "Bearer token"
    client.close()


def beat(client):
    return client.heartbeat(Heartbeat(session="session-1"))


def test_who_could_not_be_heard_is_told_when_heartbeats_are_answered_again(network, client):
    network.post(url__regex="/complete$").mock(side_effect=httpx.ConnectError("away"))
    network.post("/api/runner/heartbeat").mock(
        side_effect=[httpx.ConnectError("away"), *[httpx.Response(200, json={"attempts": []})] * 3]
    )
    with pytest.raises(Unreachable):
        beat(client)
    with pytest.raises(Unreachable) as lost:
        complete(client)

    assert not lost.value.is_back()
    beat(client)
    assert lost.value.is_back()


def test_a_request_that_fails_while_heartbeats_are_answered_keeps_its_pauses(network, client):
    network.post(url__regex="/complete$").mock(side_effect=httpx.ConnectError("cut by a proxy"))
    network.post("/api/runner/heartbeat").respond(200, json={"attempts": []})
    with pytest.raises(Unreachable) as lost:
        complete(client)

    beat(client)
    assert not lost.value.is_back()


def test_a_heartbeat_hears_orders(network, client):
    order = {"stepId": "step-1", "attempt": 2, "action": "cancel", "reason": "cancelled", "graceS": 3}
    network.post("/api/runner/heartbeat").respond(200, json={"attempts": [order], "next": 2.5})

    answer = client.heartbeat(Heartbeat(session="session-1"))

    assert (answer.next, answer.attempts[0].action, answer.attempts[0].grace_s) == (2.5, "cancel", 3)
    assert Phase.RUNNING == "running"


@pytest.fixture
def busy_server():
    """Takes requests for a log and answers them only at the end; answers all others at once."""
    is_busy, is_over = threading.Event(), threading.Event()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.partition("?")[0].endswith("/log"):
                is_busy.set()
                is_over.wait(30)
            body = b'{"attempts": [], "claims": [], "size": 1, "action": "continue"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", is_busy, is_over
    is_over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.heartbeat(Heartbeat(session="session-1")),
        lambda client: client.resume(Resume(session="session-1", attempts=[])),
        lambda client: client.acquire(Acquire(request_id="request-1", session="session-1", wait=1)),
    ],
    ids=["heartbeat", "resume", "acquire"],
)
def test_what_keeps_the_runner_alive_does_not_queue_behind_uploads(busy_server, monkeypatch, ask):
    monkeypatch.setattr("runner.client.MOST_CONNECTIONS", 1)
    address, is_busy, is_over = busy_server
    client = Client(address, "the-secret")
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(client.append_log, PROOF, 0, b"x")
        assert is_busy.wait(10)

        asked = pool.submit(ask, client)
        done, _ = wait([asked], timeout=5)

        is_over.set()
        upload.result(10)
        asked.result(10)
    client.close()
    assert done == {asked}
