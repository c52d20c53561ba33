"""The recipe of one step against a coordinator that answers as it is told; the script is a real process."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from runner import deadline, step_run
from runner.attempt import Attempt
from runner.deadline import boot_s
from runner.errors import EngineUnavailable, StepError, StillAlive
from runner.executor import launcher
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.mounts import unmount
from runner.proof import Proof
from runner.step_run import StepRun
from shared.reasons import Reason
from tests.runner.claims import a_claim
from tests.runner.repositories import Repository
from tests.runner.runners import an_agent
from tests.runner.state_folder import needs_root
from tests.trip.faults import verb_of


class Coordinator:
    """Says yes to everything, unless `answers[verb]` holds something else to be said first."""

    def __init__(self):
        self.log = b""
        self.asked = []
        self.completions = []
        self.answers = {}

    def __call__(self, request):
        verb = verb_of(request.method, request.url.path)
        self.asked.append(verb)
        if verb == "complete":
            self.completions.append(json.loads(request.content))
        waiting = self.answers.get(verb)
        if waiting:
            answer = waiting.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer
        return self._yes(verb, request)

    def _yes(self, verb, request):
        if verb == "log":
            offset = int(request.url.params["offset"])
            self.log = self.log[:offset] + request.content
            return httpx.Response(200, json={"size": len(self.log)})
        if verb == "start":
            return httpx.Response(200, json={"action": "go", "timeoutS": 60, "graceS": 1})
        if verb == "complete":
            return httpx.Response(200, json={"success": True, "stepStatus": "SUCCESS", "buildComplete": True})
        if verb == "head_blob":
            return httpx.Response(404)
        return httpx.Response(201, json={"ok": True})


def refusal(status, code, **more):
    return httpx.Response(status, json={"error": code, "code": code, "details": [], **more})


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def wishes():
    """Settings of the runner that a test wants otherwise."""
    return {"disk_reserve_mb": 0}


@pytest.fixture
def means(state, coordinator, wishes):
    made = an_agent(state, coordinator, **wishes)._means
    made.trash.start()
    yield made
    made.caches.close()
    made.executor.close()
    made.trash.close()
    made.client.close()


@pytest.fixture
def attempt():
    return Attempt(Proof("step-1", 1, "the-lease"))


@pytest.fixture
def run(state, means, attempt):
    """Runs the recipe for a script, or goes on with it; the journal as it is left."""

    def go(script="echo hello", **fields):
        folder = attempt_dir(state, "step-1", 1)
        claim = a_claim(script, **fields).model_dump(mode="json")
        journal = Journal.load(folder) or Journal.create(folder, claim)
        StepRun(means, journal, attempt).run()
        return journal

    return go


@pytest.mark.parametrize(
    ("phase", "is_missing"), [(JournalPhase.CLAIMED, None), (JournalPhase.RUNNING, True)]
)
def test_a_log_that_cannot_be_opened_is_never_told_as_whole(run, coordinator, state, phase, is_missing):
    """What has begun may have printed more than anybody has sent."""
    folder = attempt_dir(state, "step-1", 1)
    Journal.create(folder, a_claim("echo hello").model_dump(mode="json")).advance(phase)
    launcher.make_attempt_files(folder)
    (folder / "log").unlink()
    (folder / "log.rest").mkdir()

    run()

    (said,) = coordinator.completions
    assert (said["status"], said["reason"], said.get("logGap")) == ("failed", "internal", is_missing)


def test_a_step_is_run_told_and_cleaned_up(run, coordinator, state):
    journal = run("echo hello; mkdir out; echo x > out/x", output_paths=["out/*"])

    (said,) = coordinator.completions
    assert (said["status"], said["exitCode"]) == ("success", 0)
    assert [entry["path"] for entry in said["artifacts"]] == ["out/x"]
    assert said["logSize"] == len(coordinator.log)
    assert said["logSha256"] == hashlib.sha256(coordinator.log).hexdigest()
    assert b"\nhello\n" in coordinator.log
    assert coordinator.asked.index("put_blob") < coordinator.asked.index("complete")
    assert journal.phase is JournalPhase.DONE
    assert not journal.folder.exists()


def test_nothing_of_a_script_runs_before_the_coordinator_said_go(run, coordinator, state):
    coordinator.answers["start"] = [
        httpx.Response(200, json={"action": "cancel", "timeoutS": 9, "graceS": 1})
    ]

    run(f"touch {state}/ran")

    assert not (state / "ran").exists()
    assert coordinator.completions[0]["reason"] == "cancelled"


def test_a_step_that_was_cancelled_before_it_began_does_not_begin(run, coordinator, attempt, state):
    attempt.cancel("cancelled")

    run(f"touch {state}/ran")

    assert not (state / "ran").exists()
    assert "start" not in coordinator.asked
    assert coordinator.completions[0]["reason"] == "cancelled"


def test_a_lost_lease_ends_the_script_and_leaves_nothing(run, coordinator, state):
    coordinator.answers["log"] = [refusal(409, "stale_attempt")] * 100
    coordinator.answers["complete"] = [refusal(409, "stale_attempt")]

    journal = run(f"echo $$ > {state}/pid; echo hello")

    assert not journal.folder.exists()
    assert os.listdir(state / "processes") == []


def test_a_log_that_the_coordinator_lost_is_sent_again_before_the_step_is_told(run, coordinator):
    def forget():
        coordinator.log = coordinator.log[:10]
        return refusal(409, "log_incomplete", size=10)

    coordinator.answers["complete"] = [forget]

    run()

    first, second = coordinator.completions
    assert first == second
    assert hashlib.sha256(coordinator.log).hexdigest() == second["logSha256"]


@pytest.mark.parametrize(
    ("code", "reason"), [("outputs_incomplete", "upload_failed"), ("invalid", "internal")]
)
def test_a_completion_that_is_refused_is_followed_by_one_that_cannot_be(run, coordinator, code, reason):
    coordinator.answers["complete"] = [refusal(409 if reason == "upload_failed" else 400, code)]

    run()

    first, second = coordinator.completions
    assert (first["status"], second["status"], second["reason"]) == ("success", "failed", reason)
    assert second["infra"]


def test_a_completion_that_is_always_refused_does_not_go_on_for_ever(run, coordinator):
    coordinator.answers["complete"] = [refusal(400, "invalid") for _ in range(1000)]

    run()

    assert len(coordinator.completions) < 50


def test_a_process_that_ends_says_its_last_words_twice_where_they_are_lost(run, coordinator, attempt):
    attempt.shut_down()
    coordinator.answers["complete"] = [httpx.ConnectError("away")]

    journal = run()

    assert journal.phase is JournalPhase.DONE
    assert [said["reason"] for said in coordinator.completions] == ["runner_shutdown"] * 2


def leave_untold(run, coordinator, attempt, monkeypatch, script):
    """A life that ends while the coordinator is away; the next one has its journal."""
    monkeypatch.setattr("runner.step_run.LAST_WORDS_S", 0.2)
    attempt.shut_down()
    coordinator.answers["complete"] = [httpx.ConnectError("away")] * 1000
    journal = run(script)
    assert journal.phase is JournalPhase.COMPLETING
    coordinator.answers["complete"] = []
    coordinator.completions.clear()
    attempt.shutdown.clear()


def test_a_process_that_ends_leaves_what_it_could_not_tell_to_the_next(
    run, coordinator, attempt, state, monkeypatch
):
    leave_untold(run, coordinator, attempt, monkeypatch, f"touch {state}/ran")

    journal = run()

    assert journal.phase is JournalPhase.DONE
    assert not (state / "ran").exists()
    assert [said["reason"] for said in coordinator.completions] == ["runner_shutdown"]


def let_hours_pass(monkeypatch, hours):
    now = deadline.boot_s
    monkeypatch.setattr(deadline, "boot_s", lambda: now() + hours * 3600.0)


def test_an_outcome_waits_on_the_disk_for_a_day(run, coordinator, attempt, monkeypatch):
    leave_untold(run, coordinator, attempt, monkeypatch, "true")
    let_hours_pass(monkeypatch, 23)
    coordinator.answers["complete"] = [httpx.ConnectError("away")] * 2

    journal = run()

    assert journal.phase is JournalPhase.DONE
    assert len(coordinator.completions) == 3


def test_an_outcome_that_nobody_heard_for_a_day_is_given_up_and_said_so(
    run, coordinator, attempt, state, monkeypatch, capsys
):
    leave_untold(run, coordinator, attempt, monkeypatch, "true")
    let_hours_pass(monkeypatch, 25)
    coordinator.answers["complete"] = [httpx.ConnectError("away")] * 1000

    run()

    assert len(coordinator.completions) == 1, "once more, for it may be back right now"
    assert "outcome_never_told" in capsys.readouterr().out
    assert list((state / "a").glob("*/*")) == []


def test_answers_that_are_lost_run_nothing_again(run, coordinator, state):
    for verb in ("start", "head_blob", "put_blob", "complete"):
        coordinator.answers[verb] = [httpx.ReadError("the answer was lost")]

    run(f"echo x >> {state}/ran; echo x > out", output_paths=["out"])

    assert (state / "ran").read_text() == "x\n"
    assert [said["status"] for said in coordinator.completions] == ["success"] * 2


def test_inputs_that_lead_outside_are_refused_before_anything_runs(run, coordinator, state):
    bad = {"step": "s", "path": "../out", "type": "file", "sha256": "a" * 64, "size": 1}

    run(f"touch {state}/ran", inputs=[bad])

    assert not (state / "ran").exists()
    assert coordinator.completions[0]["reason"] == "bad_config"


@pytest.mark.parametrize(
    ("path", "type", "cache"),
    [
        ("deps/lib.a", "file", "deps"),
        ("deps/a/b/empty", "directory", "deps/a"),
        ("deps", "file", "deps"),
        ("deps", "link", "deps/cache"),
    ],
)
def test_a_cache_never_hides_what_a_dependency_delivers(run, coordinator, state, path, type, cache):
    entry = {"step": "s", "path": path, "type": type, "sha256": "a" * 64, "size": 1, "target": "x"}

    run(f"touch {state}/ran", inputs=[entry], mounts=[{"path": cache, "key": "k"}])

    (said,) = coordinator.completions
    assert said["reason"] == "output_conflict"
    assert f"step s delivers {path}" in said["detail"]
    assert not (state / "ran").exists()


@pytest.mark.parametrize(("user", "modes"), [("root", "600 750"), ("image", "666 777")])
def test_a_user_of_the_image_may_use_what_other_steps_made_private(run, coordinator, user, modes):
    coordinator.answers["get_blob"] = [httpx.Response(200, stream=httpx.ByteStream(b"x"))]
    entry = {"step": "s", "type": "file", "sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    inputs = [{**entry, "path": "key", "mode": 0o600}, {**entry, "path": "tool", "mode": 0o750}]

    run("echo modes $(stat -c %a key tool)", inputs=inputs, user=user)

    assert f"modes {modes}\n".encode() in coordinator.log


@pytest.mark.parametrize("cache", ["deps", "dep", "deps/lib/cache", "/deps"])
def test_a_cache_beside_what_a_dependency_delivers_is_no_conflict(run, coordinator, cache):
    folders = ["deps", "deps-too/lib"]
    inputs = [{"step": "s", "path": path, "type": "directory"} for path in folders]

    run("test -d deps-too/lib", inputs=inputs, mounts=[{"path": cache, "key": "k"}])

    assert [said["status"] for said in coordinator.completions] == ["success"]


@needs_root
def test_outputs_are_not_collected_from_a_workspace_that_a_reboot_took_away(
    run, coordinator, attempt, state, means
):
    folder = attempt_dir(state, "step-1", 1)
    claim = a_claim("true", output_paths=["out/*"]).model_dump(mode="json")
    journal = Journal.create(folder, claim)
    built = means.workspaces.build(folder, checkout=None, inputs=[], fetch=lambda _: folder, note=print)
    (built.path / "out").mkdir()
    (built.path / "out" / "x").write_text("x")
    unmount(built.path)
    ended = {"rc": 0, "code": 0, "oom": False, "reason": None, "detail": ""}
    journal.advance(JournalPhase.EXITED, ended=ended, code=0)

    run()

    (said,) = coordinator.completions
    assert (said["status"], said["reason"], said["infra"]) == ("failed", "internal", True)
    assert "workspace has gone" in said["detail"]


@pytest.mark.threat("F03")
@pytest.mark.parametrize("wishes", [{"step_disk_mb": 8, "disk_reserve_mb": 0}])
def test_a_step_that_takes_more_of_the_disk_than_its_limit_is_ended(run, coordinator, state):
    run("head -c 20000000 /dev/zero > big; sleep 10")

    (said,) = coordinator.completions
    assert (said["status"], said["reason"]) == ("failed", "disk_limit")
    assert "its limit is 8 MiB" in said["detail"]
    assert b"its limit is 8 MiB" in coordinator.log
    assert not (state / "a" / "step-1").exists()


@pytest.mark.threat("F03")
@pytest.mark.parametrize("wishes", [{"disk_reserve_mb": 2**40}])
@pytest.mark.parametrize(("mib", "status"), [(70, "failed"), (1, "success")])
def test_where_the_disk_runs_short_the_step_that_fills_it_is_ended(run, coordinator, mib, status):
    run(f"head -c {mib * 1024 * 1024} /dev/zero > big; sleep {10 if mib > 64 else 1.2}")

    (said,) = coordinator.completions
    assert (said["status"], said.get("reason")) == (status, "disk_limit" if mib > 64 else None)


def test_an_outcome_survives_what_nobody_foresaw(run, coordinator):
    coordinator.answers["complete"] = [RuntimeError("a fault of ours")]

    journal = run()

    assert [said["status"] for said in coordinator.completions] == ["success"] * 2
    assert journal.phase is JournalPhase.DONE


def test_an_outcome_is_told_without_a_log_that_cannot_be_delivered(run, coordinator):
    coordinator.answers["log"] = [refusal(400, "invalid") for _ in range(100)]

    run()

    (said,) = coordinator.completions
    assert said["status"] == "success"
    assert "logSize" not in said and "logSha256" not in said


def test_what_is_being_uploaded_stands_in_the_journal(run, coordinator, state):
    seen = []

    def look():
        journal = Journal.load(attempt_dir(state, "step-1", 1))
        seen.append((journal.phase, journal.data["collected"]))
        return httpx.Response(201, json={"ok": True})

    coordinator.answers["put_blob"] = [look]

    run("printf x > out", output_paths=["out"])

    assert seen == [(JournalPhase.UPLOADING, [hashlib.sha256(b"x").hexdigest()])]


def test_a_script_whose_log_was_cut_is_not_said_to_have_bad_syntax(run, coordinator):
    coordinator.answers["log"] = [refusal(413, "log_limit", limit=0)]

    run("sleep 1.5; : > ../log; exit 2")

    (said,) = coordinator.completions
    assert said["reason"] == "exit_nonzero"


def test_an_input_that_the_coordinator_no_longer_has_is_said_in_those_words(run, coordinator, state):
    sha256 = hashlib.sha256(b"x").hexdigest()
    coordinator.answers["get_blob"] = [refusal(409, "blob_gone")]

    run(
        f"touch {state}/ran",
        inputs=[{"step": "s", "path": "in", "type": "file", "sha256": sha256, "size": 1}],
    )

    (said,) = coordinator.completions
    assert (said["reason"], said["infra"]) == ("internal", True)
    assert said["detail"].startswith("an input is gone from the coordinator")
    assert not (state / "ran").exists()


@pytest.mark.parametrize("wishes", [{"git_protocols": "file", "disk_reserve_mb": 0}])
def test_the_checkout_of_a_step_stays_however_long_its_caches_take_to_open(
    run, coordinator, means, state, monkeypatch
):
    repository = Repository(state / "repository")
    commit = repository.commit({"a": "the content"})
    coordinator.answers["source"] = [httpx.Response(200, json={"commit": commit})]
    open_cache, later = means.caches.open, boot_s() + 5000

    def open_slowly(*arguments):
        monkeypatch.setattr(means.sources._recent, "_clock", lambda: later)
        pinned = means.workspaces.pinned([attempt_dir(state, "step-1", 1)])
        means.sources.prune(pinned, 0)
        return open_cache(*arguments)

    monkeypatch.setattr(means.caches, "open", open_slowly)

    run(
        "cat a",
        source={"repo_url": repository.url, "commit": commit},
        mounts=[{"path": "/cache", "key": "k", "trust": "other"}],
    )

    assert [said["status"] for said in coordinator.completions] == ["success"]
    assert b"the content" in coordinator.log


def test_nothing_is_told_of_a_step_that_is_seen_alive_while_the_engine_is_away(
    run, coordinator, means, monkeypatch
):
    seen = [StillAlive("it lives"), StillAlive("it lives"), None]

    def away(*_arguments, **_wishes):
        raise EngineUnavailable("the engine is away")

    def kill(_job, *, hard):
        assert coordinator.completions == []
        answer = seen.pop(0) if seen else None
        if answer is not None:
            raise answer

    monkeypatch.setattr(step_run, "ENGINE_PATIENCE_S", 0.0)
    monkeypatch.setattr(step_run, "ENGINE_PAUSE_S", 0.01)
    monkeypatch.setattr(means.executor, "wait", away)
    monkeypatch.setattr(means.executor, "kill", kill)

    run("true")

    assert seen == []
    assert [said["reason"] for said in coordinator.completions] == ["daemon_error"]


@pytest.fixture
def silent_server():
    """A server that takes a connection and never says a word; `met` is set when somebody has come."""
    met, lines = threading.Event(), []

    def listen():
        with contextlib.suppress(OSError):
            while True:
                lines.append(door.accept()[0])
                met.set()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{door.getsockname()[1]}/x.git", met
        door.shutdown(socket.SHUT_RDWR)
    for line in lines:
        line.close()


@pytest.mark.parametrize("wishes", [{"git_protocols": "http", "disk_reserve_mb": 0}])
@pytest.mark.parametrize(
    ("order", "reasons"),
    [
        (lambda attempt: attempt.cancel("cancelled"), ["cancelled"]),
        (lambda attempt: attempt.shut_down(), ["runner_shutdown"]),
        (lambda attempt: attempt.abandon(), []),
    ],
    ids=["cancel", "shutdown", "abandon"],
)
def test_orders_are_heard_while_a_repository_is_fetched(
    run, coordinator, attempt, silent_server, order, reasons
):
    address, met = silent_server
    told = []

    def tell():
        assert met.wait(20)
        told.append(time.monotonic())
        order(attempt)

    threading.Thread(target=tell, daemon=True).start()
    run(source={"repo_url": address})

    assert time.monotonic() - told[0] < 5
    assert [said["reason"] for said in coordinator.completions] == reasons


@pytest.mark.parametrize("wishes", [{"git_protocols": "http", "disk_reserve_mb": 0}])
def test_git_ends_soon_after_the_step_that_it_works_for(run, attempt, silent_server):
    address, met = silent_server

    def cancel():
        assert met.wait(20)
        attempt.cancel("cancelled")

    threading.Thread(target=cancel, daemon=True).start()
    run(source={"repo_url": address})

    for work in [thread for thread in threading.enumerate() if thread.name.startswith("work-")]:
        work.join(20)
        assert not work.is_alive()


def test_a_cancellation_is_heard_while_outputs_are_uploaded(run, coordinator, attempt):
    def cancel():
        attempt.cancel("cancelled")
        return httpx.Response(503)

    coordinator.answers["put_blob"] = [cancel]

    run("printf x > out", output_paths=["out"])

    assert coordinator.asked.count("put_blob") == 1
    assert [said["reason"] for said in coordinator.completions] == ["cancelled"]


CANARY = "canary-2718281828"


def holders_of(text, folder):
    """The files below `folder` that hold it; what the trash removes meanwhile holds nothing."""
    found = []
    for path in (Path(place, name) for place, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes():
                found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.threat("G03")
@pytest.mark.threat("G08")
def test_a_secret_reaches_the_script_and_neither_the_log_nor_the_disk(run, coordinator, attempt, state):
    attempt.secrets = {"TOKEN": CANARY}
    seen = []
    coordinator.answers["complete"] = [
        lambda: seen.append(holders_of(CANARY, state)) or refusal(503, "later")
    ]
    spellings = 'echo "$TOKEN"; printf %s "$TOKEN" | base64; printf %s "$TOKEN" | od -An -tx1 | tr -d " \\n"'

    run(f'test "$TOKEN" = {CANARY[:6]}"{CANARY[6:]}"; {spellings}; echo; echo done', secret_names=["TOKEN"])

    assert coordinator.completions[-1]["status"] == "success"
    assert coordinator.log.splitlines().count(b"***") == 3, coordinator.log
    assert seen == [["a/step-1/1/log"]]  # what the step itself printed, until the attempt is removed
    deadline = time.monotonic() + 10
    while holders_of(CANARY, state):  # the trash is emptied by a thread of its own
        assert time.monotonic() < deadline


@pytest.mark.threat("G02")
def test_each_line_of_a_secret_is_masked(run, coordinator, attempt):
    attempt.secrets = {"KEY": "-----BEGIN KEY-----\nfirst line of it\nsecond line\n-----END KEY-----\n"}

    run('echo "$KEY"; echo "$KEY" | sed "s/^/    /"; echo "$KEY" | sed "s/$/\\r/"', secret_names=["KEY"])

    assert b"first line" not in coordinator.log
    assert b"second line" not in coordinator.log


@pytest.mark.threat("G05")
def test_a_secret_that_is_too_short_is_named_and_not_masked(run, coordinator, attempt):
    attempt.secrets = {"PIN": "987", "TOKEN": CANARY}

    run('echo "pin $PIN"; echo "token $TOKEN"', secret_names=["PIN", "TOKEN"])

    assert b"warning: secret PIN is shorter than 4 bytes and is not masked" in coordinator.log
    assert b"\npin 987\n" in coordinator.log
    assert b"\ntoken ***\n" in coordinator.log


@pytest.mark.threat("G08")
def test_what_we_say_of_outputs_is_masked_too(run, coordinator, attempt):
    attempt.secrets = {"TOKEN": CANARY}

    run('mkdir out; mkfifo "out/$TOKEN"', output_paths=["out", f"{CANARY}/x"], secret_names=["TOKEN"])

    (said,) = coordinator.completions
    assert said["reason"] == "output_missing"
    assert said["detail"] == "missing: ***/x"
    assert b"out/***" in coordinator.log
    assert CANARY.encode() not in coordinator.log


def test_an_error_that_was_cut_shows_no_half_of_a_secret(run, coordinator, attempt, means, monkeypatch):
    attempt.secrets = {"TOKEN": CANARY}
    text = "x" * 3990 + CANARY

    def fail(*_args, **_more):
        raise StepError(Reason.BAD_CONFIG, text)

    monkeypatch.setattr(means.executor, "create", fail)
    run("true", secret_names=["TOKEN"])

    assert "canary" not in coordinator.completions[0]["detail"]
    assert b"canary" not in coordinator.log


@pytest.mark.threat("G10")
def test_without_its_secrets_nothing_is_begun_and_not_a_byte_of_the_log_is_sent(
    run, coordinator, attempt, state
):
    run(f"touch {state}/ran", secret_names=["TOKEN"])

    (said,) = coordinator.completions
    assert (said["reason"], said["infra"]) == ("internal", True)
    assert not (state / "ran").exists()
    assert "log" not in coordinator.asked


@pytest.mark.threat("G10")
def test_a_step_that_ran_is_told_without_its_log_when_its_secrets_are_not_to_be_had(
    run, coordinator, attempt, state
):
    folder = attempt_dir(state, "step-1", 1)
    claim = a_claim('echo "$TOKEN"', secret_names=["TOKEN"]).model_dump(mode="json")
    journal = Journal.create(folder, claim)
    (folder / "log").write_text(f"{CANARY}\n")
    ended = {"rc": 3, "code": 3, "oom": False, "reason": None, "detail": CANARY}
    journal.advance(JournalPhase.EXITED, ended=ended, code=3)

    run()

    (said,) = coordinator.completions
    assert (said["status"], said["exitCode"]) == ("failed", 3)
    assert "logSize" not in said
    assert CANARY not in json.dumps(said)
    assert "log" not in coordinator.asked
