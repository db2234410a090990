"""What a run that lasts does by itself: checkpoints in time, writing on a full disk, beginning anew."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import disk
from common.checkpoint import Checkpoints
from common.errors import ClosedError
from common.methods import settled
from common.methods.base import Smashed
from common.rundir import RunFolder
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from dsl_client import memory
from dsl_client.client import Client
from dsl_client.memory import Memory, Snapshot
from dsl_client.spool import Spool
from dsl_client.stream import Stretch
from tests.faults.crashes import Life, live
from tests.federation import CPU, Batches, small_run, spec_of

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_checkpoints_are_made_in_time_though_nobody_waits_for_one(method: str, tmp_path: Path) -> None:
    run = settled(small_run(method=method, epochs=20, eval_every=0, checkpoint_every=0.05))
    live(run, tmp_path, [Batches(run, seed=0, samples=44)])
    lines = map(json.loads, (tmp_path / "server" / "audit.jsonl").read_text().splitlines())
    saved = [line["reason"] for line in lines if line["event"] == "checkpoint"]
    between = [text for text in saved if not text.endswith((" batch 0", " batch 120"))]
    assert between, saved


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """A way to write that fails twice, and then does not."""
    monkeypatch.setattr(disk, "RETRY_S", 0.01)

    def filled(owner: Any, name: str) -> None:
        writes, failures = getattr(owner, name), iter(range(2))

        def fails_twice(*given: Any) -> None:
            if next(failures, None) is not None:
                raise OSError(errno.ENOSPC, "No space left on device")
            writes(*given)

        monkeypatch.setattr(owner, name, fails_twice)

    return filled


def test_a_spool_on_a_full_disk_waits_and_says_so(full: Callable[[Any, str], None], tmp_path: Path) -> None:
    run, told = settled(small_run()), list[str]()
    spec = spec_of(run)
    kept = Spool(2**20, tmp_path, on_trouble=told.append)
    full(Spool, "_write")
    batch = Smashed(torch.zeros(8, *spec.cut_shape), torch.zeros(8, dtype=torch.int64))
    assert kept.append(Stretch(0, 1, 1, 8), codec.pack_batch(pb.StreamActivationsRequest, 1, batch, spec))
    assert told == [
        f"{tmp_path} cannot be written: No space left on device; free some space",
        f"{tmp_path} can be written again",
    ]
    assert Spool(2**20, tmp_path).last == 1


@pytest.mark.parametrize(("owner", "name"), [(memory, "replace_file"), (Checkpoints, "write")])
def test_a_memory_on_a_full_disk_waits_and_says_so(
    owner: Any, name: str, full: Callable[[Any, str], None], tmp_path: Path
) -> None:
    told = list[str]()
    kept = Memory(tmp_path, told.append)
    full(owner, name)
    kept.belongs_to("r")
    kept.keep(Snapshot(3, {"weight": torch.ones(2)}, {}, waypoint=True), goes_back=True)
    assert told == [
        f"{tmp_path} cannot be written: No space left on device; free some space",
        f"{tmp_path} can be written again",
    ]
    snapshot = kept.recalled()
    kept._held.release()
    assert snapshot is not None
    assert snapshot.sequence == 3


def test_a_client_that_died_before_it_kept_anything_begins_anew(tmp_path: Path) -> None:
    file, out = tmp_path / "images.npz", tmp_path / "out"
    images, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 4
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(file, **arrays)
    life = Life(settled(small_run(checkpoint_every=0.05)), tmp_path)
    server = life.start()

    def process() -> tuple[Client, Memory]:
        kept = Memory(tmp_path / "state")
        return Client(f"127.0.0.1:{life.port}", "c", CPU, f"npz:{file}", memory=kept), kept

    first, kept = process()
    RunFolder(out, first.join(patience=10), "client-0")  # and then it dies
    kept._held.release()
    second, kept = process()
    second.join(patience=10, takeover=True)
    second.train(out)
    assert server.wait(timeout=10)
    assert server.finish()["samples_trained"] == 2 * 20
    for client in (first, second):
        client.close()
    kept._held.release()
    server.stop(ClosedError("the run is over"))
