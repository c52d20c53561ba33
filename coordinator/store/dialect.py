"""The only file that names SQLite or Postgres: how each is opened and what manners it needs."""

import importlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Select,
    String,
    Table,
    Text,
    TypeDecorator,
    cast,
    column,
    create_engine,
    event,
    func,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine
from sqlmodel import Session

SAFE_SQLITE = (3, 51, 3)  # older ones can lose committed data with several connections in WAL mode
_EXAMPLES = "write sqlite:////path/to/file.db or postgresql://user:password@host/name"
_READ_ONLY = "-c statement_timeout=600s -c default_transaction_read_only=on -c timezone=UTC"
_RETRIABLE_SQLSTATES = frozenset({"40001", "40P01", "55P03"})
# only for reading, as after a failover; the transaction lay idle for too long
_OUTAGE_SQLSTATES = frozenset({"25006", "25P03"})
# the connection; resources; somebody intervened; the server's own system
_OUTAGE_CLASSES = frozenset({"08", "53", "57", "58"})


class UnusableDatabase(Exception):
    """The database that was named cannot be used; the message says why, in one line and without passwords."""


@dataclass(frozen=True)
class Database:
    """An opened database: an engine for writers, one for readers, and what holds for both."""

    writer: Engine
    reader: Engine
    is_sqlite: bool
    shares_one_connection: bool
    notice: str = ""

    def dispose(self) -> None:
        self.writer.dispose()
        self.reader.dispose()


def open_database(url: str, *, readers: int = 2, writers: int = 4) -> Database:
    """Open the database at `url` with durable settings, or UnusableDatabase."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UnusableDatabase(f"this is no database URL; {_EXAMPLES}") from error
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    if parsed.get_backend_name() in ("postgres", "postgresql"):
        return _open_postgres(parsed, readers=readers, writers=writers)
    raise UnusableDatabase(f"{parsed.get_backend_name()} is not supported; {_EXAMPLES}")


def open_to_look(url: str) -> Engine:
    """A database that is there already, beside whoever writes to it, or UnusableDatabase.

    Nothing can be changed over it, and no file is made.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UnusableDatabase(f"this is no database URL; {_EXAMPLES}") from error
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or not Path(parsed.database).is_file():
            raise UnusableDatabase(f"there is no database {parsed.database}")
        engine = create_engine(
            parsed, module=_sqlite_module(), pool_size=1, connect_args={"check_same_thread": False}
        )
        _set_manners(engine, begin="BEGIN", pragmas=("busy_timeout=10000", "query_only=ON"))
        return engine
    if parsed.get_backend_name() in ("postgres", "postgresql"):
        options = {"connect_timeout": 10, "application_name": "buildmill", "options": _READ_ONLY}
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_size=1, connect_args=options)
    raise UnusableDatabase(f"{parsed.get_backend_name()} is not supported; {_EXAMPLES}")


def is_sqlite(connection: Connection) -> bool:
    """For a migration that has to say something in the words of each database."""
    return connection.dialect.name == "sqlite"


@contextmanager
def saying_what_is_wrong() -> Iterator[None]:
    """While a database is opened and migrated: what an operator can mend becomes UnusableDatabase."""
    try:
        yield
    except DBAPIError as error:
        said = str(error.orig).strip().splitlines() or [type(error).__name__]
        raise UnusableDatabase(f"the database does not answer: {said[0]}") from error


def _sqlite_module() -> ModuleType:
    try:
        module: ModuleType = importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        return sqlite3
    return module


def _open_sqlite(url: URL) -> Database:
    module = _sqlite_module()
    is_safe = tuple(module.sqlite_version_info) >= SAFE_SQLITE
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {"module": module, "connect_args": {"check_same_thread": False}}
    writer = create_engine(url, pool_size=1, max_overflow=1, **arguments)
    _give_manners(writer, begin="BEGIN IMMEDIATE", journal="WAL" if is_safe else "DELETE")
    if not is_safe:
        notice = f"SQLite {module.sqlite_version} is older than 3.51.3: one connection for everything, no WAL"
        return Database(writer, writer, True, True, notice)
    reader = create_engine(url, pool_size=8, max_overflow=8, **arguments)
    _give_manners(reader, begin="BEGIN", journal="WAL")
    return Database(writer, reader, True, False)


def _give_manners(engine: Engine, *, begin: str, journal: str) -> None:
    pragmas = (
        "busy_timeout=10000",
        f"journal_mode={journal}",
        "synchronous=FULL",
        "foreign_keys=ON",
        "cache_size=-65536",
        "temp_store=MEMORY",
    )
    _set_manners(engine, begin=begin, pragmas=pragmas)


def _set_manners(engine: Engine, *, begin: str, pragmas: Sequence[str]) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _open_postgres(url: URL, *, readers: int, writers: int) -> Database:
    url = url.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {
        "pool_pre_ping": True,
        "connect_args": {
            "connect_timeout": 10,
            "application_name": "buildmill",
            "options": "-c statement_timeout=60s -c lock_timeout=30s "
            "-c idle_in_transaction_session_timeout=60s -c timezone=UTC",
        },
    }
    writer = create_engine(url, pool_size=writers + 1, max_overflow=2, **options)
    reader = create_engine(url, pool_size=readers, max_overflow=2, **options)
    return Database(writer, reader, False, False)


