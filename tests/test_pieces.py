"""One message as bytes: what we write any protobuf client reads, and the other way round."""

import contextlib
import random
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece, decode, encode

# Sizes where the data's length takes one byte, two, three, and just before and after.
SIZES = (0, 1, 2, 127, 128, 129, 300, 16_383, 16_384, 16_385, 70_000)
KINDS = (
    pb.StreamActivationsRequest,
    pb.TrainRequest,
    pb.TrainResponse,
    pb.SyncWeightsRequest,
    pb.SyncWeightsResponse,
    pb.EvaluateRequest,
)


def tensor_specs() -> st.SearchStrategy[pb.TensorSpec]:
    shapes = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
    return st.builds(lambda dtype, shape: pb.TensorSpec(dtype=dtype, shape=shape), st.integers(0, 9), shapes)


def heads() -> st.SearchStrategy[pb.TrainRequest]:
    """Any head of a message of a segment, from none at all to one of two kilobytes."""
    numbers = st.integers(0, 2**64 - 1)
    segments = st.builds(
        lambda session, first, samples: pb.TrainRequest(
            segment=pb.Segment(session=session, first_sequence=first, batches=2**32 - 1, samples=samples)
        ),
        st.one_of(st.text(max_size=40), st.integers(0, 2000).map(lambda n: "s" * n)),
        numbers,
        numbers,
    )
    batches = st.builds(
        lambda sequence, z, y: pb.TrainRequest(batch=pb.Batch(sequence=sequence, activations=z, labels=y)),
        numbers,
        tensor_specs(),
        tensor_specs(),
    )
    return st.one_of(st.just(pb.TrainRequest()), segments, batches)


def data() -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=200), st.sampled_from(SIZES).map(random.Random(0).randbytes))


def data_of(piece: Piece[Any]) -> bytes:
    return b"".join(bytes(chunk) for chunk in piece.chunks)


def cut(content: bytes, chunks: int) -> list[memoryview]:
    """The content in so many chunks, some of them empty."""
    places = sorted(random.Random(chunks).choices(range(len(content) + 1), k=chunks - 1))
    return [memoryview(content)[i:j] for i, j in zip([0, *places], [*places, len(content)], strict=True)]


def a_message() -> bytes:
    head = pb.Batch(
        sequence=300,
        activations=pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=[2, 16, 8, 8]),
        labels=pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=[2]),
    )
    return pb.TrainRequest(batch=head, data=bytes(range(200))).SerializeToString()


@given(heads(), data(), st.integers(1, 4))
@settings(deadline=None)
def test_what_is_encoded_is_decoded(head: pb.TrainRequest, content: bytes, chunks: int) -> None:
    piece = decode(pb.TrainRequest, encode(Piece(head, cut(content, chunks))))
    assert piece.head == head
    assert data_of(piece) == content
    assert piece.size == len(content)


@given(heads(), data())
@settings(deadline=None)
def test_the_generated_class_reads_what_we_write(head: pb.TrainRequest, content: bytes) -> None:
    message = pb.TrainRequest.FromString(encode(Piece(head, cut(content, 2))))
    assert message.data == content
    message.ClearField("data")
    assert message == head


@given(heads(), data())
@settings(deadline=None)
def test_we_read_what_the_generated_class_writes(head: pb.TrainRequest, content: bytes) -> None:
    message = pb.TrainRequest()
    message.CopyFrom(head)
    message.data = content
    piece = decode(pb.TrainRequest, message.SerializeToString())
    assert piece.head == head
    assert data_of(piece) == content


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.DESCRIPTOR.name)
@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_message_agrees_with_its_generated_class(kind: type[Message], size: int) -> None:
    content = random.Random(size).randbytes(size)
    ordinary = kind(data=content).SerializeToString()
    ours = encode(Piece(kind(), [memoryview(content)])) if size else encode(Piece(kind()))
    assert ours == ordinary
    assert data_of(decode(kind, ordinary)) == content


def test_data_may_come_before_the_head() -> None:
    head, content = pb.TrainRequest(batch=pb.Batch(sequence=7)), bytes(300)
    ahead = pb.TrainRequest(data=content).SerializeToString() + head.SerializeToString()
    piece = decode(pb.TrainRequest, ahead)
    assert piece.head == head
    assert data_of(piece) == content


