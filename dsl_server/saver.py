"""The server's checkpoints: asked for by whoever must not go on without one, taken by the trainer's thread
between two steps, written by a thread of their own. Whoever asks meanwhile shares the next one.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from common.checkpoint import Checkpoints, Saved
from common.disk import until_written
from common.errors import ClosedError
from common.parts import State

Captured = tuple[State, dict[str, Any]]


class Saver:
    """ask: has the trainer call `take` as soon as it can. capture: the state, called by the trainer.

    every: seconds from one checkpoint to the next, as long as something happens. on_saved: given the facts of
    all that are kept, the oldest first. on_trouble: why the disk will not have one, or None once it has one
    again.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: int,
        every: float,
        ask: Callable[[], None],
        capture: Callable[[], Captured],
        on_saved: Callable[[list[dict[str, Any]]], None],
        on_trouble: Callable[[str | None], None],
    ) -> None:
        self._checkpoints, self._keep, self._every = checkpoints, keep, every
        self._ask, self._capture, self._on_saved, self._on_trouble = ask, capture, on_saved, on_trouble
        self._kept: list[Saved] = []
        self._asked = self._taken = self._written = 0  # counted: who asks waits until its number is written
        self._waiting: Captured | None = None
        self._stirred = False
        self._over: ClosedError | None = None
        self._changed = threading.Condition()
        self._number = 0

    def start(self, before: list[Saved]) -> None:
        """before: the checkpoints that there are, the oldest first."""
        self._kept = before[-self._keep :]
        self._number = max([saved.number for saved in before], default=0)
        for body in (self._write, self._remind):
            threading.Thread(target=body, name=f"saver{body.__name__}", daemon=True).start()

    def stir(self) -> None:
        """Something has happened that the next checkpoint is to have."""
        self._stirred = True

    def request(self) -> None:
        """A checkpoint is due; nobody waits for it."""
        with self._changed:
            self._asked += 1
        self._ask()

    def commit(self) -> None:
        """Waits until a checkpoint is on disk that has all that was so before. Raises why there is none."""
        with self._changed:
            self._asked += 1
            mine = self._asked
        self._ask()
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._written >= mine)
            if self._written < mine and self._over:
                raise self._over

    def take(self) -> None:
        """By the trainer: the state as it is now. Not while the one before is being written: then it is asked
        for once more."""
        with self._changed:
            if self._over or self._waiting is not None:
                return
            self._taken, self._stirred = self._asked, False
        captured = self._capture()
        with self._changed:
            self._waiting = captured
            self._changed.notify_all()

    @property
    def is_free(self) -> bool:
        """Whether none is being written."""
        with self._changed:
            return self._waiting is None

    def close(self, reason: ClosedError) -> None:
        with self._changed:
            self._over = self._over or reason
            self._changed.notify_all()

    def _remind(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over, min(self._every, threading.TIMEOUT_MAX))
                if self._over:
                    return
            if self._stirred:
                self.request()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._waiting)
                if self._waiting is None:
                    return
                (tensors, facts), taken = self._waiting, self._taken
            self._number += 1
            saved = Saved(self._number, {n: t.detach().cpu() for n, t in tensors.items()}, facts)
            if not self._written_down(saved):
                return
            with self._changed:
                self._waiting, self._written = None, taken
                more = self._asked > taken
                self._changed.notify_all()
            if more:
                self._ask()

    def _written_down(self, saved: Saved) -> bool:
        """As often as it takes; False when nobody wants it any more."""
        if not until_written(partial(self._checkpoints.write, saved), self._on_trouble, self._given_up):
            return False
        facts = Saved(saved.number, {}, saved.facts)  # the tensors are on disk
        self._kept = [*self._kept, facts][-self._keep :]
        kept = {known.number for known in self._kept}
        with suppress(OSError):  # one that stays takes room, and the next time it is tried again
            self._checkpoints.drop(keep=lambda number: number in kept or number > saved.number)
        self._on_saved([dict(known.facts) for known in self._kept])
        return True

    def _given_up(self, seconds: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._over, seconds))


class Unsaved:
    """Of a run without checkpoints: nothing is asked for, and nobody waits."""

    def start(self, before: list[Saved]) -> None: ...

    def stir(self) -> None: ...

    def request(self) -> None: ...

    def commit(self) -> None: ...

    def take(self) -> None: ...

    def close(self, reason: ClosedError) -> None: ...


class Follower:
    """Of a rank whose checkpoints the first one writes, for all at once.

    hand_over: gives the first rank what the checkpoint is to have of this one; called by the trainer.
    """

    def __init__(self, hand_over: Callable[[], None]) -> None:
        self._hand_over = hand_over
        self._asked = self._taken = self._written = 0  # as the saver's
        self._number = 0  # of checkpoints handed over
        self._asked_by: dict[int, int] = {}  # the number of one that is not on disk yet: what it covers
        self._over: ClosedError | None = None
        self._changed = threading.Condition()

    @property
    def is_due(self) -> bool:
        """Whether somebody has asked for one since the last."""
        with self._changed:
            return self._asked > self._taken

    def start(self, before: list[Saved]) -> None: ...

    def stir(self) -> None: ...

    def request(self) -> None:
        with self._changed:
            self._asked += 1

    def commit(self) -> None:
        """As the saver's."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.wait_for(lambda: self._over or self._written >= mine)
            if self._written < mine and self._over:
                raise self._over

    def take(self) -> None:
        with self._changed:
            self._number += 1
            self._taken = self._asked_by[self._number] = self._asked
        self._hand_over()

    def written(self, number: int) -> None:
        """The checkpoint of this number is on disk, and those before it."""
        with self._changed:
            covered = [asked for taken, asked in self._asked_by.items() if taken <= number]
            self._asked_by = {taken: asked for taken, asked in self._asked_by.items() if taken > number}
            self._written = max([self._written, *covered])
            self._changed.notify_all()

    def close(self, reason: ClosedError) -> None:
        with self._changed:
            self._over = self._over or reason
            self._changed.notify_all()


Keeper = Saver | Follower | Unsaved
