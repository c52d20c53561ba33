"""Ids: unique, and in the order in which they were made."""

import time
import uuid

import pytest

from shared.ids import is_id, new_id


def test_an_id_is_a_uuid_of_version_7_with_the_time_it_was_made() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid.UUID(new_id())
    after = time.time_ns() // 1_000_000

    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= made.int >> 80 <= after + 1000  # others made many, and each has a moment of its own


def test_ids_sort_in_the_order_they_were_made() -> None:
    made = [new_id() for _ in range(20_000)]

    assert made == sorted(set(made))
    assert all(is_id(one) for one in made)


def test_ids_still_sort_after_the_clock_was_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_id()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)

    later = [new_id(), new_id()]

    assert [first, *later] == sorted([first, *later])
