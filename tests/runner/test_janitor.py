"""What no attempt holds is removed while the runner lives, and what an attempt needs stays."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx
import pytest

from runner.blobs import LocalBlobs
from runner.errors import EngineUnavailable
from runner.executor.base import Leftover
from runner.janitor import Janitor
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.mounts import mount_overlay, overlays_of, unmount
from runner.room import Marks
from runner.spares import Spare
from shared.protocol import Mount
from tests.runner.claims import a_claim
from tests.runner.runners import an_agent

LONG_AGO_S = 10_000


class Engine:
    """An executor of which only what is left standing matters; it may be away for a while."""

    def __init__(self):
        self.standing = []
        self.failures = 0
        self.asked = threading.Event()
        self.images = []
        self.wanted = None
        self.strays_asked = None
        self.folder = None

    def leftovers(self):
        self.asked.set()
        return list(self.standing)

    def remove_leftover(self, leftover):
        if self.failures:
            self.failures -= 1
            raise EngineUnavailable("the engine is away")
        self.standing.remove(leftover)

    def remove_strays(self, held):
        self.strays_asked = set(held)

    def spares(self, wanted):
        self.wanted = set(wanted)
        return iter(self.images)

    def storage(self):
        return self.folder

    def close(self):
        pass


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def means(state, engine):
    made = an_agent(state, lambda request: httpx.Response(204))._means
    object.__setattr__(made, "executor", engine)
    yield made
    made.caches.close()
    made.trash.close()
    made.client.close()


@pytest.fixture
def janitor(means, state):
    return Janitor(means, state, source_bytes=2**40)


@pytest.fixture
def at_work(janitor):
    """Starts it with the attempts that are held."""

    def start(*held):
        janitor.start(lambda: set(held))
        return janitor

    yield start
    janitor.stop()


def left_behind(state, engine, step_id, phase=JournalPhase.DONE, **data):
    """An attempt whose container still stands."""
    folder = attempt_dir(state, step_id, 1)
    journal = Journal.create(folder, a_claim(step_id=step_id).model_dump(mode="json"))
    journal.advance(phase, **data)
    engine.standing.append(Leftover(f"container-{step_id}", step_id, 1, True))
    return folder


def eventually(holds, timeout_s=10):
    until = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def standing(engine):
    return [leftover.step_id for leftover in engine.standing]


@pytest.mark.parametrize("phase", [JournalPhase.DONE, JournalPhase.RUNNING])
def test_what_no_attempt_holds_is_removed_while_the_runner_lives(at_work, state, engine, phase):
    gone = left_behind(state, engine, "over", phase)
    stays = left_behind(state, engine, "goes-on", JournalPhase.RUNNING)

    at_work(("goes-on", 1)).clean_up_soon()

    assert eventually(lambda: not gone.exists())
    assert standing(engine) == ["goes-on"]
    assert stays.exists()


def test_a_folder_whose_journal_cannot_be_read_goes_with_its_container(at_work, state, engine):
    gone = left_behind(state, engine, "over")
    (gone / "journal.json").write_text("{")

    at_work().clean_up_soon()

    assert eventually(lambda: not gone.exists())
    assert standing(engine) == []


def test_a_held_attempt_keeps_its_folder_even_when_it_is_done(at_work, state, engine):
    stays = left_behind(state, engine, "cleaning-up", JournalPhase.DONE)
    gone = left_behind(state, engine, "over")

    at_work(("cleaning-up", 1)).clean_up_soon()

    assert eventually(lambda: not gone.exists())
    assert stays.exists()


def test_cleaning_up_is_tried_again_while_the_engine_is_away(at_work, state, engine, monkeypatch):
    monkeypatch.setattr("runner.janitor.SOON_S", 0.05)
    engine.failures = 3
    gone = left_behind(state, engine, "over")

    at_work().clean_up_soon()

    assert eventually(lambda: not gone.exists())
    assert standing(engine) == []


def test_a_folder_stays_as_long_as_its_container_stands(at_work, state, engine):
    engine.failures = 1000
    kept = left_behind(state, engine, "over")
    bare = attempt_dir(state, "bare", 1)
    bare.mkdir(parents=True)

    at_work().clean_up_soon()

    assert eventually(lambda: not bare.exists())
    assert kept.exists()


def test_the_layers_of_an_attempt_that_is_done_stay_as_long_as_its_folder(at_work, means, state, engine):
    needed, unneeded = (state / "inputs" / name for name in ("needed", "unneeded"))
    for layer in (needed, unneeded):
        layer.mkdir()
        os.utime(layer, (0, 0))
    folder = left_behind(state, engine, "cleaning-up", JournalPhase.DONE)
    (folder / "workspace.json").write_text('{"pins": ["needed"]}')

    at_work(("cleaning-up", 1)).clean_up_soon()

    assert eventually(lambda: not unneeded.exists())
    assert needed.exists()


def a_blob(means, content, *, used_ago_s=LONG_AGO_S, former=None):
    """Used by a former life of the runner, unless `former` says by whom."""
    former = former or LocalBlobs(means.blobs.root, max_bytes=1)
    part = means.blobs.root.parent / "content"
    part.write_bytes(content)
    fd = os.open(part, os.O_RDONLY)
    try:
        sha256, _ = former.put_fd(fd)
    finally:
        os.close(fd)
    path = former.path(sha256)
    os.utime(path, (time.time() - used_ago_s, path.stat().st_mtime))
    return sha256, path


def test_outputs_that_a_journal_names_are_not_evicted_before_they_are_uploaded(at_work, means, state, engine):
    means.blobs.max_bytes = 1
    completion, in_completion = a_blob(means, b"one")
    collected, in_collected = a_blob(means, b"two")
    _, unnamed = a_blob(means, b"nobody's")
    entry = {"path": "out", "type": "file", "size": 3, "sha256": completion}
    left_behind(
        state, engine, "telling", JournalPhase.COMPLETING, completion={"artifacts": [entry, {"type": "link"}]}
    )
    left_behind(state, engine, "uploading", JournalPhase.UPLOADING, collected=[collected])

    at_work(("telling", 1), ("uploading", 1)).clean_up_soon()

    assert eventually(lambda: not unnamed.exists())
    assert in_completion.exists()
    assert in_collected.exists()


def test_outputs_of_a_long_collection_are_not_evicted_before_anything_names_them(
    at_work, means, state, engine
):
    means.blobs.max_bytes = 1
    _, old = a_blob(means, b"old")
    left_behind(state, engine, "collecting", JournalPhase.COLLECTING)
    with means.blobs.gathering():
        _, output = a_blob(means, b"early", former=means.blobs)

        at_work(("collecting", 1)).clean_up_soon()

        assert eventually(lambda: not old.exists())
        assert output.exists()


@pytest.fixture
def cramped(means, state):
    """A janitor to whom every disk is too full."""
    made = Janitor(means, state, source_bytes=2**40, marks=Marks(1, 1))
    yield made
    made.stop()


def a_cache(means, state, key, *, used_ago_s=LONG_AGO_S):
    """A published generation; returns its manifest and its layer."""
    folder = attempt_dir(state, f"made-{key}", 1)
    folder.mkdir(parents=True)
    cache = means.caches.open(folder, 0, Mount(path="/cache", key=key, trust="default"))
    (cache.path / "file").write_text(key)
    assert means.caches.publish(cache)
    means.trash.throw(folder)
    manifest = state / "cache" / "keys" / f"{cache.key}.json"
    os.utime(manifest, (time.time() - used_ago_s,) * 2)
    return manifest


def a_checkout(state, name, *, used_ago_s=LONG_AGO_S):
    folder = state / "checkouts" / name
    folder.mkdir(parents=True)
    record = state / "sources" / f"{name}.json"
    record.write_text('{"url": "file:///somewhere", "bytes": 4096}')
    os.utime(record, (time.time() - used_ago_s,) * 2)
    return folder


def test_where_the_disk_is_full_whatever_can_be_made_again_goes(cramped, means, state, engine):
    removed = []
    image = Spare("image", "busybox", 0.0, 5, lambda: removed.append("busybox") or True)
    engine.folder, engine.images = state, [image]
    gone = [a_blob(means, b"old")[1], a_cache(means, state, "old"), a_checkout(state, "old")]

    cramped.start(frozenset)
    cramped.clean_up_soon()

    assert eventually(lambda: not any(path.exists() for path in gone) and removed)


def test_where_the_disk_is_full_what_is_needed_or_was_just_used_stays(cramped, means, state, engine):
    engine.folder = state
    _, young_blob = a_blob(means, b"young", used_ago_s=60, former=means.blobs)
    collected, needed_blob = a_blob(means, b"needed")
    young_cache = a_cache(means, state, "young", used_ago_s=60)
    young_checkout, needed_checkout = a_checkout(state, "young", used_ago_s=60), a_checkout(state, "needed")
    means.sources._recent.note("young")
    folder = left_behind(state, engine, "at-work", JournalPhase.UPLOADING, collected=[collected])
    (folder / "workspace.json").write_text('{"pins": ["needed"]}')
    last = a_checkout(state, "last")

    cramped.start(lambda: {("at-work", 1)})
    cramped.clean_up_soon()

    assert eventually(lambda: not last.exists())
    assert all(path.exists() for path in (young_blob, needed_blob, young_cache))
    assert all(path.exists() for path in (young_checkout, needed_checkout))
    assert engine.wanted == {a_claim().image}, "the images of attempts in hand are named"


def test_layers_that_a_running_step_stands_on_survive_a_full_disk(cramped, means, state, engine):
    a_cache(means, state, "used")
    folder = attempt_dir(state, "reader", 1)
    Journal.create(folder, a_claim(step_id="reader").model_dump(mode="json"))
    reader = means.caches.open(folder, 0, Mount(path="/cache", key="used", trust="default"))
    os.utime(state / "cache" / "keys" / f"{reader.key}.json", (0, 0))
    gone = a_checkout(state, "gone")

    cramped.start(lambda: {("reader", 1)})
    cramped.clean_up_soon()

    assert eventually(lambda: not gone.exists())
    assert (reader.path / "file").read_text() == "used"
    assert all((state / "cache" / "layers" / layer.name).is_dir() for layer in reader.base)
    means.caches.discard(reader)


def test_an_engine_that_is_away_does_not_keep_other_things_from_going(cramped, means, state, engine):
    def away(wanted):
        raise EngineUnavailable("it is away")

    engine.folder, engine.spares = state, away
    gone = a_checkout(state, "gone")

    cramped.start(frozenset)
    cramped.clean_up_soon()

    assert eventually(lambda: not gone.exists())


def test_a_folder_of_images_that_goes_ends_no_janitor_and_is_asked_for_anew(
    at_work, state, engine, monkeypatch
):
    monkeypatch.setattr("runner.janitor.LOOK_S", 0.02)
    engine.folder = state / "engine"
    engine.folder.mkdir()
    working = at_work()
    engine.folder.rmdir()
    assert eventually(lambda: working._room.is_blind)
    engine.folder = state / "moved"
    engine.folder.mkdir()

    working._go_round()

    assert working._thread.is_alive()
    assert not working._room.is_needed()
    assert not working._room.is_blind


def test_an_engine_that_was_away_at_the_start_has_its_disk_watched_later(at_work, state, engine, monkeypatch):
    def away():
        raise EngineUnavailable("the engine is away")

    monkeypatch.setattr(engine, "storage", away)
    working = at_work()
    monkeypatch.undo()
    engine.folder = state

    working._go_round()

    assert len(working._room._areas) == 2


# --- leftovers of a former life ------------------------------------------------------------------------


def an_overlay(state, path):
    """A view that somebody mounted at `path` and forgot."""
    lower, upper, work = (path.with_name(f"{path.name}.{part}") for part in ("lower", "upper", "work"))
    for folder in (path, lower, upper, work):
        folder.mkdir(parents=True)
    (lower / "file").write_text("below")
    mount_overlay(path, f"upperdir={upper},workdir={work},lowerdir={lower}")
    assert path.is_mount()
    return path


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting is root's")


@needs_root
def test_forgotten_mounts_of_attempts_that_nobody_knows_are_taken_off_at_the_start(janitor, at_work, state):
    odd = an_overlay(state, attempt_dir(state, "over", 1) / "odd-name")
    outside_of_attempts = an_overlay(state, state / "cache" / "half-made.view")

    janitor.sweep_folder()
    assert not outside_of_attempts.is_mount()
    at_work()

    assert eventually(lambda: not attempt_dir(state, "over", 1).exists() and not overlays_of(state))
    assert not odd.is_mount()


@needs_root
def test_a_second_runners_mounts_below_our_folder_stay(janitor, at_work, state):
    foreign = an_overlay(state, attempt_dir(state / "two", "step-9", 1) / "ws")

    janitor.sweep_folder()
    at_work()._go_round()

    assert foreign.is_mount()
    unmount(foreign)


@needs_root
def test_mounts_of_attempts_that_go_on_stay(janitor, at_work, state, engine):
    folder = left_behind(state, engine, "goes-on", JournalPhase.RUNNING)
    mounted = an_overlay(state, folder / "ws")
    over = left_behind(state, engine, "over")

    janitor.sweep_folder()
    at_work(("goes-on", 1))

    assert eventually(lambda: not over.exists())
    assert mounted.is_mount()
    unmount(mounted)


@needs_root
def test_what_the_operator_mounted_below_the_state_folder_stays(janitor, state, tmp_path):
    own = an_overlay(tmp_path, tmp_path / "own")
    target = state / "blobs" / "elsewhere"
    target.mkdir()
    mount_overlay(target, f"lowerdir={own}.lower:{own}.upper", read_only=True)

    janitor.sweep_folder()

    assert target.is_mount()
    unmount(target)
    unmount(own)


@needs_root
def test_a_mount_that_went_to_the_trash_with_its_folder_is_taken_off_there(at_work, means, state):
    mounted = an_overlay(state, attempt_dir(state, "over", 1) / "ws")
    means.trash.throw(mounted.parent)
    [thrown] = means.trash.folder.iterdir()
    assert (thrown / "ws").is_mount()

    at_work().clean_up_soon()

    assert eventually(lambda: not (thrown / "ws").is_mount())


def test_half_made_folders_of_a_former_life_go_at_the_start(janitor, state):
    half_made = [state / name for name in ("probe-1", "inputs/.part-1", "checkouts/.part-1")]
    for folder in half_made:
        folder.mkdir(parents=True, exist_ok=True)

    janitor.sweep_folder()

    assert not any(folder.exists() for folder in half_made)


LIFE = """
import os, sys
from pathlib import Path
from runner.credentials import Credentials, GitLogin
from runner.git import unprivileged_user
from runner.source import SourceCache
from shared.protocol import Source

