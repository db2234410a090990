"""torch's one source of chance, which all threads of a process share: only one at a time may seed it.

A network's own code draws its first weights from it, and dropout its masks. Where several ends live in one
process they build one after the other, so that all begin alike.
"""

import threading

import torch

from common.nets.cut import CutNet, build
from common.run import Run

_seeding = threading.Lock()


def seed(number: int) -> None:
    """For dropout, from now on."""
    with _seeding:
        torch.manual_seed(number)


def built(run: Run) -> CutNet:
    """The run's network, as `build` makes it, while nobody else builds or seeds."""
    with _seeding:
        return build(run)
