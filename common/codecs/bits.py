"""Codes of 2, 4 or 8 bits, packed 4, 2 or 1 to the byte.

A byte holds elements that lie n / 2 or n / 4 apart, not side by side: so packing is whole-tensor shifts
of contiguous parts, at the speed of memory.
"""

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes for so many codes."""
    return -(-count * bits // 8)


def room(count: int, bits: int, device: torch.device) -> Tensor:
    """Room for so many codes, a byte each (uint8), and for the zeros that fill up the last bytes."""
    codes = torch.empty(packed_size(count, bits) * (8 // bits), dtype=torch.uint8, device=device)
    codes[count:] = 0
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (n * 8 / bits,) uint8, each below 2^bits, to (n,) uint8. Byte i holds codes i, i + n, ..."""
    if bits == 8:
        return codes
    first, *others = codes.chunk(8 // bits)
    packed = first.clone()
    for place, part in enumerate(others, 1):
        packed.add_(part, alpha=1 << place * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n,) uint8 to (n * 8 / bits,) uint8."""
    if bits == 8:
        return packed
    parts, mask = 8 // bits, (1 << bits) - 1
    codes = packed.new_empty(parts * len(packed))
    for place, part in enumerate(codes.chunk(parts)):
        torch.bitwise_right_shift(packed, place * bits, out=part)
        if place < parts - 1:
            part.bitwise_and_(mask)
    return codes
