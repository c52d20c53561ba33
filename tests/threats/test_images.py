"""An image that a tenant keeps to itself is used by nobody else."""

from typing import Any

import httpx
import pytest

from coordinator.settings import Settings
from tests.factories import Mill, a_spec


@pytest.fixture
def closed(new_app: Any, new_client: Any, settings: Settings) -> httpx.Client:
    client: httpx.Client = new_client(new_app(settings.model_copy(update={"auth": "token"})))
    return client


@pytest.mark.threat("A13")
@pytest.mark.parametrize("owner", ["other", "default"])
def test_an_image_of_another_tenant_is_unknown_unless_it_is_public(
    closed: httpx.Client, mill: Mill, owner: str
) -> None:
    mine, theirs = mill.a_member("acme", "owner"), mill.a_member(owner, "owner")
    project = closed.post("/api/projects", headers=mine, json={"accountId": "acme", "name": "p"}).json()["id"]
    workflow = {"name": "w", "steps": a_spec()}
    image = {"slug": "box", "imageUrl": "registry.example/private:1"}

    made = closed.post("/api/docker-images", headers=theirs, json=image)
    refused = closed.post(f"/api/projects/{project}/workflows", headers=mine, json=workflow)
    closed.delete(f"/api/docker-images/{made.json()['id']}", headers=theirs)
    closed.post("/api/docker-images", headers=theirs, json={**image, "public": True})
    taken = closed.post(f"/api/projects/{project}/workflows", headers=mine, json=workflow)

    assert made.status_code == 201
    assert refused.status_code == 400
    assert "imageSlug" in refused.json()["details"][0]["path"]
    assert taken.status_code == 201
