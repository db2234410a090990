"""Who comes back and may not, what comes twice, and what is damaged on disk: refused, or passed over."""

import contextlib
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from common import disk
from common.checkpoint import Checkpoints, Saved
from common.errors import ConfigError, RefusedError, TakenError
from common.meter import Clock, Traffic
from common.methods.base import Smashed
from common.rundir import Held
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from common.wire.codec import pack_batch, sealed
from common.wire.pieces import Piece
from common.wire.rpc import EXPECTED
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_lab import certs
from dsl_server import rounds
from tests.certificates import make
from tests.faults.crashes import Life, comes, live
from tests.faults.proxy import Proxy
from tests.faults.test_a_crash import SAMPLES, SETTINGS, check, end, lasting, shares
from tests.federation import Batches, spec_of
from tests.ordinary import DEADLINE_S, smashed
from tests.threads import wait_for

pytestmark = pytest.mark.timeout(60)


# ---------------------------------------------------------------- D6: one identity, two processes


def test_d6_a_folder_is_one_process_s(tmp_path: Path) -> None:
    first = Memory(tmp_path)
    with pytest.raises(ConfigError, match="another process goes on with it; stop that one"):
        Memory(tmp_path)
    first._held.release()
    Memory(tmp_path)._held.release()


@pytest.mark.slow  # its second process begins at no sure place of the first one's
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_d6_a_copy_of_the_folder_is_refused_unless_it_takes_over(method: str, tmp_path: Path) -> None:
    run = lasting(method=method, sync="relay")
    data = shares(run)
    life = Life(run, tmp_path)
    server = life.start()
    memory = Memory(tmp_path / "state")
    first_connection, first = comes(life, data[0], memory)

    def waits_for_its_turn() -> bool:
        """The next one, which comes after that of the other client."""
        known = memory.recalled()
        return known is not None and bool(known.facts["epochs"] == 1)

    wait_for(waits_for_its_turn)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    copied = Memory(tmp_path / "copy")
    refused_connection, refused = comes(life, data[0], copied)
    error = refused.exception(30)
    assert isinstance(error, TakenError)
    assert "say --takeover to end its membership" in str(error)
    second_connection, second = comes(life, data[0], copied, takeover=True)
    error = first.exception(30)
    assert isinstance(error, RefusedError)
    assert str(error) == "another process has taken the place of client 0 (ann)"
    other_connection, other = comes(life, data[1], Memory(), "bob")
    for future in (second, other):
        future.result(30)
    assert server.wait(10)
    assert [a.left for a in life.ledger.accounts] == [True, True]
    assert server.record.samples_trained == 3 * sum(SAMPLES)
    end(life, first_connection, refused_connection, second_connection, other_connection)


# ---------------------------------------------------------------- D7, F3: batches out of their order


class Raw:
    """A member that sends what it is told to. Its memory is that of whoever it is."""

    def __init__(self, life: Life, memory: Memory, takeover: bool = False) -> None:
        self._run = life.run
        self.connection = Connection(f"127.0.0.1:{life.port}", Traffic(), Clock(), memory=memory)
        self.connection.join("ann", 30, takeover)

    def send(self, first: int, batches: Sequence[Smashed]) -> pb.StreamActivationsResponse:
        """A segment of the last batches of an epoch of four."""
        place, samples = first - 1, sum(len(batch.z) for batch in batches)
        opening = pb.Segment(
            session=self.connection.session,
            first_sequence=first,
            batches=len(batches),
            samples=samples,
            place=place,
        )
        pieces = [Piece(pb.StreamActivationsRequest(segment=opening))]
        for number, batch in enumerate(batches, first):
            kind = pb.StreamActivationsRequest
            pieces += sealed(pack_batch(kind, number, batch, spec_of(self._run), 0))
        receipt: pb.StreamActivationsResponse = self.connection.start_segment()(iter(pieces)).result(
            DEADLINE_S
        )
        return receipt


