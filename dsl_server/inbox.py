"""The server's queue: batches go in from many streams, groups come out to one trainer.

Each client has a lane, bounded: a stream whose lane is full waits, gRPC's flow control passes the
wait on to that client, and so the slowest part of the system sets its pace while memory stays flat.

How the lanes are served:

* as they come: one batch from each lane that has any, round and round, so that no client is
  starved by another;
* in fixed order: a tick waits until every lane that is still in the epoch has something, then takes
  one batch from each, by client index. The order depends on the data alone, so runs repeat.
  Errands are done between epochs, after the end of the round is told. Where there is a `timeout`, a tick
  that holds batches up for longer goes on without those it waits for, as long as the others make the
  quorum: their batches join a later one.

What is taken from the lanes at a time makes one group with `gather=ALL`; else groups of `together` batches.

A checkpoint is made between ticks, when it is asked for. Where clients can go back to certain batches only
(`in_step`), it waits until what was served last of each is one of these; meanwhile who is there waits.

    lane 0  | b b b End |b b b End          tick 1: 0 1 2   tick 2: 0 1 2   tick 3: 0 2
    lane 1  | b b End ·  ·|b b End                                          (1 waits for the epoch's end)
    lane 2  | b b b End |b b b End
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.errors import ClosedError
from common.methods.base import Gather
from common.methods.hosting import Hosting
from common.wire.codec import Arrived
from dsl_server.ledger import Mark


@dataclass(frozen=True)
class Trained:
    """What the trainer answers a batch with: dL/dz if the method has one, and the loss if it knows it."""

    gradient: Tensor | None
    loss: float | None


class ThroughTail:
    """How one batch goes through the last layers, which its client has: output there, gradient back.

    The trainer calls it with the output and waits. Who serves the client takes the one and gives the
    other. Whichever side fails, the other is told.
    """

    def __init__(self) -> None:
        self.output: Future[Tensor] = Future()
        self.gradient: Future[Tensor] = Future()

    def __call__(self, output: Tensor) -> Tensor:
        with suppress(InvalidStateError):  # it has failed: the client has gone
            self.output.set_result(output)
        return self.gradient.result()

    def give(self, gradient: Tensor) -> None:
        """The gradient, of the output's shape. Raises why nobody waits for it any more."""
        with suppress(InvalidStateError):
            self.gradient.set_result(gradient)
        self.gradient.result()

    def fail(self, error: BaseException) -> None:
        for side in (self.output, self.gradient):
            with suppress(InvalidStateError):  # it is done, or another thread was faster
                side.set_exception(error)


@dataclass(frozen=True)
class Job:
    """One client's batch to train on, and the place where its answer will appear.

    progress: the fraction of the run that lies before it, which sets the learning rate. wanted: the
    client waits for its gradient. mark: how far its client has come with it. waypoint: the client can come
    back to where it is after this one.
    """

    client: int
    batch: Arrived
    progress: float
    wanted: bool = True
    mark: Mark = field(default_factory=Mark)
    waypoint: bool = True
    answer: Future[Trained] = field(default_factory=Future)
    through_tail: ThroughTail = field(default_factory=ThroughTail)

    @property
    def sequence(self) -> int:
        return self.batch.sequence


@dataclass(frozen=True)
class Errand:
    """Something else that the trainer is to do for a client: score a batch, make a head.

    The model has one thread; whoever wants something of it asks here.
    """

    client: int
    what: str  # for who reads why it failed
    do: Callable[[Hosting], Any]
    answer: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True)
class EpochEnd:
    """No more batches from this client in this epoch."""

    client: int
    mark: Mark = field(default_factory=Mark)


@dataclass(frozen=True)
class RoundEnd:
    """Every client has come to the end of the epoch, and none has begun the next."""


@dataclass(frozen=True)
class Save:
    """Time for a checkpoint: all that was served has been learned of, and nothing else."""


