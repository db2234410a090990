"""CycleSL: the server learns from the pooled activations first, and then tells the clients.

"CycleSL: Server-Client Cyclical Update Driven Scalable Split Learning", WACV 2026.
https://arxiv.org/abs/2511.18611 and the authors' code.

A round: every client's batch goes into one pool; the server trains on it, shuffled, for some epochs, each
sample's loss weighted by its client's samples; then, with the updated weights held, each client is sent
the gradient of its own batch's mean loss at the activations it had sent.

BatchNorm: as in the authors' code the second pass is in training mode, so running statistics see the
activations again. Works with parts apart, averaged (+SFL) or relayed (+SSL).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.methods.base import Answer, Gather, Method, Received, ServerPart
from common.methods.csl import client_step


def cyclesl(server_epochs: int = 1, server_batch: int = 0) -> Method:
    """server_batch: samples of a server step; 0: as many as the first client's batch has. Raises
    ConfigError."""
    if server_epochs < 1 or server_batch < 0:
        raise ConfigError(
            f"cyclesl: server_epochs {server_epochs} is below 1, or server_batch {server_batch} below 0"
        )
    rule = partial(_server_step, server_epochs, server_batch)
    return Method(
        "cyclesl",
        client_step,
        rule,
        local_loss=False,
        answer_every=1,
        gather=Gather.ALL,
        any_loss=False,  # its weights are of each sample's own, and another loss gives a batch's mean
    )


def _server_step(epochs: int, size: int, part: ServerPart, group: Sequence[Received]) -> Answer:
    z = torch.cat([batch.z for batch in group])  # (N, C, H, W)
    y = torch.cat([batch.y for batch in group])
    weight = torch.cat([torch.full((len(b.y),), float(len(b.y)), device=z.device) for b in group])
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=part.generator).to(y.device)
        for some in order.split(size or len(group[0].y)):
            losses.append(_train(part, z[some], y[some], weight[some]))
    return Answer(torch.stack(losses).mean(), [cut_gradient(part, batch) for batch in group])


def _train(part: ServerPart, z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    loss = (weight * F.cross_entropy(part.top(z), y, reduction="none")).sum() / weight.sum()
    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return loss.detach()


def cut_gradient(part: ServerPart, batch: Received) -> Tensor:
    """dL_k/dz_k (B, C, H, W) of the batch's mean loss; the weights keep still."""
    z = batch.z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(part.top(z), batch.y), z)
    return gradient
