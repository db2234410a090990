"""Tensors as frames of pieces, and back; the only judge of what comes in.

A frame is a head, which declares tensors, and their elements in pieces. Its size is known, and
checked against what the run says it must be, before anything is allocated; then the pieces are
written straight into one buffer. What leaves here needs no further check.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.codecs import Codec, Encoded, Parcel, split
from common.codecs.travel import Travel, Way
from common.errors import WireError
from common.methods.base import Method, Smashed, Tail
from common.nets.cut import CutNet, shape_after
from common.parts import Spec, State, after_cut
from common.run import Run
from common.wire import prediction_pb2 as prediction
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import PIECE_BYTES, Digest, Head, Piece

_CODES: Mapping[torch.dtype, pb.Dtype] = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.int64: pb.DTYPE_INT64,
    torch.uint8: pb.DTYPE_UINT8,
    torch.uint16: pb.DTYPE_UINT16,
    torch.float16: pb.DTYPE_FLOAT16,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.int32: pb.DTYPE_INT32,
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}
# Every codec that there is, by its name: what both ends know is agreed on at Join.
CODEC_NAMES: Mapping[pb.Codec, str] = {
    pb.CODEC_FP32: "fp32",
    pb.CODEC_FP16: "fp16",
    pb.CODEC_BF16: "bf16",
    pb.CODEC_FP8: "fp8",
    pb.CODEC_INT8: "int8",
    pb.CODEC_INT4: "int4",
    pb.CODEC_INT3: "int3",
    pb.CODEC_INT2: "int2",
    pb.CODEC_TOPK: "topk",
    pb.CODEC_RANDTOPK: "randtopk",
}
_NAMED = {name: code for code, name in CODEC_NAMES.items()}
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class BatchSpec:
    """What a batch of this run must be: z (1..batch_size, *cut_shape) float32, 0 <= y < classes; or, where
    targets are numbers, so many of them a sample, y (B, numbers) float32."""

    cut_shape: tuple[int, ...]
    batch_size: int
    classes: int
    labels: bool = True  # they travel
    output_shape: tuple[int, ...] = ()  # of one sample's output u, for a client that has the last layers
    travel: Travel = field(default_factory=Travel)
    numbers: int = 0

    @property
    def label_dtype(self) -> torch.dtype:
        if self.numbers:
            return torch.float32
        return torch.uint8 if self.classes <= 256 else torch.uint16

    def label_shape(self, samples: int) -> tuple[int, ...]:
        return (samples, self.numbers) if self.numbers else (samples,)


def batch_spec(run: Run, method: Method, net: CutNet) -> BatchSpec:
    """What both ends know of the run's batches."""
    output = shape_after(after_cut(net, method)[0], net.cut_shape) if method.tail is Tail.LAST else ()
    return BatchSpec(
        net.cut_shape,
        run.batch_size,
        run.class_count,
        labels=method.tail is Tail.NONE,
        output_shape=output,
        travel=Travel.of(run.codec, run.seed, run.chooses),
        numbers=run.numbers,
    )


def unknown(travel: Travel, known: Collection[pb.Codec]) -> list[str]:
    """The codecs that the run needs, by name, of which a client does not say that it knows them."""
    needed = {split(codec.name)[0] for codec in (travel.activations, travel.gradients)}
    ladder = {split(name)[0] for name in travel.ladder}
    return sorted(name for name in (needed | ladder) - {"fp32"} if _NAMED[name] not in known)


