"""What a codec is: a tensor made small for the wire, and the tensor that is made of it again.

Dimension key: B batch, C channels, N elements of one map (height by width), D of one sample (C * N).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.errors import WireError

Shape = tuple[int, ...]
MOST_ELEMENTS = 2**31 - 1  # so that an index within a sample is an int32


@dataclass(frozen=True)
class Slot:
    """A tensor of a payload, known from the shape of what was encoded alone.

    opened: bytes that a compressed tensor must come to; its shape is (n,), of which 1 to n elements come.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    opened: int = 0

    @property
    def size(self) -> int:
        """Bytes, at most."""
        return self.dtype.itemsize * math.prod(self.shape)

    def holds(self, dtype: torch.dtype, shape: Shape) -> bool:
        if self.opened:
            return dtype == self.dtype and len(shape) == 1 and 1 <= shape[0] <= self.shape[0]
        return dtype == self.dtype and shape == self.shape


@dataclass(frozen=True)
class Sizes:
    """Bytes of a payload: at least, at most; and what it takes once it is decompressed, exactly."""

    least: int
    most: int
    opened: int


@dataclass(frozen=True)
class Encoded:
    """shape: of the tensor that was encoded. tensors: the payload, which the codec's layout describes."""

    shape: Shape
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Parcel:
    """A tensor as it travelled: it opens to what arrived, as often as asked."""

    codec: "Codec"
    encoded: Encoded

    @property
    def size(self) -> int:
        """Bytes that it takes, closed."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.encoded.tensors)

    def open(self) -> Tensor:
        """(B, C, ...) float32, anew each time. Raises WireError for a payload that is malformed."""
        return self.codec.decode(self.encoded)


Pack = Callable[[Tensor, Generator, bool], list[Tensor]]  # x float32, contiguous; whether in training
Unpack = Callable[[Sequence[Tensor], Shape], Tensor]  # of tensors that the layout holds; to float32
Layout = Callable[[Shape], tuple[Slot, ...]]


@dataclass(frozen=True)
class Codec:
    """How float32 tensors (B, C, ...) travel. Nothing is changed in place, and nothing remembered.

    chance: whether encoding draws from the generator. feedback: whether who sends is to add what encoding
    took away to the next tensor. What is decoded lies where the payload does, CPU or GPU, and is finite.
    """

    name: str
    pack: Pack
    unpack: Unpack
    layout: Layout
    chance: bool = False
    feedback: bool = False

    def encode(self, tensor: Tensor, generator: Generator, training: bool) -> Encoded:
        """tensor (B, C, ...) float32. Raises WireError for values that are NaN or infinite. fp32's
        payload shares the tensor's memory."""
        shape = self._judged(tuple(tensor.shape))
        if tensor.dtype != torch.float32:
            raise WireError(f"{self.name}: encodes torch.float32; this is {tensor.dtype}")
        return Encoded(shape, self.pack(tensor.detach().contiguous(), generator, training))

    def decode(self, encoded: Encoded) -> Tensor:
        """(B, C, ...) float32, as it was encoded. Raises WireError for a payload that is malformed. fp32's
        result shares the payload's memory."""
        self.judge(encoded.shape, [(tensor.dtype, tuple(tensor.shape)) for tensor in encoded.tensors])
        return self.unpack(encoded.tensors, encoded.shape)

    def judge(self, shape: Shape, declared: Sequence[tuple[torch.dtype, Shape]]) -> None:
        """Whether tensors of these types and shapes can be such a tensor's payload; before they are made.

        Raises WireError if not.
        """
        slots = self.layout(self._judged(shape))
        if len(declared) != len(slots):
            raise WireError(f"{self.name}: {len(declared)} tensors came; {len(slots)} were due")
        for slot, (dtype, came) in zip(slots, declared, strict=True):
            if not slot.holds(dtype, came):
                due = f"{slot.dtype} {'1 to ' if slot.opened else ''}{list(slot.shape)}"
                raise WireError(f"{self.name}: {slot.name}: {dtype} {list(came)[:8]} came; {due} was due")

    def sizes(self, shape: Shape) -> Sizes:
        """Bytes that a tensor of this shape is sent in, without allocating any."""
        slots = self.layout(self._judged(shape))
        return Sizes(
            least=sum(1 if slot.opened else slot.size for slot in slots),
            most=sum(slot.size for slot in slots),
            opened=sum(slot.opened or slot.size for slot in slots),
        )

    def _judged(self, shape: Shape) -> Shape:
        if not 2 <= len(shape) <= 8 or min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
            raise WireError(
                f"{self.name}: shape {list(shape)[:8]} is not (batch, channels, ...) of 1 or more"
            )
        return shape


def refuse_unless_finite(what: str, *tensors: Tensor) -> None:
    """Extremes, scales or values, of any shape. Raises WireError, saying what they are of."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise WireError(f"{what}: NaN or infinite values; lower the learning rate or check the data")
