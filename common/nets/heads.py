"""Auxiliary heads: what a client learns from when nothing comes back.

Each takes activations z (B, C, H, W) and gives logits (B, classes). None may change z in place:
z is being sent while the head works on it.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConfigError

Shape = tuple[int, int, int]


def gap(shape: Shape, classes: int) -> nn.Module:
    """Global average pool and one linear layer: C * classes + classes parameters."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))


def flat(shape: Shape, classes: int) -> nn.Module:
    """One linear layer on all of z: the paper's head (arXiv 2601.19261, section III), read literally.

    Its inputs are the C*H*W post-ReLU values of z, not an average of them: it diverges at learning
    rates that suit the other heads (docs/methods.md).
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def mlp(shape: Shape, classes: int) -> nn.Module:
    """2x2 pool and a 3 x 256 MLP: the head of the paper's authors' code, built whole.

    (There its first layer is rebuilt after the optimizer was made, and so never trains.)
    """
    widths = [4 * shape[0], 256, 256, 256]
    layers = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *_mlp(widths)]
    return nn.Sequential(*layers, nn.Linear(256, classes))


def conv(shape: Shape, classes: int) -> nn.Module:
    """mlp-sr of decoupled greedy learning (Belilovsky et al. 2020, arXiv 1901.08164).

    Pool to a quarter of the side, three 1x1 convolutions, 2x2 pool, a 3-layer MLP, a linear layer.
    """
    channels, side = shape[0], math.ceil(shape[1] / 4)
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(side)]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    widths = [4 * channels] * 4
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *_mlp(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def strided(shape: Shape, classes: int) -> nn.Module:
    """Two strided 3x3 convolutions to 32 and 64 channels, global average pool, one linear layer.

    A small copy of what the rest of the network does; with it the joined network learns most in the
    runs of benchmarks/accuracy.
    """
    channels = shape[0]
    layers: list[nn.Module] = []
    for width in (32, 64):
        layers += [nn.Conv2d(channels, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(channels, classes))


def _mlp(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), _BatchNorm1d(outputs), nn.ReLU()]
    return layers


class _BatchNorm1d(nn.BatchNorm1d):
    """A batch of one sample, the last of an epoch perhaps, has no variance: it gets the running one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return super().forward(x)


HEADS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "gap": gap,
    "flat": flat,
    "mlp": mlp,
    "conv": conv,
    "strided": strided,
}


def build_head(name: str, shape: Shape, classes: int) -> nn.Module:
    """The head for activations of one sample's `shape` (C, H, W). Raises ConfigError."""
    if name not in HEADS:
        raise ConfigError(f"--head {name!r}: choose from {', '.join(HEADS)}")
    return HEADS[name](shape, classes)
