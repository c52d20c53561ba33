import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runner.credentials import Credentials, GitLogin
from runner.errors import BadSetup, StepError
from runner.git import Budget, Git, GitFailed, check_url, unprivileged_user
from runner.source import SourceCache, _is_about_damage
from shared.protocol import Source
from shared.reasons import Reason
from tests.runner.repositories import Repository
from tests.runner.state_folder import needs_root, write_tree

LOCAL = frozenset({"file", "http", "https", "ssh"})


@pytest.fixture
def repository(state: Path) -> Repository:
    return Repository(state / "repository")


@pytest.fixture
def sources(state: Path) -> SourceCache:
    return a_source_cache(state)


def a_source_cache(state: Path, **chosen: Any) -> SourceCache:
    return SourceCache(state / "state", protocols=LOCAL, run_as=unprivileged_user(), **chosen)


def a_source_cache_at(state: Path, now: Callable[[], float]) -> SourceCache:
    """Both of its clocks are this one."""
    return a_source_cache(state, clock=now, steady=now)


def test_a_branch_means_its_head_and_follows_it(sources: SourceCache, repository: Repository) -> None:
    first = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, branch="main")

    assert sources.resolve(source) == first
    second = repository.commit({"a": "2"})
    assert sources.resolve(source) == second


def test_neither_branch_nor_commit_means_the_remotes_own_head(
    sources: SourceCache, repository: Repository
) -> None:
    repository.commit({"a": "1"})
    repository.git("checkout", "-q", "-b", "trunk")
    head = repository.commit({"a": "2"})

    assert sources.resolve(Source(repo_url=repository.url)) == head


def test_an_abbreviated_hash_is_completed(sources: SourceCache, repository: Repository) -> None:
    commit = repository.commit({"a": "1"})

    assert sources.resolve(Source(repo_url=repository.url, commit=commit[:8])) == commit


@pytest.mark.threat("C10")
def test_a_branch_that_is_called_like_a_hash_does_not_stand_for_it(
    sources: SourceCache, repository: Repository
) -> None:
    wanted = repository.commit({"a": "1"})
    other = repository.commit({"a": "2"})
    repository.git("branch", wanted[:8], other)
    repository.git("branch", wanted, other)

    assert sources.resolve(Source(repo_url=repository.url, commit=wanted[:8])) == wanted
    assert sources.resolve(Source(repo_url=repository.url, commit=wanted)) == wanted
    checkout = sources.checkout(Source(repo_url=repository.url), wanted)
    assert (checkout.path / "a").read_text() == "1"


def test_an_ambiguous_hash_is_not_found(sources: SourceCache, repository: Repository) -> None:
    tree = repository.git("hash-object", "-t", "tree", "-w", "--stdin", text="")
    seen: dict[str, str] = {}
    for number in range(200_000):
        body = f"tree {tree}\nauthor A <a@x> 1 +0000\ncommitter A <a@x> 1 +0000\n\n{number}\n"
        name = _commit_name(body)
        if name[:7] in seen:
            pair = (seen[name[:7]], body)
            break
        seen[name[:7]] = body
    repository.commit({"a": "1"})
    for number, body in enumerate(pair):
        commit = repository.git("hash-object", "-t", "commit", "-w", "--stdin", text=body)
        repository.git("branch", f"b{number}", commit)

    with pytest.raises(StepError, match="2 commits begin") as caught:
        sources.resolve(Source(repo_url=repository.url, commit=commit[:7]))

    assert caught.value.reason == Reason.COMMIT_NOT_FOUND


@pytest.mark.threat("C10")
def test_a_tag_never_wins_over_a_branch(sources: SourceCache, repository: Repository) -> None:
    tagged = repository.commit({"a": "1"})
    repository.git("tag", "main", tagged)
    repository.git("tag", "only-a-tag", tagged)
    head = repository.commit({"a": "2"})

    assert sources.resolve(Source(repo_url=repository.url, branch="main")) == head
    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=repository.url, branch="only-a-tag"))
    assert caught.value.reason == Reason.COMMIT_NOT_FOUND


