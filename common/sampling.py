"""Which clients train in a round: of all of them a fraction, drawn anew for each.

B. McMahan et al. 2017 (https://arxiv.org/abs/1602.05629), algorithm 1: S_t, a random set of max(C K, 1) of
the K clients. Both ends draw; since they draw by the run's seed, they draw the same.
"""

from collections.abc import Collection
from functools import lru_cache

import numpy as np

from common.run import Run

_DRAW = 0x5A  # keeps these numbers apart from others that are made of the seed


def drawn(run: Run, epoch: int) -> Collection[int]:
    """The clients that train in this epoch, from 0; a round of several epochs has the same ones in each."""
    if run.sample_fraction == 1:
        return range(run.clients)
    return _drawn(run.clients, run.sample_fraction, run.seed, epoch // run.sync_every)


@lru_cache(maxsize=64)
def _drawn(clients: int, fraction: float, seed: int, number: int) -> frozenset[int]:
    rng = np.random.default_rng([seed, number, _DRAW])
    some = max(1, round(fraction * clients))
    return frozenset(rng.choice(clients, some, replace=False).tolist())
