"""Any payload, compressed without loss (RFC 8878)."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from common.codecs.base import Codec, Shape, Slot
from common.errors import WireError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG = 19  # 512 KiB, level 1's own: a decoder needs no more than this beside what it decodes
_OPTIONS: Mapping[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.window_log: _WINDOW_LOG,
}
_LIMITS: Mapping[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}


def compressed(inner: Codec) -> Codec:
    """The tensors of `inner`, one after the other, as one frame. Error as inner's.

    At most inner's bytes and 1/256, and 64. A frame must say that it holds inner's size exactly, which is
    checked before anything is decompressed; then it is held to it.
    """
    return Codec(
        f"{inner.name}+zstd",
        partial(_pack, inner),
        partial(_unpack, inner),
        partial(_layout, inner),
        inner.chance,
    )


def _layout(inner: Codec, shape: Shape) -> tuple[Slot, ...]:
    opened = sum(slot.size for slot in inner.layout(shape))
    return (Slot("frame", torch.uint8, (_bound(opened),), opened),)


def _bound(size: int) -> int:
    """zstd's own bound (ZSTD_COMPRESSBOUND): what is not compressible grows no further."""
    return size + (size >> 8) + (max(0, (128 << 10) - size) >> 11)


def _pack(inner: Codec, x: Tensor, generator: Generator, training: bool) -> list[Tensor]:
    tensors = inner.pack(x, generator, training)
    parts = [tensor.to("cpu").contiguous().flatten().view(torch.uint8) for tensor in tensors]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    frame = zstd.compress(whole.numpy().data, options=_OPTIONS)
    return [torch.frombuffer(bytearray(frame), dtype=torch.uint8)]


def _unpack(inner: Codec, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
    frame = tensors[0]
    slots = inner.layout(shape)
    sizes = [slot.size for slot in slots]
    raw = _decompressed(f"{inner.name}+zstd", frame.to("cpu").contiguous().numpy().data, sum(sizes))
    # The wider types come first in every layout, so each part lies as its type needs.
    parts = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(frame.device).split(sizes)
    opened = [part.view(slot.dtype).view(slot.shape) for part, slot in zip(parts, slots, strict=True)]
    return inner.unpack(opened, shape)


def _decompressed(what: str, frame: memoryview, size: int) -> bytes:
    """Exactly so many bytes, of one frame that says so."""
    try:
        said = zstd.get_frame_info(frame).decompressed_size
        if said != size:
            raise WireError(f"{what}: a frame of {said} decompressed bytes came; {size} were due")
        decompressor = zstd.ZstdDecompressor(options=_LIMITS)
        raw = decompressor.decompress(frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise WireError(f"{what}: not a zstd frame: {str(error).partition('. ')[0]}") from error
    if len(raw) != size or not decompressor.eof or decompressor.unused_data:
        raise WireError(f"{what}: the frame does not hold the {size} bytes that it declares, or is not alone")
    return raw
