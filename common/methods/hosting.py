"""The server's side of a method: its parts of the network, one for all clients or a copy for each.

What the real server's trainer and the simulation in one thread do alike: learning rate, step, the
end of a round, scoring.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.base import Answer, Method, Received, ServerPart
from common.optim import learning_rate, set_learning_rate, sgd
from common.parts import average, load_state, state_of
from common.run import Run


class Hosting:
    """`parts`: one, or one for each client where the method has copies; all begin alike."""

    def __init__(self, run: Run, method: Method, part: ServerPart) -> None:
        self._run, self._method = run, method
        self.parts = [part]
        if method.copies:
            self.parts += [_copy(run, part) for _ in range(run.clients - 1)]
        self._samples = [0] * len(self.parts)  # of this round, by copy

    def step(self, group: Sequence[Received]) -> Answer:
        """One step of the method's rule on the group, at the learning rate of its progress."""
        index = group[0].client if self._method.copies else 0
        part = self.parts[index]
        progress = sum(batch.progress for batch in group) / len(group)
        set_learning_rate(part.optimizer, learning_rate(self._run, progress))
        self._samples[index] += sum(len(batch.y) for batch in group)
        return self._method.server_step(part, group)

    def end_round(self) -> None:
        """Averages the copies, weighted by the samples of the round; their momentum stays.

        A copy that was not trained, its client being lost, has no weight; if none was, nothing changes.
        """
        if self._method.copies and any(self._samples):
            mean = average([state_of(part, momentum=False) for part in self.parts], self._samples)
            for part in self.parts:
                load_state(part, mean)
            self._samples = [0] * len(self.parts)

    def score(self, z: Tensor, y: Tensor) -> tuple[int, float]:
        """How many of the batch are classified right, and the loss summed over it."""
        top: nn.Module = self.parts[0].top.eval()
        with torch.no_grad():
            logits = top(z)
            loss = F.cross_entropy(logits, y, reduction="sum")
            correct = (logits.argmax(1) == y).sum()
        top.train()
        return int(correct), loss.item()


def _copy(run: Run, part: ServerPart) -> ServerPart:
    top = copy.deepcopy(part.top)
    return ServerPart(top, sgd(top.parameters(), run), part.generator)
