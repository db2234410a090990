"""FSL-SAGE: the client's head estimates the server's gradient, and the server aligns it now and then.

"FSL-SAGE: Accelerating Federated Split Learning via Smashed Activation Gradient Estimation", ICML 2025.
https://arxiv.org/abs/2505.23182 and the authors' code.

The client's bottom learns from dCE(a(z), y)/dz, with the head a held still; every q-th batch is sent.
The server keeps each client's last samples; every l epochs it computes their true dL/dz and fits that
client's head to them, min |d/dz CE(a(z), y) - dL/dz|^2, and the head goes down. Bottoms are averaged.

Our reading: a round is an epoch; the true gradients are made in evaluation mode, so that BatchNorm's
statistics keep still; the fit is by Adam, as in the authors' code. Who is sent its head by the server is
steered by it: what DSL rules out is possible here.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError
from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Smashed, Step
from common.methods.dsl import server_step
from common.nets.layout import laid_out
from common.objective import Loss

KEPT = 1000  # samples of each client
BATCH = 100  # of the fit


def fsl_sage(q: int = 5, l: int = 10, align_epochs: int = 5, align_lr: float = 1e-3) -> Method:  # noqa: E741
    """q: batches from one sent to the next. l: epochs from one new head to the next; each takes
    align_epochs over the samples kept, at Adam's align_lr. Raises ConfigError."""
    if min(q, l, align_epochs) < 1 or align_lr <= 0:
        raise ConfigError(
            f"fsl-sage: q {q}, l {l} or align_epochs {align_epochs} is below 1, or align_lr {align_lr} not "
            "above 0"
        )
    server = _Server(align_epochs, align_lr)
    return Method(
        "fsl-sage",
        client_step,
        server.step,
        local_loss=True,
        send_every=q,
        sync="average",
        new_head=server.new_head,
        head_every=l,
        memory=server,
    )


def client_step(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    assert part.head is not None, "the head stands for the server"
    z = part.bottom(x)  # (B, C, H, W)
    yield Smashed(z.detach(), y)  # the wire: nothing comes back

    leaf = z.detach().requires_grad_()
    loss = part.loss(part.head(leaf), y)
    (estimate,) = torch.autograd.grad(loss, leaf)
    part.optimizer.zero_grad()
    z.backward(estimate)
    part.optimizer.step()  # of the bottom: the head has no gradient
    return loss.detach()


@dataclass
class _Client:
    """What the server has of a client: its head, the epoch after which that was fitted, its last samples."""

    head: nn.Module
    fitted: int = -1
    samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def keep(self, z: Tensor, y: Tensor) -> None:
        self.samples.append((z, y))
        while sum(len(y) for _, y in self.samples[1:]) >= KEPT:
            self.samples.pop(0)


class _Server:
    def __init__(self, epochs: int, lr: float) -> None:
        self._epochs, self._lr = epochs, lr
        self._clients: dict[int, _Client] = {}

    def step(self, part: ServerPart, group: Sequence[Received]) -> Answer:
        (batch,) = group
        self._client(part, batch.client).keep(batch.z.detach(), batch.y)
        return server_step(part, group)

    def new_head(self, part: ServerPart, client: int, epoch: int) -> nn.Module:
        """The client's head, fitted to the server's gradients at its samples; once after an epoch, however
        often its client asks."""
        kept = self._client(part, client)
        if kept.fitted == epoch:
            return kept.head
        kept.fitted = epoch
        z, y = (torch.cat(tensors)[-KEPT:] for tensors in zip(*kept.samples, strict=True))
        z = laid_out(z, part.top)
        optimizer = torch.optim.Adam(kept.head.parameters(), self._lr)
        for _ in range(self._epochs):
            order = torch.randperm(len(y), generator=part.generator).to(y.device)
            for some in order.split(BATCH):
                true = cut_gradient(part.top, z[some], y[some], part.loss)
                gap = misfit(kept.head, z[some], y[some], true, part.loss)
                if not gap.isfinite():  # among them are samples whose step was left out
                    continue
                optimizer.zero_grad()
                gap.backward()
                optimizer.step()
        return kept.head

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for client, kept in self._clients.items():
            state[f"{client}.fitted"] = torch.tensor(kept.fitted)
            for name, tensor in kept.head.state_dict().items():
                state[f"{client}.head.{name}"] = tensor.to("cpu", copy=True)  # it will be fitted again
            for index, (z, y) in enumerate(kept.samples):
                state |= {f"{client}.z.{index}": z, f"{client}.y.{index}": y}
        return state

    def load(self, state: Mapping[str, Tensor], part: ServerPart) -> None:
        for client in sorted({int(name.partition(".")[0]) for name in state}):
            kept = self._client(part, client)
            kept.fitted = int(state[f"{client}.fitted"])
            for name, tensor in kept.head.state_dict().items():
                tensor.copy_(state[f"{client}.head.{name}"])
            device = next(kept.head.parameters()).device
            while (z := state.get(f"{client}.z.{len(kept.samples)}")) is not None:
                y = state[f"{client}.y.{len(kept.samples)}"]
                kept.samples.append((z.to(device), y.to(device)))

    def _client(self, part: ServerPart, client: int) -> _Client:
        assert part.head is not None, "the server has the clients' first head"
        if client not in self._clients:
            self._clients[client] = _Client(copy.deepcopy(part.head))
        return self._clients[client]


def cut_gradient(top: nn.Module, z: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """dL/dz (B, C, H, W) of the mean loss; the weights and statistics keep still."""
    leaf = z.detach().requires_grad_()
    top.eval()
    (gradient,) = torch.autograd.grad(loss(top(leaf), y), leaf)
    top.train()
    return gradient


def misfit(head: nn.Module, z: Tensor, y: Tensor, gradient: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """|d/dz L(head(z), y) - gradient|^2 (), summed over the batch; it can be differentiated again."""
    leaf = z.detach().requires_grad_()
    (estimate,) = torch.autograd.grad(loss(head(leaf), y), leaf, create_graph=True)
    return (estimate - gradient).square().sum()
