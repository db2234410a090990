"""Ampere: clients train to the end on their own losses; then activations are sent once.

"Ampere: Communication-Efficient and High-Accuracy Split Federated Learning", 2025.
https://arxiv.org/abs/2507.07130

Clients learn from their heads, with parts averaged after each epoch, and send nothing. When all epochs
are over each sends the activations of its images once, made by the averaged bottom in evaluation mode;
the server then trains on all of them together, shuffled, for many epochs of its own.

Our reading where the paper's abstract is silent: images are sent as they are, and where the run augments
them the server augments what it got of them, anew in each of its epochs: with crops and flips as of the
images, since a convolution of a moved image is the moved convolution. (benchmarks/traffic: without it the
single pass costs four points of accuracy, with it none.) The server's learning rate runs through the whole
schedule during its training; the activations are held in the host's memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from common.crops import augmented
from common.errors import ConfigError
from common.methods.base import Answer, Attempt, ClientPart, Method, Received, ServerPart, Smashed, Step
from common.methods.dsl import client_step
from common.nets.layout import laid_out


def ampere(server_epochs: int = 20, server_batch: int = 128, augment: int = 1) -> Method:
    """server_epochs: passes of the server over all that was sent. server_batch: samples of its steps.
    augment: 1 where the server augments what it got, else 0; unless said, as the run has it.

    Raises ConfigError.
    """
    if min(server_epochs, server_batch) < 1 or augment not in (0, 1):
        raise ConfigError(
            f"ampere: server_epochs {server_epochs} or server_batch {server_batch} is below 1, or augment "
            f"{augment} neither 0 nor 1"
        )
    server = _Server(server_epochs, server_batch, augment == 1)
    return Method(
        "ampere",
        client_step,
        server.step,
        local_loss=True,
        send_every=0,
        sync="average",
        afterwards=send,
        round_step=server.train,
        memory=server,
    )


def send(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    part.bottom.eval()
    with torch.no_grad():
        z = part.bottom(x)  # (B, C, H, W)
    part.bottom.train()
    yield Smashed(z, y)  # the wire: nothing comes back
    return None


class _Server:
    def __init__(self, epochs: int, size: int, augment: bool) -> None:
        self._epochs, self._size, self._augment = epochs, size, augment
        self._stored: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by client: whatever order they come in

    def step(self, part: ServerPart, group: Sequence[Received]) -> Answer:
        for batch in group:
            self._stored.setdefault(batch.client, []).append((batch.z.cpu(), batch.y.cpu()))
        return Answer(None)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for client, batches in self._stored.items():
            for index, (z, y) in enumerate(batches):
                state |= {f"{client}.{index}.z": z, f"{client}.{index}.y": y}
        return state

    def load(self, state: Mapping[str, Tensor], part: ServerPart) -> None:
        places = [name.split(".") for name in state if name.endswith(".z")]
        for client, index in sorted((int(client), int(index)) for client, index, _ in places):
            batch = state[f"{client}.{index}.z"], state[f"{client}.{index}.y"]
            self._stored.setdefault(client, []).append(batch)

    def train(self, part: ServerPart, attempt: Attempt) -> Answer:
        """Trains on all that has come; the mean loss of the last epoch."""
        device = next(part.top.parameters()).device
        stored = [batch for client in sorted(self._stored) for batch in self._stored[client]]
        z, y = (torch.cat(tensors) for tensors in zip(*stored, strict=True))
        self._stored.clear()
        losses, skipped = list[Tensor](), 0
        for epoch in range(self._epochs):
            losses.clear()
            batches = torch.randperm(len(y), generator=part.generator).split(self._size)
            for index, some in enumerate(batches):
                seen = augmented(z[some], part.generator) if self._augment else z[some]
                step = partial(_step, part, seen.to(device), y[some].to(device))
                answer = attempt((epoch + index / len(batches)) / self._epochs, step)
                skipped += answer.skipped
                if answer.loss is not None:
                    losses.append(answer.loss)
        mean = torch.stack(losses).mean() if losses else None
        return Answer(mean, replayed=(self._epochs - 1) * len(y), skipped=skipped)


def _step(part: ServerPart, z: Tensor, y: Tensor) -> Answer:
    loss = part.loss(part.top(laid_out(z, part.top)), y)
    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return Answer(loss.detach())
