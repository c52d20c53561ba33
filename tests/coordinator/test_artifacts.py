"""Artifacts are downloaded as they were stored, and nothing more."""

import hashlib
import time

import pytest

from coordinator.api.streams import attachment, parse_range
from coordinator.errors import RangeNotSatisfiable
from tests.factories import ON_SQLITE, Api, Mill

DATA = bytes(range(200))
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def artifact(api: Api) -> str:
    """The path of an artifact of 200 bytes."""
    return an_artifact(api)


def an_artifact(api: Api, path: str = "out/data.bin") -> str:
    held = api.a_running_step()
    held.put_blob(SHA, DATA)
    entry = {"path": path, "type": "file", "size": len(DATA), "sha256": SHA}
    assert held.complete(artifacts=[entry]).status_code == 200
    listed = api.get(f"/api/builds/{held.claim['buildId']}/artifacts")
    return f"/api/artifacts/{listed[0]['id']}"


def test_an_artifact_comes_whole_and_cannot_be_mistaken_for_a_page(api: Api, artifact: str) -> None:
    answer = api.client.get(artifact)

    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["etag"] == f'"{SHA}"'
    assert answer.headers["content-length"] == "200"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith('attachment; filename="data.bin"')
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@ON_SQLITE
def test_who_has_it_already_gets_no_bytes(api: Api, artifact: str) -> None:
    for known in (f'"{SHA}"', f'"x", "{SHA}"', f'W/"{SHA}"', "*"):
        answer = api.client.get(artifact, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
    assert api.client.get(artifact, headers={"If-None-Match": '"other"'}).status_code == 200
    assert api.client.get(artifact, headers={"If-None-Match": 'W/"*"'}).status_code == 200


@ON_SQLITE
@pytest.mark.threat("D18")
def test_ranges_are_answered_as_the_standard_says(api: Api, artifact: str) -> None:
    whole = (200, 0, 200)
    table = {
        "bytes=0-0": (206, 0, 1),
        "bytes=0-": (206, 0, 200),
        "bytes=10-19": (206, 10, 20),
        "bytes=190-500": (206, 190, 200),
        "bytes=-5": (206, 195, 200),
        "bytes=-500": (206, 0, 200),
        "bytes=199-199": (206, 199, 200),
        "bytes=200-": (416, 0, 0),
        "bytes=-0": (416, 0, 0),
        "bytes=9999999999999999999-": (416, 0, 0),
        "bytes=18446744073709551615-": whole,
        "bytes=0-18446744073709551616": whole,
        "bytes=9-1": whole,
        "bytes=-": whole,
        "bytes=": whole,
        "bytes=a-b": whole,
        "bytes=--5": whole,
        "lines=0-5": whole,
        "bytes=0-0,1-1": whole,
        "bytes=" + ",".join(["0-0", "1-1"] * 5_000): whole,
    }

    began = time.process_time()
    for said, (status, start, end) in table.items():
        answer = api.client.get(artifact, headers={"Range": said})
        assert answer.status_code == status, said[:40]
        if status == 206:
            assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/200"
        if status == 416:
            assert answer.headers["content-range"] == "bytes */200"
        else:
            assert answer.content == DATA[start:end], said[:40]
    assert time.process_time() - began < 5


@ON_SQLITE
def test_a_range_of_another_version_gets_the_whole(api: Api, artifact: str) -> None:
    part = {"Range": "bytes=0-9"}

    assert api.client.get(artifact, headers={**part, "If-Range": f'"{SHA}"'}).status_code == 206
    assert api.client.get(artifact, headers={**part, "If-Range": '"other"'}).status_code == 200
    assert (
        api.client.get(artifact, headers={**part, "If-Range": "Sat, 01 Jan 2000 00:00:00 GMT"}).status_code
        == 200
    )


def test_no_range_of_nothing_can_be_satisfied() -> None:
    for said in ("bytes=0-", "bytes=0-0", "bytes=-1"):
        with pytest.raises(RangeNotSatisfiable):
            parse_range(said, 0)


@pytest.mark.parametrize(
    ("name", "plain", "coded"),
    [
        ("report.html", "report.html", "report.html"),
        ('a"; filename="evil.exe', "a___filename__evil.exe", "a%22%3B%20filename%3D%22evil.exe"),
        ("line\r\nSet-Cookie: x", "line__Set-Cookie__x", "line%0D%0ASet-Cookie%3A%20x"),
        ("naïve.txt", "na_ve.txt", "na%C3%AFve.txt"),
        ("..", "..", ".."),
        ("", "artifact", ""),
        ("a\\b", "a_b", "a%5Cb"),
    ],
)
def test_no_file_name_breaks_out_of_its_header(name: str, plain: str, coded: str) -> None:
    assert attachment(name) == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{coded}"


@ON_SQLITE
def test_a_strange_name_is_downloaded_under_a_plain_one(api: Api) -> None:
    answer = api.client.get(an_artifact(api, 'out/<b>"ä".html'))

    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"_b____.html\"; filename*=UTF-8''%3Cb%3E%22%C3%A4%22.html"
    )


def test_what_has_no_bytes_cannot_be_downloaded(api: Api, mill: Mill) -> None:
    held = api.a_running_step()
    held.complete(artifacts=[{"path": "link", "type": "link", "target": "x"}])
    link = api.get(f"/api/builds/{held.claim['buildId']}/artifacts")[0]

    assert api.client.get(f"/api/artifacts/{link['id']}").status_code == 404
    assert api.client.get("/api/artifacts/nope").status_code == 404


def test_an_artifact_whose_bytes_are_gone_is_404(api: Api, artifact: str, mill: Mill) -> None:
    mill.site.blobs.path(SHA).unlink()

    assert api.client.get(artifact).status_code == 404


def test_the_artifacts_of_a_deleted_project_are_gone(api: Api, artifact: str) -> None:
    project = api.get("/api/projects?accountId=acme")[0]
    api.client.delete(f"/api/projects/{project['id']}")

    assert api.client.get(artifact).status_code == 404
