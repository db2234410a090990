"""A trained network in one piece, as it predicts: what was the clients' and what was the server's."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.ended import Ended, check_alone, check_joined, client_end, server_end
from common.methods.base import ClientPart, Tail
from common.nets.named import build_named, example_of, is_named
from common.run import MEAN, STD, Run


class Joined(nn.Module):
    """In evaluation mode. images: takes pixels in [0, 1], as ToTensor gives them, and normalises them as a
    client does; else it takes what the network takes."""

    def __init__(self, parts: Mapping[str, nn.Module], images: bool) -> None:
        super().__init__()
        self.parts, self.images = nn.ModuleDict(parts), images
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> outputs (B, classes), or (B, K) of float:K."""
        if self.images:
            x = (x - MEAN) / STD
        for part in self.parts.values():
            x = part(x)
        return x

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers by the names that they have in the whole network; a head's as head.NAME."""
        return {
            f"head.{name}" if part == "head" else name: tensor
            for part, layers in self.parts.items()
            for name, tensor in layers.state_dict().items()
        }


def joined(server: Path, client: Path, alone: bool = False) -> tuple[Joined, Ended[ClientPart]]:
    """What these two folders hold together; and the client's. alone: the client's own head in the server's
    place. Raises ConfigError."""
    cpu = torch.device("cpu")
    mine, theirs = client_end(client, cpu), server_end(server, cpu)
    check_joined(mine, theirs)
    part = mine.part
    if alone:
        check_alone(mine)
    parts = {"bottom": part.bottom, "top": theirs.part.top, "tail": part.tail}
    if alone and mine.method.tail is not Tail.ALL:
        parts = {"bottom": part.bottom, "head": part.head}
    there = {name: layers for name, layers in parts.items() if layers is not None}
    return Joined(there, _takes_images(mine.run)), mine


def example_of_run(run: Run) -> Tensor:
    """Two samples of what the run's network takes, of which only type and shape count."""
    if not is_named(run.model):
        return torch.zeros(2, *run.image_shape)
    return example_of(_network(run), run.image_shape)


def _takes_images(run: Run) -> bool:
    """Whether what the network takes are images; a network of the user's own may take anything."""
    return not (is_named(run.model) and isinstance(getattr(_network(run), "example_input", None), Tensor))


@functools.lru_cache(maxsize=1)
def _network(run: Run) -> nn.Module:
    """Of whose weights nothing is used."""
    return build_named(run.model, run.outputs, run.image_shape[0], run.seed)
