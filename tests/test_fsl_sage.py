"""FSL-SAGE: its formulas by hand, when a client's head changes, and whole runs against a loop."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.methods.base import Method, Received, ServerPart
from common.methods.fsl_sage import KEPT, cut_gradient, fsl_sage, misfit
from common.nets.cut import CutNet, build
from common.nets.heads import HEADS
from tests.federation import small_run
from tests.plain import (
    ALONE,
    UNEQUAL,
    assert_near,
    assert_same,
    copies,
    mean_into,
    moved,
    network,
    optimizer_of,
    plain_run,
    rounds,
    shares,
    trained,
)

NORMS = pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
SHARES = pytest.mark.parametrize("samples", [UNEQUAL, ALONE], ids=["three", "one"])


# ---------------------------------------------------------------- by hand


def linear(weight: float) -> tuple[nn.Sequential, nn.Linear]:
    """Of one activation and two classes: logits (weight, -weight) * z. The network, and its layer."""
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[weight], [-weight]]))
    return nn.Sequential(nn.Flatten(), layer).double(), layer


Z, Y = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.tensor([0, 1])


def test_the_cut_gradient_worked_by_hand() -> None:
    """At z = 0 both probabilities are 1/2, so a sample of class 0 has (-1/2, 1/2) at its logits, and with
    weights 3 and -3 dL/dz = -3; of class 1, 3; of the mean of the two samples, half of that."""
    top, layer = linear(3)
    gradient = cut_gradient(top, Z, Y)
    assert gradient.flatten().tolist() == [-1.5, 1.5]
    assert layer.weight.grad is None
    assert top.training


def test_the_misfit_and_its_derivative_worked_by_hand() -> None:
    """A head with weights 1 and -1 estimates -1/2 and 1/2: it is off by 1 and by -1.

    The estimates are (w2 - w1) / 4 and (w1 - w2) / 4 near there, for the probabilities do not change at
    z = 0: the derivative for w1 is 2 (1 * -1/4 + -1 * 1/4) = -1, and for w2 it is 1.
    """
    head, layer = linear(1)
    gap = misfit(head, Z, Y, torch.tensor([-1.5, 1.5]).reshape(Z.shape))
    gap.backward()
    assert gap.item() == 2
    assert layer.weight.grad is not None
    assert layer.weight.grad.flatten().tolist() == [-1, 1]


@NORMS
def test_the_cut_gradient_leaves_weights_and_statistics_alone(norm: bool) -> None:
    top, first = network(norm).top, network(norm).top
    z, y = torch.randn(8, 4, 4, 4), torch.arange(8) % 4
    gradient = cut_gradient(top, z, y)
    assert_same([top], [first])
    assert all(parameter.grad is None for parameter in top.parameters())
    leaf = z.clone().requires_grad_()
    (-first.eval()(leaf).log_softmax(1)[range(8), y].sum() / 8).backward()
    torch.testing.assert_close(gradient, leaf.grad)


# ---------------------------------------------------------------- the client


def copied(norm: bool) -> Callable[[], CutNet]:
    """The client's head is the server's top, weights and all."""

    def make() -> CutNet:
        net = network(norm)
        return replace(net, head=copy.deepcopy(net.top))

    return make


@NORMS
def test_a_head_that_is_the_top_estimates_what_csl_answers(norm: bool) -> None:
    """One step from weights that are still one and the same: bottoms, and tops, as under CSL."""
    settings = {"epochs": 1, "batch_size": 18}
    runs = [plain_run("csl", 1, **settings), plain_run("fsl-sage", 1, method_arg=("q=1",), **settings)]
    csl, sage = (trained(run, shares(run, ALONE), make=copied(norm)) for run in runs)
    assert len(sage.answers) == 1
    assert moved(sage.bottoms, network(norm).bottom)
    assert_same([*sage.bottoms, *sage.tops], [*csl.bottoms, *csl.tops])


def test_its_misfit_is_zero() -> None:
    net = copied(norm=False)()
    z, y = torch.randn(8, 4, 4, 4), torch.arange(8) % 4
    assert misfit(net.head, z, y, cut_gradient(net.top, z, y)).item() == 0


def test_a_head_stays_as_it_is_until_the_server_sends_one() -> None:
    """One for each client; what momentum and weight decay would do to it, they do not."""
    first = network(norm=True).head
    heads = []
    for epochs in (1, 2, 3):
        run = plain_run("fsl-sage", epochs=epochs, method_arg=("l=2",))
        ours = trained(run, shares(run, UNEQUAL), norm=True)
        assert moved(ours.bottoms, network(norm=True).bottom)
        heads.append(ours.heads)
    before, sent, after = heads
    assert_same(before, [first] * 3)
    assert moved(sent, first)
    assert_same(after, sent)
    assert len({weights_of(head) for head in sent}) == 3, "to each its own"


@pytest.mark.parametrize("head", HEADS)
def test_any_head_can_stand_for_the_server_and_be_fitted(head: str) -> None:
    """Its weights rest between two fits; BatchNorm's statistics in it follow what the client sees."""
    first = build(small_run(head=head, seed=3)).head
    for rounds_between, changed in [(3, False), (2, True)]:
        settings = (f"l={rounds_between}", "align_lr=0.01")
        run = plain_run("fsl-sage", 1, head=head, method_arg=settings)
        (ours,) = trained(run, shares(run, ALONE), make=partial(build, run)).heads
        same = [torch.equal(p, q) for p, q in zip(ours.parameters(), first.parameters(), strict=True)]
        assert not any(same[:1]) if changed else all(same)