def pack_batch(
    kind: type[Head], sequence: int, batch: Smashed, spec: BatchSpec, client: int = 0, choice: str = ""
) -> Iterator[Piece[Head]]:
    """The pieces of one batch of this client, for the RPC whose request is `kind`.

    choice: the codec, of the run's ladder, where the client chooses it.
    """
    way = Way.EXAM if kind in (pb.EvaluateRequest, prediction.PredictRequest) else Way.BATCH
    head = pb.Batch(sequence=sequence, activations=_describe(batch.z))
    if choice:
        codec, _, zstd, _ = split(choice)
        head.codec.CopyFrom(pb.CodecSpec(codec=_NAMED[codec], zstd=zstd))
    y = []
    if spec.labels:
        y = [_on_host(batch.y).to(spec.label_dtype)]
        head.labels.CopyFrom(_describe(y[0]))
    return _pack(kind, "batch", head, batch.z, _Sending(spec.travel, way, client, sequence, choice), y)


def sealed(frame: Iterable[Piece[Any]]) -> list[Piece[Any]]:
    """The pieces of batches, with the digest of its data in each one's head."""
    whole = list(frame)
    for index, piece in enumerate(whole):
        if piece.head.WhichOneof("head") == "batch":
            digest = Digest(piece, iter(whole[index + 1 :]))
            for _ in digest:
                pass
            piece.head.batch.digest = digest.value
    return whole


@dataclass(frozen=True)
class Arrived(Smashed):
    """A batch as it came: z on the host, y as int64 or float32; its number, and its activations, closed."""

    sequence: int
    parcel: Parcel


def unpack_skipped(piece: Piece[Any], spec: BatchSpec, whole: bool = False) -> tuple[int, int]:
    """The number of a batch that its client does not send, and its samples; whole: it stands for all of its
    epoch. Raises WireError."""
    skipped: pb.Skipped = piece.head.skipped
    if piece.size or not (spec.travel.ladder or whole):
        raise WireError(f"batch {skipped.sequence} is skipped; in this run every batch is sent, or has data")
    if not whole:
        _check_samples(skipped.samples, spec)
    return skipped.sequence, skipped.samples


def unpack_batch(first: Piece[Any], rest: Iterator[Piece[Any]], spec: BatchSpec) -> Arrived:
    """A batch of the run. Raises WireError."""
    head: pb.Batch = _head(first, "batch")
    samples = _samples(head.activations, spec)
    shape = (samples, *spec.cut_shape)
    _expect("activations", head.activations, (torch.float32, shape))
    labelled: list[Spec] = []
    if spec.labels:
        _expect("labels", head.labels, (spec.label_dtype, spec.label_shape(samples)))
        labelled = [_declared(head.labels)]
    elif head.HasField("labels"):
        raise WireError(f"batch {head.sequence} has labels; in this run they stay with the client")
    parcel, labels = _unpack(first, rest, head.payload, shape, _chosen(head, spec.travel), labelled)
    z = _opened(f"activations of batch {head.sequence}", parcel)
    y = _judged(labels[0], head.sequence, spec) if labels else torch.empty(0, dtype=torch.int64)
    return Arrived(z, y, head.sequence, parcel)


def _judged(labels: Tensor, sequence: int, spec: BatchSpec) -> Tensor:
    """Labels as they are learned from. Raises WireError where they cannot be of the run."""
    if spec.numbers:
        _check_finite(f"the targets of batch {sequence}", labels)
        return labels
    y = labels.long()
    if int(y.max()) >= spec.classes:
        raise WireError(f"label {int(y.max())} in batch {sequence}: the run has {spec.classes} classes")
    return y


def pack_gradient(
    kind: type[Head],
    sequence: int,
    gradient: Tensor | None,
    spec: BatchSpec,
    client: int = 0,
    loss: float | None = None,
) -> Iterator[Piece[Head]]:
    """A gradient (B, ...) of the batch of this number; none, as an answer to one that had no part in the
    step. loss: mean cross-entropy in nats. Raises WireError where it is not finite."""
    head = pb.Gradient(sequence=sequence, loss=loss or 0)
    if gradient is None:
        return _cut(kind, {"gradient": head}, [])
    head.gradient.CopyFrom(_describe(gradient))
    up = kind is pb.TrainRequest
    sending = _Sending(spec.travel, Way.TAIL_GRADIENT if up else Way.GRADIENT, client, sequence)
    return _pack(kind, "gradient", head, gradient, sending, later={"of_gradient": True} if up else {})


