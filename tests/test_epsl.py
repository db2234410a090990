"""EPSL: its rows by hand, what it saves, and whole runs against a loop in plain torch."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.errors import ConfigError
from common.methods.base import Answer, Received, ServerPart
from common.methods.epsl import epsl, shared_positions
from common.run import Run
from tests.plain import (
    EQUAL,
    UNEQUAL,
    Trained,
    assert_near,
    assert_same,
    copies,
    move,
    moved,
    network,
    optimizer_of,
    plain_run,
    rounds,
    shares,
    trained,
)


def epsl_run(phi: float, clients: int = 3) -> Run:
    return plain_run("epsl", clients, method_arg=(f"phi={phi}",), lr=0.03)


@pytest.mark.parametrize("phi", [-0.1, 1.5])
def test_a_phi_beyond_0_to_1_is_refused_in_one_line(phi: float) -> None:
    with pytest.raises(ConfigError, match=rf"^epsl: phi {phi} must be from 0 to 1$"):
        epsl(phi)


@pytest.mark.parametrize(
    ("phi", "smallest", "positions"),
    [(0, 8, 0), (0.01, 8, 1), (0.5, 8, 4), (0.5, 5, 3), (0.07, 100, 7), (0.7, 10, 7), (1, 3, 3), (1, 1, 1)],
)
def test_phi_of_the_smallest_batch_is_shared_rounded_up(phi: float, smallest: int, positions: int) -> None:
    assert shared_positions(phi, smallest) == positions


# ---------------------------------------------------------------- one step


def one_step(part: ServerPart, phi: float, zs: Sequence[Tensor], ys: Sequence[Tensor]) -> Answer:
    group = [Received(z, y, client, progress=0.0) for client, (z, y) in enumerate(zip(zs, ys, strict=True))]
    return epsl(phi).server_step(part, group)


def part_of(top: nn.Module, lr: float = 1.0) -> ServerPart:
    return ServerPart(top, SGD(top.parameters(), lr), torch.Generator())


def test_a_step_worked_by_hand() -> None:
    """A top of one linear layer with weights 0: every probability is 1/2, and so, of two classes, a
    sample's gradient at its logits is (-1/2, 1/2) for class 0 and (1/2, -1/2) for class 1.

    Clients of 1 and 3 samples: m = 1. Of their own mean losses the gradients at position 0 are
    (-1/2, 1/2) and (1/6, -1/6); weighted by 1/4 and 3/4 they average to (0, 0), and the activations
    8 and 4 to 5. Rows 1 and 2 of the second client, both of class 0, are its own: (-1/6, 1/6).
    """
    top = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        top[1].weight.copy_(torch.tensor([[0.0], [0.0]]))
    zs = [batch(8.0), batch(4.0, 1.0, 2.0)]
    answer = one_step(part_of(top), 1.0, zs, [torch.tensor([0]), torch.tensor([1, 0, 0])])
    torch.testing.assert_close(answer.loss, torch.tensor(math.log(2), dtype=torch.float64))
    # dbar * 5 + 3/4 * (-1/6 * 1 - 1/6 * 2) = -3/8 for class 0; a step of 1 the other way
    torch.testing.assert_close(top[1].weight.detach(), torch.tensor([[0.375], [-0.375]]).double())

    # Again, with weights 3/8 and -3/8 but all activations 0: probabilities are 1/2 as before. An
    # averaged row now of (1/4) (-1/2, 1/2) + (3/4) (-1/6, 1/6) = (-1/4, 1/4), times the weights
    # is -1/4 * 3/8 - 1/4 * 3/8 = -3/16 for both; own rows: -1/6 * 3/4 = -1/8 for class 0, else 1/8.
    zs = [batch(0.0), batch(0.0, 0.0, 0.0)]
    answer = one_step(part_of(top), 1.0, zs, [torch.tensor([0]), torch.tensor([0, 0, 1])])
    first, second = answer.gradients
    torch.testing.assert_close(first, batch(-3 / 16))
    torch.testing.assert_close(second, batch(-3 / 16, -1 / 8, 1 / 8))


def batch(*numbers: float) -> Tensor:
    """So many samples, one activation each: (B, 1, 1, 1)."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("phi", "rows"), [(1.0, 4), (0.5, 2 + 3 * 2), (0.25, 1 + 3 * 3)])
def test_only_so_many_rows_are_backpropagated(phi: float, rows: int) -> None:
    top, backwards = network(norm=True).top, list[int]()
    last = top[-1]
    assert isinstance(last, nn.Linear)
    last.register_full_backward_hook(lambda _, __, gradients: backwards.append(len(gradients[0])))
    one_step(part_of(top), phi, [torch.randn(4, 4, 4, 4) for _ in range(3)], [torch.arange(4)] * 3)
    assert backwards == [rows]


