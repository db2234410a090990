"""Parallel split learning (PSL): one server step on the batches of all clients together.

As SGLR describes it (Pal et al. 2021, https://arxiv.org/abs/2112.05929, Eq. 4): each client has its own
bottom, never averaged; the server's loss is the mean over all samples, which weights clients by theirs.

Our reading: a client is sent the gradient of its own batch's mean loss. That of the server's loss is
n_k / n of it, so that under SGD a client's step would shrink with every client that joins. (With BatchNorm
in the top it is n / n_k of the union's gradient: the statistics are those of all samples.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.methods.base import Answer, Gather, Method, Received, ServerPart
from common.methods.csl import client_step


def psl() -> Method:
    return Method(
        "psl", client_step, server_step, local_loss=False, answer_every=1, gather=Gather.ALL, sync="none"
    )


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    loss, gradients = joint_step(part, group)
    return Answer(loss, gradients)


def joint_step(part: ServerPart, group: Sequence[Received]) -> tuple[Tensor, list[Tensor]]:
    """Steps on the union of the batches; the mean loss (), and each client's own dL_k/dz_k."""
    zs = [batch.z.requires_grad_() for batch in group]
    loss = part.loss(part.top(torch.cat(zs)), torch.cat([batch.y for batch in group]))

    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    samples = sum(len(z) for z in zs)
    return loss.detach(), [_gradient(z) * (samples / len(z)) for z in zs]


def _gradient(z: Tensor) -> Tensor:
    assert z.grad is not None, "z is part of the loss"
    return z.grad
