"""The wire models of the Build Execution API: snake_case, optional fields left out."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True)


class Input(BaseModel):
    """A body: closed and strict."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class ErrorBody(Shape):
    """Every error of this surface."""

    error: Annotated[str, Field(description="Human-readable error message")]
    code: Annotated[str, Field(description="Machine-readable word for the kind of error")]
    timestamp: Annotated[str, Field(description="When it happened, RFC 3339 in UTC")]
    trace_id: Annotated[str, Field(description="Stands in the coordinator's log as well")]
    details: Annotated[dict[str, str], Field(description="The reason by the path of each field at fault")]


class Nothing(Input):
    """A body that may as well be left out."""
