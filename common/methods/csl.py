"""Conventional split learning (CSL): backpropagation across the cut.

O. Gupta and R. Raskar, "Distributed learning of deep neural network over multiple agents",
Journal of Network and Computer Applications 116, 2018. https://arxiv.org/abs/1810.06060

Their clients take turns with one part: `--sync relay`.
"""

from collections.abc import Sequence

from torch import Tensor

from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Smashed, Step


def csl() -> Method:
    return Method("csl", client_step, server_step, local_loss=False, answer_every=1)


def client_step(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    part.optimizer.zero_grad()  # first: who waits is to hold no old gradients
    z = part.bottom(x)  # (B, C, H, W)
    gradient = yield Smashed(z.detach(), y)  # the wire: wait for dL/dz, (B, C, H, W)

    z.backward(gradient)
    part.optimizer.step()
    return None


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    (batch,) = group
    z = batch.z.requires_grad_()
    part.optimizer.zero_grad()
    loss = part.loss(part.top(z), batch.y)
    loss.backward()
    part.optimizer.step()
    assert z.grad is not None, "z is part of the loss"
    return Answer(loss.detach(), [z.grad])
