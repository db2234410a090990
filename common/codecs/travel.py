"""How the tensors of a run travel: which codec each kind takes, and the dice that its rounding throws.

The dice of each tensor are its own, a pure function of seed, client, batch and way: so a run repeats, and
what one thread simulates rounds as the wire does.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.codecs import parse
from common.codecs.base import Codec, Encoded
from common.codecs.floats import fp32
from common.errors import ConfigError

KINDS = ("activations", "gradients")


class Way(enum.IntEnum):
    """What a tensor is sent as. The numbers are part of the dice: they may not change."""

    BATCH = 0  # activations, up
    EXAM = 1  # activations to be scored, up
    OUTPUT = 2  # the server's output for the client's last layers, down
    EXAM_OUTPUT = 3
    GRADIENT = 4  # at the cut, down
    TAIL_GRADIENT = 5  # of an output, up


@dataclass(frozen=True)
class Travel:
    """A codec for activations and outputs, and one for gradients."""

    activations: Codec = field(default_factory=fp32)
    gradients: Codec = field(default_factory=fp32)
    seed: int = 0

    @classmethod
    def of(cls, settings: Sequence[str], seed: int) -> "Travel":
        """Of settings such as `activations=int4`. Raises ConfigError, naming what there is."""
        codecs = {}
        for text in settings:
            kind, _, name = text.partition("=")
            if kind not in KINDS:
                raise ConfigError(f"--codec {text}: say activations=NAME, gradients=NAME, or both")
            if kind in codecs:
                raise ConfigError(f"--codec {kind}=...: given twice; say it once")
            codecs[kind] = parse(name)
        return cls(**codecs, seed=seed)

    def codec(self, way: Way) -> Codec:
        return self.gradients if way in (Way.GRADIENT, Way.TAIL_GRADIENT) else self.activations

    def encode(self, way: Way, tensor: Tensor, client: int, sequence: int) -> Encoded:
        """Of a batch's tensor, where it lies. Raises WireError for values that are not finite."""
        numbers = np.random.SeedSequence([self.seed, client, sequence, way]).generate_state(1, np.uint64)
        dice = torch.Generator(tensor.device).manual_seed(int(numbers[0]) >> 1)
        training = way not in (Way.EXAM, Way.EXAM_OUTPUT)
        return self.codec(way).encode(tensor, dice, training)

    def through(self, way: Way, tensor: Tensor, client: int, sequence: int) -> Tensor:
        """What arrives of the tensor at the other end."""
        return self.codec(way).decode(self.encode(way, tensor, client, sequence))