def test_with_phi_1_and_batches_of_one_size_all_clients_get_one_and_the_same() -> None:
    run = epsl_run(phi=1)
    answers = trained(run, shares(run, EQUAL), norm=True).answers
    assert len(answers) == 10
    for answer in answers:
        first, *others = present(answer)
        assert len(first) == 4
        assert first.any()
        assert all(torch.equal(first, other) for other in others)


def test_the_first_rows_are_alike_and_the_rest_are_not() -> None:
    run = epsl_run(phi=0.5)
    for answer in trained(run, shares(run, EQUAL)).answers:
        together = torch.stack(present(answer))  # (clients, B, C, H, W)
        alike = (together == together[:1]).flatten(2).all(2).all(0)
        assert alike.tolist() == [True, True, False, False]


def present(answer: Answer) -> list[Tensor]:
    return [gradient for gradient in answer.gradients if gradient is not None]


def test_batchnorm_counts_each_sample_once() -> None:
    """Its running statistics are those of one pass over all samples, averaged rows apart."""
    top = network(norm=True).top
    alone = copy.deepcopy(top)
    zs = [torch.randn(n, 4, 4, 4) for n in (4, 4, 2)]
    one_step(part_of(top), 0.5, zs, [torch.zeros(len(z), dtype=torch.int64) for z in zs])
    alone(torch.cat(zs))
    for (name, ours), theirs in zip(top.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("samples", [UNEQUAL, EQUAL])
def test_with_phi_0_it_is_psl_bit_for_bit(samples: Sequence[int]) -> None:
    runs = [plain_run("psl"), plain_run("epsl", method_arg=("phi=0",))]
    psl, ours = (trained(run, shares(run, samples), norm=True) for run in runs)
    assert_same(ours.modules, psl.modules)


def reference(run: Run, samples: Sequence[int], phi: float, norm: bool) -> Trained:
    """Row by row, with the derivative of softmax and cross-entropy written out.

    What a row d of the logits' gradients does to weights and activations is the derivative of the inner
    product of d and the logits. The second pass is that of a twin, so that BatchNorm sees only the first.
    """
    net = network(norm)
    bottoms, top = copies(net.bottom, len(samples)), net.top
    moves, top_moves = [optimizer_of(run, bottom) for bottom in bottoms], optimizer_of(run, top)
    for _ in range(run.epochs):
        for tick in rounds(shares(run, samples)):
            zs = [bottoms[k](x) for k, x, _ in tick]
            sizes = [len(z) for z in zs]
            m, total = math.ceil(phi * min(sizes)), sum(sizes)
            logits = iter(top(torch.cat(zs)).detach())
            own = [  # of each client's own mean loss: (softmax - onehot) / n_k
                [(next(logits).softmax(0) - F.one_hot(label, 4)) / len(y) for label in y] for *_, y in tick
            ]

            twin = copy.deepcopy(top)
            leaves = [sum(n / total * z[j] for n, z in zip(sizes, zs, strict=True)) for j in range(m)]
            leaves += [z[j] for n, z in zip(sizes, zs, strict=True) for j in range(m, n)]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            again = iter(twin(torch.stack(leaves)))

            pull = torch.zeros(())
            for j in range(m):
                mean = torch.stack([n / total * d[j] for n, d in zip(sizes, own, strict=True)]).sum(0)
                pull = pull + next(again) @ mean
            for n, d in zip(sizes, own, strict=True):
                for j in range(m, n):
                    pull = pull + next(again) @ d[j] * n / total
            pulled = torch.autograd.grad(pull, [*leaves, *twin.parameters()])
            at, weights = pulled[: len(leaves)], pulled[len(leaves) :]

            rest = m
            for (k, *_), z, n in zip(tick, zs, sizes, strict=True):
                mine = [at[j] for j in range(m)]
                mine += [at[rest + j] * total / n for j in range(n - m)]
                rest += n - m
                back = (z * torch.stack(mine)).sum()
                move(moves[k], torch.autograd.grad(back, list(bottoms[k].parameters())))
            move(top_moves, weights)
    return Trained([], [*bottoms, top], [])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("phi", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("samples", [UNEQUAL, UNEQUAL[1:]], ids=["three", "two"])
def test_a_run_trains_as_a_loop_in_plain_torch(phi: float, norm: bool, samples: Sequence[int]) -> None:
    run = epsl_run(phi, clients=len(samples))
    ours = trained(run, shares(run, samples), norm)
    theirs = reference(run, samples, phi, norm)
    assert moved(ours.bottoms, network(norm).bottom)
    assert_near(ours.modules, theirs.modules)


def test_it_is_not_psl() -> None:
    runs = [plain_run("psl", lr=0.03), epsl_run(phi=0.5)]
    psl, ours = (trained(run, shares(run, UNEQUAL)) for run in runs)
    assert any(
        float((p - q).detach().abs().max()) > 1e-4
        for p, q in zip(ours.tops[0].parameters(), psl.tops[0].parameters(), strict=True)
    )
