"""A part of a network that was traced: code of torch's operators, and the weights that it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from common.errors import StepError
from common.nets.trace import Weight

T = TypeVar("T")


@dataclass(frozen=True)
class Code:
    """What a part does in one mode. weights: the names of those that it takes, in order, before its input."""

    module: fx.GraphModule
    weights: Sequence[str]


class Section(nn.Module):
    """Runs one code in training and another in evaluation.

    Its weights have the names that they have in the whole network. They are the very tensors: who cuts a
    network gives them to its sections. spares_input: works on a copy, since the code changes its input in
    place, which here is someone else's. least_samples: of a batch in training.
    """

    def __init__(self, training: Code, evaluation: Code, weights: Iterable[Weight]) -> None:
        super().__init__()
        self.spares_input, self.least_samples = False, 1
        self._codes = {True: training, False: evaluation}  # a dict: what is in it is no submodule
        places = {weight.name: self._registered(weight) for weight in weights}
        self._places = {mode: [places[name] for name in code.weights] for mode, code in self._codes.items()}
        # The code of both modes, to be compared: as it was traced, wherever the section is moved.
        self.text = "\n".join(code.module.code for code in self._codes.values())

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...). Raises StepError for a batch too small to learn from."""
        if self.training and len(x) < self.least_samples:
            raise StepError(
                "BatchNorm of this network cannot learn from a batch of one sample; choose a --batch-size "
                "that leaves more for the last one"
            )
        weights = [getattr(owner, name) for owner, name in self._places[self.training]]
        out: Tensor = self._codes[self.training].module(*weights, x.clone() if self.spares_input else x)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Section":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        for code in self._codes.values():
            _place(code.module, device)
        return self

    def _registered(self, weight: Weight) -> tuple[nn.Module, str]:
        *path, name = weight.name.split(".")
        owner: nn.Module = self
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if isinstance(weight.tensor, nn.Parameter):
            owner.register_parameter(name, weight.tensor)
        else:
            # Booleans never change: they need not travel, nor be saved.
            kept = weight.kept and weight.tensor.dtype != torch.bool
            owner.register_buffer(name, weight.tensor, persistent=kept)
        return owner, name


def _place(module: fx.GraphModule, device: torch.device) -> None:
    """Has the code make its tensors on this device; when it was traced it made them on the CPU."""

    def placed(value: T) -> T | torch.device:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, placed)
        node.kwargs = fx.node.map_aggregate(node.kwargs, placed)
    module.recompile()


def code_of(graph: fx.Graph, holder: nn.Module, weights: Mapping[fx.Node, Weight]) -> Code:
    """Of a graph whose inputs are these weights, and x. holder: has what the graph calls by name."""
    called: dict[str, Any] = {
        str(node.target): getattr(holder, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    return Code(fx.GraphModule(called, graph, "Section"), [weight.name for weight in weights.values()])
