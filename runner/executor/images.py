"""Remembers which images this runner itself has pulled, and when it last used them.

Only those may ever be removed: what an operator brought is not ours, even under the same name.
An image has many spellings; here each is known as the engine lists it.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from runner.durable import write_whole
from shared.references import plain_image

log = structlog.get_logger()

MOST_BYTES: Final = 4 * 1024 * 1024
MOST_IMAGES: Final = 10_000
# A use is written down at most this often: the order of removal needs no more.
NOTE_EVERY_S: Final = 300.0


@dataclass(frozen=True)
class PulledImage:
    """One reference, what it stood for when it was pulled, and its last use."""

    reference: str
    id: str
    used_at: float


class PulledImages:
    """The record `<state>/images.json`; one that is lost or damaged means that no image is ever removed."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._images = self._load()

    def note_pulled(self, reference: str, image_id: str) -> None:
        name = with_tag(reference)
        with self._lock:
            if len(self._images) < MOST_IMAGES:
                self._images[name] = PulledImage(name, image_id, self._clock())
                self._save()

    def note_used(self, reference: str, image_id: str) -> None:
        """Under whichever name it was pulled; harmless for an image that is not ours."""
        name = with_tag(reference)
        with self._lock:
            now = self._clock()
            used = [
                image
                for image in self._images.values()
                if (image.reference == name or image.id == image_id)
                and abs(now - image.used_at) > NOTE_EVERY_S
            ]
            self._images.update({image.reference: replace(image, used_at=now) for image in used})
            if used:
                self._save()

    def forget(self, reference: str) -> None:
        with self._lock:
            if self._images.pop(with_tag(reference), None) is not None:
                self._save()

    def find(self, reference: str) -> PulledImage | None:
        with self._lock:
            return self._images.get(with_tag(reference))

    def longest_unused_first(self) -> list[PulledImage]:
        with self._lock:
            return sorted(self._images.values(), key=lambda image: (image.used_at, image.reference))

    def _save(self) -> None:
        """Best effort: an image that is not written down stays."""
        fields = {"images": [asdict(image) for image in self._images.values()]}
        try:
            write_whole(self._path, json.dumps(fields).encode(), durable=False)
        except OSError as error:
            log.warning("images_not_written", path=str(self._path), cause=str(error))

    def _load(self) -> dict[str, PulledImage]:
        try:
            with self._path.open("rb") as file:
                said = json.loads(file.read(MOST_BYTES))
            images = [
                PulledImage(with_tag(str(entry["reference"])), str(entry["id"]), float(entry["used_at"]))
                for entry in said["images"][:MOST_IMAGES]
            ]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("images_unreadable", path=str(self._path), cause=str(error))
            return {}
        return {image.reference: image for image in sorted(images, key=lambda image: image.used_at)}


def with_tag(reference: str) -> str:
    """As the engine lists it: without the common host, `latest` where it says nothing, no tag at a digest."""
    name = reference.removeprefix("index.docker.io/").removeprefix("docker.io/").removeprefix("library/")
    if "@" in name:
        return f"{repository_of(name)}@{name.partition('@')[2]}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def repository_of(reference: str) -> str:
    """The reference without its tag and its digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"


def registry_of(reference: str) -> str:
    """The host it is pulled from."""
    first, slash, _ = with_tag(plain_image(reference)).partition("/")
    has_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
    return first if has_host else "docker.io"


def spellings_of(reference: str) -> set[str]:
    """All ways to write it that mean the same image."""
    listed = with_tag(reference)
    names = {listed}
    if registry_of(reference) == "docker.io":
        names |= {f"docker.io/{listed}"}
        names |= set() if "/" in listed else {f"library/{listed}", f"docker.io/library/{listed}"}
    return names | {name.removesuffix(":latest") for name in names}
