"""What a server learns from again: the least used, then the newest, within the limit, so often, no more."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from common.codecs import Encoded, Parcel, parse
from common.codecs.floats import fp32
from common.crops import augmented
from common.errors import StepError
from common.methods import build_method
from common.methods.base import Answer, Received, ServerPart
from common.methods.hosting import Hosting
from common.methods.replay import Replay
from common.nets.cut import build
from common.optim import learning_rate
from common.parts import server_part
from common.run import Run
from common.wire import split_learning_pb2 as pb
from dsl_server.shelf import DiskShelf
from tests.federation import CPU, Batches, federation, serving, small_run
from tests.ordinary import DEADLINE_S, batch_message, member, refused, smashed
from tests.threads import wait_for

pytestmark = pytest.mark.timeout(60)

Spoil = Callable[[Path], None]

SAMPLE = 4 + 8  # one float32 and one int64 label


def batch(mark: int, samples: int = 1) -> Received:
    """Batch number `mark`, as fp32."""
    z = torch.full((samples, 1), float(mark))
    y = torch.zeros(samples, dtype=torch.int64)
    return Received(z, y, client=0, progress=0.0, parcel=Parcel(fp32(), Encoded((samples, 1), [z])))


def filled(marks: Sequence[int], limit: int = 1000, reuse: int = 3) -> Replay:
    kept = Replay(limit, reuse)
    for mark in marks:
        kept.keep(batch(mark))
    return kept


def taken(kept: Replay, most: int = 1000) -> list[int]:
    """What it gives, to its end or so many."""
    order: list[int] = []
    while kept and len(order) < most:
        order.append(int(kept.take().z[0, 0]))
    return order


# ---------------------------------------------------------------- the order


def test_the_least_used_comes_first_and_of_those_the_newest() -> None:
    kept = filled([1, 2, 3])
    assert kept.left == 6
    assert taken(kept) == [3, 2, 1, 3, 2, 1]
    assert (kept.size, kept.left, bool(kept)) == (0, 0, False)


def test_what_comes_meanwhile_has_been_used_least() -> None:
    kept = filled([1, 2])
    assert taken(kept, 1) == [2]
    kept.keep(batch(3))
    assert taken(kept) == [3, 1, 3, 2, 1]


def test_the_most_used_goes_first_and_of_those_the_oldest() -> None:
    kept = filled([1, 2, 3], limit=3 * SAMPLE)
    assert taken(kept, 2) == [3, 2]
    kept.keep(batch(4))  # 2 and 3 were used most
    kept.keep(batch(5))
    assert sorted(taken(kept)) == [1, 1, 4, 4, 5, 5]


def test_a_batch_that_is_larger_than_the_limit_is_not_kept_and_drives_out_none() -> None:
    kept = filled([1, 2], limit=2 * SAMPLE)
    kept.keep(batch(3, samples=3))
    assert kept.size == 2 * SAMPLE
    assert set(taken(kept)) == {1, 2}


class Naive:
    """A list of [number, uses, size]."""

    def __init__(self, limit: int, reuse: int) -> None:
        self.limit, self.reuse = limit, reuse
        self.entries: list[list[int]] = []

    def keep(self, number: int, size: int) -> None:
        if size <= self.limit:
            while sum(entry[2] for entry in self.entries) + size > self.limit:
                most = max(entry[1] for entry in self.entries)
                self.entries.remove(next(entry for entry in self.entries if entry[1] == most))
            self.entries.append([number, 1, size])

    def take(self) -> int:
        least = min(entry[1] for entry in self.entries)
        entry = [entry for entry in self.entries if entry[1] == least][-1]
        entry[1] += 1
        if entry[1] == self.reuse:
            self.entries.remove(entry)
        return entry[0]


@given(st.integers(1, 30), st.integers(2, 5), st.lists(st.integers(0, 12), max_size=80))
def test_it_is_a_list_searched_from_end_to_end(limit: int, reuse: int, steps: list[int]) -> None:
    """A step is a take, or a batch of so many samples."""
    kept, naive = Replay(limit * SAMPLE, reuse), Naive(limit, reuse)
    uses = dict.fromkeys(range(len(steps)), 1)
    for number, samples in enumerate(steps):
        if samples:
            kept.keep(batch(number, samples))
            naive.keep(number, samples)
        elif naive.entries:
            got = taken(kept, 1)
            assert got == [naive.take()]
            uses[got[0]] += 1
        assert kept.size == SAMPLE * sum(entry[2] for entry in naive.entries) <= limit * SAMPLE
        assert kept.left == sum(reuse - entry[1] for entry in naive.entries)
        assert bool(kept) == bool(naive.entries)
    assert max(uses.values(), default=0) <= reuse


def test_of_what_is_kept_closed_nothing_else_stays_in_memory() -> None:
    came = batch(1, samples=50)
    came = replace(came, parcel=Parcel(fp32(), Encoded((50, 1), [came.z.clone()])))
    tail = partial(lambda held: held, came.z)
    came = replace(came, through_tail=tail)
    gone: list[weakref.ref[Any]] = [weakref.ref(came.z), weakref.ref(tail)]
    kept = Replay(10_000, 2)
    kept.keep(came)
    assert kept._kept[1].batch.z.untyped_storage().nbytes() == 0
    del came, tail
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert torch.equal(kept.take().z, torch.ones(50, 1))


# ---------------------------------------------------------------- in a checkpoint


@given(st.integers(2, 4), st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_what_is_kept_goes_on_after_a_checkpoint_in_the_same_order(
    reuse: int, before: list[int], after: list[int]
) -> None:
    """A step is a take, or a batch of so many samples."""

    def go(kept: Replay, steps: list[int], first: int) -> list[int]:
        order: list[int] = []
        for number, samples in enumerate(steps, first):
            if samples:
                kept.keep(batch(number, samples))
            else:
                order += taken(kept, 1)
        return order

    kept, other = Replay(12 * SAMPLE, reuse), Replay(12 * SAMPLE, reuse)
    go(kept, before, 0)
    other.load(load(save(kept.state())), CPU)
    assert (other.size, other.left, bool(other)) == (kept.size, kept.left, bool(kept))
    assert go(other, after, 100) == go(kept, after, 100)
    assert taken(other) == taken(kept)
    assert other.size == 0


@pytest.mark.parametrize("name", ["fp32", "bf16", "int4+zstd", "topk:0.1"])
def test_a_batch_comes_out_of_a_checkpoint_as_it_came_in(name: str) -> None:
    codec, g = parse(name), torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, 5, 2, generator=g).relu()
    parcel = Parcel(codec, codec.encode(z, g, training=True))
    kept, other = Replay(10**6, 2), Replay(10**6, 2)
    kept.keep(Received(parcel.open(), torch.tensor([3, 1, 0, 2]), 1, 0.25, parcel=parcel))
    other.load(load(save(kept.state())), CPU)
    one, same = kept.take(), other.take()
    assert torch.equal(one.z, same.z)
    assert torch.equal(one.y, same.y)
    assert (same.client, same.progress) == (1, 0.25)


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", ["fp32", "bf16", "int4+zstd", "topk:0.1"])
def test_the_disk_gives_what_memory_gives_and_keeps_nothing_that_is_used_up(
    name: str, tmp_path: Path
) -> None:
    codec = parse(name)
    kept = [Replay(10**6, 3), Replay(10**6, 3, DiskShelf(tmp_path / "replay"))]
    for index in range(3):
        g = torch.Generator().manual_seed(index)
        z = torch.randn(4 - index, 3, 5, 2, generator=g).relu()
        parcel = Parcel(codec, codec.encode(z, g, training=True))
        for one in kept:
            one.keep(Received(parcel.open(), torch.arange(len(z)), 0, 0.0, parcel=parcel))
    assert len(list((tmp_path / "replay").iterdir())) == 3
    while kept[0]:
        memory, disk = kept[0].take(), kept[1].take()
        assert torch.equal(memory.z, disk.z)
        assert torch.equal(memory.y, disk.y)
    assert not kept[1]
    assert list((tmp_path / "replay").iterdir()) == []


def test_what_is_driven_out_leaves_the_disk(tmp_path: Path) -> None:
    kept = Replay(2 * SAMPLE, 3, DiskShelf(tmp_path))
    for mark in range(5):
        kept.keep(batch(mark))
    assert {file.name for file in tmp_path.iterdir()} == {"4.safetensors", "5.safetensors"}


def a_file(folder: Path) -> None:
    folder.write_text("")


def a_folder_in_place_of_the_batch(folder: Path) -> None:
    (folder / "1.safetensors").mkdir(parents=True)


@pytest.mark.parametrize("spoil", [a_file, a_folder_in_place_of_the_batch])
def test_a_disk_that_cannot_be_written_is_told_in_one_line(spoil: Spoil, tmp_path: Path) -> None:
    spoil(tmp_path / "replay")
    with pytest.raises(StepError, match=r"--replay-on disk: .*1\.safetensors cannot be written: .") as caught:
        Replay(1000, 2, DiskShelf(tmp_path / "replay")).keep(batch(1))
    assert "\n" not in str(caught.value)


def removed(file: Path) -> None:
    file.unlink()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [removed, cut_short])
def test_a_disk_that_lost_a_batch_is_told_in_one_line(spoil: Spoil, tmp_path: Path) -> None:
    kept = Replay(1000, 2, DiskShelf(tmp_path))
    kept.keep(batch(1))
    spoil(tmp_path / "1.safetensors")
    with pytest.raises(
        StepError, match=r"--replay-on disk: .*1\.safetensors cannot be read: (No such file|Error)"
    ) as caught:
        kept.take()
    assert "\n" not in str(caught.value)


def test_a_server_whose_disk_is_full_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    run = small_run(replay="1MB", replay_on="disk")
    with serving(run, tmp_path) as server, member(server) as client:
        (next(tmp_path.glob("server*")) / "replay").write_text("")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "--replay-on disk", "cannot be written"):
            client.stream([smashed(run)])


# ---------------------------------------------------------------- steps and their learning rates


def spied(run: Run) -> tuple[Hosting, list[tuple[float, int]]]:
    """A hosting, and where it writes the rate and the mark of each step."""
    method, steps = build_method(run), list[tuple[float, int]]()

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        (one,) = group
        steps.append((part.optimizer.param_groups[0]["lr"], int(one.z[0, 0])))
        return Answer(torch.tensor(float(one.z[0, 0])))

    return Hosting(run, replace(method, server_step=step), server_part(run, method, build(run), CPU)), steps


def test_a_rounds_end_goes_through_its_stretch_of_the_schedule_once_more() -> None:
    run = small_run(replay="1MB", reuse=3, lr=0.1, epochs=2, schedule="cosine", warmup=0.0)
    hosting, steps = spied(run)
    for number in range(4):  # two rounds of two batches
        hosting.step([replace(batch(number), progress=number / 4)])
        if number % 2:
            answer = hosting.end_round()
            assert answer is not None
            assert (answer.replayed, float(answer.loss or 0)) == (4, number - 0.5)  # the mean of both, twice
            assert hosting.end_round() is None, "all is used up"
    progress = [0, 1 / 4, 0, 1 / 16, 2 / 16, 3 / 16, 2 / 4, 3 / 4, 4 / 16, 6 / 16, 8 / 16, 10 / 16]
    assert [rate for rate, _ in steps] == pytest.approx([learning_rate(run, p) for p in progress])
    assert [mark for _, mark in steps] == [0, 1, 1, 0, 1, 0, 2, 3, 3, 2, 3, 2]


def test_between_batches_the_rate_is_that_of_the_last_one() -> None:
    run = small_run(replay="1MB", reuse=2, lr=0.1, schedule="cosine", warmup=0.0)
    hosting, steps = spied(run)
    hosting.step([replace(batch(1), progress=0.5)])
    assert hosting.replay().replayed == 1
    assert [rate for rate, _ in steps] == pytest.approx([0.05, 0.05])
    assert not hosting.can_replay


# ---------------------------------------------------------------- a real server


@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"replay": "1MB", "reuse": 2},
        {"replay": "1MB", "reuse": 4, "replay_on": "disk", "codec": ("activations=int4+zstd",)},
    ],
)
def test_each_sample_is_learned_from_so_often_if_an_epoch_fits(
    settings: dict[str, Any], fixed_order: bool, tmp_path: Path
) -> None:
    run = small_run(clients=2, fixed_order=fixed_order, **settings)
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((20, 11))]
    _, _, summary = federation(run, tmp_path, data)
    assert summary["samples_trained"] == 2 * 31
    assert summary["samples_replayed"] == (run.reuse - 1) * 2 * 31
    assert list(tmp_path.rglob("replay/*")) == []
    assert bool(list(tmp_path.rglob("replay"))) == (run.replay_on == "disk")


def test_where_less_fits_less_is_learned_again(tmp_path: Path) -> None:
    one = 8 * (16 * 8 * 8 * 4 + 8)  # bytes of a whole batch
    run = small_run(fixed_order=True, replay=f"{2 * one}B", reuse=3)
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=1, samples=40)])
    assert (summary["samples_trained"], summary["samples_replayed"]) == (80, 2 * 2 * 2 * 8)


def test_a_server_that_waits_for_a_batch_learns_from_those_it_has(tmp_path: Path) -> None:
    run = small_run(replay="1MB", reuse=3)
    batches = [smashed(run, seed=index) for index in range(3)]
    with serving(run, tmp_path) as server, member(server) as client:

        def slowly() -> Iterator[Any]:
            yield client.opening(pb.StreamActivationsRequest, batches)
            for number, one in enumerate(batches, 1):
                yield batch_message(pb.StreamActivationsRequest, number, one)
                wait_for(lambda most=2 * 8 * number: server.record.samples_replayed == most)  # type: ignore[misc]

        receipt = client.stub.StreamActivations(slowly(), timeout=DEADLINE_S)
        assert receipt.applied == 3
        assert server.record.samples_trained == 24
        assert not server.hosting.can_replay


def test_without_the_flag_nothing_is_learned_again(tmp_path: Path) -> None:
    run = small_run(epochs=1)
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=1, samples=16)])
    assert "samples_replayed" not in summary


def test_a_step_on_what_is_kept_is_the_step_that_was_made_of_it() -> None:
    run = small_run(replay="1MB", reuse=2, augment=False)
    method = build_method(run)
    part = server_part(run, method, build(run), CPU)
    hosting, seen = Hosting(run, method, part), list[Tensor]()
    part.top.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    made = smashed(run)
    parcel = Parcel(fp32(), Encoded(tuple(made.z.shape), [made.z]))
    hosting.step([Received(made.z, made.y, 0, 0.0, wanted=False, parcel=parcel)])
    hosting.replay()
    assert torch.equal(*seen)


def test_where_the_run_augments_so_is_what_is_learned_again() -> None:
    run = small_run(replay="1MB", reuse=3)
    method = build_method(run)
    part = server_part(run, method, build(run), CPU)
    hosting, seen = Hosting(run, method, part), list[Tensor]()
    part.top.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    made, dice = smashed(run), torch.Generator().manual_seed(run.seed)
    parcel = Parcel(fp32(), Encoded(tuple(made.z.shape), [made.z]))
    hosting.step([Received(made.z, made.y, 0, 0.0, wanted=False, parcel=parcel)])
    hosting.replay()
    hosting.replay()
    assert all(map(torch.equal, seen, [made.z, augmented(made.z, dice), augmented(made.z, dice)]))
