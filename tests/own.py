"""Code of a user's own, as its tests name it: losses, metrics and data sets, some of which cannot be."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

# ---------------------------------------------------------------- losses and metrics


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def top_2(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.topk(2, 1).indices == targets[:, None]).any(1)


def each(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def a_number(outputs: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(outputs, targets).item()


def constant(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(1.0)


def broken(outputs: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("weights of 3 classes\nfor 4 outputs")


def fails_later(outputs: Tensor, targets: Tensor) -> Tensor:
    if len(outputs) > 3:
        raise RuntimeError("too many")
    return F.cross_entropy(outputs, targets)


# ---------------------------------------------------------------- networks of other inputs


class Rows(nn.Module):
    """(B, 6) float32 -> (B, outputs)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.example_input = torch.zeros(1, 6)
        self.first, self.last = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x))
        return out


def rows(num_classes: int) -> nn.Module:
    return Rows(num_classes)


# ---------------------------------------------------------------- data sets


class Made(Dataset[Any]):
    """Items from lists of inputs and labels; classes: their names."""

    def __init__(self, x: Any, y: Any, classes: Any = ()) -> None:
        self.x, self.y, self.classes = x, y, classes
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.asked.append(index)
        return self.x[index], self.y[index]


def linear(samples: int, seed: int) -> Made:
    """Rows of 6 numbers, and two that are sums of them."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    return Made(x, torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1))


def sums() -> tuple[Made, Made]:
    return linear(96, 0), linear(32, 1)


def pictures(names: tuple[str, ...] = ("cat", "dog", "owl", "wolf")) -> tuple[Made, Made]:
    g = torch.Generator().manual_seed(0)
    sets = []
    for samples in (24, 8):
        x = torch.randint(0, 256, (samples, 3, 8, 8), generator=g, dtype=torch.uint8)
        sets.append(Made(x, torch.arange(samples) % len(names), names))
    return sets[0], sets[1]


def other_pictures() -> tuple[Made, Made]:
    return pictures(("cat", "dog", "hen", "wolf"))


def not_a_pair() -> Made:
    return sums()[0]


def breaks() -> None:
    raise OSError("no such folder: /data\nsecond line")
