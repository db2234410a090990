"""A whole federation in one thread: no queue, no codec, no socket. Slow, simple, deterministic.

Because a method's client step is a generator, its clients and its server can take turns here with
nothing between them. What the real system does over the wire must equal this, bit for bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.methods.base import ClientPart, Gather, Method, Received, Step
from common.methods.hosting import Hosting
from common.optim import learning_rate, progress_of, set_learning_rate
from common.run import Run


class Source(Protocol):
    """One client's batches: dsl_client.batches.Batches, or a test's own."""

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Turn:
    """One client's batch, and the progress of the run by which each side sets its learning rate."""

    client: int
    x: Tensor
    y: Tensor
    client_progress: float
    server_progress: float | None  # None: the batch is not sent


Tick = Sequence[Turn]  # at most one of each client, in the order in which the server steps on them


def ticks(run: Run, method: Method, data: Sequence[Source], epoch: int) -> Iterator[Tick]:
    """The fixed order of an epoch: one batch of every client that has any left, by index."""
    loaded = [list(batches.epoch(epoch)) for batches in data]
    for index in range(max(map(len, loaded))):
        yield [
            _turn(run, method, client, batches, epoch, index)
            for client, batches in enumerate(loaded)
            if index < len(batches)
        ]


def simulate(
    run: Run, method: Method, clients: Sequence[ClientPart], server: Hosting, ticks: Iterable[Tick]
) -> None:
    """Trains all parts, in place."""
    for tick in ticks:
        steps, received = _begun(run, method, clients, tick)
        groups = [received] if method.gather is Gather.ALL else [[batch] for batch in received]
        gradients: list[Tensor | None] = []
        for group in filter(None, groups):
            gradients.extend(server.step(group).gradients or [None] * len(group))
        for step, gradient in zip(steps, gradients or [None] * len(steps), strict=True):
            _finish(step, gradient)


def _turn(
    run: Run, method: Method, client: int, batches: Sequence[tuple[Tensor, Tensor]], epoch: int, index: int
) -> Turn:
    sent = range(0, len(batches), method.every)
    here = progress_of(run, epoch, index, len(batches))
    there = progress_of(run, epoch, sent.index(index), len(sent)) if index in sent else None
    return Turn(client, *batches[index], client_progress=here, server_progress=there)


def _begun(
    run: Run, method: Method, clients: Sequence[ClientPart], tick: Tick
) -> tuple[list[Step], list[Received]]:
    steps, received = [], []
    for turn in tick:
        part = clients[turn.client]
        set_learning_rate(part.optimizer, learning_rate(run, turn.client_progress))
        steps.append(method.client_step(part, turn.x, turn.y))
        batch = next(steps[-1])
        if turn.server_progress is not None:
            received.append(Received(batch.z, batch.y, turn.client, turn.server_progress))
    return steps, received


def _finish(step: Step, gradient: Tensor | None) -> None:
    try:
        step.send(gradient)
    except StopIteration:
        return
    raise AssertionError("a client step yields once")
