"""What a method is: a pair of rules, one for each end of the wire.

The client's rule is a generator, and `yield` is the wire: it yields what it sends and is sent back
what the server answers, or None. Nothing here, nor in any method, knows of sockets, threads or files.

Dimension key: B batch, C channels, H and W height and width at the cut.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from common.codecs import Parcel
from common.objective import Loss
from common.run import Sync


@dataclass(frozen=True)
class Smashed:
    """What crosses the cut: activations z (B, C, H, W), detached, and their labels y (B,) int64; or y (B, K)
    float32, where targets are numbers.

    y is empty, (0,), where labels stay with the client.
    """

    z: Tensor
    y: Tensor


WAYPOINT_EVERY = 8  # batches


def _no_tail(_: Tensor) -> Tensor:
    raise AssertionError("this method's client has no last layers")


@dataclass(frozen=True)
class Received(Smashed):
    """A batch at the server: whose it is, and the fraction of the run that lies before it.

    wanted: the client waits for dL/dz. through_tail: gives the client what the server's layers made of the
    batch, u (B, ...) detached, and waits for dL/du: for methods whose client has the last layers. parcel: the
    activations as they travelled.
    """

    client: int
    progress: float
    wanted: bool = True
    through_tail: Callable[[Tensor], Tensor] = _no_tail
    parcel: Parcel | None = None


@dataclass(frozen=True)
class Answer:
    """What a server step made: its mean loss () if it knows one, and dL/dz (B, C, H, W) of each batch.

    A gradient of None tells a client that its batch had no part in the step. `facts`: what the method
    would have noted, as numbers. replayed: samples that it learned from once more, of those that it holds.
    skipped: steps left out, for what they came to was not finite.
    """

    loss: Tensor | None
    gradients: Sequence[Tensor | None] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    replayed: int = 0
    skipped: int = 0


class Stage(NamedTuple):
    """Layers that learn from a loss of their own, through a head."""

    layers: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class ClientPart:
    """The client's end of the network: the layers up to the cut, and its head if it learns alone.

    tail: the network's last layers, where the client has them. inner: where the bottom is cut again,
    its slices and their heads but for the last slice, which is `outermost` and has `head`. loss: the run's,
    of outputs (B, K) and y: their mean ().
    """

    bottom: nn.Module
    head: nn.Module | None
    optimizer: Optimizer
    tail: nn.Module | None = None
    inner: Sequence[Stage] = ()
    last: nn.Module | None = None
    loss: Loss = F.cross_entropy

    @property
    def outermost(self) -> nn.Module:
        """The layers before the cut that learn from `head`: the whole bottom, unless it is cut again."""
        return self.bottom if self.last is None else self.last

    @property
    def modules(self) -> dict[str, nn.Module]:
        named = {"bottom": self.bottom, "head": self.head, "tail": self.tail, **_heads(self.inner)}
        return {name: module for name, module in named.items() if module is not None}


@dataclass(frozen=True)
class ServerPart:
    """The server's end of the network: the layers after the cut; and its own source of chance.

    inner, last, loss: as a client's. head: a client's first head, for methods that make heads at the server.
    """

    top: nn.Module
    optimizer: Optimizer
    generator: Generator
    inner: Sequence[Stage] = ()
    last: nn.Module | None = None
    head: nn.Module | None = None
    loss: Loss = F.cross_entropy

    @property
    def outermost(self) -> nn.Module:
        """The layers that give the logits: the whole top, unless it is cut again."""
        return self.top if self.last is None else self.last

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"top": self.top, **_heads(self.inner)}


def _heads(inner: Sequence[Stage]) -> dict[str, nn.Module]:
    return {f"heads.{index}": stage.head for index, stage in enumerate(inner)}


Part = ClientPart | ServerPart


class Gather(enum.Enum):
    """How many batches make one server step."""

    EACH = "each"  # every batch on its own, as it comes
    ALL = "all"  # one from every client, together


class Tail(enum.Enum):
    """What the client has of the layers after the cut. Where it has any, labels stay with it."""

    NONE = "none"
    LAST = "last"  # the classifier: a U-shaped network
    ALL = "all"  # the whole network is at the client


Sent = Smashed | Tensor  # a batch; or, for a batch's output that came back, dL/du
Step = Steps[Sent, Tensor | None, Tensor | None]
ClientStep = Callable[[ClientPart, Tensor, Tensor], Step]  # of images x (B, C, H, W), labels y (B,)
ServerStep = Callable[[ServerPart, Sequence[Received]], Answer]
# Takes a step at the learning rate of a fraction of a training, if what it comes to is finite.
Attempt = Callable[[float, Callable[[], Answer]], Answer]
RoundStep = Callable[[ServerPart, Attempt], Answer]
NewHead = Callable[[ServerPart, int, int], nn.Module]  # of a client, by its index, after an epoch


class ServerMemory(Protocol):
    """What a method's server keeps from one step to the next, beside its part: part of every checkpoint."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor], part: ServerPart) -> None: ...


