"""What a run minimises, and how it is scored: losses and metrics by name, built in or the user's own.

A loss is a function of the network's outputs (B, K) and the targets, (B,) int64 classes or (B, K) float32
numbers, and gives their mean over the batch, a tensor (). A metric takes the same and gives a value a sample,
(B,): a run's score is the mean over all samples of its test set, however they were divided into batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from common.own import first_words, function_of, is_function
from common.run import Run

Loss = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], Tensor]

ACCURACY = "accuracy"  # the one metric that counts


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the class's, else 0."""
    return outputs.argmax(1) == targets


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over a sample's numbers of the squared error."""
    return (outputs - targets).square().mean(1)


def mean_absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over a sample's numbers of the absolute error."""
    return (outputs - targets).abs().mean(1)


# By what the targets are: classes, or numbers.
LOSSES: Mapping[bool, Mapping[str, Loss]] = {
    False: {"cross-entropy": F.cross_entropy},
    True: {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits},
}
METRICS: Mapping[bool, Mapping[str, Metric]] = {
    False: {ACCURACY: accuracy},
    True: {"mse": mean_square, "mae": mean_absolute},
}


def loss_of(run: Run) -> Loss:
    """The run's. Raises ConfigError where there is none of that name, or it is none for the run's targets."""
    return _named(run, "--loss", run.loss, LOSSES, mean=True)


def metric_of(run: Run) -> Metric:
    """The run's. Raises ConfigError, likewise."""
    return _named(run, "--metric", run.metric, METRICS, mean=False)


_SAMPLES = 3  # of the batch on which a function of the user's own is tried before anything is trained


def _named(
    run: Run,
    flag: str,
    name: str,
    known: Mapping[bool, Mapping[str, Callable[[Tensor, Tensor], Tensor]]],
    mean: bool,
) -> Callable[[Tensor, Tensor], Tensor]:
    numbers = bool(run.numbers)
    if name in known[numbers]:
        return known[numbers][name]
    there = ", ".join(known[numbers])
    if name in known[not numbers]:
        what = f"targets of --targets {run.targets}"
        raise ConfigError(f"{flag} {name}: not for {what}; choose {there} or package.module:function")
    if not is_function(name):
        raise ConfigError(f"{flag} {name[:80]!r}: choose {there} or package.module:function")
    own = _Own(flag, name, function_of(flag, name), mean)
    own(torch.zeros(_SAMPLES, run.outputs, requires_grad=mean), _some_targets(run))
    return own


def _some_targets(run: Run) -> Tensor:
    if run.numbers:
        return torch.zeros(_SAMPLES, run.numbers)
    return torch.arange(_SAMPLES) % run.class_count


class _Own:
    """A function of the user's own, whose results are judged. mean: it gives one number for the batch, from
    which gradients come; else one a sample."""

    def __init__(self, flag: str, name: str, function: Callable[..., Any], mean: bool) -> None:
        self._called, self._function, self._mean = f"{flag} {name}", function, mean

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            value = self._function(outputs, targets)
        except Exception as error:  # it is someone else's code
            words = f"{type(error).__name__}: {first_words(error)}"
            raise ConfigError(f"{self._called}: its code failed: {words}") from error
        wanted = () if self._mean else (len(outputs),)
        if not isinstance(value, Tensor) or value.shape != wanted:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            rule = (
                "the batch's mean, a tensor of shape []"
                if self._mean
                else f"a value a sample, {list(wanted)}"
            )
            raise ConfigError(
                f"{self._called}: gives {found} for {len(outputs)} samples; it must give {rule}"
            )
        if self._mean and outputs.requires_grad and not value.requires_grad:
            raise ConfigError(f"{self._called}: no gradient comes from what it gives; make it of the outputs")
        return value
