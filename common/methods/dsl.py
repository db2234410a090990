"""Decoupled split learning (DSL): each end learns from its own loss; nothing comes back.

A. Zihad, F. Owino, H. Yang, M. Tang and C. Huang, "Decoupled Split Learning via Auxiliary Loss",
2026. https://arxiv.org/abs/2601.19261, Algorithm 1.

What is sent is z before the client's update. With parts averaged (`--sync average`) this is the
local-loss split learning of Han et al. 2021.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Smashed, Step
from common.nets.heads import local_loss


def dsl() -> Method:
    return Method("dsl", client_step, server_step, local_loss=True, answers=False)


def client_step(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    assert part.head is not None, "DSL's client learns from its head"
    z = part.bottom(x)  # (B, C, H, W)
    yield Smashed(z.detach(), y)  # the wire: nothing comes back

    loss = local_loss(part.head, z, x, y)
    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return loss.detach()


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    (batch,) = group
    loss = F.cross_entropy(part.top(batch.z), batch.y)  # z is a leaf that wants no gradient

    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return Answer(loss.detach())