@pytest.mark.threat("C10")
@pytest.mark.parametrize(
    "branch",
    [
        "../x",
        "refs/../x",
        "HEAD@{1}",
        ":/change",
        "main~1",
        "main^",
        "-upload-pack=x",
        "@",
        "a b",
        "a\n",
        "main.lock",
    ],
)
def test_what_git_would_expand_is_no_branch(
    sources: SourceCache, repository: Repository, branch: str
) -> None:
    repository.commit({"a": "1"})

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=repository.url, branch=branch))

    assert caught.value.reason == Reason.COMMIT_NOT_FOUND


@pytest.mark.parametrize("commit", ["f" * 40, "abcdef0", "f" * 64, "HEAD", "--all", "abc"])
def test_an_unknown_commit_is_not_found(sources: SourceCache, repository: Repository, commit: str) -> None:
    repository.commit({"a": "1"})

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=repository.url, commit=commit))

    assert caught.value.reason == Reason.COMMIT_NOT_FOUND


def test_the_hash_of_a_tag_is_no_commit(sources: SourceCache, repository: Repository) -> None:
    repository.commit({"a": "1"})
    repository.git("tag", "-a", "-m", "x", "v1")

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=repository.url, commit=repository.git("rev-parse", "v1")))

    assert caught.value.reason == Reason.COMMIT_NOT_FOUND


@pytest.mark.threat("C13")
def test_after_a_force_push_the_old_commit_is_built_or_nothing(
    sources: SourceCache, repository: Repository
) -> None:
    repository.commit({"a": "0"})
    old = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, branch="main")
    assert sources.resolve(source) == old

    repository.git("reset", "-q", "--hard", "HEAD~1")
    new = repository.commit({"a": "2"})
    checkout = sources.checkout(source, old)

    assert (checkout.path / "a").read_text() == "1"
    assert sources.resolve(source) == new


def test_a_checkout_is_a_real_repository_that_needs_nothing_from_outside(
    sources: SourceCache, repository: Repository
) -> None:
    repository.commit({"a": "0"})
    commit = repository.commit({"a": "1", "d/run.sh": "x"})
    (repository.path / "d/run.sh").chmod(0o755)
    repository.git("tag", "v1")

    checkout = sources.checkout(Source(repo_url=repository.url, branch="main"), commit)

    assert _git(checkout.path, "rev-parse", "HEAD") == commit
    assert _git(checkout.path, "log", "--format=%s") == "change\nchange"
    assert _git(checkout.path, "describe", "--tags") == "v1"
    assert _git(checkout.path, "status", "--porcelain") == ""
    assert _git(checkout.path, "remote", "get-url", "origin") == repository.url
    assert not (checkout.path / ".git/objects/info/alternates").exists()
    assert _git(checkout.path, "symbolic-ref", "-q", "HEAD") == ""


def test_every_user_of_a_container_may_write_into_a_checkout(
    sources: SourceCache, repository: Repository
) -> None:
    commit = repository.commit({"d/a": "1"})

    checkout = sources.checkout(Source(repo_url=repository.url), commit)

    assert stat.S_IMODE((checkout.path / "d").stat().st_mode) == 0o777
    assert stat.S_IMODE((checkout.path / "d/a").stat().st_mode) == 0o666
    assert stat.S_IMODE(checkout.path.stat().st_mode) == 0o777
    assert stat.S_IMODE(checkout.path.parent.stat().st_mode) & 0o007 == 0  # and nobody else on this machine


