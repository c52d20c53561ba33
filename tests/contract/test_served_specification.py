"""The specification we serve keeps everything the published contract promises, and describes what we do."""

import fnmatch
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from coordinator.api.openapi import specification
from coordinator.app import ALL_ENDPOINTS
from coordinator.rules.access import Scope
from tests.contract.published import CONTRACT, OPERATIONS, Operation, operations_of, resolve
from tests.factories import ON_SQLITE

SERVED = specification(ALL_ENDPOINTS, "test")
OURS = {str(operation): operation for operation in operations_of(SERVED)}
NARROWINGS = tomllib.loads((Path(__file__).parent / "narrowings.toml").read_text())["narrowing"]
BOUNDS = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern", "format", "enum")
# What may not be there is named in the body, not in the path.
NAMED_IN_THE_BODY = {"POST /api/v1/builds", "POST /api/v1/auth/ws-tickets"}
# These ask for no credential and refuse the one that stands in the body.
LOGINS = {"POST /api/v1/auth/login", "POST /api/v1/auth/refresh"}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


# What goes in


def narrowed(operation: Operation) -> Iterator[tuple[str, str]]:
    """Where our operation takes less than the contract's, and by which keyword."""
    ours = OURS[str(operation)]
    for place in ("path", "query", "header"):
        known, contract = ours.parameters(place), operation.parameters(place)
        for name, item in known.items():
            where = f"{operation} {place} {name}"
            if item["required"] and not contract.get(name, {}).get("required"):
                yield where, "required"
            if name in contract:
                yield from narrowed_schema(where, contract[name]["schema"], item["schema"])
        yield from ((f"{operation} {place} {name}", "missing") for name in contract.keys() - known.keys())
    if operation.body_schema is not None:
        assert ours.body_schema is not None
        yield from narrowed_schema(f"{operation} body", operation.body_schema, ours.body_schema)


def narrowed_schema(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[tuple[str, str]]:
    theirs, ours = resolve(CONTRACT, theirs), nonnull(resolve(SERVED, ours))
    if ours["type"] != theirs["type"]:
        yield where, "type"
    if ours.get("default") != theirs.get("default") and "default" in theirs:
        yield where, "default"
    for bound in BOUNDS:
        if bound in ours and ours[bound] != theirs.get(bound):
            yield where, bound
    yield from ((where, "required") for _ in set(ours.get("required", ())) - set(theirs.get("required", ())))
    if "properties" in theirs:
        if ours.get("additionalProperties") is False:
            yield where, "additionalProperties"
        for name, inner in theirs["properties"].items():
            if name in ours["properties"]:
                yield from narrowed_schema(f"{where}.{name}", inner, ours["properties"][name])
            else:
                yield f"{where}.{name}", "missing"
    if "items" in theirs:
        yield from narrowed_schema(f"{where}[]", theirs["items"], ours["items"])


def nonnull(schema: dict[str, Any]) -> dict[str, Any]:
    """We also take null for what may be left out, which is more than the contract allows, not less."""
    branches = [branch for branch in schema.get("anyOf", ()) if branch.get("type") != "null"]
    return resolve(SERVED, branches[0]) if len(branches) == 1 else schema


def allowed(where: str, what: str) -> list[int]:
    def fits(text: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))

    return [
        index
        for index, entry in enumerate(NARROWINGS)
        if fits(where, entry["where"]) and fits(what, entry["what"])
    ]


@each_operation
def test_inputs_are_narrower_than_the_contract_only_where_the_table_says_so(name: str) -> None:
    found = set(narrowed(OPERATIONS[name]))

    assert [(where, what) for where, what in found if not allowed(where, what)] == []


def test_the_table_of_narrowings_holds_nothing_that_is_not_so() -> None:
    found = {one for operation in OPERATIONS.values() for one in narrowed(operation)}

    used = {index for where, what in found for index in allowed(where, what)}

    assert [entry for index, entry in enumerate(NARROWINGS) if index not in used] == []
    assert all(len(entry["reason"]) > 20 for entry in NARROWINGS)


# What comes out


def lost(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """What a reader of the contract's answer would miss in ours."""
    theirs, ours = resolve(CONTRACT, theirs), resolve(SERVED, ours)
    if ours.get("type") != theirs["type"]:
        yield f"{where}: type"
    if theirs.get("format") != ours.get("format"):
        yield f"{where}: format"
    if "enum" in theirs and not set(ours.get("enum", ["anything"])) <= set(theirs["enum"]):
        yield f"{where}: enum"
    for name, inner in theirs.get("properties", {}).items():
        if name in ours.get("properties", {}):
            yield from lost(f"{where}.{name}", inner, ours["properties"][name])
        else:
            yield f"{where}.{name}: missing"
    if "items" in theirs:
        yield from lost(f"{where}[]", theirs["items"], ours["items"])


@each_operation
def test_every_answer_of_the_contract_stays_with_all_its_fields(name: str) -> None:
    theirs, ours = OPERATIONS[name].spec["responses"], OURS[name].spec["responses"]

    gone = []
    for status, answer in theirs.items():
        for media_type, content in answer["content"].items():
            known = ours.get(status, {}).get("content", {}).get(media_type)
            gone += (
                list(lost(status, content["schema"], known["schema"]))
                if known is not None
                else [f"{status} {media_type}"]
            )

    assert gone == []


@each_operation
def test_every_operation_keeps_its_tag_and_summary(name: str) -> None:
    theirs, ours = OPERATIONS[name].spec, OURS[name].spec

    assert (ours["tags"], ours["summary"]) == (theirs["tags"], theirs["summary"])


@pytest.mark.parametrize("component", CONTRACT["components"]["schemas"])
def test_the_components_keep_their_names_and_fields(component: str) -> None:
    reference = {"$ref": f"#/components/schemas/{component}"}

    assert list(lost(component, reference, reference)) == []


# What it says of ourselves


def test_the_served_specification_is_valid_openapi() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(SERVED).iter_errors()] == []


