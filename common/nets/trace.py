"""A network as a graph of torch's operators: what it does in training, or in evaluation.

weights, x -> operators, some of which change memory in place -> logits
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Weight:
    """A tensor of the network's own. names: what it is called in the network; more than one where layers are
    tied. kept: it is part of the network's state; else it is a constant."""

    names: tuple[str, ...]
    tensor: Tensor
    kept: bool

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Trace:
    """A graph whose inputs are the network's weights, by their nodes, and x; its one output are logits.

    holder: has the graphs that are called within this one. layers: where in `nodes` the last operator of
    each layer is, by the layer's name, in the order in which they end.
    """

    graph: fx.Graph
    weights: Mapping[fx.Node, Weight]
    x: fx.Node
    holder: nn.Module
    layers: Mapping[str, int]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @cached_property
    def changes(self) -> Mapping[int, list[fx.Node]]:
        """The operators that change memory in place, by its block, in order."""
        found: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                found.setdefault(block_of(node.all_input_nodes[0]), []).append(node)
        return found

    def changing(self, node: fx.Node) -> list[fx.Node]:
        """The operators that change in place what this one gives, or what that is a view of."""
        return self.changes.get(block_of(node), [])

    @cached_property
    def free(self) -> set[fx.Node]:
        """Operators that need no sample: of weights that do not change, constants and the size of the batch.
        They are not random, so either part of a cut network, or both, may have them."""
        bound = {self.x}  # and those that need samples
        while True:
            before = len(bound)
            for node in self.nodes:
                if node not in bound and not self._is_free(node, bound):
                    bound.add(node)
            if len(bound) == before:
                return set(self.nodes) - bound

    @property
    def output(self) -> fx.Node:
        """The node that gives the logits."""
        (logits,) = self.graph.output_node().all_input_nodes
        return logits

    def is_batch_size(self, size: Any) -> bool:
        """Whether a size is that of the batch, whatever it is."""
        return isinstance(size, torch.SymInt) and bool(size.node.expr == value_of(self.x).shape[0].node.expr)

    def gives_batch_size(self, node: fx.Node) -> bool:
        return node.target is torch.ops.aten.sym_size.int and self.is_batch_size(value_of(node))

    def _is_free(self, node: fx.Node, bound: set[fx.Node]) -> bool:
        if node.op == "get_attr" or self.gives_batch_size(node):
            return True
        if node in self.weights:
            return not self.changing(node)
        given = {*node.all_input_nodes, *self.changing(node)} - {node}
        return node.op == "call_function" and _is_certain(node) and not given & bound


def named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, in the network's order; by each of their names. A tied one comes twice."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def value_of(node: fx.Node) -> Any:
    """What tracing found that a node gives: a tensor without elements, a size."""
    return node.meta.get("val")


def block_of(node: fx.Node) -> int:
    """The number of the memory block that a node's tensor lies in; 0 where it gives no tensor."""
    value = value_of(node)
    return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else 0


def _is_certain(node: fx.Node) -> bool:
    """Whether the operator gives the same for the same."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return not isinstance(node.target, torch._ops.HigherOrderOperator)  # a function of numbers