@needs_root
def test_git_runs_without_rights(sources: SourceCache, repository: Repository, state: Path) -> None:
    commit = repository.commit({"a": "1"})

    checkout = sources.checkout(Source(repo_url=repository.url), commit)

    user = unprivileged_user()
    assert user is not None
    owners = {path.lstat().st_uid for path in [checkout.path, *checkout.path.rglob("*")]}
    assert owners == {user.uid}
    assert user.uid != 0


def test_a_second_checkout_of_a_commit_is_the_first(sources: SourceCache, repository: Repository) -> None:
    commit = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url)
    first = sources.checkout(source, commit)
    marker = first.path.stat().st_ino
    repository.path.rename(repository.path.with_name("gone"))

    second = sources.checkout(source, commit)

    assert (second, second.path.stat().st_ino) == (first, marker)


def test_a_commit_whose_files_are_here_is_known_without_git(
    sources: SourceCache, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, commit=commit)
    sources.checkout(source, commit)
    monkeypatch.setattr(Git, "run", lambda *_, **__: pytest.fail("git was asked"))

    assert sources.resolve(source) == commit


def test_many_steps_that_want_one_commit_at_once_get_the_same_checkout(
    sources: SourceCache, repository: Repository, state: Path
) -> None:
    commit = repository.commit({f"f{number}": "x" for number in range(20)})
    source = Source(repo_url=repository.url)
    barrier = threading.Barrier(6)
    found: list[Path] = []

    def work() -> None:
        barrier.wait()
        found.append(sources.checkout(source, commit).path)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(list((state / "state/checkouts").iterdir())) == 1


def test_a_commit_that_no_branch_leads_to_is_asked_for_by_name(
    sources: SourceCache, repository: Repository
) -> None:
    repository.commit({"a": "1"})
    repository.git("config", "uploadpack.allowAnySHA1InWant", "true")
    hidden = repository.git("commit-tree", "-m", "hidden", "HEAD^{tree}")

    checkout = sources.checkout(Source(repo_url=repository.url), hidden)

    assert _git(checkout.path, "rev-parse", "HEAD") == hidden


def test_a_shallow_repository_can_be_built(sources: SourceCache, repository: Repository, state: Path) -> None:
    repository.commit({"a": "1"})
    commit = repository.commit({"a": "2"})
    repository.git("clone", "-q", "--bare", "--depth=1", repository.url, str(state / "shallow"))

    checkout = sources.checkout(Source(repo_url=f"file://{state}/shallow", branch="main"), commit)

    assert (checkout.path / "a").read_text() == "2"


def test_a_repository_with_long_hashes_can_be_built(sources: SourceCache, state: Path) -> None:
    repository = Repository(state / "long", kind="sha256")
    commit = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, branch="main")

    assert sources.resolve(source) == commit
    assert len(commit) == 64
    assert (sources.checkout(source, commit).path / "a").read_text() == "1"


@pytest.mark.threat("C07")
def test_submodules_are_not_read(sources: SourceCache, repository: Repository) -> None:
    repository.commit(
        {"a": "1", ".gitmodules": '[submodule "x"]\n\tpath = ../x\n\turl = ext::sh -c touch% /tmp/PWN\n'}
    )
    repository.git(
        "update-index", "--add", "--cacheinfo", f"160000,{repository.git('rev-parse', 'HEAD')},sub"
    )
    commit = repository.commit({"b": "2"})

    checkout = sources.checkout(Source(repo_url=repository.url), commit)

    assert list((checkout.path / "sub").iterdir()) == []