@contextlib.contextmanager
def fails(code: grpc.StatusCode, says: str) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error: Any = caught.value
    assert error.code() is code, error.details()
    assert says in error.details()


def test_d7_f3_what_comes_twice_out_of_order_or_from_a_former_self_is_applied_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.2)
    life = Life(lasting(clients=1), tmp_path)
    server = life.start()
    batches = [smashed(life.run, seed=seed) for seed in range(4)]
    memory = Memory()
    ann = Raw(life, memory)
    assert ann.send(1, batches[:2]).applied == 2
    (account,) = life.ledger.accounts
    wait_for(lambda: server.record.samples_trained == 2 * life.run.batch_size)  # counted after the answer
    before = account.applied, server.record.samples_trained

    assert ann.send(1, batches[:2]).applied == 2, "the same bytes again are well"
    assert life.ledger.duplicates == 2
    with fails(grpc.StatusCode.FAILED_PRECONDITION, "batch 2 came before, with other contents"):
        ann.send(2, batches[3:])
    with fails(grpc.StatusCode.ABORTED, "batch 4 came, but batch 3 is due") as caught:
        ann.send(4, batches[3:])
    error: Any = caught.value
    assert dict(error.trailing_metadata())[EXPECTED] == "3"
    later = Raw(life, memory, takeover=True)
    with fails(grpc.StatusCode.FAILED_PRECONDITION, "another process has taken the place of client 0 (ann)"):
        ann.send(3, batches[2:])
    assert (account.applied, server.record.samples_trained) == before

    assert later.send(3, batches[2:]).applied == 4
    wait_for(lambda: server.record.samples_trained == 4 * life.run.batch_size)
    end(life, ann.connection, later.connection)


# ---------------------------------------------------------------- D12: a certificate that is renewed


def test_d12_a_client_comes_back_with_the_certificate_that_it_has_then(tmp_path: Path) -> None:
    folder = make(tmp_path / "certs", "client-0")
    run = lasting(clients=1, epochs=6)
    theirs = folder / "clients" / "client-0"
    life = Life(run, tmp_path, credentials=Credentials.read(folder, "server"))
    server = life.start()
    with Proxy(life.port) as life.proxy:
        own = Credentials.read(theirs, "client")
        connection, client = comes(life, shares(run)[0], Memory(), "client-0", credentials=own)
        assert life.wait_for_samples(60)
        certs.run(certs.Revoke(folder, "client-0"))
        theirs.rename(theirs.with_name("old"))
        certs.run(certs.Client(folder, "client-0"))
        life.proxy.reset_all()
        client.result(30)
    assert server.wait(10)
    assert server.record.samples_trained == 6 * SAMPLES[0]
    assert [a.sessions > 1 for a in life.ledger.accounts] == [True], "it has come back"
    end(life, connection)


# ---------------------------------------------------------------- E: the disk


def test_e6_a_second_server_does_not_go_on_with_the_same_folder(tmp_path: Path) -> None:
    first = Held(tmp_path, "--resume")
    with pytest.raises(ConfigError, match="another process goes on with it; stop that one"):
        Held(tmp_path, "--resume")
    first.release()
    Held(tmp_path, "--resume").release()


Damage = Callable[[Path], object]


def cut_short(checkpoint: Path) -> None:
    tensors = checkpoint / "part.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])


def a_bit_flipped(checkpoint: Path) -> None:
    tensors = checkpoint / "part.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[len(raw) // 2] ^= 1
    tensors.write_bytes(raw)


def facts_changed(checkpoint: Path) -> None:
    facts = checkpoint / "facts.json"
    facts.write_text(facts.read_text().replace("turn", "torn", 1))


