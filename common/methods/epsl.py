"""EPSL: parallel split learning that averages the last layer's gradients and backpropagates them once.

Z. Lin, G. Zhu, Y. Deng, X. Chen, Y. Gao, K. Huang and Y. Fang, "Efficient Parallel Split Learning over
Resource-constrained Wireless Edge Networks", 2023. https://arxiv.org/abs/2303.15991

A step of C clients with n_k samples each, n in all, has m = ceil(phi * smallest n_k) shared positions. At
each of them the clients' gradients of the logits are averaged to one row, weighted by n_k / n; it is
backpropagated once, and every client is sent the cut gradient that comes of it. The other rows stay each
client's own. So the server backpropagates m + sum(n_k - m) rows instead of n; with phi = 0 it is PSL.

Our reading. The paper does not say at which activations an averaged row is backpropagated: we take the
clients' average, weighted alike, and run it through the top once more. That second pass does not count in
BatchNorm's running statistics; the first one, over all samples, does. As in psl.py the rows of a client
are of its own mean loss, and so an averaged row is sent as it is.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from common.errors import ConfigError
from common.methods.base import Answer, Gather, Method, Received, ServerPart
from common.methods.csl import client_step
from common.methods.psl import joint_step


def epsl(phi: float = 0.5) -> Method:
    """phi: the fraction of the smallest batch whose gradients are averaged over the clients. Raises
    ConfigError."""
    if not 0 <= phi <= 1:
        raise ConfigError(f"epsl: phi {phi} must be from 0 to 1")
    rule = partial(_server_step, phi)
    return Method("epsl", client_step, rule, local_loss=False, answer_every=1, gather=Gather.ALL, sync="none")


def _server_step(phi: float, part: ServerPart, group: Sequence[Received]) -> Answer:
    sizes = [len(batch.y) for batch in group]
    shared = shared_positions(phi, min(sizes))
    if shared == 0:
        loss, gradients = joint_step(part, group)
        return Answer(loss, gradients)

    samples = sum(sizes)
    loss, at_logits = _forward(part, group)  # rows of dL_k/dlogits, times n_k / n: (n_k, K) each
    mean = torch.stack([batch.z[:shared] * (len(batch.y) / samples) for batch in group]).sum(0)
    z = torch.cat([mean, *(batch.z[shared:] for batch in group)])
    rows = torch.cat([sum_at(at_logits, shared), *(own[shared:] for own in at_logits)])
    common, *own = _backward(part, z, rows).split([shared, *(size - shared for size in sizes)])
    scaled = [rest * (samples / size) for rest, size in zip(own, sizes, strict=True)]
    return Answer(loss, [torch.cat([common, rest]) for rest in scaled])


def shared_positions(phi: float, smallest: int) -> int:
    """phi of the smallest batch, rounded up; 0.07 of 100, in floats a little more than 7, are 7."""
    return math.ceil(round(phi * smallest, 9))


def _forward(part: ServerPart, group: Sequence[Received]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean loss () over all samples, and its gradient at each client's logits (n_k, K)."""
    with torch.no_grad():
        logits = part.top(torch.cat([batch.z for batch in group]))
    loss = part.loss(logits.requires_grad_(), torch.cat([batch.y for batch in group]))
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient.split([len(batch.y) for batch in group])


def sum_at(gradients: Sequence[Tensor], positions: int) -> Tensor:
    """The sum over clients at the first positions: (n_k, K) each to (positions, K)."""
    return torch.stack([gradient[:positions] for gradient in gradients]).sum(0)


def _backward(part: ServerPart, z: Tensor, rows: Tensor) -> Tensor:
    """Steps on these gradients of the logits (R, K) at z (R, C, H, W); the gradient of z."""
    z.requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in part.top.named_buffers()}
    part.optimizer.zero_grad()
    functional_call(part.top, buffers, (z,)).backward(rows)
    part.optimizer.step()
    assert z.grad is not None, "z is what the rows are backpropagated to"
    return z.grad