@pytest.mark.threat("C08")
def test_nothing_that_a_repository_brings_is_run(
    sources: SourceCache, repository: Repository, state: Path
) -> None:
    proof = state / "proof"
    state.chmod(0o777)
    hook = repository.path / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {proof}\n")
    hook.chmod(0o755)
    repository.git("config", "filter.evil.smudge", f"touch {proof}; cat")
    repository.git("config", "uploadpack.packObjectsHook", f"touch {proof}; exec")
    for folder in ("hooks", ".githooks"):
        write_tree(repository.path, {f"{folder}/post-checkout": f"#!/bin/sh\ntouch {proof}\n"})
        (repository.path / folder / "post-checkout").chmod(0o755)
        repository.git("add", folder)
    commit = repository.commit(
        {
            "a": "1",
            ".gitattributes": "a filter=evil\nb filter=lfs\n",
            "b": "version https://git-lfs\n",
            ".lfsconfig": "[lfs]\n\turl = https://evil.test\n",
        }
    )

    checkout = sources.checkout(Source(repo_url=repository.url), commit)

    assert (checkout.path / "a").read_text() == "1"
    assert (checkout.path / "b").read_text() == "version https://git-lfs\n"
    assert not proof.exists()
    assert not list((checkout.path / ".git").glob("hooks/*"))


@pytest.mark.threat("C11")
@pytest.mark.parametrize("folder", [".git", ".GIT", "git~1"])
def test_files_that_would_land_in_gits_own_folder_are_refused(
    sources: SourceCache, repository: Repository, folder: str
) -> None:
    blob = repository.git("hash-object", "-w", "--stdin", text="[core]\n\tfsmonitor = touch /tmp/PWN\n")
    inner = repository.git("mktree", text=f"100644 blob {blob}\tconfig\n")
    tree = repository.git("mktree", text=f"040000 tree {inner}\t{folder}\n")
    commit = repository.git("commit-tree", "-m", "x", tree)
    repository.git("branch", "-f", "evil", commit)

    with pytest.raises(StepError) as caught:
        sources.checkout(Source(repo_url=repository.url), commit)

    assert caught.value.reason == Reason.BAD_CONFIG


@pytest.mark.threat("C11")
def test_a_commit_with_more_files_than_can_be_written_is_refused_before_it_is_written(
    state: Path, repository: Repository
) -> None:
    sources = a_source_cache(state, budget=Budget(seconds=100))
    blob = repository.git("hash-object", "-w", "--stdin", text="x")
    tree = repository.git("mktree", text="".join(f"100644 blob {blob}\tf{number}\n" for number in range(10)))
    for _ in range(9):
        tree = repository.git(
            "mktree", text="".join(f"040000 tree {tree}\td{number}\n" for number in range(10))
        )
    commit = repository.git("commit-tree", "-m", "bomb", tree)
    repository.git("branch", "-f", "bomb", commit)

    with pytest.raises(StepError) as caught:
        sources.checkout(Source(repo_url=repository.url), commit)

    assert caught.value.reason == Reason.DISK_LIMIT
    assert list((state / "state/checkouts").iterdir()) == []


@pytest.mark.threat("C11")
def test_a_commit_larger_than_the_budget_is_refused(state: Path, repository: Repository) -> None:
    sources = a_source_cache(state, budget=Budget(bytes=1_000_000))
    commit = repository.commit({"big": "0" * 3_000_000})

    with pytest.raises(StepError) as caught:
        sources.checkout(Source(repo_url=repository.url), commit)

    assert caught.value.reason == Reason.DISK_LIMIT


