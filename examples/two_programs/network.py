"""The network, which both programs have. Any nn.Module that torch.export can follow will do."""

from torch import nn


def build(num_classes: int = 10) -> nn.Module:
    """For images (B, 3, 32, 32); logits (B, num_classes)."""
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 16, 3, stride=2, padding=1))
    network.add_module("norm", nn.BatchNorm2d(16))
    network.add_module("relu", nn.ReLU())
    network.add_module("pool", nn.MaxPool2d(2))  # (B, 16, 8, 8): here it is cut
    network.add_module("deep", nn.Conv2d(16, 32, 3, padding=1))
    network.add_module("deep_relu", nn.ReLU())
    network.add_module("flat", nn.Flatten())
    network.add_module("classify", nn.Linear(32 * 8 * 8, num_classes))
    return network
