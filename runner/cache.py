"""Keeps cache directories between builds, in generations that are never changed once they can be seen.

A generation is a manifest that names a stack of immutable layers. A step sees them under a private layer
of its own; when the step has succeeded, that layer joins the pool and a new manifest names it on top.
Whatever is missing or damaged here costs a cold start, never a step.

    <state>/cache/keys/<key>.json     the manifest of the latest generation; its time is the last use
    <state>/cache/layers/<id>/        immutable layers, shared by manifests
    <state>/cache/pins/<id>.json      what running steps stand on
    <state>/cache/lock                held for moments: naming layers excludes looking for unnamed ones
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from runner.durable import sync_folder, write_whole
from runner.errors import StepError
from runner.layers import Layers
from runner.spares import UNTOUCHABLE_S as UNUSED_S
from runner.spares import Spare
from runner.trash import Trash
from runner.trees import Redirected, TreeSize, measure, walk
from shared.ids import new_id
from shared.protocol import Mount
from shared.reasons import Reason

log = structlog.get_logger()

VERSION = 1
SQUASH_AT = 16
# With more changes than this, one sync of the whole file system is cheaper than one for each file.
MANY_CHANGES = 64
DEFAULT_MAX_BYTES = 20 * 1024**3
STOP_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 60.0
LOCK_PAUSE_S = 0.002
# The content of layers up to this size is looked at as well; of larger ones names, sizes, times and modes.
MOST_READ_BYTES = 64 * 1024**2
MOST_READ_ENTRIES = 2_000
# A layer that nobody names may be about to be named by another process's squash.
UNTOUCHABLE_S = 3600.0


@dataclass(frozen=True)
class Layer:
    """One immutable folder of the pool; `shape` is what its entries looked like when it joined."""

    name: str
    bytes: int
    entries: int
    shape: str = ""


@dataclass(frozen=True)
class Generation:
    """What a key holds now; layers topmost first."""

    zone: str
    mode: str
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


@dataclass(frozen=True)
class OpenCache:
    """A cache directory in the hands of one step; `path` is what the step sees."""

    path: Path
    upper: Path
    attempt_dir: Path
    pin: str
    key: str
    zone: str
    base: tuple[Layer, ...]
    base_key: str = ""
    signature: str = ""

    @property
    def is_warm(self) -> bool:
        return bool(self.base)


@dataclass(frozen=True)
class Usage:
    """How much the caches of this machine hold."""

    keys: int
    layers: int
    bytes: int


class Damaged(Exception):
    """A manifest or a layer is not what was written."""


class CacheStore:
    """The caches below one state folder; safe to use from several threads and processes."""

    def __init__(
        self,
        state: Path,
        layers: Layers,
        trash: Trash,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        root = state / "cache"
        self._keys, self._pool, self._pins = root / "keys", root / "layers", root / "pins"
        self._lock = root / "lock"
        self._layers = layers
        self._trash = trash
        self._max_bytes = max_bytes
        self._clock = clock
        self._squashing: dict[str, threading.Thread] = {}
        self._squash_guard = threading.Lock()
        self._sound: set[str] = set()  # layers that this process has made or looked through
        for folder in (root, self._keys, self._pool, self._pins):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # layers hold whatever steps wrote, setuid bits included

    def open(self, attempt_dir: Path, index: int, mount: Mount) -> OpenCache:
        """Give a step its cache directory: its own trust's latest, else the default branch's, else empty.

        `mount.trust` is the runner's own verdict by now. A second call for the same attempt finds it open.
        """
        attempt_dir.chmod(0o700)
        found = self.find(attempt_dir, index)
        if found is None:
            for key in _keys_to_try(mount):
                self._put_aside_if_damaged(key)
            found = self._pin(attempt_dir, index, mount)
        try:
            return self._show(found)
        except (OSError, StepError, Redirected) as error:
            if isinstance(error, StepError) and error.reason == Reason.DISK_FULL:
                raise
            log.warning("a cache could not be restored and starts cold", key=found.key, cause=str(error))
            self._quarantine(found.base_key)
            self._clear(found)
            cold = replace(found, base=(), base_key="", signature="")
            self._write_pin(cold)
            return self._show(cold)

    def find(self, attempt_dir: Path, index: int) -> OpenCache | None:
        """The cache directory that a predecessor opened for this attempt, if there is one."""
        name = _digest(str(attempt_dir), str(index))[:20]
        try:
            fields = _read_sealed(self._pins / f"{name}.json")
            base = tuple(Layer(**layer) for layer in fields["base"])
        except FileNotFoundError:
            return None
        except (Damaged, OSError, TypeError, KeyError) as error:
            log.warning("a pin is damaged", pin=name, cause=str(error))
            return None
        place = attempt_dir / f"c{index}"
        return OpenCache(
            path=place,
            upper=place.with_name(f"{place.name}.upper"),
            attempt_dir=attempt_dir,
            pin=name,
            key=fields["key"],
            zone=fields["zone"],
            base=base,
            base_key=fields["base_key"],
            signature=fields["signature"],
        )

    def publish(self, cache: OpenCache) -> bool:
        """Make what the step left the latest generation, if it changed anything; True when it did.

        Of two publishers the last one wins. A failure to publish is said in the log and costs nothing else.
        """
        try:
            self._layers.unstack(cache.path)
            changed = self._changed_folder(cache)
            if changed is None:
                self._touch(cache.key)
                return False
            self._publish_folder(cache, changed)
        except (OSError, StepError) as error:
            log.warning("a cache could not be published", key=cache.key, cause=str(error))
            return False
        finally:
            self._release(cache)
        self._squash_when_deep(cache.key)
        return True

    def discard(self, cache: OpenCache) -> None:
        """Forget what the step wrote; harmless when it is forgotten already."""
        self._layers.unstack(cache.path)
        self._release(cache)

    def usage(self) -> Usage:
        """What the manifests name, each layer counted once."""
        generations = self._generations()
        layers = {layer.name: layer.bytes for _, _, found in generations for layer in found.layers}
        return Usage(len(generations), len(layers), sum(layers.values()))

    def evict(self, max_bytes: int | None = None) -> list[str]:
        """Drop generations until the rest fits, and every layer that nobody names; returns the dropped keys.

        Always the zone (project and trust) that holds most gives first, its longest unused generation at
        the head, so that one zone's flood cannot wash another's caches away.
        """
        limit = self._max_bytes if max_bytes is None else max_bytes
        dropped: list[str] = []
        with self._locked():
            generations = self._generations()
            while generations and _bytes_of(generations) > limit:
                before = _bytes_of(generations)
                victim = _choose_victim(generations)
                generations.remove(victim)
                (self._keys / f"{victim[0]}.json").unlink(missing_ok=True)
                dropped.append(victim[0])
                log.info("cache_removed", key=victim[0], bytes=before - _bytes_of(generations))
            self._drop_stale_pins()
            self._sweep(generations)
        return dropped

    def spares(self) -> Iterator[Spare]:
        """What could go for want of room, in the order of `evict`: so no zone's flood reaches another's."""
        with self._locked():
            left = self._generations()
            pinned = self._pinned()
        if pinned is None:
            return
        while left:
            victim = _choose_victim(left)
            left.remove(victim)
            needed = {name for _, _, generation in left for name in generation.names} | pinned
            key, used, generation = victim
            size = sum(layer.bytes for layer in generation.layers if layer.name not in needed)
            if size > 0 and self._clock() - used > UNUSED_S:
                yield Spare("cache", key, used, size, partial(self._drop, key, used))

    def _drop(self, key: str, used: float) -> bool:
        """Remove one key and the layers that nobody else names, unless it was used since we looked."""
        with self._locked():
            place = self._keys / f"{key}.json"
            try:
                if place.stat().st_mtime != used:
                    return False
            except FileNotFoundError:
                return False
            place.unlink()
            self._sweep(self._generations())
        return True

    def close(self) -> None:
        """Wait for squashing to end; what is cut short leaves nothing that counts."""
        with self._squash_guard:
            threads = list(self._squashing.values())
        for thread in threads:
            thread.join(STOP_TIMEOUT_S)

    def squash(self, key: str) -> bool:
        """Replace a key's stack by one layer of hard links that shows the same; True when it took effect."""
        name = f"squash-{key[:20]}-{new_id()}"
        part = self._pool / f".part-{new_id()}"
        try:
            with self._locked():
                before = self._read_generation(key)
                if before is None or len(before.layers) < 2:
                    return False
                _write_sealed(
                    self._pins / f"{name}.json", {"base": [asdict(layer) for layer in before.layers]}
                )
            size = self._layers.merge([self._pool / layer for layer in before.names], part)
            _sync_file_system(part)
            return self._replace_tail(key, before, part, size)
        finally:
            self._trash.throw(part)
            (self._pins / f"{name}.json").unlink(missing_ok=True)

    def _pin(self, attempt_dir: Path, index: int, mount: Mount) -> OpenCache:
        """Choose the generation and write down that it is in use, before anybody can collect it."""
        candidates = _keys_to_try(mount)
        own, zone = candidates[0], _digest(mount.key, mount.trust)[:20]
        place = attempt_dir / f"c{index}"
        with self._locked():
            usable = ((key, self._usable_generation(key)) for key in candidates)
            base_key, found = next((pair for pair in usable if pair[1] is not None), ("", None))
            self._touch(base_key)
            cache = OpenCache(
                path=place,
                upper=place.with_name(f"{place.name}.upper"),
                attempt_dir=attempt_dir,
                pin=_digest(str(attempt_dir), str(index))[:20],
                key=own,
                zone=zone,
                base=found.layers if found is not None else (),
                base_key=base_key,
            )
            self._write_pin(cache)
        return cache

    def _show(self, cache: OpenCache) -> OpenCache:
        lowers = self._shallow_enough(cache)
        was_there = self._layers.is_stacked(cache.path)
        self._layers.stack(cache.path, lowers, cache.upper)
        if self._layers.mode == "overlay" or was_there:
            return cache
        signed = replace(cache, signature=_signature(cache.path))
        self._write_pin(signed)
        return signed

    def _shallow_enough(self, cache: OpenCache) -> list[Path]:
        """The layers to mount; a stack too deep for one mount is first merged for this attempt alone."""
        lowers = [self._pool / layer.name for layer in cache.base]
        if self._layers.fits(cache.path, lowers, cache.upper):
            return lowers
        merged = cache.path.with_name(f"{cache.path.name}.merged")
        if not merged.is_dir():
            part = cache.path.with_name(f"{cache.path.name}.merging")
            self._trash.throw(part)
            self._layers.merge(lowers, part)
            part.rename(merged)
        return [merged]

    def _changed_folder(self, cache: OpenCache) -> Path | None:
        """The folder that holds what is new: all of it for copies, the differences for overlays."""
        if self._layers.mode == "overlay":
            is_new = cache.upper.is_dir() and any(cache.upper.iterdir())
            return cache.upper if is_new else None
        if not cache.path.is_dir() or _signature(cache.path) == cache.signature:
            return None
        return cache.path

    def _publish_folder(self, cache: OpenCache, changed: Path) -> None:
        _sync_changes(changed)
        size = measure(changed)
        layer = Layer(new_id(), size.bytes, size.entries, _shape(changed, size))
        below = cache.base if self._layers.mode == "overlay" else ()
        with self._locked():
            if not all((self._pool / name.name).is_dir() for name in below):
                raise OSError(errno.ENOENT, "a layer below has gone", cache.key)
            changed.chmod(0o777)
            changed.rename(self._pool / layer.name)
            self._sound.add(layer.name)
            sync_folder(self._pool)
            self._write_generation(cache.key, Generation(cache.zone, self._layers.mode, (layer, *below)))

    def _replace_tail(self, key: str, before: Generation, part: Path, size: TreeSize) -> bool:
        """Put the merged layer in place of those it shows, if they are still this key's lowest."""
        merged = Layer(new_id(), size.bytes, size.entries, _shape(part, size))
        with self._locked():
            now = self._read_generation(key)
            if now is None or now.names[-len(before.names) :] != before.names:
                return False
            part.rename(self._pool / merged.name)
            sync_folder(self._pool)
            rest = now.layers[: -len(before.layers)]
            self._write_generation(key, Generation(now.zone, now.mode, (*rest, merged)), keep_time=True)
        return True

    def _squash_when_deep(self, key: str) -> None:
        generation = self._read_generation(key)
        if generation is None or len(generation.layers) < SQUASH_AT:
            return
        with self._squash_guard:
            running = self._squashing.get(key)
            if running is not None and running.is_alive():
                return
            thread = threading.Thread(target=self._squash_quietly, args=(key,), name="squash", daemon=True)
            self._squashing[key] = thread
            thread.start()

    def _squash_quietly(self, key: str) -> None:
        try:
            self.squash(key)
        except (OSError, StepError, Redirected) as error:
            log.warning("a cache could not be squashed", key=key, cause=str(error))
        with self._squash_guard:
            self._squashing.pop(key, None)

    def _release(self, cache: OpenCache) -> None:
        self._clear(cache)
        (self._pins / f"{cache.pin}.json").unlink(missing_ok=True)

    def _clear(self, cache: OpenCache) -> None:
        """Take away the folders of one open cache."""
        self._layers.unstack(cache.path)
        for suffix in ("", ".part", ".upper", ".upper.work", ".merged", ".merging"):
            self._trash.throw(cache.path.with_name(cache.path.name + suffix))

    def _write_pin(self, cache: OpenCache) -> None:
        fields = {
            "attempt_dir": str(cache.attempt_dir),
            "key": cache.key,
            "zone": cache.zone,
            "base": [asdict(layer) for layer in cache.base],
            "base_key": cache.base_key,
            "signature": cache.signature,
        }
        _write_sealed(self._pins / f"{cache.pin}.json", fields)

    def _write_generation(self, key: str, generation: Generation, *, keep_time: bool = False) -> None:
        place = self._keys / f"{key}.json"
        used = place.stat().st_mtime if keep_time else self._clock()
        _write_sealed(place, {"version": VERSION, **asdict(generation)}, durable=True)
        os.utime(place, (used, used))

    def _read_generation(self, key: str) -> Generation | None:
        """What the manifest says; a damaged one is put aside."""
        try:
            fields = _read_sealed(self._keys / f"{key}.json")
            if fields.get("version") != VERSION:
                raise Damaged("it is of another version")
            layers = tuple(Layer(**layer) for layer in fields["layers"])
            return Generation(fields["zone"], fields["mode"], layers)
        except FileNotFoundError:
            return None
        except (Damaged, OSError, KeyError, TypeError) as error:
            log.warning("a damaged cache is put aside", key=key, cause=str(error))
            self._quarantine(key)
            return None

    def _usable_generation(self, key: str) -> Generation | None:
        found = self._read_generation(key)
        if found is None:
            return None
        if found.mode != self._layers.mode:
            return None  # layers of an overlay mean nothing to a copy; the next publication replaces them
        missing = [name for name in found.names if not _is_folder(self._pool / name)]
        if missing or not found.layers:
            log.warning("a cache with missing layers is put aside", key=key, missing=missing)
            self._quarantine(key)
            return None
        return found

    def _put_aside_if_damaged(self, key: str) -> None:
        """Look once in the life of this process whether each layer is as it was written."""
        found = self._read_generation(key)
        for layer in found.layers if found is not None else ():
            if not layer.shape or layer.name in self._sound:
                continue
            try:
                written = TreeSize(layer.entries, layer.bytes)
                is_sound = _shape(self._pool / layer.name, written) == layer.shape
            except OSError as error:
                log.warning("a layer cannot be looked through", layer=layer.name, cause=str(error))
                continue  # what is missing altogether is found when the layers are pinned
            if not is_sound:
                log.warning("a cache with a damaged layer is put aside", key=key, layer=layer.name)
                self._quarantine(key)
                return
            self._sound.add(layer.name)

    def _quarantine(self, key: str) -> None:
        """Nobody reads this manifest again; its layers are collected when no step stands on them."""
        if key:
            self._trash.throw(self._keys / f"{key}.json")

    def _touch(self, key: str) -> None:
        now = self._clock()
        if not key:
            return
        try:
            os.utime(self._keys / f"{key}.json", (now, now))
        except FileNotFoundError:
            return  # the step read another trust's generation, and its own has none yet

    def _generations(self) -> list[tuple[str, float, Generation]]:
        found: list[tuple[str, float, Generation]] = []
        for place in sorted(self._keys.glob("*.json")):
            generation = self._read_generation(place.stem)
            if generation is not None:
                found.append((place.stem, place.stat().st_mtime, generation))
        return found

    def _drop_stale_pins(self) -> None:
        """A pin whose attempt has no folder any more belongs to nobody."""
        for place in self._pins.glob("*.json"):
            try:
                attempt_dir = _read_sealed(place).get("attempt_dir")
            except (Damaged, OSError):
                attempt_dir = None
            is_old = self._clock() - place.stat().st_mtime > UNTOUCHABLE_S
            if is_old and (attempt_dir is None or not Path(attempt_dir).is_dir()):
                place.unlink(missing_ok=True)

    def _sweep(self, generations: Sequence[tuple[str, float, Generation]]) -> None:
        """Throw away the layers that neither a manifest nor a pin names; the lock is held."""
        named = {name for _, _, generation in generations for name in generation.names}
        pinned = self._pinned()
        if pinned is None:
            return
        named |= pinned
        for folder in self._pool.iterdir():
            is_unfinished = folder.name.startswith(".")
            if is_unfinished and self._clock() - folder.stat().st_mtime < UNTOUCHABLE_S:
                continue
            if folder.name not in named:
                self._trash.throw(folder)

    def _pinned(self) -> set[str] | None:
        """The layers that running steps stand on; None when that cannot be known."""
        pinned: set[str] = set()
        for place in self._pins.glob("*.json"):
            try:
                pinned |= {layer["name"] for layer in _read_sealed(place)["base"]}
            except FileNotFoundError:
                continue  # its step has just ended
            except (Damaged, OSError, KeyError, TypeError) as error:
                log.warning("a damaged pin stops the collection of layers", pin=place.name, cause=str(error))
                return None
        return pinned

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(lock)
            yield
        finally:
            os.close(lock)


