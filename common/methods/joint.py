"""One step that many batches make together, wherever they lie: of the mean of their gradients, by samples.

The method's rule is run on each batch as always, but its optimizer stands still; what it left as gradients is
added up, and one step is made of the sum. BatchNorm's running statistics: each batch moves them from where
they were before the step, and the mean of what comes of it, by samples, stands. So it does not matter which
batch lies where, or in what order they come, and a batch alone makes the step that it always makes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import NonFiniteError
from common.methods.base import Answer, Received, ServerPart, ServerStep
from common.parts import state_of

Summed = Callable[[Tensor], None]  # in place: the sum over all places


class Joint:
    """Of one part. All places have the same one."""

    def __init__(self, part: ServerPart) -> None:
        self._real = part.optimizer
        self._weights = [weight for group in part.optimizer.param_groups for weight in group["params"]]
        self._part = replace(part, optimizer=_Still(self._weights))
        buffers = [buffer for module in part.modules.values() for buffer in module.buffers()]
        self._statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._counters = [buffer for buffer in buffers if not buffer.is_floating_point()]

    def step(
        self, rule: ServerStep, batches: Sequence[Received], samples: float, summed: Summed, most: int = 0
    ) -> list[Answer]:
        """What the rule answers each of the batches that lie here, none maybe, of those with so many samples
        in all. most: batches at the place that has most of them.

        Raises NonFiniteError, at every place, if anything anywhere is not finite.
        """
        return self._step(rule, [(batch, len(batch.z) / samples) for batch in batches], summed)

    def _step(
        self, rule: ServerStep, batches: Sequence[tuple[Received, float]], summed: Summed
    ) -> list[Answer]:
        """batches: each with its share of the step."""
        shapes = [*self._apart(), *self._statistics]
        # One tensor for one sum: gradients, statistics, which weights have a gradient, what is not finite.
        flat = torch.zeros(sum(t.numel() for t in shapes) + len(self._weights) + 1, device=self.device)
        *views, marks = flat.split([*(t.numel() for t in shapes), len(self._weights) + 1])
        gradients = self._zeros(views[: len(self._apart())])
        statistics = views[len(self._apart()) :]
        before = [buffer.clone() for buffer in (*self._statistics, *self._counters)]
        answers, has = [], [0.0] * len(self._weights)
        bad = torch.zeros((), device=flat.device)
        for batch, share in batches:
            answer = self._add(rule, batch, share, gradients)
            has = [max(of, float(w.grad is not None)) for of, w in zip(has, self._weights, strict=True)]
            for view, buffer in zip(statistics, self._statistics, strict=True):
                view.add_(buffer.reshape(-1), alpha=share)
            for buffer, was in zip((*self._statistics, *self._counters), before, strict=True):
                buffer.copy_(was)
            told = [answer.loss, *answer.gradients]
            finite = [tensor.isfinite().all() for tensor in told if tensor is not None]
            bad += (~torch.stack(finite)).any() if finite else 0
            answers.append(answer)
        marks.copy_(torch.tensor([*has, 0.0]))
        marks[-1] = bad
        summed(flat)
        *has, broken = marks.tolist()  # read together: on a GPU the host waits once
        if broken:
            raise NonFiniteError("a loss or a gradient is not finite")
        for weight, gradient, some in zip(self._weights, gradients, has, strict=True):
            weight.grad = gradient.view_as(weight) if some else None
        for view, buffer in zip(statistics, self._statistics, strict=True):
            buffer.copy_(view.view_as(buffer))
        for buffer in self._counters:
            buffer += 1
        self._real.step()
        return answers

    def _apart(self) -> Sequence[Tensor]:
        """The weights whose gradients each place has of its own batches only."""
        return self._weights

    def _zeros(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Where the gradients are added up; views: of what travels."""
        return views

    def _add(self, rule: ServerStep, batch: Received, share: float, gradients: Sequence[Tensor]) -> Answer:
        """What the rule answers the batch, its share of the gradients added."""
        answer = rule(self._part, [batch])
        for gradient, weight in zip(gradients, self._weights, strict=True):
            if weight.grad is not None:
                gradient.add_(weight.grad.reshape(-1), alpha=share)
        return answer

    @property
    def device(self) -> torch.device:
        device: torch.device = self._weights[0].device
        return device


def mean_over_places(part: ServerPart, share: float, summed: Summed) -> None:
    """Makes weights, statistics and momentum the mean of those of all places. share: this one's part of all
    the samples behind them; the shares' sum is 1."""
    state = [tensor for tensor in state_of(part).values() if tensor.is_floating_point()]
    flat = torch.cat([tensor.reshape(-1) for tensor in state]) * share
    summed(flat)
    with torch.no_grad():
        for tensor, mean in zip(state, flat.split([tensor.numel() for tensor in state]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class _Still(Optimizer):
    """Takes no step."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__([{"params": list(weights)}], {})

    def step(self, closure: Any = None) -> Any: ...
