"""What an integer or an fp8 code is to be multiplied by."""

import numpy as np
import torch
from torch import Tensor

from common.errors import WireError

_FLOAT = torch.finfo(torch.float32)


def scale_of(peak: Tensor, levels: int) -> Tensor:
    """peak / levels, element by element and of peak's shape, for codes up to `levels`.

    At least the smallest normal number, 2^-126, so that 1 / scale is finite; at most what keeps
    levels * scale finite.
    """
    return (peak / levels).clamp(_FLOAT.tiny, _most(levels))


def judge_scale(what: str, scale: Tensor, levels: int) -> None:
    """Raises WireError unless `scale_of` can have made it. scale: of any shape, one for each channel."""
    low, high = (float(end) for end in torch.aminmax(scale))
    if not (low >= _FLOAT.tiny and high <= _most(levels)):  # so written, NaN does not pass
        raise WireError(f"{what}: a scale of {low:g} to {high:g}; it is {_FLOAT.tiny:g} to {_most(levels):g}")


def _most(levels: int) -> float:
    """A float32 whose product with levels is finite; the greatest, or one of its neighbours."""
    return float(np.float32(_FLOAT.max / levels * (1 - 2**-23)))
