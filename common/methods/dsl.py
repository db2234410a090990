"""Decoupled split learning (DSL): each end learns from its own loss; nothing comes back.

A. Zihad, F. Owino, H. Yang, M. Tang and C. Huang, "Decoupled Split Learning via Auxiliary Loss",
2026. https://arxiv.org/abs/2601.19261, Algorithm 1.

What is sent is z before the client's update. With parts averaged (`--sync average`) this is the
local-loss split learning of Han et al. 2021.

lambda_ > 0 (the paper's discussion): the client's loss is L_aux + lambda_ * L on every q-th batch, for
which the server's dL/dz comes back; on the others still nothing does. Where the server's end is cut
again, L is its first module's loss: that of no other has a derivative at the cut.

portions > 1: the client takes its batch in so many portions, one after the other, so that only one's
activations are held at a time, and makes one step of them all. BatchNorm normalises each portion by its own
statistics; the running ones move as far in a batch as they would without portions.
(Who learns from the server's gradient cannot do so: all has to be held until that comes.)

`--client-modules J`, `--server-modules K` cut each end again into modules that learn from heads of their
own, one after the other, so that only one's activations are held at a time. With 4, 3, 2 modules in all
at s, m, d this is what the authors' code trains, and what its memory figure is of (decoupled greedy
learning, Belilovsky et al. 2020, https://arxiv.org/abs/1901.08164).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Smashed, Step
from common.nets.heads import local_loss


def dsl(lambda_: float = 0.0, q: int = 1, portions: int = 1) -> Method:
    """lambda_: weight of the server's loss in the client's. q: batches from one with it to the next.
    portions: in which the client takes a batch, one after the other. Raises ConfigError."""
    if not 0 <= lambda_ < math.inf or min(q, portions) < 1:
        raise ConfigError(
            f"dsl: lambda_ {lambda_} must be 0 or more, q {q} and portions {portions} at least 1"
        )
    if lambda_ and portions > 1:
        raise ConfigError(
            f"dsl: portions {portions}: with lambda_ a whole batch is held for the answer; drop one of them"
        )
    return Method(
        "dsl",
        partial(client_step, lambda_=lambda_) if portions == 1 else partial(step_in_portions, portions),
        server_step,
        local_loss=True,
        answer_every=q if lambda_ else 0,
        modular=True,
    )


def client_step(part: ClientPart, x: Tensor, y: Tensor, lambda_: float = 0.0) -> Step:
    assert part.head is not None, "DSL's client learns from its head"
    part.optimizer.zero_grad()
    h = x
    for layers, head in part.inner:
        out = layers(h)
        local_loss(head, out, x, y, part.loss).backward()
        h = out.detach()
    z = part.outermost(h)  # (B, C, H, W)
    gradient = yield Smashed(z.detach(), y)  # the wire: nothing comes back, unless lambda_ > 0

    loss = local_loss(part.head, z, x, y, part.loss)
    if gradient is None:
        loss.backward()
    else:
        torch.autograd.backward([loss, z], [None, lambda_ * gradient])
    part.optimizer.step()
    return loss.detach()


def step_in_portions(portions: int, part: ClientPart, x: Tensor, y: Tensor) -> Step:
    assert part.head is not None, "DSL's client learns from its head"
    part.optimizer.zero_grad()
    sent, losses = list[Tensor](), list[Tensor]()
    pieces = list(zip(x.chunk(portions), y.chunk(portions), strict=True))
    with _moving_by_shares(part, len(pieces)):
        for some, labels in pieces:
            share, h = len(some) / len(x), some
            for layers, head in [*part.inner, (part.outermost, part.head)]:
                z = layers(h)
                loss = share * local_loss(head, z, some, labels, part.loss)
                loss.backward()
                h = z.detach()
            sent.append(h)
            losses.append(loss.detach())
    yield Smashed(torch.cat(sent), y)  # the wire: nothing comes back

    part.optimizer.step()
    return torch.stack(losses).sum()


@contextmanager
def _moving_by_shares(part: ClientPart, portions: int) -> Iterator[None]:
    """Within it so many portions leave as much of BatchNorm's running statistics as one batch would."""
    modules = chain.from_iterable(module.modules() for module in part.modules.values())
    norms = [(m, m.momentum) for m in modules if isinstance(m, _BatchNorm) and m.momentum is not None]
    for norm, momentum in norms:
        norm.momentum = 1 - (1 - momentum) ** (1 / portions)
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    (batch,) = group
    z = batch.z.requires_grad_(batch.wanted)
    part.optimizer.zero_grad()
    h = z
    for layers, head in part.inner:
        out = layers(h)
        part.loss(head(out), batch.y).backward()
        h = out.detach()
    loss = part.loss(part.outermost(h), batch.y)
    loss.backward()
    part.optimizer.step()
    return Answer(loss.detach(), [z.grad] if batch.wanted else ())
