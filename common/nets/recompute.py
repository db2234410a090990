"""Gradient checkpointing: activations that are made again when they are needed, rather than kept.

T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016.
https://arxiv.org/abs/1604.06174
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.nets.resnet import Block


def segments(layers: nn.Sequential, blocks: int) -> list[nn.Sequential]:
    """The layers in segments of so many blocks, but for the first, which may have fewer, and the stem."""
    starts = [index for index, layer in enumerate(layers) if isinstance(layer, Block)]
    cuts = [start for start in starts[::-1][blocks - 1 :: blocks] if start != starts[0]]
    return [layers[start:end] for start, end in pairwise([0, *cuts[::-1], len(layers)])]


class Recomputed(nn.Sequential):
    """Layers in segments. Of all but the last only what goes in is kept for the backward pass, which runs
    them once more; the last one's activations are needed at once, and so are kept.

    Its weights have the names that they have in one row of layers. A step comes to the same bits as without:
    BatchNorm's statistics move with the first pass, and not again with the second.
    """

    def __init__(self, segments: Sequence[nn.Sequential]) -> None:
        super().__init__(*chain.from_iterable(segments))
        self._segments = tuple(segments)  # a tuple: they are no layers of their own

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), as the layers in one row."""
        *again, last = self._segments
        for segment in again:
            if torch.is_grad_enabled():
                x = checkpoint(segment, x, use_reentrant=False, context_fn=partial(_passes, segment))
            else:
                x = segment(x)
        out: Tensor = last(x)
        return out


def _passes(layers: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What is around the first pass, and around the second."""
    return nullcontext(), _Still(layers)


class _Still(AbstractContextManager[None]):
    """Within it BatchNorm does all that it always does, but its statistics and its count keep still.

    (Without statistics it would save fewer tensors than in the first pass, which torch takes for a fault.)
    """

    def __init__(self, layers: nn.Module) -> None:
        self._norms = [layer for layer in layers.modules() if isinstance(layer, _BatchNorm)]

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None  # 0 * the batch's + 1 * what they were

    def __exit__(self, *_: object) -> None:  # torch ends a second pass by an exception, once it has enough
        for norm, (momentum, count) in zip(self._norms, self._before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
