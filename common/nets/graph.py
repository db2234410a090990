"""Any network, cut after a layer that is named, by the graph of its operators.

Several tensors may cross, such as a layer's output and a shortcut past it. They travel as one: maps
(C, H, W) of one size are put together along C, tokens (T, D) along D, any others as rows of numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256

import torch
from torch import Tensor, fx, nn

from common.errors import ConfigError
from common.nets.export import trace
from common.nets.place import Place, Shape, flaw_of, places_of, possible
from common.nets.proof import prove
from common.nets.section import Code, Section, code_of
from common.nets.trace import Trace, Weight, named_tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class Halves:
    """The parts, and the shape of what crosses of one sample. Each weight is in one of them."""

    bottom: Section
    top: Section
    shape: Shape


def traces(model: str, net: nn.Module, example: Tensor) -> tuple[Trace, Trace]:
    """In training, and in evaluation. example: a batch (2, ...), of which only type and shape count.

    Raises ConfigError, naming the model, where the network cannot be followed.
    """
    return trace(model, net, example, training=True), trace(model, net, example, training=False)


def cut_at(model: str, net: nn.Module, example: Tensor, layer: str) -> Halves:
    """The network in two, cut after this layer; its own weights become theirs.

    A cut is not taken on trust: the parts are shown to give what the whole gives.
    example: a batch (2, ...). Raises ConfigError, naming model and layer, where that cannot be.
    """
    halves = cut_traced(model, net, traces(model, net, example), layer)
    prove(model, net, [halves.bottom, halves.top], example)
    return halves


def cut_traced(model: str, net: nn.Module, modes: Sequence[Trace], layer: str) -> Halves:
    """As `cut_at`, of a network that is traced already, and without the proof. Raises ConfigError, too."""
    places = places_of(modes, layer)
    if places is None:
        near = get_close_matches(layer, modes[0].layers, 3, 0.3) or list(modes[0].layers)[:3]
        raise ConfigError(
            f"--cut {layer[:80]!r}: {model} has no such layer in use; near it are {', '.join(near)}; "
            f"dsl cuts --model {model} lists where it can be cut"
        )
    if flaw := flaw_of(places):
        near = _neighbours(modes, places[0].last)
        raise ConfigError(f"--cut {layer}: {flaw}; near it {model} can be cut at {' or '.join(near) or '-'}")
    return _halves(net, places)


def together(shapes: Sequence[Shape]) -> Shape:
    """The shape of several tensors' one sample as one; of a single one it is its own."""
    if len(shapes) == 1:
        return shapes[0]
    axis = _axis(shapes)
    if not axis:
        return (sum(math.prod(shape) for shape in shapes),)
    whole = list(shapes[0])
    whole[axis - 1] = sum(shape[axis - 1] for shape in shapes)
    return tuple(whole)


def fingerprint(parts: Sequence[nn.Module]) -> str:
    """Of what the parts are, not of what they have learned: names, types and shapes of their tensors, and
    their code where they have any. Hexadecimal digits of a SHA-256."""
    lines: list[object] = []
    for part in parts:
        state = part.state_dict()
        lines.append([(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()])
        lines.append([section.text for section in part.modules() if isinstance(section, Section)])
    return sha256(repr(lines).encode()).hexdigest()


def _neighbours(modes: Sequence[Trace], last: int) -> list[str]:
    """The nearest layers before and after that the network can be cut at."""
    there = {layer: places[0].last for layer, places in possible(modes).items()}
    before = [layer for layer, index in there.items() if index < last]
    after = [layer for layer, index in there.items() if index > last]
    return before[-1:] + after[:1]


def _halves(net: nn.Module, places: Sequence[Place]) -> Halves:
    bottom = _section(net, [_bottom(p) for p in places], [p.weights(p.bottom) for p in places])
    top = _section(net, [_top(p) for p in places], [p.weights(p.top) for p in places])
    return Halves(bottom, top, together(places[0].shapes))


def _section(net: nn.Module, codes: Sequence[Code], taken: Sequence[dict[fx.Node, Weight]]) -> Section:
    """Its weights are in the order that they have in the network."""
    weights = {weight.name: weight for some in taken for weight in some.values()}
    order = {name: index for index, (name, _) in enumerate(named_tensors(net))}
    training, evaluation = codes
    ordered = sorted(weights.values(), key=lambda weight: order.get(weight.name, len(order)))
    return Section(training, evaluation, ordered)


def _bottom(place: Place) -> Code:
    def finish(graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        return _joined(graph, [copies[node] for node in place.crossing], place.shapes)

    return _code(place, place.bottom, lambda _, x: {place.traced.x: x}, finish)


def _top(place: Place) -> Code:
    def begin(graph: fx.Graph, z: fx.Node) -> dict[fx.Node, fx.Node]:
        return dict(zip(place.crossing, _apart(graph, z, place.shapes), strict=True))

    return _code(place, place.top, begin, lambda _, copies: copies[place.traced.output])


def _code(
    place: Place,
    nodes: Sequence[fx.Node],
    begin: Callable[[fx.Graph, fx.Node], dict[fx.Node, fx.Node]],
    finish: Callable[[fx.Graph, dict[fx.Node, fx.Node]], fx.Node],
) -> Code:
    """A copy of these operators. begin: what they take of the input. finish: what they give."""
    graph, weights = fx.Graph(), place.weights(nodes)
    copies = {node: graph.placeholder(node.name) for node in weights}
    x = graph.placeholder("x")
    copies |= begin(graph, x)
    for node in nodes:
        if place.traced.gives_batch_size(node) and node.args[0] not in copies:
            copies[node] = graph.call_function(aten.sym_size.int, (x, 0))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(finish(graph, copies))
    for node in graph.nodes:
        node.meta.clear()  # of the trace, whose tensors have no elements
    return code_of(graph, place.traced.holder, weights)


# ---------------------------------------------------------------- several tensors as one


def _axis(shapes: Sequence[Shape]) -> int:
    """The dimension, of a batch, along which they are put together; 0: as rows of numbers."""
    if len({len(shape) for shape in shapes}) == 1:
        if len(shapes[0]) == 2 and len({shape[0] for shape in shapes}) == 1:
            return 2
        if len(shapes[0]) > 2 and len({shape[1:] for shape in shapes}) == 1:
            return 1
    return 0


def _joined(graph: fx.Graph, tensors: list[fx.Node], shapes: Sequence[Shape]) -> fx.Node:
    if len(tensors) == 1:
        return tensors[0]
    axis = _axis(shapes)
    if not axis:
        tensors = [graph.call_function(aten.flatten.using_ints, (tensor, 1)) for tensor in tensors]
    return graph.call_function(aten.cat.default, (tensors, axis or 1))


def _apart(graph: fx.Graph, z: fx.Node, shapes: Sequence[Shape]) -> Iterator[fx.Node]:
    if len(shapes) == 1:
        yield z
        return
    axis, start = _axis(shapes), 0
    for shape in shapes:
        size = shape[axis - 1] if axis else math.prod(shape)
        part = graph.call_function(aten.narrow.default, (z, axis or 1, start, size))
        if not axis:
            part = graph.call_function(aten.unflatten.int, (part, 1, list(shape)))
        # As it was, one element beside the next, so that what follows takes the same path.
        yield graph.call_function(aten.clone.default, (part,), {"memory_format": torch.contiguous_format})
        start += size
