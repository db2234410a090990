"""What each cut of a network costs either side: parameters, multiply-adds, activations kept for the gradient.

The network is run once, in training, operator by operator, on tensors that have shapes and no elements.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.nets.cut import depth_of
from common.nets.graph import traces
from common.nets.named import build_named, example_of, is_named
from common.nets.place import Place, possible
from common.nets.resnet import Block, resnet
from common.nets.trace import Trace, value_of

_SAMPLES = 2
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Side:
    """Of one sample, but for the parameters. macs: multiply-adds of a forward pass. activation_bytes: what is
    held when the forward pass is over, for the backward pass; at no time are there many more."""

    parameters: int
    macs: int
    activation_bytes: int

    def bytes(self, batch: int) -> int:
        """In training with SGD: activations of a batch; weights, their gradients and momentum."""
        return self.activation_bytes * batch + 3 * FLOAT_BYTES * self.parameters


@dataclass(frozen=True)
class Costs:
    """Of the cut after this layer. shapes: of one sample of each tensor that crosses, as float32."""

    layer: str
    shapes: Sequence[tuple[int, ...]]
    client: Side
    server: Side

    @property
    def sent_bytes(self) -> int:
        return FLOAT_BYTES * sum(math.prod(shape) for shape in self.shapes)


def costs_of(places: Mapping[str, Place]) -> list[Costs]:
    """In order, of places in one trace, that of training."""
    if not places:
        return []
    measured = _Measured(next(iter(places.values())).traced)
    return [
        Costs(
            layer,
            place.shapes,
            measured.side(place, place.bottom),
            measured.side(place, place.top),
        )
        for layer, place in places.items()
    ]


def places_in(model: str, image: Sequence[int], classes: int) -> dict[str, Place]:
    """Every place where the network can be cut, by its layer; of a resnetN by the number of its blocks.

    Raises ConfigError.
    """
    named = is_named(model)
    net = build_named(model, classes, image[0], 0) if named else resnet(depth_of(model), classes, image[0])
    found = possible(traces(model, net, example_of(net, image)))
    blocks = {str(index) for index, layer in enumerate(net.children()) if isinstance(layer, Block)}
    last = max(blocks, key=int, default="")  # after which nothing but the classifier is left
    return {layer: places[0] for layer, places in found.items() if named or layer in blocks - {last}}


class _Measured(fx.Interpreter):
    """multiply-adds and kept memory, by operator."""

    def __init__(self, traced: Trace) -> None:
        super().__init__(traced.holder, graph=traced.graph)
        self._macs: dict[fx.Node, int] = {}
        self._kept: dict[fx.Node, dict[int, int]] = {}  # by memory block: bytes
        self._made: dict[fx.Node, dict[int, int]] = {}
        self._alive: list[Any] = []  # so that no block's number is used twice
        with FakeTensorMode() as fake, FlopCounterMode(display=False) as self._counter:
            own = [fake.from_tensor(weight.tensor) for weight in traced.weights.values()]
            self._own = {_block(tensor) for tensor in own}
            example = value_of(traced.x)
            x = torch.zeros(_SAMPLES, *example.shape[1:], dtype=example.dtype)
            self.run(*own, x)

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        kept = self._kept[n] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _block(tensor) not in self._own:
                kept[_block(tensor)] = tensor.untyped_storage().nbytes()
                self._alive.append(tensor.untyped_storage())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = super().run_node(n)
        self._macs[n] = (self._counter.get_total_flops() - before) // 2
        if isinstance(made, Tensor):
            self._alive.append(made.untyped_storage())
            self._made[n] = {_block(made): made.untyped_storage().nbytes()}
        return made

    def side(self, place: Place, nodes: Sequence[fx.Node]) -> Side:
        weights = {weight.name: weight.tensor for weight in place.weights(nodes).values()}
        parameters = sum(t.numel() for t in weights.values() if isinstance(t, torch.nn.Parameter))
        blocks: dict[int, int] = {}
        for some in (*(self._kept[node] for node in nodes), *(self._made[node] for node in place.crossing)):
            blocks |= some
        return Side(
            parameters,
            sum(self._macs[node] for node in nodes) // _SAMPLES,
            sum(blocks.values()) // _SAMPLES,
        )


def _block(tensor: Tensor) -> int:
    """The number of the memory block that a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)