def _wait_for_lock(lock: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise StepError(Reason.INTERNAL, "the caches have been locked for too long") from error
            time.sleep(LOCK_PAUSE_S)


def _keys_to_try(mount: Mount) -> list[str]:
    """Its own trust's cache first; only from a more trusted one may another read."""
    own = _key_of(mount, mount.trust)
    return [own] if mount.trust == "default" else [own, _key_of(mount, "default")]


def _key_of(mount: Mount, trust: str) -> str:
    return _digest(mount.key, mount.path, trust)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _bytes_of(generations: Sequence[tuple[str, float, Generation]]) -> int:
    return sum({layer.name: layer.bytes for _, _, found in generations for layer in found.layers}.values())


def _choose_victim(generations: Sequence[tuple[str, float, Generation]]) -> tuple[str, float, Generation]:
    zones: dict[str, int] = defaultdict(int)
    for _, _, generation in generations:
        zones[generation.zone] += sum(layer.bytes for layer in generation.layers)
    largest = max(zones, key=lambda zone: (zones[zone], zone))
    return min((item for item in generations if item[2].zone == largest), key=lambda item: item[1])


def _is_folder(place: Path) -> bool:
    try:
        return stat.S_ISDIR(place.lstat().st_mode)
    except FileNotFoundError:
        return False


def _write_sealed(place: Path, fields: Mapping[str, object], *, durable: bool = False) -> None:
    """JSON with its own digest, so that a flipped bit is seen."""
    body = json.dumps(dict(fields), sort_keys=True)
    write_whole(place, f"{_digest(body)}\n{body}\n".encode(), durable=durable)


def _read_sealed(place: Path) -> dict[str, Any]:
    try:
        digest, _, body = place.read_text().partition("\n")
        fields = json.loads(body)
    except (UnicodeDecodeError, ValueError) as error:
        raise Damaged("it cannot be read") from error
    if digest != _digest(body.rstrip("\n")) or not isinstance(fields, dict):
        raise Damaged("its digest does not match")
    return fields


def _signature(root: Path) -> str:
    """Equal as long as no entry below has another size, time, mode or kind."""
    rows = sorted(
        f"{path}\0{found.st_mode}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_uid}"
        for path, found in walk(root)
        if not stat.S_ISDIR(found.st_mode)
    )
    folders = sorted(f"{path}\0{found.st_mode}" for path, found in walk(root) if stat.S_ISDIR(found.st_mode))
    return _digest(*rows, "", *folders)


def _shape(root: Path, written: TreeSize) -> str:
    """Equal as long as no entry below has another name, kind, mode, size, time or, in a small one, content.

    `written` says how much was written at first: more than that is not looked at.
    """
    reads = written.bytes <= MOST_READ_BYTES and written.entries <= MOST_READ_ENTRIES
    rows: list[str] = []
    skipped = len(os.fspath(root)) + 1
    for path, found in walk(root):
        is_file = stat.S_ISREG(found.st_mode)
        details = f"{found.st_size}\0{found.st_mtime_ns}" if is_file else ""
        content = _digest_of_file(path) if reads and is_file else ""
        rows.append(f"{path[skipped:]}\0{found.st_mode}\0{details}\0{content}")
        if len(rows) > written.entries:
            return ""
    return _digest(*sorted(rows))


def _digest_of_file(path: str) -> str:
    """Nothing for a file that this user may not read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return ""
    with os.fdopen(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_changes(folder: Path) -> None:
    """Have all bytes of a folder on the disk before a manifest names it."""
    changes: list[tuple[str, os.stat_result]] = []
    for change in walk(folder):
        changes.append(change)
        if len(changes) > MANY_CHANGES:
            _sync_file_system(folder)
            return
    for path, found in changes:
        if stat.S_ISREG(found.st_mode):
            _sync(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        elif stat.S_ISDIR(found.st_mode):
            _sync(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    sync_folder(folder)


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_file_system(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(fd)
