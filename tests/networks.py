"""Networks of every sort, small, as a user would write them: built by name in tests of cutting."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def vit(num_classes: int = 4, dropout: float = 0.0) -> nn.Module:
    """torchvision's ViT for images of 8x8: four patches, two blocks."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=dropout,
        num_classes=num_classes,
    )


def vit_with_dropout(num_classes: int = 4) -> nn.Module:
    return vit(num_classes, dropout=0.1)


class Text(nn.Module):
    """A transformer that classifies sequences of tokens: embeddings of words and of places, two layers in
    which a token sees those that are near it."""

    def __init__(self, num_classes: int, words: int = 50, length: int = 12, width: int = 16) -> None:
        super().__init__()
        self.example_input = torch.zeros(1, length, dtype=torch.int64)
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, classes)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        far = (places[:, None] - places[None, :]).abs() > 3  # (T, T)
        x = self.words(tokens) + self.places(places)
        logits: Tensor = self.classifier(self.encoder(x, mask=far, is_causal=False).mean(1))
        return logits


def text(num_classes: int = 4) -> nn.Module:
    return Text(num_classes)


class Skip(nn.Module):
    """A shortcut from the first layer to the last, past a layer between: two tensors cross there."""

    def __init__(self, num_classes: int = 4, narrow: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(4, narrow, 3, padding=1, stride=1 if narrow == 4 else 2))
        self.third = nn.Conv2d(narrow, 4, 3, padding=1)
        self.last = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        third = self.third(self.second(first))
        third = F.interpolate(third, first.shape[2:])
        logits: Tensor = self.last((first + third).mean((2, 3)))
        return logits


def skip(num_classes: int = 4) -> nn.Module:
    return Skip(num_classes)


def skip_of_two_sizes(num_classes: int = 4) -> nn.Module:
    return Skip(num_classes, narrow=6)


class Tied(nn.Module):
    """One linear layer, used at the beginning and, transposed, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 4)
        self.middle = nn.Linear(4, 192)
        self.last = nn.Linear(192, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.middle(self.first(x.flatten(1)))))
        return logits


def tied() -> nn.Module:
    return Tied()


class Branches(nn.Module):
    """Goes one way or another, depending on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        logits: Tensor = self.last(h if h.sum() > 0 else -h)
        return logits


def branches() -> nn.Module:
    return Branches()


def nothing() -> Any:
    return None


def fails() -> nn.Module:
    raise RuntimeError("no such file: weights.bin\nsecond line")
