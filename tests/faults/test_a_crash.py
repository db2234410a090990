"""A: the server dies at any point and starts anew. Each batch is learned from once, and no bit differs."""

import contextlib
import functools
import json
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.checkpoint import Checkpoints, Saved
from common.errors import ClosedError, ConfigError, RefusedError, StaleError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import Answer, Received
from common.run import Run
from common.wire import options
from common.wire import split_learning_pb2 as pb
from common.wire.split_learning_pb2_grpc import SplitLearningServiceStub
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_server.inbox import Job
from dsl_server.ledger import Mark
from dsl_server.saver import Captured, Saver
from dsl_server.server import Server
from tests.faults.crashes import Life, Outcome, check_exact, comes, live
from tests.federation import Batches, small_run
from tests.ordinary import refused
from tests.threads import POLLED, wait_for

pytestmark = pytest.mark.timeout(60)

SAMPLES = (44, 36)  # of two clients: 6 batches and 5, the last ones short

SETTINGS: dict[str, dict[str, Any]] = {
    "dsl": {},
    "dsl-average": {"sync": "average"},
    "dsl-relay": {"sync": "relay"},
    "dsl-feedback": {"method_arg": ("lambda_=0.5", "q=2")},
    "dsl-replay": {"replay": "1MB"},
    "dsl-send-every": {"send_every": 2},
    "dsl-int8": {"codec": ("activations=int8",)},
    "dsl-randtopk": {"codec": ("activations=randtopk:0.2+zstd",)},
    "dsl-budget": {"budget": "1MB"},
    "csl": {"method": "csl"},
    "csl-relay": {"method": "csl", "sync": "relay"},
    "csl-fp16": {"method": "csl", "codec": ("activations=fp16", "gradients=fp16")},
    "psl": {"method": "psl"},
    "splitfed-v1": {"method": "splitfed-v1"},
    "splitfed-v2": {"method": "splitfed-v2"},
    "splitfed-v3": {"method": "splitfed-v3"},
    "sglr": {"method": "sglr"},
    "gapsl": {"method": "gapsl"},
    "epsl": {"method": "epsl"},
    "cyclesl": {"method": "cyclesl"},
    "cse-fsl": {"method": "cse-fsl"},
    "fsl-sage": {"method": "fsl-sage", "method_arg": ("l=1", "q=2")},
    "ampere": {"method": "ampere", "method_arg": ("server_epochs=2",)},
    "ushape": {"method": "ushape"},
    "fedavg": {"method": "fedavg"},
}


def lasting(**settings: Any) -> Run:
    defaults = {"epochs": 3, "clients": len(SAMPLES), "checkpoint_every": 0.05, "deterministic": True}
    return settled(small_run(**{**defaults, **settings}))


def shares(run: Run) -> list[Batches]:
    return [Batches(run, seed, samples) for seed, samples in enumerate(SAMPLES[: run.clients])]


@functools.cache
def uninterrupted(name: str) -> Outcome:
    run = lasting(**SETTINGS[name])
    with tempfile.TemporaryDirectory() as folder:
        return live(run, Path(folder), shares(run))


def planned(run: Run, data: list[Batches], client: int) -> int:
    """The batches that a client numbers in all."""
    method, batches = build_method(run), len(data[client])
    in_epochs = sum(len(method.sent(epoch, batches)) for epoch in range(run.epochs))
    return in_epochs + (batches if method.afterwards else 0)


def check(outcome: Outcome, name: str) -> None:
    """The oracle, and the weights of a run that nobody disturbed."""
    run = outcome.server.run
    data = shares(run)
    check_exact(outcome, run, data, lambda client: planned(run, data, client))
    before = uninterrupted(name)
    assert [a["applied"] for a in outcome.ledger["accounts"]] == [
        a["applied"] for a in before.ledger["accounts"]
    ], "numbers, samples and the hash over all batches"
    assert outcome.summary["samples_trained"] == before.summary["samples_trained"]
    assert outcome.same_as(before), "bit for bit"