def weights_of(head: nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in head.parameters())


# ---------------------------------------------------------------- the server


def server_of(lr: float = 0.0) -> ServerPart:
    """One whose top stays as it is."""
    net = network(norm=False)
    optimizer = SGD(net.top.parameters(), lr)
    return ServerPart(net.top, optimizer, torch.Generator().manual_seed(5), head=net.head)


def receive(method: Method, part: ServerPart, client: int, z: Tensor, y: Tensor, size: int) -> None:
    for some, labels in zip(z.split(size), y.split(size), strict=True):
        method.server_step(part, [Received(some.clone(), labels, client, 0.0, wanted=False)])


def made(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, 4, 4, generator=dice), torch.randint(0, 4, (samples,), generator=dice)


EPOCHS = itertools.count()


def new_head(method: Method, part: ServerPart, client: int = 0) -> nn.Module:
    assert method.new_head is not None
    return method.new_head(part, client, next(EPOCHS))


@pytest.mark.parametrize(("epochs", "lr", "left"), [(5, 1e-3, 0.98), (100, 1e-2, 0.5)])
def test_a_fitted_head_is_nearer_to_the_servers_gradients(epochs: int, lr: float, left: float) -> None:
    method, part = fsl_sage(align_epochs=epochs, align_lr=lr), server_of()
    z, y = made(300)
    receive(method, part, 0, z, y, 100)
    true = cut_gradient(part.top, z, y)
    before, after = misfit(network(norm=False).head, z, y, true), misfit(new_head(method, part), z, y, true)
    assert after < left * before


def test_only_a_clients_last_thousand_samples_count() -> None:
    z, y = made(1300)
    heads = []
    for first, size in [(0, 128), (300, 1000), (299, 1001), (299, 7)]:
        method, part = fsl_sage(), server_of()
        receive(method, part, 0, z[first:], y[first:], size)
        heads.append(new_head(method, part))
    assert KEPT == 1000
    assert_same(heads[1:], heads[:1] * 3)
    method, part = fsl_sage(), server_of()
    receive(method, part, 0, z[301:], y[301:], 128)
    assert weights_of(new_head(method, part)) != weights_of(heads[0]), "and all of them do"


def test_a_clients_head_is_fitted_to_its_own_samples() -> None:
    method, part = fsl_sage(), server_of()
    receive(method, part, 1, *made(200, seed=1), 100)
    alone = copy.deepcopy(new_head(method, part, 1))
    method, part = fsl_sage(), server_of()
    for client in (0, 1, 2):
        receive(method, part, client, *made(200, seed=client), 100)
    assert_same([new_head(method, part, 1)], [alone])


# ---------------------------------------------------------------- whole runs


def fitted(
    head: nn.Module, top: nn.Module, kept: Sequence[tuple[Tensor, Tensor]], dice: torch.Generator
) -> None:
    """Of a linear head, whose estimate is (softmax - onehot) W / B; by Adam as its authors have it."""
    weight, bias = head.parameters()
    z, y = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)]
    for t in range(1, 4):  # epochs of one batch: there are fewer samples than a batch has
        order = torch.randperm(len(y), generator=dice)
        some, labels = z[order], y[order]
        leaf = some.clone().requires_grad_()
        (true,) = torch.autograd.grad(F.nll_loss(top.eval()(leaf).log_softmax(1), labels), leaf)
        top.train()
        off = (weight @ some.flatten(1).T).T + bias
        estimate = (off.softmax(1) - F.one_hot(labels, 4)) @ weight / len(labels)
        gap = ((estimate - true.flatten(1)) ** 2).sum()
        for (p, m, v), g in zip(state, torch.autograd.grad(gap, [p for p, *_ in state]), strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g**2)
            with torch.no_grad():
                p.sub_(0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


@NORMS
@SHARES
@pytest.mark.parametrize("l", [1, 2])
def test_a_run_trains_as_a_loop_in_plain_torch(samples: Sequence[int], norm: bool, l: int) -> None:  # noqa: E741
    settings = ("q=2", f"l={l}", "align_epochs=3", "align_lr=0.01")
    run = plain_run("fsl-sage", len(samples), method_arg=settings, epochs=3)
    data = shares(run, samples)
    ours = trained(run, data, norm)

    net = network(norm)
    bottoms, heads, top = copies(net.bottom, len(data)), copies(net.head, len(data)), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    dice = torch.Generator().manual_seed(run.seed)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in data]
    for epoch in range(run.epochs):
        for index, tick in enumerate(rounds(data)):
            for k, x, y in tick:
                z = bottoms[k](x)
                if index % 2 == 0:
                    kept[k].append((z.detach().clone(), y))
                    top_moves.zero_grad()
                    F.cross_entropy(top(z.detach().clone()), y).backward()
                    top_moves.step()
                moves[k].zero_grad()
                F.cross_entropy(heads[k](z), y).backward()  # whatever it does to the head is not used
                moves[k].step()
        mean_into(bottoms, samples)
        for head, batches in zip(heads, kept, strict=True):
            if (epoch + 1) % l == 0:
                fitted(head, top, batches, dice)

    assert moved(bottoms, network(norm).bottom)
    assert moved(heads, network(norm).head)
    assert_near([*ours.bottoms, *ours.heads, *ours.tops], [*bottoms, *heads, top])
