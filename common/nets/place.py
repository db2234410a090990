"""Where a traced network can be cut, and what crosses there.

    x -> [ operators up to the last one of the named layer ] -> what crosses -> [ all others ] -> logits

What does not depend on the samples (a mask, an embedding of positions) does not cross: who needs it makes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem

import torch
from torch import Tensor, fx

from common.nets.trace import Trace, Weight, value_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a trace may be cut: after the operator of this index."""

    traced: Trace
    last: int

    @cached_property
    def crossing(self) -> list[fx.Node]:
        """What the bottom makes and the top takes, in order."""
        taken = {
            given
            for node in self.top
            if not self.traced.gives_batch_size(node)  # which each part has of its own input
            for given in node.all_input_nodes
        }
        anyones = self.traced.free | set(self.traced.weights)
        return [node for node in self.traced.nodes if node in taken & self._below - anyones]

    @cached_property
    def bottom(self) -> list[fx.Node]:
        """The bottom's operators, in order."""
        done = {node for node in self._below if node.is_impure()} - self.traced.free
        return self._with_what_they_take(done | set(self.crossing), self._below)

    @cached_property
    def top(self) -> list[fx.Node]:
        """The top's operators, in order: those after the cut, and what it makes again for itself."""
        above = set(self.traced.nodes) - self._below
        return self._with_what_they_take(above, above | self.traced.free)

    @property
    def shapes(self) -> list[Shape]:
        """Of one sample of each tensor that crosses."""
        return [tuple(value_of(node).shape[1:]) for node in self.crossing]

    def weights(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Weight]:
        """Those that these operators take."""
        taken = {given for node in nodes for given in node.all_input_nodes}
        return {node: weight for node, weight in self.traced.weights.items() if node in taken}

    @cached_property
    def flaw(self) -> str:
        """Why there can be no cut here, as the end of a sentence; "" where there can."""
        for node in self.crossing:
            if flaw := self._flaw_of(node):
                return f"would send {flaw}"
        mine, theirs = self._learning(self.bottom), self._learning(self.top)
        if both := [names for names in mine if names in theirs]:
            names = ", ".join(" = ".join(names) for names in both[:3])
            return f"would have {names} on both sides, and a weight must be on one"
        if not mine or not theirs:
            return f"would leave the {'server' if mine else 'client'} nothing to learn"
        return "" if self.crossing else "would send nothing"

    @cached_property
    def _below(self) -> set[fx.Node]:
        """All up to the cut. What only picks an element of what they make is theirs, too."""
        below: set[fx.Node] = set()
        for index, node in enumerate(self.traced.nodes):
            if index <= self.last or (node.target is getitem and node.args[0] in below):
                below.add(node)
        return below

    def _with_what_they_take(self, nodes: set[fx.Node], there: set[fx.Node]) -> list[fx.Node]:
        """These operators, those of whose results they are made, and those that change these in place."""
        needed, todo = set(nodes), list(nodes)
        while todo:
            node = todo.pop()
            given = [] if self.traced.gives_batch_size(node) else node.all_input_nodes
            also = {*given, *self.traced.changing(node)} & there - needed
            needed |= also
            todo += also
        return [
            node for node in self.traced.nodes if node in needed and node.op not in ("placeholder", "output")
        ]

    def _learning(self, nodes: Iterable[fx.Node]) -> list[tuple[str, ...]]:
        """The names of each weight that changes as these operators learn."""
        return [
            weight.names
            for node, weight in self.weights(nodes).items()
            if weight.tensor.requires_grad or self.traced.changing(node)
        ]

    def _flaw_of(self, node: fx.Node) -> str:
        value = value_of(node)
        if node is self.traced.x:
            return "the input itself"
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            return f"{node.name}, which is {kind}; only float32 can be sent"
        if value.dim() < 2 or not self.traced.is_batch_size(value.shape[0]):
            return f"{node.name} {list(value.shape)}, whose first dimension is not the batch's"
        if not all(isinstance(side, int) for side in value.shape[1:]):
            return f"{node.name} {list(value.shape)}, whose shape depends on the batch"
        return ""


def places_of(modes: Sequence[Trace], layer: str) -> tuple[Place, ...] | None:
    """After this layer, in each mode; None where a mode has no operator of it."""
    if any(layer not in traced.layers for traced in modes):
        return None
    return tuple(Place(traced, traced.layers[layer]) for traced in modes)


def flaw_of(places: Sequence[Place]) -> str:
    """Why there can be no cut in some mode, as the end of a sentence; "" where there can."""
    flaw = next((place.flaw for place in places if place.flaw), "")
    if not flaw and any(place.shapes != places[0].shapes for place in places):
        return "would send other tensors in training than in evaluation"
    return flaw


def possible(modes: Sequence[Trace]) -> Mapping[str, tuple[Place, ...]]:
    """Every layer that the network can be cut after, in order, with its place in each mode.

    Of several layers that end at one operator it is the outermost.
    """
    outermost: dict[int, str] = {}
    for layer, last in modes[0].layers.items():
        if len(layer) < len(outermost.get(last, f"{layer}.")):
            outermost[last] = layer
    found = {layer: places_of(modes, layer) for layer in outermost.values()}
    return {layer: places for layer, places in found.items() if places and not flaw_of(places)}
