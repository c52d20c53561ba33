"""What the container engine of this machine has of a runner of the drill: listed, and at the end removed."""

import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx

from coordinator.cli.drill.errors import Unusable

SOCKET = "/var/run/docker.sock"
PULL_S = 120.0
LABEL = "buildmill.runner"
_KINDS = (("container", "/containers/json?all=1&"), ("network", "/networks?"), ("volume", "/volumes?"))


class Engine:
    """The engine that DOCKER_HOST names, or the one at the usual socket."""

    def __init__(self) -> None:
        host = os.environ.get("DOCKER_HOST", "")
        if not host or host.startswith("unix://"):
            transport = httpx.HTTPTransport(uds=host.removeprefix("unix://") or SOCKET)
            self._http = httpx.Client(transport=transport, base_url="http://engine", timeout=30.0)
        else:
            address = host.replace("tcp://", "http://", 1)
            self._http = httpx.Client(base_url=address, timeout=30.0, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def require_usable(self) -> None:
        try:
            answer = self._http.get("/_ping")
        except httpx.HTTPError as error:
            raise Unusable(
                f"no container engine answers: {error}; start one, or say --executor process"
            ) from error
        if answer.status_code != 200:
            raise Unusable(f"the container engine answers {answer.status_code}")

    def require_one_of(self, images: Sequence[str]) -> str:
        """The first of them that is on this machine, else the first of all, pulled without a login."""
        image = next((one for one in images if self._has_image(one)), images[0])
        self._require_image(image)
        return image

    def _has_image(self, image: str) -> bool:
        return self._http.get(f"/images/{quote(image)}/json").status_code == 200

    def _require_image(self, image: str) -> None:
        if self._has_image(image):
            return
        try:
            self._http.post(f"/images/create?fromImage={quote(image, safe='')}", timeout=PULL_S)
        except httpx.TimeoutException as error:
            raise Unusable(f"the image {image} does not arrive within {PULL_S:.0f} s") from error
        if not self._has_image(image):
            raise Unusable(
                f"the image {image} is not on this machine and cannot be pulled; name another with --image"
            )

    def found_of(self, runner_id: str) -> list[str]:
        """Every container, network and volume that carries the label of this runner."""
        found = []
        for kind, path in _KINDS:
            for one in self._list(path, runner_id):
                found.append(f"{kind} {one.get('Id', one.get('Name', ''))[:64]}")
        return found

    def remove_all_of(self, runner_id: str) -> None:
        """The last net: what a runner of the drill could not remove any more."""
        for one in self._list(_KINDS[0][1], runner_id):
            self._http.delete(f"/containers/{one['Id']}?force=1&v=1")
        for one in self._list(_KINDS[1][1], runner_id):
            self._http.delete(f"/networks/{one['Id']}")
        for one in self._list(_KINDS[2][1], runner_id):
            self._http.delete(f"/volumes/{quote(one['Name'])}?force=1")

    def _list(self, path: str, runner_id: str) -> list[dict[str, Any]]:
        filters = quote(json.dumps({"label": [f"{LABEL}={runner_id}"]}))
        answer = self._http.get(f"{path}filters={filters}")
        answer.raise_for_status()
        said = answer.json()
        found = said.get("Volumes") if isinstance(said, dict) else said
        return [one for one in found or [] if isinstance(one, dict)]