@pytest.mark.threat("C12")
def test_a_server_that_never_answers_ends_with_the_time_limit(state: Path) -> None:
    sources = a_source_cache(state, budget=Budget(seconds=1.5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.git"
        began = time.monotonic()

        with pytest.raises(StepError, match="time limit") as caught:
            sources.resolve(Source(repo_url=url, branch="main"))

    assert caught.value.reason == Reason.INTERNAL
    assert time.monotonic() - began < 10


def test_a_fetch_that_nobody_wants_any_more_ends_at_once_and_frees_the_repository(
    sources: SourceCache, state: Path
) -> None:
    with AServerOfFiles(state) as server:
        step = AStep(lambda step: sources.resolve(server.source, is_wanted=step.is_wanted))
        assert server.asked.wait(20)

        step.give_up()

        assert step.ended_with(StepError, match="nobody waits")
        (lock,) = (state / "state" / "sources").glob("*.lock")
        with lock.open("rb") as free:
            fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert list((state / "state" / "git").iterdir()) == []


def test_who_is_told_to_stop_waits_for_no_repository(sources: SourceCache, state: Path) -> None:
    with AServerOfFiles(state) as server:
        working = AStep(lambda step: sources.resolve(server.source, is_wanted=step.is_wanted))
        assert server.asked.wait(20)
        waiting = AStep(lambda step: sources.resolve(server.source, is_wanted=step.is_wanted))
        waiting.give_up()

        assert waiting.ended_with(StepError, match="nobody waits")
        assert working.thread.is_alive()

        working.give_up()
        assert working.ended_with(StepError, match="nobody waits")


def test_a_fetch_that_another_step_waits_for_goes_on_for_it(
    sources: SourceCache, repository: Repository, state: Path
) -> None:
    commit = repository.commit({"a": "1"})
    with AServerOfFiles(state, repository) as server:
        first = AStep(lambda step: sources.resolve(server.source, is_wanted=step.is_wanted))
        assert server.asked.wait(20)
        second = AStep(lambda step: sources.checkout(server.source, commit, is_wanted=step.is_wanted).path)
        while not sources._waiting.total():
            time.sleep(0.01)

        first.give_up()
        first.thread.join(1.5)
        server.gate.set()

        assert (Path(second.result()) / "a").read_text() == "1"
        assert first.ended_with(StepError, match="nobody waits")
        assert [path for path in server.paths if "info/refs" in path] == server.paths[:1]


def test_a_server_that_is_not_there_is_a_failure_of_the_network(sources: SourceCache) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=f"http://127.0.0.1:{port}/x.git", branch="main"))

    assert caught.value.reason == Reason.INTERNAL


@pytest.mark.threat("C06")
def test_a_redirect_is_not_followed(sources: SourceCache) -> None:
    elsewhere = {"Location": "/other/info/refs?service=git-upload-pack"}

    with AWebServer(302, elsewhere) as server, pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=f"{server.url}/x.git", branch="main"))

    assert caught.value.reason == Reason.BAD_CONFIG
    assert all(path.startswith("/x.git/") for path, _ in server.seen)


@pytest.mark.threat("C14")
def test_a_login_goes_to_its_own_host_only_and_shows_nowhere(state: Path) -> None:
    with AWebServer(401, {"WWW-Authenticate": 'Basic realm="x"'}) as server:
        login = GitLogin(token="canary-token-1234")
        for host, expected in ((server.host, True), ("127.0.0.1:1", False)):
            server.seen.clear()
            sources = a_source_cache(state, credentials=Credentials(git={host: login}))
            said: list[str] = []

            with pytest.raises(StepError) as caught:
                sources.resolve(Source(repo_url=f"{server.url}/x.git", branch="main"), said.append)

            assert caught.value.reason == Reason.BAD_CONFIG
            assert any(header.startswith("Basic ") for _, header in server.seen) is expected
            assert "canary" not in caught.value.detail + "".join(said)
    found = subprocess.run(["grep", "-r", "canary", str(state)], capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.threat("C14")
def test_a_login_does_not_travel_over_an_open_line(state: Path) -> None:
    remote = check_url("http://example.test/x.git", LOCAL)
    sources = SourceCache(
        state / "state", credentials=Credentials(git={remote.host: GitLogin(token="canary-token-1234")})
    )

    with sources._git.access(remote) as extra:
        assert "canary" not in str(extra)


@pytest.mark.threat("C01")
@pytest.mark.threat("C02")
@pytest.mark.threat("C03")
@pytest.mark.threat("C04")
@pytest.mark.threat("C05")
@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% /tmp/PWN",
        "EXT::sh -c x",
        " ext::sh -c x",
        "ext://x",
        "/srv/other.git",
        "../other",
        "C:\\x",
        "git://host/x",
        "HTTPS://host/x",
        "ssh://-oProxyCommand=touch%20/tmp/PWN/x",
        "ssh://host/-upload",
        "ssh://-x@host/y",
        "git@host:o/r",
        "https://user:pass@host/x",
        "https://user@host/x",
        "https:///host/x",
        "https://github.com@evil/x",
        "https://host:99999/x",
        "https://host/x%0d%0aHeader:",
        "https://host/x%00",
        "https://host/x y",
        "https://host/é",
        "https://[fe80::1%25eth0]/x",
        "https://host",
        "https://host/x?y",
        "https://host/x#y",
        "file://host/etc",
        "file:///a/../etc",
        "",
    ],
)
def test_an_address_that_could_mean_something_else_never_reaches_git(url: str) -> None:
    with pytest.raises(StepError) as caught:
        check_url(url, frozenset({"https", "ssh", "file"}))

    assert caught.value.reason == Reason.BAD_CONFIG


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://github.com/o/r.git", "github.com"),
        ("https://Git.Example.test:8443/o/r", "git.example.test:8443"),
        ("ssh://git@github.com/o/r.git", "github.com"),
        ("file:///srv/a%20b.git", ""),
    ],
)
def test_a_plain_address_is_read(url: str, host: str) -> None:
    if url.startswith("file"):
        url = url.replace("%20", "-")

    assert check_url(url, LOCAL).host == host


