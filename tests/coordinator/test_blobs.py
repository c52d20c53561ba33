"""Outputs on their way: bytes by digest, whole or in parts, for those who hold the step."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import update

from coordinator.tables import Step, table_of
from tests.factories import ON_SQLITE, Api, HeldOverHttp, Mill, a_spec, a_step, together

STEPS = table_of(Step)
DATA = b"the bytes of an output" * 100
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def held(api: Api) -> HeldOverHttp:
    return api.a_running_step()


def has(held: HeldOverHttp, sha256: str = SHA) -> bool:
    answer = held.client.head(held.path(f"blobs/{sha256}"), headers=held.headers)
    assert answer.status_code in (200, 404)
    return answer.status_code == 200


def test_a_blob_is_there_once_it_was_stored(held: HeldOverHttp) -> None:
    assert not has(held)

    assert held.put_blob(SHA, DATA).status_code == 201

    assert has(held)
    assert held.put_blob(SHA, DATA).status_code == 200


def test_an_empty_blob_is_a_blob(held: HeldOverHttp) -> None:
    empty = hashlib.sha256(b"").hexdigest()

    assert held.put_blob(empty, b"", **{"Content-Length": "0"}).status_code == 201
    assert has(held, empty)


def test_bytes_with_another_digest_are_refused_and_leave_nothing(held: HeldOverHttp, mill: Mill) -> None:
    answer = held.put_blob(SHA, DATA + b"!")

    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert not has(held)
    assert [path for path in (mill.site.data / "blobs").rglob("*") if path.is_file()] == []


def test_a_blob_may_come_in_parts(held: HeldOverHttp) -> None:
    total = len(DATA)
    cuts = [0, 1000, 1001, total]

    for start, end in pairwise(cuts):
        answer = held.put_blob(SHA, DATA[start:end], **{"Content-Range": f"bytes {start}-{end - 1}/{total}"})
        if end < total:
            assert (answer.status_code, answer.json()) == (308, {"received": end})
            assert not has(held)

    assert answer.status_code == 201
    assert has(held)


def test_a_part_at_another_place_is_told_how_far_the_blob_is(held: HeldOverHttp) -> None:
    total = len(DATA)
    held.put_blob(SHA, DATA[:1000], **{"Content-Range": f"bytes 0-999/{total}"})

    for start, end in ((0, 1000), (1500, 2000)):
        answer = held.put_blob(SHA, DATA[start:end], **{"Content-Range": f"bytes {start}-{end - 1}/{total}"})
        assert (answer.status_code, answer.json()) == (308, {"received": 1000})

    rest = held.put_blob(SHA, DATA[1000:], **{"Content-Range": f"bytes 1000-{total - 1}/{total}"})
    assert rest.status_code == 201


def test_a_part_is_refused_for_now_while_another_request_writes(held: HeldOverHttp, mill: Mill) -> None:
    whole = {"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}
    writer = mill.site.blobs.part(held.step_id, held.claim["attempt"], SHA)

    busy = held.put_blob(SHA, DATA, **whole)
    writer.release()

    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert held.put_blob(SHA, DATA, **whole).status_code == 201
    assert mill.site.blobs.path(SHA).read_bytes() == DATA


def test_two_steps_that_send_the_same_bytes_in_parts_do_not_meet(api: Api) -> None:
    api.a_build(a_spec(one=[], two=[]))
    runner = api.a_runner()
    both = [HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=2)]
    total = len(DATA)

    for held, end in zip(both, (1500, 500), strict=True):
        answer = held.put_blob(SHA, DATA[:end], **{"Content-Range": f"bytes 0-{end - 1}/{total}"})
        assert (answer.status_code, answer.json()) == (308, {"received": end})

    rest = both[0].put_blob(SHA, DATA[1500:], **{"Content-Range": f"bytes 1500-{total - 1}/{total}"})
    assert rest.status_code == 201
    assert has(both[0])


@ON_SQLITE
@pytest.mark.parametrize(
    "said",
    [
        "bytes 0-9/5",
        "bytes 5-3/10",
        "bytes */10",
        "bytes 0-9/*",
        "0-9/10",
        "bytes 0-9/" + "9" * 17,
        "bytes -1-2/3",
    ],
)
def test_a_content_range_that_is_none_is_refused(held: HeldOverHttp, said: str) -> None:
    assert held.put_blob(SHA, DATA, **{"Content-Range": said}).status_code == 400


def test_a_body_that_is_shorter_or_longer_than_announced_is_refused(held: HeldOverHttp) -> None:
    total = len(DATA)

    short = held.put_blob(SHA, DATA[:10], **{"Content-Range": f"bytes 0-999/{total}"})
    long = held.put_blob(SHA, DATA, **{"Content-Range": f"bytes 10-99/{total}"})

    assert short.status_code == 400
    assert long.status_code == 413
    assert not has(held)


def test_a_blob_beyond_the_limit_is_refused(new_app: Any, new_client: Any, settings: Any) -> None:
    app = new_app(settings.model_copy(update={"artifact_limit": 1000}))
    held = Api(new_client(app)).a_running_step()

    answer = held.put_blob(SHA, DATA)
    in_parts = held.put_blob(SHA, DATA[:10], **{"Content-Range": f"bytes 0-9/{len(DATA)}"})

    assert (answer.status_code, answer.json()["limit"]) == (413, 1000)
    assert in_parts.status_code == 413


@ON_SQLITE
@pytest.mark.parametrize("sha256", ["x", "A" * 64, "0" * 63, "..%2Fx", "0" * 64 + "0"])
def test_what_is_no_digest_is_no_blob(held: HeldOverHttp, sha256: str) -> None:
    for method in ("HEAD", "GET", "PUT"):
        answer = held.client.request(method, held.path(f"blobs/{sha256}"), headers=held.headers)
        assert answer.status_code == 404


def test_many_who_send_the_same_bytes_store_them_once(held: HeldOverHttp) -> None:
    answers = together(*[lambda: held.put_blob(SHA, DATA).status_code] * 8)

    assert set(answers) <= {200, 201}
    assert has(held)


@pytest.mark.threat("I04")
def test_who_does_not_hold_the_step_stores_and_sees_nothing(api: Api, held: HeldOverHttp) -> None:
    proof = {name: held.headers[name] for name in ("X-Attempt", "X-Lease")}
    path = held.path(f"blobs/{SHA}")
    other = {**api.a_runner(), **proof}

    for method, content in (("HEAD", b""), ("GET", b""), ("PUT", DATA)):
        assert api.client.request(method, path, content=content, headers=other).status_code == 409
        assert api.client.request(method, path, content=content, headers=proof).status_code == 401
    held.complete("failed")
    assert held.put_blob(SHA, DATA).status_code == 409


def test_no_project_learns_what_another_one_has(api: Api, held: HeldOverHttp) -> None:
    held.put_blob(SHA, DATA)

    stranger = api.a_running_step()

    assert not has(stranger)
    assert stranger.put_blob(SHA, DATA).status_code == 201


# Inputs


@pytest.fixture
def consumer(api: Api) -> HeldOverHttp:
    """Holds the last of three steps; the first two have handed on a file each, and one stands aside."""
    api.a_build(a_spec(one=[], two=["one"], three=["two"], aside=[]))
    runner = api.a_runner()
    for _ in range(3):
        for claim in api.acquire(runner, slots=4):
            producer = HeldOverHttp(api.client, claim, runner)
            if claim["name"] == "three":
                return producer
            data = f"output of {claim['name']}".encode()
            digest = hashlib.sha256(data).hexdigest()
            producer.put_blob(digest, data)
            entry = {
                "path": claim["name"],
                "type": "file",
                "size": len(data),
                "sha256": digest,
                "mode": 0o755,
            }
            assert producer.complete(artifacts=[entry]).status_code == 200
    raise AssertionError("the last step was never ready")


def test_a_step_gets_the_outputs_of_all_that_stand_before_it(consumer: HeldOverHttp) -> None:
    shown = [(one["step"], one["path"], one["mode"]) for one in consumer.claim["inputs"]]

    assert shown == [("one", "one", 0o755), ("two", "two", 0o755)]


def test_inputs_can_be_read_whole_and_in_ranges(consumer: HeldOverHttp) -> None:
    sha256 = consumer.claim["inputs"][0]["sha256"]
    path = consumer.path(f"blobs/{sha256}")

    whole = consumer.client.get(path, headers=consumer.headers)
    part = consumer.client.get(path, headers={**consumer.headers, "Range": "bytes=7-"})
    known = consumer.client.get(path, headers={**consumer.headers, "If-None-Match": f'"{sha256}"'})

    assert (whole.status_code, whole.content) == (200, b"output of one")
    assert whole.headers["etag"] == f'"{sha256}"'
    assert (part.status_code, part.content) == (206, b"of one")
    assert known.status_code == 304


def test_an_input_is_read_without_rendering_the_claim_again(consumer: HeldOverHttp, mill: Mill) -> None:
    spoilt = update(STEPS).where(STEPS.c.id == consumer.step_id).values(spec={})
    mill.tx(lambda tx: tx.connection().execute(spoilt))

    for entry in consumer.claim["inputs"]:
        answer = consumer.client.get(consumer.path(f"blobs/{entry['sha256']}"), headers=consumer.headers)
        assert (answer.status_code, len(answer.content)) == (200, entry["size"])


@pytest.mark.threat("I14")
def test_what_is_no_input_of_the_step_cannot_be_read(consumer: HeldOverHttp) -> None:
    aside = hashlib.sha256(b"output of aside").hexdigest()

    answer = consumer.client.get(consumer.path(f"blobs/{aside}"), headers=consumer.headers)

    assert answer.status_code == 404


def test_of_two_outputs_at_one_path_the_later_comes_last(api: Api) -> None:
    api.a_build([a_step("late", ["early"]), a_step("early"), a_step("end", ["late", "early"])])
    runner = api.a_runner()
    while claims := api.acquire(runner):
        held = HeldOverHttp(api.client, claims[0], runner)
        if claims[0]["name"] == "end":
            assert [one["step"] for one in claims[0]["inputs"]] == ["early", "late"]
            return
        held.complete(artifacts=[{"path": "same", "type": "directory"}])
    raise AssertionError("the last step was never ready")


def test_an_input_whose_bytes_are_gone_is_told_from_a_lease_that_is(
    consumer: HeldOverHttp, mill: Mill
) -> None:
    sha256 = consumer.claim["inputs"][0]["sha256"]
    mill.site.blobs.path(sha256).unlink()

    gone = consumer.client.get(consumer.path(f"blobs/{sha256}"), headers=consumer.headers)
    unknown = consumer.client.get(consumer.path(f"blobs/{SHA}"), headers=consumer.headers)

    assert (gone.status_code, gone.json()["code"]) == (404, "blob_gone")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
