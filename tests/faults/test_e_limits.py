"""E: more than the server has room for. Who is too much is told so, or waits, and the others go on."""

import contextlib
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from common.errors import ConfigError, FullError
from common.meter import Clock, Traffic
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire import options
from common.wire import split_learning_pb2 as pb
from common.wire.split_learning_pb2_grpc import SplitLearningServiceStub
from dsl_client.connection import Connection
from dsl_server import gate
from dsl_server.server import Server
from tests.certificates import make
from tests.faults.proxy import Proxy
from tests.federation import CPU, serving, small_run
from tests.ordinary import DEADLINE_S, MANY, Ordinary, member, refused, smashed
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
ROOT = Path(__file__).parent.parent.parent


# ---------------------------------------------------------------- E1: streams that say nothing


def silent(over: threading.Event) -> Iterator[Any]:
    """Requests of which there is none."""
    over.wait()
    yield from ()


@pytest.mark.parametrize("name", ["StreamActivations", "Evaluate", "SyncWeights"])
def test_e1_a_stream_that_does_not_begin_is_ended(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "OPENING_S", 0.5)
    over = threading.Event()
    with serving(small_run(), tmp_path) as server, member(server) as client:
        call = getattr(client.stub, name)
        begin = call.future if name == "StreamActivations" else call
        error: Any = begin(silent(over), timeout=DEADLINE_S).exception()
        assert error.code() is Code.CANCELLED, "a deadline would be the client's own"
        client.send([smashed(server.run)])
        over.set()


def test_e1_streams_that_say_nothing_take_nobody_s_place(tmp_path: Path) -> None:
    """As many of one connection as it likes: its own channel keeps back those that are too many."""
    over = threading.Event()
    with (
        serving(small_run(epochs=MANY), tmp_path) as server,
        Proxy(server.port) as proxy,
        grpc.insecure_channel(f"127.0.0.1:{proxy.port}", [("grpc.enable_http_proxy", 0)]) as channel,
    ):
        stub: Any = SplitLearningServiceStub(channel)  # type: ignore[no-untyped-call]
        grpc.channel_ready_future(channel).result(DEADLINE_S)
        calls = [stub.StreamActivations.future(silent(over)) for _ in range(100)]
        with member(server) as client:
            for _ in range(3):
                client.send([smashed(server.run)])
        assert not any(call.done() for call in calls)
        over.set()


# ---------------------------------------------------------------- E2: half-open connections


def test_e2_f6_server_handshake_timeout_closes_half_open_connections_and_a_client_is_unaffected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of itself gRPC would have them for two minutes."""
    monkeypatch.setattr(options, "HANDSHAKE_MS", 4000)
    certs = make(tmp_path / "certs", "ann")
    record = b"\x16\x03\x01\x02\x00"  # the head of a ClientHello that never comes
    with (
        contextlib.ExitStack() as stack,
        serving(small_run(), tmp_path, Credentials.read(certs, "server")) as server,
    ):
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(200)
        ]
        for connection in held[::2]:
            connection.sendall(record)
        ann = Credentials.read(certs / "clients" / "ann", "client")
        with member(server, "ann", ann) as client:
            client.send([smashed(server.run)])
            assert server.record.samples_trained > 0
            for connection in held:
                assert connection.recv(1) == b""
            client.send([smashed(server.run)])


# ---------------------------------------------------------------- E3: more clients than places


def test_e3_one_client_too_many_is_refused_at_once(tmp_path: Path) -> None:
    run = small_run(clients=2)
    with serving(run, tmp_path) as server, member(server, "ann") as ann, member(server, "bob"):
        request = pb.JoinRequest(oldest_version=1, newest_version=1, name="eve")
        says = ("'eve'", "client 0 (ann)", "client 1 (bob)", "--clients 3")
        with refused(Code.RESOURCE_EXHAUSTED, *says):
            next(ann.stub.Join(request, timeout=DEADLINE_S))
        ann.send([smashed(run)])  # the others go on


def test_e3_of_many_clients_at_once_the_run_takes_its_own_and_refuses_the_others(tmp_path: Path) -> None:
    with serving(small_run(clients=2), tmp_path) as server, contextlib.ExitStack() as stack:
        doors = [stack.enter_context(Proxy(server.port)).port for _ in range(20)]  # each a connection's own
        connections = [Connection(f"127.0.0.1:{port}", Traffic(), Clock()) for port in doors]
        joins = [in_thread(each.join, f"site-{i}", DEADLINE_S) for i, each in enumerate(connections)]
        errors = [join.exception(DEADLINE_S) for join in joins]
        assert sum(error is None for error in errors) == 2
        assert {type(error) for error in errors if error} == {FullError}
        for connection in connections:
            connection.close()


# ---------------------------------------------------------------- E4: a flood


@contextlib.contextmanager
def process(folder: Path) -> Iterator[Any]:
    """A server in a process of its own: its run, its port, and itself."""
    run = small_run(clients=2, method="dsl")
    settings = ["--model", "resnet8", "--split", "1", "--image", "3", "8", "8", "--classes", "4"]
    settings += [
        "--batch-size",
        "8",
        "--epochs",
        str(MANY),
        "--clients",
        "2",
        "--data",
        "npz:unread",
        "--listen",
        "127.0.0.1:0",
    ]
    command = [sys.executable, "-m", "dsl_server", *settings, "--out", str(folder / "out")]
    with started(command) as running:
        found = re.search(r":(\d+)$", running.stderr.readline().strip())
        assert found
        said = in_thread(running.stderr.read)
        yield SimpleNamespace(run=run, running=running, port=int(found[1]))
        assert running.poll() is None
        running.kill()
        assert "Traceback" not in said.result(DEADLINE_S)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[Any]:
    """A process that is gone at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        try:
            yield running
        finally:
            running.kill()