@pytest.mark.threat("C02")
def test_a_local_repository_is_refused_unless_it_is_allowed(state: Path, repository: Repository) -> None:
    sources = SourceCache(state / "state", run_as=unprivileged_user())

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=repository.url, branch="main"))

    assert caught.value.reason == Reason.BAD_CONFIG


def test_a_repository_that_is_not_there_is_the_users_mistake(sources: SourceCache, state: Path) -> None:
    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=f"file://{state}/nothing", branch="main"))

    assert caught.value.reason == Reason.BAD_CONFIG


def test_a_killed_fetch_and_a_damaged_mirror_are_no_obstacle(
    sources: SourceCache, repository: Repository, state: Path
) -> None:
    commit = repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, branch="main")
    sources.resolve(source)
    [mirror] = (state / "state/mirrors").iterdir()
    (mirror / "packed-refs.lock").write_text("")
    (mirror / "refs/heads/main.lock").write_text("")
    for loose in mirror.glob("objects/??/*"):
        loose.chmod(0o644)
        loose.write_bytes(b"garbage")

    checkout = sources.checkout(source, commit)

    assert (checkout.path / "a").read_text() == "1"


def test_locks_that_a_killed_git_left_are_no_obstacle(
    sources: SourceCache, repository: Repository, state: Path
) -> None:
    repository.commit({"a": "1"})
    source = Source(repo_url=repository.url, branch="main")
    sources.resolve(source)
    [mirror] = (state / "state/mirrors").iterdir()
    for lock in ("packed-refs.lock", "refs/heads/main.lock", "shallow.lock", "objects/pack/tmp_pack_x"):
        (mirror / lock).write_text("")

    commit = repository.commit({"a": "2"})

    assert sources.resolve(source) == commit
    assert not (mirror / "objects/pack/tmp_pack_x").exists()


def test_what_looks_like_damage_in_a_servers_words_is_not_believed() -> None:
    assert not _is_about_damage(GitFailed(1, "remote: object is corrupt\nfatal: the end"))
    assert _is_about_damage(GitFailed(1, "remote: hello\nerror: object file x is corrupt"))


