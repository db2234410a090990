"""ResNets for small images (He et al. 2016, section 4.2, https://arxiv.org/abs/1512.03385).

6n+2 layers: a stem, three stages of n basic blocks with 16, 32, 64 channels, and a classifier.
Shortcuts are option A: where a stage begins, every second pixel, padded with zero channels.
ResNet-110 has exactly 1,727,962 parameters for 10 classes.

Weights lie in memory with the channels of one pixel side by side (channels last), and with them the
activations: convolutions of so few channels are faster so (benchmarks/layout).
"""

from torch import Tensor, channels_last, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels_in == channels else 2
        self.grow = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels, H / stride, W / stride), halves rounded up."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        """As `forward`'s shapes: x itself, or every stride-th pixel with channels of zeros around."""
        if self.grow == 0:
            return x
        before = self.grow // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grow - before))


def resnet(depth: int, classes: int, channels: int = 3) -> nn.Sequential:
    """stem, (depth - 2) / 2 blocks, classifier: a flat Sequential, so that it can be cut anywhere.

    Takes (B, channels, H, W), gives logits (B, classes). `initialise` gives it its first weights.
    """
    assert depth % 6 == 2, f"depth {depth} is not 6n+2"
    per_stage = (depth - 2) // 6
    stem = nn.Sequential(
        nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(inplace=True),
    )
    blocks, last = [], WIDTHS[0]
    for width in WIDTHS:
        for _ in range(per_stage):
            blocks.append(Block(last, width))
            last = width
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))
    return nn.Sequential(stem, *blocks, classifier).to(memory_format=channels_last)
