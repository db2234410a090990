"""The client's end of a stream: a segment of batches, seen as a function of one batch.

    compute thread                          gRPC's thread
    segment(smashed) -> outbox (bounded) -> pack -> pieces -> network
                     <- gradient or output, if the method answers one

Sending never holds up the compute thread until the outbox is full. Whatever ends a call closes its
outbox with the reason, so that a client which is answered nothing still learns that it is alone.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar

import grpc
import torch
from torch import Tensor

from common.channel import Channel
from common.errors import (
    ClosedError,
    DigestError,
    ForbiddenError,
    FullError,
    IdentityError,
    PlanError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    TakenError,
    WireError,
)
from common.meter import Clock
from common.methods.base import Method, Sent, Smashed, Tail
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece, serialized_size
from common.wire.rpc import EXPECTED, Malformed, judged

T = TypeVar("T")
Pieces = Iterator[Piece[Any]]
Call = Callable[[Pieces], Any]  # starts a call; its requests are pulled as they can be sent

_LOOK_S = 1.0  # between two looks at a call, of one of many threads that wait for theirs

_ERRORS: dict[grpc.StatusCode, type[SplitLearningError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: WireError,
    grpc.StatusCode.OUT_OF_RANGE: PlanError,
    grpc.StatusCode.DATA_LOSS: DigestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: FullError,
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.ALREADY_EXISTS: TakenError,
    grpc.StatusCode.UNAUTHENTICATED: IdentityError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
}


def told(error: Any) -> SplitLearningError:
    """An RPC's failure as an error of ours, in one line."""
    code, details = error.code(), " ".join(str(error.details()).split())
    if code is grpc.StatusCode.ABORTED:
        return SequenceError(details, _expected(error))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return RefusedError(
            "the server has no such call: does it train (dsl-server), or does it serve a finished run "
            "(dsl-server --serve)?"
        )
    if code in _ERRORS:
        return _ERRORS[code](details)
    return ClosedError(f"the server went away ({code.name}: {details})")


def failure_of(call: Any) -> SplitLearningError | None:
    """Why a call that is over has failed, if it has."""
    return None if call.code() is grpc.StatusCode.OK else told(call)


def _expected(error: Any) -> int:
    """The number that was due, as the server says beside."""
    trailers = dict(error.trailing_metadata() or ())
    number = str(trailers.get(EXPECTED, ""))
    return int(number) if number.isdecimal() else 0


def look_seldom() -> None:
    """For processes where many threads wait for calls. In each of them gRPC looks ten times a second whether
    the call is over: a thousand use up a core. Seldom, not never: what it was not told of is found so."""
    within: Any = importlib.import_module("grpc._common")
    if hasattr(within, "MAXIMUM_WAIT_TIMEOUT"):
        within.MAXIMUM_WAIT_TIMEOUT = _LOOK_S


@contextmanager
def telling() -> Iterator[None]:
    """Within it, gRPC's errors are raised as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise told(error) from None


@dataclass
class Flow:
    """What a client has sent so far, and how long gRPC took to take it: when the link is the slowest part,
    bytes / seconds is its rate. waiting: frames in its outboxes; the last epoch's may not be empty yet."""

    bytes: int = 0
    seconds: float = 0.0
    waiting: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def wait(self, frames: int) -> None:
        with self._lock:
            self.waiting += frames

    def take(self, size: int, seconds: float) -> None:
        with self._lock:
            self.bytes += size
            self.seconds += seconds


