"""Who computes, where many clients share a process: so many at a time, and who has waited longest is next.

Each is a thread that runs as if it were alone. Within `Workers.turn` it has a permit; within `waiting` it
has given it up, for others to compute meanwhile. A thread without a turn (a client's that is alone, gRPC's)
waits as ever. It knows neither clients nor networks.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.meter import Clock

_here = threading.local()  # .turn: of this thread, while it holds a permit


class Workers:
    """count: permits, at least 1. With a single one each thread has torch's source of chance to itself: what
    it draws (dropout) is what it would draw alone in its process."""

    def __init__(self, count: int) -> None:
        assert count > 0, count
        self.one = count == 1
        self._free = count
        self._queue = deque[threading.Event]()  # of those that wait, the first to be served first
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """This thread's work, from its first permit to its last."""
        _here.turn = turn = _Turn(self)
        turn.begin()
        try:
            yield
        finally:
            _here.turn = None
            turn.end()

    @property
    def waiting(self) -> int:
        """How many threads wait for a permit."""
        with self._lock:
            return len(self._queue)

    def take(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            called = threading.Event()
            self._queue.append(called)
        called.wait()

    def give(self) -> None:
        """To who has waited longest, so nobody who comes meanwhile is faster."""
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1


@contextmanager
def waiting(clock: Clock) -> Iterator[None]:
    """Within it others compute. What it takes until this thread may again is waiting, too, on its clock."""
    turn: _Turn | None = getattr(_here, "turn", None)
    if turn is None:
        yield
        return
    _here.turn = None  # what waits within this waits as ever
    turn.end()
    try:
        yield
    finally:
        with clock("wait"):
            turn.begin()
        _here.turn = turn


class _Turn:
    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._chance: torch.Tensor | None = None

    def begin(self) -> None:
        self._workers.take()
        if self._chance is not None:
            torch.set_rng_state(self._chance)

    def end(self) -> None:
        if self._workers.one:
            self._chance = torch.get_rng_state()
        self._workers.give()
