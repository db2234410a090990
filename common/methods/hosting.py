"""The server's side of a method: its parts of the network, one for all clients or a copy for each.

What the real server's trainer and the simulation in one thread do alike: learning rate, step, learning
from what is held once more, the end of a round, scoring.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.crops import augmented
from common.errors import NonFiniteError
from common.methods.base import Answer, Method, Received, ServerPart
from common.methods.guard import Guard
from common.methods.joint import Joint, Summed, mean_over_places
from common.methods.replay import Replay, Shelf
from common.nets.layout import laid_out
from common.objective import metric_of
from common.optim import learning_rate, set_learning_rate, sgd
from common.parts import State, average, copied, found_under, load_state, state_of, under
from common.run import Run

if TYPE_CHECKING:
    from common.methods.divided import Divided


class Hosting:
    """`parts`: one, or one for each client where the method has copies; all begin alike.

    shelf: where batches lie that are learned from again, if the run has any.
    """

    def __init__(self, run: Run, method: Method, part: ServerPart, shelf: Shelf | None = None) -> None:
        self._run, self._method, self._metric = run, method, metric_of(run)
        self._replay = Replay(run.replay_bytes, run.reuse, shelf) if run.replay else None
        self._began = self._latest = 0.0  # the progress of this round's first step, and of the last one
        self.parts = [part]
        if method.copies:
            self.parts += [_copy(run, part) for _ in range(run.clients - 1)]
        self._guards = [Guard(list(state_of(part).values())) for part in self.parts]
        self._samples = [0] * len(self.parts)  # of this round, by copy
        self._device = next(part.top.parameters(), torch.empty(0)).device
        self.rounds = 0  # that have ended
        self.skipped = 0  # joint steps left out
        self._joint: Joint | None = None
        self._divided: Divided | None = None

    def state(self) -> State:
        """All that the next step depends on, but for the run: for a checkpoint. Copies of what changes."""
        state: State = {}
        for index, part in enumerate(self.parts):
            state |= under(f"parts.{index}", copied(self.state_of(part)))
        if self._method.memory is not None:
            state |= under("memory", self._method.memory.state())
        if self._replay is not None:
            state |= under("replay", self._replay.state())
        numbers = [self._began, self._latest, float(self.rounds), *map(float, self._samples)]
        state["numbers"] = torch.tensor(numbers, dtype=torch.float64)
        state["chance"] = self.parts[0].generator.get_state()
        state["global_chance"] = torch.get_rng_state()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave. KeyError, RuntimeError: it is of another run."""
        for index, part in enumerate(self.parts):
            load_state(part, found_under(f"parts.{index}", state))
        if self._method.memory is not None:
            self._method.memory.load(found_under("memory", state), self.parts[0])
        if self._replay is not None:
            self._replay.load(found_under("replay", state), self._device)
        self._began, self._latest, rounds, *samples = state["numbers"].tolist()
        self.rounds, self._samples = int(rounds), [int(number) for number in samples]
        self.parts[0].generator.set_state(state["chance"])
        torch.set_rng_state(state["global_chance"])

    def step(self, group: Sequence[Received]) -> Answer:
        """One step of the method's rule on the group, at the learning rate of its progress.

        Raises NonFiniteError where it comes to what is not finite, unless the run leaves such steps out.
        """
        index = group[0].client if self._method.copies else 0
        progress = sum(batch.progress for batch in group) / len(group)
        part = self.parts[index]
        seen = [
            replace(batch, z=laid_out(batch.z, part.top), through_tail=partial(self._through_tail, batch))
            for batch in group
        ]
        if self._run.concatenate > 1:
            seen = [_concatenated(seen)]
        rule = partial(self._method.server_step, part, seen)
        answer = self._attempt(progress, rule, index, group)
        self._samples[index] += sum(len(batch.z) for batch in group)
        if self._replay is not None and not answer.skipped:
            for batch in group:
                self._replay.keep(batch)
        self._latest = progress
        return answer

    def joint_step(
        self, batches: Sequence[Received], samples: float, progress: float, summed: Summed, most: int = 0
    ) -> list[Answer]:
        """One step that these batches, none maybe, and those at other places make together; what it answers
        these. samples: of all. progress: the same at all places. summed: sums over the places. most: batches
        at the place that has most.

        Raises as `step` does, at all places.
        """
        (part,) = self.parts
        self._joint = self._joint or Joint(part)
        seen = [replace(batch, z=laid_out(batch.z, part.top)) for batch in batches]
        answers: list[Answer] = []

        def rule() -> Answer:
            assert self._joint is not None
            answers.extend(self._joint.step(self._method.server_step, seen, samples, summed, most))
            return Answer(None)

        if self._attempt(progress, rule).skipped:
            self.skipped += 1
            return [Answer(None, [self._nothing(batch)], skipped=1) for batch in batches]
        return answers

    def mean_over_places(self, share: float, summed: Summed) -> None:
        """The part as the mean of those of all places, each with its share of the samples behind them."""
        (part,) = self.parts
        mean_over_places(part, share, summed)

    def divide(self, divided: "Divided", summed: Summed) -> None:
        """The part lies divided over several places from now on: steps and scores are made by all of them, as
        often by each."""
        self._joint = self._divided = divided
        self._device = divided.device
        self._guards = [Guard(divided.slices, summed)]

    def put_together(self, wanted: bool) -> None:
        """By all places: has the part whole, as it is now, for those where that is wanted."""
        if self._divided:
            self._divided.put_together(wanted)

    def state_of(self, part: ServerPart) -> State:
        """As the function; of a divided part as it was last put together."""
        return self._divided.whole if self._divided else state_of(part)

    def accompany(self) -> None:
        """What another place scores, its part of the network's way, with nothing here to be scored."""
        assert self._divided is not None, "else each place scores alone"
        self.output(self._divided.noise().z)

    @property
    def can_replay(self) -> bool:
        """Whether there is something left to learn from again."""
        return bool(self._replay)

    def replay(self, progress: float | None = None) -> Answer:
        """One more step, on a batch that is kept, augmented anew where the run augments; at this progress,
        else at that of the last batch."""
        assert self._replay is not None, "something is left"
        part, batch = self.parts[0], self._replay.take()
        z = augmented(batch.z, part.generator) if self._run.augment else batch.z
        batch = replace(batch, z=laid_out(z, part.top))
        rule = partial(self._method.server_step, part, [batch])
        answer = self._attempt(self._latest if progress is None else progress, rule)
        return replace(answer, replayed=len(batch.z))

    def end_round(self) -> Answer | None:
        """What the method does when every client's batches have come.

        What is kept is learned from as often as it may be, through the round's stretch of the schedule once
        more. Averages copies, weighted by the samples of the round; their momentum stays. A copy that was
        not trained, its client being lost, has no weight; if none was, nothing changes.
        """
        self.rounds += 1
        if self._replay is not None:
            return self._replay_round(self._replay)
        if self._method.copies and any(self._samples):
            mean = average([state_of(part, momentum=False) for part in self.parts], self._samples)
            for copied in self.parts:
                load_state(copied, mean)
            self._samples = [0] * len(self.parts)
        if self._method.round_step is None:
            return None
        (part,) = self.parts
        return self._method.round_step(part, self._attempt)

    def _replay_round(self, kept: Replay) -> Answer | None:
        steps = kept.left
        answers = [
            self.replay(self._began + (self._latest - self._began) * step / steps) for step in range(steps)
        ]
        self._began = self._latest
        if not answers:
            return None
        losses = [answer.loss for answer in answers if answer.loss is not None]
        return Answer(
            torch.stack(losses).mean() if losses else None,
            replayed=sum(answer.replayed for answer in answers),
            skipped=sum(answer.skipped for answer in answers),
        )

    def score(self, z: Tensor, y: Tensor) -> tuple[float, float]:
        """The run's metric (of accuracy, how many are right) and its loss, summed over a batch: z (B, ...) as
        it crosses the cut, y (B,) classes or (B, K) numbers."""
        outputs = self.output(z)
        y = y.to(self._device)
        loss = self.parts[0].loss(outputs, y)
        return self._metric(outputs, y).double().sum().item(), len(y) * loss.item()

    def output(self, z: Tensor) -> Tensor:
        """What the server's layers make of a batch z (B, ...) in evaluation mode: (B, classes), or what the
        client's last layers take."""
        top: nn.Module = self.parts[0].top.eval()
        with torch.no_grad():
            out: Tensor = top(laid_out(z.to(self._device), top))
        top.train()
        return out

    def new_head(self, client: int, epoch: int) -> nn.Module:
        """The head that the method makes for this client after this epoch."""
        assert self._method.new_head is not None, "the method makes heads"
        return self._method.new_head(self.parts[0], client, epoch)

    def _attempt(
        self, progress: float, rule: Callable[[], Answer], index: int = 0, group: Sequence[Received] = ()
    ) -> Answer:
        """The rule's step of the part of this index, or, where the run says so, none."""
        set_learning_rate(self.parts[index].optimizer, learning_rate(self._run, progress))
        try:
            return self._guards[index].step(rule)
        except NonFiniteError as error:
            if self._run.on_nonfinite == "halt":
                remedy = "lower --lr, or go on without: --on-nonfinite skip"
                raise NonFiniteError(f"{error}; {remedy}") from None
        return Answer(None, [self._nothing(batch) for batch in group], skipped=1)

    def _nothing(self, batch: Received) -> Tensor | None:
        # A client that cannot be left out waits for a gradient, and of zeros it learns nothing: its own loss,
        # momentum and weight decay alone move its part.
        return torch.zeros_like(batch.z) if batch.wanted and not self._method.may_skip else None

    def _through_tail(self, batch: Received, output: Tensor) -> Tensor:
        """What the client makes of the output, which is not sent unless it is finite."""
        if output.isfinite().all():
            return batch.through_tail(output)
        if self._run.on_nonfinite == "skip":
            batch.through_tail(torch.zeros_like(output))  # its client waits for one
        raise NonFiniteError("the output for a client is not finite")


def _concatenated(group: Sequence[Received]) -> Received:
    """Batches that nobody awaits an answer for, as one."""
    z, y = torch.cat([batch.z for batch in group]), torch.cat([batch.y for batch in group])
    return replace(group[0], z=z, y=y)


def _copy(run: Run, part: ServerPart) -> ServerPart:
    top = copy.deepcopy(part.top)
    return ServerPart(top, sgd(top.parameters(), run), part.generator, loss=part.loss)
