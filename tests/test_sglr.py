"""SGLR: its two averages by hand, its phases, and whole runs against loops in plain torch."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.methods.sglr import global_average, position_average
from common.run import Run
from tests.federation import Batches
from tests.plain import (
    EQUAL,
    UNEQUAL,
    Trained,
    assert_near,
    copies,
    gradients_of,
    move,
    moved,
    network,
    optimizer_of,
    plain_run,
    rounds,
    shares,
    trained,
)


def rows(*numbers: float) -> Tensor:
    """A batch of so many samples, one activation each: (B, 1, 1, 1)."""
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1, 1)


def test_the_position_average_is_sample_by_sample() -> None:
    # (1 + 3 + 8) / 3 = 4 and (2 + 6 + 7) / 3 = 5
    averaged = position_average([rows(1, 2), rows(3, 6), rows(8, 7)])
    assert torch.equal(averaged, rows(4, 5))


def test_the_global_average_is_one_row_for_all_weighted_by_samples() -> None:
    # (1 + 2 + 9) / 3 = 4, not the mean 5.25 of the clients' means 1.5 and 9
    assert torch.equal(global_average([rows(1, 2), rows(9)]), rows(4))


def test_positions_of_unequal_batches_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"one size, not \[1, 2\]; use splitavg=global"):
        position_average([rows(1, 2), rows(9)])


def test_a_run_whose_batches_are_unequal_is_refused_by_position() -> None:
    run = sglr_run(phi=1, splitavg="position")
    with pytest.raises(ConfigError, match="use splitavg=global"):
        trained(run, shares(run, UNEQUAL))


def sglr_run(clients: int = 3, **settings: float | str) -> Run:
    arguments = tuple(f"{name}={value}" for name, value in settings.items())
    return plain_run("sglr", clients, method_arg=arguments, lr=0.03)


def reference(
    run: Run, data: Sequence[Batches], alpha: float, phi: float, splitavg: str, averaged: Sequence[int]
) -> Trained:
    """`averaged`: the steps, counted from 0, at which gradients are averaged."""
    net = network(norm=False)
    bottoms, top = copies(net.bottom, len(data)), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    dice = torch.Generator().manual_seed(run.seed)
    ticks = [tick for _ in range(run.epochs) for tick in rounds(data)]
    for step, tick in enumerate(ticks):
        zs = [bottoms[k](x) for k, x, _ in tick]
        losses = [F.cross_entropy(top(z), y) for z, (*_, y) in zip(zs, tick, strict=True)]
        own = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss, z in zip(losses, zs, strict=True)]
        counts = [len(y) for *_, y in tick]
        mean = torch.stack([n * loss for n, loss in zip(counts, losses, strict=True)]).sum() / sum(counts)
        (joint,) = gradients_of(mean, [top], retain_graph=True)
        top_moves.param_groups[0]["lr"] = run.lr * len(tick) ** alpha
        move(top_moves, joint)

        active = torch.randperm(len(tick), generator=dice).tolist()[: round(phi * len(tick))]
        if active and step in averaged:
            if splitavg == "position":
                shared = [torch.stack([own[k][j] for k in active]).mean(0) for j in range(counts[0])]
            else:  # every client's mean over its samples, weighted by its samples
                total = sum(counts[k] for k in active)
                one = torch.stack([counts[k] / total * own[k].mean(0) for k in active]).sum(0)
                shared = [one] * max(counts)
            for k in active:
                own[k] = torch.stack(shared[: counts[k]])
        for (k, *_), z, gradient in zip(tick, zs, own, strict=True):
            (gradients,) = gradients_of((z * gradient).sum(), [bottoms[k]])
            move(moves[k], gradients)
    assert moved(bottoms, network(norm=False).bottom)
    return Trained([], [*bottoms, top], [])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
def test_the_global_average_trains_as_a_loop_in_plain_torch(alpha: float, phi: float) -> None:
    """C, in eta_c * C ** alpha, is how many clients the step has: one is ready before the others."""
    run = sglr_run(alpha=alpha, phi=phi, splitavg="global")
    data = shares(run, UNEQUAL)
    assert_near(trained(run, data).modules, reference(run, data, alpha, phi, "global", range(10)).modules)


@pytest.mark.parametrize("phi", [0.5, 1.0])
def test_the_position_average_trains_as_a_loop_in_plain_torch(phi: float) -> None:
    run = sglr_run(alpha=0.5, phi=phi, splitavg="position")
    data = shares(run, EQUAL)
    assert_near(trained(run, data).modules, reference(run, data, 0.5, phi, "position", range(10)).modules)


@pytest.mark.parametrize("phase", ["first", "last"])
def test_gradients_are_averaged_only_in_the_phase(phase: str) -> None:
    run = sglr_run(alpha=1, phi=1, splitavg="global", phase=phase, fraction=0.4)
    data = shares(run, EQUAL)
    steps = range(4) if phase == "first" else range(6, 10)  # of ten
    assert_near(trained(run, data).modules, reference(run, data, 1, 1, "global", steps).modules)


@pytest.mark.parametrize("tenths", range(11))
def test_the_phase_has_its_fraction_of_the_steps(tenths: int) -> None:
    for phase, steps in (("first", range(tenths)), ("last", range(10 - tenths, 10))):
        run = sglr_run(alpha=0, phi=1, phase=phase, fraction=tenths / 10)
        answers = trained(run, shares(run, EQUAL)).answers
        assert [step for step in range(10) if one_for_all(answers[step].gradients)] == list(steps), phase


def one_for_all(gradients: Sequence[Tensor | None]) -> bool:
    together = torch.cat([gradient for gradient in gradients if gradient is not None])
    return bool((together == together[:1]).all())
