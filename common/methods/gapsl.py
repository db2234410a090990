"""GAPSL: parallel split learning in which the server follows the clients whose gradients agree.

Z. Lin, O. Aouedi, W. Ni, S. Chatzinotas and X. Chen, 2026. https://arxiv.org/abs/2603.18540

A round: each client's gradient of the server's weights, g_k. *Leader gradient identification*: the mean
of those whose angle to the others is smallest; how many grows with the run and with how stable the
angles are. *Gradient direction alignment*: clients whose angle to the leader is above a threshold are
left out; the server steps on the sum over those kept, each loss with lambda * (1 - cos) added.

What the paper leaves open, as we read it. Its g_k and leader are constants (footnote), so the added term
has no gradient and alignment is a filter: gda="filter", literal and the default. gda="direction" moves
g_k along the term's negative gradient with g_k as the variable; gda="exact" differentiates twice, with
the leader constant. Standard deviations are of the population. In the first round, and whenever the
angles' spread has not varied, stability is 0. eta has no published value. When no client is below the
threshold the nearest is kept. With few clients the defaults keep few: of two always the first, of ten
about three. A client left out has no part in the loss: its answer is "skip".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.methods.base import Answer, ClientPart, Gather, Method, Received, ServerPart, Smashed, Step

Alignment = Literal["filter", "direction", "exact"]


def gapsl(
    k_min: float = 20.0,
    k_max: float = 80.0,
    eta: float = 0.5,
    lambda_: float = 5e-4,
    gda: Alignment = "filter",
) -> Method:
    """k_min, k_max: percent of the clients that lead. eta: deviations below the mean to be kept. Raises
    ConfigError."""
    if not 0 <= k_min <= k_max <= 100:
        raise ConfigError(f"gapsl: 0 <= k_min {k_min} <= k_max {k_max} <= 100 does not hold")
    server = _Server(k_min, k_max, eta, lambda_, gda)
    return Method(
        "gapsl",
        client_step,
        server.step,
        local_loss=False,
        answer_every=1,
        may_skip=True,
        gather=Gather.ALL,
        sync="none",
        memory=server,
    )


def client_step(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    z = part.bottom(x)  # (B, C, H, W)
    gradient = yield Smashed(z.detach(), y)
    if gradient is None:
        return None  # left out of this step

    part.optimizer.zero_grad()
    z.backward(gradient)
    part.optimizer.step()
    return None


class _Server:
    def __init__(self, k_min: float, k_max: float, eta: float, lambda_: float, gda: Alignment) -> None:
        self._k_min, self._k_max, self._eta, self._lambda, self._gda = k_min, k_max, eta, lambda_, gda
        self._spread_min, self._spread_max = math.inf, -math.inf

    def step(self, part: ServerPart, group: Sequence[Received]) -> Answer:
        weights = list(part.top.parameters())
        zs = [batch.z.requires_grad_() for batch in group]
        losses = [part.loss(part.top(z), batch.y) for z, batch in zip(zs, group, strict=True)]
        twice = self._gda == "exact"
        per_client = [
            torch.autograd.grad(loss, weights, retain_graph=True, create_graph=twice) for loss in losses
        ]
        live = [flat(gradients) for gradients in per_client]
        constant = torch.stack([gradient.detach() for gradient in live])  # (S, P)

        leader = leader_of(constant, self._leaders(constant, group[0].progress))  # (P,)
        kept = kept_clients(angles_to(constant, leader), self._eta)

        part.optimizer.zero_grad()
        total = torch.stack([losses[k] for k in kept]).sum()
        if twice:
            total = total + self._lambda * sum(1 - F.cosine_similarity(live[k], leader, dim=0) for k in kept)
        total.backward()
        if self._gda == "direction":
            push = torch.stack([alignment(constant[k], leader) for k in kept]).sum(0)
            _add(weights, self._lambda * push)
        part.optimizer.step()
        mean = torch.stack(losses).mean().detach()
        gradients = [z.grad if k in kept else None for k, z in enumerate(zs)]
        return Answer(mean, gradients, {"clients_kept": len(kept)})

    def state(self) -> dict[str, Tensor]:
        return {"spread": torch.tensor([self._spread_min, self._spread_max], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor], part: ServerPart) -> None:
        self._spread_min, self._spread_max = state["spread"].tolist()

    def _leaders(self, gradients: Tensor, progress: float) -> int:
        """How many clients lead this round."""
        spread = scores(gradients).std(unbiased=False).item()
        if not math.isfinite(spread):  # nor are the gradients: no step will be taken
            return 1
        self._spread_min, self._spread_max = min(self._spread_min, spread), max(self._spread_max, spread)
        varied = self._spread_max - self._spread_min
        stability = (self._spread_max - spread) / varied if varied > 0 else 0.0
        percent = self._k_min + progress * stability * (self._k_max - self._k_min)
        return max(1, math.ceil(percent * len(gradients) / 100))


def flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def angles_to(gradients: Tensor, leader: Tensor) -> Tensor:
    """Angles in radians of each gradient (S, P) to the leader (P,): (S,)."""
    return F.cosine_similarity(gradients, leader[None], dim=1).clamp(-1, 1).arccos()


def scores(gradients: Tensor) -> Tensor:
    """Each client's mean angle to the others: (S, P) to (S,); 0 for a client alone."""
    unit = F.normalize(gradients, dim=1)
    angles = (unit @ unit.T).clamp(-1, 1).arccos().fill_diagonal_(0)
    return angles.sum(1) / max(1, len(gradients) - 1)


def leader_of(gradients: Tensor, leaders: int) -> Tensor:
    """The mean of so many gradients (S, P) of the lowest score: (P,)."""
    return gradients[scores(gradients).argsort(stable=True)[:leaders]].mean(0)


def kept_clients(angles: Tensor, eta: float) -> list[int]:
    """Those whose angle (S,) is at most mean - eta * deviation, held to [0, pi/2]; or else the nearest."""
    threshold = (angles.mean() - eta * angles.std(unbiased=False)).clamp(0, math.pi / 2)
    kept: list[int] = (angles <= threshold).nonzero().flatten().tolist()
    return kept or [int(angles.argmin())]


def alignment(gradient: Tensor, leader: Tensor) -> Tensor:
    """Minus the gradient of 1 - cos(g, leader) with respect to g (P,); 0 for a g of 0, which has no angle."""
    if not gradient.any():
        return torch.zeros_like(gradient)
    g, lead = F.normalize(gradient, dim=0), F.normalize(leader, dim=0)
    away: Tensor = (lead - (g @ lead) * g) / gradient.norm()
    return away


def _add(weights: Sequence[Tensor], change: Tensor) -> None:
    """Adds a flat change (P,) to the gradients of the weights."""
    for weight, part in zip(weights, change.split([w.numel() for w in weights]), strict=True):
        assert weight.grad is not None, "every weight of the top is part of the loss"
        weight.grad += part.view_as(weight)
