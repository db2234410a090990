"""The client's training loop: epochs of batches, where parts meet, and what is scored when."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import StepError
from common.meter import Clock
from common.methods.base import ClientPart, ClientStep, Method, Sent, Smashed, Tail, run_step
from common.optim import learning_rate, progress_of, set_learning_rate
from common.parts import averaged_state, head_state, load_state, specs, state_of
from common.run import Run
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from dsl_client.batches import Batches
from dsl_client.connection import Connection
from dsl_client.pace import Weights, pace_of
from dsl_client.stream import Segment


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
    """on_choice: told what the client chooses to send, where it may."""

    def __init__(
        self,
        run: Run,
        client: int,
        method: Method,
        part: ClientPart,
        connection: Connection,
        spec: BatchSpec,
        clock: Clock,
        on_choice: Callable[[str], None] = lambda _: None,
    ) -> None:
        weights = Weights(spec.travel, client, spec.cut_shape)
        self.pace = pace_of(run, method, weights, connection.flow, on_choice)
        self._run, self._client, self._method, self._part = run, client, method, part
        self._connection, self._spec, self._clock = connection, spec, clock
        self._sequence = 0
        self._averaged = 0  # epochs that the last average was of

    def train(
        self,
        data: Batches,
        test: Batches,
        on_step: Callable[[Step], None] = lambda _: None,
        on_scored: Callable[[Scored], None] = lambda _: None,
    ) -> None:
        """All epochs. Raises ClosedError, with the reason, when the run ends before."""
        for epoch in range(self._run.epochs):
            last = epoch == self._run.epochs - 1
            self._connection.check_open()  # where nothing is sent yet, nothing else would tell
            self._take_turn(epoch)
            with self._clock("train"):
                loss = self._epoch(epoch, data, on_step)
                if last:
                    self._connection.settle()  # so that this time includes the server's
            self._average(epoch, data.samples * (epoch + 1 - self._averaged))
            self._renew_head(epoch)
            if last and self._method.afterwards:
                with self._clock("train"):
                    self._send_once(data, self._method.afterwards)
            if self._run.evaluates(epoch) and self._scores(epoch):
                on_scored(self._evaluate(epoch, test, loss))
            self._end_turn(epoch)

    def _epoch(self, epoch: int, data: Batches, on_step: Callable[[Step], None]) -> Tensor | None:
        """Trains on each batch once; the client's own mean loss () over the epoch, if it has one."""
        batches, method = len(data), self._method
        sent = method.sent(epoch, batches)
        segment = self._segment(epoch, data, sent) if sent else None
        paced = self.pace.over(segment) if self.pace and segment else segment
        total: Tensor | None = None
        for index, (x, y) in enumerate(data.epoch(epoch)):
            rate = learning_rate(self._run, progress_of(self._run, epoch, index, batches))
            set_learning_rate(self._part.optimizer, rate)
            start = time.perf_counter()
            wire = partial(_finite, paced) if paced and index in sent else _nowhere
            loss = run_step(method.client_step(self._part, x, y), wire)
            self._clock.add("step", time.perf_counter() - start)
            if loss is not None:
                total = loss * len(y) + (0 if total is None else total)
            shown = segment.server_loss if loss is None and segment else loss
            on_step(Step(epoch, index + 1, batches, len(y), shown))
        if total is not None and not total.isfinite():  # read only now: on a GPU that makes the host wait
            raise StepError(
                f"the client's loss in epoch {epoch + 1} is not finite; lower --lr, or check the data"
            )
        if segment:
            segment.finish()
        return None if total is None else total / data.samples

    def _send_once(self, data: Batches, step: ClientStep) -> None:
        """Sends every batch once, when all epochs are over, and waits until the server has it."""
        last = self._run.epochs - 1
        segment = self._segment(last, data, range(len(data)))
        for x, y in data.plain():
            run_step(step(self._part, x, y), segment)
        segment.finish()
        self._connection.settle()

    def _segment(self, epoch: int, data: Batches, sent: range) -> Segment:
        samples = sum(data.size(index) for index in sent)
        first, self._sequence = self._sequence + 1, self._sequence + len(sent)
        began = self.pace.begin(epoch, samples) if self.pace else self._method.first_epoch
        return self._connection.segment(
            epoch, first, len(sent), samples, self._spec, self._method, self._run.outbox, began
        )

    def _evaluate(self, epoch: int, test: Batches, loss: Tensor | None) -> Scored:
        examination = self._connection.evaluation(epoch, self._sequence, self._spec, self._run.outbox)
        joined, alone = _Tally(), _Tally()
        part = self._part
        for module in part.modules.values():
            module.eval()
        with torch.no_grad():
            for x, y in test.epoch(0):
                z = part.bottom(x)
                if self._method.tail is Tail.NONE:
                    examination.send(Smashed(z, y), self.pace.choice if self.pace else "")
                elif self._method.tail is Tail.LAST:
                    joined.add(self._tail(examination.output(Smashed(z, y))), y)
                else:
                    joined.add(self._tail(z), y)
                if part.head is not None:
                    alone.add(part.head(z), y)
        for module in part.modules.values():
            module.train()
        closing = pb.ClientScore(
            head_correct=None if part.head is None else alone.correct,
            train_loss=None if loss is None else float(loss),
            score=joined.score() if joined.samples else None,
        )
        score = examination.finish(closing if closing.ByteSize() else None)
        mine = None if part.head is None else alone.correct / test.samples
        return Scored(epoch, score.correct / max(1, score.samples), mine)

    def _tail(self, u: Tensor) -> Tensor:
        assert self._part.tail is not None, "the client has the last layers"
        logits: Tensor = self._part.tail(u)
        return logits

    def _scores(self, epoch: int) -> bool:
        last = epoch == self._run.epochs - 1
        if epoch < self._method.first_epoch or (self._method.afterwards and not last):
            return False  # the server has learned nothing yet
        # With a relay the part is at the last client when the epoch ends.
        return self._run.sync != "relay" or self._client == self._run.clients - 1

    def _average(self, epoch: int, samples: int) -> None:
        """samples: that the part was trained on since the last average."""
        if self._run.averages(epoch):
            state = averaged_state(self._part, self._method)
            purpose = pb.SYNC_PURPOSE_AVERAGE
            load_state(self._part, self._connection.sync(purpose, epoch, state, samples, specs(state)))
            self._averaged = epoch + 1

    def _renew_head(self, epoch: int) -> None:
        """Takes the head that the server has made for this client, when one is due."""
        method, head = self._method, self._part.head
        if method.new_head and head is not None and (epoch + 1) % method.head_every == 0:
            self._connection.settle()  # the head is to be made of all that was sent
            purpose = pb.SYNC_PURPOSE_TAKE_HEAD
            load_state(self._part, self._connection.sync(purpose, epoch, {}, 0, specs(head_state(head))))

    def _take_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            expected = specs(state_of(self._part))
            load_state(self._part, self._connection.sync(pb.SYNC_PURPOSE_TAKE_TURN, epoch, {}, 0, expected))

    def _end_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            self._connection.settle()  # the server, too, is to train on one client after the other
            self._connection.sync(pb.SYNC_PURPOSE_END_TURN, epoch, state_of(self._part), 0, {})


class _Tally:
    """Counts of logits that were right, and their loss: on the device until they are read."""

    def __init__(self) -> None:
        self.samples = 0
        self._correct: Tensor | int = 0
        self._loss: Tensor | float = 0.0

    def add(self, logits: Tensor, y: Tensor) -> None:
        self.samples += len(y)
        self._correct = self._correct + (logits.argmax(1) == y).sum()
        self._loss = self._loss + F.cross_entropy(logits, y, reduction="sum")

    @property
    def correct(self) -> int:
        return int(self._correct)

    def score(self) -> pb.Score:
        return pb.Score(
            samples=self.samples, correct=self.correct, loss=float(self._loss) / max(1, self.samples)
        )


def _finite(wire: Callable[[Sent], Tensor | None], sent: Sent) -> Tensor | None:
    """The wire of a batch, which what is not finite does not enter. Raises StepError."""
    tensor = sent.z if isinstance(sent, Smashed) else sent
    if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum that overflows is no fault
        raise StepError("what the client was to send is not finite; lower --lr, or check the data")
    return wire(sent)


def _nowhere(_: Sent) -> None:
    """The wire of a batch that the method does not send."""
