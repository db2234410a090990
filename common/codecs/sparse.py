"""Of each sample the largest elements by magnitude, with their indices; the others count as 0."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from common.codecs.base import Codec, Shape, Slot, refuse_unless_finite
from common.codecs.floats import peak_of, saturated
from common.errors import ConfigError, WireError


def topk(k: float = 0.1) -> Codec:
    """k: the fraction of a sample's D elements that are kept, at least one; of equals those that come first.

    Those kept: error at most 2^-8 |x|, or 2^-134 if that is more. The others: |x|, which is at most the
    smallest |x| that is kept. Values are bf16, whose range is float32's; indices within the sample ascend,
    uint16 for D up to 65,536, else int32: 4 or 6 bytes for each that is kept.
    Raises ConfigError for another k.
    """
    if not 0 < k <= 1:
        raise ConfigError(f"topk: k {k} must be above 0 and at most 1")
    return _sparse(f"topk:{k:g}", k, 0.0)


def randtopk(k: float = 0.1, alpha: float = 0.1) -> Codec:
    """In training as many are drawn without replacement, with mass alpha on those outside the k largest.

    Each of the k largest has the probability (1 - alpha) / k to be drawn next, each other alpha / (D - k),
    up to a common factor: as the k largest are used up, more than alpha of all drawn lie outside, 0.19 for
    alpha = 0.1 and D much larger than k. Otherwise topk, as in evaluation.
    Those drawn: error as topk's. The others: |x|. Size as topk's. Raises ConfigError for another k or alpha.

    F. Zheng, C. Chen, L. Lyu and B. Yao, "Reducing Communication for Split Learning by Randomized Top-k
    Sparsification", IJCAI 2023. https://www.ijcai.org/proceedings/2023/0519.pdf
    """
    if not (0 < k <= 1 and 0 <= alpha < 1):
        raise ConfigError(f"randtopk: k {k} must be above 0 and at most 1, alpha {alpha} 0 to below 1")
    return _sparse(f"randtopk:{k:g}:{alpha:g}", k, alpha)


def _sparse(name: str, k: float, alpha: float) -> Codec:
    layout = partial(_layout, k)
    return Codec(name, partial(_pack, name, k, alpha), partial(_unpack, name), layout, chance=alpha > 0)


def _kept(k: float, elements: int) -> int:
    return max(1, round(k * elements))


def _layout(k: float, shape: Shape) -> tuple[Slot, ...]:
    elements = torch.Size(shape[1:]).numel()
    kept = (shape[0], _kept(k, elements))
    index = torch.uint16 if elements <= 2**16 else torch.int32
    return Slot("indices", index, kept), Slot("values", torch.bfloat16, kept)


def _pack(name: str, k: float, alpha: float, x: Tensor, generator: Generator, training: bool) -> list[Tensor]:
    samples = x.flatten(1)  # (B, D)
    peak = peak_of(name, x)
    indices, values = _layout(k, tuple(x.shape))
    kept = indices.shape[1]
    mask = _largest(samples.abs(), kept)
    if training and alpha and kept < samples.shape[1]:
        mask = _largest(_chances(mask, kept, alpha, generator), kept)
    flat = mask.flatten().nonzero().flatten()  # (B * kept,), ascending
    chosen = saturated(x.flatten()[flat], peak, values.dtype)
    index = flat % samples.shape[1]
    return [index.to(indices.dtype).view(indices.shape), chosen.view(values.shape)]


def _unpack(name: str, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
    index, values = tensors[0].long(), tensors[1].to(torch.float32)  # (B, kept)
    x = torch.zeros(shape, dtype=torch.float32, device=values.device)
    samples = x.view(shape[0], -1)  # (B, D)
    if int(index.min()) < 0 or int(index.max()) >= samples.shape[1]:
        raise WireError(f"{name}: indices: {int(index.min())} to {int(index.max())} of {samples.shape[1]}")
    if bool((index[:, 1:] <= index[:, :-1]).any()):
        raise WireError(f"{name}: indices: they do not ascend within each sample")
    refuse_unless_finite(f"{name}: values", values)
    samples.scatter_(1, index, values)
    return x


def _largest(keys: Tensor, count: int) -> Tensor:
    """Marks the so many largest of each row (B, D), bool; of equal ones those that come first."""
    least = _least_of_largest(keys, count)  # (B, 1)
    mask = keys >= least
    if int(mask.count_nonzero()) == len(keys) * count:  # no row has more, since none has less
        return mask
    above, equal = keys > least, keys == least
    room = count - above.sum(1, keepdim=True)  # (B, 1)
    return above | equal & (equal.cumsum(1, dtype=torch.int32) <= room)


def _least_of_largest(keys: Tensor, count: int) -> Tensor:
    if keys.device.type == "cpu":  # NumPy's selection is vectorised: more than twice as fast as torch's
        place = keys.shape[1] - count
        return torch.from_numpy(np.partition(keys.numpy(), place, axis=1)[:, place : place + 1])
    return keys.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)


def _chances(mask: Tensor, kept: int, alpha: float, generator: Generator) -> Tensor:
    """Keys (B, D) whose largest are a draw without replacement: minus exponential waiting times.

    An element's rate is its probability, so who comes first, and second, and so on, is as in the draw.
    """
    minus_waits = torch.rand(mask.shape, generator=generator, device=generator.device).log_()
    inside, outside = kept / (1 - alpha), (mask.shape[1] - kept) / alpha
    return minus_waits.to(mask.device).mul_(torch.where(mask, inside, outside))
