"""Statements that run all the time: compiled once, then handed straight to the database's driver.

The library that builds our SQL spends several times as much on running a statement as the database does.
It still builds these and says how each value is written and read; only the running is left to the driver.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC
from functools import lru_cache
from typing import Any

from sqlalchemy import JSON, ColumnElement, Dialect, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine
from sqlmodel import Session

from coordinator.tables import UtcDateTime

MOMENTS = 16
DOCUMENTS = 64
SHORT_DOCUMENT = 8192

Processor = Callable[[Any], Any]
Shape = Mapping[str, tuple[int, Processor | None]]


class Found:
    """One row; a value is turned into what it means when it is first asked for, as most never are.

    Documents are shared by the rows that hold the same: nobody may change them.
    """

    def __init__(self, shape: Shape, values: Sequence[Any]) -> None:
        self._shape = shape
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            index, process = self._shape[name]
        except KeyError:
            raise AttributeError(name) from None
        value = self._values[index]
        if process is not None:
            value = process(value)
        self.__dict__[name] = value  # found there from now on
        return value

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._shape)

    def __repr__(self) -> str:
        return f"Found({', '.join(self._shape)})"


class Prepared:
    """One statement. Its parameters are those it was built with; each run names all of them."""

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def all(self, tx: Session, values: Mapping[str, Any]) -> list[Found]:
        """Every row that the statement gives back."""
        compiled = self._for(tx)
        rows = compiled.execute(tx, values).fetchall()
        return [Found(compiled.shape, row) for row in rows]

    def first(self, tx: Session, values: Mapping[str, Any]) -> Found | None:
        """The first row, or None."""
        compiled = self._for(tx)
        row = compiled.execute(tx, values).fetchone()
        return None if row is None else Found(compiled.shape, row)

    def run(self, tx: Session, values: Mapping[str, Any]) -> int:
        """For its effect; returns how many rows it met."""
        count: int = self._for(tx).execute(tx, values).rowcount
        return count

    def run_each(self, tx: Session, rows: Sequence[Mapping[str, Any]]) -> None:
        """For its effect, once for each of these."""
        self._for(tx).execute_many(tx, rows)

    def _for(self, tx: Session) -> "_Compiled":
        dialect = tx.connection().dialect
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        return found


def run_plainly(tx: Session, sql: str) -> None:
    """A statement without parameters and without an answer."""
    dialect, driver = tx.connection().dialect, tx.connection().connection.dbapi_connection
    error_type: type[Exception] = dialect.dbapi.Error  # type: ignore[union-attr]
    try:
        driver.cursor().execute(sql)  # type: ignore[union-attr]
    except error_type as error:
        raise _as_the_library_says(error, error_type, sql, None, dialect) from error


def _as_the_library_says(
    error: Exception, error_type: type[Exception], sql: str, parameters: Any, dialect: Dialect
) -> BaseException:
    """An error of the driver as the library would have raised it."""
    return DBAPIError.instance(
        sql,
        parameters,
        error,
        error_type,
        hide_parameters=True,
        connection_invalidated=dialect.is_disconnect(error, None, None),  # type: ignore[arg-type]
        dialect=dialect,
    )


class _Compiled:
    """A statement in the words of one database."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled: SQLCompiler = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self._dialect = dialect
        self._error: type[Exception] = dialect.dbapi.Error  # type: ignore[union-attr]
        self._sql = str(compiled)
        given: dict[str, Processor | None] = {}
        fixed = dict(compiled.construct_params(_check=False))
        for name, bind in compiled.binds.items():
            process = _writer(bind.type, dialect)
            if bind.required:
                fixed.pop(name, None)
                given[name] = process
            elif process is not None and name in fixed:
                fixed[name] = process(fixed[name])
        self._required = given.keys()
        self._fill = _filler(compiled.positiontup, given, fixed)
        self.shape: Shape = {
            str(column.key): (index, _reader(column, dialect))
            for index, column in enumerate(_columns(statement))
        }

    def execute(self, tx: Session, values: Mapping[str, Any]) -> Any:
        cursor = tx.connection().connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        parameters = self._parameters(values)
        try:
            cursor.execute(self._sql, parameters)
        except self._error as error:
            raise _as_the_library_says(error, self._error, self._sql, parameters, self._dialect) from error
        return cursor

    def execute_many(self, tx: Session, rows: Sequence[Mapping[str, Any]]) -> None:
        cursor = tx.connection().connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        parameters = [self._parameters(row) for row in rows]
        try:
            cursor.executemany(self._sql, parameters)
        except self._error as error:
            raise _as_the_library_says(error, self._error, self._sql, parameters, self._dialect) from error

    def _parameters(self, values: Mapping[str, Any]) -> Any:
        if values.keys() != self._required:
            raise TypeError(f"needs {sorted(self._required)}, not {sorted(values)}")
        return self._fill(values)


def _filler(
    order: list[str] | None, given: Mapping[str, Processor | None], fixed: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Any]:
    """Makes what the driver takes out of given values: all in their order, or the names with their values."""
    names = [*given, *fixed] if order is None else order
    plan = [(name, given.get(name), name in given, fixed.get(name)) for name in names]

    def fill(values: Mapping[str, Any]) -> list[Any]:
        return [
            (values[name] if process is None else process(values[name])) if is_given else always
            for name, process, is_given, always in plan
        ]

    return fill if order is not None else lambda values: dict(zip(names, fill(values), strict=True))


def _writer(kind: TypeEngine[Any], dialect: Dialect) -> Processor | None:
    """How a value of this kind is handed over; the same few moments come again and again."""
    process = kind.dialect_impl(dialect).bind_processor(dialect)
    if process is None or not isinstance(kind, UtcDateTime):
        return process
    known = lru_cache(MOMENTS)(process)
    # in one zone, as moments of another are equal also where its clocks are set back
    return lambda moment: process(None) if moment is None else known(moment.astimezone(UTC))


def _columns(statement: Any) -> list[ColumnElement[Any]]:
    if statement.is_select:
        return list(statement.selected_columns)
    return [described["expr"] for described in statement.returning_column_descriptions]


def _reader(column: ColumnElement[Any], dialect: Dialect) -> Processor | None:
    """How a value of this column is read; the same few documents come again and again, as they were."""
    process = column.type.dialect_impl(dialect).result_processor(dialect, None)
    return _remembering(process) if process is not None and isinstance(column.type, JSON) else process


def _remembering(process: Processor) -> Processor:
    known = lru_cache(DOCUMENTS)(process)
    return lambda text: known(text) if text and len(text) <= SHORT_DOCUMENT else process(text)
