"""Checkpoints are asked for, taken between two steps, written meanwhile; who needs one waits for it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import disk
from common.checkpoint import Checkpoints, Saved
from common.errors import ClosedError, ConfigError
from dsl_server.saver import Saver, Unsaved
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

OVER = ClosedError("the run is over because the test says so")


def void(_: object) -> None:
    """Of what nobody waits for."""


class Disk(Checkpoints):
    """One that can be told to wait, and to have no room."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, on_disk=False)
        self.free = threading.Event()
        self.free.set()
        self.writing = threading.Event()
        self.trouble: OSError | None = None

    def write(self, saved: Saved) -> None:
        self.writing.set()
        assert self.free.wait(30)
        if self.trouble:
            raise self.trouble
        super().write(saved)


class Bench:
    """A saver, what it was told, and a state that counts."""

    def __init__(self, folder: Path, keep: int = 3, every: float = 1000.0) -> None:
        self.disk = Disk(folder)
        self.value, self.asked = 0, 0
        self.saved: list[list[int]] = []
        self.troubles: list[str | None] = []
        self.on_ask: Callable[[], None] = lambda: None
        self.saver = Saver(
            self.disk,
            keep,
            every,
            self._ask,
            lambda: ({"value": torch.tensor(self.value)}, {"value": self.value}),
            lambda kept: self.saved.append([facts["value"] for facts in kept]),
            self.troubles.append,
        )

    def _ask(self) -> None:
        self.asked += 1
        self.on_ask()

    def at_once(self) -> "Bench":
        """A trainer that has always time: what is asked for is taken, by a thread of its own."""
        self.on_ask = lambda: void(in_thread(self.saver.take))
        return self


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    made = Bench(tmp_path)
    made.saver.start([])
    yield made
    made.saver.close(OVER)


def test_who_commits_waits_until_what_was_so_is_on_disk(bench: Bench) -> None:
    bench.value = 7
    committing = in_thread(bench.saver.commit)
    wait_for(lambda: bench.asked == 1)
    assert waits(committing), "the trainer is in the middle of a step"
    bench.disk.free.clear()
    bench.saver.take()
    assert waits(committing), "it is being written"
    bench.value = 8
    bench.disk.free.set()
    assert committing.result(timeout=5) is None
    saved = bench.disk.read(1)
    assert (saved.tensors["value"].item(), saved.facts) == (7, {"value": 7})
    assert bench.saved == [[7]]


def test_who_comes_while_one_is_written_waits_for_the_next_and_shares_it(bench: Bench) -> None:
    bench.disk.free.clear()
    first = in_thread(bench.saver.commit)
    wait_for(lambda: bench.asked == 1)
    bench.saver.take()
    assert bench.disk.writing.wait(5)
    bench.value = 1
    later = [in_thread(bench.saver.commit) for _ in range(3)]
    wait_for(lambda: bench.asked == 4)
    bench.saver.take()  # for nothing: one is under way
    bench.disk.free.set()
    assert first.result(timeout=5) is None
    wait_for(lambda: bench.asked == 5)  # once more, for the three
    assert all(waits(each, 0.02) for each in later)
    bench.saver.take()
    assert [each.result(timeout=5) for each in later] == [None] * 3
    assert bench.disk.numbers() == [1, 2]
    assert bench.saved == [[0], [0, 1]]


def test_only_the_last_ones_are_kept_and_their_facts_told_the_oldest_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=2).at_once()
    bench.saver.start([])
    for bench.value in range(4):
        bench.saver.commit()
    assert bench.disk.numbers() == [3, 4]
    assert bench.saved == [[0], [0, 1], [1, 2], [2, 3]]
    bench.saver.close(OVER)


def test_after_a_resume_the_numbers_go_on_and_those_before_count_among_the_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=3).at_once()
    for number in (4, 7):
        bench.disk.write(Saved(number, {}, {"value": -number}))
    bench.saver.start([bench.disk.read(4), bench.disk.read(7)])
    for bench.value in (1, 2):
        bench.saver.commit()
    assert bench.saved == [[-4, -7, 1], [-7, 1, 2]]
    assert bench.disk.numbers() == [7, 8, 9]
    bench.saver.close(OVER)


def test_a_full_disk_is_told_and_tried_again_until_there_is_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RETRY_S", 0.01)
    bench.at_once()
    bench.saver.commit()
    bench.disk.trouble = OSError(28, "No space left on device")
    committing = in_thread(bench.saver.commit)
    wait_for(lambda: bool(bench.troubles))
    assert waits(committing, 0.05)
    assert bench.troubles == ["No space left on device; free some space"], "once, however often it is tried"
    assert bench.disk.numbers() == [1], "the one before is whole"
    bench.disk.trouble = None
    assert committing.result(timeout=5) is None
    assert bench.troubles[1:] == [None]
    assert bench.disk.numbers() == [1, 2]


def test_an_old_one_that_cannot_be_removed_is_no_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(keep: Any) -> None:
        raise OSError(5, "Input/output error")

    bench.at_once()
    monkeypatch.setattr(bench.disk, "drop", refuse)
    for _ in range(2):
        assert in_thread(bench.saver.commit).result(timeout=5) is None


def test_the_end_wakes_who_waits_with_the_reason(bench: Bench) -> None:
    committing = in_thread(bench.saver.commit)
    wait_for(lambda: bench.asked == 1)
    bench.saver.close(OVER)
    bench.saver.close(ClosedError("later"))
    assert committing.exception(timeout=5) is OVER
    assert in_thread(bench.saver.commit).exception(timeout=5) is OVER
    bench.saver.take()
    assert bench.disk.numbers() == []


def test_the_end_wakes_who_waits_for_a_full_disk(bench: Bench) -> None:
    bench.at_once()
    bench.disk.trouble = OSError(28, "No space left on device")
    committing = in_thread(bench.saver.commit)
    wait_for(lambda: bool(bench.troubles))
    bench.saver.close(OVER)
    assert committing.exception(timeout=5) is OVER
    assert bench.disk.numbers() == []


def test_what_was_taken_before_the_end_is_still_written(bench: Bench) -> None:
    bench.disk.free.clear()
    bench.saver.request()
    bench.saver.take()
    assert bench.disk.writing.wait(5)
    bench.saver.close(OVER)
    bench.disk.free.set()
    wait_for(lambda: bench.disk.numbers() == [1])


def test_now_and_then_one_is_asked_for_if_something_has_happened(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=0.01)
    bench.saver.start([])
    asked = in_thread(wait_for, lambda: bench.asked > 0)
    assert waits(asked), "nothing has happened"
    bench.saver.stir()
    assert asked.result(timeout=20) is None
    bench.saver.close(OVER)


def test_without_checkpoints_nobody_waits() -> None:
    unsaved = Unsaved()
    for does in (unsaved.commit, unsaved.request, unsaved.take, unsaved.stir):
        does()
    unsaved.close(OVER)


def test_the_state_is_that_of_the_step_and_not_of_the_time_when_it_is_written(bench: Bench) -> None:
    """What is captured is the capturer's copy; the saver reads it once more only on its way to the disk."""
    bench.at_once()
    bench.value = 3
    bench.saver.commit()
    bench.value = 4
    assert bench.disk.read(1).facts == {"value": 3}
    with pytest.raises(ConfigError):
        bench.disk.read(2)
