"""Bytes, seconds and memory, measured by wrapping: nothing on the data path knows of it.

`Traffic` wraps what turns messages into bytes and back, so it counts just what gRPC is handed.
`Clock` wraps functions, iterators and modules. `Socket` asks the kernel.
"""

import math
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from common.wire.codec import declared_bytes
from common.wire.pieces import PIECE_BYTES, Piece
from common.wire.rpc import EVALUATE, PREDICT, SYNC_WEIGHTS, TRAIN, Rpc

Direction = Literal["up", "down"]

T = TypeVar("T")
P = ParamSpec("P")

UP = ("activations", "labels", "gradients", "evaluation", "weights", "control", "framing")
DOWN = ("activations", "gradients", "evaluation", "weights", "control", "framing")


class Traffic:
    """Counts serialized bytes by direction and kind. Any thread may count.

    The kinds of tensor bytes are `activations`, `labels`, `gradients` (of training), `evaluation`
    (what travels only to be scored) and `weights`; `framing` is the rest of these messages; `control`
    is every other message. Where the client has the network's last layers, outputs come down as
    `activations` and gradients go up too.
    """

    def __init__(self) -> None:
        self._bytes: Counter[tuple[Direction, str]] = Counter()
        self._lock = threading.Lock()

    def writing(
        self, rpc: Rpc, direction: Direction, write: Callable[[Any], bytes]
    ) -> Callable[[Any], bytes]:
        def counted(message: Any) -> bytes:
            raw = write(message)
            self._count(rpc, direction, message, len(raw))
            return raw

        return counted

    def reading(self, rpc: Rpc, direction: Direction, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def counted(raw: bytes) -> Any:
            message = read(raw)
            self._count(rpc, direction, message, len(raw))
            return message

        return counted

    def total(self, direction: Direction) -> int:
        """Serialized bytes of every kind."""
        with self._lock:
            return sum(n for (d, _), n in self._bytes.items() if d == direction)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """{"up": {kind: bytes}, "down": {kind: bytes}}: with every kind of `UP` and `DOWN`."""
        with self._lock:
            up = {kind: self._bytes["up", kind] for kind in UP}
            return {"up": up, "down": {kind: self._bytes["down", kind] for kind in DOWN}}

    def add(self, counted: Mapping[str, Mapping[str, int]]) -> None:
        """Counts what an earlier process counted, as `by_kind` gives it."""
        with self._lock:
            self._bytes.update({("up", kind): n for kind, n in counted["up"].items()})
            self._bytes.update({("down", kind): n for kind, n in counted["down"].items()})

    def _count(self, rpc: Rpc, direction: Direction, message: Any, size: int) -> None:
        kinds = {"control": size}
        if isinstance(message, Piece) and (message.size or message.head.WhichOneof("head") in _FRAMES):
            kinds = {"framing": size - message.size, **_tensors(rpc, direction, message)}
        with self._lock:
            for kind, n in kinds.items():
                self._bytes[direction, kind] += n


_FRAMES = ("batch", "gradient", "output", "weights")  # heads that tensors follow


def _tensors(rpc: Rpc, direction: Direction, piece: Piece[Any]) -> dict[str, int]:
    """The piece's tensor bytes by kind. A batch's labels are told from its activations by its head."""
    if rpc is EVALUATE:
        return {"evaluation": piece.size}
    if rpc is SYNC_WEIGHTS:
        return {"weights": piece.size}
    if rpc is PREDICT:
        return {"activations": piece.size}
    head = piece.head.WhichOneof("head")
    if direction == "down":
        is_output = rpc is TRAIN and (head == "output" or piece.head.of_output)
        return {"activations" if is_output else "gradients": piece.size}
    if rpc is TRAIN and (head == "gradient" or piece.head.of_gradient):
        return {"gradients": piece.size}
    if head != "batch":
        return {"activations": piece.size}
    labels = declared_bytes(piece.head.batch.labels)
    labels = labels if labels <= PIECE_BYTES else 0  # no such batch will be taken
    return {"activations": piece.size - labels, "labels": labels}


class Rate:
    """How much comes a second, over the last seconds. One thread adds, any may ask."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window = window_s
        self._state: tuple[float, float, float] | None = None  # what came, faded; when last, and when first

    def add(self, amount: float) -> None:
        now = time.perf_counter()
        if self._state is None:
            self._state = 0.0, now, now  # how long the first took to come is not known
            return
        sum_, last, first = self._state
        self._state = sum_ * math.exp((last - now) / self._window) + amount, now, first

    def per_second(self) -> float:
        """0 until something has come twice."""
        if self._state is None:
            return 0.0
        (sum_, last, first), now = self._state, time.perf_counter()
        faded = sum_ * math.exp((last - now) / self._window)
        span = -math.expm1((first - now) / self._window) * self._window  # less at the beginning
        return faded / span if span > 0 else 0.0


class Clock:
    """Seconds by phase. Any thread may add. Work on a GPU counts when the host waits for it."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, phase: str, seconds: float) -> None:
        with self._lock:
            self._seconds[phase] += seconds  # type: ignore[assignment]  # typeshed counts in whole numbers

    def seconds(self, *phases: str) -> dict[str, float]:
        """The phases named, in this order; those never entered are 0."""
        with self._lock:
            return {phase: float(self._seconds[phase]) for phase in phases}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def function(self, phase: str, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with self(phase):
                return function(*args, **kwargs)

        return timed

    def iterator(self, phase: str, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time that each took to come is the phase's."""
        while True:
            with self(phase):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def module(self, phase: str, module: nn.Module) -> None:
        """From now on the module's forward passes in training mode are the phase's."""
        starts: list[float] = []

        def before(module: nn.Module, _: object) -> None:
            if module.training:
                starts.append(time.perf_counter())

        def after(module: nn.Module, _: object, __: object) -> None:
            if module.training:
                self.add(phase, time.perf_counter() - starts.pop())

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def peak_bytes(device: torch.device) -> int:
    """This process's peak: the allocator's on a GPU, the resident set's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
