"""Many clients on one server: each batch counts once, nobody wakes for another's, memory stays bounded."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from common.errors import ConfigError, FullError
from common.run import Run
from common.rundir import RunFolder
from common.wire import split_learning_pb2 as pb
from common.wire.options import SLACK_BYTES, read_ahead, server_options
from common.wire.pieces import PIECE_BYTES
from dsl_server import room, server
from dsl_server.inbox import Errand, Inbox
from dsl_server.kernel import Sockets
from dsl_server.ledger import Ledger, Newcomer
from dsl_server.rounds import Rounds
from tests.federation import CPU, serving, small_run
from tests.ordinary import Ordinary, smashed
from tests.programs import programs, serve
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(100)

MANY = 256
MIB = 1 << 20


@contextlib.contextmanager
def members(host: Any, names: range) -> Iterator[list[Ordinary]]:
    """Clients, each with a connection of its own."""
    there: list[Ordinary] = []
    try:
        for name in names:
            there.append(Ordinary(host, f"client-{name}"))
        yield there
    finally:
        for client in there:
            client.close()


# ---------------------------------------------------------------- many streams


def test_of_256_clients_at_once_every_batch_is_learned_from_exactly_once(tmp_path: Path) -> None:
    run = small_run(method="dsl", clients=MANY, epochs=1, batch_size=2)
    batches = [smashed(run, seed=seed) for seed in range(3)]
    with serving(run, tmp_path) as host, members(host, range(MANY)) as clients:
        calls = []
        for client in clients:
            messages = client.segment(pb.StreamActivationsRequest, batches)
            calls.append(client.stub.StreamActivations.future(iter(messages), timeout=60))
        assert {call.result().applied for call in calls} == {3}
        for client in clients:
            client.leave()
        assert host.wait(timeout=20)
        applied = Counter(account.applied.sequence for account in host.rounds.members())
    assert applied == {3: MANY}
    assert host.record.samples_trained == MANY * 3 * 2
    assert host.rounds.ledger.duplicates == 0
    assert sum(client.samples for client in host.watch.view().clients) == MANY * 3 * 2


def test_a_client_that_says_nothing_costs_the_server_less_than_a_megabyte(tmp_path: Path) -> None:
    """A thread that waits, a connection, a place in the tables."""
    few, many = 20, 120
    with programs(tmp_path) as start:
        process, address = serve(start, "--clients", many)
        host = SimpleNamespace(port=int(address.rpartition(":")[2]), run=Run())

        def resident() -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(status.partition("VmRSS:")[2].split()[0]) * 1024

        with members(host, range(few)):
            before = resident()
            with members(host, range(few, many)):
                grown = resident() - before
    assert grown / (many - few) < 1e6


def test_a_batch_wakes_nobody_who_waits_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its client's Join either, nor who waits for the end of the run: each that wakes stands in the way
    of the others at Python's lock."""
    clients = 30
    rounds = Rounds(Run(clients=clients))
    there = [rounds.join(Newcomer(f"client-{n}")) for n in range(clients)]
    waiting = [in_thread(rounds.next_durable, member, 0) for member in there]
    end = in_thread(rounds.wait_until_finished)

    def asleep() -> list[Any]:
        """Who waits, each by the lock that it waits for: another one if it has been woken meanwhile."""
        return [lock for each in (*rounds._fate, rounds._changed) for lock in each._waiters]

    wait_for(lambda: len(asleep()) == clients + 1)
    before = asleep()
    for sequence in range(1, 51):
        mark = rounds.receive(there[0], sequence, 1, 0, False)
        assert mark is not None
        rounds.laid(0, mark)
        rounds.apply(0, mark)
        assert asleep() == before
    rounds.keep_from({0: 50}, range(clients))
    assert waiting[0].result(timeout=10) == 50, "what becomes of its batches it is told"
    for member in there:
        rounds.leave(member)
    assert [each.result(timeout=10) for each in waiting[1:]] == [None] * (clients - 1)
    assert end.result(timeout=10)


def test_a_tick_of_many_clients_lets_them_on_one_after_the_other() -> None:
    clients = 20
    inbox, going_on = Inbox(clients, depth=1, fixed_order=False), list[int]()

    def two(client: int) -> None:
        for _ in range(2):
            inbox.put(Errand(client, "", lambda _: None))
        going_on.append(client)

    waiting = [in_thread(two, client) for client in range(clients)]
    wait_for(lambda: len(inbox._filled) == clients)
    served = list[int]()
    for work in inbox:
        assert isinstance(work, Errand)
        served.append(work.client)
        wait_for(lambda: len(going_on) >= min(len(served), clients))
        assert set(going_on) == set(served[:clients]), "who has been served, and nobody else"
        if len(served) == clients:
            break
    assert sorted(served) == list(range(clients))
    for each in waiting:
        each.result(timeout=10)


