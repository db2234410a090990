"""DSL with a share of the server's loss, and Ampere, against loops in plain torch: ten steps, to 1e-6."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.crops import augmented, crop_and_flip
from common.errors import ConfigError
from common.methods import build_method
from common.run import Run
from tests.federation import Batches
from tests.plain import (
    ALONE,
    UNEQUAL,
    Trained,
    assert_near,
    assert_same,
    copies,
    gradients_of,
    mean_into,
    move,
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


# ---------------------------------------------------------------- DSL's lambda


def dsl_run(clients: int, *settings: str) -> Run:
    return plain_run("dsl", clients, method_arg=settings)


@NORMS
@SHARES
def test_lambda_adds_the_servers_loss_as_one_pass_through_the_whole_network_has_it(
    samples: Sequence[int], norm: bool
) -> None:
    run = dsl_run(len(samples), "lambda_=0.5", "q=2")
    data = shares(run, samples)
    ours = trained(run, data, norm)

    net = network(norm)
    bottoms, heads, top = copies(net.bottom, len(data)), copies(net.head, len(data)), net.top
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, heads, strict=True)]
    top_moves = optimizer_of(run, top)
    for _ in range(run.epochs):
        for index, tick in enumerate(rounds(data)):
            for k, x, y in tick:
                z = bottoms[k](x)
                own, served = F.cross_entropy(heads[k](z), y), F.cross_entropy(top(z), y)
                loss = own + 0.5 * served if index % 2 == 0 else own
                mine = gradients_of(loss, [bottoms[k], heads[k]], retain_graph=True)
                (theirs,) = gradients_of(served, [top])  # both of before either's step
                move(moves[k], [*mine[0], *mine[1]])
                move(top_moves, theirs)

    answered = [any(g is not None for g in answer.gradients) for answer in ours.answers]
    assert sum(answered) == run.epochs * sum(math.ceil(len(share) / 2) for share in data)
    assert moved(bottoms, network(norm).bottom)
    assert_near([*ours.bottoms, *ours.heads, *ours.tops], [*bottoms, *heads, top])


@NORMS
def test_lambda_0_is_dsl_and_any_other_is_not(norm: bool) -> None:
    settings: list[tuple[str, ...]] = [(), ("lambda_=0", "q=3"), ("lambda_=0.01", "q=3")]
    runs = [dsl_run(3, *some) for some in settings]
    dsl, nothing, a_little = (trained(run, shares(run, UNEQUAL), norm) for run in runs)
    assert_same(nothing.modules, dsl.modules)
    for ours, theirs in zip(a_little.bottoms, dsl.bottoms, strict=True):
        assert not torch.equal(next(ours.parameters()), next(theirs.parameters()))


# ---------------------------------------------------------------- Ampere


class Reshuffled(Batches):
    """In another order each epoch: who asks for the wrong epoch gets other batches."""

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(number))
        yield from ((self.x[some], self.y[some]) for some in order.split(self._size))


def reshuffled(run: Run, samples: Sequence[int]) -> list[Batches]:
    return [Reshuffled(run, seed=client, samples=n) for client, n in enumerate(samples)]


def ampere_reference(
    run: Run, data: Sequence[Batches], norm: bool, epochs: int, size: int, augment: bool
) -> Trained:
    def rate(progress: float) -> float:
        return run.lr / 2 * (1 + math.cos(math.pi * progress))

    net = network(norm)
    bottoms, heads = copies(net.bottom, len(data)), copies(net.head, len(data))
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, heads, strict=True)]
    for epoch in range(run.epochs):
        for share, bottom, head, optimizer in zip(data, bottoms, heads, moves, strict=True):
            for index, (x, y) in enumerate(share.epoch(epoch)):
                optimizer.param_groups[0]["lr"] = rate((epoch + index / len(share)) / run.epochs)
                optimizer.zero_grad()
                F.cross_entropy(head(bottom(x)), y).backward()
                optimizer.step()
        for modules in (bottoms, heads):
            mean_into(modules, [share.samples for share in data])

    everything = [(bottoms[0].eval()(x).detach(), y) for share in data for x, y in share.plain()]
    z, y = (torch.cat(tensors) for tensors in zip(*everything, strict=True))
    top, top_moves = net.top, optimizer_of(run, net.top)
    dice = torch.Generator().manual_seed(run.seed)
    steps, step = epochs * math.ceil(len(y) / size), 0
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=dice)
        for start in range(0, len(y), size):
            some = order[start : start + size]
            top_moves.param_groups[0]["lr"] = rate(step / steps)
            top_moves.zero_grad()
            seen = crop_and_flip(z[some], 1, dice) if augment else z[some]
            F.cross_entropy(top(seen), y[some]).backward()
            top_moves.step()
            step += 1
    return Trained([], [*bottoms, *heads, top], [])


@NORMS
@SHARES
@pytest.mark.parametrize(("epochs", "size", "augment"), [(3, 5, False), (12, 128, False), (3, 5, True)])
def test_ampere_is_local_training_and_then_the_servers_on_all_activations(
    samples: Sequence[int], norm: bool, epochs: int, size: int, augment: bool
) -> None:
    settings = (f"server_epochs={epochs}", f"server_batch={size}", f"augment={int(augment)}")
    run = plain_run("ampere", len(samples), method_arg=settings, schedule="cosine")
    data = reshuffled(run, samples)
    ours = trained(run, data, norm)
    assert moved(ours.bottoms, network(norm).bottom)
    assert moved(ours.tops, network(norm).top)
    reference = ampere_reference(run, data, norm, epochs, size, augment)
    assert_near([*ours.bottoms, *ours.heads, *ours.tops], reference.tops)


@NORMS
@SHARES
def test_amperes_clients_end_as_those_of_dsl_with_averaged_parts(samples: Sequence[int], norm: bool) -> None:
    """Of one alone: as that of plain DSL."""
    sync = "average" if len(samples) > 1 else "none"
    runs = [plain_run("dsl", len(samples), sync=sync), plain_run("ampere", len(samples))]
    dsl, ampere = (trained(run, shares(run, samples), norm) for run in runs)
    assert moved(ampere.bottoms, network(norm).bottom)
    assert_same([*ampere.bottoms, *ampere.heads], [*dsl.bottoms, *dsl.heads])


def test_activations_of_a_moved_image_are_the_moved_activations() -> None:
    """Inside; so that to augment these is to augment those."""
    bottom = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1))
    x = torch.randn(2, 3, 16, 16)
    moved_z, z_moved = bottom(x.roll((1, -2), (2, 3))), bottom(x).roll((1, -2), (2, 3))
    assert torch.allclose(moved_z[..., 4:-4, 4:-4], z_moved[..., 4:-4, 4:-4], atol=1e-6)


def test_activations_are_cropped_out_of_a_margin_of_a_sixteenth() -> None:
    z = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(500, -1, -1, -1)
    seen = augmented(z, torch.Generator().manual_seed(1))
    corners = {float(value) for value in seen[:, 0, 0, 0]}
    assert corners == {0.0, 1, 2, 9, 10, 7, 8, 15, 16}, "a pixel up, down, left, right, and flipped"
    wide = augmented(torch.ones(500, 2, 32, 32), torch.Generator().manual_seed(1))
    assert (1 - wide).sum((1, 2, 3)).max() == 2 * (32**2 - 30**2), "two pixels away from both borders"
    flat = torch.ones(3, 7)
    assert augmented(flat, torch.Generator()) is flat


def test_amperes_server_stays_as_it_is_until_the_end() -> None:
    run = plain_run("ampere")
    ours = trained(run, shares(run, UNEQUAL))
    assert len(ours.answers) == 13, "each batch came once, in two epochs"
    assert {answer.loss for answer in ours.answers} == {None}, "and none was a step"
    assert moved(ours.tops, network(norm=False).top), "the steps came after"


# ---------------------------------------------------------------- a batch in portions


@pytest.mark.parametrize("portions", [2, 3, 4])
def test_without_batchnorm_portions_make_the_step_of_the_whole_batch(portions: int) -> None:
    """Batches of 4, and a short one of 2: also fewer samples than portions."""
    whole, taken = (
        trained(run, shares(run, ALONE))
        for run in (plain_run("dsl", 1), plain_run("dsl", 1, method_arg=(f"portions={portions}",)))
    )
    assert_near(taken.modules, whole.modules)
    assert moved(taken.bottoms, network(norm=False).bottom)


def test_batchnorm_sees_a_portion_and_each_moves_its_statistics_by_its_share() -> None:
    run = plain_run("dsl", 1, method_arg=("portions=2",))
    (data,) = shares(run, ALONE)
    ours = trained(run, [data], norm=True)

    net = network(norm=True)
    for norm in (
        m for part in (net.bottom, net.head) for m in part.modules() if isinstance(m, nn.BatchNorm2d)
    ):
        assert norm.momentum == 0.1
        norm.momentum = 1 - 0.9**0.5  # twice that is once 0.1
    client, server = optimizer_of(run, net.bottom, net.head), optimizer_of(run, net.top)
    for _ in range(run.epochs):
        for x, y in data.epoch(0):
            client.zero_grad()
            zs = []
            for some, labels in zip(x.split(len(x) // 2), y.split(len(x) // 2), strict=True):
                zs.append(net.bottom(some))
                (F.cross_entropy(net.head(zs[-1]), labels, reduction="sum") / len(x)).backward()
            client.step()
            server.zero_grad()
            F.cross_entropy(net.top(torch.cat(zs).detach()), y).backward()
            server.step()
    assert_near(ours.modules, [net.bottom, net.head, net.top])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("portions=0",), "portions 0 at least 1"),
        (("portions=2", "lambda_=0.5"), "portions 2: with lambda_ a whole batch is held"),
    ],
)
def test_portions_that_cannot_be_are_refused(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_method(Run(method="dsl", method_arg=settings))
