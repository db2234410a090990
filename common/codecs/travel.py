"""How the tensors of a run travel: which codec each kind takes, and the dice that its rounding throws.

The dice of each tensor are its own, a pure function of seed, client, batch and way: so a run repeats, and
what one thread simulates rounds as the wire does.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.codecs import parse
from common.codecs.base import Codec, Parcel
from common.codecs.floats import fp32
from common.errors import ConfigError

KINDS = ("activations", "gradients")
# What clients that choose may choose from, the largest first. No fp8 nor plain integers: int8+zstd is
# smaller than the one and nearer than both; no topk: it needs more bytes than int2 for the same error.
LADDER = ("fp32", "fp16", "int8+zstd", "int4+zstd", "int3+zstd", "int2+zstd")


class Way(enum.IntEnum):
    """What a tensor is sent as. The numbers are part of the dice: they may not change."""

    BATCH = 0  # activations, up
    EXAM = 1  # activations to be scored, up
    OUTPUT = 2  # the server's output for the client's last layers, down
    EXAM_OUTPUT = 3
    GRADIENT = 4  # at the cut, down
    TAIL_GRADIENT = 5  # of an output, up


_EXAMS = (Way.EXAM, Way.EXAM_OUTPUT)


class Residuals:
    """Error feedback: what coding took away from a tensor is added to the next one of the same way.

    F. Seide et al., "1-Bit Stochastic Gradient Descent", 2014; S. P. Karimireddy et al., "Error Feedback
    Fixes SignSGD", 2019, https://arxiv.org/abs/1901.09847. There the tensor is of weights; here it is of a
    batch, and element meets element by its place, as where pipelines of layers are compressed (S. Bian et
    al., "Does Compressing Activations Help Model Parallel Training?", https://arxiv.org/abs/2301.02654).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Way, int], Tensor] = {}

    def added(self, way: Way, client: int, tensor: Tensor) -> Tensor:
        """The tensor (B, ...) and what is owed to its rows."""
        kept = self._kept.get((way, client))
        if kept is None:
            return tensor
        rows = min(len(kept), len(tensor))
        return torch.cat([tensor[:rows] + kept[:rows], tensor[rows:]])

    def keep(self, way: Way, client: int, lost: Tensor) -> None:
        """lost (B, ...): what the coding of that sum took away; other rows keep what they are owed."""
        kept = self._kept.get((way, client), lost)
        self._kept[way, client] = torch.cat([lost, kept[len(lost) :]])


@dataclass(frozen=True)
class Travel:
    """A codec for activations and outputs, and one for gradients.

    ladder: those that a client may choose from instead, by name; none where it has no choice.
    """

    activations: Codec = field(default_factory=fp32)
    gradients: Codec = field(default_factory=fp32)
    seed: int = 0
    ladder: Mapping[str, Codec] = field(default_factory=dict)
    _residuals: Residuals = field(default_factory=Residuals)

    @classmethod
    def of(cls, settings: Sequence[str], seed: int, chooses: bool = False) -> "Travel":
        """Of settings such as `activations=int4`. Raises ConfigError, naming what there is."""
        codecs = {}
        for text in (part for setting in settings for part in setting.split(",")):
            kind, _, name = text.partition("=")
            if kind not in KINDS:
                raise ConfigError(f"--codec {text}: say activations=NAME, gradients=NAME, or both")
            if kind in codecs:
                raise ConfigError(f"--codec {kind}=...: given twice; say it once")
            codecs[kind] = parse(name)
        ladder = {name: parse(name) for name in LADDER} if chooses else {}
        activations, gradients = (codecs.get(kind) or fp32() for kind in KINDS)
        return cls(activations, gradients, seed, ladder)

    def codec(self, way: Way, choice: str = "") -> Codec:
        """choice: of the ladder, where the sender has one."""
        if choice:
            return self.ladder[choice]
        return self.gradients if way in (Way.GRADIENT, Way.TAIL_GRADIENT) else self.activations

    def encode(self, way: Way, tensor: Tensor, client: int, sequence: int, choice: str = "") -> Parcel:
        """Of a batch's tensor (B, ...), where it lies. Raises WireError for values that are not finite."""
        numbers = np.random.SeedSequence([self.seed, client, sequence, way]).generate_state(1, np.uint64)
        dice = torch.Generator(tensor.device).manual_seed(int(numbers[0]) >> 1)
        codec, training = self.codec(way, choice), way not in _EXAMS
        if not (codec.feedback and training):
            return Parcel(codec, codec.encode(tensor, dice, training))
        whole = self._residuals.added(way, client, tensor.detach())
        parcel = Parcel(codec, codec.encode(whole, dice, training))
        self._residuals.keep(way, client, whole - parcel.open())
        return parcel

    def through(self, way: Way, tensor: Tensor, client: int, sequence: int) -> Tensor:
        """What arrives of the tensor (B, ...) at the other end, in its shape."""
        return self.encode(way, tensor, client, sequence).open()
