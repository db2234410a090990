"""One end's part of the network: built from the run, taken apart into tensors, and put together again."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.methods.base import ClientPart, Method, Part, ServerPart, Stage, Tail
from common.nets.cut import CutNet, slices
from common.nets.recompute import Recomputed, segments
from common.nets.resnet import Block
from common.objective import loss_of
from common.optim import sgd
from common.run import Run

State = dict[str, Tensor]
Spec = tuple[torch.dtype, tuple[int, ...]]


def client_part(run: Run, method: Method, net: CutNet, device: torch.device) -> ClientPart:
    """Raises ConfigError where --keep-blocks keeps all that there are, or the run's loss cannot be had."""
    bottom = net.bottom.to(device)
    head = net.head.to(device) if method.local_loss else None
    tail = after_cut(net, method)[1].to(device) if method.tail is not Tail.NONE else None
    inner, last = _stages(bottom, net.bottom_heads, device)
    if run.keep_blocks:
        if not isinstance(bottom, nn.Sequential):
            raise ConfigError(f"--keep-blocks: {run.model} has no blocks that are known; only a resnetN has")
        _check_blocks(run, bottom)
        inner = [Stage(_recomputed(run, stage.layers), stage.head) for stage in inner]
        last = _recomputed(run, last) if last is not None else None
        bottom = bottom if inner else _recomputed(run, bottom)
    learned = [bottom, head, *(stage.head for stage in inner), tail]
    return ClientPart(bottom, head, sgd(_parameters(learned), run), tail, inner, last, loss_of(run))


def server_part(run: Run, method: Method, net: CutNet, device: torch.device) -> ServerPart:
    top = after_cut(net, method)[0].to(device)
    head = net.head.to(device) if method.new_head else None
    inner, last = _stages(top, net.top_heads, device)
    learned = [top, *(stage.head for stage in inner)]
    chance = torch.Generator().manual_seed(run.seed)
    return ServerPart(top, sgd(_parameters(learned), run), chance, inner, last, head, loss_of(run))


def after_cut(net: CutNet, method: Method) -> tuple[nn.Module, nn.Module]:
    """The layers after the cut: those of the server, and those that the client has.

    Raises ConfigError where the client is to have the last ones, and the network's are not known one by one.
    """
    if method.tail is Tail.NONE:
        return net.top, nn.Sequential()
    if method.tail is Tail.ALL:
        return nn.Sequential(), net.top
    if not isinstance(net.top, nn.Sequential):
        raise ConfigError(f"--method {method.name}: cuts off the last layer, which only a resnetN lets it do")
    return net.top[:-1], net.top[-1:]


def state_of(part: Part, momentum: bool = True) -> State:
    """The part's weights and buffers, and its optimizer's momentum, by name. They are not copies."""
    state = {
        f"{name}.{key}": tensor
        for name, module in part.modules.items()
        for key, tensor in module.state_dict().items()
    }
    return state | (dict(_momentum(part)) if momentum else {})


def kept_by(part: Part) -> Iterator[Tensor]:
    """Every tensor that the part keeps from one step to the next: of its weights, also the gradients,
    which have their shapes."""
    for module in part.modules.values():
        yield from module.buffers()
        for parameter in module.parameters():
            yield from (parameter,) if parameter.grad is None else (parameter, parameter.grad)
    for state in part.optimizer.state.values():
        yield from (tensor for tensor in state.values() if isinstance(tensor, Tensor))


def averaged_state(part: ClientPart, method: Method) -> State:
    """What of the part goes into an average: all its weights, but for a head that the server makes."""
    state = state_of(part, momentum=False)
    if method.new_head is None:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def head_state(head: nn.Module) -> State:
    """A head's weights and buffers, named as in the part of its client."""
    return {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def load_state(part: Part, state: Mapping[str, Tensor]) -> None:
    """Puts back, in place, what `state_of` gave; names that the part lacks, or other
    shapes, are an error of ours."""
    ours = state_of(part)
    with torch.no_grad():
        for name, tensor in state.items():
            ours[name].copy_(tensor)


def specs(state: Mapping[str, Tensor]) -> dict[str, Spec]:
    """The types and shapes of a part's tensors, by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def copied(state: State) -> State:
    """The tensors as they are now, whatever becomes of them; on the host."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The same tensors by longer names: `found_under` has them back."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def found_under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The tensors that have such names, by their names without the prefix."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def average(states: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> State:
    """The mean of parts weighted by samples (McMahan et al. 2017, FedAvg), buffers included.

    BatchNorm's integer counters cannot be averaged: the largest stands.
    """
    total = sum(samples)
    return {name: _mean([s[name] for s in states], [n / total for n in samples]) for name in states[0]}


def _stages(
    layers: nn.Module, heads: Sequence[nn.Module], device: torch.device
) -> tuple[list[Stage], nn.Module | None]:
    """The slices that have heads of their own, and the last one, where the layers are cut again."""
    if not heads:
        return [], None
    assert isinstance(layers, nn.Sequential), "only a resnetN is cut again"
    *inner, last = slices(layers, len(heads) + 1)
    return [Stage(some, head.to(device)) for some, head in zip(inner, heads, strict=True)], last


def _recomputed(run: Run, layers: nn.Module) -> Recomputed:
    assert isinstance(layers, nn.Sequential), "a bottom, or a slice of it"
    return Recomputed(segments(layers, run.keep_blocks))


def _check_blocks(run: Run, bottom: nn.Sequential) -> None:
    largest = slices(bottom, run.client_modules)[0]
    blocks = sum(isinstance(layer, Block) for layer in largest)
    if run.keep_blocks >= blocks:
        raise ConfigError(
            f"--keep-blocks {run.keep_blocks}: no module of the client has more blocks than {blocks}, and so "
            "nothing would be made again; choose fewer, or 0"
        )


def _parameters(modules: Sequence[nn.Module | None]) -> list[nn.Parameter]:
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


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
