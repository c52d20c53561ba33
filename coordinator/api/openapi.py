"""The served specification: what the endpoints declare, in the words of OpenAPI 3.1.

It says what this version of the coordinator accepts and answers, neither more nor less, so that a client may
be generated from it and a fuzzer may hold the coordinator to it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from coordinator.api import patterns
from coordinator.api.build_server import operations as build_server
from coordinator.api.endpoint import Answer, Endpoint
from coordinator.api.executions import operations as executions
from coordinator.api.idempotency import KEY_HEADER, KEY_PATTERN
from coordinator.api.identify import TENANT_HEADER
from coordinator.rules.access import Audience, Policy, Scope
from shared.paths import ATTEMPT_HEADER, LEASE_HEADER

Json = dict[str, Any]

_TITLE = "Build Server API"
_ABOUT = (
    "Projects, workflows, builds and their runners. Times are RFC 3339 in UTC, ids are lower-case UUIDs, "
    "what is unset is left out of an answer. A path that exists answers other methods with 405 and names "
    "the methods it takes in Allow; a parameter or a field that is not known is refused with 400, and so is "
    "NUL in a text. Integers are written without fraction and exponent."
)
_TAGS = {
    "Projects": "Project management operations",
    "Secrets": "What steps need and nobody may read",
    "Workflows": "Workflow management operations",
    "Builds": "Build execution operations",
    "Docker Images": "Docker image management",
    "Build Execution": "Builds that are made first and started later",
    "Runner": "Build runner operations",
    "Audit": "Audit log operations",
    "Accounts": "Tenants, users, members and the tokens of programs",
    "Authentication": "Logins",
    "Health": "Is the coordinator alive and ready",
    "Specification": "This specification, and a page to try it",
}
_PATH_PARAMETERS = {
    "/api/projects": "Project identifier",
    "/api/builds": "Build identifier",
    "/api/v1/builds": "Build identifier",
    "/api/steps": "Build step identifier",
    "/api/artifacts": "Artifact identifier",
    "/api/docker-images": "Docker image identifier",
    "/api/enrolment-tokens": "Enrolment token identifier",
    "/api/runners": "Runner identifier",
    "/api/tenants": "Tenant identifier",
    "/api/users": "User identifier",
    "/api/tokens": "Token identifier",
    "workflowId": "Workflow identifier",
    "stepId": "Build step identifier",
    "sha256": "SHA-256 of the bytes, in lower-case hex",
}
_SCHEMES = {
    "user": {
        "type": "http",
        "scheme": "bearer",
        "description": "A user's token. Not needed where access is open.",
    },
    "runner": {
        "type": "http",
        "scheme": "bearer",
        "description": "The secret a runner got when it was registered.",
    },
    "enrolment": {
        "type": "http",
        "scheme": "bearer",
        "description": "The registration token or a user's token. Not needed where access is open.",
    },
}
_COMMON = (build_server.COMMON, executions.COMMON)
_BODY_ONLY = frozenset({408, 413, 415})
_TENANT: Json = {"type": "string", "format": "uuid"}
_ATTEMPT: Json = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
_LEASE: Json = {"type": "string", "minLength": 1, "maxLength": 128}
# A validator that runs before the bounds are looked at leaves them in the words of the model.
_BOUNDS = {"ge": "minimum", "le": "maximum"}
_CONTENT_RANGE = r"^bytes [0-9]{1,16}-[0-9]{1,16}/[0-9]{1,16}$"


def specification(endpoints: Sequence[Endpoint], version: str, *, is_open: bool = True) -> Json:
    """The OpenAPI document of these endpoints; `is_open` says whether users need a token."""
    names, components = _components(endpoints)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, names, is_open)
    used = {endpoint.tag for endpoint in endpoints}
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": version, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SCHEMES},
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items() if name in used],
    }


# Operations


def _operation(endpoint: Endpoint, names: "_Names", is_open: bool) -> Json:
    operation: Json = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "parameters": list(_parameters(endpoint)),
        "responses": {
            str(status): _response(endpoint, answer, names) for status, answer in _possible_answers(endpoint)
        },
        "security": _security(endpoint.policy.audience, is_open and not endpoint.needs_credential),
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    body = _request_body(endpoint, names)
    if body is not None:
        operation["requestBody"] = body
    return {key: value for key, value in operation.items() if key == "security" or value}


def _possible_answers(endpoint: Endpoint) -> Iterator[tuple[int, Answer]]:
    """What the endpoint itself declares, and of the answers common to all those that can happen here."""
    for status, answer in sorted(endpoint.answers.items()):
        is_common = any(common.get(status) is answer for common in _COMMON)
        if not is_common or _can_happen(endpoint, status):
            yield status, answer


def _can_happen(endpoint: Endpoint, status: int) -> bool:
    is_for_anyone = endpoint.policy.audience is Audience.ANYONE
    if status in _BODY_ONLY:
        return _takes_body(endpoint)
    if status in (401, 429, 503):
        return not is_for_anyone
    if status == 404:
        return "{" in endpoint.path
    return status != 405  # the operation stands here because the path takes this method


def _response(endpoint: Endpoint, answer: Answer, names: "_Names") -> Json:
    response: Json = {"description": answer.description}
    if answer.model is not None and endpoint.method != "HEAD":
        schema = _answer_schema(answer.model, names)
        response["content"] = {answer.media_type: {"schema": schema} if schema else {}}
        for media_type in answer.other_media_types:
            response["content"][media_type] = {}
    return response


def _answer_schema(model: Any, names: "_Names") -> Json:
    if model is bytes:
        return {}
    if model is str:
        return {"type": "string"}
    if get_origin(model) is list:
        return {"type": "array", "items": _answer_schema(get_args(model)[0], names)}
    if get_origin(model) is dict or model is dict:
        return {"type": "object"}
    return names.answer(model)


def _security(audience: Audience, is_open: bool) -> list[Json]:
    """Alternatives; the empty one means that no credential is needed."""
    nobody: list[Json] = [{}] if is_open else []
    return {
        Audience.ANYONE: [],
        Audience.USER: [*nobody, {"user": []}],
        Audience.ENROLMENT: [*nobody, {"enrolment": []}],
        Audience.RUNNER: [{"runner": []}],
        Audience.STEP: [*nobody, {"user": []}, {"runner": []}],
    }[audience]


def _takes_body(endpoint: Endpoint) -> bool:
    return endpoint.body is not None or (endpoint.takes_stream and endpoint.method in ("POST", "PUT"))


def _request_body(endpoint: Endpoint, names: "_Names") -> Json | None:
    if not _takes_body(endpoint):
        return None
    model = endpoint.documented_body or endpoint.body
    if model is None:
        return {"required": True, "content": {"application/octet-stream": {}}}
    is_required = not endpoint.body_is_optional
    return {"required": is_required, "content": {"application/json": {"schema": names.body(model)}}}


# Parameters


def _parameters(endpoint: Endpoint) -> Iterator[Json]:
    for name in re.findall(r"{([^}]+)}", endpoint.path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": endpoint.parameters.get(name) or _path_description(endpoint.path, name),
            "schema": {"type": "string", **patterns.PATH_WORDS.get(name, {})},
        }
    yield from _query_parameters(endpoint)
    yield from _tenant_header(endpoint.policy)
    yield from _lease_headers(endpoint)
    yield from _transfer_headers(endpoint)
    yield from _key_header(endpoint)


def _tenant_header(policy: Policy) -> Iterator[Json]:
    """Required on one surface; elsewhere who belongs to several tenants may say which one is meant."""
    is_required = policy.scope is Scope.HEADER
    if is_required or (policy.audience is Audience.USER and policy.scope in (Scope.TENANT, Scope.RESOURCE)):
        yield _header(TENANT_HEADER, "The tenant that this is about", _TENANT, required=is_required)


def _path_description(path: str, name: str) -> str:
    prefix = "/".join(path.split("/")[: 4 if path.startswith(f"{executions.PREFIX}/") else 3])
    return _PATH_PARAMETERS.get(name) or _PATH_PARAMETERS[prefix]


def _query_parameters(endpoint: Endpoint) -> Iterator[Json]:
    if endpoint.query is None:
        return
    shape = _without_titles(endpoint.query.model_json_schema(schema_generator=_Generator))
    for name, schema in shape["properties"].items():
        schema = {_BOUNDS.get(key, key): value for key, value in _without_null(schema).items()}
        if schema.get("default", 0) is None:
            del schema["default"]
        description = schema.pop("description", "")
        yield {
            "name": name,
            "in": "query",
            "required": name in shape.get("required", ()),
            "description": description,
            "schema": schema,
        }


def _lease_headers(endpoint: Endpoint) -> Iterator[Json]:
    """The attempt and its lease: with every write of a runner; others have none to send."""
    audience = endpoint.policy.audience
    if audience not in (Audience.RUNNER, Audience.STEP) or "{stepId}" not in endpoint.path:
        return
    is_required = audience is Audience.RUNNER
    yield _header(ATTEMPT_HEADER, "The number of the attempt", _ATTEMPT, required=is_required)
    # where both may be absent, a lease without its attempt is not looked at
    lease = _LEASE if is_required else {"type": "string"}
    yield _header(LEASE_HEADER, "The lease of the attempt", lease, required=is_required)


def _transfer_headers(endpoint: Endpoint) -> Iterator[Json]:
    text = {"type": "string"}
    if 206 in endpoint.answers:
        yield _header("Range", "The range of bytes that is wanted", text)
        yield _header("If-None-Match", "The ETag that is known already", text)
        yield _header("If-Range", "Give the range only of what has this ETag", text)
    if any("text/event-stream" in answer.other_media_types for answer in endpoint.answers.values()):
        yield _header("Last-Event-ID", "The last event that a follower has seen", text)
    if endpoint.takes_stream and endpoint.method == "PUT":
        yield _header("Content-Range", "Which part is sent", {**text, "pattern": _CONTENT_RANGE})
    if endpoint.takes_stream and endpoint.method == "POST":
        yield _header("Content-Encoding", "How the bytes are sent", {**text, "enum": ["identity", "gzip"]})


def _key_header(endpoint: Endpoint) -> Iterator[Json]:
    if endpoint.is_idempotent:
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": f"^{KEY_PATTERN}$"}
        yield _header(KEY_HEADER, "The same key and request get the same answer, and act once", schema)


def _header(name: str, description: str, schema: Json, *, required: bool = False) -> Json:
    return {
        "name": name,
        "in": "header",
        "required": required,
        "description": description,
        "schema": dict(schema),
    }


# Components


class _Generator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Names:
    """Where the schema of each model stands."""

    def __init__(self, bodies: Mapping[type[BaseModel], str], answers: Mapping[type[BaseModel], str]) -> None:
        self._bodies = bodies
        self._answers = answers

    def body(self, model: type[BaseModel]) -> Json:
        return {"$ref": f"#/components/schemas/{self._bodies[model]}"}

    def answer(self, model: type[BaseModel]) -> Json:
        return {"$ref": f"#/components/schemas/{self._answers[model]}"}


def _components(endpoints: Sequence[Endpoint]) -> tuple[_Names, Json]:
    """One schema per model; a model that is sent and shown has two, since only what is shown is complete."""
    sent = {model for endpoint in endpoints if (model := endpoint.documented_body or endpoint.body)}
    shown = {
        model
        for endpoint in endpoints
        for _, answer in _possible_answers(endpoint)
        if (model := _item(answer.model))
    }
    bodies, body_names = _definitions(sent, "validation")
    answers, answer_names = _definitions(shown, "serialization")
    bodies = {name: _as_accepted(name, schema) for name, schema in bodies.items()}
    answers = {name: _as_shown(schema) for name, schema in answers.items()}
    taken = {name for name, schema in bodies.items() if answers.get(name, schema) != schema}
    renamed = {name: _component_name(name, answers, taken) for name in answers}
    components = dict(bodies)
    for name, schema in answers.items():
        components[renamed[name]] = _with_references(schema, renamed)
    return (
        _Names(body_names, {model: renamed[name] for model, name in answer_names.items()}),
        dict(sorted(components.items())),
    )


def _item(model: Any) -> type[BaseModel] | None:
    if get_origin(model) is list:
        model = get_args(model)[0]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _definitions(
    models: set[type[BaseModel]], mode: JsonSchemaMode
) -> tuple[Json, dict[type[BaseModel], str]]:
    ordered = sorted(models, key=lambda model: model.__name__)
    places, whole = models_json_schema(
        [(model, mode) for model in ordered],
        by_alias=True,
        ref_template="#/components/schemas/{model}",
        schema_generator=_Generator,
    )
    names = {model: places[model, mode]["$ref"].rpartition("/")[2] for model in ordered}
    return {name: _without_titles(schema) for name, schema in whole.get("$defs", {}).items()}, names


def _component_name(name: str, answers: Mapping[str, Json], taken: set[str]) -> str:
    """`Project` for ProjectOut; `StepSpecOut` for what bodies already have as StepSpec."""
    if name in taken:
        return f"{name}Out"
    short = name.removesuffix("Out")
    return name if short in answers and short != name else short


def _with_references(schema: Json, renamed: Mapping[str, str]) -> Json:
    def turn(here: Json) -> Json:
        if "$ref" not in here:
            return here
        prefix, _, name = here["$ref"].rpartition("/")
        return {**here, "$ref": f"{prefix}/{renamed[name]}"}

    return _each_schema(schema, turn)


# Schemas


def _as_accepted(name: str, schema: Json) -> Json:
    """A body: closed, and with what is asked of its texts."""
    words = patterns.WORDS.get(name, {})
    properties = {
        field: _worded(name, field, inner, words) for field, inner in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties} if properties else schema


def _worded(component: str, field: str, schema: Json, words: Mapping[str, Mapping[str, Any]]) -> Json:
    if (component, field) in patterns.NEVER_NULL:
        schema = _without_null(schema)
        schema.pop("default", None)
    if field in words:
        schema = _on_texts(schema, words[field])
    if f"{field}[]" in words:
        schema = {**schema, "items": {**schema["items"], **words[f"{field}[]"]}}
    if f"{field}{{}}" in words:
        schema = {**schema, "propertyNames": dict(words[f"{field}{{}}"])}
    return schema


def _on_texts(schema: Json, words: Mapping[str, Any]) -> Json:
    if "anyOf" in schema:
        return {**schema, "anyOf": [_on_texts(branch, words) for branch in schema["anyOf"]]}
    return {**schema, **words} if schema.get("type") == "string" else schema


def _as_shown(schema: Json) -> Json:
    """An answer: what may be unset is absent and never null, all else is always there."""

    def turn(here: Json) -> Json:
        if "properties" not in here:
            return here
        properties = here["properties"]
        shown = {name: _without_null(inner) for name, inner in properties.items()}
        for inner in shown.values():
            inner.pop("default", None)
        always = [name for name, inner in properties.items() if not _may_be_null(inner)]
        return {**here, "properties": shown, "required": always, "additionalProperties": False}

    return _each_schema(schema, turn)


def _may_be_null(schema: Json) -> bool:
    return any(branch.get("type") == "null" for branch in schema.get("anyOf", ()))


def _without_null(schema: Json) -> Json:
    if not _may_be_null(schema):
        return dict(schema)
    branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return {**branches[0], **rest} if len(branches) == 1 else {**rest, "anyOf": branches}


def _without_titles(schema: Json) -> Json:
    return _each_schema(schema, lambda here: {key: value for key, value in here.items() if key != "title"})


def _each_schema(schema: Json, turn: Callable[[Json], Json]) -> Json:
    """The schema with `turn` applied to it and to every schema inside, from the inside out."""
    changed: Json = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            changed[key] = {name: _each_schema(inner, turn) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "propertyNames") and isinstance(value, dict):
            changed[key] = _each_schema(value, turn)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            changed[key] = [_each_schema(inner, turn) for inner in value]
        else:
            changed[key] = value
    return turn(changed)
