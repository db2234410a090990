"""The client's training loop: epochs of batches, where parts meet, and what is scored when."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.meter import Clock
from common.methods.base import ClientPart, Method, Smashed, run_step
from common.optim import learning_rate, progress_of, set_learning_rate
from common.parts import load_state, specs, state_of
from common.run import Run
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from dsl_client.batches import Batches
from dsl_client.connection import Connection


@dataclass(frozen=True)
class Step:
    """What one batch came to, for who wants to show it. `loss`: the client's own or the server's."""

    epoch: int
    batch: int
    batches: int
    samples: int
    loss: Tensor | float | None  # read only when shown: on a GPU reading makes the host wait


@dataclass(frozen=True)
class Scored:
    """An evaluation. `alone`: the accuracy of the client's own head, where it has one."""

    epoch: int
    accuracy: float
    alone: float | None


class Trainer:
    def __init__(
        self,
        run: Run,
        client: int,
        method: Method,
        part: ClientPart,
        connection: Connection,
        spec: BatchSpec,
        clock: Clock,
    ) -> None:
        self._run, self._client, self._method, self._part = run, client, method, part
        self._connection, self._spec, self._clock = connection, spec, clock
        self._sequence = 0

    def train(
        self,
        data: Batches,
        test: Batches,
        on_step: Callable[[Step], None] = lambda _: None,
        on_scored: Callable[[Scored], None] = lambda _: None,
    ) -> None:
        """All epochs. Raises ClosedError, with the reason, when the run ends before."""
        for epoch in range(self._run.epochs):
            self._take_turn(epoch)
            with self._clock("train"):
                loss = self._epoch(epoch, data, on_step)
                if epoch == self._run.epochs - 1:
                    self._connection.settle()  # so that this time includes the server's
            self._average(epoch, data.samples)
            if self._run.evaluates(epoch) and self._scores():
                on_scored(self._evaluate(epoch, test, loss))
            self._end_turn(epoch)

    def _epoch(self, epoch: int, data: Batches, on_step: Callable[[Step], None]) -> Tensor | None:
        """Trains on each batch once; the client's own mean loss () over the epoch, if it has one."""
        batches, method = len(data), self._method
        sent = range(0, batches, method.every)
        samples = sum(data.size(index) for index in sent)
        segment = self._connection.segment(
            epoch, self._sequence + 1, len(sent), samples, self._spec, method, self._run.outbox
        )
        total: Tensor | None = None
        for index, (x, y) in enumerate(data.epoch(epoch)):
            rate = learning_rate(self._run, progress_of(self._run, epoch, index, batches))
            set_learning_rate(self._part.optimizer, rate)
            start = time.perf_counter()
            wire = segment if index in sent else _nowhere
            loss = run_step(method.client_step(self._part, x, y), wire)
            self._clock.add("step", time.perf_counter() - start)
            self._sequence += index in sent
            if loss is not None:
                total = loss * len(y) + (0 if total is None else total)
            shown = segment.server_loss if loss is None else loss
            on_step(Step(epoch, index + 1, batches, len(y), shown))
        segment.finish()
        return None if total is None else total / data.samples

    def _evaluate(self, epoch: int, test: Batches, loss: Tensor | None) -> Scored:
        examination = self._connection.evaluation(epoch, self._sequence, self._spec, self._run.outbox)
        correct = torch.zeros((), dtype=torch.int64)
        bottom, head = self._part.bottom.eval(), self._part.head
        with torch.no_grad():
            for x, y in test.epoch(0):
                z = bottom(x)
                examination(Smashed(z, y))
                if head is not None:
                    correct = correct + (head.eval()(z).argmax(1) == y).sum().cpu()
        for module in self._part.modules.values():
            module.train()
        score = None if head is None else pb.HeadScore(correct=int(correct), train_loss=float(loss or 0))
        response = examination.finish(score)
        alone = None if head is None else int(correct) / test.samples
        return Scored(epoch, response.correct / max(1, response.samples), alone)

    def _scores(self) -> bool:
        # With a relay the part is at the last client when the epoch ends.
        return self._run.sync != "relay" or self._client == self._run.clients - 1

    def _average(self, epoch: int, samples: int) -> None:
        if self._run.sync == "average":
            state = state_of(self._part, momentum=False)
            load_state(self._part, self._swap(pb.SYNC_PURPOSE_AVERAGE, epoch, state, samples))

    def _take_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            load_state(self._part, self._swap(pb.SYNC_PURPOSE_TAKE_TURN, epoch, {}, 0))

    def _end_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            self._connection.settle()  # the server, too, is to train on one client after the other
            self._swap(pb.SYNC_PURPOSE_END_TURN, epoch, state_of(self._part), 0)

    def _swap(
        self, purpose: pb.SyncPurpose, epoch: int, state: dict[str, Tensor], samples: int
    ) -> dict[str, Tensor]:
        expected = specs(state_of(self._part, momentum=self._run.sync == "relay"))
        return self._connection.sync(purpose, epoch, state, samples, expected)


def _nowhere(_: Smashed) -> None:
    """The wire of a batch that the method does not send."""
