"""What the rules of a project let go is gone, also when whoever deletes it is killed in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.factories import a_step
from tests.runner.state_folder import a_state_folder
from tests.trip.stage import Process, User, free_port, until

SCRIPT = "echo kept > out; test $BUILDMILL_BUILD_NUMBER = 1"


@contextmanager
def a_mill(folder: Path) -> Iterator[User]:
    """`buildmill up` on this folder, for as long as the block lasts."""
    port = str(free_port())
    places = ["--data", str(folder / "data"), "--state", str(folder / "state")]
    process = Process(folder, "up", "--port", port, "--executor", "process", *places)
    user = User(f"http://127.0.0.1:{port}")
    try:
        until(user.is_answered, told=lambda: process.output)
        yield user
    finally:
        user.close()
        process.close()


def logs_of(folder: Path) -> set[str]:
    """The builds that have logs on the disk."""
    return {log.parents[1].name for log in (folder / "data" / "logs").glob("*/*/*/*.log")}


def test_a_killed_retention_is_finished_by_the_next_and_the_last_success_stays() -> None:
    with a_state_folder() as folder:
        with a_mill(folder) as user:
            project_id = user.a_project()
            workflow = user.api.a_workflow([a_step("a", runScript=SCRIPT, outputPaths=["out"])], project_id)
            builds = [user.await_end(user.build_again(workflow)["id"]) for _ in range(12)]
            kept, expired = [builds[0], builds[-1]], builds[1:-1]
            user.api.client.patch(f"/api/projects/{project_id}", json={"retention": {"builds": 1}})
            due = user.api.get(f"/api/projects/{project_id}/retention")["expires"]
        assert [build["status"] for build in builds] == ["SUCCESS", *["FAILED"] * 11]
        assert {one["buildId"] for one in due} == {build["id"] for build in expired}
        assert logs_of(folder) == {build["id"] for build in builds}

        killed = Process(folder, "retention", "--data", str(folder / "data"))
        until(lambda: len(logs_of(folder)) < len(builds) or not killed.is_alive)
        killed.kill()
        finished = Process(folder, "retention", "--data", str(folder / "data"))
        assert finished.wait() == 0, finished.output

        assert logs_of(folder) == {build["id"] for build in kept}
        with a_mill(folder) as user:
            for build in kept:
                assert user.api.build(build["id"])["status"] == build["status"]
            for build in expired:
                assert_expired(user, build)
            (artifact,) = user.api.get(f"/api/builds/{kept[0]['id']}/artifacts")
            assert user.api.client.get(f"/api/artifacts/{artifact['id']}").content == b"kept\n"


def assert_expired(user: User, build: dict[str, Any]) -> None:
    (step,) = build["steps"]
    for path in (f"/api/builds/{build['id']}", f"/api/steps/{step['id']}/log"):
        answer = user.api.client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "expired"), answer.text