@needs_root
@pytest.mark.threat("C14")
def test_an_ssh_key_is_lent_to_git_alone_and_for_a_moment(state: Path) -> None:
    key = state / "key"
    key.write_text("secret")
    key.chmod(0o600)
    (state / "home").mkdir()
    user = unprivileged_user()
    git = Git(state / "home", user, Credentials(git={"git.example.test": GitLogin(ssh_key=key)}))

    with git.access(check_url("ssh://git@git.example.test/x.git", LOCAL)) as extra:
        [folder] = (state / "home").iterdir()
        lent = folder / "key"
        assert user is not None
        assert (lent.stat().st_uid, stat.S_IMODE(lent.stat().st_mode)) == (user.uid, 0o600)
        assert str(lent) in extra["GIT_SSH_COMMAND"]
        assert "BatchMode=yes" in extra["GIT_SSH_COMMAND"]
        assert "StrictHostKeyChecking=no" not in extra["GIT_SSH_COMMAND"]
    with git.access(check_url("ssh://git@other.example.test/x.git", LOCAL)) as extra:
        assert "-i " not in extra["GIT_SSH_COMMAND"]

    assert list((state / "home").iterdir()) == []


def test_git_gets_this_machines_proxy_and_certificates_and_nothing_else(state: Path) -> None:
    environ = {"SSL_CERT_FILE": "/ca.pem", "https_proxy": "http://p:1", "GIT_DIR": "/x", "LD_PRELOAD": "/y"}

    seen = Git(state, environ=environ)._environment()

    assert seen["GIT_SSL_CAINFO"] == "/ca.pem"
    assert seen["https_proxy"] == "http://p:1"
    assert not seen.keys() & {"GIT_DIR", "LD_PRELOAD"}


def test_only_the_default_branch_of_the_projects_own_repository_is_trusted(
    sources: SourceCache, repository: Repository
) -> None:
    base = repository.commit({"a": "1"})
    repository.git("checkout", "-q", "-b", "feature")
    feature = repository.commit({"a": "2"})
    repository.git("checkout", "-q", "main")
    ours = Source(repo_url=repository.url, branch="main", default_branch="main", is_project_repository=True)

    assert sources.is_trusted(ours, base)
    assert not sources.is_trusted(ours, feature)
    assert not sources.is_trusted(ours.model_copy(update={"branch": "feature"}), base)
    assert not sources.is_trusted(ours.model_copy(update={"is_project_repository": False}), base)
    assert not sources.is_trusted(ours.model_copy(update={"default_branch": ""}), base)
    repository.git("merge", "-q", "feature")
    assert sources.is_trusted(ours, feature)


def test_pruning_drops_what_was_used_longest_ago_and_keeps_what_is_in_use(
    state: Path, repository: Repository
) -> None:
    now = [1_000_000.0]
    sources = a_source_cache_at(state, lambda: now[0])
    source = Source(repo_url=repository.url)
    checkouts = []
    for number in range(4):
        commit = repository.commit({"a": str(number)})
        checkouts.append(sources.checkout(source, commit))
        now[0] += 1_000

    sources.prune({checkouts[0].name}, 0)

    left = {path.name for path in (state / "state/checkouts").iterdir()}
    assert left == {checkouts[0].name}
    now[0] += 10_000
    fresh = sources.checkout(source, checkouts[3].commit)
    sources.prune(set(), 0)
    assert {path.name for path in (state / "state/checkouts").iterdir()} == {fresh.name}


