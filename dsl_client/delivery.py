"""Batches to a server that may die and come back: each is learned from once, whatever calls it takes.

    compute thread              spooler                courier, gRPC's thread
    segment(smashed) -> outbox (bounded) -> pack -> spool (until durable) -> pieces -> network

The compute thread never notices that the server is away, until the spool is full. The courier opens a call
for each segment; when a call fails it has the connection come back, learns which batch is due, and goes on
from there. Only what cannot be mended ends it, and then the outboxes are closed with the reason.
"""

import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol

from common.channel import Channel
from common.errors import ClosedError, SplitLearningError
from common.meter import Clock
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece
from dsl_client.spool import Frame, Spool
from dsl_client.stream import Call, Flow, Pieces, Stretch, failure_of

_CALLS = 2  # that may be under way: a segment, and the one before it that awaits its receipt


class Line(Protocol):
    """The connection, as far as a delivery knows it. generation: counts its memberships."""

    @property
    def generation(self) -> int: ...

    @property
    def session(self) -> str: ...

    def start_segment(self) -> Call:
        """What starts a call of the present membership."""
        ...

    def come_back(self, error: SplitLearningError, generation: int) -> int:
        """After this failure in a membership: begins the next one, unless somebody has, and says so by
        `Delivery.resume`. Raises what cannot be mended."""
        ...


