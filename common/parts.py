"""One end's part of the network: built from the run, taken apart into tensors, and put together again."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from common.methods.base import ClientPart, Method, Part, ServerPart
from common.nets.cut import CutNet
from common.optim import sgd
from common.run import Run

State = dict[str, Tensor]
Spec = tuple[torch.dtype, tuple[int, ...]]


def client_part(run: Run, method: Method, net: CutNet, device: torch.device) -> ClientPart:
    bottom = net.bottom.to(device)
    head = net.head.to(device) if method.local_loss else None
    learned = [*bottom.parameters(), *(head.parameters() if head is not None else ())]
    return ClientPart(bottom, head, sgd(learned, run))


def server_part(run: Run, net: CutNet, device: torch.device) -> ServerPart:
    top = net.top.to(device)
    return ServerPart(top, sgd(top.parameters(), run), torch.Generator().manual_seed(run.seed))


def state_of(part: Part, momentum: bool = True) -> State:
    """The part's weights and buffers, and its optimizer's momentum, by name. They are not copies."""
    state = {
        f"{name}.{key}": tensor
        for name, module in part.modules.items()
        for key, tensor in module.state_dict().items()
    }
    return state | (dict(_momentum(part)) if momentum else {})


def load_state(part: Part, state: Mapping[str, Tensor]) -> None:
    """Puts back, in place, what `state_of` gave; names that the part lacks are an error of ours."""
    ours = state_of(part)
    with torch.no_grad():
        for name, tensor in state.items():
            ours[name].copy_(tensor)


def specs(state: Mapping[str, Tensor]) -> dict[str, Spec]:
    """The types and shapes of a part's tensors, by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def average(states: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> State:
    """The mean of parts weighted by samples (McMahan et al. 2017, FedAvg), buffers included.

    BatchNorm's integer counters cannot be averaged: the largest stands.
    """
    total = sum(samples)
    return {name: _mean([s[name] for s in states], [n / total for n in samples]) for name in states[0]}


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).amax(0)
    mean = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean += weight * tensor.double()
    return mean.to(tensors[0].dtype)


def _momentum(part: Part) -> Iterator[tuple[str, Tensor]]:
    # Before the first step SGD has no buffers; from zeros it takes the same first step, bit for bit.
    for group in part.optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            state = part.optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            yield f"momentum.{index}", state["momentum_buffer"]
