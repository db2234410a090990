"""What tests of the methods share: a tiny smooth network, with BatchNorm or without; a whole run of the
system's own in one thread; and what references in plain torch are made of."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from common.methods import build_method
from common.methods.base import Answer, ClientPart, Received, ServerPart
from common.methods.hosting import Hosting
from common.nets.cut import CutNet
from common.parts import client_part, server_part
from common.run import Run
from dsl_lab.simulate import federate
from tests.federation import CPU, Batches, small_run

M = TypeVar("M", bound=nn.Module)
Turn = tuple[int, Tensor, Tensor]  # a client's index, its images and their labels

UNEQUAL = (20, 18, 11)  # 5, 5 and 3 batches of 4: short last ones, and a client that is ready first
ALONE = UNEQUAL[1:2]
EQUAL = (20, 20, 20)


def plain_run(method: str, clients: int = 3, **settings: Any) -> Run:
    """Ten steps at one learning rate: two epochs of five batches; `sync` as the method has it."""
    defaults = {"batch_size": 4, "lr": 0.1, "epochs": 2, "schedule": "constant", "warmup": 0.0, "seed": 3}
    run = small_run(method=method, clients=clients, **{**defaults, **settings})
    return replace(run, sync=build_method(run).sync or "none") if run.sync == "auto" else run


def shares(run: Run, samples: Sequence[int]) -> list[Batches]:
    return [Batches(run, seed=client, samples=n) for client, n in enumerate(samples)]


def network(norm: bool) -> CutNet:
    """Images (B, 3, 8, 8), activations (B, 4, 4, 4). Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return CutNet(
            bottom=nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), _norm(norm), nn.Tanh()),
            top=nn.Sequential(
                nn.Conv2d(4, 4, 3, stride=2, padding=1),
                _norm(norm),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(16, 4),
            ),
            head=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            cut_shape=(4, 4, 4),
        )


def _norm(norm: bool) -> nn.Module:
    return nn.BatchNorm2d(4) if norm else nn.Identity()


# ---------------------------------------------------------------- the system's own


@dataclass(frozen=True)
class Trained:
    """What a run came to, and all that its server had answered."""

    clients: Sequence[ClientPart]
    tops: list[nn.Module]
    answers: Sequence[Answer]
    servers: Sequence[ServerPart] = ()

    @property
    def bottoms(self) -> list[nn.Module]:
        return [part.bottom for part in self.clients]

    @property
    def heads(self) -> list[nn.Module]:
        return [part.head for part in self.clients if part.head is not None]

    @property
    def modules(self) -> list[nn.Module]:
        return [*self.bottoms, *self.heads, *self.tops]


def trained(
    run: Run, data: Sequence[Batches], norm: bool = False, make: Callable[[], CutNet] | None = None
) -> Trained:
    """All epochs, as the real system has them. test_transparency.py shows that it has.

    make: another network than this file's.
    """
    method, answers = build_method(run), list[Answer]()
    make = make or partial(network, norm)

    def noted(part: ServerPart, group: Sequence[Received]) -> Answer:
        answers.append(method.server_step(part, group))
        return answers[-1]

    clients = [client_part(run, method, make(), CPU) for _ in data]
    hosting = Hosting(run, replace(method, server_step=noted), server_part(run, method, make(), CPU))
    federate(run, method, clients, hosting, data)
    return Trained(clients, [part.top for part in hosting.parts], answers, hosting.parts)


# ---------------------------------------------------------------- what references are made of


def copies(module: M, n: int = 3) -> list[M]:
    return [copy.deepcopy(module) for _ in range(n)]


def optimizer_of(run: Run, *modules: nn.Module) -> SGD:
    learned = [parameter for module in modules for parameter in module.parameters()]
    return SGD(learned, run.lr, run.momentum, weight_decay=run.weight_decay)


def move(optimizer: SGD, gradients: Iterable[Tensor]) -> None:
    """One step with these gradients in place of the optimizer's own."""
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def gradients_of(loss: Tensor, modules: Sequence[nn.Module], **options: Any) -> list[list[Tensor]]:
    """The loss's gradients of each module's parameters."""
    listed = [list(module.parameters()) for module in modules]
    flat = iter(torch.autograd.grad(loss, [p for ps in listed for p in ps], **options))
    return [[next(flat) for _ in parameters] for parameters in listed]


def rounds(data: Sequence[Batches]) -> Iterator[list[Turn]]:
    """An epoch's batches, one of every client that has any left at a time."""
    for row in zip_longest(*(share.epoch(0) for share in data)):
        yield [(client, *batch) for client, batch in enumerate(row) if batch is not None]


def mean_into(modules: Sequence[nn.Module], samples: Sequence[int]) -> None:
    """Every module becomes the mean weighted by samples; counters become the largest."""
    states = [module.state_dict() for module in modules]
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            weighted = [n * state[name].double() for n, state in zip(samples, states, strict=True)]
            mean = torch.stack(weighted).sum(0) / sum(samples)
        else:
            mean = torch.stack([state[name] for state in states]).max()
        for state in states:
            state[name].copy_(mean.clone())


def assert_same(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> None:
    """Bit for bit."""
    for one, other in zip(ours, theirs, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def assert_near(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> None:
    """To 1e-6; the weights are of the order of 0.1."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=1e-6)


def moved(modules: Iterable[nn.Module], first: nn.Module) -> bool:
    """Whether training has changed every module by more than a reference may be off."""
    start = dict(first.named_parameters())
    return all(
        max(float((p - start[name]).detach().abs().max()) for name, p in module.named_parameters()) > 1e-3
        for module in modules
    )
