"""The client's training loop: epochs of batches, where parts meet, and what is scored when."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.errors import ClosedError, RefusedError, StepError, WireError
from common.meter import Clock
from common.methods.base import (
    ClientPart,
    ClientStep,
    Method,
    Sent,
    Smashed,
    Tail,
    is_waypoint,
    run_step,
)
from common.objective import ACCURACY, Loss, Metric, metric_of
from common.optim import learning_rate, progress_of, set_learning_rate
from common.parts import Spec, State, averaged_state, copied, head_state, load_state, specs, state_of
from common.run import Run
from common.sampling import drawn
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from dsl_client.batches import Batches
from dsl_client.connection import Connection
from dsl_client.memory import Memory, Snapshot
from dsl_client.pace import Weights, pace_of
from dsl_client.rest import Rest
from dsl_client.stream import Segment, Stretch
from dsl_client.turns import waiting


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
    """An evaluation: the run's metric of the joined network. alone: that of its own head, if there is one."""

    epoch: int
    value: float
    alone: float | None
    metric: str = ACCURACY

    @property
    def accuracy(self) -> float | None:
        """None where the metric is another."""
        return self.value if self.metric == ACCURACY else None

    def line(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        if self.metric == ACCURACY:
            return {"epoch": self.epoch, "accuracy": self.value, "alone": self.alone}
        return {"epoch": self.epoch, "metric": self.metric, "value": self.value, "alone": self.alone}


class Trainer:
    """on_choice: told what the client chooses to send, where it may. rest: where its part is while it waits
    between two steps."""

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
        rest: Rest | None = None,
    ) -> None:
        connection.begin(run, method)
        memory = connection.memory
        keeps = run.lasts and (method.goes_back or memory.lasting)
        self._memory: Memory | None = memory if keeps else None  # of its states
        weights = Weights(spec.travel, client, spec.cut_shape)
        self.pace = pace_of(run, method, weights, connection.flow, on_choice)
        self._run, self._client, self._method, self._part = run, client, method, part
        self._connection, self._spec, self._clock = connection, spec, clock
        self._metric = metric_of(run)
        self._rest = rest
        self._needs_others = _needs_others(run, method)
        # Of many in a process none runs ahead of the server, or all would have batches on their way to it.
        self._runs_ahead = rest is None or self._needs_others
        self.sequence = 0  # of the last batch that was sent, or will be
        self._epochs = self._batch = 0  # that were trained, and batches of the next epoch
        self._total: Tensor | None = None  # the client's own loss, summed over them
        self._averaged = 0  # epochs that the last average was of
        self._turn = -1  # the epoch of the last turn that was taken
        self._once: int | None = None  # the last number before what is sent when all epochs are over
        self._kept_at = time.monotonic()

    def train(
        self,
        data: Batches,
        test: Batches,
        on_step: Callable[[Step], None] = lambda _: None,
        on_scored: Callable[[Scored], None] = lambda _: None,
    ) -> None:
        """All epochs. Raises ClosedError, with the reason, when the run ends before.

        In a run that lasts, one that the connection can mend is no end: the client goes on, or back to where
        the server is.
        """
        self._begin()
        while self._epochs < self._run.epochs:
            generation = self._connection.generation
            try:
                self._train_epoch(self._epochs, data, test, on_step, on_scored)
            except (ClosedError, WireError) as error:
                with self.idle():
                    received = self._connection.come_back(error, generation)
                if self._method.goes_back:
                    self._go_back(received)

    def _train_epoch(
        self,
        epoch: int,
        data: Batches,
        test: Batches,
        on_step: Callable[[Step], None],
        on_scored: Callable[[Scored], None],
    ) -> None:
        """From where it is. All that comes after its batches may be done again, and then changes nothing."""
        last = epoch == self._run.epochs - 1
        self._connection.check_open()  # where nothing is sent yet, nothing else would tell
        with self.idle():  # whose turn is before this one's
            self._connection.catch_up()
        if self._turn != epoch:
            self._take_turn(epoch)
        with self._clock("train"):
            if self._trains(epoch):
                self._epoch(epoch, data, on_step)
            else:
                self._sit_out(epoch, data)
            if last or not self._runs_ahead:
                with self._answered():
                    self._connection.settle()  # at last, so that this time includes the server's
        loss = None if self._total is None else self._total / data.samples
        self._average(epoch, data.samples * (epoch + 1 - self._averaged))
        self._renew_head(epoch)
        if last and self._method.afterwards:
            with self._clock("train"):
                self._send_once(data, self._method.afterwards)
        if self._run.evaluates(epoch) and self._scores(epoch):
            on_scored(self._evaluate(epoch, test, loss))
        self._end_turn(epoch)
        self._epochs, self._batch, self._total = epoch + 1, 0, None
        if self._run.averages(epoch):
            self._averaged = epoch + 1
        self._keep(waypoint=True)

    def _step(self, x: Tensor, y: Tensor, wire: Callable[[Sent], Tensor | None]) -> Tensor | None:
        """A step of the method's; its time is what it took beside waiting."""
        start, waited = time.perf_counter(), self._clock.seconds("wait")["wait"]
        loss = run_step(self._method.client_step(self._part, x, y), wire)
        waited = self._clock.seconds("wait")["wait"] - waited
        self._clock.add("step", time.perf_counter() - start - waited)
        return loss

    def _epoch(self, epoch: int, data: Batches, on_step: Callable[[Step], None]) -> None:
        """Trains on each batch that is left, once."""
        batches, method = len(data), self._method
        sent = method.sent(epoch, batches)
        place = sum(index < self._batch for index in sent)
        segment = self._segment(epoch, data, sent, place) if place < len(sent) else None
        paced = self.pace.over(segment, place) if self.pace and segment else segment
        for index, (x, y) in enumerate(data.epoch(epoch, self._batch), self._batch):
            rate = learning_rate(self._run, progress_of(self._run, epoch, index, batches))
            set_learning_rate(self._part.optimizer, rate)
            wire = partial(self._finite, paced) if paced and index in sent else _nowhere
            loss = self._step(x, y, wire)
            if loss is not None:
                self._total = loss * len(y) + (0 if self._total is None else self._total)
            self._batch = index + 1
            self.sequence += index in sent
            self._keep(is_waypoint(index, batches), segment)
            shown = segment.server_loss if loss is None and segment else loss
            on_step(Step(epoch, index + 1, batches, len(y), shown))
        # Read only now: on a GPU that makes the host wait.
        if self._total is not None and not self._total.isfinite():
            raise StepError(
                f"the client's loss in epoch {epoch + 1} is not finite; lower --lr, or check the data"
            )
        if segment:
            segment.finish()

    def _trains(self, epoch: int) -> bool:
        return self._client in drawn(self._run, epoch)

    def _sit_out(self, epoch: int, data: Batches) -> None:
        """Others were drawn for the round: the server is told that nothing comes, if anything would have."""
        if self._method.sent(epoch, len(data)) and not self._batch:  # else it has been told
            stretch = Stretch(epoch, self.sequence + 1, 1, data.samples, self._method.first_epoch)
            segment = self._connection.segment(stretch, self._spec, self._method, self._run.outbox)
            segment.sit_out(data.samples)
            segment.finish()
            self.sequence = stretch.last_sequence
        self._batch = len(data)

    def _send_once(self, data: Batches, step: ClientStep) -> None:
        """Sends every batch once, when all epochs are over, and waits until the server has it."""
        if self._once is None:
            self._once = self.sequence
        stretch = Stretch(self._run.epochs - 1, self._once + 1, len(data), data.samples)
        segment = self._connection.segment(stretch, self._spec, self._method, self._run.outbox)
        for x, y in data.plain():
            run_step(step(self._part, x, y), partial(self._through, segment))
        segment.finish()
        self.sequence = stretch.last_sequence
        self._settle()

    def _segment(self, epoch: int, data: Batches, sent: range, place: int) -> Segment:
        """For what is left of these batches of the epoch, of which so many were sent before."""
        sizes = [data.size(index) for index in sent]
        began = self.pace.begin(epoch, sum(sizes)) if self.pace else self._method.first_epoch
        stretch = Stretch(epoch, self.sequence + 1 - place, len(sent), sum(sizes), began)
        before = sum(sizes[:place])
        return self._connection.segment(stretch, self._spec, self._method, self._run.outbox, place, before)

    # ------------------------------------------------------------ where it was

    def _begin(self) -> None:
        """From the first batch, or from where the process before was."""
        if self._memory is None:
            return
        snapshot = self._memory.recalled()
        if snapshot is None:
            self._keep(waypoint=True)
        if self._method.goes_back:
            self._go_back(self._connection.received)
        elif snapshot is not None:
            self._load(snapshot)

    def _keep(self, waypoint: bool, segment: Segment | None = None) -> None:
        """What the client is now: after every step where it may have to go back to it, else now and then."""
        if self._memory is None:
            return
        now = time.monotonic()
        if not self._method.goes_back:
            if now - self._kept_at < self._run.checkpoint_every and self._batch:
                return
            if segment:
                segment.flush()
            with self.idle():
                self._connection.keep(self.sequence)
        self._kept_at = now
        tensors = copied(state_of(self._part)) | {"chance": torch.get_rng_state()}
        if self._total is not None:
            tensors["total"] = self._total.detach().cpu().clone()
        facts = {
            "epochs": self._epochs,
            "batch": self._batch,
            "averaged": self._averaged,
            "turn": self._turn,
            "pace": self.pace.state() if self.pace else {},
        }
        self._memory.keep(Snapshot(self.sequence, tensors, facts, waypoint), self._method.goes_back)

    def _go_back(self, received: int) -> None:
        """To where the server is; or to the step before it, whose answer the server has still.

        Raises RefusedError when the client was not there.
        """
        assert self._memory is not None, "it goes back"
        for sequence in (received, received - 1):
            if (snapshot := self._memory.recalled(sequence)) is not None:
                self._load(snapshot)
                self._memory.forget_after(snapshot)
                return
        raise RefusedError(
            f"the server has this client's batches up to {received}, and the client no state from there: is "
            "its --state that of this run, and whole?"
        )

    def _load(self, snapshot: Snapshot) -> None:
        facts, tensors = snapshot.facts, dict(snapshot.tensors)
        self._epochs, self._batch, self._averaged = facts["epochs"], facts["batch"], facts["averaged"]
        self.sequence, self._turn = snapshot.sequence, facts["turn"]
        torch.set_rng_state(tensors.pop("chance"))
        total = tensors.pop("total", None)
        self._total = None if total is None else total.to(next(self._part.bottom.parameters()).device)
        load_state(self._part, tensors)
        if self.pace:
            self.pace.load(facts["pace"])

    def _evaluate(self, epoch: int, test: Batches, loss: Tensor | None) -> Scored:
        examination = self._connection.evaluation(epoch, self.sequence, self._spec, self._run.outbox)
        part = self._part
        joined, alone = _Tally(part.loss, self._metric), _Tally(part.loss, self._metric)
        with _evaluating(part), torch.no_grad():
            for x, y in test.epoch(0):
                z = part.bottom(x)
                if self._method.tail is Tail.NONE:
                    with self._answered():
                        examination.send(Smashed(z, y), self.pace.choice if self.pace else "")
                elif self._method.tail is Tail.LAST:
                    with self._answered():
                        u = examination.output(Smashed(z, y))
                    joined.add(self._tail(u), y)
                else:
                    joined.add(self._tail(z), y)
                if part.head is not None:
                    alone.add(part.head(z), y)
        closing = pb.ClientScore(
            head_metric=None if part.head is None else alone.metric,
            train_loss=None if loss is None else float(loss),
            score=joined.score() if joined.samples else None,
        )
        with self.idle():
            score = examination.finish(closing if closing.ByteSize() else None)
        mine = None if part.head is None else alone.metric / test.samples
        return Scored(epoch, score.metric / max(1, score.samples), mine, self._run.metric)

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
        if not self._run.averages(epoch):
            return
        state = averaged_state(self._part, self._method)
        expected, purpose = specs(state), pb.SYNC_PURPOSE_AVERAGE
        if not self._trains(epoch):
            state, samples = {}, 0
            needed = self._needs_average(epoch)
            purpose = pb.SYNC_PURPOSE_TAKE_AVERAGE if needed else pb.SYNC_PURPOSE_AWAIT_AVERAGE
        load_state(self._part, self._sync(purpose, epoch, state, samples, expected))

    def _needs_average(self, epoch: int) -> bool:
        """Whether this client, which has not trained, uses the part before it gets the next one."""
        last = epoch == self._run.epochs - 1
        return last or self._trains(epoch + 1) or (self._run.evaluates(epoch) and self._scores(epoch))

    def _renew_head(self, epoch: int) -> None:
        """Takes the head that the server has made for this client, when one is due."""
        method, head = self._method, self._part.head
        if method.new_head and head is not None and (epoch + 1) % method.head_every == 0:
            self._settle()  # the head is to be made of all that was sent
            purpose = pb.SYNC_PURPOSE_TAKE_HEAD
            load_state(self._part, self._sync(purpose, epoch, {}, 0, specs(head_state(head))))

    def _take_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            expected = specs(state_of(self._part))
            load_state(self._part, self._sync(pb.SYNC_PURPOSE_TAKE_TURN, epoch, {}, 0, expected))
            self._turn = epoch
            self._keep(waypoint=True)  # a turn that is over cannot be taken again

    def _end_turn(self, epoch: int) -> None:
        if self._run.sync == "relay":
            self._settle()  # the server, too, is to train on one client after the other
            self._sync(pb.SYNC_PURPOSE_END_TURN, epoch, state_of(self._part), 0, {})

    # ------------------------------------------------------------ where it waits

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Between two steps: others of this process compute meanwhile, and the part rests."""
        with self._rest.of(self._part) if self._rest else nullcontext(), waiting(self._clock):
            yield

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Within a step: others compute meanwhile only where the answer waits for them. So elsewhere no more
        steps are under way, with all that they hold, than there are workers."""
        with waiting(self._clock) if self._needs_others else nullcontext():
            yield

    def _settle(self) -> None:
        with self.idle():
            self._connection.settle()

    def _sync(
        self, purpose: pb.SyncPurpose, epoch: int, state: State, samples: int, expected: dict[str, Spec]
    ) -> State:
        @contextmanager
        def idle() -> Iterator[None]:
            state.clear()  # gRPC has it, and nothing else may hold what is to rest
            with self.idle():
                yield

        return self._connection.sync(purpose, epoch, state, samples, expected, idle)

    def _through(self, wire: Callable[[Sent], Tensor | None], sent: Sent) -> Tensor | None:
        with self._answered():
            return wire(sent)

    def _finite(self, wire: Callable[[Sent], Tensor | None], sent: Sent) -> Tensor | None:
        """The wire of a batch, which what is not finite does not enter. Raises StepError."""
        tensor = sent.z if isinstance(sent, Smashed) else sent
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum that overflows is no fault
            raise StepError("what the client was to send is not finite; lower --lr, or check the data")
        return self._through(wire, sent)