# ---------------------------------------------------------------- what it admits


def test_who_is_one_too_many_of_many_is_told_so_in_a_few_words() -> None:
    """A status's text travels in a header of at most 8 KiB."""
    ledger = Ledger(1000)
    for n in range(1000):
        ledger.join(Newcomer(f"a-rather-long-name-of-a-client-{n:033d}"))
    with pytest.raises(FullError, match=r"and 992 more; start the server with --clients 1001") as caught:
        ledger.join(Newcomer("one-more"))
    assert len(str(caught.value)) < 1000


def test_a_session_is_found_and_a_former_one_is_not() -> None:
    ledger = Ledger(2)
    first = ledger.join(Newcomer("someone", identity="a" * 32))
    former = first.session
    again = ledger.join(Newcomer("someone", identity="a" * 32, session=former))
    assert again is first
    assert ledger.account(again.session) is first
    assert (ledger.client_of(again.session), ledger.client_of(former), ledger.client_of("")) == (
        0,
        None,
        None,
    )


def test_a_server_that_may_not_open_enough_files_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    room.make_room_for_files(100)
    assert set_to == []
    room.make_room_for_files(1000)
    assert set_to == [(1128, 4096)]
    with pytest.raises(ConfigError, match=r"--clients 4000: .* 4096 files open and needs 4128"):
        room.make_room_for_files(4000)


def test_inboxes_that_may_come_to_more_than_there_is_are_told_of_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room.memory_warning(1000, 2, 8 * MIB, available=32 << 30) == ""
    said = room.memory_warning(1000, 2, 8 * MIB, available=16 << 30)
    assert "1000 clients may come to 25,165.8 MB (2 batches of 8.4 MB each" in said
    assert said.endswith("17,179.9 MB free: lower --inbox, --batch-size or --clients")
    assert room.available_bytes() > 0
    monkeypatch.setattr(room, "available_bytes", lambda: 1 << 20)
    told = list[str]()
    run = small_run(method="dsl", clients=100)
    made = server.Server(
        run, "127.0.0.1:0", CPU, RunFolder(tmp_path / "out", run, "server"), on_trouble=told.append
    )
    made._grpc.stop(None)
    made.sockets.close()
    assert len(told) == 1
    assert "1.0 MB free" in told[0]


# ---------------------------------------------------------------- what gRPC and the kernel hold


def test_the_more_clients_the_less_grpc_reads_ahead_of_each() -> None:
    assert read_ahead(1) == read_ahead(32) == []
    assert dict(read_ahead(256))["grpc.http2.lookahead_bytes"] == MIB
    assert dict(read_ahead(100_000))["grpc.http2.lookahead_bytes"] == 1 << 16


def test_a_sender_whose_server_does_not_read_gets_rid_of_little_where_there_are_many() -> None:
    assert 4 * taken_unread(clients=4096) < taken_unread(clients=1)


def taken_unread(clients: int) -> int:
    """Bytes that gRPC takes of a stream whose server reads its beginning, quickly, and then no more."""
    taken, fast = 0, 64 * MIB  # so that gRPC thinks well of the link

    def stream(requests: Iterator[bytes], context: Any) -> bytes:
        read = 0
        while read < fast:
            read += len(next(requests))
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait()
        return b""

    def requests() -> Iterator[bytes]:
        nonlocal taken
        message = bytes(1 << 16)
        while True:
            yield message
            taken += len(message)

    options = server_options(2 * PIECE_BYTES + SLACK_BYTES, 8, clients)
    with ThreadPoolExecutor(4) as pool:
        ours = grpc.server(pool, options=options)
        handler = grpc.stream_unary_rpc_method_handler(stream)
        ours.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", {"B": handler}),))
        port = ours.add_insecure_port("127.0.0.1:0")
        ours.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_unary("/a/B").future(requests())
            before = -1
            while taken != before or taken < fast:
                before = taken
                time.sleep(0.3)
            call.cancel()
        ours.stop(None)
    return taken - fast


