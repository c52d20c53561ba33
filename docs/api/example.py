"""Create a build, start it, and wait for its end: python docs/api/example.py

BUILDMILL, EMAIL, PASSWORD and PROJECT_ID say where and who. Needs the package `requests`.
"""

import os
import time

import requests

API = os.environ.get("BUILDMILL", "http://127.0.0.1:3000") + "/api/v1"
TIMEOUT_S = 30


def main() -> None:
    session = log_in()
    build = ask(
        session,
        "POST",
        "/builds",
        json={"project_id": os.environ["PROJECT_ID"], "git_branch": "main"},
    )
    print(f"Created build {build['id']}")
    ask(session, "POST", f"/builds/{build['id']}/start")
    print(f"Status: {wait_for_end(session, build['id'])}")
    show_log(session, build["id"])


def log_in() -> requests.Session:
    """A session that sends the token and the tenant with each request."""
    session = requests.Session()
    login = ask(
        session,
        "POST",
        "/auth/login",
        json={"email": os.environ["EMAIL"], "password": os.environ["PASSWORD"]},
    )
    session.headers["Authorization"] = f"Bearer {login['token']}"
    session.headers["X-Tenant-ID"] = login["tenants"][0]["id"]
    return session


def ask(session: requests.Session, method: str, path: str, **more: object) -> dict:
    """The JSON of an answer; waits where one has asked too often, and raises what was refused."""
    while True:
        answer = session.request(method, API + path, timeout=TIMEOUT_S, **more)
        if answer.status_code != 429:
            break
        time.sleep(int(answer.headers["Retry-After"]))
    if not answer.ok:
        raise SystemExit(f"{answer.status_code}: {answer.json()['error']}")
    return answer.json()


def wait_for_end(session: requests.Session, build_id: str) -> str:
    for _ in range(240):
        status = ask(session, "GET", f"/builds/{build_id}/status")
        if status["status"] in ("success", "failed", "cancelled"):
            return status["status"]
        time.sleep(0.5)
    raise SystemExit("the build takes too long")


def show_log(session: requests.Session, build_id: str) -> None:
    answer = session.get(f"{API}/builds/{build_id}/logs?format=text", timeout=TIMEOUT_S)
    print(answer.text, end="")


if __name__ == "__main__":
    main()
