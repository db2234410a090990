"""Codes of 2, 4 or 8 bits, packed 4, 2 or 1 to the byte.

A byte holds neighbours, which are alike: so zstd makes a tenth less of it than of bytes that hold elements
from afar. Several bytes are shifted at once as one wider integer, whose first byte is the lowest.
"""

import torch
from torch import Tensor

_WIDE = {4: torch.int16, 2: torch.int32}  # by bits: the integer of as many bytes as a byte holds codes
_MASK = {4: 0x0F0F, 2: 0x03030303}


def packed_size(count: int, bits: int) -> int:
    """Bytes for so many codes."""
    return -(-count * bits // 8)


def room(count: int, bits: int, device: torch.device) -> Tensor:
    """Room for so many codes, (count and more,) uint8, a byte each: what is more are the zeros that fill up
    the last byte."""
    codes = torch.empty(packed_size(count, bits) * (8 // bits), dtype=torch.uint8, device=device)
    codes[count:] = 0
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (n * 8 / bits,) uint8, each below 2^bits, to (n,) uint8; the first in the lowest bits."""
    if bits == 8:
        return codes
    wide = codes.view(_WIDE[bits])
    packed = wide.clone()
    for place in range(1, 8 // bits):
        packed |= wide >> place * (8 - bits)  # to the place in the lowest byte; what is above it is cut
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n,) uint8 to (n * 8 / bits,) uint8."""
    if bits == 8:
        return packed
    wide = packed.to(_WIDE[bits])
    codes = wide.clone()
    for place in range(1, 8 // bits):
        codes |= wide << place * (8 - bits)
    return codes.bitwise_and_(_MASK[bits]).view(torch.uint8)
