"""Auxiliary heads: what a client learns from when nothing comes back.

Each takes activations z (B, C, H, W) and gives logits (B, classes); `gap` and `flat` also take tokens
(B, T, D) and rows (B, N), which networks by name may have at the cut. None may change z in place: z is being
sent while the head works on it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from common.nets.resnet import Block
from common.objective import Loss
from common.run import MEAN, STD

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What a head may know of where it stands: one sample's activations and image, and what follows."""

    shape: Shape  # of z (C, H, W); or (T, D), or (N,)
    image: Shape  # (channels, height, width); or that of another input
    classes: int  # or the numbers of a target: as many outputs as the network has
    following: nn.Sequential  # only its architecture is read


def gap(cut: Cut) -> nn.Module:
    """Global average pool and one linear layer: C * classes + classes parameters.

    Of tokens it is their mean; rows are taken as they are.
    """
    if len(cut.shape) < 3:
        return nn.Sequential(_Mean(), nn.Linear(cut.shape[-1], cut.classes))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cut.shape[0], cut.classes))


def flat(cut: Cut) -> nn.Module:
    """One linear layer on all of z: the paper's head (arXiv 2601.19261, section III), read literally.

    Its inputs are the C*H*W post-ReLU values of z, not an average of them: it diverges at learning
    rates that suit the other heads (docs/methods.md).
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(cut.shape), cut.classes))


def mlp(cut: Cut) -> nn.Module:
    """2x2 pool and a 3 x 256 MLP: the head of the paper's authors' code, built whole.

    (There its first layer is rebuilt after the optimizer was made, and so never trains.)
    """
    widths = [4 * cut.shape[0], 256, 256, 256]
    layers = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *_mlp(widths)]
    return nn.Sequential(*layers, nn.Linear(256, cut.classes))


def conv(cut: Cut) -> nn.Module:
    """mlp-sr of decoupled greedy learning (Belilovsky et al. 2020, arXiv 1901.08164).

    Pool to a quarter of the side, three 1x1 convolutions, 2x2 pool, a 3-layer MLP, a linear layer.
    """
    channels, side = cut.shape[0], math.ceil(cut.shape[1] / 4)
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(side)]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), _BatchNorm2d(channels), nn.ReLU()]
    widths = [4 * channels] * 4
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *_mlp(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], cut.classes))


def strided(cut: Cut) -> nn.Module:
    """Two strided 3x3 convolutions to 32 and 64 channels, global average pool, one linear layer.

    A small copy of what the rest of the network does; with it the joined network learns most in the
    runs of benchmarks/accuracy.
    """
    channels = cut.shape[0]
    layers: list[nn.Module] = []
    for width in (32, 64):
        layers += [nn.Conv2d(channels, width, 3, 2, padding=1, bias=False), _BatchNorm2d(width), nn.ReLU()]
        channels = width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(channels, cut.classes))


def copy(cut: Cut, depth: int = 2) -> nn.Module:
    """AugLocal (Ma et al. 2024, arXiv 2402.17318): the rest of the network, thinned to `depth` blocks.

    They have the architecture, not the weights, of those at even steps from the cut to the end: of n
    layers 0 (the stem) to n - 1, l the last before the cut, those at round(l + (n - l - 1) / depth * i),
    i = 1..depth. Then global average pool and one linear layer. Our reading: depth 2, a half is rounded
    up, and shortcuts are the network's own (the authors' head has 1x1 convolutions there).
    """
    widths = [block.conv2.out_channels for block in cut.following if isinstance(block, Block)]
    depth = min(depth, len(widths))
    picked = [widths[math.floor(len(widths) / depth * i + 0.5) - 1] for i in range(1, depth + 1)]
    blocks = [Block(inputs, outputs) for inputs, outputs in pairwise([cut.shape[0], *picked])]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(picked[-1], cut.classes))


class InfoPro(nn.Module):
    """InfoPro (Wang et al. 2021, arXiv 2101.10832): z is to tell the class, and to keep the image.

    Its loss is 5 * reconstruction + 0.5 * classification: the binary cross-entropy of a decoder's
    image with x as pixels in [0, 1], and the cross-entropy of the logits. The layers are those of the
    authors' code, 1c2f and a decoder of two convolutions (whose first has no bias here: BatchNorm
    would take it away). The weights are theirs for a network in two parts where classification is a
    contrastive loss; to use them with cross-entropy is our reading.

    The decoder works only in training. What it asks of z has a price: the more z keeps of x, the
    easier it is for the server to invert z.
    """

    RECONSTRUCTION = 5.0
    CLASSIFICATION = 0.5

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        channels = cut.shape[0]
        width = min(2 * channels, 64)
        stride = 2 if width > channels else 1
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            _BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 128),
            nn.ReLU(),
            nn.Linear(128, cut.classes),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1, bias=False),
            _BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, cut.image[0], 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, classes)."""
        logits: Tensor = self.classifier(z)
        return logits

    def loss(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """z (B, C, H, W), x (B, channels, height, width) as it is trained on, y (B,) -> ()."""
        enlarged = F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=True)
        pixels = x * STD + MEAN  # in [0, 1]
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(enlarged), pixels)
        classification = F.cross_entropy(self(z), y)
        return self.RECONSTRUCTION * reconstruction + self.CLASSIFICATION * classification


def local_loss(head: nn.Module, z: Tensor, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """What a client minimises (): the head's own loss if it has one, else this one of what the head gives."""
    return head.loss(z, x, y) if isinstance(head, InfoPro) else loss(head(z), y)


class _Mean(nn.Module):
    """Of tokens (B, T, D) -> (B, D); of rows (B, N) themselves."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mean(1) if z.dim() == 3 else z


def _mlp(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), _BatchNorm1d(outputs), nn.ReLU()]
    return layers


class _OneValue(_BatchNorm):
    """One value a channel has no variance and gets the running one: the last sample of an epoch, perhaps."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return super().forward(x)


class _BatchNorm1d(_OneValue, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_OneValue, nn.BatchNorm2d):
    pass


HEADS: dict[str, Callable[[Cut], nn.Module]] = {
    "gap": gap,
    "flat": flat,
    "mlp": mlp,
    "conv": conv,
    "strided": strided,
    "copy": copy,
    "infopro": InfoPro,
}


def build_head(name: str, cut: Cut) -> nn.Module:
    """The head of this name for this cut. Raises ConfigError."""
    if name not in HEADS:
        raise ConfigError(f"--head {name!r}: choose from {', '.join(HEADS)}")
    if name not in ("gap", "flat") and len(cut.shape) != 3:
        raise ConfigError(
            f"--head {name}: takes maps (C, H, W), and at this cut {list(cut.shape)} crosses; choose gap or "
            "flat"
        )
    if name == "infopro" and len(cut.image) != 3:
        raise ConfigError(
            f"--head infopro: keeps the image, and the network takes {list(cut.image)}; choose gap or flat"
        )
    if name == "copy" and not any(isinstance(layer, Block) for layer in cut.following):
        raise ConfigError("--head copy: copies the blocks of a resnetN, and none follow; choose another")
    return HEADS[name](cut)
