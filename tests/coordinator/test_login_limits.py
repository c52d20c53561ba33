"""Nobody guesses passwords for long, from wherever and at whomever, and no restart helps."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlmodel import Session

from coordinator.chores import delete_old
from coordinator.errors import TooMany
from coordinator.rules.login_limits import LoginLimits, account_key, peer_key
from coordinator.rules.principals import peer_of
from coordinator.store.dialect import Database
from coordinator.store.lanes import Lanes
from coordinator.store.login_counts import COUNTS, delete_old_counts, forgive, reserve_try
from tests.factories import Mill, together
from tests.fakes import SettableClock

LIMITS = LoginLimits(per_account=10, per_peer=50, window=timedelta(minutes=15))
InTx = Callable[[Callable[[Session], Any]], Any]
pytestmark = pytest.mark.threat("A19")


class Guesser:
    """Somebody who tries to log in, and fails unless it forgives itself."""

    def __init__(self, in_tx: InTx, clock: SettableClock) -> None:
        self.in_tx = in_tx
        self.clock = clock

    def tries(self, email: str = "ann@acme.test", peer: str = "192.0.2.1", *, times: int = 1) -> int:
        """How many of these tries are let through to the password."""
        return sum(self.is_let_through(email, peer) for _ in range(times))

    def is_let_through(self, email: str, peer: str) -> bool:
        try:
            self.try_once(email, peer)
        except TooMany:
            return False
        return True

    def try_once(self, email: str = "ann@acme.test", peer: str = "192.0.2.1") -> None:
        keys = {"account_key": account_key(email), "peer_key": peer_key(peer)}
        self.in_tx(partial(reserve_try, **keys, now=self.clock(), limits=LIMITS))

    def succeeds(self, email: str = "ann@acme.test", peer: str = "192.0.2.1") -> None:
        self.try_once(email, peer)
        self.in_tx(partial(forgive, account_key=account_key(email), peer_key=peer_key(peer)))

    def rows(self) -> int:
        return int(self.in_tx(lambda tx: tx.connection().execute(select(func.count(COUNTS.c.key))).scalar()))


@pytest.fixture
def guesser(in_tx: InTx, clock: SettableClock) -> Guesser:
    return Guesser(in_tx, clock)


def test_a_thousand_guesses_at_one_account_are_ten(guesser: Guesser) -> None:
    assert guesser.tries(times=60) == 10


def test_a_thousand_peers_that_guess_at_one_account_are_ten_guesses(guesser: Guesser) -> None:
    let_through = sum(guesser.tries(peer=f"192.0.2.{number}") for number in range(60))

    assert let_through == 10


def test_one_guess_at_each_of_a_thousand_accounts_is_fifty(guesser: Guesser) -> None:
    let_through = sum(guesser.tries(f"user{number}@acme.test") for number in range(70))

    assert let_through == 50


def test_who_takes_another_address_of_its_network_is_the_same_peer(guesser: Guesser) -> None:
    peers = [f"2001:db8:1:2:{number:x}::1" for number in range(70)]
    let_through = sum(guesser.tries(f"{peer}@acme.test", peer) for peer in peers)

    assert let_through == 50


@pytest.mark.parametrize(
    "twin", ["Ann@acme.test", " ann@acme.test ", "\uff41nn@acme.test", "ANN@ACME.TEST", "a\uff4en@acme.test"]
)
def test_another_spelling_of_an_account_is_the_same_account(guesser: Guesser, twin: str) -> None:
    guesser.tries(times=10)

    assert guesser.tries(twin) == 0


def test_a_hundred_guesses_at_the_same_moment_are_ten(guesser: Guesser) -> None:
    answers = together(*[guesser.try_once] * 100)

    assert answers.count(None) == 10
    assert sum(isinstance(answer, TooMany) for answer in answers) == 90


def test_parallel_guesses_at_many_accounts_do_not_wait_for_each_other_for_ever(guesser: Guesser) -> None:
    calls = [
        partial(guesser.try_once, f"user{number % 7}@acme.test", f"192.0.2.{number % 5}")
        for number in range(70)
    ]

    assert together(*calls).count(None) == 70


def test_the_refusal_says_when_the_window_ends(guesser: Guesser, clock: SettableClock) -> None:
    guesser.tries(times=5)
    clock.advance(100)
    guesser.tries(times=5)

    with pytest.raises(TooMany) as refused:
        guesser.try_once()

    assert refused.value.retry_after_s == 800
    clock.advance(799)
    assert guesser.tries() == 0
    clock.advance(1)
    assert guesser.tries(times=20) == 10


def test_a_restart_does_not_begin_anew(guesser: Guesser, database: Database, clock: SettableClock) -> None:
    guesser.tries(times=10)

    restarted = Lanes(database, writers=4, readers=2)
    try:
        assert Guesser(restarted.write_and_wait, clock).tries() == 0
    finally:
        restarted.close()


def test_a_login_that_succeeds_lets_the_account_begin_anew(guesser: Guesser) -> None:
    guesser.tries(times=9)
    guesser.succeeds()

    assert guesser.tries(times=20) == 10


def test_an_office_that_logs_in_all_day_is_not_taken_for_a_guesser(guesser: Guesser) -> None:
    for number in range(60):
        guesser.succeeds(f"user{number}@acme.test")

    assert guesser.tries("new@acme.test") == 1


def test_who_logs_in_as_itself_in_between_guesses_no_more_often(guesser: Guesser) -> None:
    let_through = 0
    for number in range(70):
        let_through += guesser.tries(f"user{number}@acme.test")
        if let_through < 50:
            guesser.succeeds("mallory@evil.test")

    assert let_through == 50


def test_a_peer_that_is_turned_away_locks_nobody_out(guesser: Guesser) -> None:
    for number in range(50):
        guesser.tries(f"user{number}@acme.test")
    guesser.tries("ann@acme.test", times=30)

    assert guesser.tries("ann@acme.test", peer="198.51.100.7") == 1


def test_windows_that_have_ended_are_deleted_and_no_other_ones(
    guesser: Guesser, in_tx: InTx, clock: SettableClock
) -> None:
    for number in range(5):
        guesser.tries(f"user{number}@acme.test")
    clock.advance(15 * 60)
    guesser.tries("ann@acme.test", peer="198.51.100.7")

    def delete_some() -> int:
        deleted: int = in_tx(partial(delete_old_counts, now=clock(), at_once=4))
        return deleted

    assert [delete_some(), delete_some(), delete_some()] == [4, 2, 0]
    assert guesser.rows() == 2


async def test_the_chore_deletes_batch_by_batch_until_nothing_old_is_left(
    mill: Mill, clock: SettableClock
) -> None:
    guesser = Guesser(mill.state.lanes.write_and_wait, clock)
    for number in range(7):
        guesser.tries(f"user{number}@acme.test")
    clock.advance(15 * 60)

    await delete_old(mill.state, partial(delete_old_counts, at_once=2))

    assert guesser.rows() == 0


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:0DB8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unknown"),
        ("testclient", "unknown"),
    ],
)
def test_a_peer_is_an_address_or_the_network_that_one_party_has_whole(address: str, peer: str) -> None:
    assert peer_of(address) == peer


def test_no_account_stands_in_the_table(guesser: Guesser, in_tx: InTx) -> None:
    guesser.tries("ann@acme.test")

    keys = in_tx(lambda tx: tx.connection().execute(select(COUNTS.c.key)).scalars().all())

    assert not any("ann" in key for key in keys)