def test_every_endpoint_is_specified_once() -> None:
    assert sorted(OURS) == sorted(f"{endpoint.method} {endpoint.path}" for endpoint in ALL_ENDPOINTS)
    names = [operation.spec["operationId"] for operation in OURS.values()]
    assert len(set(names)) == len(names)


def test_every_body_is_closed() -> None:
    open_ones = [
        name
        for name, operation in OURS.items()
        if operation.spec.get("requestBody", {}).get("content", {}).keys() == {"application/json"}
        and resolve(SERVED, operation.body_schema or {}).get("additionalProperties") is not False
    ]

    assert open_ones == []


@pytest.mark.parametrize("name", OURS)
def test_an_operation_tells_only_of_answers_it_can_give(name: str) -> None:
    operation = OURS[name]
    statuses = set(operation.spec["responses"])

    assert (
        ("408" in statuses) == ("413" in statuses) == ("415" in statuses) == ("requestBody" in operation.spec)
    )
    assert ("404" in statuses) == (bool(operation.parameters("path")) or name in NAMED_IN_THE_BODY)
    assert "405" not in statuses
    assert "500" in statuses
    assert ("401" in statuses) == (bool(operation.spec["security"]) or name in LOGINS)


def test_what_may_be_unset_is_absent_from_answers_and_never_null() -> None:
    build = SERVED["components"]["schemas"]["Build"]

    assert build["properties"]["startedAt"] == {"type": "string", "format": "date-time"}
    assert "startedAt" not in build["required"]
    assert "createdAt" in build["required"]


def test_null_is_documented_where_it_is_taken() -> None:
    patch = SERVED["components"]["schemas"]["ProjectPatch"]["properties"]

    assert {"type": "null"} in patch["repoUrl"]["anyOf"]
    assert patch["name"]["type"] == "string"


def test_the_headers_of_an_attempt_are_required_of_runners_only() -> None:
    def required(name: str) -> dict[str, bool]:
        return {header: item["required"] for header, item in OURS[name].parameters("header").items()}

    assert required("POST /api/runner/{stepId}/start") == {"X-Attempt": True, "X-Lease": True}
    assert required("POST /api/runner/{stepId}/complete") == {"X-Attempt": False, "X-Lease": False}
    assert required("POST /api/runner/acquire") == {}


def test_the_tenant_is_a_required_header_of_every_operation_that_is_about_one() -> None:
    about_one = [endpoint for endpoint in ALL_ENDPOINTS if endpoint.policy.scope is Scope.HEADER]

    assert len(about_one) >= 8
    for endpoint in about_one:
        headers = OURS[f"{endpoint.method} {endpoint.path}"].parameters("header")
        assert headers["X-Tenant-ID"]["required"], endpoint.name


def test_builds_that_are_started_later_need_a_token_also_where_access_is_open() -> None:
    assert SERVED["paths"]["/api/v1/builds"]["get"]["security"] == [{"user": []}]


def test_errors_have_the_form_of_their_surface() -> None:
    def fields(path: str) -> set[str]:
        answer = SERVED["paths"][path]["get"]["responses"]["400"]
        return set(resolve(SERVED, answer["content"]["application/json"]["schema"])["required"])

    assert fields("/api/projects") == {"error", "code", "details"}
    assert fields("/api/v1/builds") == {"error", "code", "timestamp", "trace_id", "details"}


def test_a_token_is_demanded_of_users_only_where_access_is_not_open() -> None:
    guarded = specification(ALL_ENDPOINTS, "test", is_open=False)

    assert {} in SERVED["paths"]["/api/projects"]["get"]["security"]
    assert guarded["paths"]["/api/projects"]["get"]["security"] == [{"user": []}]
    assert guarded["paths"]["/healthz"]["get"]["security"] == []


def test_the_specification_is_the_same_every_time() -> None:
    again = specification(ALL_ENDPOINTS, "test")

    assert json.dumps(again) == json.dumps(SERVED)


@ON_SQLITE
def test_the_specification_is_served_to_anyone(client: httpx.Client) -> None:
    answer = client.get("/openapi.json")

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["paths"] == json.loads(json.dumps(SERVED["paths"]))
