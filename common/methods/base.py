"""What a method is: a pair of rules, one for each end of the wire.

The client's rule is a generator, and `yield` is the wire: it yields what it sends and is sent back
the cut gradient, or None. Nothing here, nor in any method, knows of sockets, threads or files.

Dimension key: B batch, C channels, H and W height and width at the cut.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass, field

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from common.run import Sync


@dataclass(frozen=True)
class Smashed:
    """What crosses the cut: activations z (B, C, H, W), detached, and their labels y (B,) int64."""

    z: Tensor
    y: Tensor


@dataclass(frozen=True)
class Received(Smashed):
    """A batch at the server: whose it is, and the fraction of the run that lies before it."""

    client: int
    progress: float


@dataclass(frozen=True)
class Answer:
    """What a server step made: its mean loss (), and dL/dz (B, C, H, W) for each batch of the group.

    A gradient of None tells a client that its batch had no part in the step. `facts`: what the method
    would have noted, as numbers.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None] = ()
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientPart:
    """The client's end of the network: the layers up to the cut, and its head if it learns alone."""

    bottom: nn.Module
    head: nn.Module | None
    optimizer: Optimizer

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"bottom": self.bottom} | ({"head": self.head} if self.head is not None else {})


@dataclass(frozen=True)
class ServerPart:
    """The server's end of the network: the layers after the cut; and its own source of chance."""

    top: nn.Module
    optimizer: Optimizer
    generator: Generator

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"top": self.top}


Part = ClientPart | ServerPart


class Gather(enum.Enum):
    """How many batches make one server step."""

    EACH = "each"  # every batch on its own, as it comes
    ALL = "all"  # one from every client, together


Step = Steps[Smashed, Tensor | None, Tensor | None]
ClientStep = Callable[[ClientPart, Tensor, Tensor], Step]
ServerStep = Callable[[ServerPart, Sequence[Received]], Answer]


@dataclass(frozen=True)
class Method:
    """A pair of rules, and the few facts about them that the rest must know."""

    name: str
    client_step: ClientStep  # returns the client's own mean loss (), if it has one
    server_step: ServerStep
    local_loss: bool  # the client has a head of its own
    answers: bool  # a cut gradient travels back for every batch
    gather: Gather = Gather.EACH
    copies: bool = False  # a server part for each client, averaged at each epoch's end
    may_skip: bool = False  # an answer may have no gradient
    every: int = 1  # batches from one that is sent to the next
    sync: Sync | None = None  # what becomes of the clients' parts, where the method says it


def run_step(step: Step, wire: Callable[[Smashed], Tensor | None]) -> Tensor | None:
    """Runs a client step to its end over the wire; returns its local loss, if it has one."""
    answer = None
    while True:
        try:
            smashed = step.send(answer)
        except StopIteration as done:
            loss: Tensor | None = done.value
            return loss
        answer = wire(smashed)  # outside the try: a closed wire must not look like a finished step