def unpack_gradient(
    first: Piece[Any], rest: Iterator[Piece[Any]], sequence: int, shape: tuple[int, ...], spec: BatchSpec
) -> tuple[Tensor | None, float]:
    """A gradient of this shape, or None, of the batch of this number, and the sender's loss.

    Raises WireError.
    """
    head: pb.Gradient = _head(first, "gradient")
    _due("gradient", head.sequence, sequence)
    if not head.HasField("gradient") and not first.size:
        return None, head.loss
    _expect("gradient", head.gradient, (torch.float32, shape))
    parcel, _ = _unpack(first, rest, head.payload, shape, spec.travel.gradients)
    return _opened(f"the gradient of batch {sequence}", parcel), head.loss


def pack_output(
    kind: type[Head], sequence: int, output: Tensor, spec: BatchSpec, client: int = 0
) -> Iterator[Piece[Head]]:
    """What the server's layers made of a batch, (B, ...), for a client that has the last ones. Raises
    WireError where it is not finite."""
    head = pb.Output(sequence=sequence, output=_describe(output))
    training = kind is pb.TrainResponse
    sending = _Sending(spec.travel, Way.OUTPUT if training else Way.EXAM_OUTPUT, client, sequence)
    return _pack(kind, "output", head, output, sending, later={"of_output": True} if training else {})


def unpack_output(
    first: Piece[Any], rest: Iterator[Piece[Any]], sequence: int, shape: tuple[int, ...], spec: BatchSpec
) -> Tensor:
    """The output of this shape for the batch of this number. Raises WireError."""
    head: pb.Output = _head(first, "output")
    _due("output", head.sequence, sequence)
    _expect("output", head.output, (torch.float32, shape))
    parcel, _ = _unpack(first, rest, head.payload, shape, spec.travel.activations)
    return _opened(f"the output of batch {sequence}", parcel)


def pack_weights(kind: type[Head], head: pb.Weights, state: State) -> Iterator[Piece[Head]]:
    """The pieces of a part. `head` says whose, when and why; the tensors are added to a copy of it."""
    tensors = {name: _on_host(tensor) for name, tensor in state.items()}
    full = pb.Weights()
    full.CopyFrom(head)
    full.tensors.extend(pb.NamedTensorSpec(name=n, spec=_describe(t)) for n, t in tensors.items())
    return _cut(kind, {"weights": full}, list(tensors.values()))


def unpack_weights(
    first: Piece[Any], rest: Iterator[Piece[Any]], specs: Mapping[str, Spec]
) -> tuple[pb.Weights, State]:
    """A part with exactly these tensors, or with none at all. Raises WireError."""
    head: pb.Weights = _head(first, "weights")
    names = [tensor.name for tensor in head.tensors]
    if names and names != list(specs):
        odd = next(iter(set(names) ^ set(specs)), "their order")
        raise WireError(f"the weights are not those of this run's client part: {odd[:80]!r} differs")
    for declared in head.tensors:
        _expect(declared.name, declared.spec, specs[declared.name])
    tensors = _assemble(first, rest, [specs[name] for name in names])
    state = dict(zip(names, tensors, strict=True))
    for name, tensor in state.items():
        if tensor.is_floating_point():
            _check_finite(name, tensor)
    return head, state


def declared_bytes(spec: pb.TensorSpec) -> int:
    """What a tensor's elements take, if it is what it says; 0 for types and shapes that cannot be."""
    if spec.dtype not in _TYPES or len(spec.shape) > 8 or any(side < 0 for side in spec.shape):
        return 0
    size = _TYPES[spec.dtype].itemsize * math.prod(spec.shape)
    return size if size < 2**62 else 0


