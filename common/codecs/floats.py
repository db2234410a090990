"""Casts: every element as a shorter float. Beyond the type's range it takes the nearest value in it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from common.codecs.base import Codec, Shape, Slot, refuse_unless_finite
from common.codecs.scales import judge_scale, scale_of
from common.errors import WireError

_FP8_MOST = 448  # of e4m3: 4 bits of exponent, 3 of mantissa, no infinity


def fp32() -> Codec:
    """As it is. No error. 4 bytes an element."""
    return _cast("fp32", torch.float32)


def fp16() -> Codec:
    """Error at most 2^-11 |x|, or 2^-25 if that is more; more than 65,504 is cut. 2 bytes an element."""
    return _cast("fp16", torch.float16)


def bf16() -> Codec:
    """Error at most 2^-8 |x|, or 2^-134 if that is more. 2 bytes an element."""
    return _cast("bf16", torch.bfloat16)


def fp8() -> Codec:
    """e4m3 of x / scale, where scale = max |x| / 448, or 2^-126 if that is more: of the whole tensor.

    Error at most |x| / 16, or scale / 1024 if that is more. A byte an element, and 4.
    P. Micikevicius et al., "FP8 formats for deep learning", 2022. https://arxiv.org/abs/2209.05433
    """
    return Codec("fp8", _pack_fp8, _unpack_fp8, _layout_fp8)


def saturated(x: Tensor, peak: Tensor, dtype: torch.dtype) -> Tensor:
    """x, of any shape, in this type, which has infinities, without any; peak (): max |x|."""
    most = torch.finfo(dtype).max
    return (x.clamp(-most, most) if float(peak) > most else x).to(dtype)


def peak_of(what: str, x: Tensor) -> Tensor:
    """max |x| (). Raises WireError for values that are NaN or infinite."""
    low, high = torch.aminmax(x)
    refuse_unless_finite(what, low, high)
    return torch.maximum(high, -low)


def _cast(name: str, dtype: torch.dtype) -> Codec:
    return Codec(name, partial(_pack, name, dtype), partial(_unpack, name), partial(_layout, dtype))


def _layout(dtype: torch.dtype, shape: Shape) -> tuple[Slot, ...]:
    return (Slot("values", dtype, shape),)


def _pack(name: str, dtype: torch.dtype, x: Tensor, _: Generator, training: bool) -> list[Tensor]:
    return [saturated(x, peak_of(name, x), dtype)]


def _unpack(name: str, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
    x = tensors[0].to(torch.float32)
    refuse_unless_finite(name, *torch.aminmax(x))
    return x


def _layout_fp8(shape: Shape) -> tuple[Slot, ...]:
    return Slot("scale", torch.float32, (1,)), Slot("codes", torch.uint8, shape)


def _pack_fp8(x: Tensor, _: Generator, training: bool) -> list[Tensor]:
    scale = scale_of(peak_of("fp8", x).reshape(1), _FP8_MOST)
    return [scale, (x / scale).to(torch.float8_e4m3fn).view(torch.uint8)]


def _unpack_fp8(tensors: Sequence[Tensor], shape: Shape) -> Tensor:
    # A code seeeemmm with its bits moved to those of an fp16, s0eeeemmm0000000, is 2^-8 of its value:
    # ten times as fast as torch's own cast.
    scale, codes = tensors
    judge_scale("fp8", scale, _FP8_MOST)
    if int(codes.bitwise_and(127).max()) == 127:
        raise WireError("fp8: codes: NaN; lower the learning rate or check the data")
    wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return wide.view(torch.float16).to(torch.float32).mul_(256).mul_(scale)