class Delivery:
    """depth: frames that may wait to be sent while the server is there. received: the last batch that it
    has. Raises WireError where this client has not made that."""

    def __init__(self, line: Line, spool: Spool, depth: int, clock: Clock, flow: Flow, received: int) -> None:
        self._line, self._spool, self._depth = line, spool, depth
        self._clock, self._flow = clock, flow
        spool.check_made(received)
        self._outbox = Channel[tuple[Stretch, Pieces]](depth)
        self._sent = received  # the last number that a call has taken
        self._due = spool.last  # the last number of all that was put, and of its stretch
        self._counted = spool.last  # the last number whose frame does not wait any more
        self._attempt = 0  # calls of an earlier one are of no account any more
        self._open: set[Any] = set()
        self._broken: tuple[SplitLearningError, int] | None = None
        self._closed: SplitLearningError | None = None
        self._changed = threading.Condition()
        for body in (self._keep, self._deliver):
            threading.Thread(target=body, name=f"delivery{body.__name__}", daemon=True).start()

    def stream(self, stretch: Stretch) -> "Spooled":
        """Where the frames of a stretch are put."""
        self._due = stretch.last_sequence
        return Spooled(self, stretch)

    @property
    def full(self) -> bool:
        """Whether as much waits to be sent as an outbox takes."""
        return self._flow.waiting >= self._depth

    def put(self, stretch: Stretch, pieces: Pieces, wait: bool = True) -> None:
        """Waits while the outbox is full. Raises why nothing is delivered any more."""
        self._flow.wait(1)
        self._outbox.put((stretch, pieces), wait)

    def resume(self, received: int) -> None:
        """In a new membership: the server has the batches up to this number, and no other one, even if it had
        given a receipt. Calls of the last membership are of no account any more. Raises WireError for the
        number of a batch that this client has not made."""
        self._spool.check_made(received)
        with self._changed:
            self._attempt += 1
            self._sent, self._broken = received, None
            self._open.clear()
            self._changed.notify_all()

    def settle(self) -> None:
        """Waits until the server has learned of all that was put. Raises why it never will."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._settled())
            if self._closed and not self._settled():
                raise self._closed

    def _settled(self) -> bool:
        return self._broken is None and self._sent >= self._due and not self._open

    def kept(self, last: int) -> None:
        """Waits until the batches up to this number are in the spool. Raises why they never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._spool.last >= last)
            if self._closed and self._spool.last < last:
                raise self._closed

    def close(self, reason: SplitLearningError) -> None:
        """Nothing is delivered any more; who waits is told the first reason given."""
        with self._changed:
            self._closed = self._closed or reason
            self._attempt += 1
            calls = list(self._open)
            self._changed.notify_all()
        self._outbox.close(self._closed)
        self._spool.close(self._closed)
        for call in calls:
            call.cancel()

    # ------------------------------------------------------------ the spooler's thread

    def _keep(self) -> None:
        try:
            for stretch, pieces in self._outbox:
                self._room()
                fresh = self._spool.append(stretch, self._clock.iterator("encode", pieces))
                if not fresh:
                    self._flow.wait(-1)
                with self._changed:
                    self._changed.notify_all()
        except SplitLearningError as error:
            self.close(error)

    def _room(self) -> None:
        """While the server is there no more frames wait in the spool to be sent than in an outbox."""

        def room() -> bool:
            waiting = self._spool.waiting(self._sent)
            return self._closed is not None or self._broken is not None or waiting < self._depth

        with self._changed:
            self._changed.wait_for(room)

    # ------------------------------------------------------------ the courier's thread

    def _deliver(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._send(frame.stretch)
        except SplitLearningError as error:
            self.close(error)

    def _next(self) -> Frame | None:
        """The first frame of the next call, after mending what was broken; None when it is all over."""
        while True:
            with self._changed:
                self._changed.wait_for(self._something)
                if self._closed:
                    return None
                broken, frame = self._broken, self._spool.after(self._sent)
            if broken is None:
                assert frame is not None
                return frame
            self._line.come_back(*broken)  # which has `resume` called, whoever of us was the first

    def _something(self) -> bool:
        if self._closed or self._broken:
            return True
        return len(self._open) < _CALLS and self._spool.after(self._sent) is not None

    def _send(self, stretch: Stretch) -> None:
        """One call; until all of its frames are taken, or it has failed."""
        attempt, generation = self._attempt, self._line.generation
        call = self._line.start_segment()(self._requests(stretch, attempt))
        with self._changed:
            self._open.add(call)
        if not call.add_callback(lambda: self._ended(call, attempt, generation)):
            self._ended(call, attempt, generation)

        def taken() -> bool:
            return self._attempt != attempt or self._sent >= stretch.last_sequence

        with self._changed:
            self._changed.wait_for(taken)

    def _requests(self, stretch: Stretch, attempt: int) -> Iterator[Piece[Any]]:
        """By gRPC's thread: what is left of a stretch, as it comes."""
        try:
            for index in count():
                frame = self._frame(stretch, attempt)
                if frame is None:
                    return
                if index == 0:
                    yield Piece(pb.StreamActivationsRequest(segment=self._rest(frame)))
                for piece in frame.read():
                    start = time.perf_counter()
                    yield piece  # gRPC comes back when it has taken this one
                    self._flow.take(piece.size, time.perf_counter() - start)
                self._taken(frame, attempt)
        except SplitLearningError as error:
            self.close(error)
        except OSError as error:
            self.close(ClosedError(f"a batch that was kept cannot be read: {error.strerror}"))

    def _frame(self, stretch: Stretch, attempt: int) -> Frame | None:
        with self._changed:
            if self._sent >= stretch.last_sequence:
                return None
            self._changed.wait_for(lambda: self._attempt != attempt or self._spool.after(self._sent))
            return None if self._attempt != attempt else self._spool.after(self._sent)

    def _taken(self, frame: Frame, attempt: int) -> None:
        with self._changed:
            if self._attempt != attempt:
                return
            if frame.last > self._counted:
                self._counted = frame.last
                self._flow.wait(-1)
            self._sent = frame.last
            self._spool.sent(frame)
            self._changed.notify_all()

    def _rest(self, frame: Frame) -> pb.Segment:
        """The opening of a call that begins with this frame."""
        place = frame.first - frame.stretch.first_sequence
        return frame.stretch.opening(self._line.session, place, frame.before)

    def _ended(self, call: Any, attempt: int, generation: int) -> None:
        """By gRPC's thread: a call is over."""
        with self._changed:
            self._open.discard(call)
            if self._attempt == attempt and (failure := failure_of(call)):
                self._attempt += 1  # whatever else is under way is sent again by another call
                self._broken = failure, generation
                self._open.clear()
            self._changed.notify_all()


class Spooled:
    """One stretch's frames, put one by one: as `stream.Outgoing`, but that calls may fail meanwhile."""

    def __init__(self, delivery: Delivery, stretch: Stretch) -> None:
        self._delivery, self._stretch = delivery, stretch

    @property
    def full(self) -> bool:
        return self._delivery.full

    def put(self, pieces: Pieces, wait: bool = True) -> None:
        self._delivery.put(self._stretch, pieces, wait)

    def finish(self) -> None:
        """A stretch ends with the last of its batches."""

    def fail(self, reason: SplitLearningError) -> None:
        self._delivery.close(reason)

    def receipt(self) -> None:
        self._delivery.settle()
