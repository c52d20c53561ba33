"""The published contract as it was handed out, and what can be asked of it."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator, FormatChecker

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "build-server-openapi.json").read_text())
METHODS = ("get", "post", "put", "patch", "delete", "head")
DATE_TIME = FormatChecker(formats=["date", "regex"])
DATE_TIME.checks("date-time")(
    lambda text: not isinstance(text, str) or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
)


def resolve(document: Mapping[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference stands for."""
    while "$ref" in schema:
        found: Any = document
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        schema = found
    return schema


@dataclass(frozen=True)
class Operation:
    """One operation of the contract."""

    method: str
    path: str
    spec: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def function_name(self) -> str:
        """`POST /api/projects/{id}/builds` is called post_projects_id_builds."""
        return re.sub(r"[^a-z]+", "_", f"{self.method} {self.path.removeprefix('/api')}".lower()).strip("_")

    def parameters(self, place: str) -> dict[str, dict[str, Any]]:
        return {item["name"]: item for item in self.spec.get("parameters", ()) if item["in"] == place}

    @property
    def body_schema(self) -> dict[str, Any] | None:
        body = self.spec.get("requestBody")
        return body["content"]["application/json"]["schema"] if body else None

    def check_request(self, query: Mapping[str, Any], body: Any) -> None:
        """Nothing is asked that the contract does not allow."""
        known = self.parameters("query")
        assert set(query) <= set(known)
        assert {name for name, item in known.items() if item.get("required")} <= set(query)
        for name, value in query.items():
            check(known[name]["schema"], value)
        assert (body is None) == (self.body_schema is None)
        if self.body_schema is not None:
            check(self.body_schema, body)

    def check_answer(self, answer: httpx.Response) -> None:
        """The answer is one that the contract tells of, with all the fields it tells of."""
        assert str(answer.status_code) in self.spec["responses"], answer.text
        content = self.spec["responses"][str(answer.status_code)]["content"]
        media_type = answer.headers["content-type"].split(";")[0]
        assert media_type in content
        if media_type == "application/json":
            check(content[media_type]["schema"], answer.json())


def check(schema: dict[str, Any], value: Any) -> None:
    whole = {**schema, "components": CONTRACT["components"]}
    Draft202012Validator(whole, format_checker=DATE_TIME).validate(value)


def operations_of(document: Mapping[str, Any]) -> Iterator[Operation]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield Operation(method.upper(), path, methods[method])


OPERATIONS = {str(operation): operation for operation in operations_of(CONTRACT)}