@dataclass(frozen=True)
class Spare:
    """Nothing waits: time for what the trainer has of its own to do."""


Item = Job | Errand | EpochEnd
Work = Sequence[Job] | Errand | RoundEnd | Save | Spare


class Inbox:
    """timeout: seconds for which a tick may wait for a client, counted once all have joined; 0: no end.

    can_spare: whether the trainer has something of its own to do when nothing waits, which it tells as often
    as that is so; asked only where batches are served as they come. in_step: clients come back to waypoints
    only. on_epoch_end: told of each that is taken. places: the clients whose batches come here, if not all.
    """

    def __init__(
        self,
        clients: int,
        depth: int,
        fixed_order: bool,
        gather: Gather = Gather.EACH,
        timeout: float = 0.0,
        quorum: int = 1,
        can_spare: Callable[[], bool] = lambda: False,
        in_step: bool = False,
        on_epoch_end: Callable[[EpochEnd], None] = lambda _: None,
        together: int = 1,
        places: Sequence[int] | None = None,
    ) -> None:
        mine = range(clients) if places is None else places
        self._can_spare, self._in_step, self._on_epoch_end = can_spare, in_step, on_epoch_end
        self._save_due = False
        self._owed: int | None = None  # who is to send once more what the tick goes on with
        self._astray: set[int] = set()  # those whose batch that was served last is no waypoint
        self._lanes: list[deque[Item]] = [deque() for _ in range(clients)]
        self._tick: deque[Work] = deque()  # taken from the lanes, not yet served
        self._served: Work = ()  # what was given last
        self._to_join = set(mine)
        self._members = set(mine)  # those that have not left and are not lost
        self._lost: dict[int, ClosedError] = {}  # client to reason
        self._in_epoch = set(mine)  # those that have batches left, in fixed order
        self._depth = depth
        self._fixed_order = fixed_order
        self._gather, self._together = gather, together
        self._timeout = min(timeout, threading.TIMEOUT_MAX)
        self._quorum = quorum
        self._closed: ClosedError | None = None
        self._filled: set[int] = set()  # those whose lane has something
        # One lock; the trainer waits on the one condition, who fills a lane on that lane's: else each batch
        # would wake everyone.
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._room = [threading.Condition(lock) for _ in range(clients)]

    def join(self, client: int) -> None:
        """The client is there; what it has to send may still take it a while."""
        with self._changed:
            self._to_join.discard(client)
            self._changed.notify_all()

    def resume(self, gone: Collection[int], ended: Collection[int]) -> None:
        """Goes on after a checkpoint: without those clients, and with these at the end of their epoch."""
        with self._changed:
            self._members -= set(gone)
            self._in_epoch -= {*gone, *ended}

    def ask_save(self) -> None:
        """A checkpoint is due, as soon as one can be made."""
        with self._changed:
            self._save_due = True
            self._changed.notify_all()

    def saved(self) -> None:
        """A checkpoint has been made: none is due any more."""
        with self._changed:
            self._save_due = False
            self._changed.notify_all()

    def put(self, item: Item) -> None:
        """Adds to the client's lane; waits while it is full. Raises why the inbox or the lane is closed."""
        lane = self._lanes[item.client]

        def over() -> ClosedError | None:
            return self._closed or self._lost.get(item.client)

        with self._changed:
            self._room[item.client].wait_for(lambda: over() or len(lane) < self._depth)
            if reason := over():
                raise reason
            lane.append(item)
            self._filled.add(item.client)
            self._changed.notify_all()

    def _taken(self, client: int) -> Item:
        """What comes next in this client's lane. Who waits for room in it is told when the trainer is given
        what was taken: a tick's clients would all at once be in the trainer's way at the lock."""
        lane = self._lanes[client]
        item = lane.popleft()
        if not lane:
            self._filled.discard(client)
        if isinstance(item, EpochEnd):
            self._room[client].notify_all()
        return item

    def owe(self, client: int) -> None:
        """What was given last of this client could not be learned from, for it went away: it may come back
        with it. In fixed order nothing is served before that."""
        with self._changed:
            self._astray.add(client)
            if self._fixed_order:
                self._owed = client

    def waiting(self) -> list[int]:
        """How many batches of each client lie here."""
        with self._changed:
            items = [item for lane in self._lanes for item in lane]
            items += [item for work in self._tick for item in answered(work)]
        counted = Counter(item.client for item in items if isinstance(item, Job))
        return [counted[client] for client in range(len(self._lanes))]

    def leave(self, client: int) -> None:
        """The client has nothing more to send; what it sent is still served."""
        with self._changed:
            self._members.discard(client)
            self._changed.notify_all()

    def lose(self, client: int, reason: ClosedError) -> None:
        """The client is gone: what lies in its lane is dropped, and who waits for an answer told why."""
        with self._changed:
            self._lost[client] = reason
            self._members.discard(client)
            left = list(self._lanes[client])
            self._lanes[client].clear()
            self._filled.discard(client)
            self._room[client].notify_all()
            taken = [item for work in (self._served, *self._tick) for item in answered(work)]
            self._changed.notify_all()
        _fail(left, reason)
        _end_waits([item for item in taken if item.client == client], reason)

    def close(self, reason: ClosedError) -> None:
        """Wakes everyone: `put` raises the reason from now on, and so does every waiting answer."""
        with self._changed:
            self._closed = self._closed or reason
            left = [item for lane in self._lanes for item in lane]
            left += [item for work in self._tick for item in answered(work)]
            served = answered(self._served)
            self._tick.clear()
            for lane, room in zip(self._lanes, self._room, strict=True):
                lane.clear()
                room.notify_all()
            self._filled.clear()
            self._changed.notify_all()
        _fail(left, self._closed)
        _end_waits(served, self._closed)

    def __iter__(self) -> Iterator[Work]:
        """Groups to train on and errands, until every member has left or it is closed.

        Raises ClosedError when a tick has waited for too long and too few are there to go on.
        """
        while (work := self._next()) is not None:
            yield work

    def take(self, timeout: float) -> Work | None:
        """What comes next, as iterating gives it, and None at the end; `Spare` where nothing has come within
        so many seconds."""
        return self._next(time.monotonic() + timeout)

    @property
    def closed(self) -> ClosedError | None:
        """Why it is closed, if it is."""
        return self._closed

    def _next(self, until: float | None = None) -> Work | None:
        """until: a moment, by the monotonic clock, after which there is nothing more to wait for."""
        with self._changed:
            self._wait_for_owed()
            while not self._tick:
                if self._can_save():
                    self._save_due, self._served = False, Save()
                    return self._served
                if not (self._fixed_order or self._ready()) and self._can_spare():
                    self._served = Spare()
                    return self._served
                if until is None:
                    self._wait()
                elif not self._changed.wait_for(
                    lambda: self._ready() or self._can_save(), max(0.0, until - time.monotonic())
                ):
                    self._served = Spare()
                    return self._served
                if self._can_save():
                    continue
                if self._closed or not self._active():
                    return None
                self._tick.extend(self._in_order() if self._fixed_order else self._as_they_come())
            self._served = self._tick.popleft()
            for item in answered(self._served):
                self._room[item.client].notify_all()
                if isinstance(item, Job):
                    (self._astray.discard if item.waypoint else self._astray.add)(item.client)
            return self._served

    def _wait_for_owed(self) -> None:
        """Until it is there, and next in the tick; or will not come any more."""
        if (client := self._owed) is None:
            return
        lane, self._owed = self._lanes[client], None
        self._changed.wait_for(lambda: self._closed or client not in self._members or lane)
        if lane and isinstance(job := lane[0], Job):
            self._taken(client)
            self._tick.appendleft([job])

    def _wait(self) -> None:
        """Until there is something to take: a whole tick, or what is there of it when its time is up."""

        def over() -> bool:
            return self._ready() or self._can_save()

        while not over():
            if not self._holds_up():
                self._changed.wait()
            elif not self._changed.wait_for(lambda: over() or not self._holds_up(), self._timeout):
                self._check_quorum()
                return

    def _can_save(self) -> bool:
        return self._save_due and not self._closed and not self._held()

    def _held(self) -> bool:
        """Whether a checkpoint that is due must wait for some of those that are here."""
        return self._in_step and bool(self._astray & self._members)

    def _holds_up(self) -> bool:
        """Whether there are batches that may not wait for ever for the rest of their tick."""
        if not (self._timeout and self._fixed_order) or self._to_join:
            return False
        return bool(self._lanes_with(Errand) or self._lanes_with(Job))

    def _check_quorum(self) -> None:
        late = [c for c in sorted(self._in_epoch & self._members) if not self._lanes[c]]
        others = len(self._lanes) - len(self._lost) - len(late)
        if others < self._quorum:
            who = ("client " if len(late) == 1 else "clients ") + ", ".join(map(str, late))
            raise ClosedError(
                f"{who} kept the others waiting for more than {self._timeout:g} s: "
                f"raise --round-timeout, or allow a --quorum below {others + 1}"
            )

    def _grouped(self, items: Sequence[Item]) -> list[Work]:
        errands = [item for item in items if isinstance(item, Errand)]
        jobs = [item for item in items if isinstance(item, Job)]
        size = max(1, len(jobs)) if self._gather is Gather.ALL else self._together
        return [*errands, *(jobs[start : start + size] for start in range(0, len(jobs), size))]

    def _active(self) -> set[int]:
        """Clients with something in their lane or still to come."""
        return self._filled | self._members

    def _ready(self) -> bool:
        if self._closed:
            return True
        if not self._fixed_order:
            return bool(self._served_now()) or not self._active()
        return self._in_epoch & self._members <= self._filled

    def _as_they_come(self) -> list[Work]:
        items = [self._taken(client) for client in sorted(self._served_now())]
        for end in items:
            if isinstance(end, EpochEnd):  # what lay before it has been served
                self._on_epoch_end(end)
        return self._grouped(items)

    def _served_now(self) -> set[int]:
        """Those that have something to take as it comes: for a checkpoint only who is still astray."""
        return self._filled & self._astray if self._save_due and self._held() else self._filled

    def _in_order(self) -> list[Work]:
        """One step of the fixed order: ends of epochs first, then errands, then batches."""
        self._in_epoch &= self._active()
        for client in self._lanes_with(EpochEnd):
            end = self._taken(client)
            assert isinstance(end, EpochEnd), "these lanes begin with one"
            self._on_epoch_end(end)
            self._in_epoch.discard(end.client)
        if not self._in_epoch:
            self._in_epoch = self._active()
            return [RoundEnd()]
        clients = self._lanes_with(Errand) or self._lanes_with(Job)
        return self._grouped([self._taken(client) for client in clients])

    def _lanes_with(self, kind: type[Item]) -> list[int]:
        """Those clients in the epoch, by index, that have such an item to take next."""
        return [c for c in sorted(self._in_epoch & self._filled) if isinstance(self._lanes[c][0], kind)]


def answered(work: Work) -> Sequence[Job | Errand]:
    """Those in it that somebody awaits an answer for."""
    if isinstance(work, RoundEnd | Save | Spare):
        return []
    return [work] if isinstance(work, Errand) else work


def _fail(items: Sequence[Item], reason: ClosedError) -> None:
    for item in items:
        if not isinstance(item, EpochEnd):
            item.answer.set_exception(reason)


def _end_waits(taken: Sequence[Job | Errand], reason: ClosedError) -> None:
    """Of the trainer, for gradients of batches that it has taken."""
    for item in taken:
        if isinstance(item, Job):
            item.through_tail.fail(reason)
