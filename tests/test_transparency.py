"""What crosses a real wire must train as if there were none: bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.methods import METHODS, build_method
from common.methods.base import ClientPart, Part, ServerPart
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.optim import learning_rate, sgd
from common.parts import average, client_part, load_state, server_part, state_of
from common.run import Run
from dsl_lab.simulate import simulate, ticks
from tests.federation import CPU, Batches, federation, small_run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(run: Run) -> tuple[list[ClientPart], ServerPart]:
    method = build_method(run)
    clients = [client_part(run, method, build(run), CPU) for _ in range(run.clients)]
    return clients, server_part(run, build(run), CPU)


def assert_equal(ours: Part, theirs: Part) -> None:
    for name, tensor in state_of(ours).items():
        assert torch.equal(tensor, state_of(theirs)[name]), name


def runs() -> Iterator[Run]:
    """Every method with every sync that it works with, alone and with three clients."""
    for name in METHODS:
        needed = build_method(small_run(method=name)).sync
        for sync in [needed] if needed else ["none", "average", "relay"]:
            for clients in (1, 3):
                yield small_run(method=name, clients=clients, sync=sync, fixed_order=True, epochs=3)


@pytest.mark.parametrize("run", runs(), ids=lambda run: f"{run.method}-{run.sync}-{run.clients}")
def test_the_wire_changes_nothing(run: Run, tmp_path: Path) -> None:
    clients, sync = run.clients, run.sync
    samples = [60, 41, 17][:clients]  # unequal, with short last batches: 21 steps and more
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate(samples)]
    server, parts, _ = federation(run, tmp_path, data)

    method, (near, near_server) = build_method(run), fresh(run)
    hosting = Hosting(run, method, near_server)
    for epoch in range(run.epochs):
        if sync == "relay":
            for client in range(clients):
                load_state(near[client], state_of(near[client - 1]) if clients > 1 else {})
                for tick in ticks(run, method, data, epoch):
                    mine = [turn for turn in tick if turn.client == client]
                    simulate(run, method, near, hosting, [mine] if mine else [])
        else:
            simulate(run, method, near, hosting, ticks(run, method, data, epoch))
            hosting.end_round()
        if sync == "average":
            mean = average([state_of(part, momentum=False) for part in near], samples)
            for part in near:
                load_state(part, mean)

    assert_equal(server.part, near_server)
    for far, part in zip(parts, near, strict=True):
        assert_equal(far, part)
    sent = [sum(share.size(i) for i in range(0, len(share), method.every)) for share in data]
    assert server.record.samples_trained == run.epochs * sum(sent)


def test_csl_with_one_client_is_backpropagation_of_the_whole_network(tmp_path: Path) -> None:
    run = small_run(method="csl", epochs=4)
    data = Batches(run, seed=1, samples=44)
    server, (part,), _ = federation(run, tmp_path, [data])

    net = build(run)
    whole = nn.Sequential(*net.bottom, *net.top)
    optimizer = sgd(whole.parameters(), run)
    for epoch in range(run.epochs):
        for index, (x, y) in enumerate(data.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(run, (epoch + index / 6) / run.epochs)
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()

    split = [*part.bottom.state_dict().values(), *server.part.top.state_dict().values()]
    for ours, theirs in zip(split, whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_dsl_server_equals_a_loop_written_by_hand(tmp_path: Path) -> None:
    run = small_run(method="dsl", epochs=4, schedule="constant", warmup=0.0)
    data = Batches(run, seed=1, samples=44)
    server, (part,), _ = federation(run, tmp_path, [data])

    net = build(run)
    learned = [*net.bottom.parameters(), *net.head.parameters()]
    bottom = torch.optim.SGD(learned, run.lr, run.momentum, weight_decay=run.weight_decay)
    top = torch.optim.SGD(net.top.parameters(), run.lr, run.momentum, weight_decay=run.weight_decay)
    for epoch in range(run.epochs):
        for x, y in data.epoch(epoch):
            z = net.bottom(x)
            top.zero_grad()
            F.cross_entropy(net.top(z.detach().clone()), y).backward()
            top.step()
            bottom.zero_grad()
            F.cross_entropy(net.head(z), y).backward()
            bottom.step()

    for ours, theirs in zip(
        server.part.top.state_dict().values(), net.top.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(part.bottom.state_dict().values(), net.bottom.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_relay_is_one_client_that_visits_the_shares_in_turn(tmp_path: Path) -> None:
    """What the simulation of the DSL paper does: one part, one optimizer, clients in order."""
    run = small_run(method="csl", clients=2, sync="relay", schedule="constant", warmup=0.0)
    data = [Batches(run, seed=client, samples=20) for client in range(2)]
    server, parts, _ = federation(run, tmp_path, data)

    net = build(run)
    whole = nn.Sequential(*net.bottom, *net.top)
    optimizer = torch.optim.SGD(whole.parameters(), run.lr, run.momentum, weight_decay=run.weight_decay)
    for epoch in range(run.epochs):
        for share in data:
            for x, y in share.epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(whole(x), y).backward()
                optimizer.step()

    split = [*parts[-1].bottom.state_dict().values(), *server.part.top.state_dict().values()]
    for ours, theirs in zip(split, whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