def test_a_checkout_that_is_used_while_others_are_pruned_stays(state: Path, repository: Repository) -> None:
    now = [1_000_000.0]
    uses: list[Path] = []

    def clock() -> float:
        while uses:  # another step takes the checkout between the look at it and its end
            os.utime(uses.pop(), (now[0], now[0]))
        return now[0]

    sources = a_source_cache_at(state, clock)
    commit = repository.commit({"a": "1"})
    checkout = sources.checkout(Source(repo_url=repository.url), commit)
    now[0] += 10_000
    uses.append(state / "state" / "sources" / f"{checkout.name}.json")

    sources.prune(set(), 0)

    assert checkout.path.is_dir()
    now[0] += 10_000
    assert sources.prune(set(), 0) == 0
    assert not checkout.path.exists()


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_wall_clock_that_jumps_takes_no_checkout_that_was_just_used(
    state: Path, repository: Repository, jump_s: float
) -> None:
    wall, steady = [1_000_000.0], [0.0]
    sources = a_source_cache(state, clock=lambda: wall[0], steady=lambda: steady[0])
    checkout = sources.checkout(Source(repo_url=repository.url), repository.commit({"a": "1"}))

    wall[0] += jump_s
    sources.prune(set(), 0)

    assert checkout.path.is_dir()
    assert list(sources.spares(set())) == []
    steady[0] += 601
    assert {spare.name for spare in sources.spares(set())} >= {checkout.name}
    assert sources.prune(set(), 0) == 0
    assert not checkout.path.exists()


def test_a_checkout_whose_repository_is_in_use_is_left_for_the_next_time(
    state: Path, repository: Repository
) -> None:
    now = [1_000_000.0]
    sources = a_source_cache_at(state, lambda: now[0])
    checkout = sources.checkout(Source(repo_url=repository.url), repository.commit({"a": "1"}))
    now[0] += 10_000
    (lock,) = (state / "state" / "sources").glob("*.lock")

    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sources.prune(set(), 0)

    assert checkout.path.is_dir()


@needs_root
def test_a_state_folder_that_git_cannot_enter_is_refused_with_the_remedy(state: Path) -> None:
    closed = state / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(BadSetup, match=f"chmod o\\+x {closed}"):
        SourceCache(closed / "state", run_as=unprivileged_user())


def test_a_checkout_holds_links_as_links(sources: SourceCache, repository: Repository) -> None:
    (repository.path / "out").symlink_to("/etc")
    repository.git("add", "out")
    commit = repository.commit({"a": "1"})

    checkout = sources.checkout(Source(repo_url=repository.url), commit)

    assert (checkout.path / "out").readlink() == Path("/etc")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-c", f"safe.directory={folder}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()


def _commit_name(body: str) -> str:
    return hashlib.sha1(f"commit {len(body)}\0{body}".encode()).hexdigest()


class AStep:
    """Wants something of a repository, in a thread of its own, until it is told to give up."""

    def __init__(self, work: Callable[["AStep"], object]) -> None:
        self._given_up = threading.Event()
        self._done: Future[object] = Future()
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def is_wanted(self) -> bool:
        return not self._given_up.is_set()

    def give_up(self) -> None:
        self._given_up.set()

    def result(self) -> str:
        return str(self._done.result(30))

    def ended_with(self, kind: type[BaseException], *, match: str) -> bool:
        error = self._done.exception(20)
        return isinstance(error, kind) and match in str(error)

    def _run(self) -> None:
        try:
            self._done.set_result(self._work(self))
        except BaseException as error:
            self._done.set_exception(error)


class AServerOfFiles:
    """Serves a repository as plain files, each answer only when the gate is open."""

    def __init__(self, folder: Path, repository: Repository | None = None) -> None:
        self.asked, self.gate, self.paths = threading.Event(), threading.Event(), list[str]()
        served = folder / "served"
        if repository is not None:
            repository.git("clone", "-q", "--bare", str(repository.path), str(served / "x.git"))
            repository.git("--git-dir", str(served / "x.git"), "update-server-info")
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(served))

            def do_GET(self) -> None:
                outer.paths.append(self.path)
                outer.asked.set()
                outer.gate.wait(60)
                with suppress(OSError):  # who has asked may be gone
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.source = Source(repo_url=f"http://127.0.0.1:{self.server.server_port}/x.git", branch="main")

    def __enter__(self) -> "AServerOfFiles":
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()


class AWebServer:
    """Answers every request alike and remembers path and Authorization header."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.seen: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, self.headers.get("Authorization", "")))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}"

    def __enter__(self) -> "AWebServer":
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()
