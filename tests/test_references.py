"""Every parallel method against a loop in plain torch: three clients, ten steps, to 1e-6.

The references know nothing of a cut: where they can, they differentiate each client's whole network.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.plain import (
    UNEQUAL,
    assert_near,
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


def test_psl_steps_on_the_mean_of_all_samples_and_each_client_on_its_own() -> None:
    run = plain_run("psl")
    data = shares(run, UNEQUAL)
    ours = trained(run, data)

    net = network(norm=False)
    bottoms, top = copies(net.bottom), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    for _ in range(run.epochs):
        for tick in rounds(data):
            losses = [F.cross_entropy(top(bottoms[k](x)), y) for k, x, y in tick]
            own = [
                gradients_of(loss, [bottoms[k]], retain_graph=True)[0]
                for loss, (k, _, _) in zip(losses, tick, strict=True)
            ]
            samples = [len(y) for *_, y in tick]
            weighted = [n / sum(samples) * loss for n, loss in zip(samples, losses, strict=True)]
            (joint,) = gradients_of(torch.stack(weighted).sum(), [top])
            move(top_moves, joint)
            for (k, _, _), gradients in zip(tick, own, strict=True):
                move(moves[k], gradients)

    assert moved(bottoms, network(norm=False).bottom)
    assert_near([*ours.bottoms, *ours.tops], [*bottoms, top])


def test_under_psl_batchnorm_sees_the_batches_of_all_clients_as_one() -> None:
    """So a client's gradient has its part in the others' losses too, scaled by n / n_k."""
    run = plain_run("psl")
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, top = copies(net.bottom), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    for _ in range(run.epochs):
        for tick in rounds(data):
            z = torch.cat([bottoms[k](x) for k, x, _ in tick])
            y = torch.cat([y for *_, y in tick])
            joint, *parts = gradients_of(F.cross_entropy(top(z), y), [top, *(bottoms[k] for k, *_ in tick)])
            move(top_moves, joint)
            for (k, _, mine), gradients in zip(tick, parts, strict=True):
                move(moves[k], [gradient * len(y) / len(mine) for gradient in gradients])

    assert_near([*ours.bottoms, *ours.tops], [*bottoms, top])


def test_concatenated_batches_are_one_batch_to_the_server_of_dsl() -> None:
    run = plain_run("dsl", concatenate=3)
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, heads, top = copies(net.bottom), copies(net.head), net.top
    moves = [optimizer_of(run, *both) for both in zip(bottoms, heads, strict=True)]
    top_moves = optimizer_of(run, top)
    for _ in range(run.epochs):
        for tick in rounds(data):
            z = [bottoms[k](x) for k, x, _ in tick]
            whole, y = torch.cat(z).detach(), torch.cat([y for *_, y in tick])
            (joint,) = gradients_of(F.cross_entropy(top(whole), y), [top])
            move(top_moves, joint)
            for sent, (k, _, mine) in zip(z, tick, strict=True):
                own = gradients_of(F.cross_entropy(heads[k](sent), mine), [bottoms[k], heads[k]])
                move(moves[k], [gradient for part in own for gradient in part])

    assert_near([*ours.bottoms, *ours.heads, *ours.tops], [*bottoms, *heads, top])
    assert len(ours.answers) == sum(len(list(rounds(data))) for _ in range(run.epochs))


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_splitfed_v1_is_federated_averaging_of_whole_networks_and_v3_of_their_tops(version: str) -> None:
    run = plain_run(f"splitfed-{version}")
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, tops = copies(net.bottom), copies(net.top)
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, tops, strict=True)]
    for _ in range(run.epochs):
        for k, share in enumerate(data):
            for x, y in share.epoch(0):
                moves[k].zero_grad()
                F.cross_entropy(tops[k](bottoms[k](x)), y).backward()
                moves[k].step()
        mean_into(tops, UNEQUAL)
        if version == "v1":
            mean_into(bottoms, UNEQUAL)

    assert moved(tops, network(norm=True).top)
    assert_near([*ours.bottoms, *ours.tops], [*bottoms, *tops])


def test_splitfed_v2_takes_the_clients_in_random_order_and_averages_only_them() -> None:
    run = plain_run("splitfed-v2")
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, top = copies(net.bottom), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    dice = torch.Generator().manual_seed(run.seed)
    orders = set()
    for _ in range(run.epochs):
        for tick in rounds(data):
            order = torch.randperm(len(tick), generator=dice).tolist()
            orders.add(tuple(order))
            for place in order:
                k, x, y = tick[place]
                moves[k].zero_grad()
                top_moves.zero_grad()
                F.cross_entropy(top(bottoms[k](x)), y).backward()
                moves[k].step()
                top_moves.step()
        mean_into(bottoms, UNEQUAL)

    assert len(orders) > 3, "the order changes"
    assert_near([*ours.bottoms, *ours.tops], [*bottoms, top])


@pytest.mark.parametrize(("server_epochs", "server_batch"), [(1, 0), (2, 5)])
def test_cyclesl_trains_the_top_on_the_pool_and_then_tells_the_clients(
    server_epochs: int, server_batch: int
) -> None:
    run = plain_run("cyclesl", method_arg=(f"server_epochs={server_epochs}", f"server_batch={server_batch}"))
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, top = copies(net.bottom), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    dice = torch.Generator().manual_seed(run.seed)
    for _ in range(run.epochs):
        for tick in rounds(data):
            zs = [bottoms[k](x) for k, x, _ in tick]
            pool = [
                (z[i].detach(), int(y[i]), len(y))
                for z, (*_, y) in zip(zs, tick, strict=True)
                for i in range(len(y))
            ]
            for _ in range(server_epochs):
                order = torch.randperm(len(pool), generator=dice).tolist()
                size = server_batch or len(tick[0][2])
                for start in range(0, len(order), size):
                    some = [pool[i] for i in order[start : start + size]]
                    logits = top(torch.stack([z for z, _, _ in some])).log_softmax(1)
                    terms = [-n * logits[i, y] for i, (_, y, n) in enumerate(some)]
                    top_moves.zero_grad()
                    (torch.stack(terms).sum() / sum(n for *_, n in some)).backward()
                    top_moves.step()
            for z, (k, _, y) in zip(zs, tick, strict=True):  # all graphs are of before; the top is of after
                moves[k].zero_grad()
                F.cross_entropy(top(z), y).backward()
                moves[k].step()

    assert_near([*ours.bottoms, *ours.tops], [*bottoms, top])


@pytest.mark.parametrize("h", [1, 3])
def test_cse_fsl_sends_every_hth_batch_and_learns_from_all(h: int) -> None:
    run = plain_run("cse-fsl", method_arg=(f"h={h}",))
    data = shares(run, UNEQUAL)
    ours = trained(run, data, norm=True)

    net = network(norm=True)
    bottoms, heads, top = copies(net.bottom), copies(net.head), net.top
    moves = [optimizer_of(run, *parts) for parts in zip(bottoms, heads, strict=True)]
    top_moves = optimizer_of(run, top)
    for _ in range(run.epochs):
        for index, tick in enumerate(rounds(data)):
            sent: list[tuple[Tensor, Tensor]] = []
            for k, x, y in tick:
                z = bottoms[k](x)
                sent.append((z.detach().clone(), y))
                moves[k].zero_grad()
                F.cross_entropy(heads[k](z), y).backward()
                moves[k].step()
            for z, y in sent if index % h == 0 else ():
                top_moves.zero_grad()
                F.cross_entropy(top(z), y).backward()
                top_moves.step()
        mean_into(bottoms, UNEQUAL)
        mean_into(heads, UNEQUAL)

    assert len(ours.answers) == run.epochs * sum(len(range(0, len(share), h)) for share in data)
    assert_near([*ours.bottoms, *ours.heads, *ours.tops], [*bottoms, *heads, top])
