"""Servers and senders as processes, and what passes between them in an interval."""

import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale import load, serve
from benchmarks.scale.net import SAMPLE_BYTES
from benchmarks.scale.serve import Applied

LOADS = 2  # processes of senders
# Batches of a client in an interval, on average: of few of them one more or less would pass for unfairness.
EACH = 16
LONGEST_S = 60.0  # that an interval may take for so many
WARMUP_S = 30.0  # for a batch of each client to be learned from, before an interval
DRAIN_S = 240.0  # for what is under way to be learned from, after an interval
_TICKS = os.sysconf("SC_CLK_TCK")
_SPAWN = multiprocessing.get_context("spawn")
Row = dict[str, Any]


@dataclass
class Process:
    """A process and the pipe to it."""

    process: Any
    pipe: Any

    @classmethod
    def start(cls, target: Any, *arguments: Any) -> "Process":
        here, there = _SPAWN.Pipe()
        process = _SPAWN.Process(target=target, args=[*arguments, there], daemon=True)
        process.start()
        there.close()
        return cls(process, here)

    def ask(self, *command: Any) -> Any:
        self.pipe.send(command)
        return self.answer()

    def answer(self) -> Any:
        return self.pipe.recv()

    def resident(self) -> int:
        """Bytes."""
        return _status(self.process.pid, "VmRSS")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def threads(self) -> int:
        return _status(self.process.pid, "Threads") // 1024

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class Server(Process):
    """arm: what the rows of its measurements have in common."""

    arm: Row = field(default_factory=dict)
    port: int = 0
    joined_resident: int = 0
    before_resident: int = 0

    def ready(self) -> None:
        self.port = self.answer()

    def applied(self) -> list[Applied]:
        found: list[Applied] = self.ask("applied")
        return found


def settings(streams: int, **more: Any) -> dict[str, Any]:
    known = {"model": "benchmarks.scale.net:build", "cut": "entry", "clients": streams, "epochs": 1}
    return {**known, "schedule": "constant", "warmup": 0.0, **more}


@contextmanager
def running(arms: Sequence[Row], streams: int, folder: Path) -> Iterator[tuple[list[Server], list[Process]]]:
    """A server for each arm, all of whose clients have joined, and the processes that these are in."""
    servers: list[Server] = []
    loads: list[Process] = []
    try:
        for index, arm in enumerate(arms):
            run = settings(streams, **arm.get("settings", {}))
            out = folder / f"{streams}-{index}-{len(os.listdir(folder))}"
            servers.append(Server.start(serve.main, arm["front"], run, out))
            servers[-1].arm = arm
        for server in servers:
            server.ready()
        ports = [server.port for server in servers]
        for index in range(min(LOADS, streams)):
            names = [f"client-{n}" for n in range(index, streams, LOADS)]
            loads.append(Process.start(load.main, ports, names))
        for each in loads:
            each.answer()
        yield servers, loads
    finally:
        for process in [*servers, *loads]:
            process.end()


def join_all(servers: Sequence[Server], loads: Sequence[Process], streams: int) -> Iterator[Row]:
    """A row for each server: how long its clients took to join, and what they cost while they say nothing."""
    for index, server in enumerate(servers):
        time.sleep(0.5)
        before, start = server.resident(), time.monotonic()
        for each in loads:
            each.pipe.send(("join", index))
        for each in loads:
            each.answer()
        seconds = time.monotonic() - start
        time.sleep(1.0)
        cpu, then = server.cpu_s(), time.monotonic()
        time.sleep(2.0)
        yield {
            **server.arm,
            "kind": "idle",
            "streams": streams,
            "join_s": seconds,
            "idle_cores": (server.cpu_s() - cpu) / (time.monotonic() - then),
            "before_bytes": before,
            "idle_bytes": server.resident(),
            "threads": server.threads(),
        }
        for each in loads:
            each.ask("open", index)


def interval(
    server: Server,
    index: int,
    loads: Sequence[Process],
    streams: int,
    samples: int,
    seconds: float,
    least: int = EACH,
) -> Row:
    """What one server does, once it has learned from a batch of each client: in so many seconds, or in those
    that `least` more of each take."""
    server.applied()
    for each in loads:
        each.pipe.send(("go", index, samples))
    applied = _first_of_each(server, streams)
    before = len(applied)
    residents = [server.resident()]
    start, cpu, loads_cpu = time.monotonic(), server.cpu_s(), sum(each.cpu_s() for each in loads)
    while (since := time.monotonic() - start) < seconds or (
        len(applied) - before < least * streams and since < LONGEST_S
    ):
        time.sleep(0.25)
        residents.append(server.resident())
        applied += server.applied()
    end, cpu = time.monotonic(), server.cpu_s() - cpu
    loads_cpu = sum(each.cpu_s() for each in loads) - loads_cpu
    for each in loads:
        each.pipe.send(("stop",))
    sent = {(client, number): at for each in loads for client, number, at in each.answer()}
    applied = _drained(server, len(sent), applied)
    inside = [(client, number, at) for client, number, at in applied if start <= at < end]
    batches, size = len(inside), samples * SAMPLE_BYTES
    each_ = Counter(client for client, _, _ in inside)
    counts = [each_[client] for client in range(streams)]
    times = sorted(at - sent[client, number] for client, number, at in inside)
    gigabytes = batches * size / 1e9
    return {
        **server.arm,
        "kind": "load",
        "streams": streams,
        "batch_bytes": size,
        "seconds": end - start,
        "batches": batches,
        "samples_s": batches * samples / (end - start),
        "bytes_s": batches * size / (end - start),
        "p50_s": _quantile(times, 0.50),
        "p99_s": _quantile(times, 0.99),
        "cpu_s_gb": cpu / gigabytes if batches else None,
        "cpu_s_batch": cpu / batches if batches else None,
        "cores": cpu / (end - start),
        "loads_cores": loads_cpu / (end - start),
        "fairness": min(counts) / max(counts) if batches else 0.0,
        "least": min(counts),
        "resident_bytes": max(residents),
        "resident_first_bytes": statistics.median(residents[: len(residents) // 2]),
        "resident_last_bytes": statistics.median(residents[len(residents) // 2 :]),
        "threads": server.threads(),
    }


def _first_of_each(server: Server, streams: int) -> list[Applied]:
    """What was learned from until there was a batch of each client, or for too long."""
    applied, until = server.applied(), time.monotonic() + WARMUP_S
    while len({client for client, _, _ in applied}) < streams and time.monotonic() < until:
        time.sleep(0.05)
        applied += server.applied()
    return applied


def _drained(server: Server, sent: int, applied: list[Applied]) -> list[Applied]:
    """All that was sent, once it is applied; of which this was before."""
    until = time.monotonic() + DRAIN_S
    applied = applied + server.applied()
    while len(applied) < sent and time.monotonic() < until:
        time.sleep(0.1)
        applied += server.applied()
    if len(applied) != sent:
        raise SystemExit(
            f"{server.arm}: {sent} batches were sent, {len(applied)} learned from {DRAIN_S} s later"
        )
    return applied


def _quantile(ordered: Sequence[float], fraction: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else None


def _status(pid: int, name: str) -> int:
    """A line of /proc/PID/status, in bytes."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