@pytest.mark.skipif(not Sockets().available, reason="the kernel tells nothing of sockets here")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_kernel_is_asked_for_the_bytes_of_one_port_alone(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listeners = [socket.create_server((address, 0), family=family) for _ in range(2)]
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with contextlib.ExitStack() as opened:
        ends = []
        for listener in listeners:
            opened.enter_context(listener)
            for _ in range(40):
                theirs = opened.enter_context(socket.create_connection(listener.getsockname()[:2]))
                ours, _ = listener.accept()
                ends.append((theirs, opened.enter_context(ours)))
        for theirs, ours in ends:
            theirs.sendall(b"x" * 1000)
            ours.sendall(b"y" * 10)
            assert (len(ours.recv(1000)), len(theirs.recv(10))) == (1000, 10)
        sockets = Sockets()
        sockets._port = listeners[0].getsockname()[1]
        sockets.read()
        counts = sockets.counts()
    assert counts is not None
    assert counts["up"] == 40 * 1000
    assert 40 * 10 <= counts["down"] <= 40 * 11, "the handshake's number counts as one"


# ---------------------------------------------------------------- what the pages say

ROOT = Path(__file__).parent.parent
HAS_BENCHMARKS = (ROOT / "benchmarks" / "scale").exists()
here_only = pytest.mark.skipif(not HAS_BENCHMARKS, reason="benchmarks are not in this distribution")


@here_only
def test_the_tables_on_the_pages_are_those_of_the_stored_results() -> None:
    from benchmarks.scale import report

    results = report.read(ROOT / "benchmarks" / "scale" / "results.jsonl")
    for page in report.pages():
        text = page.read_text()
        assert report.filled(text, results) == text, f"{page}: python benchmarks/scale/main.py --show"
        assert "| 64 KiB |" in text


@here_only
def test_hosts_are_worked_out_from_costs() -> None:
    """By hand: 6000 clients that send 1 MB a minute are 100 batches and 100 MB a second."""
    from benchmarks.scale.report import Costs, Demand, Host, needs

    costs = Costs(cpu_s_byte=1e-9, cpu_s_batch=0.001, idle_bytes=1e5, batches_s=500, bytes_s=50e6)
    demand = Demand(batch_bytes=10**6, every_s=60, inbox=2, busy=0.1)
    host = Host(cores=4, memory=1e9, network=1e8, files=3000)
    found = needs(6000, costs, demand, host)
    assert found["CPU"] == pytest.approx((100 * 0.001 + 1e8 * 1e-9) / 4)
    assert found["processes (one trainer each, a core or two)"] == pytest.approx(2 * 2 / 4), "two, by bytes"
    assert found["memory"] == pytest.approx(6000 * (1e5 + 0.1 * 3 * 1e6) / 1e9)
    assert found["network"] == pytest.approx(1.0)
    assert found["open files"] == pytest.approx(2.0)


@here_only
def test_costs_are_those_of_a_line_through_two_sizes() -> None:
    """A batch of 2 ms and 3 ns a byte; 50 kB an idle member."""
    from benchmarks.scale.report import LARGE, REAL, SMALL, Costs

    rows: list[dict[str, Any]] = []
    for streams in (1, 256):
        idle = {"before_bytes": 10**8, "idle_bytes": 10**8 + 10**6 + streams * 50_000}
        rows.append({"kind": "idle", "front": REAL, "streams": streams, **idle})
        for size in (SMALL, LARGE):
            cost = 0.002 + 3e-9 * size
            row = {"kind": "load", "front": REAL, "streams": streams, "batch_bytes": size}
            rows.append({**row, "cpu_s_batch": cost, "bytes_s": size / cost})
    costs = Costs.of(rows)
    assert (costs.cpu_s_batch, costs.cpu_s_byte) == (pytest.approx(0.002), pytest.approx(3e-9))
    assert costs.idle_bytes == pytest.approx(50_000)
    assert costs.batches_s == pytest.approx(1 / (0.002 + 3e-9 * SMALL))


@here_only
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_measures_all_three_servers(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    words = [
        "--streams",
        "2",
        "--seconds",
        "0.5",
        "--rounds",
        "1",
        "--parts",
        "fronts",
        "streams",
        "--results",
        str(file),
    ]
    command = [sys.executable, str(ROOT / "benchmarks/scale/main.py"), *words]
    subprocess.run(command, check=True, timeout=280, env={**os.environ, "PYTHONPATH": str(ROOT)})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    load = [row for row in rows if row["kind"] == "load"]
    assert len(load) == 6, "three servers, two sizes"
    assert all(row["batches"] > 0 and row["least"] > 0 for row in load)