def test_of_repeated_data_the_last_counts() -> None:
    raw = b"".join(pb.TrainRequest(data=content).SerializeToString() for content in (b"first", b"last"))
    assert data_of(decode(pb.TrainRequest, raw)) == b"last" == pb.TrainRequest.FromString(raw).data


@pytest.mark.parametrize(
    "unknown",
    [
        b"\xa0\x06\x05",  # field 100, a number
        b"\xa1\x06" + bytes(8),  # 64 bits
        b"\xa2\x06\x03abc",  # bytes
        b"\xa5\x06" + bytes(4),  # 32 bits
        b"\x78\x05",  # field 15, which should be bytes, as a number
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_unknown_fields_are_ignored(unknown: bytes, place: str) -> None:
    """A later release of the protocol may have sent them."""
    message = a_message()
    piece = decode(pb.TrainRequest, unknown + message if place == "before" else message + unknown)
    assert piece.head.batch.sequence == 300
    assert data_of(piece) == bytes(range(200))


def test_a_message_of_nothing_is_an_empty_piece() -> None:
    assert decode(pb.TrainRequest, b"") == Piece(pb.TrainRequest())


def test_the_data_is_not_copied() -> None:
    raw = a_message()
    (chunk,) = decode(pb.TrainRequest, raw).chunks
    assert chunk.obj is raw


def test_a_message_cut_off_anywhere_is_refused_or_shorter() -> None:
    raw = a_message()
    whole = decode(pb.TrainRequest, raw)
    accepted = []
    for end in range(len(raw)):
        try:
            piece = decode(pb.TrainRequest, raw[:end])
        except WireError:
            continue
        accepted.append(end)
        assert piece.size == 0, "data is never cut short in silence"
        assert piece.head in (pb.TrainRequest(), whole.head)
    assert len(accepted) == 2, "only nothing at all, and the head alone, are messages too"


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_message_is_refused_or_read_but_never_worse(seed: int) -> None:
    dice, good = random.Random(seed), a_message()
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            # Nearly always in the head, which is at the front: damaged data is still data.
            raw[dice.randrange(min(len(raw), 60))] = dice.randrange(256)
        with contextlib.suppress(WireError):
            piece = decode(pb.TrainRequest, bytes(raw))
            assert isinstance(piece.head, pb.TrainRequest)
            assert piece.size == len(data_of(piece)) <= len(raw)


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_or_read_as_the_generated_class_reads_it(raw: bytes) -> None:
    try:
        piece = decode(pb.EvaluateRequest, raw)
    except WireError:
        return
    ordinary = pb.EvaluateRequest.FromString(raw)
    assert data_of(piece) == ordinary.data
    ordinary.ClearField("data")
    assert piece.head.WhichOneof("head") == ordinary.WhichOneof("head")


@pytest.mark.parametrize("wire_type", [3, 4, 6, 7])
@pytest.mark.parametrize("number", [1, 2, 15])
def test_groups_and_unknown_wire_types_are_refused(number: int, wire_type: int) -> None:
    raw = bytes([number << 3 | wire_type]) + b"\x01a"
    with pytest.raises(WireError, match=f"wire type {wire_type}"):
        decode(pb.TrainRequest, raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\x7a\x05abc", "cut off inside field 15"),
        (b"\x7a", "cut off inside a number"),
        (b"\x7a\xff", "cut off inside a number"),
        (b"\x7a" + b"\xff" * 9 + b"\x7f", "cut off inside field 15"),  # 2**69 bytes
        (b"\x7a" + b"\xff" * 11, "more than ten bytes"),
        (b"\x12\x02\xff\xff", "not a TrainRequest"),  # a batch that is no message
        (b"\x0a\x04\x0a\x02\xff\xfe", "not a TrainRequest"),  # a session that is not UTF-8
        (b"\x00\x00", "not a TrainRequest"),  # field 0
    ],
)
def test_a_refusal_says_what_is_wrong(raw: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        decode(pb.TrainRequest, raw)
