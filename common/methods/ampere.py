"""Ampere: clients train to the end on their own losses; then activations are sent once.

"Ampere: Communication-Efficient and High-Accuracy Split Federated Learning", 2025.
https://arxiv.org/abs/2507.07130

Clients learn from their heads, with parts averaged after each epoch, and send nothing. When all epochs
are over each sends the activations of its images once, made by the averaged bottom in evaluation mode;
the server then trains on all of them together, shuffled, for many epochs of its own.

Our reading where the paper's abstract is silent: images are augmented as in an epoch of their own; the
server's learning rate runs through the whole schedule during its training; the activations are held in
the host's memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.methods.base import Answer, ClientPart, Method, Pace, Received, ServerPart, Smashed, Step
from common.methods.dsl import client_step


def ampere(server_epochs: int = 20, server_batch: int = 128) -> Method:
    """server_epochs: passes of the server over all that was sent. server_batch: samples of its steps."""
    if min(server_epochs, server_batch) < 1:
        raise ConfigError(f"ampere: server_epochs {server_epochs} or server_batch {server_batch} is below 1")
    server = _Server(server_epochs, server_batch)
    return Method(
        "ampere",
        client_step,
        server.step,
        local_loss=True,
        send_every=0,
        sync="average",
        afterwards=send,
        round_step=server.train,
    )


def send(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    part.bottom.eval()
    with torch.no_grad():
        z = part.bottom(x)  # (B, C, H, W)
    part.bottom.train()
    yield Smashed(z, y)  # the wire: nothing comes back
    return None


class _Server:
    def __init__(self, epochs: int, size: int) -> None:
        self._epochs, self._size = epochs, size
        self._stored: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by client: whatever order they come in

    def step(self, part: ServerPart, group: Sequence[Received]) -> Answer:
        for batch in group:
            self._stored.setdefault(batch.client, []).append((batch.z.cpu(), batch.y.cpu()))
        return Answer(None)

    def train(self, part: ServerPart, pace: Pace) -> Answer:
        """Trains on all that has come; the mean loss of the last epoch."""
        device = next(part.top.parameters()).device
        stored = [batch for client in sorted(self._stored) for batch in self._stored[client]]
        z, y = (torch.cat(tensors) for tensors in zip(*stored, strict=True))
        self._stored.clear()
        losses: list[Tensor] = []
        for epoch in range(self._epochs):
            losses.clear()
            batches = torch.randperm(len(y), generator=part.generator).split(self._size)
            for index, some in enumerate(batches):
                pace((epoch + index / len(batches)) / self._epochs)
                losses.append(_step(part, z[some].to(device), y[some].to(device)))
        return Answer(torch.stack(losses).mean(), replayed=(self._epochs - 1) * len(y))


def _step(part: ServerPart, z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(part.top(z), y)
    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return loss.detach()
