"""B: the network cuts, holds up or misleads. Nothing hangs, and who is left says why."""

import contextlib
import random
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.errors import ClosedError, SplitLearningError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.run import Run
from common.rundir import RunFolder
from common.wire import options
from common.wire import split_learning_pb2 as pb
from dsl_client.connection import Connection
from dsl_client.stream import Stretch
from dsl_lab.launch import program
from dsl_server.server import Server
from tests.faults.crashes import Life, live
from tests.faults.proxy import Direction, Proxy
from tests.faults.test_a_crash import SETTINGS, check, lasting, shares
from tests.federation import CPU, Batches, connect, serving, small_run, spec_of, train
from tests.ordinary import DEADLINE_S, member, smashed
from tests.test_hangs import ended, step_of, told, waiting_for
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(60)

PING_BYTES = 17  # on the wire, and as many in answer


# ---------------------------------------------------------------- B5: a cut


def joined(port: int, name: str = "ann") -> Connection:
    connection = Connection(f"127.0.0.1:{port}", Traffic(), Clock())
    connection.join(name, patience=DEADLINE_S)
    return connection


@contextlib.contextmanager
def behind_a_proxy(run: Run, folder: Path) -> Iterator[tuple[Server, Proxy]]:
    with serving(run, folder) as server, Proxy(server.port) as proxy:
        yield server, proxy


def trains(server: Server, connection: Connection) -> Future[Any]:
    """A client, in a thread of its own."""
    data = Batches(server.run, 0, 40)
    return in_thread(train, server.run, connection, 0, data, data)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Direction, range]]:
    """Of a run of each method that nobody disturbs: the bytes that pass after its Join, either way."""
    spans = {}
    for method in ("dsl", "csl"):
        with behind_a_proxy(small_run(method=method), tmp_path_factory.mktemp(method)) as (server, proxy):
            connection = joined(proxy.port)
            joins = dict(proxy.passed)
            trains(server, connection).result(DEADLINE_S)
            spans[method] = {way: range(joins[way], proxy.passed[way]) for way in joins}
            connection.close()
    return spans


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize(("method", "way"), [("dsl", "up"), ("csl", "up"), ("csl", "down")])
def test_b5_a_cut_at_any_byte_ends_both_ends_with_the_reason(
    method: str, way: Direction, reset: bool, uncut: dict[str, dict[Direction, range]], tmp_path: Path
) -> None:
    span = uncut[method][way]
    last = int(len(span) * 0.9)  # before the goodbye
    offsets = sorted(random.Random(0).sample(span[1:last], 8))
    for offset in offsets:
        with behind_a_proxy(small_run(method=method), tmp_path / str(offset)) as (server, proxy):
            proxy.cut(offset, way, reset)
            connection = joined(proxy.port)
            error = told(trains(server, connection))
            assert isinstance(error, ClosedError), offset
            assert "went away" in str(error), offset
            assert "client 0 (ann) went away" in str(ended(server)), offset
            connection.close()