def has_row_policies(tx: Session) -> bool:
    """Whether this kind of database can hide rows by itself."""
    return tx.get_bind().dialect.name != "sqlite"


def has_lost_transaction(connection: Any) -> bool:
    """True when SQLite has rolled the whole transaction back by itself."""
    return not connection.connection.dbapi_connection.in_transaction


def set_patience(connection: Connection, seconds: float) -> None:
    """How long SQLite's BEGIN waits while another program holds the database."""
    driver: Any = connection.connection.dbapi_connection
    driver.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")


def is_locked(error: DBAPIError) -> bool:
    """True when another program holds SQLite's lock."""
    return "database is locked" in str(error.orig)


def may_be_retried(error: DBAPIError) -> bool:
    """True for a transaction that lost against another one and may simply run again."""
    return getattr(error.orig, "sqlstate", None) in _RETRIABLE_SQLSTATES


def is_bad_text(error: DBAPIError) -> bool:
    """True when the database could not store a value that every check before had let pass."""
    return isinstance(error, DataError)


def is_outage(error: DBAPIError) -> bool:
    """True when the database is away, full, locked or broken rather than the statement wrong."""
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return True
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is None:
        return type(error) is DatabaseError  # what SQLite says of a file that is damaged, or none of its own
    return sqlstate in _OUTAGE_SQLSTATES or sqlstate[:2] in _OUTAGE_CLASSES


def hold_names(tx: Session, names: Collection[str]) -> None:
    """Until the transaction ends nobody else holds any of these names; each is waited for."""
    if tx.get_bind().dialect.name == "sqlite":
        return  # one writes at a time
    statement = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
    for name in sorted(names):
        tx.connection().execute(statement, {"name": name})


def hold_if_free(tx: Session, name: str) -> bool:
    """True when nobody else holds the name until the transaction ends; never waits."""
    if tx.get_bind().dialect.name == "sqlite":
        return True  # one writes at a time
    statement = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))")
    return bool(tx.connection().execute(statement, {"name": name}).scalar_one())


def has_triggers(tx: Session, table: str, names: Collection[str]) -> bool:
    """True when the table has all of these triggers, and none of them was switched off."""
    if tx.get_bind().dialect.name == "sqlite":
        statement = text("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :table")
    else:
        statement = text(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(:table) AND tgenabled <> 'D'"
        )
    return set(names) <= set(tx.connection().execute(statement, {"table": table}).scalars())


def listed(tx: Session, ids: Collection[str]) -> Select[tuple[str]]:
    """The ids as rows, for `in_`: all in one parameter, of which a statement may have only so many."""
    said = json.dumps(sorted(ids))
    if tx.get_bind().dialect.name == "sqlite":
        rows = func.json_each(said).table_valued(column("value", String))
    else:
        rows = func.jsonb_array_elements_text(cast(literal(said, String), postgresql.JSONB)).table_valued(
            column("value", String)
        )
    return select(rows.c.value)


def insert_or_change(
    tx: Session,
    table: Table,
    row: Mapping[str, Any],
    change: Mapping[str, Any],
    *,
    only_if: ColumnElement[bool],
) -> bool:
    """Insert `row`, or change the one that has its key where `only_if` holds for it; False: neither was done.

    One statement, so that nothing comes in between: of two at once the second sees what the first has done.
    """
    dialect = tx.get_bind().dialect.name
    insert: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
    statement = (
        insert(table)
        .values(row)
        .on_conflict_do_update(index_elements=list(table.primary_key), set_=change, where=only_if)
        .returning(*table.primary_key)
    )
    return tx.connection().execute(statement).first() is not None


def insert_if_absent(tx: Session, table: Table, row: dict[str, Any]) -> bool:
    """Insert `row`; False when its key is taken already. The same on both databases."""
    dialect = tx.get_bind().dialect.name
    insert = sqlite.insert if dialect == "sqlite" else postgresql.insert
    # what was inserted is asked for by name: a driver may count -1 rows
    statement = insert(table).values(row).on_conflict_do_nothing().returning(*table.primary_key)
    return tx.connection().execute(statement).first() is not None


class GivenList(TypeDecorator[Sequence[Any]]):
    """A list as one parameter: JSON for SQLite, an array for Postgres."""

    impl = Text
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__()
        self.item = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "sqlite":
            return Text()
        return ARRAY(Text() if isinstance(self.item, String) else self.item)  # nothing is cut to a length

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> Any:
        given = list(value or ())
        return json.dumps(given) if dialect.name == "sqlite" else given


class IsAnyOf(FunctionElement[bool]):
    """A column and the list that its value is to be among.

    One text for lists of every length: it is made, and understood by the database, only once.
    """

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """As it is: compared with 1, as SQLite's truths are otherwise, no index would be used."""
        return self


@compiles(IsAnyOf, "sqlite")
def _among_json(element: IsAnyOf, compiler: SQLCompiler, **how: Any) -> str:
    column, given = (compiler.process(clause, **how) for clause in element.clauses)
    return f"({column} IN (SELECT value FROM json_each({given})))"  # noqa: S608 - names and parameters alone


@compiles(IsAnyOf, "postgresql")
def _among_array(element: IsAnyOf, compiler: SQLCompiler, **how: Any) -> str:
    column, given = (compiler.process(clause, **how) for clause in element.clauses)
    return f"({column} = ANY ({given}))"
