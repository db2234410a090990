"""Integers with a scale for each channel; of few bits, rounded at random so that the mean is right.

A tensor without negative values has codes 0 to 2^bits - 1 with zero at 0; any other has codes that are
symmetric about zero. Zeros stay zeros. Errors are told up to float32's own rounding. Rounding at random is
up with the probability of what is above the floor: D. Alistarh et al., "QSGD", 2017,
https://arxiv.org/abs/1610.02132. Here that probability is rounded to a multiple of 2^-16.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from common.codecs.base import Codec, Shape, Slot, refuse_unless_finite
from common.codecs.bits import pack, packed_size, room, unpack
from common.codecs.scales import judge_scale, scale_of
from common.errors import WireError

_CHUNK = 1 << 17  # elements, 512 KiB: what a few passes find in the second-level cache


def int8() -> Codec:
    """scale = max |x| / 255 of a channel, or / 127 where the tensor is signed; rounded to the nearest.

    Error at most scale / 2. A byte an element, 4 a channel, and 1.
    """
    return _integer(8)


def int4() -> Codec:
    """scale = max |x| / 15 of a channel, or / 7 where the tensor is signed; rounded at random.

    Error below scale, its mean 0. 1/2 byte an element, 4 a channel, and 1.
    """
    return _integer(4)


def int3() -> Codec:
    """scale = max |x| / 7 of a channel, or / 3 where the tensor is signed; rounded at random.

    Error below scale, its mean 0. 1/2 byte an element, of which a bit is idle: of use with zstd, which makes
    three quarters of it that it makes of int4. 4 a channel, and 1.
    """
    return _integer(3)


def int2() -> Codec:
    """scale = max |x| / 3 of a channel; where the tensor is signed max |x|, codes -1, 0, 1; at random.

    Error below scale, its mean 0. 1/4 byte an element, 4 a channel, and 1.
    """
    return _integer(2)


def _integer(bits: int) -> Codec:
    pack_ints, unpack_ints = partial(_pack, bits), partial(_unpack, bits)
    return Codec(f"int{bits}", pack_ints, unpack_ints, partial(_layout, bits), chance=bits < 8)


def _room(bits: int) -> int:
    """Bits that a code takes."""
    return 4 if bits == 3 else bits


def _layout(bits: int, shape: Shape) -> tuple[Slot, ...]:
    bytes_ = packed_size(torch.Size(shape).numel(), _room(bits))
    return (
        Slot("scale", torch.float32, (shape[1],)),
        Slot("signed", torch.uint8, (1,)),
        Slot("codes", torch.uint8, (bytes_,)),
    )


def _levels(bits: int, signed: bool) -> tuple[int, int]:
    """The largest code's distance from zero's, and zero's own code."""
    return (2 ** (bits - 1) - 1, 2 ** (bits - 1)) if signed else (2**bits - 1, 0)


def _pack(bits: int, x: Tensor, generator: Generator, training: bool) -> list[Tensor]:
    maps = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # (B, C, N)
    low, high = maps.amin((0, 2)), maps.amax((0, 2))  # (C,)
    refuse_unless_finite(f"int{bits}", low, high)
    signed = bool((low < 0).any())
    levels, zero = _levels(bits, signed)
    scale = scale_of(torch.maximum(high, -low), levels)

    rows = maps.flatten(0, 1)  # (B * C, N)
    factor = scale.reciprocal().repeat(len(maps)).unsqueeze(1)  # (B * C, 1)
    codes = room(x.numel(), _room(bits), x.device)
    # Codes of few bits fit an int8 too, to which torch converts five times as fast.
    into = (codes if bits == 8 else codes.view(torch.int8))[: x.numel()].view(rows.shape)
    for part in _parts(rows):
        # Conversion to an integer cuts off, so a half more is the nearest, and 0 to 1 more is at random.
        t = torch.mul(rows[part], factor[part])
        if bits < 8:
            noise = _noise(t.numel(), generator).to(x.device)
            t.add_(noise.to(torch.float32).view(t.shape), alpha=2**-16).add_(zero + 0.5 + 2**-17)
        else:
            t.add_(zero + 0.5)
        into[part].copy_(t)
    return [scale, torch.tensor([signed], dtype=torch.uint8, device=x.device), pack(codes, _room(bits))]


def _unpack(bits: int, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
    scale, signed, packed = tensors
    if int(signed) > 1:
        raise WireError(f"int{bits}: signed: {int(signed)} came; it is 0 or 1")
    levels, zero = _levels(bits, bool(signed))
    judge_scale(f"int{bits}", scale, levels)
    x = torch.empty(shape, dtype=torch.float32, device=packed.device)
    codes = unpack(packed, _room(bits))[: x.numel()]
    if zero and int(codes.min()) == 0:
        raise WireError(f"int{bits}: codes: 0 came; of a signed tensor they are 1 to {2**bits - 1}")
    if bits < _room(bits) and int(codes.max()) >= 2**bits:
        raise WireError(f"int{bits}: codes: {int(codes.max())} came; they are at most {2**bits - 1}")

    rows = x.view(shape[0] * shape[1], -1)  # (B * C, N)
    codes = codes.view(rows.shape)
    factor = scale.repeat(shape[0]).unsqueeze(1)  # (B * C, 1)
    for part in _parts(rows):
        t = rows[part].copy_(codes[part])
        if zero:
            t.sub_(zero)
        t.mul_(factor[part])
    return x


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows (R, N) that fit the cache, of multiples of 4 so that no noise is left over."""
    step = max(4, _CHUNK // rows.shape[1] // 4 * 4) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _noise(count: int, generator: Generator) -> Tensor:
    """(count,) int16, all values equally likely, where the generator is: four of each 64 bits drawn."""
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    return drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