@pytest.mark.parametrize("name", ["dsl-average", "csl"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_b5_in_a_run_that_lasts_cuts_at_any_byte_change_nothing(
    way: Direction, name: str, tmp_path: Path
) -> None:
    offsets = random.Random(0).sample(range(1, 60_000 if way == "up" else 4_000), 5)

    def disturb(life: Life) -> None:
        assert life.proxy
        for offset in offsets:
            before = life.proxy.accepted
            life.proxy.cut(offset, way, reset=offset % 2 == 0)
            life.proxy.reset_all()
            wait_for(partial(come_again, life, before))

    run = lasting(**SETTINGS[name])
    check(live(run, tmp_path, shares(run), disturb, proxied=True), name)


def come_again(life: Life, before: int) -> bool:
    """Whether a client has connected since then, or all have done what they were to do."""
    assert life.proxy
    return life.proxy.accepted > before or all(account.left for account in life.ledger.accounts)


@pytest.mark.parametrize("way", ["up", "down"])
def test_b5_a_cut_before_the_welcome_is_an_error_or_a_second_attempt_and_no_hang(
    way: Direction, uncut: dict[str, dict[Direction, range]], tmp_path: Path
) -> None:
    """gRPC connects again by itself; a Join that was under way is not sent twice."""
    joins = uncut["dsl"][way].start
    for offset in sorted({0, 1, *range(0, joins, max(1, joins // 8))}):
        with behind_a_proxy(small_run(method="dsl"), tmp_path / str(offset)) as (server, proxy):
            proxy.cut(offset, way)
            connection = Connection(f"127.0.0.1:{proxy.port}", Traffic(), Clock())
            joining = in_thread(connection.join, "ann", DEADLINE_S / 2)
            error = joining.exception(DEADLINE_S)
            if error is None:
                trains(server, connection).exception(DEADLINE_S)
            else:
                assert isinstance(error, SplitLearningError), offset
                assert "no server" not in str(error), offset
            connection.close()
            if server.rounds.members():
                with contextlib.suppress(ClosedError):
                    assert server.wait(DEADLINE_S), offset


# ---------------------------------------------------------------- B8: who does not read


def test_b8_a_server_that_does_not_read_holds_its_client_back_and_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step_of(monkeypatch, "dsl", waiting_for(gate))
    run = small_run(method="dsl", image=(3, 32, 32), batch_size=32, outbox=2, inbox=2)
    batch, batches = smashed(run), 60  # of 2 MiB each
    sent = 0
    with serving(run, tmp_path) as server:
        connection, _ = connect(server)
        segment = connection.segment(
            Stretch(0, 1, batches, 32 * batches), spec_of(run), build_method(run), run.outbox
        )

        def send() -> None:
            nonlocal sent
            for _ in range(batches):
                segment(batch)
                sent += 1

        before = resident_bytes()
        client = in_thread(send)
        wait_for(lambda: sent >= run.outbox)
        still = -1
        while still != sent:  # until nothing more has gone for half a second
            still = sent
            time.sleep(0.5)
        # 2 wait in the outbox and 2 in the inbox, 1 is in the step, 1 waits for room in the inbox
        # and 1 in the outbox's reader. gRPC's window is some megabytes, and up to 16 MiB where answers are
        # slow to come, as on a busy machine; the kernel's buffers hold up to 10 more. That is 13 batches.
        assert 2 + 2 <= sent <= 2 + 2 + 3 + 13
        assert not client.done()
        assert resident_bytes() - before < 100e6, "batches in waiting, not sixty of them"
        gate.set()
        client.result(timeout=20)
        segment.finish()
        connection.settle()
        assert server.rounds.members()[0].received.sequence == batches
        connection.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_b8_a_client_that_does_not_read_its_answers_holds_itself_back_and_memory_stays_flat(
    tmp_path: Path,
) -> None:
    run = small_run(method="csl", image=(3, 32, 32), batch_size=32, inbox=2)
    batch, batches = smashed(run), 60  # of 2 MiB each, either way
    sent = 0
    with serving(run, tmp_path) as server, member(server) as client:
        opening, frame = client.segment(pb.TrainRequest, [batch])
        opening.segment.batches, opening.segment.samples = batches, 32 * batches

        def messages() -> Iterator[Any]:
            nonlocal sent
            yield opening
            for sequence in range(1, batches + 1):
                yield from pieces_of(frame, sequence)
                sent += 1

        before = resident_bytes()
        call = client.stub.Train(messages())
        wait_for(lambda: server.record.samples_trained > 0)
        still = -1
        while still != sent:  # until nothing more has gone for a second
            still = sent
            time.sleep(1)
        assert sent < 40, "gRPC's windows and the kernel's buffers hold some, either way"
        assert resident_bytes() - before < 150e6, "batches in waiting, not sixty of them"
        call.cancel()


def pieces_of(frame: pb.TrainRequest, sequence: int) -> Iterator[pb.TrainRequest]:
    """As messages below the limit of what one may be."""
    head = pb.TrainRequest()
    head.CopyFrom(frame)
    head.batch.sequence = sequence
    head.ClearField("data")
    size = 1 << 20
    for start in range(0, len(frame.data), size):
        if start:
            head = pb.TrainRequest()
        head.data = frame.data[start : start + size]
        yield head


# ---------------------------------------------------------------- B9: where the server is


def test_b9_f6_enable_http_proxy_makes_a_proxy_in_the_environment_of_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(small_run(), tmp_path) as server:
        connection, client = connect(server)
        assert client == 0
        connection.close()


def test_b9_a_name_that_cannot_be_resolved_is_told_in_one_line(tmp_path: Path) -> None:
    flags = ["--server", "no-such-host.invalid:50051", "--insecure", "--patience", "1"]
    client = subprocess.run(
        [program("dsl-client"), *flags, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    assert client.returncode == 69, client.stdout
    (line,) = [line for line in client.stdout.splitlines() if "error" in line]
    assert "no-such-host.invalid:50051" in line
    assert "Traceback" not in client.stdout


def test_b9_a_server_that_listens_on_ipv6_alone_is_reached(tmp_path: Path) -> None:
    run = settled(small_run())
    server = Server(run, "[::1]:0", CPU, RunFolder(tmp_path / "server", run, "server"))
    server.start()
    try:
        connection = Connection(f"[::1]:{server.port}", Traffic(), Clock())
        connection.join("ann", patience=DEADLINE_S)
        trains(server, connection).result(DEADLINE_S)
        assert server.wait(DEADLINE_S)
        connection.close()
    finally:
        server.stop(ClosedError("the test is over"))


# ---------------------------------------------------------------- B11: idle connections


def test_b11_idle_clients_that_ping_are_not_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "KEEPALIVE_MS", 300)
    with (
        serving(small_run(clients=2), tmp_path) as server,
        Proxy(server.port) as one,
        Proxy(server.port) as two,
    ):
        connections = [joined(proxy.port) for proxy in (one, two)]
        before = min(one.passed["up"], two.passed["up"])
        wait_for(lambda: min(one.passed["up"], two.passed["up"]) >= before + 10 * PING_BYTES)
        for connection in connections:
            connection.check_open()
        for connection in connections:  # the first that goes ends the run
            connection.close()
        assert (one.accepted, two.accepted) == (1, 1), "nobody was sent away and came back"
