"""What a client remembers: in memory or in a folder, killed at any instant, and whatever is damaged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, RefusedError
from common.rundir import Held
from dsl_client import memory as module
from dsl_client.memory import Memory, Snapshot
from tests.frames import frame, stretch_of

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process lets go of its folder when it ends; the tests' goes on."""
    held: list[Held] = []

    class Listed(Held):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            held.append(self)

    monkeypatch.setattr(module, "Held", Listed)
    yield
    for each in held:
        each.release()


@pytest.fixture(params=["memory", "disk"])
def folder(request: Any, tmp_path: Path) -> Path | None:
    return tmp_path / "state" if request.param == "disk" else None


def snapshot(sequence: int, waypoint: bool = True) -> Snapshot:
    return Snapshot(sequence, {"w": torch.tensor([float(sequence)])}, {"batch": sequence}, waypoint)


def recalled(memory: Memory, sequence: int | None = None) -> int | None:
    """The number that the state found is of; it is whole."""
    found = memory.recalled(sequence)
    if found is None:
        return None
    assert found.tensors["w"].item() == found.sequence == found.facts["batch"]
    return found.sequence


def another_process(memory: Memory, folder: Path, damages: list[str] | None = None) -> Memory:
    """The next one, when this one has died."""
    memory._held.release()
    return Memory(folder, (damages if damages is not None else []).append)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "snapshots").iterdir())


def damage(folder: Path, number: int) -> None:
    file = folder / "snapshots" / f"{number:08}" / "part.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


# ---------------------------------------------------------------- who it is


def test_each_memory_is_another_client_and_a_folder_is_always_the_same(tmp_path: Path) -> None:
    first, second = Memory(), Memory()
    assert first.identity != second.identity
    assert (len(first.identity), first.lasting) == (32, False)
    memory = Memory(tmp_path)
    memory.belongs_to("run-1")
    memory.throw_away(5)
    after = another_process(memory, tmp_path)
    assert (after.identity, after.run_id, after.durable) == (memory.identity, "run-1", 5)
    assert after.lasting


def test_the_identity_is_for_its_owner_only(tmp_path: Path) -> None:
    Memory(tmp_path).belongs_to("run-1")
    assert (tmp_path / "client.json").stat().st_mode & 0o777 == 0o600


def test_what_is_in_the_middle_of_one_run_does_not_go_to_another(folder: Path | None) -> None:
    memory = Memory(folder)
    memory.belongs_to("run-1")
    memory.belongs_to("run-1")
    with pytest.raises(RefusedError, match="the server has run run-2; this client is in the middle of run-1"):
        memory.belongs_to("run-2")
    assert memory.run_id == "run-1"