class _Sending(NamedTuple):
    """With which codecs a tensor is sent, as what, of whose batch, and what its client chose, if it did."""

    travel: Travel
    way: Way
    client: int
    sequence: int
    choice: str = ""

    @property
    def codec(self) -> Codec:
        return self.travel.codec(self.way, self.choice)

    def encode(self, tensor: Tensor) -> Parcel:
        return self.travel.encode(self.way, tensor, self.client, self.sequence, self.choice)


def _pack(
    kind: type[Head],
    field: str,
    head: Any,
    tensor: Tensor,
    sending: _Sending,
    others: Sequence[Tensor] = (),
    later: Mapping[str, Any] = _NOTHING,
) -> Iterator[Piece[Head]]:
    """A frame of the tensor, encoded, and the others as they are.

    On a GPU it is encoded at once, so that what crosses to the host is small; and with error feedback, so
    that batches are in their order; else by whoever pulls the pieces, beside the thread that computes.
    """
    at_once = tensor.device.type != "cpu" or sending.codec.feedback
    early = _encode(head, tensor, sending) if at_once else None

    def pieces() -> Iterator[Piece[Head]]:
        payload = early or _encode(head, tensor, sending)
        yield from _cut(kind, {field: head}, [*payload, *others], later)

    return pieces()


def _encode(head: Any, tensor: Tensor, sending: _Sending) -> list[Tensor]:
    """The payload, on the host; the head is told of it."""
    if _is_plain(sending.codec):
        return [_on_host(tensor)]
    payload = [_on_host(part) for part in sending.encode(tensor).encoded.tensors]
    head.payload.extend(map(_describe, payload))
    return payload


def _unpack(
    first: Piece[Any],
    rest: Iterator[Piece[Any]],
    declared: Sequence[pb.TensorSpec],
    shape: tuple[int, ...],
    codec: Codec,
    others: Sequence[Spec] = (),
) -> tuple[Parcel, list[Tensor]]:
    """The tensor of this shape as it was encoded, and the others. Raises WireError."""
    if _is_plain(codec):
        if declared:
            raise WireError(f"a payload of {len(declared)} tensors; in this run tensors travel as they are")
        tensor, *plain = _assemble(first, rest, [(torch.float32, shape), *others])
        return Parcel(codec, Encoded(shape, [tensor])), plain
    for spec in declared:
        if spec.dtype not in _TYPES:
            raise WireError(f"{codec.name}: dtype {spec.dtype} is unknown")
    payload = [_declared(spec) for spec in declared]
    codec.judge(shape, payload)  # before anything is allocated
    tensors = _assemble(first, rest, [*payload, *others])
    return Parcel(codec, Encoded(shape, tensors[: len(payload)])), tensors[len(payload) :]


def _opened(name: str, parcel: Parcel) -> Tensor:
    """What arrived. Raises WireError, that tells the name, unless it is finite."""
    tensor = parcel.encoded.tensors[0] if _is_plain(parcel.codec) else parcel.open()
    _check_finite(name, tensor)
    return tensor


def _chosen(head: pb.Batch, travel: Travel) -> Codec:
    """The codec that the batch says, of those that the run lets it choose; else the run's."""
    if not head.HasField("codec"):
        return travel.activations
    name = CODEC_NAMES.get(head.codec.codec, f"codec {head.codec.codec}") + "+zstd" * head.codec.zstd
    if name not in travel.ladder:
        there = ", ".join(travel.ladder) or "that of the run only"
        raise WireError(f"batch {head.sequence} comes as {name}; it may as {there}")
    return travel.ladder[name]


def _is_plain(codec: Codec) -> bool:
    return codec.name == "fp32"


def _head(piece: Piece[Any], field: str) -> Any:
    if piece.head.WhichOneof("head") != field:
        got = piece.head.WhichOneof("head") or "only data"
        raise WireError(f"expected the beginning of a frame ({field}), got {got}")
    return getattr(piece.head, field)