def _needs_others(run: Run, method: Method) -> bool:
    """Whether what a client is answered within an epoch may wait for batches of the others: where they are
    served in turn, or a checkpoint waits until all stand where they can come back to."""
    return method.in_rounds or run.fixed_order or run.lasts


@contextmanager
def _evaluating(part: ClientPart) -> Iterator[None]:
    """Within it statistics are used as they are, and do not change."""
    for module in part.modules.values():
        module.eval()
    try:
        yield
    finally:  # it may fail, and training go on
        for module in part.modules.values():
            module.train()


class _Tally:
    """A metric and a loss of outputs, summed: on the device until they are read."""

    def __init__(self, loss: Loss, metric: Metric) -> None:
        self._loss_of, self._metric_of = loss, metric
        self.samples = 0
        self._metric: Tensor | float = 0.0
        self._loss: Tensor | float = 0.0

    def add(self, outputs: Tensor, y: Tensor) -> None:
        self.samples += len(y)
        self._metric = self._metric + self._metric_of(outputs, y).double().sum()
        self._loss = self._loss + len(y) * self._loss_of(outputs, y)

    @property
    def metric(self) -> float:
        return float(self._metric)

    def score(self) -> pb.Score:
        return pb.Score(
            samples=self.samples, metric=self.metric, loss=float(self._loss) / max(1, self.samples)
        )


def _nowhere(_: Sent) -> None:
    """The wire of a batch that the method does not send."""
