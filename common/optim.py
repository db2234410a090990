"""How both sides' weights move: SGD, and the learning rate as a function of progress."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Optimizer

from common.run import Run


def sgd(parameters: Iterable[nn.Parameter], run: Run) -> Optimizer:
    """Of these parameters; of none, where the other end has all of the network."""
    return SGD([{"params": list(parameters)}], run.lr, run.momentum, weight_decay=run.weight_decay)


def learning_rate(run: Run, progress: float) -> float:
    """The learning rate after this fraction of the run, 0 <= progress < 1.

    Linear from lr/100 to lr over `warmup`, then constant, half a cosine to zero, or tenths.
    """
    if progress < run.warmup:
        return run.lr * (0.01 + 0.99 * progress / run.warmup)
    if run.schedule == "cosine":
        after = (progress - run.warmup) / (1 - run.warmup)
        return run.lr * 0.5 * (1 + math.cos(math.pi * after))
    if run.schedule == "step":
        return run.lr * (0.01 if progress >= 0.75 else 0.1 if progress >= 0.5 else 1.0)
    return run.lr


def progress_of(run: Run, epoch: int, batch: int, batches: int, first_epoch: int = 0) -> float:
    """How much of the run lies before this batch of a client's epoch, both counted from 0.

    first_epoch: where it begins for who learns only from then on.
    """
    return (epoch - first_epoch + batch / batches) / (run.epochs - first_epoch)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
