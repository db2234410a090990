"""One message of a tensor stream, as bytes on the wire and back.

A piece is an ordinary protobuf message: a small head (any fields) and one `bytes data` field,
number 15, of up to a megabyte or so. protobuf's own classes would copy the data three times; here
the head is built by protobuf, the data is framed by hand and copied once. Any client in any
language reads and writes the same bytes with its generated classes.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from common.errors import WireError

PIECE_BYTES = 1 << 20  # measured best at 1 to 2 MiB: benchmarks/wire
_DATA_TAG = 15 << 3 | 2  # field 15, length-delimited

Head = TypeVar("Head", bound=Message)


@dataclass(frozen=True)
class Piece(Generic[Head]):
    """head: the message without its data; chunks: the data, to be written one after the other."""

    head: Head
    chunks: Sequence[memoryview] = ()

    @property
    def size(self) -> int:
        """Bytes of data."""
        return sum(chunk.nbytes for chunk in self.chunks)


class Digest(Iterator[Piece[Any]]):
    """CRC-32 of the data of a frame's pieces: of the first, and of the rest as they are iterated over."""

    def __init__(self, first: Piece[Any], rest: Iterator[Piece[Any]]) -> None:
        self.value, self._rest = 0, rest
        self._add(first)

    def __next__(self) -> Piece[Any]:
        piece = next(self._rest)
        self._add(piece)
        return piece

    def _add(self, piece: Piece[Any]) -> None:
        for chunk in piece.chunks:
            self.value = zlib.crc32(chunk, self.value)


def serialized_size(piece: Piece[Any]) -> int:
    """Bytes that `encode` makes of it."""
    data = 1 + len(_varint(piece.size)) + piece.size if piece.chunks else 0
    size: int = piece.head.ByteSize() + data
    return size


def encode(piece: Piece[Head]) -> bytes:
    head = piece.head.SerializeToString()
    if not piece.chunks:
        return head
    return b"".join((head, bytes((_DATA_TAG,)), _varint(piece.size), *piece.chunks))


def decode(kind: type[Head], raw: bytes) -> Piece[Head]:
    """Raises WireError unless `raw` is a well-formed message of this kind.

    The piece's data is a view of `raw`, not a copy. Of repeated data fields the last one counts, as
    protobuf has it.
    """
    view, position = memoryview(raw), 0
    head: list[memoryview] = []
    data = view[:0]
    while position < len(raw):
        start = position
        tag, position = _read_varint(raw, position)
        length, position = _field_length(raw, position, tag & 7)
        end = position + length
        if end > len(raw):
            raise WireError(f"a message of {len(raw)} bytes is cut off inside field {tag >> 3}")
        if tag == _DATA_TAG:
            data = view[position:end]
        else:
            head.append(view[start:end])
        position = end
    try:
        return Piece(kind.FromString(b"".join(head)), (data,) if data.nbytes else ())
    except DecodeError as error:
        raise WireError(f"not a {kind.DESCRIPTOR.name}: {error}") from error


def _field_length(raw: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """The bytes that a field's value takes, and where they begin."""
    if wire_type == 2:
        return _read_varint(raw, position)
    if wire_type == 0:
        return 0, _read_varint(raw, position)[1]
    if wire_type in (1, 5):
        return 8 if wire_type == 1 else 4, position
    raise WireError(f"a message has a field of wire type {wire_type}, which protobuf 3 does not use")


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise WireError(f"a message of {len(raw)} bytes is cut off inside a number")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError("a message has a number of more than ten bytes")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
