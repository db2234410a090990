"""What is counted of each client: the bytes of its calls, and what the server learned of its batches.

Each number has one writer: the bytes of a call the thread that serves it, what was learned the trainer. So
nothing is locked for it on the data path; who reads adds up.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from common.meter import Rate
from common.wire.pieces import Piece, serialized_size
from common.wire.rpc import Rpc

Behaviour = Callable[[Any, Any], Any]  # of a service: what was read, and gRPC's context
_KEPT = 0.95  # of a running mean, when one more comes


@dataclass(eq=False)
class _Call:
    """Serialized bytes of one call, and when tensors last came by it: monotonic seconds, 0 if none have."""

    client: int | None = None
    up: int = 0
    down: int = 0
    came_at: float = 0.0


@dataclass(frozen=True)
class Passed:
    """What has passed between a client and the server: serialized bytes, and when its last batch came."""

    up: int
    down: int
    came_at: float


@dataclass
class Learned:
    """What the server knows of a client's training.

    batches: learned from since it began the epoch, of so many. loss: the server's, a running mean on its
    batches. own_loss: what it told last of its own. began_at, trained_at: when it last began an epoch, when a
    batch of its was last learned from; monotonic seconds.
    """

    epoch: int = -1  # the latest that it has begun
    batches: int = 0
    of: int = 1
    samples: int = 0
    loss: float | None = None
    own_loss: float | None = None
    began_at: float = 0.0
    trained_at: float = 0.0
    rate: Rate = field(default_factory=Rate)


class Tally:
    """whose: the client of a session, None where it is no member's."""

    def __init__(self, clients: int, whose: Callable[[str], int | None]) -> None:
        self.learned = [Learned() for _ in range(clients)]
        self._whose = whose
        self._over = [_Call(client) for client in range(clients)]  # calls that are over, summed
        self._open: set[_Call] = set()
        self._lock = threading.Lock()  # of calls that begin and end

    # ------------------------------------------------------------ what is learned

    def began(self, client: int, epoch: int, batches: int, of: int) -> None:
        """The client has come to this epoch, and has sent so many of its batches before."""
        mine = self.learned[client]
        mine.epoch, mine.batches, mine.of = max(mine.epoch, epoch), batches, of
        mine.began_at = time.monotonic()

    def trained(self, client: int, samples: int, loss: float | None) -> None:
        """So many more of its samples are learned from; loss: their mean, if the server knows it."""
        mine = self.learned[client]
        mine.samples += samples
        mine.batches += 1
        mine.rate.add(samples)
        mine.trained_at = time.monotonic()
        if loss is not None:
            mine.loss = loss if mine.loss is None else _KEPT * mine.loss + (1 - _KEPT) * loss

    def told(self, client: int, own_loss: float | None) -> None:
        """The client has evaluated; own_loss: that it trained with since the last time, if it has one."""
        if own_loss is not None:
            self.learned[client].own_loss = own_loss

    # ------------------------------------------------------------ what passes

    def passed(self) -> list[Passed]:
        """By client."""
        with self._lock:
            sums = list(self._over)
            for call in self._open:
                if call.client is not None:
                    sums[call.client] = _added(sums[call.client], call)
        return [Passed(each.up, each.down, each.came_at) for each in sums]

    def around(self, rpc: Rpc, behaviour: Behaviour) -> Behaviour:
        """The service's method, with what it takes and gives counted as its client's."""

        def unary(request: Any, context: Any) -> Any:
            with self._call() as call:
                response = behaviour(self._taken(rpc, call, request), context)
                self._give(call, response)
                return response

        def stream(request: Any, context: Any) -> Iterator[Any]:
            with self._call() as call:
                for response in behaviour(self._taken(rpc, call, request), context):
                    self._give(call, response)
                    yield response

        return stream if rpc.responses_stream else unary

    @contextmanager
    def _call(self) -> Iterator[_Call]:
        call = _Call()
        with self._lock:
            self._open.add(call)
        try:
            yield call
        finally:
            with self._lock:
                self._open.remove(call)
                if call.client is not None:
                    self._over[call.client] = _added(self._over[call.client], call)

    def _taken(self, rpc: Rpc, call: _Call, request: Any) -> Any:
        if rpc.requests_stream:
            return self._each_taken(call, request)
        self._take(call, request)
        return request

    def _each_taken(self, call: _Call, requests: Iterable[Any]) -> Iterator[Any]:
        for message in requests:
            self._take(call, message)
            yield message

    def _take(self, call: _Call, message: Any) -> None:
        if isinstance(message, Piece):
            if message.chunks:
                call.came_at = time.monotonic()
            call.up += serialized_size(message)
        else:
            call.up += message.ByteSize()
        if call.client is None:
            call.client = self._whose(_session(message))

    def _give(self, call: _Call, message: Any) -> None:
        if isinstance(message, Piece):
            call.down += serialized_size(message)
            return
        call.down += message.ByteSize()
        if call.client is None:  # of one that joins only the answer tells who it is
            call.client = self._whose(_session(message))

    # ------------------------------------------------------------ what lasts

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint holds of it, in terms of JSON."""
        return [
            {
                "epoch": [mine.epoch, mine.batches, mine.of],
                "samples": mine.samples,
                "loss": mine.loss,
                "own_loss": mine.own_loss,
                "up": passed.up,
                "down": passed.down,
            }
            for mine, passed in zip(self.learned, self.passed(), strict=True)
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what `state` gave."""
        self.take_over(dict(enumerate(state)))

    def take_over(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """What is so of these clients, as `state` gives it of each."""
        for client, known in state.items():
            mine = self.learned[client]
            (mine.epoch, mine.batches, mine.of), mine.samples = known["epoch"], known["samples"]
            mine.loss, mine.own_loss = known["loss"], known["own_loss"]
            self._over[client] = _Call(client, known["up"], known["down"])


def _added(one: _Call, other: _Call) -> _Call:
    came_at = max(one.came_at, other.came_at)
    return _Call(one.client, one.up + other.up, one.down + other.down, came_at)


def _session(message: Any) -> str:
    """Which session a message names; empty where it names none."""
    head = message.head if isinstance(message, Piece) else message
    kind = head.WhichOneof("head") if isinstance(message, Piece) else "welcome"
    named = getattr(head, kind, head) if kind else head
    return str(getattr(named, "session", ""))
