"""Clients that have the network's last layers, or all of it: U-shaped split learning, and FedAvg."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch.nn.functional as F
from torch import nn

from common.nets.cut import CutNet, build
from common.optim import learning_rate
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
NETWORKS = pytest.mark.parametrize("net", ["plain", "batchnorm", "resnet"])


def making(run: Run, net: str) -> Callable[[], CutNet]:
    return partial(build, run) if net == "resnet" else partial(network, net == "batchnorm")


def backpropagated(run: Run, data: Batches, net: CutNet) -> nn.Sequential:
    """The whole network, as ordinary training has it."""
    whole = nn.Sequential(*net.bottom, *net.top)
    optimizer = optimizer_of(run, whole)
    for epoch in range(run.epochs):
        for index, (x, y) in enumerate(data.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(run, (epoch + index / len(data)) / run.epochs)
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()
    return whole


# ---------------------------------------------------------------- U-shaped


def u_run(clients: int, learning: str, **settings: str) -> Run:
    return plain_run("ushape", clients, method_arg=(f"learning={learning}",), **settings)


@NORMS
@SHARES
def test_ushape_is_backpropagation_through_bottom_middle_and_tail(samples: Sequence[int], norm: bool) -> None:
    run = u_run(len(samples), "csl")
    data = shares(run, samples)
    ours = trained(run, data, norm)

    net = network(norm)
    middle = net.top[:-1]
    bottoms, tails = copies(net.bottom, len(data)), copies(net.top[-1:], len(data))
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, tails, strict=True)]
    middle_moves = optimizer_of(run, middle)
    for _ in range(run.epochs):
        for tick in rounds(data):
            for k, x, y in tick:
                loss = F.cross_entropy(tails[k](middle(bottoms[k](x))), y)
                first, between, last = gradients_of(loss, [bottoms[k], middle, tails[k]])
                move(moves[k], [*first, *last])
                move(middle_moves, between)

    assert moved(bottoms, network(norm).bottom)
    assert_near([*ours.bottoms, *tails_of(ours), *ours.tops], [*bottoms, *tails, middle])


@NORMS
@SHARES
def test_ushape_with_dsl_detaches_what_comes_after_the_cut(samples: Sequence[int], norm: bool) -> None:
    run = u_run(len(samples), "dsl")
    data = shares(run, samples)
    ours = trained(run, data, norm)

    net = network(norm)
    middle, n = net.top[:-1], len(data)
    bottoms, heads, tails = copies(net.bottom, n), copies(net.head, n), copies(net.top[-1:], n)
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, heads, tails, strict=True)]
    middle_moves = optimizer_of(run, middle)
    for _ in range(run.epochs):
        for tick in rounds(data):
            for k, x, y in tick:
                z = bottoms[k](x)
                own = gradients_of(F.cross_entropy(heads[k](z), y), [bottoms[k], heads[k]])
                loss = F.cross_entropy(tails[k](middle(z.detach())), y)
                between, last = gradients_of(loss, [middle, tails[k]])
                move(moves[k], [*own[0], *own[1], *last])
                move(middle_moves, between)

    assert moved(bottoms, network(norm).bottom)
    assert_near(
        [*ours.bottoms, *ours.heads, *tails_of(ours), *ours.tops],
        [*bottoms, *heads, *tails, middle],
    )


@NETWORKS
@pytest.mark.parametrize("learning", ["csl", "dsl"])
def test_with_one_client_ushape_is_what_it_learns_by(learning: str, net: str) -> None:
    """csl or dsl: whose layers the last ones are makes no difference, not in a bit."""
    runs = [plain_run(learning, 1, schedule="cosine"), u_run(1, learning, schedule="cosine")]
    split, ours = (trained(run, shares(run, ALONE), make=making(run, net)) for run in runs)
    assert moved(ours.bottoms, making(runs[0], net)().bottom)
    theirs = [*split.bottoms, *split.heads, joined(*split.tops)]
    assert_same([*ours.bottoms, *ours.heads, joined(*ours.tops, ours.clients[0].tail)], theirs)


@NETWORKS
def test_with_one_client_ushape_is_ordinary_training_bit_for_bit(net: str) -> None:
    run = u_run(1, "csl", schedule="cosine")
    (data,) = shares(run, ALONE)
    ours = trained(run, [data], make=making(run, net))
    (client,) = ours.clients
    theirs = backpropagated(run, data, making(run, net)())
    assert_same([joined(client.bottom, *ours.tops, client.tail)], [theirs])


def tails_of(run: Trained) -> list[nn.Module]:
    return [part.tail for part in run.clients if part.tail is not None]


def joined(*parts: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(*(layer for part in parts if isinstance(part, nn.Sequential) for layer in part))


# ---------------------------------------------------------------- FedAvg


@NETWORKS
def test_fedavg_of_one_client_is_ordinary_training_bit_for_bit(net: str) -> None:
    run = plain_run("fedavg", 1, schedule="cosine", epochs=3)
    (data,) = shares(run, ALONE)
    (client,) = trained(run, [data], make=making(run, net)).clients
    theirs = backpropagated(run, data, making(run, net)())
    assert moved([theirs[0]], making(run, net)().bottom[0])
    assert_same([joined(client.bottom, client.tail)], [theirs])


@NORMS
def test_fedavg_averages_whole_networks_by_samples_after_each_epoch(norm: bool) -> None:
    run = plain_run("fedavg")
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm)

    net = network(norm)
    wholes = copies(nn.Sequential(*net.bottom, *net.top))
    moves = [optimizer_of(run, whole) for whole in wholes]  # whose momentum is not averaged
    for _ in range(run.epochs):
        for whole, optimizer, share in zip(wholes, moves, data, strict=True):
            for x, y in share.epoch(0):
                optimizer.zero_grad()
                F.cross_entropy(whole(x), y).backward()
                optimizer.step()
        mean_into(wholes, UNEQUAL)

    assert moved([whole[0] for whole in wholes], network(norm).bottom[0])
    assert ours.answers == []
    assert_near([joined(part.bottom, part.tail) for part in ours.clients], wholes)
