"""Arbitrary bytes for everything that reads the wire: what comes out is a value or a WireError, nothing else.

An input is the number of a reader, then messages, each after its length in two bytes. As a program it writes
the corpus anew.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from google.protobuf.message import Message
from torch import Tensor

from common.codecs.travel import Travel
from common.errors import WireError
from common.methods.base import Smashed
from common.parts import specs
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece, decode, encode

CORPUS = Path(__file__).parent / "corpus"
CUT, OUTPUT, SAMPLES, CLASSES = (2, 3, 2), (3,), 2, 10
CODECS = (
    "fp32",
    "fp16",
    "bf16",
    "fp8",
    "int8",
    "int4",
    "int3",
    "int2",
    "topk:0.5",
    "int4+zstd",
    "topk:0.5+zstd",
)
STATE = {"weight": torch.ones(3, 2), "odd": torch.ones(3), "batches": torch.tensor(7)}

Unpack = Callable[[Piece[Any], Iterator[Piece[Any]]], object]


class Reader(NamedTuple):
    """A message type and what is made of a frame of such messages. valid: messages that it accepts."""

    name: str
    kind: type[Message]
    unpack: Unpack
    valid: Callable[[], Sequence[bytes]]


def _spec(name: str = "fp32", **settings: Any) -> BatchSpec:
    """Of a run in which activations and gradients travel by this codec."""
    kinds = "activations", "gradients"
    travel = Travel.of([f"{kind}={name}" for kind in kinds], seed=1, chooses=settings.pop("chooses", False))
    return BatchSpec(CUT, 4, CLASSES, output_shape=OUTPUT, travel=travel, **settings)


def _smashed() -> Smashed:
    return Smashed(_tensor((SAMPLES, *CUT)), torch.tensor([3, 9]))


def _tensor(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()


def _whole(pieces: Iterator[Piece[Any]]) -> list[bytes]:
    return [encode(piece) for piece in pieces]


def _halved(messages: Sequence[bytes], kind: type[Any]) -> list[bytes]:
    """A frame of one message as one of two."""
    piece = decode(kind, messages[0])
    data = b"".join(piece.chunks)
    half = len(data) // 2
    parts = Piece(piece.head, [memoryview(data)[:half]]), Piece(kind(), [memoryview(data)[half:]])
    return [encode(part) for part in parts]


def _batch(
    name: str, spec: BatchSpec, kind: type[Any] = pb.StreamActivationsRequest, choice: str = ""
) -> Reader:
    def valid() -> Sequence[bytes]:
        return _whole(codec.pack_batch(kind, 5, _smashed(), spec, 1, choice))

    return Reader(f"batch-{name}", kind, lambda first, rest: codec.unpack_batch(first, rest, spec), valid)


def _pieces(
    name: str, kind: type[Any], unpack: Unpack, sending: Callable[[], Iterator[Piece[Any]]]
) -> Reader:
    return Reader(name, kind, unpack, lambda: _whole(sending()))


def _readers() -> Iterator[Reader]:
    for name in CODECS:
        spec = _spec(name)
        yield _batch(name, spec)
        shape = (SAMPLES, *CUT)
        yield _pieces(
            f"gradient-{name}",
            pb.TrainResponse,
            partial(_unpack_gradient, shape=shape, spec=spec),
            partial(codec.pack_gradient, pb.TrainResponse, 5, _tensor(shape), spec, 1, 0.5),
        )
    plain, bare = _spec(), _spec(labels=False)
    yield _batch("bare", bare, pb.TrainRequest)
    yield _batch("exam", plain, pb.EvaluateRequest)
    chosen = _spec(chooses=True)
    for choice in chosen.travel.ladder:
        yield _batch(f"chosen-{choice}", chosen, choice=choice)
    skipped = Piece(pb.StreamActivationsRequest(skipped=pb.Skipped(sequence=5, samples=SAMPLES)))
    yield _pieces(
        "skipped",
        pb.StreamActivationsRequest,
        lambda first, _: codec.unpack_skipped(first, chosen),
        lambda: iter([skipped]),
    )
    for kind in (pb.TrainResponse, pb.EvaluateResponse):
        yield _pieces(
            f"output-{kind.DESCRIPTOR.name}",
            kind,
            lambda first, rest: codec.unpack_output(first, rest, 5, (SAMPLES, *OUTPUT), plain),
            partial(codec.pack_output, kind, 5, _tensor((SAMPLES, *OUTPUT)), plain, 1),
        )
    head = pb.Weights(session="s", epoch=1, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=7)
    yield _pieces(
        "weights",
        pb.SyncWeightsRequest,
        lambda first, rest: codec.unpack_weights(first, rest, specs(STATE)),
        partial(codec.pack_weights, pb.SyncWeightsRequest, head, STATE),
    )
    learned = BatchSpec(CUT, 4, CLASSES, numbers=3)
    yield _pieces(
        "batch-numbers",
        pb.TrainRequest,
        lambda first, rest: codec.unpack_batch(first, rest, learned),
        lambda: codec.pack_batch(
            pb.TrainRequest, 5, Smashed(_tensor((SAMPLES, *CUT)), _tensor((SAMPLES, 3))), learned, 1
        ),
    )


def _unpack_gradient(
    first: Piece[Any], rest: Iterator[Piece[Any]], shape: tuple[int, ...], spec: BatchSpec
) -> object:
    return codec.unpack_gradient(first, rest, 5, shape, spec)


READERS = tuple(_readers())
CALLS = (*rpc.RPCS, *rpc.PREDICTION_RPCS)


def read(raw: bytes) -> object:
    """What one of the readers makes of the messages. Raises WireError, and nothing else."""
    if not raw:
        return None
    reader, messages = READERS[raw[0] % len(READERS)], _messages(raw[1:])
    for kind, in_pieces in ((which.request, which.requests_in_pieces) for which in CALLS):
        for message in messages[:1]:  # the same bytes as a message of any other kind
            rpc.reader(kind, in_pieces)(message)
    pieces = (decode(reader.kind, message) for message in messages)
    first = next(pieces, None)
    return None if first is None else reader.unpack(first, pieces)


def packed(number: int, messages: Sequence[bytes]) -> bytes:
    """An input of these messages for the reader of this number."""
    return bytes([number]) + b"".join(len(message).to_bytes(2, "little") + message for message in messages)


def _messages(raw: bytes) -> list[bytes]:
    messages = []
    while len(raw) >= 2:
        size = int.from_bytes(raw[:2], "little")
        messages.append(raw[2 : 2 + size])
        raw = raw[2 + size :]
    return messages


def seeds() -> Iterator[tuple[str, bytes]]:
    """A valid input for each reader; for some another in two messages, or cut short."""
    dice = random.Random(1)
    for number, reader in enumerate(READERS):
        messages = reader.valid()
        yield reader.name, packed(number, messages)
        if decode(reader.kind, messages[0]).size > 1 and number % 4 == 0:
            yield f"{reader.name}-in-two", packed(number, _halved(messages, reader.kind))
        if number % 5 == 0:
            yield f"{reader.name}-cut", packed(number, messages)[: dice.randrange(3, 60)]


def only_wire_errors(raw: bytes) -> None:
    with contextlib.suppress(WireError):
        read(raw)


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, seed in seeds():
        (CORPUS / name).write_bytes(seed)
