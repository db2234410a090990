"""How activations lie in memory: row by row, or the channels of a pixel side by side."""

import torch
from torch import Tensor, nn


def laid_out(z: Tensor, layers: nn.Module) -> Tensor:
    """The same activations, with their channels last where the layers' convolutions have theirs so.

    What comes over the wire, or from a checkpoint, lies row by row; and in another layout a step is slower,
    and comes to other bits.
    """
    last = z.dim() == 4 and any(_is_last(w) for w in layers.parameters() if w.dim() == 4)
    return z.contiguous(memory_format=torch.channels_last) if last else z


def _is_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