DAMAGES: list[Damage] = [cut_short, a_bit_flipped, facts_changed]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["dsl-average", "csl"])
def test_e9_of_a_damaged_checkpoint_the_one_before_is_used_with_a_warning(
    damage: Damage, name: str, tmp_path: Path
) -> None:
    def disturb(life: Life) -> None:
        folder = tmp_path / "server" / "checkpoints"
        assert life.wait_for_samples(100)
        wait_for(lambda: len(Checkpoints(folder).numbers()) > 1)
        life.crash()
        damage(folder / f"{Checkpoints(folder).numbers()[-1]:08}")
        life.start(resume=True)
        assert "is damaged" in life.troubles[0]
        assert "the one before is used" in life.troubles[0]

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)


def begun(tmp_path: Path) -> Life:
    """A run whose server has died, and left checkpoints."""
    life = Life(lasting(clients=1, epochs=9), tmp_path)
    life.start()
    connection, client = comes(life, Batches(life.run, 0, 400), Memory(), patience=1)
    wait_for(lambda: len(Checkpoints(tmp_path / "server" / "checkpoints").numbers()) > 2)
    connection.close()
    client.exception(30)
    life.crash()
    return life


class Malice:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


def test_e9_e12_where_no_checkpoint_is_whole_the_server_says_so_and_runs_nothing_of_them(
    tmp_path: Path,
) -> None:
    life, trace = begun(tmp_path), tmp_path / "it-ran"
    damages: list[Damage] = [
        *DAMAGES,
        lambda checkpoint: torch.save({"weights": Malice(trace)}, checkpoint / "part.safetensors"),
        lambda checkpoint: (checkpoint / "facts.json").write_bytes(pickle.dumps(Malice(trace))),
    ]
    folder = tmp_path / "server" / "checkpoints"
    shutil.copytree(folder, tmp_path / "whole")
    for damage in damages:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        for checkpoint in folder.iterdir():
            damage(checkpoint)
        with pytest.raises(ConfigError, match="no checkpoint of it can be read"):
            life.start(resume=True)
    assert not trace.exists()


def test_e12_a_checkpoint_whose_digests_fit_a_pickle_is_refused_all_the_same(tmp_path: Path) -> None:
    import hashlib
    import json

    checkpoints, trace = Checkpoints(tmp_path), tmp_path / "it-ran"
    checkpoints.write(Saved(1, {"t": torch.zeros(3)}, {}))
    tensors, facts = (tmp_path / "00000001" / name for name in ("part.safetensors", "facts.json"))
    torch.save({"t": Malice(trace)}, tensors)
    whole = json.loads(facts.read_text())
    whole["tensors"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    facts.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="is damaged"):
        checkpoints.read(1)
    assert not trace.exists()


def test_e10_a_state_folder_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError) as caught:
        Memory(tmp_path / "file")
    assert str(caught.value) == f"--state {tmp_path / 'file'}: File exists"
    if os.geteuid():  # nothing is denied to root
        (tmp_path / "folder").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="Permission denied"):
            Memory(tmp_path / "folder")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_e7_a_full_disk_holds_the_run_up_until_there_is_room_and_it_ends_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RETRY_S", 0.05)
    checkpoints = tmp_path / "server" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", checkpoints], check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")

    def disturb(life: Life) -> None:
        assert life.wait_for_samples(60)
        kept = Checkpoints(checkpoints).numbers()
        with contextlib.suppress(OSError), (checkpoints / ".filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        wait_for(lambda: any("no checkpoint can be written" in trouble for trouble in life.troubles))
        assert kept
        for number in Checkpoints(checkpoints).numbers():
            Checkpoints(checkpoints).read(number)  # what there was is whole
        (checkpoints / ".filler").unlink()
        wait_for(lambda: life.troubles[-1] == "checkpoints can be written again")

    run = lasting(**SETTINGS["dsl-average"])
    try:
        check(live(run, tmp_path, shares(run), disturb), "dsl-average")
    finally:
        subprocess.run(["umount", "-l", checkpoints], check=False)
