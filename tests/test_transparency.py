"""What crosses a real wire must train as if there were none: bit for bit."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.methods import METHODS, build_method
from common.methods.base import ClientPart, Method, Part, ServerPart
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.optim import learning_rate, sgd
from common.parts import client_part, server_part, state_of
from common.run import Run
from dsl_client.connection import Connection
from dsl_lab.simulate import federate
from dsl_server.inbox import Errand, Inbox, Item, Job
from tests.federation import CPU, Batches, federation, small_run


def fresh(run: Run) -> tuple[list[ClientPart], ServerPart]:
    method = build_method(run)
    clients = [client_part(run, method, build(run), CPU) for _ in range(run.clients)]
    return clients, server_part(run, method, build(run), CPU)


def assert_equal(ours: Part, theirs: Part) -> None:
    for name, tensor in state_of(ours).items():
        assert torch.equal(tensor, state_of(theirs)[name]), name


def assert_as_in_one_thread(
    run: Run, data: Sequence[Batches], server: ServerPart, clients: Sequence[ClientPart]
) -> None:
    """That these parts are, bit for bit, those of the run with nothing between clients and server."""
    method, (near, near_server) = build_method(run), fresh(run)
    federate(run, method, near, Hosting(run, method, near_server), data)
    assert_equal(server, near_server)
    for far, part in zip(clients, near, strict=True):
        assert_equal(far, part)


# Beside every method as it is.
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dsl", {"method_arg": ("lambda_=0.5", "q=3")}),
    ("dsl", {"model": "resnet14", "split": "3", "client_modules": 2, "server_modules": 3}),
    ("cse-fsl", {"method_arg": ("h=2",), "model": "resnet14", "split": "2", "client_modules": 2}),
    ("dsl", {"head": "infopro"}),
    ("dsl", {"head": "copy"}),
    ("fsl-sage", {"method_arg": ("q=2", "l=2")}),
    ("ampere", {"method_arg": ("server_epochs=3", "server_batch=16")}),
    ("ushape", {"method_arg": ("learning=dsl",)}),
    ("gapsl", {"method_arg": ("gda=exact",)}),
    ("sglr", {"method_arg": ("phi=1", "phase=first")}),
    ("cyclesl", {"method_arg": ("server_epochs=2", "server_batch=5")}),
    ("dsl", {"codec": ("activations=int4+zstd",)}),
    ("csl", {"codec": ("activations=int2", "gradients=int8")}),
    ("ushape", {"codec": ("activations=randtopk:0.2", "gradients=fp16")}),
    ("ampere", {"codec": ("activations=fp8",)}),
    ("csl", {"codec": ("activations=int4+ef", "gradients=topk:0.1+ef")}),
    ("dsl", {"send_every": 2, "send_last_epochs": 2}),
    ("dsl", {"replay": "1MB", "reuse": 3, "codec": ("activations=int4+zstd",)}),
    ("cse-fsl", {"replay": "20kB", "reuse": 2, "replay_on": "disk"}),
    ("dsl", {"sync_every": 2}),
    ("dsl", {"concatenate": 2}),
    ("dsl", {"send_every_epochs": 2, "replay": "1MB", "reuse": 2}),
)


def runs() -> Iterator[Run]:
    """Every method with every sync that it works with, alone and with three clients."""
    for name, settings in [*((name, {}) for name in METHODS), *SETTINGS]:
        needed = build_method(small_run(method=name)).sync
        in_rounds = ["none", "average"]  # a relay has none, at whose ends one would learn again
        for sync in (
            [needed]
            if needed
            else in_rounds
            if {"replay", "sync_every"} & set(settings)
            else [*in_rounds, "relay"]
        ):
            for clients in (1, 3):
                alike = {"fixed_order": True, "epochs": 3}
                yield small_run(method=name, clients=clients, sync=sync, **alike, **settings)


def name_of(run: Run) -> str:
    modules = f"{run.client_modules}x{run.server_modules}" if run.client_modules > 1 else ""
    seldom = f"every{run.send_every}-last{run.send_last_epochs}" if run.send_every else ""
    seldom += f"epochs{run.send_every_epochs}" if run.send_every_epochs > 1 else ""
    again = f"replay{run.replay}" if run.replay else f"sync{run.sync_every}" if run.sync_every > 1 else ""
    together = f"concatenate{run.concatenate}" if run.concatenate > 1 else ""
    sending = [*run.codec, modules, seldom, again, together]
    facts = [run.method, run.sync, str(run.clients), *run.method_arg, *sending]
    return "-".join([*filter(None, facts), *({run.head} - {"gap"})])


def trained_on(run: Run, method: Method, data: Sequence[Batches]) -> int:
    """Samples that the server learns from: in an epoch of those sent, or in all of the averages' parts."""
    if method.afterwards:
        return sum(share.samples for share in data)
    every = method.send_every or 1
    epochs = sum(method.sends(epoch) for epoch in range(run.epochs))
    return epochs * sum(share.size(i) for share in data for i in range(0, len(share), every))


@pytest.mark.parametrize("run", runs(), ids=name_of)
def test_the_wire_changes_nothing(run: Run, tmp_path: Path) -> None:
    samples = [60, 41, 17][: run.clients]  # unequal, with short last batches: 21 steps and more
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate(samples)]
    server, parts, _ = federation(run, tmp_path, data)
    assert_as_in_one_thread(run, data, server.part, parts)
    assert server.record.samples_trained == trained_on(run, build_method(run), data)


def test_a_head_is_made_of_batches_that_were_still_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(method="fsl-sage", method_arg=("q=1", "l=1"), fixed_order=True)
    data = [Batches(run, seed=1, samples=44)]
    put, settle, goes_on = Inbox.put, Connection.settle, threading.Event()

    def put_late(inbox: Inbox, item: Item) -> None:
        if isinstance(item, Job) and item.sequence % 6 == 0:  # the last of an epoch
            assert goes_on.wait(10), "its client waits for it, or has asked for the head before it came"
            goes_on.clear()
        put(inbox, item)
        if isinstance(item, Errand):
            goes_on.set()

    def settle_seen(connection: Connection) -> None:
        goes_on.set()
        settle(connection)

    monkeypatch.setattr(Inbox, "put", put_late)
    monkeypatch.setattr(Connection, "settle", settle_seen)
    server, parts, _ = federation(run, tmp_path, data)
    assert_as_in_one_thread(run, data, server.part, parts)


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