def test_a_folder_is_one_processs_at_a_time(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    with pytest.raises(ConfigError, match=r"--state .*another process goes on with it"):
        Memory(tmp_path)
    another_process(memory, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": "a", "run_id": "", "durable": "x"}'])
def test_a_folder_whose_client_cannot_be_read_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text(content)
    with pytest.raises(ConfigError, match=r"--state .*client\.json cannot be read"):
        Memory(tmp_path)


# ---------------------------------------------------------------- what it throws away


def test_it_throws_away_what_is_told_once_and_never_takes_it_back(folder: Path | None) -> None:
    memory = Memory(folder)
    spool = memory.spool(10**6)
    for sequence in (1, 2, 3, 4):
        spool.append(stretch_of((sequence - 1) // 3), frame(sequence))
    memory.throw_away(3)
    memory.throw_away(2)
    assert memory.durable == 3
    found = spool.after(0)
    assert found is not None
    assert found.first == 4


def test_what_it_has_thrown_away_is_written_down_before_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, it must not promise what it has no more."""
    memory = Memory(tmp_path)
    spool = memory.spool(10**6)
    spool.append(stretch_of(0), frame(1))
    written: list[int] = []
    trim = spool.trim

    def spied(sequence: int) -> None:
        written.append(json.loads((tmp_path / "client.json").read_text())["durable"])
        trim(sequence)

    monkeypatch.setattr(spool, "trim", spied)
    memory.throw_away(1)
    assert written == [1]


def test_killed_between_the_two_it_has_more_than_it_needs_and_goes_on(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    spool = memory.spool(10**6)
    for sequence in (1, 2):
        spool.append(stretch_of(0), frame(sequence))
    memory._spool = None  # so that nothing is removed
    memory.throw_away(2)
    after = another_process(memory, tmp_path)
    spool = after.spool(10**6)
    assert spool.last == 2
    assert spool.append(stretch_of(0), frame(3))


# ---------------------------------------------------------------- where it was


def test_a_new_client_was_nowhere(folder: Path | None) -> None:
    assert recalled(Memory(folder)) is None


def test_who_need_not_go_back_keeps_the_last_two(folder: Path | None) -> None:
    memory = Memory(folder)
    for sequence in (0, 3, 6, 9):
        memory.keep(snapshot(sequence), goes_back=False)
    assert recalled(memory) == 9
    assert [recalled(memory, sequence) for sequence in (3, 6, 9)] == [None, 6, 9]
    if folder:
        assert kept(folder) == [3, 4]


def test_who_may_have_to_go_back_keeps_waypoints_and_of_the_rest_the_newest(folder: Path | None) -> None:
    memory = Memory(folder)
    for sequence in range(6):
        memory.keep(snapshot(sequence, waypoint=sequence % 2 == 0), goes_back=True)
    found = [recalled(memory, sequence) for sequence in range(6)]
    assert found == [0, None, 2, None, 4, 5]


def test_waypoints_go_when_no_checkpoint_can_ask_for_them_and_the_newest_state_stays(
    folder: Path | None,
) -> None:
    memory = Memory(folder)
    for sequence in (0, 2, 4):
        memory.keep(snapshot(sequence), goes_back=True)
    memory.throw_away(2)
    assert [recalled(memory, sequence) for sequence in (0, 2, 4)] == [None, 2, 4]
    memory.throw_away(9)
    assert [recalled(memory, sequence) for sequence in (2, 4)] == [None, 4]


def test_who_goes_back_forgets_what_came_later(folder: Path | None) -> None:
    memory = Memory(folder)
    for sequence in (0, 2, 4):
        memory.keep(snapshot(sequence), goes_back=True)
    there = memory.recalled(2)
    assert there is not None
    memory.forget_after(there)
    assert recalled(memory) == 2
    assert recalled(memory, 4) is None
    memory.keep(snapshot(4), goes_back=True)
    assert recalled(memory) == 4


def test_the_next_process_is_where_the_one_before_was(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for sequence in (0, 2, 3):
        memory.keep(snapshot(sequence, waypoint=sequence != 3), goes_back=True)
    after = another_process(memory, tmp_path)
    assert [recalled(after, sequence) for sequence in (None, 0, 2, 3)] == [3, 0, 2, 3]
    after.keep(snapshot(4), goes_back=True)
    assert [recalled(after, sequence) for sequence in (None, 0, 2, 3)] == [4, 0, 2, None], "3 was no waypoint"
    assert kept(tmp_path) == [1, 2, 4]


def test_after_a_restart_the_newest_of_those_before_stays_as_the_second(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for sequence in (0, 3):
        memory.keep(snapshot(sequence), goes_back=False)
    after = another_process(memory, tmp_path)
    after.keep(snapshot(6), goes_back=False)
    assert [recalled(after, sequence) for sequence in (0, 3, 6)] == [None, 3, 6]


def test_a_damaged_state_is_told_of_loudly_and_the_one_before_is_used(tmp_path: Path) -> None:
    memory, damages = Memory(tmp_path), list[str]()
    for sequence in (0, 3):
        memory.keep(snapshot(sequence), goes_back=False)
    damage(tmp_path, 2)
    after = another_process(memory, tmp_path, damages)
    assert recalled(after) == 0
    assert len(damages) == 1
    assert "is damaged" in damages[0]
    assert "the one before is used" in damages[0]


def test_a_state_that_is_damaged_while_the_process_lives_is_passed_over_too(tmp_path: Path) -> None:
    damages: list[str] = []
    memory = Memory(tmp_path, damages.append)
    for sequence in (0, 3):
        memory.keep(snapshot(sequence), goes_back=False)
    damage(tmp_path, 2)
    assert recalled(memory) == 0
    assert len(damages) == 1


def test_the_only_state_that_can_be_read_is_not_thrown_away(tmp_path: Path) -> None:
    memory, damages = Memory(tmp_path), list[str]()
    for sequence in (0, 3):
        memory.keep(snapshot(sequence), goes_back=False)
    damage(tmp_path, 2)
    after = another_process(memory, tmp_path, damages)
    after.throw_away(2)
    assert recalled(after) == 0


def test_of_a_damaged_state_nothing_stays_for_ever(tmp_path: Path) -> None:
    memory, damages = Memory(tmp_path), list[str]()
    for sequence in (0, 3):
        memory.keep(snapshot(sequence), goes_back=False)
    damage(tmp_path, 2)
    after = another_process(memory, tmp_path, damages)
    for sequence in (3, 6):
        after.keep(snapshot(sequence), goes_back=False)
    assert kept(tmp_path) == [3, 4]


def test_a_state_that_was_being_written_when_its_process_died_is_nothing(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep(snapshot(3), goes_back=False)
    (tmp_path / "snapshots" / ".2.tmp").mkdir()
    after = another_process(memory, tmp_path)
    assert recalled(after) == 3
    assert kept(tmp_path) == [1]