@dataclass(frozen=True)
class Method:
    """A pair of rules, and the few facts about them that the rest must know."""

    name: str
    client_step: ClientStep  # returns the client's own mean loss (), if it has one
    server_step: ServerStep
    local_loss: bool  # the client has a head of its own
    send_every: int = 1  # batches from one that is sent to the next; 0: none is
    first_epoch: int = 0  # in which any is sent
    epoch_every: int = 1  # epochs from one in which any is sent to the next
    answer_every: int = 0  # of those sent, from one that is answered with dL/dz to the next; 0: none is
    may_skip: bool = False  # an answer may have no gradient
    gather: Gather = Gather.EACH
    copies: bool = False  # a server part for each client, averaged at each epoch's end
    sync: Sync | None = None  # what becomes of the clients' parts, where the method says it
    tail: Tail = Tail.NONE
    modular: bool = False  # each end may be cut again, into modules that learn from heads of their own
    afterwards: ClientStep | None = None  # over each batch once more, and sent, when all epochs are over
    round_step: RoundStep | None = None  # of the server, when every client's batches have come
    any_loss: bool = True  # else its equations are of cross-entropy
    new_head: NewHead | None = None  # made at the server for each client, every head_every epochs
    head_every: int = 0
    memory: ServerMemory | None = None

    @property
    def one_way(self) -> bool:
        """Whether nothing that a client sends in training is answered."""
        return self.answer_every == 0 and self.tail is not Tail.LAST

    @property
    def goes_back(self) -> bool:
        """Whether a client whose server has forgotten a step must forget it, too: what came back for the
        batch is part of it."""
        return not self.one_way

    @property
    def in_rounds(self) -> bool:
        """Whether its server takes one batch of each client at a time, or does something when all of an epoch
        have come: then clients wait for one another."""
        return self.gather is Gather.ALL or self.copies or self.round_step is not None

    @property
    def streams(self) -> bool:
        """Whether batches go one way from beginning to end, each learned from on its own."""
        whole_time = self.send_every > 0 and self.round_step is None and self.new_head is None
        labels = self.tail is Tail.NONE  # they travel along
        return self.one_way and whole_time and labels and self.gather is Gather.EACH and not self.copies

    def sent(self, epoch: int, batches: int) -> range:
        """Which of this epoch's batches are sent, from 0."""
        return range(0, batches, self.send_every) if self.send_every and self.sends(epoch) else range(0)

    def sends(self, epoch: int) -> bool:
        """Whether any batch of this epoch is sent, if the method sends any in training."""
        since = epoch - self.first_epoch
        return since >= 0 and since % self.epoch_every == 0

    def answered(self, place: int) -> bool:
        """Whether dL/dz comes back for the batch at this place, from 0, of those sent in a segment."""
        return self.answer_every > 0 and place % self.answer_every == 0


def is_waypoint(place: int, batches: int) -> bool:
    """Whether a client that may have to go back keeps what it was after this batch, from 0, of its epoch.

    Both ends know these places: the server makes a checkpoint only where every client can come back to.
    """
    return (place + 1) % WAYPOINT_EVERY == 0 or place + 1 == batches


def run_step(step: Step, wire: Callable[[Sent], Tensor | None]) -> Tensor | None:
    """Runs a client step to its end over the wire, which takes what it sends and gives dL/dz (B, ...)
    or None; returns its local loss (), if it has one."""
    answer = None
    while True:
        try:
            sent = step.send(answer)
        except StopIteration as done:
            loss: Tensor | None = done.value
            return loss
        answer = wire(sent)  # outside the try: a closed wire must not look like a finished step
