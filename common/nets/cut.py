"""A network, cut into a bottom for the client and a top for the server.

Both ends build the whole network from the run's seed and keep their part of it: so the two parts
fit, all clients begin alike, and no first weights have to travel.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.nets.graph import cut_at, fingerprint
from common.nets.heads import Cut, Shape, build_head
from common.nets.named import build_named, example_of, is_named
from common.nets.resnet import Block, resnet
from common.run import Run

M = TypeVar("M", bound=nn.Module)

# Blocks of ResNet-110's 54 at the client (arXiv 2601.19261, section IV).
SPLITS = {"s": 12 / 54, "m": 17 / 54, "d": 26 / 54}


@dataclass(frozen=True)
class CutNet:
    """The two parts, the client's head, and the shape of one sample's activations (C, H, W), or another.

    The parts of a resnetN are sequences of its blocks, those of other networks are not (graph.py).
    bottom_heads, top_heads: of every slice but the last, where a part is cut again. takes: the type and shape
    of one sample's input.
    """

    bottom: nn.Module
    top: nn.Module
    head: nn.Module
    cut_shape: Shape
    bottom_heads: Sequence[nn.Module] = ()
    top_heads: Sequence[nn.Module] = ()
    takes: tuple[torch.dtype, Shape] = (torch.float32, ())

    @cached_property
    def fingerprint(self) -> str:
        """The same where both ends have built the same network, and cut it at the same place."""
        return fingerprint([self.bottom, self.top])


def build(run: Run) -> CutNet:
    """The run's network, cut. The same run gives the same weights on every machine.

    Raises ConfigError when the model, the split, the cut or the head does not exist.
    """
    return _of_any(run) if is_named(run.model) else _of_resnet(run)


def _of_any(run: Run) -> CutNet:
    """A network by name, cut at a layer by name."""
    if not run.cut:
        raise ConfigError(f"--model {run.model} needs --cut LAYER: dsl cuts --model {run.model} lists them")
    if run.split != "m":
        raise ConfigError(f"--split {run.split}: only for resnetN; {run.model} is cut by --cut {run.cut}")
    if max(run.client_modules, run.server_modules) > 1:
        raise ConfigError(f"--client-modules, --server-modules: only for resnetN, not for {run.model}")
    net = build_named(run.model, run.outputs, run.image_shape[0], run.seed)
    example = example_of(net, run.image_shape)
    halves = cut_at(run.model, net, example, run.cut)
    outputs = shape_after(halves.top, halves.shape)[0]
    if outputs != run.outputs:
        wanted = (
            f"the run's targets are {run.targets}" if run.numbers else f"the run has {run.outputs} classes"
        )
        flag = "--targets" if run.numbers else "--classes"
        raise ConfigError(
            f"--model {run.model}: gives {outputs} logits, and {wanted}: have its function take num_classes, "
            f"or say {flag}"
        )
    takes = example.dtype, tuple(example.shape[1:])
    cut = Cut(halves.shape, takes[1], run.outputs, nn.Sequential())
    head = initialise(build_head(run.head, cut), torch.Generator().manual_seed(run.seed))
    return CutNet(halves.bottom, halves.top, head, halves.shape, takes=takes)


def _of_resnet(run: Run) -> CutNet:
    """A resnetN, cut after so many of its blocks."""
    depth = depth_of(run.model)
    if run.cut:
        raise ConfigError(f"--cut {run.cut}: {run.model} is cut by --split s, m, d or a number of blocks")
    blocks = blocks_at_client(run.model, run.split)
    generator = torch.Generator().manual_seed(run.seed)  # our own: other threads draw from the global one
    net = initialise(resnet(depth, run.outputs, run.image_shape[0]), generator)
    bottom, top = net[: 1 + blocks], net[1 + blocks :]
    shape = shape_after(bottom, run.image_shape)
    cut = Cut(shape, run.image_shape, run.outputs, top)
    head = initialise(build_head(run.head, cut), generator)
    bottom_heads = _heads_between(run, "client_modules", bottom, top, run.image_shape, generator)
    top_heads = _heads_between(run, "server_modules", top, None, shape, generator)
    takes = torch.float32, tuple(run.image_shape)
    return CutNet(bottom, top, head, shape, bottom_heads, top_heads, takes)


def slices(layers: nn.Sequential, count: int) -> list[nn.Sequential]:
    """So many slices of as many blocks each, the first ones of one more; they share the layers' weights.

    A stem stays with the first blocks, a classifier with the last. count: at most the blocks there are.
    """
    ends = [index + 1 for index, layer in enumerate(layers) if isinstance(layer, Block)]
    cuts = [ends[math.ceil(len(ends) * k / count) - 1] for k in range(1, count)]
    return [layers[start:end] for start, end in pairwise([0, *cuts, len(layers)])]


def shape_after(layers: nn.Module, shape: Shape) -> Shape:
    """What the layers make of one sample of this shape."""
    layers.eval()  # a pass in train mode would move the BatchNorm statistics
    with torch.no_grad():
        out: Tensor = layers(torch.zeros(1, *shape))
    layers.train()
    return tuple(out.shape[1:])


def initialise(net: M, generator: torch.Generator) -> M:
    """First weights: He et al. 2015 for convolutions (biases 0), torch's own rule for linear layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    return net


def depth_of(model: str) -> int:
    """The layers of a `resnetN`. Raises ConfigError unless N is 6n+2 with n >= 1."""
    match = re.fullmatch(r"resnet(\d{1,4})", model)
    depth = int(match[1]) if match else 0
    if depth < 8 or depth % 6 != 2:
        raise ConfigError(
            f"--model {model!r}: choose resnetN with N = 20, 32, 44, 56, 110 or other 6n+2; or "
            "torchvision:NAME, timm:NAME or package.module:function"
        )
    return depth


def blocks_at_client(model: str, split: str) -> int:
    """How many residual blocks the client keeps: at least one, and one less than all at most.

    Raises ConfigError, naming the split, or the model, where there is no such.
    """
    blocks = (depth_of(model) - 2) // 2
    if split in SPLITS:
        return max(1, round(SPLITS[split] * blocks))
    if not re.fullmatch(r"[0-9]{1,4}", split) or not 1 <= int(split) < blocks:
        raise ConfigError(
            f"--split {split[:32]!r}: {model} has {blocks} blocks; choose s, m, d or 1 to {blocks - 1}"
        )
    return int(split)


def _heads_between(
    run: Run,
    setting: str,
    layers: nn.Sequential,
    following: nn.Sequential | None,
    shape: Shape,
    generator: torch.Generator,
) -> list[nn.Module]:
    """A head for each slice of the layers but the last. Raises ConfigError if there are too few layers."""
    count: int = getattr(run, setting)
    blocks = sum(isinstance(layer, Block) for layer in layers)
    if count > max(1, blocks):
        flag = f"--{setting.replace('_', '-')}"
        raise ConfigError(
            f"{flag} {count}: modules are made of blocks, and this end has {blocks}; choose fewer"
        )
    parts, heads = slices(layers, count), []
    for index, part in enumerate(parts[:-1]):
        shape = shape_after(part, shape)
        rest = [*chain.from_iterable(parts[index + 1 :]), *(following or ())]
        cut = Cut(shape, run.image_shape, run.outputs, nn.Sequential(*rest))
        heads.append(initialise(build_head(run.head, cut), generator))
    return heads
