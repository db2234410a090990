"""Frames of made-up batches, as a client sends them one way: what tests of keeping and sending share."""

from collections.abc import Iterator
from typing import Any

from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece
from dsl_client.stream import Stretch

SAMPLES, BYTES = 8, 1000


def stretch_of(epoch: int, batches: int = 3) -> Stretch:
    """Of epochs that are all alike."""
    return Stretch(epoch, epoch * batches + 1, batches, batches * SAMPLES)


def piece(sequence: int, size: int = BYTES) -> Piece[Any]:
    """A batch of one piece, in bytes that are its own."""
    spec = pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=(SAMPLES, 1))
    head = pb.StreamActivationsRequest(batch=pb.Batch(sequence=sequence, activations=spec))
    return Piece(head, (memoryview(bytes([sequence % 256]) * size),))


def skipped(sequence: int) -> Piece[Any]:
    return Piece(pb.StreamActivationsRequest(skipped=pb.Skipped(sequence=sequence, samples=SAMPLES)))


def frame(*sequences: int, size: int = BYTES) -> Iterator[Piece[Any]]:
    """One batch, and before it those that are skipped."""
    *before, last = sequences
    return iter([*map(skipped, before), piece(last, size)])


def numbers(pieces: Iterator[Piece[Any]]) -> list[int]:
    """Of the batches in it, skipped or not."""
    found = []
    for each in pieces:
        kind = each.head.WhichOneof("head")
        if kind in ("batch", "skipped"):
            found.append(getattr(each.head, kind).sequence)
    return found
