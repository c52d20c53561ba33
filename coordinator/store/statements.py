"""Parts of statements that are built once: building one anew costs more than running it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import BindParameter, Column, ColumnElement, Table, bindparam, literal

from coordinator.store.dialect import GivenList, IsAnyOf


def given(column: Column[Any]) -> BindParameter[Any]:
    """What a column is compared with; the parameter is called `the_<column>`."""
    return bindparam(f"the_{column.name}", type_=column.type)


def given_any(column: Column[Any], name: str = "") -> ColumnElement[bool]:
    """The column is one of a list of texts or numbers; the parameter is called `any_<column>`, or `name`."""
    return IsAnyOf(column, bindparam(name or f"any_{column.name}", type_=GivenList(column.type)))


def among(column: ColumnElement[Any], values: Collection[str]) -> ColumnElement[bool]:
    """The column has one of these fixed values."""
    if len(values) == 1:
        return column == next(iter(values))
    return column.in_([literal(value) for value in sorted(values)])  # as parameters, not as one list


def new_values(table: Table, names: Iterable[str]) -> dict[str, BindParameter[Any]]:
    """What columns are set to; the parameters are those that `as_new` makes."""
    return {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in names}


def as_new(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": value for name, value in values.items()}


def alike(changes: Iterable[tuple[Any, Mapping[str, Any]]]) -> list[tuple[list[str], int, Mapping[str, Any]]]:
    """The steps that get the same values under the same attempt: their ids, the attempt, the values."""
    found: dict[tuple[Any, ...], tuple[list[str], int, Mapping[str, Any]]] = {}
    for step, values in changes:
        ids, *_ = found.setdefault((step.attempt, *values.items()), ([], step.attempt, values))
        ids.append(step.id)
    return list(found.values())