def _due(what: str, came: int, due: int) -> None:
    if came != due:
        raise WireError(f"the {what} of batch {came} came; that of batch {due} was due")


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _describe(tensor: Tensor) -> pb.TensorSpec:
    if tensor.dtype not in _CODES:
        raise WireError(f"{tensor.dtype} cannot be sent; it can as {', '.join(map(str, _CODES))}")
    return pb.TensorSpec(dtype=_CODES[tensor.dtype], shape=tensor.shape)


def _declared(spec: pb.TensorSpec) -> Spec:
    return _TYPES[spec.dtype], tuple(spec.shape)


def _samples(spec: pb.TensorSpec, rule: BatchSpec) -> int:
    samples = spec.shape[0] if spec.shape else 0
    _check_samples(samples, rule)
    return samples


def _check_samples(samples: int, rule: BatchSpec) -> None:
    if not 1 <= samples <= rule.batch_size:
        raise WireError(f"a batch of {samples} samples: the run allows 1 to {rule.batch_size}")


def _expect(name: str, spec: pb.TensorSpec, wanted: Spec) -> None:
    dtype, shape = wanted
    if spec.dtype != _CODES[dtype]:
        code = pb.Dtype.Name(spec.dtype) if spec.dtype in pb.Dtype.values() else spec.dtype
        raise WireError(f"{name}: dtype {code}; the run needs {pb.Dtype.Name(_CODES[dtype])}")
    if tuple(spec.shape) != shape:
        raise WireError(f"{name}: shape {list(spec.shape)[:8]}; the run needs {list(shape)}")


def _check_finite(name: str, tensor: Tensor) -> None:
    # One pass over the data: a sum is finite unless an element is not, or the sum overflows.
    if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
        raise WireError(f"{name}: NaN or infinite values; lower the learning rate or check the data")


def _cut(
    kind: type[Head], head: Mapping[str, Any], tensors: Sequence[Tensor], later: Mapping[str, Any] = _NOTHING
) -> Iterator[Piece[Head]]:
    """Pieces of equal size of about a megabyte; the first has the head, those after it have `later`."""
    views = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
    total = sum(view.nbytes for view in views)
    size = math.ceil(total / max(1, round(total / PIECE_BYTES)))
    message = kind(**head)
    for chunks in _chunks(views, size):
        yield Piece(message, chunks)
        message = kind(**later)
    if total == 0:
        yield Piece(message)


def _chunks(views: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    chunks: list[memoryview] = []
    room = size
    for view in views:
        while view.nbytes:
            chunk, view = view[:room], view[room:]
            chunks.append(chunk)
            room -= chunk.nbytes
            if room == 0:
                yield chunks
                chunks, room = [], size
    if chunks:
        yield chunks


def _assemble(first: Piece[Any], rest: Iterator[Piece[Any]], specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of a frame: views of one buffer, which the pieces fill."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs]
    buffer = _fill(first, rest, sum(sizes))
    tensors = []
    for (dtype, shape), part in zip(specs, buffer.split(sizes), strict=True):
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        tensors.append(aligned.view(dtype).view(shape))
    return tensors


def _fill(piece: Piece[Any], rest: Iterator[Piece[Any]], size: int) -> Tensor:
    # Pinned where there is a GPU, so that the copy to it needs no second one.
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    view, filled = buffer.numpy().data, 0
    while True:
        for chunk in piece.chunks:
            if filled + chunk.nbytes > size:
                raise WireError(f"a frame of {size} declared bytes has more than {filled + chunk.nbytes - 1}")
            view[filled : filled + chunk.nbytes] = chunk
            filled += chunk.nbytes
        if filled == size:
            return buffer
        following = next(rest, None)
        if following is None:
            raise WireError(f"the stream ended {size - filled} bytes before the end of a frame of {size}")
        if following.head.WhichOneof("head"):
            raise WireError(f"a new frame began {size - filled} bytes before the end of one of {size}")
        if not following.size:
            raise WireError("a piece has neither head nor data")
        piece = following