class Outgoing:
    """A call whose frames are put one by one; gRPC's thread packs and sends them meanwhile."""

    def __init__(
        self, start: Call, opening: Piece[Any], depth: int, clock: Clock, flow: Flow, seals: bool = False
    ) -> None:
        """seals: batches have digests."""
        self._outbox, self._depth, self._seals = Channel[Pieces](depth), depth, seals
        self._opening, self._clock, self._flow = opening, clock, flow
        self._one_way = isinstance(opening.head, pb.StreamActivationsRequest)
        self._reason: SplitLearningError | None = None
        self.call = start(self._requests())
        if not self.call.add_callback(self._ended):
            self._ended()  # it was over before

    @property
    def full(self) -> bool:
        """Whether as much waits to be sent as an outbox takes, be it of this call or the one before."""
        return not self._outbox.closed and self._flow.waiting >= self._depth

    def put(self, pieces: Pieces, wait: bool = True) -> None:
        """Waits while the outbox is full. Raises the reason once the call is over."""
        self._flow.wait(1)
        self._outbox.put(pieces, wait)

    def finish(self) -> None:
        """No more frames: the server reads the stream's end after the last one."""
        self._outbox.close(ClosedError("this stream is finished"))

    def fail(self, reason: SplitLearningError) -> None:
        """Ends the stream; who puts, or waits for what it answers, is told the first reason given."""
        self._reason = self._reason or reason
        self._outbox.close(reason)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Within it, gRPC's errors are raised as ours, and as the reason if there is one."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._reason or told(error) from None

    def receipt(self) -> None:
        """Waits until the server has learned of all of it. Raises why it has not."""
        with self.telling():
            if self._one_way:
                judged(self.call.result())
            else:
                for _ in self.call:
                    raise WireError("the server answered a batch that was not sent")

    def following(self) -> tuple[Piece[Any], Pieces]:
        """The first message of the next answer, and those after it. Raises why there is none."""
        with self.telling():
            first = following(self.call)
        return first, self._rest()

    def _rest(self) -> Pieces:
        with self.telling():
            yield from map(judged, self.call)

    def _requests(self) -> Pieces:
        yield self._opening
        try:
            for pieces in self._outbox:
                self._flow.wait(-1)
                if self._seals:
                    pieces = iter(codec.sealed(pieces))
                for piece in self._clock.iterator("encode", pieces):
                    start = time.perf_counter()
                    yield piece  # gRPC comes back when it has taken this one
                    self._flow.take(piece.size, time.perf_counter() - start)
        except WireError as error:  # what cannot be encoded; gRPC would tell of it as UNKNOWN
            self.fail(error)

    def _ended(self) -> None:
        if self.call.code() is grpc.StatusCode.OK:
            self._outbox.close(ClosedError("the server closed the stream"))
        else:
            self.fail(told(self.call))


@dataclass(frozen=True)
class Stretch:
    """The batches that an epoch sends: see Segment in the protocol. first_epoch: in which sending began."""

    epoch: int
    first_sequence: int
    batches: int
    samples: int
    first_epoch: int = 0

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + self.batches - 1

    def opening(self, session: str, place: int = 0, before: int = 0) -> pb.Segment:
        """A call's for what is left of it, after so many batches of so many samples."""
        return pb.Segment(
            session=session,
            epoch=self.epoch,
            first_sequence=self.first_sequence + place,
            batches=self.batches - place,
            samples=self.samples - before,
            first_epoch=self.first_epoch,
            place=place,
        )


class Stream(Protocol):
    """Where a segment's frames are put: an `Outgoing`, or what outlives its calls."""

    @property
    def full(self) -> bool: ...

    def put(self, pieces: Pieces, wait: bool = True) -> None: ...

    def finish(self) -> None: ...

    def fail(self, reason: SplitLearningError) -> None: ...

    def receipt(self) -> None: ...


