"""The log of a build is read as messages: from the start, from anywhere, while it grows, and to its end."""

import random
from collections.abc import Callable, Sequence

import pytest
from anyio.from_thread import BlockingPortal

from coordinator.actions.retry_build import retry_build
from coordinator.api.executions.log_reader import LogReader, Message, read_for_all
from coordinator.rules.log_lines import BEGINNING, LONGEST_PART, Position, position_in
from tests.factories import LOCAL, ON_SQLITE, Held, MadeBuild, Mill, a_spec

Said = tuple[str, str, bytes]
Reading = Callable[..., list[Said]]


def told(message: Message) -> bytes:
    """Step and attempt, and the text of one message."""
    mark = b"+" if message.line.is_partial else b"."
    return f"{message.piece.step}#{message.piece.attempt}".encode() + mark + message.line.text


def a_reader(mill: Mill, build_id: str, start: Position = BEGINNING) -> LogReader:
    return LogReader(mill.site, read_for_all(mill.state), build_id, told, start)


async def read_on(reader: LogReader) -> tuple[list[tuple[Position, bytes]], bool]:
    """What there is by now, and whether it is all there will ever be."""
    found: list[tuple[Position, bytes]] = []
    for _ in range(100_000):
        batch = await reader.read()
        found += batch.messages
        if batch.is_end or batch.is_waiting:
            return found, batch.is_end
    raise AssertionError("the log has no end")


@pytest.fixture
def read(mill: Mill, portal: BlockingPortal) -> Callable[..., list[tuple[str, bytes]]]:
    def read(build_id: str, start: str = "0") -> list[tuple[str, bytes]]:
        position = position_in(start)
        assert position is not None
        found, _ = portal.call(read_on, a_reader(mill, build_id, position))
        return [(str(position), text) for position, text in found]

    return read


def texts(found: Sequence[tuple[str, bytes]]) -> list[bytes]:
    return [text for _, text in found]


def two_steps(mill: Mill) -> tuple[str, Held, Held]:
    """A build with two steps that run at the same time."""
    build = mill.a_build(a_spec(a=[], b=[]))
    held = mill.acquire(mill.a_runner(), slots=2)
    for one in held:
        mill.start(one)
    by_id = {one.step_id: one for one in held}
    return build.id, by_id[build.steps["a"]], by_id[build.steps["b"]]


def a_build_of_one(mill: Mill) -> tuple[str, Held]:
    held = mill.a_running_step()
    return mill.step(held.step_id).build_id, held


def test_the_lines_of_steps_come_in_the_order_in_which_they_were_ended(mill: Mill, read: Reading) -> None:
    build_id, a, b = two_steps(mill)
    mill.append(a, 0, b"one\ntw")
    mill.append(b, 0, b"ONE\n")
    mill.append(a, 6, b"o\n")

    assert read(build_id) == [("1.1", b"a#1.one"), ("2.1", b"b#1.ONE"), ("3.1", b"a#1.two")]


def test_a_line_that_no_newline_ends_comes_when_the_build_has_ended(mill: Mill, read: Reading) -> None:
    build_id, a, b = two_steps(mill)
    mill.append(b, 0, b"B")
    mill.append(a, 0, b"A")
    mill.complete(a, logSize=1)
    assert read(build_id) == []

    mill.complete(b, logSize=1)

    assert read(build_id) == [("3.1", b"b#1.B"), ("3.2", b"a#1.A")]


def test_another_attempt_ends_the_open_line_of_the_one_before(mill: Mill, read: Reading) -> None:
    build_id, first = a_build_of_one(mill)
    mill.append(first, 0, b"one\nopen")
    mill.complete(first, "failed", reason="internal", logSize=8)
    mill.clock.advance(60)
    (second,) = mill.acquire(first.runner)
    mill.append(second, 0, b"again\n")

    assert read(build_id) == [("1.1", b"test#1.one"), ("2.1", b"test#1.open"), ("2.2", b"test#2.again")]


def test_bytes_that_were_sent_again_are_read_once(mill: Mill, read: Reading) -> None:
    build_id, held = a_build_of_one(mill)
    mill.append(held, 0, b"one\ntwo\n")
    path = mill.site.logs.path(build_id, held.step_id, 1)
    path.write_bytes(b"one\nt")  # the machine went down
    assert texts(read(build_id)) == [b"test#1.one"]
    assert mill.append(held, 8, b"three\n").size == 5

    mill.append(held, 5, b"wo\nthree\n")

    assert read(build_id) == [("1.1", b"test#1.one"), ("1.2", b"test#1.two"), ("2.1", b"test#1.three")]


