"""Whoever changes the trail behind our back is found, and so is which row it was."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import text
from sqlmodel import Session

from coordinator.actions.seal_trail import seal_trail
from coordinator.actions.verify_trail import Checked, Finding, verify_trail
from coordinator.cli import audit as command
from coordinator.cli.main import main
from coordinator.keys import checkpoints_path, load_audit_key
from coordinator.rules.audit_chain import Checkpoint, Link, link_after
from coordinator.store import audit, audit_chain
from coordinator.store.checkpoint_file import CheckpointFile, read_lines
from coordinator.store.dialect import Database
from coordinator.store.lanes import Lanes
from tests.factories import LOCAL, ON_SQLITE
from tests.fakes import MORNING

ROWS = 7
OTHERS = 2


@dataclass
class Trail:
    """Two chains, `t` with seven rows and `u` with two, all of them sealed and written down."""

    lanes: Lanes
    data: Path

    def tx(self, action: Callable[[Session], Any]) -> Any:
        return self.lanes.write_and_wait(action)

    def write(self, count: int, tenant_id: str = "t") -> None:
        for number in range(count):
            about = {"now": MORNING, "tenant_id": tenant_id, "n": number}
            self.tx(lambda tx, about=about: audit.record(tx, LOCAL, "project.created", **about))

    def seal(self) -> None:
        self.tx(lambda tx: seal_trail(tx, limit=1000))

    def mark(self, *chains: str) -> None:
        """Write down where the chains end."""
        file = CheckpointFile(checkpoints_path(self.data), load_audit_key(self.data))
        ends = {chain: self.tx(lambda tx, chain=chain: audit_chain.find_last(tx, chain)) for chain in chains}
        file.append([Checkpoint(chain, end.seq, end.hash, MORNING) for chain, end in ends.items()])

    def rows(self, chain: str = "t") -> list[Any]:
        return list(
            self.tx(lambda tx: audit_chain.list_sealed(tx, chain, after=audit_chain.BEFORE_ALL, limit=1000))
        )

    def id(self, seq: int, chain: str = "t") -> str:
        return str(self.rows(chain)[seq - 1].id)

    def forge(self, *statements: str, **values: Any) -> None:
        """What somebody does who owns the database: the triggers are put aside and come back."""
        with self.lanes.database.writer.begin() as connection:
            if self.lanes.database.is_sqlite:
                found = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
                triggers = connection.execute(found).all()
                for name, _ in triggers:
                    connection.exec_driver_sql(f"DROP TRIGGER {name}")
            else:
                triggers = []
                connection.execute(text("SET LOCAL session_replication_role = replica"))
            for statement in statements:
                connection.execute(text(statement), values)
            for _, sql in triggers:
                connection.exec_driver_sql(sql)

    def rehash(self, start: int) -> None:
        """Make the chain fit from here on, as somebody does who can read how it is made."""
        rows = self.rows()
        last = Link(start - 1, rows[start - 2].hash) if start > 1 else Link(0, bytes(32))
        for row in rows[start - 1 :]:
            last = link_after(last, "t", row)
            self.forge("UPDATE audit_logs SET hash = :hash WHERE id = :id", hash=last.hash, id=row.id)

    def verify(self) -> list[Finding]:
        path = checkpoints_path(self.data)
        lines = read_lines(path) if path.exists() else []
        return list(verify_trail(self.tx, lines, load_audit_key(self.data), Checked()))

    def found(self) -> list[tuple[str, str, int | None, str]]:
        return [(one.what, one.chain, one.seq, one.row_id) for one in self.verify()]


@pytest.fixture
def trail(lanes: Lanes, tmp_path: Path) -> Trail:
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    trail = Trail(lanes, data)
    trail.write(4)
    trail.write(OTHERS, "u")
    trail.seal()
    trail.mark("t", "u")
    trail.write(ROWS - 4)
    trail.seal()
    trail.mark("t")
    return trail


def test_nothing_is_found_in_a_trail_that_nobody_touched(trail: Trail) -> None:
    checked = Checked()
    lines = read_lines(checkpoints_path(trail.data))

    assert list(verify_trail(trail.tx, lines, load_audit_key(trail.data), checked)) == []

    assert (checked.rows, checked.chains, checked.checkpoints) == (ROWS + OTHERS, 2, 3)
    assert (checked.unsealed, checked.unsealed_since) == (0, None)


@pytest.mark.parametrize("seq", [1, 3, ROWS])
@pytest.mark.parametrize(
    "change",
    [
        "actor = 'somebody else'",
        "address = '192.0.2.1'",
        "action = 'project.deleted'",
        "details = '{\"n\": 99}'",
        "tenant_id = 'u'",
        "project_id = 'p'",
        "created_at = '2026-03-01 08:00:00.000001'",
    ],
)
def test_a_row_that_was_edited_is_found(trail: Trail, seq: int, change: str) -> None:
    row_id = trail.id(seq)

    trail.forge(f"UPDATE audit_logs SET {change} WHERE id = :id", id=row_id)

    assert trail.found() == [("changed", "t", seq, row_id)]


@pytest.mark.parametrize("seq", [1, 3, ROWS - 1])
def test_a_row_that_was_removed_is_found(trail: Trail, seq: int) -> None:
    trail.forge("DELETE FROM audit_logs WHERE id = :id", id=trail.id(seq))

    assert trail.found()[0] == ("missing", "t", seq, "")


def test_several_rows_that_were_removed_are_one_gap(trail: Trail) -> None:
    trail.forge("DELETE FROM audit_logs WHERE chain = 't' AND seq IN (2, 3)")

    (found,) = trail.verify()
    assert (found.what, found.seq) == ("missing", 2)
    assert "seq 2 to 3 are not there" in found.sentence


def test_rows_that_were_removed_at_the_end_are_found_by_the_checkpoint(trail: Trail) -> None:
    trail.forge("DELETE FROM audit_logs WHERE chain = 't' AND seq >= 6")

    (found,) = trail.verify()
    assert (found.what, found.chain, found.seq) == ("missing", "t", 6)
    assert "seq 6 to 7 are not there" in found.sentence


def test_a_tail_that_was_removed_stays_found_when_the_chain_has_grown_again(trail: Trail) -> None:
    trail.forge("DELETE FROM audit_logs WHERE chain = 't' AND seq >= 6")
    trail.write(5)
    trail.seal()
    trail.mark("t")

    (found,) = trail.verify()
    assert (found.what, found.chain, found.seq) == ("rewritten", "t", ROWS)
    assert "from seq 5 on" in found.sentence


def test_a_chain_that_was_removed_as_a_whole_is_found(trail: Trail) -> None:
    trail.forge("DELETE FROM audit_logs WHERE chain = 'u'")

    (found,) = trail.verify()
    assert (found.what, found.chain, found.seq) == ("missing", "u", 1)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 6), (1, ROWS)])
def test_rows_that_changed_places_are_both_found(trail: Trail, one: int, other: int) -> None:
    ids = {one: trail.id(one), other: trail.id(other)}

    trail.forge(
        "UPDATE audit_logs SET seq = 1000 WHERE id = :one",
        f"UPDATE audit_logs SET seq = {one} WHERE id = :other",
        f"UPDATE audit_logs SET seq = {other} WHERE id = :one",
        one=ids[one],
        other=ids[other],
    )

    found = [(seq, row_id) for what, _, seq, row_id in trail.found() if what == "changed"]
    assert {(one, ids[other]), (other, ids[one])} <= set(found)


def test_rows_that_changed_what_they_say_are_both_found(trail: Trail) -> None:
    first, second = trail.rows()[1], trail.rows()[4]
    swap = "UPDATE audit_logs SET details = :details WHERE id = :id"
    trail.forge(swap, details=json.dumps(second.details), id=first.id)
    trail.forge(swap, details=json.dumps({"n": 9}), id=second.id)

    assert trail.found() == [("changed", "t", 2, first.id), ("changed", "t", 5, second.id)]


INSERT = (
    "INSERT INTO audit_logs (id, tenant_id, action, actor, address, details, created_at, chain, seq, hash) "
    "VALUES ('forged', 't', 'a', 'b', '', '{}', '2026-03-01 08:00:00.000000', :chain, :seq, :hash)"
)


def test_a_row_that_was_put_at_the_end_is_found(trail: Trail) -> None:
    trail.forge(INSERT, chain="t", seq=ROWS + 1, hash=bytes(32))

    assert trail.found() == [("changed", "t", ROWS + 1, "forged")]


def test_a_row_that_was_put_between_others_is_found(trail: Trail) -> None:
    trail.forge(
        "UPDATE audit_logs SET seq = seq + 1000 WHERE chain = 't' AND seq > 3",
        "UPDATE audit_logs SET seq = seq - 999 WHERE chain = 't' AND seq > 1000",
        INSERT,
        chain="t",
        seq=4,
        hash=bytes(32),
    )

    found = trail.found()
    assert ("changed", "t", 4, "forged") in found
    assert ("rewritten", "t", 4, "forged") in found


@pytest.mark.parametrize("seq", [0, -5])
def test_a_row_before_the_first_is_found(trail: Trail, seq: int) -> None:
    trail.forge(INSERT, chain="t", seq=seq, hash=bytes(32))

    assert trail.found() == [("inserted", "t", None, "forged")]


@pytest.mark.parametrize("row_id", ["0", "z"])
def test_a_second_row_of_the_same_number_is_found(trail: Trail, row_id: str) -> None:
    trail.forge(
        "DROP INDEX ix_audit_logs_chain", INSERT.replace("forged", row_id), chain="t", seq=3, hash=bytes(32)
    )
    try:
        assert trail.found() == [("inserted", "t", 3, row_id)]
    finally:
        trail.forge(
            f"DELETE FROM audit_logs WHERE id = '{row_id}'",
            "CREATE UNIQUE INDEX ix_audit_logs_chain ON audit_logs (chain, seq) WHERE seq IS NOT NULL",
        )


@pytest.mark.parametrize("change", ["chain = NULL", "hash = NULL", "seq = NULL"])
def test_a_row_that_lost_part_of_its_place_is_found(trail: Trail, change: str) -> None:
    row_id = trail.id(3)

    trail.forge(f"UPDATE audit_logs SET {change} WHERE id = :id", id=row_id)

    assert trail.found()[0] == ("inserted", "", None, row_id)


def test_a_row_that_moved_to_another_chain_is_found(trail: Trail) -> None:
    row_id = trail.id(ROWS)

    trail.forge("UPDATE audit_logs SET chain = 'u', tenant_id = 'u', seq = 3 WHERE id = :id", id=row_id)

    assert trail.found() == [("changed", "u", 3, row_id), ("missing", "t", ROWS, "")]


@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_tail_that_was_made_to_fit_without_the_key_is_found_by_the_checkpoint(
    trail: Trail, start: int
) -> None:
    trail.forge("UPDATE audit_logs SET actor = 'somebody else' WHERE id = :id", id=trail.id(start))
    trail.rehash(start)

    (found,) = trail.verify()
    seq = 4 if start <= 4 else ROWS
    assert (found.what, found.chain, found.seq, found.row_id) == ("rewritten", "t", seq, trail.id(seq))
    assert f"from seq {1 if start <= 4 else 5} on" in found.sentence


def test_a_row_that_was_changed_with_its_hash_is_found_by_the_next(trail: Trail) -> None:
    trail.forge("UPDATE audit_logs SET actor = 'x', hash = :hash WHERE id = :id", hash=b"x", id=trail.id(6))

    assert [found[2] for found in trail.found()] == [6, ROWS]


@ON_SQLITE
@pytest.mark.parametrize("change", ["details = 'no json'", "created_at = 'never'", "hash = 'text'"])
def test_a_row_that_cannot_be_read_is_found_and_those_behind_it_are_verified(
    trail: Trail, change: str
) -> None:
    row_id = trail.id(2)

    trail.forge(f"UPDATE audit_logs SET {change} WHERE id = :id", id=row_id)

    assert ("changed", "t", 2, row_id) in trail.found()


@ON_SQLITE
def test_a_row_that_could_never_be_read_is_found(trail: Trail) -> None:
    row = "('x', 't', 'a', 'b', '', 'no json', '2026-03-01 08:00:00.000000')"
    insert = "INSERT INTO audit_logs (id, tenant_id, action, actor, address, details, created_at)"
    trail.forge(f"{insert} VALUES {row}")
    trail.seal()

    assert trail.found() == [("unreadable", "t", ROWS + 1, "x")]


def test_missing_triggers_are_found(trail: Trail) -> None:
    drop = "DROP TRIGGER audit_logs_no_delete"
    with trail.lanes.database.writer.connect() as connection:
        connection.execute(text(drop + ("" if trail.lanes.database.is_sqlite else " ON audit_logs")))

        found = list(verify_trail(lambda action: action(Session(connection)), [], b"", Checked()))

        assert [one.what for one in found] == ["unprotected"]
        connection.rollback()


# --- checkpoints


def test_a_checkpoint_that_was_changed_is_found(trail: Trail) -> None:
    path = checkpoints_path(trail.data)
    path.write_text(path.read_text().replace('"seq":4', '"seq":3'))

    assert [(one.what, one.sentence[:6]) for one in trail.verify()] == [("checkpoint", "line 1")]


@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_that_was_taken_out_is_found(trail: Trail, number: int) -> None:
    path = checkpoints_path(trail.data)
    lines = path.read_text().splitlines(keepends=True)
    del lines[number]
    path.write_text("".join(lines))

    assert [one.what for one in trail.verify()] == ["checkpoint"]


def test_checkpoints_sealed_with_another_key_are_worth_nothing(trail: Trail) -> None:
    lines = list(read_lines(checkpoints_path(trail.data)))

    found = list(verify_trail(trail.tx, lines, b"x" * 32, Checked()))

    assert [one.what for one in found] == ["checkpoint"] * 3


# --- long trails


def test_a_trail_is_read_a_few_rows_at_a_time(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.actions.verify_trail.ROWS_AT_ONCE", 3)
    monkeypatch.setattr("coordinator.actions.verify_trail.LINES_AT_ONCE", 2)
    checked = Checked()
    lines = read_lines(checkpoints_path(trail.data))

    assert list(verify_trail(trail.tx, lines, load_audit_key(trail.data), checked)) == []

    assert (checked.rows, checked.checkpoints) == (ROWS + OTHERS, 3)


# --- the command


def run(trail: Trail, *more: str) -> Any:
    url = trail.lanes.database.writer.url.render_as_string(hide_password=False)
    arguments = ["audit", "verify", "--data", str(trail.data), "--database", url, *more]
    return CliRunner().invoke(main, arguments)


def test_the_command_says_that_all_is_well_while_the_coordinator_runs(trail: Trail) -> None:
    trail.write(2)

    answer = run(trail)

    assert answer.exit_code == 0, answer.output
    waiting, verdict = answer.stdout.splitlines()
    assert re.fullmatch(r"2 rows wait to be sealed, the first for \d+ s", waiting)
    assert verdict == f"{ROWS + OTHERS} rows in 2 chains, 3 checkpoints: nothing was changed"


def test_the_command_names_what_it_finds_and_ends_with_1(trail: Trail) -> None:
    row_id = trail.id(3)
    trail.forge("UPDATE audit_logs SET actor = 'x' WHERE id = :id", id=row_id)

    answer = run(trail)

    assert answer.exit_code == 1
    assert answer.stdout.splitlines() == [
        f"changed: chain t, seq 3, id {row_id}: it is not what was sealed",
        f"{ROWS + OTHERS} rows in 2 chains, 3 checkpoints: 1 findings",
    ]


def test_the_command_does_not_drown_in_findings(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MOST_SHOWN", 2)
    monkeypatch.setattr(command, "PROGRESS_S", 0.0)
    trail.forge("UPDATE audit_logs SET actor = 'x'")

    answer = run(trail)

    assert answer.stdout.splitlines()[2] == f"and {ROWS + OTHERS - 2} more"
    assert "verified 0 rows" in answer.stderr


@pytest.mark.parametrize("name", ["keys/audit-key", "audit/checkpoints"])
def test_the_command_misses_the_key_and_the_checkpoints(trail: Trail, name: str) -> None:
    (trail.data / name).unlink()

    answer = run(trail)

    assert answer.exit_code == 1
    assert f"{trail.data / name}" in answer.stdout
    assert not (trail.data / name).exists()


@pytest.mark.parametrize(
    ("revision", "said"), [("0002", "run `buildmill migrate`"), ("9999", "start the newer version")]
)
def test_a_database_of_another_version_is_left_alone(
    trail: Trail, database: Database, revision: str, said: str
) -> None:
    def set_revision(number: str) -> str:
        with database.writer.begin() as connection:
            before = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
            connection.execute(text("UPDATE alembic_version SET version_num = :number"), {"number": number})
            return before

    before = set_revision(revision)
    try:
        answer = run(trail)
    finally:
        assert set_revision(before) == revision

    assert answer.exit_code == 1
    assert said in answer.output


@ON_SQLITE
def test_no_database_is_made_where_there_is_none(tmp_path: Path, database: Database) -> None:
    answer = CliRunner().invoke(main, ["audit", "verify", "--data", str(tmp_path / "nothing")])
    assert (answer.exit_code, "there is no data folder" in answer.output) == (1, True)

    (tmp_path / "empty").mkdir()
    answer = CliRunner().invoke(main, ["audit", "verify", "--data", str(tmp_path / "empty")])
    assert (answer.exit_code, "there is no database" in answer.output) == (1, True)
    assert list((tmp_path / "empty").iterdir()) == []