class Segment:
    """One client's batches of one epoch. Call it with what the method sends; it gives what comes back.

    stretch: the epoch's batches. place: how many of them were sent before, by another call.
    """

    def __init__(
        self,
        stream: Stream,
        stretch: Stretch,
        client: int,
        spec: BatchSpec,
        method: Method,
        clock: Clock,
        place: int = 0,
    ) -> None:
        self._kind = pb.StreamActivationsRequest if method.one_way else pb.TrainRequest
        self._client, self._spec, self._method, self._clock = client, spec, method, clock
        self._first = stretch.first_sequence
        self._sequence = stretch.first_sequence + place - 1
        self._shape: tuple[int, ...] = ()  # of the last batch's activations
        self._skips: list[Piece[Any]] = []  # of which the server is still to be told
        self._stream = stream
        self.server_loss: float | None = None  # of the last batch that was answered

    def __call__(self, sent: Sent) -> Tensor | None:
        """A batch gives its output, or dL/dz (B, C, H, W), or None; an output's gradient dL/dz or None."""
        with self._clock("wait"):
            if isinstance(sent, Tensor):
                self._stream.put(
                    codec.pack_gradient(self._kind, self._sequence, sent, self._spec, self._client)
                )
                return self._gradient(sent.device) if self._wanted() else None
            self._stream.put(self._next(sent))
            if self._method.tail is Tail.LAST:
                return self._output(sent.z)
            return self._gradient(sent.z.device) if self._wanted() else None

    @property
    def full(self) -> bool:
        """Whether the next batch would have to wait, for others of this segment or the one before."""
        return self._stream.full

    def send(self, batch: Smashed, choice: str, most: int | None = None) -> int:
        """Sends one way, by a codec of the run's ladder; its bytes, 0 where that is not asked.

        most: bytes. Where there is such a limit the batch is encoded at once; if it would take more it is
        skipped, and that takes 0.
        """
        if most is None:
            self._put(self._next(batch, choice))
            return 0
        with self._clock("encode"):
            pieces = list(self._next(batch, choice))
        size = sum(map(serialized_size, pieces))
        if size > most:  # so are the skips that it would have taken along
            self._skips = [piece for piece in pieces if piece.head.WhichOneof("head") == "skipped"]
            self._skips.append(self._skipped(len(batch.z)))
            return 0
        self._put(iter(pieces))
        return size

    def skip(self, batch: Smashed) -> None:
        """Does not send this batch, and waits for nothing: the server is told with the next one."""
        self._sequence += 1
        self._skips.append(self._skipped(len(batch.z)))

    def sit_out(self, samples: int) -> None:
        """Sends nothing of the epoch, of so many samples, and waits for nothing."""
        self._sequence += 1
        self._skips.append(self._skipped(samples))

    def flush(self) -> None:
        """Tells of what was skipped last now, rather than with the next batch."""
        if self._skips:
            skips, self._skips = self._skips, []
            self._stream.put(iter(skips), wait=False)  # a few bytes

    def finish(self) -> None:
        """Ends the segment; does not wait for its receipt."""
        self.flush()
        self._stream.finish()

    def fail(self, reason: SplitLearningError) -> None:
        self._stream.fail(reason)

    def receipt(self) -> None:
        """Waits until the server has trained on all of it. Raises why it has not."""
        self._stream.receipt()

    def _put(self, pieces: Pieces) -> None:
        with self._clock("wait"):
            self._stream.put(pieces)

    def _next(self, batch: Smashed, choice: str = "") -> Pieces:
        self._sequence, self._shape = self._sequence + 1, tuple(batch.z.shape)
        skips, self._skips = self._skips, []
        pieces = codec.pack_batch(self._kind, self._sequence, batch, self._spec, self._client, choice)
        return chain(skips, pieces)

    def _skipped(self, samples: int) -> Piece[Any]:
        skipped = pb.Skipped(sequence=self._sequence, samples=samples)
        return Piece(self._kind(skipped=skipped))

    def _wanted(self) -> bool:
        return self._method.answered(self._sequence - self._first)

    def _following(self) -> tuple[Piece[Any], Pieces]:
        assert isinstance(self._stream, Outgoing), "what is answered is sent by one call"
        return self._stream.following()

    def _gradient(self, device: torch.device) -> Tensor | None:
        first, rest = self._following()
        gradient, loss = codec.unpack_gradient(first, rest, self._sequence, self._shape, self._spec)
        if self._method.tail is Tail.NONE:
            self.server_loss = loss
        if gradient is None and not self._method.may_skip:
            raise WireError(f"the server's answer to batch {self._sequence} has no gradient")
        return None if gradient is None else gradient.to(device)

    def _output(self, z: Tensor) -> Tensor:
        first, rest = self._following()
        shape = (len(z), *self._spec.output_shape)
        return codec.unpack_output(first, rest, self._sequence, shape, self._spec).to(z.device)


class Examination:
    """Test batches to be scored by the joined network."""

    def __init__(
        self,
        start: Call,
        opening: pb.Evaluation,
        client: int,
        spec: BatchSpec,
        depth: int,
        clock: Clock,
        flow: Flow,
    ) -> None:
        self._client, self._spec, self._sequence = client, spec, 0
        self._stream = Outgoing(start, Piece(pb.EvaluateRequest(evaluation=opening)), depth, clock, flow)

    def send(self, smashed: Smashed, choice: str = "") -> None:
        """A batch that the server is to score; choice: a codec of the run's ladder, where it has one."""
        self._sequence += 1
        kind = pb.EvaluateRequest
        self._stream.put(codec.pack_batch(kind, self._sequence, smashed, self._spec, self._client, choice))

    def output(self, smashed: Smashed) -> Tensor:
        """What the server's layers make of a batch, (B, *output_shape), for a client that has the last ones.
        Raises WireError for any other answer."""
        self.send(smashed)
        first, rest = self._stream.following()
        shape = (len(smashed.z), *self._spec.output_shape)
        return codec.unpack_output(first, rest, self._sequence, shape, self._spec).to(smashed.z.device)

    def fail(self, reason: SplitLearningError) -> None:
        self._stream.fail(reason)

    def finish(self, closing: pb.ClientScore | None) -> pb.Score:
        """The score, once it is made; `closing`: what the client itself has to say of it. Raises WireError
        where another answer comes."""
        if closing is not None:
            self._stream.put(iter([Piece(pb.EvaluateRequest(client_score=closing))]))
        self._stream.finish()
        first, rest = self._stream.following()
        if first.head.WhichOneof("head") != "score":
            raise WireError("the server's last answer to an evaluation is not a score")
        score: pb.Score = first.head.score
        for _ in rest:
            raise WireError("the server went on after the score")
        return score


def following(responses: Iterator[T | Malformed]) -> T:
    """The next response. Raises ClosedError where there is none."""
    try:
        return judged(next(responses))
    except StopIteration:
        raise ClosedError("the server closed the stream before it answered") from None
