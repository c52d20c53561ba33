"""Keeps an engine clean of what this runner left there: images it pulled, strays found by labels."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

import docker.errors
import structlog

from runner.executor.answers import must_agree
from runner.executor.images import PulledImage, PulledImages, repository_of, spellings_of, with_tag
from runner.spares import UNTOUCHABLE_S, Spare

log = structlog.get_logger()

Key = tuple[str, int]  # a step and the number of an attempt

YOUNG_HOLDER_S: Final = 300.0


class Housekeeping:
    """Over one engine, for one runner."""

    def __init__(
        self,
        api: Any,  # docker ships no types
        *,
        runners: Collection[str],  # our name, and those we had before
        images: PulledImages,
        keep: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._runners = frozenset(runners)
        self._images = images
        self._keep = tuple(keep)
        self._clock = clock

    def root(self) -> Path | None:
        """Where the engine keeps images, if that is a folder of this machine."""
        with must_agree():
            found = Path(str(self._api.info().get("DockerRootDir") or ""))
        return found if found.is_absolute() and found.is_dir() else None

    # -- images

    def spare_images(self, wanted: Collection[str]) -> Iterator[Spare]:
        """Images that we pulled, that no container uses and that neither steps nor the operator want."""
        used = self._ids_in_use() | self._ids_of(wanted)
        names = {with_tag(reference) for reference in wanted}
        ours = self._images.longest_unused_first()
        for image in ours:
            is_recent = self._clock() - image.used_at < UNTOUCHABLE_S
            if is_recent or image.reference in names or self._is_kept(image.reference):
                continue
            found = self._find(image.reference)
            if found is None or found["Id"] != image.id:
                self._images.forget(image.reference)  # gone, or another one that somebody else has brought
                continue
            if found["Id"] in used or self._has_other_names(found, image.reference):
                continue
            yield Spare(
                "image", image.reference, image.used_at, int(found["Size"]), partial(self._remove, image)
            )

    def _is_kept(self, reference: str) -> bool:
        spellings = spellings_of(reference)
        return any(fnmatchcase(name, pattern) for name in spellings for pattern in self._keep)

    def _has_other_names(self, found: Mapping[str, Any], reference: str) -> bool:
        """An image under further names is somebody's; ours alone would set nothing free."""
        ours = {with_tag(image.reference) for image in self._images.longest_unused_first()}
        own_repository = repository_of(with_tag(reference))
        tags = [name for name in found.get("RepoTags") or [] if name not in ours]
        digests = [name for name in found.get("RepoDigests") or [] if repository_of(name) != own_repository]
        return bool(tags) or any(repository_of(name) not in map(repository_of, ours) for name in digests)

    def _remove(self, image: PulledImage) -> bool:
        """Looks again at all of it: since it was offered, somebody may have used, named or rebuilt it."""
        if self._images.find(image.reference) != image or image.id in self._ids_in_use():
            return False
        found = self._find(image.reference)
        if found is None or found["Id"] != image.id:
            self._images.forget(image.reference)
            return False
        if self._has_other_names(found, image.reference):
            return False
        with must_agree():
            try:
                self._api.remove_image(image.reference, force=False)
            except docker.errors.NotFound:
                self._images.forget(image.reference)
                return False
            except docker.errors.APIError as error:
                log.info("image_kept", image=image.reference, cause=str(error.explanation or error)[:500])
                return False
        self._images.forget(image.reference)
        return True

    def _ids_in_use(self) -> set[str]:
        with must_agree():
            return {str(found["ImageID"]) for found in self._api.containers(all=True)}

    def _ids_of(self, references: Collection[str]) -> set[str]:
        """A digest and a tag may name one image, of which the engine forgets both at once."""
        found = [self._find(reference) for reference in references if reference]
        return {str(image["Id"]) for image in found if image is not None}

    def _find(self, reference: str) -> dict[str, Any] | None:
        with must_agree():
            try:
                found: dict[str, Any] = self._api.inspect_image(reference)
            except docker.errors.NotFound:
                return None
            except docker.errors.APIError as error:
                if error.status_code == 400:  # no image can have such a name
                    return None
                raise
        return found

    # -- strays

    def remove_strays(self, held: Collection[Key], ready_holders: Collection[str]) -> None:
        """Volumes, networks and network holders of ours that belong to no attempt in hand."""
        self._remove_holders(ready_holders)
        managed = {"label": ["buildmill.managed=1"]}
        with must_agree():
            volumes = self._api.volumes(filters=managed).get("Volumes") or []
            networks = self._api.networks(filters=managed)
        for volume in volumes:
            if self._is_ours(volume) and _key_of(volume.get("Labels")) not in held:
                self._try_removal("volume", volume["Name"], self._api.remove_volume)
        for network in networks:
            if self._is_ours(network) and _key_of(network.get("Labels")) not in held:
                self._try_removal("network", network["Id"], self._api.remove_network)

    def _is_ours(self, found: Mapping[str, Any]) -> bool:
        return (found.get("Labels") or {}).get("buildmill.runner") in self._runners

    def _remove_holders(self, ready: Collection[str]) -> None:
        """Those that no step has joined for a while; one that was just made is about to be joined."""
        managed = "buildmill.managed=1"
        with must_agree():
            steps = self._api.containers(all=True, filters={"label": [managed, "buildmill.role=step"]})
            holders = self._api.containers(all=True, filters={"label": [managed, "buildmill.role=holder"]})
        joined = {step["HostConfig"]["NetworkMode"].removeprefix("container:") for step in steps}
        for holder in filter(self._is_ours, holders):
            is_young = self._clock() - float(holder["Created"]) < YOUNG_HOLDER_S
            if not is_young and holder["Id"] not in joined and holder["Id"] not in ready:
                self._try_removal(
                    "holder", holder["Id"], lambda name: self._api.remove_container(name, v=True, force=True)
                )

    def _try_removal(self, kind: str, name: str, remove: Callable[[str], object]) -> None:
        with must_agree():
            try:
                remove(name)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                log.warning("stray_stays", kind=kind, name=name, cause=str(error.explanation or error)[:500])
                return
        log.info("stray_removed", kind=kind, name=name)


def _key_of(labels: Mapping[str, str] | None) -> Key | None:
    found = labels or {}
    attempt = found.get("buildmill.attempt", "")
    return (found.get("buildmill.step", ""), int(attempt)) if attempt.isdecimal() else None