class Worker:
    """A client that sends segments one after another, until it is told to stop."""

    def __init__(self, client: Ordinary) -> None:
        self.segments, self._client, self._over = 0, client, threading.Event()
        self.ended = in_thread(self._work)

    def _work(self) -> None:
        batch = smashed(self._client.run)
        while not self._over.is_set():
            self._client.stream([batch] * 5)
            self.segments += 1

    def stop(self) -> None:
        self._over.set()
        self.ended.result(DEADLINE_S)


def rate(workers: list[Worker]) -> float:
    """Segments a second, of the slowest, over a while."""
    before, start = [worker.segments for worker in workers], time.monotonic()
    time.sleep(1)
    done = min(worker.segments - begun for worker, begun in zip(workers, before, strict=True))
    return done / (time.monotonic() - start)


def test_e4_a_flood_of_joins_leaves_the_others_most_of_their_rate(tmp_path: Path) -> None:
    with process(tmp_path) as server, member(server, "ann") as ann, member(server, "bob") as bob:
        workers = [Worker(client) for client in (ann, bob)]
        with started([sys.executable, "-m", "tests.faults.flood", str(server.port)]) as flood:
            assert flood.stdout.readline() == "RESOURCE_EXHAUSTED\n"
            answers = in_thread(flood.stdout.read)
            with_it, without = [], []
            for _ in range(5):
                flood.send_signal(signal.SIGSTOP)
                without.append(rate(workers))
                flood.send_signal(signal.SIGCONT)
                with_it.append(rate(workers))
            flood.kill()
            share = statistics.median(with_it) / statistics.median(without)
            said = answers.result(DEADLINE_S).split()
            print(f"with a flood {share:.0%} of the rate without; {len(said)} answers")
        for worker in workers:
            worker.stop()
        assert share > 0.5, "the flooding process has a share of the machine, too"


# ---------------------------------------------------------------- E5: no more files


def test_e5_a_server_that_has_run_out_of_files_recovers(tmp_path: Path) -> None:
    limit = 256
    with process(tmp_path) as server:
        resource.prlimit(server.running.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE_S))
            files = Path(f"/proc/{server.running.pid}/fd")
            wait_for(lambda: len(list(files.iterdir())) >= limit - 5)
        connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
        connection.join("ann", patience=30)
        connection.close()


# ---------------------------------------------------------------- E6: a second server


def test_e6_f6_so_reuseport_keeps_a_second_server_from_sharing_the_port(tmp_path: Path) -> None:
    run = small_run(sync="none")
    with serving(run, tmp_path) as first, pytest.raises(ConfigError, match="is the port in use"):
        Server(run, f"127.0.0.1:{first.port}", CPU, RunFolder(tmp_path / "second", run, "server"))
