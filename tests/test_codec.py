"""Tensors as frames of pieces: equal bits come out, and everything that is not right is refused by name."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import WireError
from common.methods.base import Smashed
from common.parts import Spec, specs
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece, decode, encode

SPEC = BatchSpec(cut_shape=(3, 5, 2), batch_size=8, classes=10)  # 30 elements, 120 bytes a sample
F32, U8 = pb.DTYPE_FLOAT32, pb.DTYPE_UINT8
PIECE_SIZES = (1, 3, 7, 64, 100, 121, 4096, 1 << 20)


def batch(samples: int, spec: BatchSpec = SPEC, seed: int = 0) -> Smashed:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, *spec.cut_shape, generator=g)
    return Smashed(z, torch.randint(0, spec.classes, (samples,), generator=g))


def over_the_wire(pieces: Iterator[Piece[Any]], kind: type[Any]) -> list[Piece[Any]]:
    return [decode(kind, encode(piece)) for piece in pieces]


def unpacked(pieces: list[Piece[Any]], spec: BatchSpec = SPEC) -> tuple[int, Smashed]:
    rest = iter(pieces)
    batch = codec.unpack_batch(next(rest), rest, spec)
    assert next(rest, None) is None, "the whole frame was read, and nothing after it"
    return batch.sequence, batch


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    def raw(tensor: Tensor) -> list[int]:
        return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()

    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and raw(ours) == raw(theirs)


def frame(
    z: pb.TensorSpec | None = None, y: pb.TensorSpec | None = None, data: bytes = b"", sequence: int = 1
) -> list[Piece[Any]]:
    """A frame with these heads; by default those of two samples."""
    head = pb.Batch(
        sequence=sequence,
        activations=z or pb.TensorSpec(dtype=F32, shape=[2, 3, 5, 2]),
        labels=y or pb.TensorSpec(dtype=U8, shape=[2]),
    )
    return [Piece(pb.TrainRequest(batch=head), [memoryview(data)] if data else [])]


def refusal(pieces: list[Piece[Any]], spec: BatchSpec = SPEC) -> str:
    with pytest.raises(WireError) as caught:
        unpacked(pieces, spec)
    return str(caught.value)


@pytest.fixture
def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*sizes: object, **_: object) -> Tensor:
        raise AssertionError(f"memory for {sizes} was asked for before the head was judged")

    monkeypatch.setattr(torch, "empty", empty)


# ---------------------------------------------------------------- what is right comes through


@pytest.mark.parametrize("piece_bytes", PIECE_SIZES)
@pytest.mark.parametrize("samples", [1, 2, 7, 8])
def test_a_batch_comes_out_with_equal_bits(
    samples: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    sent = batch(samples)
    pieces = over_the_wire(codec.pack_batch(pb.TrainRequest, 41, sent, SPEC), pb.TrainRequest)
    sequence, got = unpacked(pieces)
    assert sequence == 41
    assert same_bits(got.z, sent.z)
    assert same_bits(got.y, sent.y)


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (10, 1), (256, 1), (257, 2), (300, 2), (65_536, 2)])
def test_labels_travel_in_the_smallest_type_that_holds_every_class(classes: int, width: int) -> None:
    spec = BatchSpec((1, 2, 2), 4, classes)
    sent = Smashed(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, classes - 2, classes - 1]))
    pieces = over_the_wire(codec.pack_batch(pb.TrainRequest, 1, sent, spec), pb.TrainRequest)
    assert sum(piece.size for piece in pieces) == 4 * (4 * 4 + width)
    assert torch.equal(unpacked(pieces, spec)[1].y, sent.y)


@pytest.mark.parametrize("piece_bytes", PIECE_SIZES)
@pytest.mark.parametrize("samples", [1, 5, 8])
def test_the_payload_is_the_tensors_bytes_and_no_more(
    samples: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    pieces = list(codec.pack_batch(pb.StreamActivationsRequest, 1, batch(samples), SPEC))
    assert sum(piece.size for piece in pieces) == samples * 3 * 5 * 2 * 4 + samples
    assert max(piece.size for piece in pieces) <= 1.5 * piece_bytes + 1, "cut evenly, at about this size"
    assert [piece.head.WhichOneof("head") for piece in pieces] == ["batch"] + [None] * (len(pieces) - 1)


def test_values_at_the_ends_of_the_range_come_through() -> None:
    extremes = [0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38, -3.4028235e38, math.pi]
    spec = BatchSpec((8,), 4, 10)
    sent = Smashed(torch.tensor([extremes]), torch.tensor([9]))
    assert same_bits(unpacked(list(codec.pack_batch(pb.TrainRequest, 1, sent, spec)), spec)[1].z, sent.z)


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    sent = Smashed(torch.full((8, 3, 5, 2), 3e38), torch.zeros(8, dtype=torch.int64))
    assert not math.isfinite(sent.z.sum())
    got = unpacked(list(codec.pack_batch(pb.TrainRequest, 1, sent, SPEC)))[1]
    assert torch.equal(got.z, sent.z)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "every other sample", "wants a gradient"])
def test_how_the_activations_lie_in_memory_is_of_no_account(layout: str) -> None:
    z = {
        "channels last": lambda: torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(4, 3, 2, 5).transpose(2, 3),
        "every other sample": lambda: torch.randn(8, 3, 5, 2)[::2],
        "wants a gradient": lambda: torch.randn(4, 3, 5, 2, requires_grad=True),
    }[layout]()
    sent = Smashed(z, torch.arange(4))
    got = unpacked(list(codec.pack_batch(pb.TrainRequest, 1, sent, SPEC)))[1]
    assert torch.equal(got.z, z)
    assert not got.z.requires_grad


def test_what_is_received_has_its_own_memory() -> None:
    raw = encode(next(codec.pack_batch(pb.TrainRequest, 1, batch(2), SPEC)))
    got = unpacked([decode(pb.TrainRequest, raw)])[1]
    got.z.zero_()  # as a view of the message this would write on the message
    assert unpacked([decode(pb.TrainRequest, raw)])[1].z.any()


@pytest.mark.parametrize("cuts", [[0], [1], [119, 120, 121], list(range(240)), [0, 0, 240, 242]])
def test_a_sender_may_cut_the_data_where_it_likes(cuts: list[int]) -> None:
    """Also before the first byte of it: the head may come alone."""
    sent = batch(2)
    (whole,) = codec.pack_batch(pb.TrainRequest, 1, sent, SPEC)
    data = b"".join(whole.chunks)
    edges = sorted({0, *cuts, len(data)})
    parts = [memoryview(data)[i:j] for i, j in itertools.pairwise(edges)]
    alone = [Piece(whole.head)] if cuts[0] == 0 else [Piece(whole.head, [parts.pop(0)])]
    got = unpacked([*alone, *(Piece(pb.TrainRequest(), [part]) for part in parts)])[1]
    assert same_bits(got.z, sent.z)


@pytest.mark.parametrize("piece_bytes", PIECE_SIZES)
@pytest.mark.parametrize("shape", [(1, 3, 5, 2), (8, 3, 5, 2), (5, 1, 1, 1)])
def test_a_gradient_comes_out_with_equal_bits(
    shape: tuple[int, ...], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    sent = torch.randn(*shape)
    first, *rest = over_the_wire(
        codec.pack_gradient(pb.TrainResponse, 9, sent, SPEC, loss=0.5), pb.TrainResponse
    )
    got, loss = codec.unpack_gradient(first, iter(rest), 9, shape, SPEC)
    assert got is not None
    assert same_bits(got, sent)
    assert loss == 0.5


STATE = {
    "bottom.weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(1)),
    "bottom.odd": torch.randn(
        3, generator=torch.Generator().manual_seed(2)
    ),  # 12 bytes: what follows is askew
    "bottom.batches": torch.tensor(2**40 + 1),
    "bottom.scale": torch.tensor(-1.5),
    "bottom.counts": torch.tensor([[-1, 2], [3, -(2**63)]]),
}


def weights(state: Mapping[str, Tensor] = STATE, **head: Any) -> list[Piece[Any]]:
    pieces = codec.pack_weights(pb.SyncWeightsRequest, pb.Weights(**head), dict(state))
    return over_the_wire(pieces, pb.SyncWeightsRequest)


@pytest.mark.parametrize("piece_bytes", PIECE_SIZES)
def test_weights_come_out_with_equal_bits(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    first, *rest = weights(session="s", epoch=3, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=7)
    head, state = codec.unpack_weights(first, iter(rest), specs(STATE))
    assert (head.session, head.epoch, head.purpose, head.samples) == ("s", 3, pb.SYNC_PURPOSE_AVERAGE, 7)
    assert list(state) == list(STATE)
    for name, tensor in state.items():
        assert same_bits(tensor, STATE[name]), name


def test_no_weights_are_a_frame_of_one_empty_piece() -> None:
    (piece,) = weights({}, session="s", purpose=pb.SYNC_PURPOSE_TAKE_TURN)
    assert piece.size == 0
    head, state = codec.unpack_weights(piece, iter([]), specs(STATE))
    assert (head.session, state) == ("s", {})


def test_packing_weights_leaves_the_head_that_was_given_alone() -> None:
    head = pb.Weights(session="s")
    list(codec.pack_weights(pb.SyncWeightsRequest, head, STATE))
    assert not head.tensors


def test_a_tensor_of_another_type_is_not_sent() -> None:
    with pytest.raises(WireError, match=r"torch\.float64 cannot be sent"):
        list(codec.pack_gradient(pb.TrainResponse, 1, torch.zeros(1, dtype=torch.float64), SPEC, loss=0.0))


# ---------------------------------------------------------------- what is wrong is refused by name

HUGE = 2**40


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([], "batch of 0 samples"),
        ([2], r"activations: shape \[2\]"),
        ([2, 30], r"activations: shape \[2, 30\]"),
        ([2, 3, 5], r"activations: shape \[2, 3, 5\]"),
        ([2, 3, 5, 2, 1], r"activations: shape \[2, 3, 5, 2, 1\]"),
        ([2, 5, 3, 2], r"activations: shape \[2, 5, 3, 2\]; the run needs \[2, 3, 5, 2\]"),
        ([2, 3, 5, 0], "activations: shape"),
        ([2, 3, -5, -2], "activations: shape"),
        ([2, 3, 5, HUGE], f"activations: shape .*{HUGE}"),
        ([2, HUGE, HUGE, HUGE], "activations: shape"),
        ([0, 3, 5, 2], "batch of 0 samples: the run allows 1 to 8"),
        ([-1, 3, 5, 2], "batch of -1 samples"),
        ([-(2**63), 3, 5, 2], "batch of -9223372036854775808 samples"),
        ([9, 3, 5, 2], "batch of 9 samples: the run allows 1 to 8"),
        ([HUGE, 3, 5, 2], f"batch of {HUGE} samples"),
        ([2**63 - 1, 3, 5, 2], "batch of 9223372036854775807 samples"),
        ([2] * 1000, r"activations: shape \[2, 2, 2, 2, 2, 2, 2, 2\];"),  # told in a line
    ],
)
def test_a_wrong_shape_of_activations_is_refused_unallocated(shape: list[int], says: str) -> None:
    with pytest.raises(WireError, match=says):
        unpacked(frame(z=pb.TensorSpec(dtype=F32, shape=shape), data=bytes(242)))


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([], r"labels: shape \[\]; the run needs \[2\]"),
        ([1], r"labels: shape \[1\]; the run needs \[2\]"),
        ([3], r"labels: shape \[3\]"),
        ([2, 1], r"labels: shape \[2, 1\]"),
        ([-2], r"labels: shape \[-2\]"),
        ([HUGE], rf"labels: shape \[{HUGE}\]"),
    ],
)
def test_a_wrong_count_of_labels_is_refused_unallocated(shape: list[int], says: str) -> None:
    with pytest.raises(WireError, match=says):
        unpacked(frame(y=pb.TensorSpec(dtype=U8, shape=shape), data=bytes(242)))


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize(
    ("dtype", "called"),
    [
        (pb.DTYPE_UNSPECIFIED, "DTYPE_UNSPECIFIED"),
        (pb.DTYPE_INT64, "DTYPE_INT64"),
        (pb.DTYPE_UINT8, "DTYPE_UINT8"),
        (99, "99"),
        (-1, "-1"),
    ],
)
def test_a_wrong_type_of_activations_is_refused_by_name(dtype: Any, called: str) -> None:
    z = pb.TensorSpec(dtype=dtype, shape=[2, 3, 5, 2])
    assert refusal(frame(z=z)) == f"activations: dtype {called}; the run needs DTYPE_FLOAT32"


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize(
    ("dtype", "called"), [(F32, "DTYPE_FLOAT32"), (pb.DTYPE_UINT16, "DTYPE_UINT16"), (17, "17")]
)
def test_a_wrong_type_of_labels_is_refused_by_name(dtype: Any, called: str) -> None:
    y = pb.TensorSpec(dtype=dtype, shape=[2])
    assert refusal(frame(y=y)) == f"labels: dtype {called}; the run needs DTYPE_UINT8"


@pytest.mark.parametrize(("classes", "label"), [(10, 10), (10, 255), (300, 300), (300, 65_535)])
def test_a_label_out_of_range_is_refused(classes: int, label: int) -> None:
    spec = BatchSpec((1,), 8, classes)
    lying = BatchSpec((1,), 8, 256 if classes <= 256 else 65_536)
    sent = Smashed(torch.zeros(3, 1), torch.tensor([0, label, 1]))
    pieces = list(codec.pack_batch(pb.TrainRequest, 6, sent, lying))
    assert refusal(pieces, spec) == f"label {label} in batch 6: the run has {classes} classes"


@pytest.mark.parametrize(
    "values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38, math.nan]]
)
@pytest.mark.parametrize("place", [0, 1, 28])
def test_values_that_are_no_numbers_are_refused(values: list[float], place: int) -> None:
    sent = batch(3)
    sent.z.reshape(-1)[place : place + len(values)] = torch.tensor(values)
    said = refusal(list(codec.pack_batch(pb.TrainRequest, 5, sent, SPEC)))
    assert "activations of batch 5" in said
    assert "NaN or infinite" in said


@pytest.mark.parametrize("missing", [1, 2, 100, 241, 242])
def test_too_few_bytes_are_refused(missing: int) -> None:
    said = refusal(frame(data=bytes(242 - missing)))
    assert said == f"the stream ended {missing} bytes before the end of a frame of 242"


@pytest.mark.parametrize("extra", [1, 242, 100_000])
def test_too_many_bytes_are_refused(extra: int) -> None:
    assert "a frame of 242 declared bytes has more than" in refusal(frame(data=bytes(242 + extra)))


def test_too_many_bytes_in_a_later_piece_are_refused() -> None:
    later: Piece[Any] = Piece(pb.TrainRequest(), [memoryview(bytes(100))])
    assert "a frame of 242 declared bytes has more than" in refusal([*frame(data=bytes(200)), later])


def test_a_frame_that_begins_inside_another_is_refused() -> None:
    said = refusal([*frame(data=bytes(200)), *frame(data=bytes(42), sequence=2)])
    assert said == "a new frame began 42 bytes before the end of one of 242"


def test_a_piece_of_nothing_is_refused() -> None:
    empty: Piece[Any] = Piece(pb.TrainRequest())
    assert refusal([*frame(data=bytes(200)), empty]) == "a piece has neither head nor data"


@pytest.mark.parametrize(
    ("piece", "got"),
    [
        (Piece(pb.TrainRequest(), [memoryview(b"abc")]), "only data"),
        (Piece(pb.TrainRequest()), "only data"),
        (Piece(pb.TrainRequest(segment=pb.Segment())), "segment"),
    ],
)
def test_a_frame_without_its_head_is_refused(piece: Piece[Any], got: str) -> None:
    assert refusal([piece]) == f"expected the beginning of a frame (batch), got {got}"


def gradient_refusal(pieces: list[Piece[Any]], sequence: int = 9) -> str:
    first, *rest = pieces
    with pytest.raises(WireError) as caught:
        codec.unpack_gradient(first, iter(rest), sequence, (2, 3), SPEC)
    return str(caught.value)


def test_a_gradient_for_another_batch_is_refused() -> None:
    pieces = list(codec.pack_gradient(pb.TrainResponse, 8, torch.zeros(2, 3), SPEC, loss=0.0))
    assert gradient_refusal(pieces) == "the gradient of batch 8 came; that of batch 9 was due"


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (6,), (1, 3), (3, 3), ()])
def test_a_gradient_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    pieces = list(codec.pack_gradient(pb.TrainResponse, 9, torch.zeros(shape), SPEC, loss=0.0))
    assert f"gradient: shape {list(shape)}; the run needs [2, 3]" in gradient_refusal(pieces)


def test_a_gradient_of_another_type_is_refused() -> None:
    pieces = list(
        codec.pack_gradient(pb.TrainResponse, 9, torch.zeros(2, 3, dtype=torch.int64), SPEC, loss=0.0)
    )
    assert gradient_refusal(pieces) == "gradient: dtype DTYPE_INT64; the run needs DTYPE_FLOAT32"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_is_refused(value: float) -> None:
    pieces = list(codec.pack_gradient(pb.TrainResponse, 9, torch.full((2, 3), value), SPEC, loss=0.0))
    assert "the gradient of batch 9: NaN or infinite" in gradient_refusal(pieces)


def test_a_gradient_cut_short_is_refused() -> None:
    (whole,) = codec.pack_gradient(pb.TrainResponse, 9, torch.zeros(2, 3), SPEC)
    said = gradient_refusal([Piece(whole.head, [whole.chunks[0][:20]])])
    assert said == "the stream ended 4 bytes before the end of a frame of 24"


def weights_refusal(state: Mapping[str, Tensor], wanted: Mapping[str, Spec] | None = None) -> str:
    first, *rest = weights(state)
    with pytest.raises(WireError) as caught:
        codec.unpack_weights(first, iter(rest), specs(STATE) if wanted is None else wanted)
    return str(caught.value)


@pytest.mark.parametrize("name", STATE)
def test_weights_that_lack_a_tensor_are_refused(name: str) -> None:
    assert f"{name!r} differs" in weights_refusal({n: t for n, t in STATE.items() if n != name})


def test_weights_with_a_tensor_too_many_are_refused() -> None:
    assert "'bottom.extra' differs" in weights_refusal(STATE | {"bottom.extra": torch.zeros(1)})


def test_weights_in_another_order_are_refused() -> None:
    assert "'their order' differs" in weights_refusal(dict(reversed(STATE.items())))


def test_weights_that_name_a_tensor_twice_are_refused() -> None:
    first, *rest = weights()
    first.head.weights.tensors[1].CopyFrom(first.head.weights.tensors[0])
    with pytest.raises(WireError, match="differs"):
        codec.unpack_weights(first, iter(rest), specs(STATE))


def test_a_long_name_is_not_told_whole() -> None:
    assert len(weights_refusal(STATE | {"x" * 10_000: torch.zeros(1)})) < 200


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1), (6,), ()])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    said = weights_refusal(STATE | {"bottom.weight": torch.zeros(shape)})
    assert said == f"bottom.weight: shape {list(shape)}; the run needs [3, 2]"


def test_weights_of_another_type_are_refused() -> None:
    said = weights_refusal(STATE | {"bottom.batches": torch.tensor(1.0)})
    assert said == "bottom.batches: dtype DTYPE_FLOAT32; the run needs DTYPE_INT64"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    said = weights_refusal(STATE | {"bottom.scale": torch.tensor(value)})
    assert "bottom.scale: NaN or infinite" in said


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize("side", [0, -1, HUGE, 2**63 - 1])
def test_weights_of_a_huge_or_empty_shape_are_refused_unallocated(side: int) -> None:
    declared = pb.TensorSpec(dtype=F32, shape=[side, side])
    head = pb.Weights(tensors=[pb.NamedTensorSpec(name="w", spec=declared)])
    first = Piece(pb.SyncWeightsRequest(weights=head))
    with pytest.raises(WireError, match=r"w: shape .*; the run needs \[2, 2\]"):
        codec.unpack_weights(first, iter([]), {"w": (torch.float32, (2, 2))})


# ---------------------------------------------------------------- where the client has the last layers

BARE = BatchSpec(SPEC.cut_shape, SPEC.batch_size, SPEC.classes, labels=False, output_shape=(4, 3))
SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
KINDS = {
    "output": (pb.TrainResponse, pb.EvaluateResponse),
    "gradient": (pb.TrainRequest, pb.TrainResponse),
}


def cut_at(pieces: Iterator[Piece[Any]], kind: type[Any], cuts: list[int]) -> list[Piece[Any]]:
    """The same frame, its data cut at these places instead."""
    first, *rest = pieces
    data = b"".join(chunk for piece in (first, *rest) for chunk in piece.chunks)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [[memoryview(data)[i:j]] for i, j in itertools.pairwise(edges)]
    heads = [first.head, *(kind() for _ in parts[1:])]
    again = (Piece(head, part) for head, part in zip(heads, parts, strict=True))
    return over_the_wire(again, kind)


@settings(max_examples=60, deadline=None)
@given(
    what=st.sampled_from(["output", "gradient"]),
    which=st.integers(0, 1),
    shape=SHAPES,
    sequence=st.integers(0, 2**64 - 1),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    seed=st.integers(0, 99),
)
def test_an_output_and_a_gradient_come_out_of_any_pieces_with_equal_bits(
    what: str, which: int, shape: tuple[int, ...], sequence: int, cuts: list[int], seed: int
) -> None:
    kind = KINDS[what][which]
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if what == "output":
        first, *rest = cut_at(codec.pack_output(kind, sequence, sent, SPEC), kind, cuts)
        pieces = iter(rest)
        got: Tensor | None = codec.unpack_output(first, pieces, sequence, shape, SPEC)
    else:
        first, *rest = cut_at(codec.pack_gradient(kind, sequence, sent, SPEC), kind, cuts)
        pieces = iter(rest)
        got, loss = codec.unpack_gradient(first, pieces, sequence, shape, SPEC)
        assert loss == 0
    assert got is not None
    assert same_bits(got, sent)
    assert next(pieces, None) is None, "the whole frame was read, and nothing after it"


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 8),
    sequence=st.integers(0, 2**64 - 1),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    kind=st.sampled_from([pb.TrainRequest, pb.EvaluateRequest]),
)
def test_a_batch_without_labels_comes_out_of_any_pieces_with_equal_bits(
    samples: int, sequence: int, cuts: list[int], kind: type[Any]
) -> None:
    sent = batch(samples, seed=samples)
    packed = list(codec.pack_batch(kind, sequence, sent, BARE))
    assert sum(piece.size for piece in packed) == samples * 120, "not a byte of the labels"
    assert not packed[0].head.batch.HasField("labels")
    number, got = unpacked(cut_at(iter(packed), kind, cuts), BARE)
    assert number == sequence
    assert same_bits(got.z, sent.z)
    assert (tuple(got.y.shape), got.y.dtype) == ((0,), torch.int64)


def test_labels_where_they_stay_with_the_client_are_refused() -> None:
    whole = list(codec.pack_batch(pb.TrainRequest, 7, batch(2), SPEC))
    assert refusal(whole, BARE) == "batch 7 has labels; in this run they stay with the client"
    empty = frame(data=bytes(240))
    empty[0].head.batch.labels.CopyFrom(pb.TensorSpec())
    assert "has labels" in refusal(empty, BARE)


@pytest.mark.parametrize("piece_bytes", [10, 24, 50, 1 << 20])
@pytest.mark.parametrize(
    ("what", "kind", "mark"),
    [
        ("gradient", pb.TrainRequest, "of_gradient"),
        ("gradient", pb.TrainResponse, None),
        ("output", pb.TrainResponse, "of_output"),
        ("output", pb.EvaluateResponse, None),
    ],
)
def test_pieces_that_go_on_with_what_is_less_usual_in_their_direction_are_marked(
    what: str, kind: type[Any], mark: str | None, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    pack = codec.pack_output if what == "output" else codec.pack_gradient
    first, *rest = over_the_wire(pack(kind, 3, torch.ones(5, 6), SPEC), kind)
    assert first.head.WhichOneof("head") == what
    assert (len(rest) > 0) == (piece_bytes < 120)
    for piece in rest:
        assert piece.head == (kind(**{mark: True}) if mark else kind())


def output_refusal(pieces: list[Piece[Any]]) -> str:
    first, *rest = pieces
    with pytest.raises(WireError) as caught:
        codec.unpack_output(first, iter(rest), 9, (2, 3), SPEC)
    return str(caught.value)


@pytest.mark.parametrize(
    ("output", "sequence", "says"),
    [
        (torch.zeros(2, 3), 8, "the output of batch 8 came; that of batch 9 was due"),
        (torch.zeros(3, 2), 9, "output: shape [3, 2]; the run needs [2, 3]"),
        (torch.zeros(2, 3, dtype=torch.int64), 9, "output: dtype DTYPE_INT64; the run needs DTYPE_FLOAT32"),
        (torch.full((2, 3), math.nan), 9, "the output of batch 9: NaN or infinite"),
        (torch.full((2, 3), math.inf), 9, "the output of batch 9: NaN or infinite"),
    ],
)
def test_an_output_that_is_not_the_one_due_is_refused(output: Tensor, sequence: int, says: str) -> None:
    assert says in output_refusal(list(codec.pack_output(pb.TrainResponse, sequence, output, SPEC)))


def test_a_gradient_in_place_of_an_output_is_refused_and_the_other_way_about() -> None:
    gradient = list(codec.pack_gradient(pb.TrainResponse, 9, torch.zeros(2, 3), SPEC))
    output = list(codec.pack_output(pb.TrainResponse, 9, torch.zeros(2, 3), SPEC))
    assert output_refusal(gradient) == "expected the beginning of a frame (output), got gradient"
    assert gradient_refusal(output) == "expected the beginning of a frame (gradient), got output"


@pytest.mark.usefixtures("nothing_is_allocated")
@pytest.mark.parametrize("shape", [(2, HUGE), (HUGE, HUGE, HUGE), (-2, -3)])
def test_a_wrong_shape_of_an_output_is_refused_unallocated(shape: tuple[int, ...]) -> None:
    head = pb.Output(sequence=9, output=pb.TensorSpec(dtype=F32, shape=shape))
    assert "output: shape" in output_refusal([Piece(pb.TrainResponse(output=head))])
