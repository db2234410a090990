"""A server of several ranks: two and three are one, to 1e-6; with real processes, gloo, and clients on
loopback."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ClosedError, StepError
from common.methods import settled
from common.parts import state_of, under
from common.run import Run
from common.rundir import RunFolder
from dsl_server.ranks import Header, Ranks
from dsl_server.server import Server
from dsl_server.ticks import Pace
from tests import certificates
from tests.federation import CPU, Batches, small_run
from tests.ranks import Meeting, Spawn, all_end_well, federation_of_ranks, loaded, rank_of, save, spawning

pytestmark = pytest.mark.timeout(240)  # the first test of a fixture starts its processes
SIZES = (3, 2, 1)
UNEQUAL = (20, 13, 30)  # samples: 3, 2 and 4 batches of 8, the last ones short
STEADY: dict[str, Any] = {
    "schedule": "constant",
    "warmup": 0.0,
}  # so that a rank's own progress is everyone's
LIKE_ONE = {  # whatever their number
    "dsl": small_run(method="dsl", clients=3, deterministic=True),
    "dsl, averaged": small_run(method="dsl", clients=3, deterministic=True, sync="average"),
    "csl": small_run(method="csl", clients=3, deterministic=True),
    "fewer clients than ranks": small_run(method="dsl", clients=2, deterministic=True),
}
DIVIDED = {name: LIKE_ONE[name] for name in ("dsl, averaged", "csl", "fewer clients than ranks")}
STEPS = small_run(method="dsl", clients=3, deterministic=True, **STEADY)
SURE = small_run(method="csl", clients=2, epochs=1)
LASTING = small_run(method="dsl", clients=3, checkpoint_every=0.2, sync="average")
ANY_ORDER = {  # of three
    "dsl as it comes": (small_run(method="dsl", clients=3), Pace(batches=2)),
    "csl as it comes": (small_run(method="csl", clients=3), Pace()),
    "local steps as they come": (small_run(method="dsl", clients=3, sync="average"), Pace(local=3)),
}


@pytest.fixture(scope="module")
def spawn() -> Iterator[Spawn]:
    with spawning() as start:
        yield start


def every_size(meeting: Meeting, folder: str) -> None:
    """By each process: every run, of each size that it is a rank of."""

    def end(name: str, size: int, run: Run, pace: Pace | None = None, certs: Path | None = None) -> None:
        out = Path(folder) / f"{name} {size}"
        data = [Batches(run, seed=client, samples=n) for client, n in enumerate(UNEQUAL[: run.clients])]
        if done := federation_of_ranks(meeting, f"{name} {size}", size, run, out, data, pace, certs):
            server, clients, _ = done
            parts = [under(str(client), part) for client, part in enumerate(clients)]
            save(out / "clients.safetensors", {name: t for part in parts for name, t in part.items()})
            save(out / "rank-0.safetensors", server.hosting.state_of(server.part))

    for name, run in LIKE_ONE.items():
        for size in SIZES[: 3 - meeting.rank]:
            end(name, size, run)
    for name, run in DIVIDED.items():
        for size in SIZES[: 3 - meeting.rank][:2]:
            end(f"{name}, divided", size, run, Pace(fsdp=True))
    end("common steps", 3, STEPS)
    end("a mean every tick", 3, STEPS, Pace(local=1))
    for name, (run, pace) in ANY_ORDER.items():
        end(name, 3, run, pace)
    end("lasting", 3, LASTING)
    if meeting.rank < 2:
        end("with certificates", 2, SURE, certs=Path(folder) / "certs")


@pytest.fixture(scope="module")
def runs(spawn: Spawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    certificates.make(folder / "certs", "client-0", "client-1")
    all_end_well(spawn(3, "tests.test_ranks", "every_size", folder))
    return folder


@pytest.mark.parametrize("name", LIKE_ONE)
@pytest.mark.parametrize("size", [2, 3])
def test_two_and_three_ranks_equal_one_on_the_same_batches(runs: Path, name: str, size: int) -> None:
    for file in ("rank-0.safetensors", "clients.safetensors"):
        one, several = loaded(runs / f"{name} 1" / file), loaded(runs / f"{name} {size}" / file)
        torch.testing.assert_close(several, one, rtol=0, atol=1e-6)
    assert_ranks_are_one(runs / f"{name} {size}", size)


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_divide_the_weights_equal_one_that_has_them_all(runs: Path, name: str, size: int) -> None:
    for file in ("checkpoint/part.safetensors", "clients.safetensors"):
        whole, divided = (runs / f"{of} {n}" / file for of, n in ((name, 1), (f"{name}, divided", size)))
        torch.testing.assert_close(loaded(divided), loaded(whole), rtol=0, atol=1e-6)
    one, several = (
        json.loads((runs / of / "summary.json").read_text())
        for of in (f"{name} 1", f"{name}, divided {size}")
    )
    assert several["test"]["accuracy"] == one["test"]["accuracy"]
    assert several["test"]["loss"] == pytest.approx(one["test"]["loss"], abs=1e-5)


def test_a_mean_of_the_weights_after_every_tick_is_a_common_step(runs: Path) -> None:
    """SGD is linear in its gradients: one batch a rank and tick, momentum and statistics averaged too."""
    steps, means = (
        loaded(runs / f"{of} 3/rank-0.safetensors") for of in ("common steps", "a mean every tick")
    )
    floats = {name: tensor for name, tensor in steps.items() if tensor.is_floating_point()}
    torch.testing.assert_close({name: means[name] for name in floats}, floats, rtol=0, atol=1e-6)
    assert_ranks_are_one(runs / "a mean every tick 3", 3)


@pytest.mark.parametrize("name", ANY_ORDER)
def test_in_any_order_every_batch_counts_once_and_the_ranks_end_as_one(runs: Path, name: str) -> None:
    assert_ranks_are_one(runs / f"{name} 3", 3)
    summary = json.loads((runs / f"{name} 3/summary.json").read_text())
    assert summary["samples_trained"] == 2 * sum(UNEQUAL)


def test_a_client_is_who_its_certificate_says_at_its_rank_too(runs: Path) -> None:
    for client, name in enumerate(("audit.jsonl", "audit-1.jsonl")):
        events = [json.loads(line) for line in (runs / "with certificates 2" / name).read_text().splitlines()]
        assert [(event["event"], event["name"]) for event in events] == [
            ("joined", f"client-{client}"),
            ("left", f"client-{client}"),
        ]


def test_one_process_goes_on_from_what_three_have_left(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / "lasting 3", folder)
    run = settled(LASTING)
    server = Server(run, "127.0.0.1:0", CPU, RunFolder(folder, run, "server", goes_on=True), resume=True)
    server.start()
    try:
        assert server.wait(timeout=5), "all had left"
        accounts = server.rounds.members()
        assert [account.client for account in accounts] == [0, 1, 2]
        assert [account.applied.samples for account in accounts] == [2 * samples for samples in UNEQUAL]
        assert server.record.samples_trained == 2 * sum(UNEQUAL)
        assert [line["epoch"] for line in server.record.lines] == [1, 2]
        saved = loaded(folder / "rank-0.safetensors")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in state_of(server.part).items())
    finally:
        server.stop(ClosedError("the test is over"))
        server.join()


def assert_ranks_are_one(folder: Path, size: int) -> None:
    first = loaded(folder / "rank-0.safetensors")
    for rank in range(1, size):
        other = loaded(folder / f"rank-{rank}.safetensors")
        floats = {name: tensor for name, tensor in first.items() if tensor.is_floating_point()}
        assert all(torch.equal(tensor, other[name]) for name, tensor in floats.items())


@pytest.mark.parametrize("name", LIKE_ONE)
def test_the_first_rank_s_summary_and_metrics_are_of_the_whole_run(runs: Path, name: str) -> None:
    one, three = (json.loads((runs / f"{name} {size}/summary.json").read_text()) for size in (1, 3))
    assert three["samples_trained"] == one["samples_trained"] == 2 * sum(UNEQUAL[: one["clients"]])
    assert three["test"]["accuracy"] == one["test"]["accuracy"]
    for way in ("up", "down"):
        for kind, n in one["wire"][way].items():
            assert three["wire"][way][kind] == n or kind in ("control", "framing"), kind
    lines = [
        [json.loads(line) for line in (runs / f"{name} {size}/metrics.jsonl").read_text().splitlines()]
        for size in (1, 3)
    ]
    assert [line["epoch"] for line in lines[1]] == [1, 2]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["samples_trained"] == theirs["samples_trained"]
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], abs=1e-5)
    audits = [f"audit-{rank}.jsonl" for rank in range(1, min(3, one["clients"]))]
    assert sorted(file.name for file in (runs / f"{name} 3").glob("*.jsonl")) == [
        *audits,
        "audit.jsonl",
        "metrics.jsonl",
    ]


# ---------------------------------------------------------------- ranks alone, without clients


def alone(meeting: Meeting, folder: str) -> None:
    """By each process: ranks that meet, wait, fail, hang and die; what each is told is in a file."""

    def tell(what: str, told: object) -> None:
        (Path(folder) / f"{what} {meeting.rank}").write_text(json.dumps(told))

    def ends(what: str, ranks: Ranks) -> None:
        with pytest.raises(ClosedError) as over:
            ranks.exchange(Header())
        tell(what, f"{type(over.value).__name__}: {over.value}")

    in_common = []
    for late in (0, 1, 2):  # one store, and no agreement but by it: as when torchrun starts all again
        time.sleep(0.5 if meeting.rank == late else 0.0)
        ranks = meeting.ranks("again", 3)
        in_common.append(ranks.common)
        ranks.end()
    tell("meets", in_common)

    ranks = meeting.ranks("idle", 3)
    with rank_of(ranks, small_run(clients=2), Path(folder) / "run") as server:
        ticks, start = ranks.tick, time.monotonic()
        time.sleep(1.0)
        tell("waits", [ranks.tick - ticks, time.monotonic() - start])
        if ranks.first:
            server.rounds.close(ClosedError("the server was stopped"))
        with pytest.raises(ClosedError) as over:
            server.wait(timeout=30)
        tell("is stopped", str(over.value))

    ranks = meeting.ranks("fails", 3)
    ranks.exchange(Header())
    if ranks.rank == 1:
        ranks.fail(StepError("the server's step failed"))
    else:
        ends("fails", ranks)

    ranks = meeting.ranks("hangs", 3, timeout=2.0)
    ranks.exchange(Header())
    if ranks.rank == 2:
        time.sleep(4.0)
        ranks.close()
    else:
        ends("hangs", ranks)

    ranks = meeting.ranks("dies", 3)
    ranks.exchange(Header())
    if ranks.rank == 1:
        os._exit(0)
    ends("dies", ranks)


@pytest.fixture(scope="module")
def told(spawn: Spawn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    all_end_well(spawn(3, "tests.test_ranks", "alone", folder))
    return {file.name: json.loads(file.read_text()) for file in folder.iterdir() if file.is_file()}


def test_ranks_that_meet_again_take_no_word_of_the_last_time(told: dict[str, Any]) -> None:
    assert told["meets 0"] == told["meets 1"] == told["meets 2"]
    assert len(set(told["meets 0"])) == 3


def test_ranks_that_have_nothing_to_do_wait(told: dict[str, Any]) -> None:
    for rank in range(3):
        made, seconds = told[f"waits {rank}"]
        assert 1 <= made <= seconds / Pace().seconds + 2


def test_the_others_are_told_by_name_which_rank_has_ended_and_why(told: dict[str, Any]) -> None:
    assert told["is stopped 0"] == "the server was stopped"
    for rank in (1, 2):
        assert told[f"is stopped {rank}"] == "rank 0 ended the run: the server was stopped"
    for rank in (0, 2):
        assert told[f"fails {rank}"] == "ClosedError: rank 1 ended the run: the server's step failed"
        assert told[f"dies {rank}"].startswith("LostRankError: rank 1 was lost in tick 2: ")
    for rank in (0, 1):
        assert told[f"hangs {rank}"].startswith("LostRankError: rank 2 was lost in tick 2: ")
