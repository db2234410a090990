"""A network followed by `torch.export`: its graph of operators, of one mode.

It runs the network's code once, with a batch of any size. In the graph it is settled whether BatchNorm takes
the batch's statistics and whether dropout drops, so there is one for each mode. In it every layer is still
the operator that the layer calls (none is taken apart), which gives the same bits.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from common.errors import ConfigError
from common.nets.trace import Trace, Weight, named_tensors, value_of
from common.own import first_words

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def trace(model: str, net: nn.Module, example: Tensor, training: bool) -> Trace:
    """example: a batch (2, ...), of which only type and shape count. The network is left in evaluation mode.

    Raises ConfigError, naming the model, where torch.export cannot follow it.
    """
    net.train(training)
    try:
        with quiet():
            program = torch.export.export(
                net, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
    except Exception as error:  # the network's code may raise anything
        raise ConfigError(
            f"--model {model}: torch.export cannot follow it on an input of {list(example.shape)[1:]}"
            f"{_place_of(error)}: {first_words(error)}; its code must not depend on the values of tensors"
        ) from error
    finally:
        net.eval()
    weights = _weights(program, net)
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node not in weights]
    if len(inputs) != 1:
        raise ConfigError(f"--model {model}: takes {len(inputs)} inputs; wrap it so that it takes one tensor")
    traced = Trace(program.graph, weights, inputs[0], program.graph_module, _layers(program.graph, net))
    _judge(model, traced, [spec.kind for spec in program.graph_signature.output_specs])
    return traced


def _judge(model: str, traced: Trace, outputs: list[OutputKind]) -> None:
    """Raises ConfigError unless it takes batches of any size, and gives logits and nothing else."""
    if set(outputs) != {OutputKind.USER_OUTPUT}:
        raise ConfigError(f"--model {model}: puts new tensors into its buffers; have it change them in place")
    if len(outputs) != 1:
        raise ConfigError(
            f"--model {model}: gives {len(outputs)} tensors; wrap it so that it gives logits only"
        )
    if not isinstance(value_of(traced.x).shape[0], torch.SymInt):
        raise ConfigError(f"--model {model}: works for one size of batch only; it must for any")
    logits = value_of(traced.output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not traced.is_batch_size(logits.shape[0]):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"--model {model}: gives {shape}; it must give logits (batch, classes)")


def _weights(program: ExportedProgram, net: nn.Module) -> dict[fx.Node, Weight]:
    """The network's own tensors, by the nodes that stand for them."""
    own = dict(named_tensors(net))
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in own.items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    weights = {}
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        name = str(spec.target)
        if spec.kind in _TENSORS and name in own:
            kept = spec.kind is InputKind.PARAMETER or bool(spec.persistent)
            weights[node] = Weight(names[id(own[name])], own[name], kept)
        elif spec.kind in _TENSORS:
            weights[node] = Weight((name,), program.constants[name], kept=False)
    return weights


def _layers(graph: fx.Graph, net: nn.Module) -> dict[str, int]:
    """Where the last operator of each layer is, in that order."""
    there = {name for name, _ in net.named_modules() if name}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            last[str(path).partition("@")[0]] = index  # @1, @2: called once more
    ends = sorted(last.items(), key=lambda item: item[1])
    return {name: index for name, index in ends if name in there}


def _place_of(error: Exception) -> str:
    """The line of the network's code that torch.export blames, if it does."""
    blamed = re.search(r'raised this error:\s*File "([^"]+)", line (\d+)', str(error))
    return f", {blamed[1].rpartition('/')[2]} line {blamed[2]}" if blamed else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch.export says while it works is for its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
