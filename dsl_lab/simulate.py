"""A whole federation in one thread: no queue, no codec, no socket. Slow, simple, deterministic.

Because a method's client step is a generator, its clients and its server can take turns here with
nothing between them. What the real system does over the wire must equal this, bit for bit.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from common.methods.base import ClientPart, Gather, Method, ServerPart, Smashed, Step
from common.optim import learning_rate, set_learning_rate
from common.run import Run

Batch = tuple[Tensor, Tensor]
Tick = Sequence[tuple[int, float, Batch]]  # (client, progress, (x, y)) of the batches of one tick


def simulate(
    run: Run, method: Method, clients: Sequence[ClientPart], server: ServerPart, ticks: Iterable[Tick]
) -> None:
    """Trains all parts, in place. A tick has at most one batch of a client, in the server's order."""
    for tick in ticks:
        steps: list[Step] = []
        batches: list[Smashed] = []
        for client, progress, (x, y) in tick:
            set_learning_rate(clients[client].optimizer, learning_rate(run, progress))
            steps.append(method.client_step(clients[client], x, y))
            batches.append(next(steps[-1]))
        gradients: list[Tensor | None] = []
        groups = [range(len(batches))] if method.gather is Gather.ALL else [[i] for i in range(len(batches))]
        for group in groups:
            progress = sum(tick[i][1] for i in group) / len(group)
            set_learning_rate(server.optimizer, learning_rate(run, progress))
            answer = method.server_step(server, [batches[i] for i in group])
            gradients.extend(answer.gradients if method.answers else [None] * len(group))
        for step, gradient in zip(steps, gradients, strict=True):
            _finish(step, gradient)


def _finish(step: Step, gradient: Tensor | None) -> None:
    try:
        step.send(gradient)
    except StopIteration:
        return
    raise AssertionError("a client step yields once")