state = Path(sys.argv[1])
login = GitLogin(ssh_key=state / "own-key")
sources = SourceCache(
    state,
    protocols=frozenset({"ssh"}),
    run_as=unprivileged_user(),
    credentials=Credentials(git={"git.test": login}),
    environ={"PATH": f"{state}/bin:{os.environ['PATH']}"},
)
sources.resolve(Source(repo_url="ssh://git@git.test/x.git", branch="main"))
"""


def a_life_killed_during_a_fetch(state):
    """What it left: a handle on the ssh that goes on, and the key that was lent to it."""
    ssh, said = state / "bin" / "ssh", state / "said"
    ssh.parent.mkdir()
    said.mkdir()
    said.chmod(0o777)  # git runs as another user
    ssh.write_text(f"#!/bin/sh\necho $$ >{said}/part\nmv {said}/part {said}/pid\nexec sleep 600\n")
    ssh.chmod(0o755)
    (state / "own-key").write_text("the key")
    life = subprocess.Popen([sys.executable, "-c", LIFE, str(state)])
    try:
        assert eventually((said / "pid").exists, timeout_s=30)
    finally:
        life.kill()
        life.wait(10)
    return os.pidfd_open(int((said / "pid").read_text())), state / "git"


def has_ended(handle, timeout_s=0.0):
    return bool(select.select([handle], [], [], timeout_s)[0])


def test_git_of_a_life_that_was_killed_ends_at_the_start_and_what_it_was_lent_goes(janitor, state):
    handle, home = a_life_killed_during_a_fetch(state)
    try:
        assert [key.read_text() for key in home.glob("*/key")] == ["the key"]
        assert not has_ended(handle)

        janitor.sweep_folder()

        assert has_ended(handle, 10)
        assert list(home.iterdir()) == []
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


@needs_root
def test_git_of_another_runner_that_has_its_own_folder_under_the_same_path_goes_on(janitor, state):
    home = state / "git"
    hidden = f"mount -t tmpfs none {state} && mkdir {home} && echo there && exec sleep 600"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hidden],
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        stdout=subprocess.PIPE,
    ) as other:
        try:
            assert other.stdout.readline() == b"there\n"

            janitor.sweep_folder()

            assert other.poll() is None
        finally:
            other.kill()


def test_the_folder_of_a_step_goes_with_its_last_attempt(at_work, state):
    attempt_dir(state, "over", 1).mkdir(parents=True)

    at_work()

    assert eventually(lambda: not (state / "a" / "over").exists())


def test_nothing_outside_the_folder_is_touched_before_the_coordinator_has_said_whose_it_is(
    janitor, state, engine
):
    left_behind(state, engine, "another-process-runs-it", JournalPhase.DONE)

    janitor.sweep_folder()

    assert standing(engine) == ["another-process-runs-it"]
    assert not engine.asked.is_set()


def test_what_a_former_life_left_goes_at_once(at_work, state, engine):
    gone = left_behind(state, engine, "over")

    at_work()

    assert eventually(lambda: not gone.exists())
    assert standing(engine) == []


def test_a_fresh_claim_finds_nothing_of_a_former_life_under_its_name(janitor, at_work, state, engine):
    """Its journal could not be read any more, and the coordinator has handed the attempt out again."""
    folder = left_behind(state, engine, "again", JournalPhase.RUNNING)
    others = left_behind(state, engine, "others", JournalPhase.RUNNING)
    at_work(("again", 1), ("others", 1))

    janitor.make_way(("again", 1))

    assert standing(engine) == ["others"]
    assert not folder.exists()
    assert others.exists()


def test_a_fresh_claim_waits_until_the_removal_of_its_name_is_over(janitor, state, engine):
    left_behind(state, engine, "again")
    removing, go_on, held = threading.Event(), threading.Event(), set()
    remove = engine.remove_leftover

    def slowly(leftover):
        removing.set()
        assert go_on.wait(10)
        remove(leftover)

    engine.remove_leftover = slowly
    janitor.start(lambda: set(held))
    assert removing.wait(10)
    held.add(("again", 1))
    way = threading.Thread(target=janitor.make_way, args=[("again", 1)])
    way.start()

    way.join(0.2)
    assert way.is_alive()
    go_on.set()
    way.join(10)

    assert not way.is_alive()
    assert standing(engine) == []
    janitor.stop()


def test_a_claim_with_nothing_in_its_way_does_not_ask_the_engine(janitor, at_work, state, engine):
    gone = left_behind(state, engine, "over")
    at_work()
    assert eventually(lambda: not gone.exists())
    engine.asked.clear()

    janitor.make_way(("fresh", 1))

    assert not engine.asked.is_set()


def test_what_else_the_engine_holds_for_nobody_is_asked_for_with_the_attempts_in_hand(at_work, state, engine):
    left_behind(state, engine, "goes-on", JournalPhase.RUNNING)

    at_work(("goes-on", 1)).clean_up_soon()

    assert eventually(lambda: engine.strays_asked == {("goes-on", 1)})
