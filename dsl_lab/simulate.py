"""A whole federation in one thread: no queue, no frames, no socket. Slow, simple, deterministic.

Because a method's client step is a generator, its clients and its server can take turns here with
nothing between them. What the real system does over the wire must equal this, bit for bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.codecs.travel import Travel, Way
from common.methods.base import ClientPart, ClientStep, Gather, Method, Received, Sent, Smashed, Step
from common.methods.hosting import Hosting
from common.optim import learning_rate, progress_of, set_learning_rate
from common.parts import average, averaged_state, head_state, load_state, state_of
from common.run import Run
from common.sampling import drawn


class Source(Protocol):
    """One client's batches, x (B, ...) and y (B,) or (B, K): dsl_client.batches.Batches, or a test's own."""

    @property
    def samples(self) -> int: ...

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def plain(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Turn:
    """One client's batch, and the progress of the run by which each side sets its learning rate."""

    client: int
    x: Tensor
    y: Tensor
    client_progress: float
    server_progress: float | None  # None: the batch is not sent
    sequence: int = 0  # its number, from 1, of those sent
    wanted: bool = True  # its gradient is


Tick = Sequence[Turn]  # at most one of each client, in the order in which the server steps on them


def federate(
    run: Run, method: Method, clients: Sequence[ClientPart], server: Hosting, data: Sequence[Source]
) -> None:
    """A run from its first epoch to its last, with all that happens between epochs; parts train in place."""
    travel = Travel.of(run.codec, run.seed)
    for epoch in range(run.epochs):
        if run.sync == "relay":
            _relay(run, method, clients, server, data, epoch, travel)
        else:
            simulate(method, clients, server, ticks(run, method, data, epoch), run, travel)
            if method.sent(epoch, 1):
                server.end_round()
        if run.averages(epoch):
            chosen = sorted(drawn(run, epoch))
            parts = [averaged_state(clients[client], method) for client in chosen]
            mean = average(parts, [data[client].samples for client in chosen])
            for part in clients:
                load_state(part, mean)
        if method.new_head and (epoch + 1) % method.head_every == 0:
            for index, part in enumerate(clients):
                load_state(part, head_state(server.new_head(index, epoch)))
    if method.afterwards:
        _send_once(run, method.afterwards, clients, server, data, travel)
        server.end_round()


def ticks(run: Run, method: Method, data: Sequence[Source], epoch: int) -> Iterator[Tick]:
    """The fixed order of an epoch: one batch of every client that has any left, by index."""
    chosen = drawn(run, epoch)
    loaded = [list(each.epoch(epoch)) if client in chosen else [] for client, each in enumerate(data)]
    for index in range(max(map(len, loaded))):
        yield [
            _turn(run, method, client, batches, epoch, index)
            for client, batches in enumerate(loaded)
            if index < len(batches)
        ]


def simulate(
    method: Method,
    clients: Sequence[ClientPart],
    server: Hosting,
    ticks: Iterable[Tick],
    run: Run,
    travel: Travel,
) -> None:
    """Trains all parts, in place."""
    for tick in ticks:
        talks = [_Talk(run, method.client_step, clients[turn.client], turn, travel) for turn in tick]
        sent = [talk for talk in talks if talk.turn.server_progress is not None]
        size = max(1, len(sent)) if method.gather is Gather.ALL else run.concatenate
        for group in (sent[start : start + size] for start in range(0, len(sent), size)):
            answers = server.step([talk.received() for talk in group]).gradients or [None] * len(group)
            for talk, gradient in zip(group, answers, strict=True):
                talk.finish(gradient)
        for talk in talks:
            if talk not in sent:
                talk.finish(None)


class _Talk:
    """One client step, and what it has sent last."""

    def __init__(
        self, run: Run, client_step: ClientStep, part: ClientPart, turn: Turn, travel: Travel
    ) -> None:
        self.turn, self._travel = turn, travel
        set_learning_rate(part.optimizer, learning_rate(run, turn.client_progress))
        self._step: Step = client_step(part, turn.x, turn.y)
        self._sent: Sent | None = next(self._step, None)  # None: it is over

    def received(self) -> Received:
        batch, turn = self._sent, self.turn
        assert isinstance(batch, Smashed), "a batch was sent"
        assert turn.server_progress is not None, "and it was to be"
        # What a step does to it, it does not do to the client's.
        parcel = self._travel.encode(Way.BATCH, batch.z.clone(), turn.client, turn.sequence)
        return Received(
            parcel.open(),
            batch.y,
            turn.client,
            turn.server_progress,
            turn.wanted,
            self._through_tail,
            parcel,
        )

    def _through_tail(self, output: Tensor) -> Tensor:
        self._sent = self._step.send(self._through(Way.OUTPUT, output))
        assert isinstance(self._sent, Tensor), "the client sends the output's gradient"
        return self._through(Way.TAIL_GRADIENT, self._sent)

    def finish(self, gradient: Tensor | None) -> None:
        if self._sent is None:
            return
        try:
            self._step.send(None if gradient is None else self._through(Way.GRADIENT, gradient))
        except StopIteration:
            return
        raise AssertionError("the client step goes on after the server's last answer")

    def _through(self, way: Way, tensor: Tensor) -> Tensor:
        return self._travel.through(way, tensor, self.turn.client, self.turn.sequence)


def _turn(
    run: Run, method: Method, client: int, batches: Sequence[tuple[Tensor, Tensor]], epoch: int, index: int
) -> Turn:
    sent = method.sent(epoch, len(batches))
    here = progress_of(run, epoch, index, len(batches))
    if index not in sent:
        return Turn(client, *batches[index], client_progress=here, server_progress=None)
    place = sent.index(index)
    return Turn(
        client,
        *batches[index],
        client_progress=here,
        server_progress=progress_of(run, epoch, place, len(sent), method.first_epoch),
        sequence=_numbered_before(run, method, client, epoch, len(batches)) + place + 1,
        wanted=method.answered(place),
    )


def _numbered_before(run: Run, method: Method, client: int, epoch: int, batches: int) -> int:
    """How many numbers a client has given before this epoch: one for all of an epoch that it sat out."""
    sending = (before for before in range(epoch) if method.sends(before))
    return sum(len(method.sent(e, batches)) if client in drawn(run, e) else 1 for e in sending)


def _relay(
    run: Run,
    method: Method,
    clients: Sequence[ClientPart],
    server: Hosting,
    data: Sequence[Source],
    epoch: int,
    travel: Travel,
) -> None:
    """Each client in turn trains on all of its share, with the part of the one before it."""
    everything = list(ticks(run, method, data, epoch))
    for client, part in enumerate(clients):
        if part is not clients[client - 1]:
            load_state(part, state_of(clients[client - 1]))
        turns = [turn for tick in everything for turn in tick if turn.client == client]
        simulate(method, clients, server, [[turn] for turn in turns], run, travel)


def _send_once(
    run: Run,
    client_step: ClientStep,
    clients: Sequence[ClientPart],
    server: Hosting,
    data: Sequence[Source],
    travel: Travel,
) -> None:
    for client, batches in enumerate(data):
        for sequence, (x, y) in enumerate(batches.plain(), 1):
            for batch in client_step(clients[client], x, y):
                assert isinstance(batch, Smashed), "it sends batches"
                z = travel.through(Way.BATCH, batch.z, client, sequence)
                server.step([Received(z, batch.y, client, 0.0, wanted=False)])
