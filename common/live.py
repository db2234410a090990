"""Bytes of tensors that are alive: what a step needs, counted storage by storage.

`Storages` sees every operation of its thread. A storage counts once, however many tensors share it, from when
it is first seen until it is freed. What an operation takes and gives back within itself (a convolution's
workspace) is not seen, nor is what other threads make of it (a batch that is being packed).

`Gauge` wraps a method's rules, as `meter.py` wraps the rest: nothing on the data path knows of it.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.methods.base import (
    Answer,
    ClientPart,
    ClientStep,
    Method,
    Received,
    ServerPart,
    ServerStep,
    Step,
)
from common.parts import kept_by

STEPS = 3  # there is momentum from the second on; a third, in case


class Storages(TorchDispatchMode):
    """While entered: the bytes that live `now`, and the `peak`. It may be entered again, and then goes on.

    It costs each operation some ten microseconds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by address
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._freed: deque[int] = deque()  # by any thread; taken into account before what comes next

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Counts these, too, of whatever shapes: what is there before the first operation, for instance."""
        for tensor in tensors:
            self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def settle(self) -> int:
        """`now`, with all that has been freed until now."""
        while self._freed:
            address = self._freed.popleft()
            del self._watches[address]
            self.now -= self._sizes.pop(address)
        return self.now

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(_tensors([*args, *(kwargs or {}).values(), result]))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation would import torch's compiler, for a second or more

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.settle()  # first: a new storage may lie where one was that is gone
        address = storage._cdata
        if address not in self._sizes:
            freed = self._freed  # not self, which would keep itself
            self._watches[address] = weakref.ref(storage, lambda _: freed.append(address))
        self.now += storage.nbytes() - self._sizes.get(address, 0)  # it may have grown
        self._sizes[address] = storage.nbytes()


class Gauge:
    """Live bytes of one side in its first steps: their `peak`, and what a client `held` while it waited.

    On a GPU the allocator's own counts, which include all that is there. held: 0 where nothing is answered.
    """

    def __init__(self, device: torch.device, steps: int = STEPS) -> None:
        self.peak = self.held = 0
        self._device, self._left = device, steps
        self._storages = None if device.type == "cuda" else Storages()

    def around(self, method: Method) -> Method:
        """The same method, its first steps measured. One thread at a time may run them."""
        return replace(
            method,
            client_step=partial(self._client_step, method.client_step),
            server_step=partial(self._server_step, method.server_step),
        )

    def _client_step(self, rule: ClientStep, part: ClientPart, x: Tensor, y: Tensor) -> Step:
        if not self._left:
            return (yield from rule(part, x, y))
        self._left -= 1
        step, answer = rule(part, x, y), None
        while True:
            with self._counting([x, y, *kept_by(part), *_tensors([answer])]):
                try:
                    sent = step.send(answer)
                except StopIteration as done:
                    loss: Tensor | None = done.value
                    return loss
            waiting = self._now()
            answer = yield sent  # outside: whatever ends the wire, the counting has ended
            if answer is not None:
                self.held = max(self.held, waiting)

    def _server_step(self, rule: ServerStep, part: ServerPart, group: Sequence[Received]) -> Answer:
        if not self._left:
            return rule(part, group)
        self._left -= 1
        with self._counting(chain(kept_by(part), *([batch.z, batch.y] for batch in group))):
            return rule(part, group)

    @contextmanager
    def _counting(self, present: Iterable[Tensor]) -> Iterator[None]:
        if self._storages is None:
            yield
            self.peak = torch.cuda.max_memory_allocated(self._device)
            return
        self._storages.see(present)
        del present  # the step may let go of what is in it
        with self._storages:
            yield
        self.peak = self._storages.peak

    def _now(self) -> int:
        if self._storages is None:
            return torch.cuda.memory_allocated(self._device)
        return self._storages.settle()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments and results, which may be in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
