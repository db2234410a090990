"""Gradient checkpointing: the same bits with less memory."""

from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.live import Gauge
from common.methods import build_method
from common.methods.base import Sent, Smashed, run_step
from common.nets.cut import build
from common.nets.recompute import Recomputed, segments
from common.nets.resnet import Block
from common.parts import client_part, state_of
from tests.federation import CPU, Batches, small_run
from tests.plain import ALONE, UNEQUAL, plain_run, shares, trained

DEEP = {"model": "resnet20", "split": "6"}


@pytest.mark.parametrize(
    ("method", "blocks", "settings"),
    [
        ("dsl", 3, {}),
        ("dsl", 1, {}),
        ("dsl", 4, {"head": "infopro"}),
        ("dsl", 2, {"method_arg": ("lambda_=0.5",)}),
        ("csl", 5, {}),
        ("csl", 2, {}),
        ("fsl-sage", 4, {"method_arg": ("l=1", "q=1")}),
        ("ushape", 4, {}),
    ],
    ids=str,
)
def test_a_run_ends_with_the_same_bits(method: str, blocks: int, settings: dict[str, Any]) -> None:
    """Weights, BatchNorm's statistics and counts, momentum."""
    samples = ALONE if method == "dsl" else UNEQUAL[1:]
    runs = [plain_run(method, len(samples), **DEEP, **settings, keep_blocks=kept) for kept in (0, blocks)]
    one, other = (trained(run, shares(run, samples), make=partial(build, run)) for run in runs)
    for mine, theirs in zip([*one.clients, *one.servers], [*other.clients, *other.servers], strict=True):
        state, again = state_of(mine), state_of(theirs)
        assert list(state) == list(again)
        assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert all(isinstance(part.bottom, Recomputed) for part in other.clients)


def test_modules_may_be_recomputed_too() -> None:
    runs = [plain_run("dsl", 1, **DEEP, client_modules=2, keep_blocks=kept) for kept in (0, 2, 1)]
    one, *others = (trained(run, shares(run, ALONE), make=partial(build, run)) for run in runs)
    for other in others:
        state, again = state_of(one.clients[0]), state_of(other.clients[0])
        assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
        assert all(isinstance(stage.layers, Recomputed) for stage in other.clients[0].inner)


def test_a_batch_moves_the_statistics_once() -> None:
    run = small_run(**DEEP, keep_blocks=2)
    part = client_part(run, build_method(run), build(run), CPU)
    batches = list(Batches(run, seed=1, samples=24).epoch(0))
    for x, y in batches:
        run_step(build_method(run).client_step(part, x, y), lambda _: None)
    counts = [
        tensor for name, tensor in part.bottom.state_dict().items() if name.endswith("num_batches_tracked")
    ]
    assert len(counts) == 1 + 2 * 6
    assert all(int(count) == len(batches) for count in counts)


# A batch of 8: a map of the first stage, 16 x 8 x 8. Every block keeps 4 of them.
MAP = 8 * 16 * 8 * 8 * 4


def first_stage(method: str, blocks: int) -> Gauge:
    """ResNet-56 cut after its first stage, a stem and 9 blocks at the client."""
    run, gauge = small_run(method=method, model="resnet56", split="9", keep_blocks=blocks), Gauge(CPU, 1)
    rules = gauge.around(build_method(run))
    part = client_part(run, rules, build(run), CPU)
    (x, y), *_ = Batches(run, seed=1, samples=8).epoch(0)

    def wire(sent: Sent) -> torch.Tensor | None:
        assert isinstance(sent, Smashed)
        return torch.zeros_like(sent.z) if method == "csl" else None

    run_step(rules.client_step(part, x, y), wire)
    return gauge


@pytest.mark.parametrize("method", ["dsl", "csl"])
@pytest.mark.parametrize(("blocks", "kept"), [(3, 2 + 3 * 4), (4, 2 + 4 * 4), (1, 8 + 4)])
def test_what_is_kept_is_the_last_segment_and_what_went_into_it_and_others(
    method: str, blocks: int, kept: int
) -> None:
    """kept: maps, of the stem's 2 and 4 a block. The peak, when the first segment is made again, has most of
    the weights' gradients, too: 5 maps at this size."""
    whole, less = first_stage(method, 0), first_stage(method, blocks)
    saved = 2 + 9 * 4 - kept
    assert saved - 5 < (whole.peak - less.peak) / MAP < saved
    if method == "csl":
        assert (whole.held - less.held) / MAP == pytest.approx(saved, abs=0.1)


@pytest.mark.parametrize(
    ("blocks", "expected"), [(1, [1] * 6), (2, [2, 2, 2]), (3, [3, 3]), (4, [2, 4]), (5, [1, 5]), (6, [6])]
)
def test_segments_are_counted_from_the_end(blocks: int, expected: list[int]) -> None:
    net = build(small_run(**DEEP))
    parts = segments(net.bottom, blocks)
    assert [sum(isinstance(layer, Block) for layer in part) for part in parts] == expected
    assert [*chain.from_iterable(parts)] == [*net.bottom], "the stem among them"


@pytest.mark.parametrize(("modules", "blocks"), [(1, 6), (2, 3), (4, 2)])
def test_keeping_all_is_refused(modules: int, blocks: int) -> None:
    """Of the largest module: where it has more blocks than are kept, others may have fewer."""
    for kept in (blocks - 1, blocks):
        run = small_run(**DEEP, client_modules=modules, keep_blocks=kept)
        if kept < blocks:
            client_part(run, build_method(run), build(run), CPU)
            continue
        with pytest.raises(
            ConfigError, match=f"--keep-blocks {kept}: no module .* more blocks than {blocks},"
        ):
            client_part(run, build_method(run), build(run), CPU)
