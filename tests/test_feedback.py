"""Error feedback: what coding takes away from a tensor arrives with the next one of the same way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.codecs import parse
from common.codecs.travel import Residuals, Travel, Way
from common.errors import ConfigError
from common.methods.base import Smashed
from common.parts import state_of
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from tests.federation import Batches, federation, small_run
from tests.test_transparency import assert_as_in_one_thread

pytestmark = pytest.mark.timeout(60)


def rows(*values: float) -> Tensor:
    return torch.tensor([[value] for value in values])


# ---------------------------------------------------------------- what is owed


def test_what_is_owed_is_added_row_by_row_and_once() -> None:
    owed = Residuals()
    assert torch.equal(owed.added(Way.BATCH, 0, rows(1, 2)), rows(1, 2))
    owed.keep(Way.BATCH, 0, rows(0.5, -0.25))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(1, 2)), rows(1.5, 1.75))
    owed.keep(Way.BATCH, 0, rows(0, 0.125))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(1, 2)), rows(1, 2.125))


def test_rows_that_a_short_batch_has_not_keep_what_they_are_owed() -> None:
    owed = Residuals()
    owed.keep(Way.BATCH, 0, rows(1, 2, 3))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(10)), rows(11))
    owed.keep(Way.BATCH, 0, rows(5))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(0, 0, 0, 0)), rows(5, 2, 3, 0))
    owed.keep(Way.BATCH, 0, rows(6, 7, 8, 9))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(0, 0)), rows(6, 7))


def test_clients_and_ways_are_kept_apart() -> None:
    owed = Residuals()
    for number, (way, client) in enumerate([(Way.BATCH, 0), (Way.BATCH, 1), (Way.GRADIENT, 0)], 1):
        owed.keep(way, client, rows(number))
    assert torch.equal(owed.added(Way.BATCH, 0, rows(0)), rows(1))
    assert torch.equal(owed.added(Way.BATCH, 1, rows(0)), rows(2))
    assert torch.equal(owed.added(Way.GRADIENT, 0, rows(0)), rows(3))
    assert torch.equal(owed.added(Way.TAIL_GRADIENT, 0, rows(0)), rows(0))


def test_what_a_small_element_is_owed_grows_until_it_is_sent() -> None:
    """Of two elements topk:0.5 sends the larger: 1.0, and 0.375 when it comes to three of it."""
    travel = Travel.of(["gradients=topk:0.5+ef"], seed=0)
    x = torch.tensor([[1.0, 0.375]])
    came = [travel.through(Way.GRADIENT, x, 0, sequence) for sequence in (1, 2, 3, 4)]
    expected = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.125], [2.0, 0.0]]
    assert torch.equal(torch.cat(came), torch.tensor(expected))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["topk:0.1+ef", "int4+ef", "int2+zstd+ef"]),
    st.lists(st.integers(1, 6), min_size=1, max_size=30),
    st.integers(0, 2**20),
)
def test_what_came_and_what_is_owed_is_what_was_sent(name: str, sizes: list[int], seed: int) -> None:
    travel = Travel.of([f"gradients={name}"], seed)
    g = torch.Generator().manual_seed(seed)
    sent = came = torch.zeros(6, 2, 3, 3)
    for sequence, size in enumerate(sizes, 1):
        x = torch.zeros(6, 2, 3, 3)
        x[:size] = torch.randn(size, 2, 3, 3, generator=g)
        arrived = torch.zeros_like(x)
        arrived[:size] = travel.through(Way.GRADIENT, x[:size], 1, sequence)
        sent, came = sent + x, came + arrived
    owed = travel._residuals.added(Way.GRADIENT, 1, torch.zeros_like(sent))
    assert torch.allclose(came + owed, sent, atol=1e-4)


def test_without_it_what_coding_takes_away_is_lost() -> None:
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for name, grows in (("topk:0.1", True), ("topk:0.1+ef", False)):
        travel = Travel.of([f"gradients={name}"], seed=0)
        lost = torch.zeros_like(x)
        for sequence in range(1, 101):
            lost += x - travel.through(Way.GRADIENT, x, 0, sequence)
        assert (lost.abs().max() > 100 * x.abs().median()) == grows


def test_scoring_neither_uses_nor_changes_what_is_owed() -> None:
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    with_exams, without = (Travel.of(["activations=int2+ef"], seed=3) for _ in range(2))
    plain = Travel.of(["activations=int2"], seed=3)
    for sequence in (1, 2, 3):
        for way in (Way.EXAM, Way.EXAM_OUTPUT):
            exam = with_exams.through(way, x, 0, sequence)
            assert torch.equal(exam, plain.through(way, x, 0, sequence))
        after = [travel.through(Way.BATCH, x, 0, sequence) for travel in (with_exams, without)]
        assert torch.equal(*after)
    assert not torch.equal(after[0], plain.through(Way.BATCH, x, 0, 3))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["int4+ef", "int4+zstd+ef", "topk:0.05+ef", "randtopk:0.05:0.1+zstd+ef"])
def test_a_name_with_feedback_is_that_codec_and_says_so(name: str) -> None:
    made, plain = parse(name), parse(name.removesuffix("+ef"))
    assert (made.name, made.feedback, plain.feedback) == (f"{plain.name}+ef", True, False)
    assert made.sizes((2, 3, 4)) == plain.sizes((2, 3, 4))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fp32+ef", "fp32 takes nothing away; leave .ef out"),
        ("fp32+zstd+ef", "fp32 takes nothing away"),
        ("int4+ef+zstd", r"codec 'int4\+ef\+zstd': choose"),
        ("int4+ef+ef", "choose fp32"),
        ("+ef", "choose fp32"),
        ("topk:0.1:2:3+ef", "too many values"),
        ("topk:x+ef", "not a number"),
    ],
)
def test_a_wrong_name_with_feedback_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(name)


# ---------------------------------------------------------------- the wire


def test_the_order_of_the_batches_counts_not_that_of_packing() -> None:
    """Two segments may be on their way at once, each pulled by a thread of its own."""
    z = [torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def spec() -> BatchSpec:
        return BatchSpec((2, 3, 3), 4, 4, travel=Travel.of(["activations=int2+ef"], seed=0))

    def packed(order: Callable[[Any], Any]) -> list[bytes]:
        here = spec()
        frames = [
            codec.pack_batch(pb.StreamActivationsRequest, sequence, Smashed(one, torch.arange(4)), here)
            for sequence, one in enumerate(z, 1)
        ]
        pulled = {index: list(frames[index]) for index in order(range(2))}
        return [b"".join(bytes(chunk) for p in pulled[index] for chunk in p.chunks) for index in range(2)]

    assert packed(list) == packed(reversed)


def test_batches_that_wait_as_an_epoch_ends_are_coded_in_their_order(tmp_path: Path) -> None:
    run = small_run(clients=2, epochs=4, fixed_order=True, inbox=1, codec=("activations=int2+ef",))
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((30, 11))]
    server, parts, _ = federation(run, tmp_path, data)
    assert_as_in_one_thread(run, data, server.part, parts)


def test_a_run_with_feedback_ends_elsewhere_and_finite(tmp_path: Path) -> None:
    ends = []
    for name in ("topk:0.1", "topk:0.1+ef"):
        run = small_run(method="csl", codec=(f"gradients={name}",))
        _, (part,), _ = federation(run, tmp_path / name, [Batches(run, seed=1, samples=44)])
        ends.append(torch.cat([tensor.flatten().float() for tensor in state_of(part).values()]))
    assert all(bool(end.isfinite().all()) for end in ends)
    assert not torch.equal(*ends)
