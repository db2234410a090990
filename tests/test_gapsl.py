"""GAPSL: angles, leaders and who is kept by hand, and whole runs against loops in plain torch."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.methods.base import Received, ServerPart
from common.methods.gapsl import _Server, alignment, angles_to, gapsl, kept_clients, leader_of, scores
from common.run import Run
from tests.plain import (
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

DEGREE = math.pi / 180


def at(*degrees: float, lengths: Sequence[float] = ()) -> Tensor:
    """Gradients of two weights, at these angles: (S, 2)."""
    lengths = lengths or [1.0] * len(degrees)
    return torch.tensor(
        [[r * math.cos(a * DEGREE), r * math.sin(a * DEGREE)] for a, r in zip(degrees, lengths, strict=True)]
    )


# ---------------------------------------------------------------- by hand


def test_a_score_is_the_mean_angle_to_the_others() -> None:
    # 0-10: 10, 0-40: 40, 10-40: 30; so (10+40)/2, (10+30)/2, (40+30)/2, whatever the lengths
    gradients = at(0, 10, 40, lengths=(1, 5, 0.2))
    expected = torch.tensor([25.0, 20.0, 35.0]) * DEGREE
    torch.testing.assert_close(scores(gradients), expected, rtol=1e-5, atol=0)


def test_a_client_alone_scores_0_and_leads() -> None:
    assert torch.equal(scores(at(30)), torch.zeros(1))
    assert torch.equal(leader_of(at(30), 1), at(30)[0])


def test_the_leader_is_the_plain_mean_of_the_lowest_scores() -> None:
    gradients = at(0, 10, 40, lengths=(1, 3, 1))  # by score: 10, 0, 40 degrees
    assert torch.equal(leader_of(gradients, 1), gradients[1])
    torch.testing.assert_close(leader_of(gradients, 2), (gradients[0] + gradients[1]) / 2)
    torch.testing.assert_close(leader_of(gradients, 3), gradients.mean(0))


def test_angles_to_the_leader_do_not_see_lengths() -> None:
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [4.0, 4.0]])
    expected = torch.tensor([0.0, math.pi / 2, math.pi, math.pi / 4])
    torch.testing.assert_close(angles_to(gradients, torch.tensor([5.0, 0.0])), expected)


@pytest.mark.parametrize(
    ("angles", "eta", "kept"),
    [
        ((0.25, 0.5, 0.75), 0.5, [0]),  # 0.5 - 0.5 * 0.25 * sqrt(2/3) = 0.398
        ((0.25, 0.5, 0.75), 0.0, [0, 1]),  # 0.5, and what is at the threshold is kept
        ((0.25, 0.5, 0.75), -1.0, [0, 1]),  # 0.704
        ((0.25, 0.5, 0.75), -2.0, [0, 1, 2]),  # 0.908
        ((0.75, 0.25, 0.5), 1.5, [1]),  # 0.194: nobody, so the nearest
        ((0.75, 0.0, 0.5), 99.0, [1]),  # below 0, so 0
        ((1.5, 1.6, 3.0), -99.0, [0]),  # pi/2 = 1.571 and no more
        ((2.0, 1.75, 3.0), -99.0, [1]),  # all beyond pi/2, so the nearest
        ((1.25,), 0.5, [0]),
    ],
)
def test_who_is_kept(angles: tuple[float, ...], eta: float, kept: list[int]) -> None:
    assert kept_clients(torch.tensor(angles), eta) == kept


def test_alignment_turns_a_gradient_to_the_leader_and_less_so_a_long_one() -> None:
    # cos = 0, so (lead/|lead| - 0 * g/|g|) / |g| = (0, 1) / 2
    torch.testing.assert_close(
        alignment(torch.tensor([2.0, 0]), torch.tensor([0, 3.0])), torch.tensor([0, 0.5])
    )
    # at 60 degrees: cos = 1/2; (1/2, s) - 1/2 (1, 0) = (0, s) with s = sqrt(3)/2
    expected = torch.tensor([0.0, math.sqrt(0.75)])
    torch.testing.assert_close(alignment(torch.tensor([1.0, 0]), at(60)[0]), expected)


def test_alignment_is_minus_the_gradient_of_the_penalty() -> None:
    g = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    leader = torch.tensor([1.0, 0.2, 0.4], dtype=torch.float64)
    (1 - g @ leader / g.norm() / leader.norm()).backward()
    assert g.grad is not None
    torch.testing.assert_close(alignment(g.detach(), leader), -g.grad)


def test_a_gradient_of_nothing_has_no_direction_to_turn() -> None:
    """A client whose samples are all learned: its loss, in float32, is flat."""
    assert torch.equal(alignment(torch.zeros(2), torch.tensor([0, 3.0])), torch.zeros(2))


SPREAD = at(0, 10, 40)  # scores of 25, 20, 35 degrees: a deviation of 6.24
HALF = at(0, 5, 20)  # half of all that
EVEN = at(0, 120, 240)  # every score is 120 degrees: no deviation


def test_k_min_leads_in_the_first_round_and_while_the_spread_does_not_vary() -> None:
    server = _Server(20, 80, 0.5, 0.0, "filter")
    for progress in (0.0, 0.5, 0.99):
        assert server._leaders(SPREAD, progress) == 1  # ceil(20% of 3)


def test_more_lead_as_the_run_goes_on_and_the_spread_is_small() -> None:
    server = _Server(20, 80, 0.5, 0.0, "filter")
    assert server._leaders(SPREAD, 0.8) == 1
    assert server._leaders(EVEN, 0.8) == 3  # stability 1: 20 + 0.8 * 60 = 68% of 3 = 2.04
    assert server._leaders(HALF, 0.8) == 2  # stability 1/2: 20 + 0.4 * 60 = 44% of 3 = 1.32
    assert server._leaders(SPREAD, 0.8) == 1  # stability 0: 20%
    assert server._leaders(EVEN, 0.2) == 1  # early: 20 + 0.2 * 60 = 32% of 3 = 0.96
    assert server._leaders(at(0, 20, 80), 0.8) == 1  # a new largest spread: stability 0


@pytest.mark.parametrize(
    ("percent", "clients", "leaders"), [(0, 3, 1), (28, 25, 7), (55, 100, 55), (100, 3, 3)]
)
def test_a_whole_number_of_leaders_is_not_rounded_up(percent: float, clients: int, leaders: int) -> None:
    gradients = at(*range(clients))
    assert _Server(percent, percent, 0.5, 0.0, "filter")._leaders(gradients, 0.0) == leaders


# ---------------------------------------------------------------- whole runs


def angle(a: Tensor, b: Tensor) -> float:
    return math.acos(max(-1.0, min(1.0, float(a @ b / a.norm() / b.norm()))))


def deviation(numbers: Sequence[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((n - mean) ** 2 for n in numbers) / len(numbers))


def reference(run: Run, eta: float, lambda_: float, gda: str) -> tuple[Trained, list[int]]:
    """As section III of the paper has it, with 20 to 80%; and how many were kept in each round."""
    data, net = shares(run, UNEQUAL), network(norm=True)
    bottoms, top = copies(net.bottom), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    spreads, counts = list[float](), list[int]()
    ticks = [tick for _ in range(run.epochs) for tick in rounds(data)]
    for step, tick in enumerate(ticks):
        losses = [F.cross_entropy(top(bottoms[k](x)), y) for k, x, y in tick]
        live = [
            torch.cat([g.flatten() for g in gradients_of(loss, [top], create_graph=True)[0]])
            for loss in losses
        ]
        g = [gradient.detach() for gradient in live]
        everyone = range(len(tick))

        score = [sum(angle(g[i], g[j]) for j in everyone if j != i) / (len(tick) - 1) for i in everyone]
        spreads.append(deviation(score))
        varied = max(spreads) - min(spreads)
        stability = (max(spreads) - spreads[-1]) / varied if varied else 0.0
        k = math.ceil((20 + step / len(ticks) * stability * 60) / 100 * len(tick))
        leader = torch.stack([g[i] for i in sorted(everyone, key=lambda i: score[i])[:k]]).mean(0)

        away = [angle(gradient, leader) for gradient in g]
        threshold = max(min(sum(away) / len(away) - eta * deviation(away), math.pi / 2), 0)
        kept = [i for i in everyone if away[i] <= threshold] or [min(everyone, key=lambda i: away[i])]
        counts.append(len(kept))

        total = torch.stack([losses[i] for i in kept]).sum()
        if gda == "exact":
            for i in kept:
                total = total + lambda_ * (1 - live[i] @ leader / live[i].norm() / leader.norm())
        turned, *parts = gradients_of(total, [top, *(bottoms[tick[i][0]] for i in kept)])
        if gda == "direction":
            for i in kept:
                free = g[i].clone().requires_grad_()
                (lambda_ * free @ leader / free.norm() / leader.norm()).backward()
                assert free.grad is not None
                pieces = free.grad.split([weight.numel() for weight in turned])
                turned = [w + p.view_as(w) for w, p in zip(turned, pieces, strict=True)]
        move(top_moves, turned)
        for i, gradients in zip(kept, parts, strict=True):
            move(moves[tick[i][0]], gradients)
    return Trained([], [*bottoms, top], []), counts


@pytest.mark.parametrize("gda", ["filter", "direction", "exact"])
@pytest.mark.parametrize("eta", [0.5, -0.5])
def test_a_run_trains_as_a_loop_in_plain_torch(eta: float, gda: str) -> None:
    run = plain_run("gapsl", method_arg=(f"eta={eta}", "lambda_=0.1", f"gda={gda}"), lr=0.03)
    ours = trained(run, shares(run, UNEQUAL), norm=True)
    theirs, kept = reference(run, eta, 0.1, gda)
    assert moved(ours.tops, network(norm=True).top)
    assert [answer.facts["clients_kept"] for answer in ours.answers] == kept
    assert min(kept) < 3 if eta > 0 else max(kept) > 1
    assert_near(ours.modules, theirs.modules)


def test_the_literal_penalty_has_no_gradient_and_the_other_two_have() -> None:
    def top_of(gda: str, lambda_: float) -> Tensor:
        run = plain_run("gapsl", method_arg=(f"lambda_={lambda_}", f"gda={gda}", "eta=-9"))
        (top,) = trained(run, shares(run, UNEQUAL)).tops
        return torch.cat([weight.detach().flatten() for weight in top.parameters()])

    plain = top_of("filter", 0.0)
    assert torch.equal(top_of("filter", 0.5), plain)
    for gda in ("direction", "exact"):
        torch.testing.assert_close(top_of(gda, 0.0), plain, rtol=0, atol=1e-6)
        assert not torch.allclose(top_of(gda, 0.5), plain, atol=1e-3)


@pytest.mark.parametrize("gda", ["filter", "direction", "exact"])
def test_clients_that_have_nothing_to_learn_do_no_harm(gda: str) -> None:
    top = torch.nn.Linear(1, 2)
    with torch.no_grad():
        top.weight.copy_(torch.tensor([[200.0], [-200.0]]))  # logits so far apart that softmax is 1 and 0
    part = ServerPart(top, torch.optim.SGD(top.parameters(), 0.1), torch.Generator())
    group = [Received(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), k, 0.5) for k in range(3)]
    answer = gapsl(eta=-9, gda=gda).server_step(part, group)  # type: ignore[arg-type]
    assert all(gradient is None or gradient.isfinite().all() for gradient in answer.gradients)
    assert top.weight.isfinite().all()
