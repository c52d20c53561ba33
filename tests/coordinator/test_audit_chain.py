"""A row of the audit trail is said once: the database refuses every change but its place in the chain."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from coordinator.rules.audit_chain import (
    NO_TENANT,
    START,
    BadCheckpoint,
    Checkpoint,
    Link,
    chain_of,
    hash_of,
    link_after,
    read_checkpoint,
    seal_in,
    spell_checkpoint,
)
from coordinator.store import audit, audit_chain
from coordinator.store.dialect import Database, has_triggers
from tests.factories import LOCAL, ON_POSTGRES, ON_SQLITE
from tests.fakes import MORNING

TRIGGERS = ["audit_logs_no_delete", "audit_logs_no_change", "audit_logs_no_replace"]
KEY = b"k" * 32
InTx = Callable[[Callable[[Session], Any]], Any]


def write_row(tx: Session, **details: Any) -> str:
    audit.record(tx, LOCAL, "project.created", now=MORNING, tenant_id="t", **details)
    return str(audit_chain.list_unsealed(tx, limit=1000)[-1].id)


def seal_row(tx: Session, row_id: str, seq: int = 1) -> None:
    audit_chain.seal_rows(tx, [(row_id, "t", Link(seq, bytes(32)))])


# --- what the database refuses


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit_logs",
        "DELETE FROM audit_logs WHERE id = :id",
        "UPDATE audit_logs SET actor = 'nobody'",
        "UPDATE audit_logs SET details = '{}'",
        "UPDATE audit_logs SET tenant_id = NULL",
        "UPDATE audit_logs SET created_at = '2020-01-01 00:00:00.000000'",
        "UPDATE audit_logs SET id = 'x' WHERE id = :id",
        "UPDATE audit_logs SET seq = 7",
        "UPDATE audit_logs SET chain = NULL, seq = NULL, hash = NULL",
        "UPDATE audit_logs SET chain = 't', seq = 9, hash = 'h', actor = 'x' WHERE seq IS NULL",
        "UPDATE audit_logs SET seq = 9 WHERE seq IS NULL",
    ],
)
def test_rows_are_neither_changed_nor_deleted(database: Database, in_tx: InTx, statement: str) -> None:
    first, second = in_tx(lambda tx: write_row(tx, n=1)), in_tx(lambda tx: write_row(tx, n=2))
    in_tx(lambda tx: seal_row(tx, first))
    before = rows_in(database)

    with pytest.raises(DBAPIError, match="append-only"), database.writer.begin() as connection:
        connection.execute(text(statement), {"id": second} if ":id" in statement else {})

    assert rows_in(database) == before


@ON_POSTGRES
def test_the_table_cannot_be_emptied_at_once(database: Database, in_tx: InTx) -> None:
    in_tx(write_row)

    with pytest.raises(DBAPIError, match="append-only"), database.writer.begin() as connection:
        connection.execute(text("TRUNCATE audit_logs CASCADE"))

    assert len(rows_in(database)) == 1


@ON_SQLITE
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR REPLACE INTO audit_logs SELECT id, tenant_id, project_id, 'x', actor, address, details, "
        "created_at, NULL, NULL, NULL FROM audit_logs",
        "UPDATE OR REPLACE audit_logs SET chain = 't', seq = 1, hash = x'00' WHERE seq IS NULL",
    ],
)
def test_no_row_takes_the_place_of_another(database: Database, in_tx: InTx, statement: str) -> None:
    first, _second = in_tx(lambda tx: write_row(tx, n=1)), in_tx(lambda tx: write_row(tx, n=2))
    in_tx(lambda tx: seal_row(tx, first))
    before = rows_in(database)

    with pytest.raises(DBAPIError, match="append-only"), database.writer.begin() as connection:
        connection.execute(text(statement))

    assert rows_in(database) == before


def test_a_row_cannot_bring_its_place_along(database: Database, in_tx: InTx) -> None:
    row = "'x', 'a', 'b', '', '{}', '2026-03-01 08:00:00.000000', 'installation', 1, 'h'"
    insert = "INSERT INTO audit_logs (id, action, actor, address, details, created_at, chain, seq, hash)"

    with pytest.raises(DBAPIError, match="append-only"), database.writer.begin() as connection:
        connection.execute(text(f"{insert} VALUES ({row})"))

    assert rows_in(database) == []


def test_a_row_gets_its_place_once(in_tx: InTx) -> None:
    row_id = in_tx(write_row)
    assert in_tx(audit_chain.has_unsealed)

    in_tx(lambda tx: seal_row(tx, row_id))

    assert not in_tx(audit_chain.has_unsealed)
    in_tx(lambda tx: seal_row(tx, row_id, seq=2))
    assert in_tx(lambda tx: audit_chain.find_last(tx, "t")) == Link(1, bytes(32))


def test_the_triggers_are_seen(in_tx: InTx) -> None:
    assert in_tx(lambda tx: has_triggers(tx, "audit_logs", TRIGGERS))
    assert not in_tx(lambda tx: has_triggers(tx, "audit_logs", [*TRIGGERS, "another"]))
    assert not in_tx(lambda tx: has_triggers(tx, "builds", TRIGGERS))


def rows_in(database: Database) -> list[Any]:
    with database.writer.connect() as connection:
        return [
            tuple(bytes(value) if isinstance(value, memoryview) else str(value) for value in row)
            for row in connection.execute(text("SELECT * FROM audit_logs ORDER BY id"))
        ]


# --- the hash


@dataclass(frozen=True)
class Said:
    id: str = "0190"
    tenant_id: str | None = "t"
    project_id: str | None = None
    action: str = "project.created"
    actor: str = "user:1"
    address: str = "127.0.0.1"
    details: Any = None
    created_at: Any = MORNING


ROW = Said(details={"name": "x", "n": 1})


def test_the_hash_of_a_row_stays_the_same_in_every_version() -> None:
    """Trails of former versions have to be verified with this; a change here breaks all of them."""
    link = link_after(START, "t", ROW)

    assert link.seq == 1
    assert link.hash.hex() == "22f718406665a0cd64d7c6ce196762deb3a7eb893011cd99e41777eb9b645d95"


@pytest.mark.parametrize(
    "other",
    [
        {"id": "0191"},
        {"tenant_id": None},
        {"project_id": "p"},
        {"action": "project.deleted"},
        {"actor": "user:2"},
        {"address": ""},
        {"details": {"name": "x", "n": 2}},
        {"details": {"name": "x", "n": "1"}},
        {"created_at": MORNING + timedelta(microseconds=1)},
    ],
)
def test_everything_a_row_says_is_in_its_hash(other: dict[str, Any]) -> None:
    assert hash_of(START.hash, 1, "t", replace(ROW, **other)) != hash_of(START.hash, 1, "t", ROW)


def test_the_place_of_a_row_is_in_its_hash() -> None:
    here = hash_of(START.hash, 1, "t", ROW)

    assert hash_of(START.hash, 2, "t", ROW) != here
    assert hash_of(START.hash, 1, "u", ROW) != here
    assert hash_of(b"\1" * 32, 1, "t", ROW) != here


def test_the_order_of_details_is_not_in_the_hash_as_databases_may_change_it() -> None:
    turned = replace(ROW, details={"n": 1, "name": "x"})

    assert hash_of(START.hash, 1, "t", turned) == hash_of(START.hash, 1, "t", ROW)


def test_what_belongs_to_no_tenant_has_a_chain_of_its_own() -> None:
    assert (chain_of("t"), chain_of(None)) == ("t", NO_TENANT)


@pytest.mark.parametrize("value", ["\ud800", 0.1, 2**70, {"a": [None, True, {"b": "ü"}]}, "\x00"])
def test_any_details_that_json_can_say_can_be_hashed(value: Any) -> None:
    assert len(hash_of(START.hash, 1, "t", replace(ROW, details={"value": value}))) == 32


# --- checkpoints

MARK = Checkpoint("t", 7, b"\7" * 32, MORNING)


def test_a_checkpoint_is_read_as_it_was_written() -> None:
    line, seal = spell_checkpoint(KEY, "before", MARK)

    assert read_checkpoint(KEY, "before", line) == (MARK, seal)
    assert seal_in(line) == seal


@pytest.mark.parametrize(
    ("key", "before", "change"),
    [
        (b"x" * 32, "before", ("", "")),
        (KEY, "", ("", "")),
        (KEY, "before", ('"seq":7', '"seq":6')),
        (KEY, "before", ('"chain":"t"', '"chain":"u"')),
        (KEY, "before", ("0707", "0708")),
        (KEY, "before", ('"seal":', '"more":')),
        (KEY, "before", ("{", "[")),
    ],
)
def test_a_checkpoint_without_the_key_or_out_of_its_place_is_none(
    key: bytes, before: str, change: tuple[str, str]
) -> None:
    line, _ = spell_checkpoint(KEY, "before", MARK)

    with pytest.raises(BadCheckpoint):
        read_checkpoint(key, before, line.replace(*change))


@pytest.mark.parametrize("line", ["", "null", "[]", "[" * 100_000, '{"seal":"\\ud800"}', '{"seal":1}'])
def test_what_is_no_checkpoint_at_all_is_said_to_be_none(line: str) -> None:
    with pytest.raises(BadCheckpoint):
        read_checkpoint(KEY, "", line)
    assert isinstance(seal_in(line), str)
