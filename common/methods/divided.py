"""A part whose weights lie divided over several places, since they are too many for one (FSDP2).

Each place keeps its slice of every weight, gradient and momentum. A block's weights are put together when it
is computed, and dropped after that; its gradients are added up over the places while they are divided again.
So each run forward or backward is a collective: all places make as many, in the same order, and who has fewer
batches than another makes up for it with noise that has no weight.

PyTorch FSDP: Zhao et al. 2023, https://arxiv.org/abs/2304.11277; FSDP2 is its second design, `fully_shard`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import ConfigError
from common.methods.base import Answer, Received, ServerPart, ServerStep
from common.methods.joint import Joint, Summed
from common.parts import State, state_of


class Divided(Joint):
    """A part that lies divided over `places`, this one's slices on its device. All places have the same part
    before. like: a batch such as it learns from, of which noise is made.

    A resnetN is put together block by block, another network as a whole.
    """

    def __init__(self, part: ServerPart, places: DeviceMesh, like: Received) -> None:
        _divide(part, places)
        super().__init__(part)
        self.whole: State = {}
        self._own, self._like = part, like
        self._chance = torch.Generator().manual_seed(0)

    @property
    def slices(self) -> list[Tensor]:
        """This place's, of weights and momentum; and the buffers, which each place has whole."""
        state = state_of(self._own).values()
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in state]

    def put_together(self, wanted: bool) -> None:
        """By all places: `whole` is the part's state, on the host, at those where it is wanted; made a weight
        at a time."""
        self.whole = {}
        for name, tensor in state_of(self._own).items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if wanted:
                self.whole[name] = full.detach().to("cpu", copy=True)

    def step(
        self, rule: ServerStep, batches: Sequence[Received], samples: float, summed: Summed, most: int = 0
    ) -> list[Answer]:
        shares = [(batch, len(batch.z) / samples) for batch in batches]
        noise = [(self.noise(), 0.0) for _ in range(most - len(batches))]
        return self._step(rule, [*shares, *noise], summed)[: len(batches)]

    def noise(self) -> Received:
        """A batch from which nothing is learned."""
        z = torch.randn(self._like.z.shape, generator=self._chance)
        return replace(self._like, z=z.to(self.device), y=self._like.y.to(self.device))

    def _apart(self) -> Sequence[Tensor]:
        return ()  # the gradients are added up over the places while they are divided

    def _zeros(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.zeros_like(weight) for weight in self._weights]

    def _add(self, rule: ServerStep, batch: Received, share: float, gradients: Sequence[Tensor]) -> Answer:
        # The share goes into the loss, since its gradients are added to those of other places at once.
        part = replace(self._part, loss=lambda outputs, y: share * self._part.loss(outputs, y))
        answer = rule(part, [batch])
        for gradient, weight in zip(gradients, self._weights, strict=True):
            if weight.grad is not None:
                gradient.add_(weight.grad)
        if not share:
            return Answer(None)
        loss = None if answer.loss is None else answer.loss / share
        return replace(answer, loss=loss, gradients=[g if g is None else g / share for g in answer.gradients])


def _divide(part: ServerPart, places: DeviceMesh) -> None:
    """Weights and momentum, in place. Raises ConfigError where torch cannot do it so."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"--fsdp: torch {torch.__version__} is too old for it; install a newer one")
    (group,) = part.optimizer.param_groups
    before: list[nn.Parameter] = group["params"]
    state_of(part)  # so that there is momentum
    momentum = [part.optimizer.state.pop(weight)["momentum_buffer"] for weight in before]
    names = {id(weight): name for name, weight in part.top.named_parameters()}
    part.top.to(memory_format=torch.contiguous_format)  # others are not divided
    for block in part.top.children() if isinstance(part.top, nn.Sequential) else ():
        if list(block.parameters()):
            fully_shard(block, mesh=places)
    fully_shard(part.top, mesh=places)
    for module in part.top.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: each batch has its share in the loss
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    after = dict(part.top.named_parameters())
    group["params"] = [after[names[id(weight)]] for weight in before]
    for weight, whole in zip(group["params"], momentum, strict=True):
        slices = distribute_tensor(whole.contiguous(), places, weight.placements, src_data_rank=None)
        part.optimizer.state[weight] = {"momentum_buffer": slices}
