"""The server's side of each method goes on after a checkpoint as if nothing had been: bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoints, Saved
from common.codecs import Parcel, parse
from common.methods import build_method, settled
from common.methods.base import Answer, Gather, Method, Received
from common.methods.hosting import Hosting
from common.methods.replay import Shelf
from common.nets.cut import build
from common.parts import server_part, state_of
from common.run import Run
from dsl_server.shelf import DiskShelf
from tests.federation import CPU, small_run
from tests.ordinary import smashed

pytestmark = pytest.mark.timeout(60)

CLIENTS = 2
BEFORE, AFTER = 5, 6  # groups from each client


def run_of(**settings: Any) -> Run:
    return settled(small_run(**({"clients": CLIENTS, "fixed_order": True, "lr": 0.05} | settings)))


def hosting_of(run: Run, shelf: Shelf | None = None, seed: int = 0) -> tuple[Hosting, Method]:
    method = build_method(run)
    part = server_part(run, method, build(replace(run, seed=seed)), CPU)
    part.generator.manual_seed(seed)
    return Hosting(run, method, part, shelf), method


def batch(run: Run, client: int, index: int) -> Received:
    """One that is the same whoever makes it."""
    made = smashed(run, seed=100 * client + index)
    codec = parse("bf16+zstd" if run.replay else "fp32")
    parcel = Parcel(codec, codec.encode(made.z, torch.Generator().manual_seed(index), training=True))
    progress = index / (BEFORE + AFTER)
    return Received(parcel.open(), made.y, client, progress, through_tail=torch.sign, parcel=parcel)


def group_of(run: Run, method: Method, index: int) -> list[list[Received]]:
    batches = [batch(run, client, index) for client in range(CLIENTS)]
    return [batches] if method.gather is Gather.ALL else [[one] for one in batches]


def facts_of(answer: Answer | None) -> list[Any]:
    if answer is None:
        return []
    gradients = [None if g is None else g.clone() for g in answer.gradients]
    return [answer.loss, *gradients, dict(answer.facts), answer.replayed, answer.skipped]


def steps(run: Run, hosting: Hosting, method: Method, indices: range) -> list[list[Any]]:
    """All that a server does, and what comes of it; a round ends after every third batch."""
    done = []
    for index in indices:
        for group in group_of(run, method, index):
            done.append(facts_of(hosting.step(group)))
        if run.replay and hosting.can_replay and index % 2:
            done.append(facts_of(hosting.replay()))
        if method.new_head is not None and index % 4 == 3:
            for client in range(CLIENTS):
                head = hosting.new_head(client, index)
                done.append([tensor.clone() for tensor in head.state_dict().values()])
        if index % 3 == 2:
            done.append(facts_of(hosting.end_round()))
    done.append([torch.rand(3)])  # of chance that is everybody's
    return done


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def through_disk(hosting: Hosting, folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds of it, written and read again."""
    checkpoints = Checkpoints(folder, on_disk=False)
    checkpoints.write(Saved(1, hosting.state(), {}))
    return dict(checkpoints.read(1).tensors)


RUNS = [
    {"method": "dsl"},
    {"method": "dsl", "replay": "200kB", "reuse": 3},
    {"method": "dsl", "replay": "1MB", "reuse": 4, "augment": False},
    {"method": "dsl", "server_modules": 2},
    {"method": "csl"},
    {"method": "psl"},
    {"method": "splitfed-v1"},
    {"method": "splitfed-v2"},
    {"method": "splitfed-v3"},
    {"method": "sglr"},
    {"method": "gapsl"},
    {"method": "gapsl", "method_arg": ("gda=exact", "k_max=100")},
    {"method": "epsl"},
    {"method": "cyclesl"},
    {"method": "cse-fsl"},
    {"method": "fsl-sage", "method_arg": ("align_epochs=2",)},
    {"method": "ampere", "method_arg": ("server_epochs=2", "server_batch=7")},
    {"method": "ushape"},
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda s: " ".join(map(str, s.values())))
def test_the_steps_after_a_checkpoint_are_bitwise_those_of_who_never_stopped(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(**settings)
    torch.manual_seed(1)
    hosting, method = hosting_of(run)
    steps(run, hosting, method, range(BEFORE))
    state = through_disk(hosting, tmp_path)
    expected = steps(run, hosting, method, range(BEFORE, BEFORE + AFTER))

    torch.manual_seed(2)
    fresh, its = hosting_of(run, seed=9)  # nothing of it may come from anywhere else
    fresh.load(state)
    got = steps(run, fresh, its, range(BEFORE, BEFORE + AFTER))
    assert equal(got, expected)
    assert fresh.rounds == hosting.rounds > 0
    for one, other in zip(fresh.parts, hosting.parts, strict=True):
        mine, theirs = state_of(one), state_of(other)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert equal([*fresh.state().values()], [*hosting.state().values()])


@pytest.mark.parametrize("settings", RUNS, ids=lambda s: " ".join(map(str, s.values())))
def test_a_state_stays_as_it_was_whatever_is_learned_later(settings: dict[str, Any]) -> None:
    """It is written while the server goes on."""
    run = run_of(**settings)
    hosting, method = hosting_of(run)
    steps(run, hosting, method, range(4))
    state = hosting.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    steps(run, hosting, method, range(4, 9))
    assert [name for name in state if not torch.equal(state[name], before[name])] == []


def test_what_lies_on_disk_is_in_the_checkpoint_too_and_lies_there_again(tmp_path: Path) -> None:
    run = run_of(replay="1MB", reuse=3, replay_on="disk")
    hosting, method = hosting_of(run, DiskShelf(tmp_path / "one"))
    steps(run, hosting, method, range(2))
    state = through_disk(hosting, tmp_path / "checkpoints")
    lying = sorted(path.name for path in (tmp_path / "one").iterdir())
    expected = steps(run, hosting, method, range(2, BEFORE))

    fresh, its = hosting_of(run, DiskShelf(tmp_path / "two"), seed=9)
    fresh.load(state)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == lying != []
    assert equal(steps(run, fresh, its, range(2, BEFORE)), expected)
