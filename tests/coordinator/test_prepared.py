"""Statements on the driver's own cursor: they mean the same as through the library."""

from datetime import timedelta

import pytest
from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from coordinator.store.dialect import Database
from coordinator.store.lanes import Lanes
from coordinator.store.prepared import Prepared
from coordinator.store.statements import among, as_new, given, new_values
from coordinator.tables import Tenant, table_of
from tests.fakes import MORNING

TENANTS = table_of(Tenant)
INSERT = Prepared(
    insert(TENANTS).values({column.name: bindparam(column.name, type_=column.type) for column in TENANTS.c})
)
FIND = Prepared(select(TENANTS).where(TENANTS.c.id == given(TENANTS.c.id)))
COUNT = Prepared(select(func.count().label("count")).select_from(TENANTS))


def a_row(name: str) -> dict[str, object]:
    return {"id": name, "account": name, "created_at": MORNING}


def test_values_come_back_as_they_were_given(lanes: Lanes) -> None:
    lanes.write_and_wait(lambda tx: INSERT.run(tx, a_row("one")))

    found = lanes.write_and_wait(lambda tx: FIND.first(tx, {"the_id": "one"}))

    assert found is not None
    assert (found.id, found.account, found.created_at) == ("one", "one", MORNING)
    assert list(found) == ["one", "one", MORNING]
    with pytest.raises(AttributeError):
        _ = found.colour


def test_a_change_says_how_many_rows_it_met(lanes: Lanes) -> None:
    lanes.write_and_wait(lambda tx: INSERT.run_each(tx, [a_row("one"), a_row("two")]))
    later = MORNING + timedelta(hours=1)
    move = Prepared(
        update(TENANTS)
        .where(TENANTS.c.id == given(TENANTS.c.id), among(TENANTS.c.account, {"one", "three"}))
        .values(new_values(TENANTS, ["created_at"]))
        .returning(TENANTS.c.account, TENANTS.c.created_at)
    )

    def change(name: str) -> list[list[object]]:
        which = {"the_id": name} | as_new({"created_at": later})
        return lanes.write_and_wait(lambda tx: [list(row) for row in move.all(tx, which)])

    assert change("one") == [["one", later]]
    assert change("two") == []
    assert [row.count for row in lanes.write_and_wait(lambda tx: COUNT.all(tx, {}))] == [2]


def test_nothing_is_found_where_nothing_is(lanes: Lanes) -> None:
    assert lanes.write_and_wait(lambda tx: FIND.first(tx, {"the_id": "one"})) is None


@pytest.mark.parametrize("values", [{}, {"the_id": "one", "the_account": "one"}, {"the_name": "one"}])
def test_every_parameter_has_to_be_named_and_no_other(lanes: Lanes, values: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"needs \['the_id'\]"):
        lanes.write_and_wait(lambda tx: FIND.first(tx, values))


def test_an_error_of_the_driver_is_one_of_the_library(lanes: Lanes, database: Database) -> None:
    lanes.write_and_wait(lambda tx: INSERT.run(tx, a_row("one")))

    with pytest.raises(IntegrityError):
        lanes.write_and_wait(lambda tx: INSERT.run(tx, a_row("one")))
    with pytest.raises(IntegrityError):
        lanes.write_and_wait(lambda tx: INSERT.run_each(tx, [a_row("two"), a_row("one")]))

    with database.reader.connect() as connection:
        assert connection.execute(select(TENANTS.c.id).where(TENANTS.c.id != "")).scalars().all() == ["one"]
