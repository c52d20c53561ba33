"""A disk that fills is cleared from a high mark down to a low one, the longest unused first."""

from pathlib import Path

import pytest

from runner.room import DEFAULT_MARKS, Area, Marks, Room, Space, longest_unused_first, look_at
from runner.spares import Spare
from runner.trash import Trash

NOW = 10_000.0


class Disk:
    """One file system of 1000 bytes, and what lies on it."""

    def __init__(self, used: int, *, device: int = 1) -> None:
        self.used = used
        self.device = device
        self.things: dict[str, tuple[float, int]] = {}
        self.in_use: set[str] = set()
        self.gone: list[str] = []
        self.pays = 1.0  # the part of what was promised that removing really sets free

    def put(self, name: str, used_at: float, size: int) -> None:
        self.things[name] = (used_at, size)

    def look(self, _folder: Path) -> Space:
        return Space(self.device, self.used, 1000 - self.used)

    def offer(self):
        for name, (used_at, size) in sorted(self.things.items(), key=lambda item: item[1]):
            yield Spare("thing", name, used_at, size, lambda name=name: self.remove(name))

    def remove(self, name: str) -> bool:
        if name in self.in_use:
            return False
        _, size = self.things.pop(name)
        self.used -= int(size * self.pays)
        self.gone.append(name)
        return True


@pytest.fixture
def new_room(tmp_path):
    def new(*disks: Disk, marks: Marks = DEFAULT_MARKS) -> Room:
        folders = {tmp_path / str(number): disk for number, disk in enumerate(disks)}
        areas = [Area(folder, [disk.offer]) for folder, disk in folders.items()]
        return Room(
            areas,
            marks,
            Trash(tmp_path),
            look=lambda folder: folders[folder].look(folder),
            clock=lambda: NOW,
        )

    return new


def clear(room: Room, rounds: int = 20) -> int:
    """How many rounds it took."""
    for count in range(1, rounds + 1):
        if room.clear():
            return count
    raise AssertionError("it never ends")


def a_disk(used: int, things: int = 10, size: int = 50) -> Disk:
    disk = Disk(used)
    for number in range(things):
        disk.put(f"thing-{number}", float(number), size)
    return disk


def test_below_the_high_mark_nothing_is_removed(new_room):
    disk = a_disk(used=850)
    room = new_room(disk)

    assert not room.is_needed()
    assert clear(room) == 1
    assert disk.gone == []


def test_above_it_the_longest_unused_goes_until_the_low_mark_is_reached(new_room):
    disk = a_disk(used=900)
    room = new_room(disk)

    assert room.is_needed()
    clear(room)

    assert disk.gone == ["thing-0", "thing-1", "thing-2"]
    assert disk.used == 750


def test_it_goes_on_to_the_low_mark_when_less_was_set_free_than_promised(new_room):
    disk = a_disk(used=900)
    disk.pays = 0.5
    room = new_room(disk)

    clear(room)

    assert disk.used <= 750


def test_between_the_marks_it_begins_nothing(new_room):
    disk = a_disk(used=900)
    room = new_room(disk)
    clear(room)
    disk.used = 820

    clear(room)

    assert disk.used == 820


def test_what_came_into_use_meanwhile_stays(new_room):
    disk = a_disk(used=900)
    disk.in_use = {"thing-0", "thing-2"}

    clear(new_room(disk))

    assert disk.gone == ["thing-1", "thing-3", "thing-4"]


def test_too_little_of_the_reserve_makes_room_whatever_the_marks_say(new_room):
    disk = a_disk(used=840)
    room = new_room(disk, marks=Marks(100, 100, reserve_bytes=200))

    clear(room)

    assert disk.used == 790


def test_where_nothing_can_go_it_says_so_once_and_rests(new_room, capsys):
    disk = a_disk(used=990, things=0)
    room = new_room(disk)

    assert clear(room) == 1
    assert clear(room) == 1

    assert capsys.readouterr().out.count("no_room_can_be_made") == 1
    assert not room.is_needed()
    disk.put("late", 1.0, 300)
    clear(room)
    assert disk.gone == ["late"]


def test_each_disk_is_judged_by_itself(new_room):
    full, empty = a_disk(used=900), a_disk(used=100)
    empty.device = 2

    clear(new_room(full, empty))

    assert full.gone and not empty.gone


def test_two_folders_of_one_disk_give_by_the_age_of_what_they_hold(new_room):
    first, second = a_disk(used=900, things=3), a_disk(used=900, things=3)
    second.things = {f"other-{name}": (used + 0.5, size) for name, (used, size) in second.things.items()}
    first.look = second.look = lambda _folder: Space(1, 900 - 50 * len(first.gone + second.gone), 100)
    room = new_room(first, second)

    room.clear()

    assert (first.gone, second.gone) == (["thing-0", "thing-1"], ["other-thing-0"])


def test_an_order_that_a_store_wants_is_kept():
    def fair():
        yield Spare("cache", "young-of-a-flood", 9.0, 1, bool)
        yield Spare("cache", "old", 1.0, 1, bool)

    def others():
        yield Spare("image", "middle", 5.0, 1, bool)

    names = [spare.name for spare in longest_unused_first([fair, others])]

    assert names == ["middle", "young-of-a-flood", "old"]


def test_every_removal_is_said_with_its_bytes(new_room, capsys):
    clear(new_room(a_disk(used=900)))

    said = [line for line in capsys.readouterr().out.splitlines() if "removed_for_room" in line]
    assert len(said) == 3
    assert all("50" in line for line in said)


def test_a_round_removes_a_bounded_number(new_room, monkeypatch):
    monkeypatch.setattr("runner.room.MOST_AT_ONCE", 2)
    disk = a_disk(used=900)
    room = new_room(disk)

    assert not room.clear()

    assert len(disk.gone) == 2
    clear(room)
    assert disk.used == 750


def test_a_disk_is_seen_as_its_users_see_it(tmp_path):
    seen = look_at(tmp_path)

    assert seen.device == tmp_path.stat().st_dev
    assert 0 < seen.free < seen.total
