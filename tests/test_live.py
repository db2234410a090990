"""Live bytes, against counts made by hand, tensor by tensor."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from common.live import Gauge, Storages
from common.methods import build_method
from common.methods.base import ClientPart, Received, Sent, ServerPart, Smashed, run_step
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run
from tests.federation import CPU, Batches, small_run

KIB = 1024


# ---------------------------------------------------------------- storages


def test_what_is_made_counts_until_it_is_freed() -> None:
    storages = Storages()
    with storages:
        one = torch.zeros(KIB)
        two = torch.ones(2 * KIB)
        assert storages.now == 12 * KIB
        del one
        three = two + 1
        assert storages.now == 16 * KIB
        del two, three
    assert (storages.settle(), storages.peak) == (0, 16 * KIB)


def test_a_storage_counts_once_however_many_look_at_it() -> None:
    storages = Storages()
    with storages:
        whole = torch.zeros(8, KIB)
        views = [whole[0], whole.t(), whole.detach(), *whole.split(2)]
        whole.add_(1)
        assert storages.now == 32 * KIB
        del whole
        assert storages.settle() == 32 * KIB, "a view keeps it"
        del views
    assert storages.settle() == 0


def test_what_was_there_before_counts_from_when_it_is_seen() -> None:
    before, touched = torch.zeros(KIB), torch.zeros(KIB)
    storages = Storages()
    storages.see([before])
    with storages:
        assert storages.now == 4 * KIB
        torch.cat([touched, touched])
    assert storages.peak == 16 * KIB


def test_what_grows_counts_anew() -> None:
    storages = Storages()
    with storages:
        some = torch.zeros(KIB)
        some.resize_(3 * KIB)
        assert storages.now == 12 * KIB


def test_it_can_be_entered_again_and_remembers_what_lives() -> None:
    storages = Storages()
    with storages:
        kept = torch.zeros(KIB)
    unseen = torch.zeros(KIB)
    with storages:
        torch.zeros(KIB)
    del unseen
    assert storages.peak == 8 * KIB
    del kept
    assert storages.settle() == 0


def test_addresses_that_are_used_again_are_told_apart() -> None:
    storages = Storages()
    with storages:
        for size in range(1, 400):
            torch.zeros(size)
    gc.collect()
    assert (storages.settle(), storages.peak) == (0, 4 * 399)


# ---------------------------------------------------------------- a step, counted by hand

# 16 samples of 10 numbers, a client of one layer 10 -> 20, a server of one layer 20 -> 5, floats of 4 bytes.
X, Y = 16 * 10 * 4, 16 * 8
Z = 16 * 20 * 4
BELOW, ABOVE = 10 * 20 * 4, 20 * 5 * 4  # weights; as much again a gradient, or a momentum
LOSS = 4


def linear(inputs: int, outputs: int) -> tuple[nn.Linear, SGD]:
    layer = nn.Linear(inputs, outputs, bias=False)
    return layer, SGD(layer.parameters(), 0.1, 0.9)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 10), torch.arange(16) % 5


def answers(sent: Sent) -> Tensor:
    assert isinstance(sent, Smashed)
    return torch.randn_like(sent.z)


def test_a_client_that_waits_for_a_gradient_by_hand() -> None:
    bottom, optimizer = linear(10, 20)
    part, gauge = ClientPart(bottom, None, optimizer), Gauge(CPU)
    step = gauge.around(build_method(Run(method="csl"))).client_step

    run_step(step(part, *batch()), answers)
    assert gauge.held == X + Y + BELOW + Z
    # When the optimizer has stepped: the gradient that came, the weights', and their momentum.
    assert gauge.peak == X + Y + Z + Z + 3 * BELOW

    run_step(step(part, *batch()), answers)
    assert gauge.held == X + Y + Z + 2 * BELOW, "with momentum, without the last step's gradient"
    assert gauge.peak == X + Y + Z + Z + 3 * BELOW


def test_a_server_that_answers_by_hand() -> None:
    top, optimizer = linear(20, 5)
    part, gauge = ServerPart(top, optimizer, torch.Generator()), Gauge(CPU)
    rule = gauge.around(build_method(Run(method="csl"))).server_step

    rule(part, [Received(torch.randn(16, 20), torch.arange(16) % 5, 0, 0.0)])
    # When the optimizer has stepped: dL/dz beside z.
    assert gauge.peak == Z + Y + Z + LOSS + 3 * ABOVE
    assert gauge.held == 0, "a server waits for no answer"


def test_a_client_that_learns_alone_holds_nothing_for_an_answer() -> None:
    bottom, head = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)
    optimizer = SGD([*bottom.parameters(), *head.parameters()], 0.1, 0.9)
    part, gauge = ClientPart(bottom, head, optimizer), Gauge(CPU)
    step = gauge.around(build_method(Run(method="dsl"))).client_step
    # When the bottom's gradient is made, the last: beside z there are dL/dz, the loss, and dL/dL.
    there = X + Y + Z + Z + 2 * LOSS
    run_step(step(part, *batch()), lambda _: None)
    assert (gauge.held, gauge.peak) == (0, there + 2 * (BELOW + ABOVE))
    run_step(step(part, *batch()), lambda _: None)
    assert (gauge.held, gauge.peak) == (0, there + 3 * (BELOW + ABOVE)), "now there is momentum"


def test_what_is_measured_learns_the_same() -> None:
    run = small_run()
    weights = []
    for steps in (0, 2):
        method = Gauge(CPU, steps).around(build_method(run))
        part = client_part(run, method, build(run), CPU)
        for x, y in Batches(run, seed=1, samples=32).epoch(0):
            run_step(method.client_step(part, x, y), lambda _: None)
        weights.append(part.bottom.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_wire_that_breaks_leaves_nothing_counting() -> None:
    run, gauge = small_run(method="csl"), Gauge(CPU)
    method = gauge.around(build_method(run))
    part = client_part(run, method, build(run), CPU)
    ((x, y),) = Batches(run, seed=1, samples=8).epoch(0)

    def breaks(_: Sent) -> Tensor:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run_step(method.client_step(part, x, y), breaks)
    before = gauge.peak
    keep = torch.zeros(before)
    assert gauge.peak == before, keep.shape


# ---------------------------------------------------------------- the paper's network

MIB = KIB * KIB
# Batch 128, fp32: client and server of CSL and DSL, cut at s, m, d; by another count of storages.
REFERENCES = {
    ("csl", "s"): (425.9, 648.8),
    ("dsl", "s"): (419.8, 648.8),
    ("csl", "m"): (586.1, 488.6),
    ("dsl", "m"): (580.0, 488.6),
    ("csl", "d"): (735.3, 323.5),
    ("dsl", "d"): (732.2, 323.5),
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "expected"), REFERENCES.items(), ids=str)
def test_resnet_110_needs_what_was_counted_before(what: Sequence[str], expected: Sequence[float]) -> None:
    method_name, split = what
    run = Run(model="resnet110", method=method_name, split=split)
    method, net = build_method(run), build(run)
    client, server = client_part(run, method, net, CPU), server_part(run, method, net, CPU)
    ours, theirs = Gauge(CPU, 2), Gauge(CPU, 2)
    rule = theirs.around(method).server_step

    def wire(sent: Sent) -> Tensor | None:
        assert isinstance(sent, Smashed)
        answer = rule(server, [Received(sent.z, sent.y, 0, 0.0, method_name == "csl")])
        return answer.gradients[0] if answer.gradients else None

    for _ in range(2):
        x, y = torch.randn(128, 3, 32, 32), torch.arange(128) % 10
        run_step(ours.around(method).client_step(client, x, y), wire)
    assert (ours.peak / MIB, theirs.peak / MIB) == pytest.approx(expected, rel=0.01)
