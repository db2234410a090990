"""U-shaped split learning: labels never leave the client.

P. Vepakomma, O. Gupta, T. Swedish and R. Raskar, "Split learning for health: Distributed deep learning
without sharing raw patient data", 2018. https://arxiv.org/abs/1812.00564; the DSL paper's footnote 1.

The client has the bottom and the last layers, the tail; the server has the middle. For each batch z goes
up, the middle's output u comes down, the client's loss is made, and dL/du goes up.

    learning=csl  dL/dz comes down: backpropagation through all three
    learning=dsl  nothing more comes down: the bottom learns from its own head, and what comes after the
                  cut, the middle and the tail, is detached from it. (Our reading of the footnote.)

Labels do not travel, but dL/du is made of them: who sees it may guess them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Smashed, Step, Tail
from common.nets.heads import local_loss


def ushape(learning: Literal["csl", "dsl"] = "csl") -> Method:
    """learning: what the bottom learns from, the cut gradient (csl) or its own head (dsl)."""
    alone = learning == "dsl"
    return Method(
        "ushape",
        partial(client_step, alone),
        server_step,
        local_loss=alone,
        answer_every=0 if alone else 1,
        tail=Tail.LAST,
    )


def client_step(alone: bool, part: ClientPart, x: Tensor, y: Tensor) -> Step:
    assert part.tail is not None, "the client has the last layers"
    z = part.bottom(x)  # (B, C, H, W)
    u = yield Smashed(z.detach(), y[:0])  # the wire: the middle's output comes back
    assert u is not None, "every batch has an output"

    part.optimizer.zero_grad()
    u.requires_grad_()
    loss = part.loss(part.tail(u), y)
    loss.backward()
    assert u.grad is not None, "u is part of the loss"
    gradient = yield u.grad  # the wire: dL/dz comes back, or nothing

    if alone:
        assert part.head is not None, "this bottom learns from its head"
        local_loss(part.head, z, x, y, part.loss).backward()
    else:
        z.backward(gradient)
    part.optimizer.step()
    return loss.detach()


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    (batch,) = group
    z = batch.z.requires_grad_(batch.wanted)
    u = part.top(z)
    gradient = batch.through_tail(u.detach())  # the wire: the client's tail, and its loss

    part.optimizer.zero_grad()
    u.backward(gradient)
    part.optimizer.step()
    return Answer(None, [z.grad] if batch.wanted else ())
