"""That a network and its parts, joined, are one: shown when it is cut, before anything is trained.

Bit for bit, in both modes, on batches of several sizes: the logits, what BatchNorm has counted, and the
random numbers drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.errors import ConfigError
from common.nets.section import Section

_PASSES = ((False, 1), (False, 3), (True, 3))  # in training?, samples


def prove(model: str, net: nn.Module, parts: Sequence[Section], example: Tensor) -> None:
    """Finds out, too, which part changes its input in place, and how many samples a batch must have. All are
    left in training mode, with the weights, statistics and generator that they had.

    Raises ConfigError, naming the model, where the parts give anything else than the whole.
    """
    for training, samples in _PASSES:
        for module in (net, *parts):
            module.train(training)
        x = _samples(example, samples)
        with _undone(net):
            whole = [*tree_leaves(net(x.clone())), *_traces_of_a_pass(net)]  # it may give (logits,)
        with _undone(net):
            z = x
            for part in parts:
                z = _watched(part, z.detach())
            joined = [z, *_traces_of_a_pass(net)]
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(joined, whole, strict=True)):
            mode = "training" if training else "evaluation"
            raise ConfigError(
                f"--model {model}: cut in two it gives something else in {mode}, on a batch of {samples}; "
                "choose another --cut, or a network whose code does not depend on the batch's size"
            )
    for module in (net, *parts):
        module.train()
    for part in parts:
        part.least_samples = _least_samples(net, _samples(example, 1))


def _least_samples(net: nn.Module, one: Tensor) -> int:
    """That a batch must have in training. BatchNorm refuses one value a channel, which has no variance; the
    operator that it calls, which the parts have of it, does not."""
    try:
        with _undone(net):
            net(one)
    except ValueError:
        return 2
    return 1


def _samples(example: Tensor, count: int) -> Tensor:
    """Made-up samples; of whole numbers, that of the example."""
    if not example.is_floating_point():
        return example[:1].repeat(count, *[1] * (example.dim() - 1))
    chance = torch.Generator().manual_seed(0)
    return torch.randn(count, *example.shape[1:], generator=chance, dtype=example.dtype)


def _watched(part: Section, given: Tensor) -> Tensor:
    """What the part makes of it; from now on it spares its input, if it has changed it."""
    version, before = given._version, given.clone()
    out: Tensor = part(given)
    if given._version != version:
        part.spares_input = True
        given.copy_(before)
    return out


def _traces_of_a_pass(net: nn.Module) -> list[Tensor]:
    """What it changes beside its result."""
    return [*(buffer.clone() for buffer in net.buffers()), torch.get_rng_state()]


@contextmanager
def _undone(net: nn.Module) -> Iterator[None]:
    """Within it a pass may change buffers and draw random numbers."""
    before = [buffer.clone() for buffer in net.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(net.buffers(), before, strict=True):
                buffer.copy_(value)