def anew(life: Life) -> None:
    life.crash()
    life.start(resume=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_a1_a_server_that_dies_twice_in_a_run_leaves_no_trace_in_it(name: str, tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        for samples in (50, 150):
            if life.wait_for_samples(samples):
                anew(life)

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)


@pytest.mark.parametrize("name", ["dsl-average", "csl", "ushape", "splitfed-v1"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a2_a_server_that_dies_at_random_instants(name: str, seed: int, tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        dice = random.Random(seed)
        for _ in range(4):
            if life.wait_for_samples(dice.randrange(230)):
                anew(life)

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)


# ---------------------------------------------------------------- A2: at a point that is hit exactly


class Failpoint:
    """A place in a server at which it dies: who comes there goes no further."""

    def __init__(self, after: int) -> None:
        self._left = after  # times that it is passed before
        self._reached, self._dead = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._left -= 1
        if self._left < 0:
            self._reached.set()
            self._dead.wait(30)
            raise ClosedError("the server has died")

    def dies(self, life: Life) -> None:
        """Once it is reached."""
        assert self._reached.wait(30)
        life.crash(on_dead=self._dead.set)


def before_apply(server: Server, point: Failpoint, patch: pytest.MonkeyPatch) -> None:
    whole = server.hosting.step

    def step(group: Sequence[Received]) -> Answer:
        point()
        return whole(group)

    patch.setattr(server.hosting, "step", step)


def after_apply_before_the_answer(server: Server, point: Failpoint, patch: pytest.MonkeyPatch) -> None:
    whole = server._trainer._on_applied

    def on_applied(job: Job, loss: float | None) -> None:
        whole(job, loss)
        point()

    patch.setattr(server._trainer, "_on_applied", on_applied)


def while_a_checkpoint_is_taken(server: Server, point: Failpoint, patch: pytest.MonkeyPatch) -> None:
    saver = server._saver
    assert isinstance(saver, Saver)
    whole = saver._capture

    def capture() -> Captured:
        captured = whole()
        point()
        return captured

    patch.setattr(saver, "_capture", capture)


def before_the_rename(server: Server, point: Failpoint, patch: pytest.MonkeyPatch, cut: bool = False) -> None:
    folder, whole = server._folder.path / "checkpoints", server._checkpoints.write

    def write(saved: Saved) -> None:
        beside = folder.with_name("beside")
        Checkpoints(beside).write(saved)
        tensors = beside / f"{saved.number:08}" / "part.safetensors"
        if cut:
            tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
        folder.mkdir(exist_ok=True)
        os.rename(tensors.parent, folder / f".{saved.number}.tmp")
        try:
            point()
        except ClosedError as dead:
            raise OSError("nobody writes any more") from dead
        whole(saved)

    patch.setattr(server._checkpoints, "write", write)


def in_the_middle_of_a_checkpoint(server: Server, point: Failpoint, patch: pytest.MonkeyPatch) -> None:
    before_the_rename(server, point, patch, cut=True)


def after_the_rename_before_the_notice(server: Server, point: Failpoint, patch: pytest.MonkeyPatch) -> None:
    saver = server._saver
    assert isinstance(saver, Saver)
    whole = saver._on_saved

    def told(kept: list[dict[str, Any]]) -> None:
        with contextlib.suppress(ClosedError):
            point()
            whole(kept)

    patch.setattr(saver, "_on_saved", told)


POINTS = (
    (before_apply, 7),
    (after_apply_before_the_answer, 8),
    (while_a_checkpoint_is_taken, 1),
    (in_the_middle_of_a_checkpoint, 1),
    (before_the_rename, 1),
    (after_the_rename_before_the_notice, 1),
)


@pytest.mark.parametrize("name", ["dsl-average", "csl", "ushape"])
@pytest.mark.parametrize(("place", "after"), POINTS, ids=[place.__name__ for place, _ in POINTS])
def test_a2_a_server_that_dies_exactly(
    place: Callable[[Server, Failpoint, pytest.MonkeyPatch], None],
    after: int,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def disturb(life: Life) -> None:
        point = Failpoint(after)
        assert life.server
        place(life.server, point, monkeypatch)
        point.dies(life)
        life.start(resume=True)

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)
    left = [path.name for path in (tmp_path / "server" / "checkpoints").iterdir()]
    assert all(entry.isdecimal() for entry in left), left


@pytest.mark.parametrize("name", ["dsl-average", "fedavg"])
def test_a2_a_server_that_dies_after_a_checkpoint_has_the_average_that_nobody_was_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(life: Life) -> None:
        point, server = Failpoint(0), life.server
        assert server
        whole = server.rounds.average

        def average(*given: Any) -> Any:
            made = whole(*given)
            server._saver.commit()
            point()
            return made

        monkeypatch.setattr(server.rounds, "average", average)
        point.dies(life)
        life.start(resume=True)

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)


@pytest.mark.parametrize("persisted", [False, True], ids=["before", "after"])
def test_a2_a_server_that_dies_when_a_join_is_persisted_has_no_ghost_in_its_place(
    persisted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was not answered does not know that it is a member; it asks again, and has one place, no second."""
    run = lasting(clients=1)
    life, point, memory = Life(run, tmp_path), Failpoint(0), Memory()
    server = life.start()
    whole = server._saver.commit

    def commit() -> None:
        if persisted:
            whole()
        point()

    monkeypatch.setattr(server._saver, "commit", commit)
    connection, client = comes(life, shares(run)[0], memory)
    point.dies(life)
    server = life.start(resume=True)
    client.result(30)
    assert server.wait(10)
    assert [(a.client, a.left) for a in life.ledger.accounts] == [(0, True)]
    assert server.record.samples_trained == 3 * SAMPLES[0]
    end(life, connection)


def end(life: Life, *connections: Connection) -> None:
    assert life.server
    life.server.stop(ClosedError("the test is over"))
    for connection in connections:
        connection.close()


# ---------------------------------------------------------------- A5: who never comes back


def joined(life: Life, name: str = "bob") -> Connection:
    """A client that has its place, and does nothing."""
    connection = Connection(f"127.0.0.1:{life.door}", Traffic(), Clock(), memory=Memory())
    connection.join(name, patience=30)
    return connection


@pytest.mark.parametrize("crash", [False, True], ids=["", "and the server once"])
def test_a5_a_client_that_dies_for_good_is_not_waited_for_beyond_the_lease(
    crash: bool, tmp_path: Path
) -> None:
    run = lasting(sync="average", quorum=1, lease=1.0, epochs=2)
    life = Life(run, tmp_path)
    life.start()
    dead = joined(life)
    connection, client = comes(life, shares(run)[1], Memory())
    wait_for(lambda: len(life.ledger.accounts) == 2)
    dead.close()
    if crash:
        anew(life)
    client.result(30)
    assert life.server
    assert life.server.wait(10)
    assert life.ledger.accounts[0].lost == "client 0 (bob) did not come back within 1 s"
    assert life.server.record.samples_trained == 2 * SAMPLES[1]
    end(life, connection)


def test_a5_without_a_quorum_the_run_ends_with_one_line_that_says_who_did_not_come_back(
    tmp_path: Path,
) -> None:
    run = lasting(sync="average", lease=0.5, epochs=2)
    life = Life(run, tmp_path)
    server = life.start()
    dead = joined(life)
    connection, client = comes(life, shares(run)[1], Memory())
    wait_for(lambda: len(life.ledger.accounts) == 2)
    dead.close()
    with pytest.raises(ClosedError) as caught:
        server.wait(30)
    says = "client 0 (bob) did not come back within 0.5 s"
    assert str(caught.value) == says
    assert str(client.exception(30)) == says
    end(life, connection)


# ---------------------------------------------------------------- A8, A9, A10: which server they come back to


# Of Python: a TLS socket whose peer is gone before the handshake is left to be collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a8_clients_that_come_back_before_the_server_is_up_wait_for_it(tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        assert life.wait_for_samples(50)
        life.crash()
        with socket.create_server(("127.0.0.1", life.port)) as nobody:
            for _ in range(3):
                nobody.accept()[0].close()  # they have come, and found no server yet
        life.start(resume=True)

    run = lasting(**SETTINGS["dsl-average"])
    outcome = live(run, tmp_path, shares(run), disturb)
    check(outcome, "dsl-average")
    audited = [json.loads(line) for line in (tmp_path / "server" / "audit.jsonl").read_text().splitlines()]
    assert not [line for line in audited if line["event"] == "refused"]


def stopped_in_the_middle(life: Life, method: str) -> tuple[Connection, Future[Any]]:
    """A client of which the server dies when it knows that batches need not be kept any more."""
    life.start()
    memory = Memory()
    connection, client = comes(life, Batches(life.run, 0, 400), memory)
    wait_for(lambda: memory.durable > 0)
    life.crash()
    return connection, client


@pytest.mark.filterwarnings(POLLED)
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a9_a_server_without_its_checkpoints_does_not_silently_begin_anew(
    method: str, tmp_path: Path
) -> None:
    life = Life(lasting(method=method, clients=1, epochs=9), tmp_path)
    connection, client = stopped_in_the_middle(life, method)
    shutil.rmtree(tmp_path / "server" / "checkpoints")
    life.start(resume=True)
    error = client.exception(30)
    assert isinstance(error, RefusedError)
    assert "\n" not in str(error)
    assert "start the server with --resume of that run's folder" in str(error)
    assert not life.ledger.accounts
    end(life, connection)


@pytest.mark.filterwarnings(POLLED)
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a9_a_checkpoint_older_than_what_the_client_has_thrown_away_is_refused(
    method: str, tmp_path: Path
) -> None:
    life = Life(lasting(method=method, clients=1, epochs=9), tmp_path)
    life.start()
    memory, checkpoints = Memory(), tmp_path / "server" / "checkpoints"
    connection, client = comes(life, Batches(life.run, 0, 400), memory)
    wait_for(lambda: bool(Checkpoints(checkpoints).numbers()))
    early = Checkpoints(tmp_path / "early")
    while not early.numbers():
        with contextlib.suppress(ConfigError, IndexError):  # it may be removed at this moment
            early.write(Checkpoints(checkpoints).read(Checkpoints(checkpoints).numbers()[0]))
    wait_for(lambda: memory.durable > 0)
    life.crash()
    shutil.rmtree(checkpoints)
    (tmp_path / "early").rename(checkpoints)
    life.start(resume=True)
    error = client.exception(30)
    assert isinstance(error, RefusedError)
    assert "this checkpoint is too old; resume from the newest one" in str(error)
    end(life, connection)


@pytest.mark.parametrize("name", ["dsl-average", "csl", "ushape"])
def test_a10_a_server_that_drains_turns_away_who_comes_and_the_next_one_goes_on(
    name: str, tmp_path: Path
) -> None:
    def disturb(life: Life) -> None:
        assert life.wait_for_samples(50)
        assert life.server
        stopping = StaleError("the server is draining: it will be back")
        life.server.drain(stopping, 20)
        with grpc.insecure_channel(f"127.0.0.1:{life.port}", [("grpc.enable_http_proxy", 0)]) as channel:
            stub: Any = SplitLearningServiceStub(channel)  # type: ignore[no-untyped-call]
            with refused(grpc.StatusCode.UNAVAILABLE, "draining"):
                next(stub.Join(pb.JoinRequest(oldest_version=1, newest_version=1, name="late")))
            health: Any = health_pb2_grpc.HealthStub(channel)
            status = health.Check(health_pb2.HealthCheckRequest()).status
            assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        life.server.stop(stopping)
        life.start(resume=True)

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb), name)


# ---------------------------------------------------------------- B: the network, in a run that lasts


@pytest.mark.parametrize("name", ["dsl-average", "csl", "ushape", "splitfed-v1"])
def test_b5_connections_that_are_reset_again_and_again(name: str, tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        assert life.proxy
        for samples in (20, 60, 110, 170, 220):
            if life.wait_for_samples(samples):
                life.proxy.reset_all()

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb, proxied=True), name)


@pytest.mark.parametrize("name", ["dsl-average", "csl", "ushape"])
def test_b3_when_answers_are_lost_batches_come_again_and_are_known(name: str, tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        assert life.proxy
        assert life.server
        apply, dark = life.server.rounds.apply, threading.Event()

        def answers_nobody(client: int, mark: Mark) -> None:
            apply(client, mark)
            if life.proxy and dark.is_set():  # it is answered after this
                life.proxy.blackhole("down")
                dark.clear()

        life.server.rounds.apply = answers_nobody  # type: ignore[method-assign]
        for samples in (30, 100, 180):
            if life.wait_for_samples(samples):
                dark.set()
                wait_for(lambda: not dark.is_set())
                still = -1
                while still != life.proxy.passed["up"]:  # until nobody gets any further
                    still = life.proxy.passed["up"]
                    time.sleep(0.1)
                life.proxy.reset_all()
                life.proxy.pass_through()

    run = lasting(**SETTINGS[name])
    outcome = live(run, tmp_path, shares(run), disturb, proxied=True)
    check(outcome, name)
    if build_method(run).goes_back:
        assert outcome.server.rounds.ledger.duplicates > 0


@pytest.mark.parametrize("name", ["dsl-average", "csl"])
def test_b2_a_blackhole_is_noticed_and_after_it_the_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "KEEPALIVE_MS", 300)

    def disturb(life: Life) -> None:
        assert life.proxy
        assert life.wait_for_samples(60)
        life.proxy.blackhole()
        wait_for(lambda: not any(a.present for a in life.ledger.accounts))
        life.proxy.pass_through()

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb, proxied=True), name)