def test_bytes_that_are_gone_for_good_hold_nobody_up(mill: Mill, read: Reading) -> None:
    build_id, held = a_build_of_one(mill)
    mill.append(held, 0, b"one\ntwo\n")
    mill.complete(held, logSize=8)
    mill.site.logs.path(build_id, held.step_id, 1).write_bytes(b"one\n")

    assert texts(read(build_id)) == [b"test#1.one"]


def test_the_open_line_of_a_round_keeps_its_place_when_the_build_is_run_again(
    mill: Mill, read: Reading
) -> None:
    build_id, held = a_build_of_one(mill)
    mill.append(held, 0, b"open")
    mill.complete(held, "failed", reason="exit_nonzero", exitCode=1, logSize=4)
    before = read(build_id)

    mill.now(retry_build, LOCAL, build_id, "all")
    (again,) = mill.acquire(held.runner)
    mill.append(again, 0, b"again\n")

    assert before == [("2.1", b"test#1.open")]
    assert read(build_id) == [*before, ("3.1", b"test#1.again")]
    assert read(build_id, "2.1") == [("3.1", b"test#1.again")]


def a_babble(mill: Mill, dice: random.Random) -> MadeBuild:
    """A build of three steps that have all said something, in pieces of every kind."""
    build = mill.a_build(a_spec(a=[], b=[], c=[]))
    runner = mill.a_runner()
    held = mill.acquire(runner, slots=3)
    sizes = {one.step_id: 0 for one in held}
    words = [b"\n", b"word ", b"line\n", b"\n\n\n", b"x" * 20_000, "ü\n".encode(), b"y" * (LONGEST_PART + 7)]
    for number in range(60):
        one = dice.choice(held)
        data = b"".join(dice.choice(words) for _ in range(dice.randint(1, 6)))
        sizes[one.step_id] = mill.append(one, sizes[one.step_id], data).size
        if number == 40:  # one is tried again
            mill.complete(one, "failed", reason="internal", logSize=sizes[one.step_id])
            mill.clock.advance(60)
            mill.heartbeat(runner, *[other for other in held if other is not one])
            held = [other for other in held if other is not one] + mill.acquire(runner)
            sizes[one.step_id] = 0
    for one in held:
        mill.complete(one, logSize=sizes[one.step_id])
    return build


@ON_SQLITE
@pytest.mark.parametrize("seed", range(3))
def test_from_every_position_on_comes_exactly_what_follows(mill: Mill, read: Reading, seed: int) -> None:
    dice = random.Random(seed)
    build = a_babble(mill, dice)
    whole = read(build.id)
    positions = [position_in(seq) for seq, _ in whole]
    assert positions == sorted(set(positions))

    for at in sorted(dice.sample(range(len(whole)), min(60, len(whole)))):
        assert read(build.id, whole[at][0]) == whole[at + 1 :]


def test_a_log_is_the_same_for_who_reads_it_while_it_grows(
    mill: Mill, read: Reading, portal: BlockingPortal
) -> None:
    dice = random.Random(5)
    build_id, a, b = two_steps(mill)
    reader = a_reader(mill, build_id)
    seen: list[tuple[Position, bytes]] = []
    sizes = {a.step_id: 0, b.step_id: 0}
    for _ in range(30):
        one = dice.choice([a, b])
        data = dice.choice([b"x", b"y\n", b"z" * LONGEST_PART])
        sizes[one.step_id] = mill.append(one, sizes[one.step_id], data).size
        found, is_end = portal.call(read_on, reader)
        assert not is_end
        seen += found
    for one in (a, b):
        mill.complete(one, logSize=sizes[one.step_id])
    found, is_end = portal.call(read_on, reader)

    assert is_end
    assert [(str(position), text) for position, text in [*seen, *found]] == read(build_id)


def test_a_build_that_has_said_nothing_ends_with_nothing(mill: Mill, portal: BlockingPortal) -> None:
    build_id, held = a_build_of_one(mill)
    reader = a_reader(mill, build_id)
    assert portal.call(read_on, reader) == ([], False)
    mill.complete(held)

    assert portal.call(read_on, reader) == ([], True)


def test_many_empty_lines_are_handed_out_in_small_batches(mill: Mill, portal: BlockingPortal) -> None:
    build_id, held = a_build_of_one(mill)
    mill.append(held, 0, b"\n" * 200_000)

    async def largest_batch() -> tuple[int, int]:
        reader = LogReader(mill.site, read_for_all(mill.state), build_id, lambda _: b"x" * 100)
        largest = count = 0
        while not (batch := await reader.read()).is_waiting:
            largest, count = max(largest, len(batch.messages)), count + len(batch.messages)
        return largest, count + len(batch.messages)

    largest, count = portal.call(largest_batch)

    assert count == 200_000
    assert largest <= 3000
