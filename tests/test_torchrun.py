"""The programs themselves, under torchrun: a rank is killed, all begin anew by the same command, nothing
counts twice."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsl_lab.launch import program
from tests.ranks import loaded

END_S = 100.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SMALL = ["--model", "resnet8", "--split", "1", "--train-limit", "600", "--test-limit", "50", "--clients", "2"]
Start = Callable[[list[str], Path], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(words, log) is a process, its words in a file; all are gone at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(words: list[str], log: Path) -> subprocess.Popen[str]:
        with log.open("w") as said:
            running.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        return running[-1]

    yield run
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(n: int) -> int:
    """The first of so many ports that follow each other."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for more in range(1, n):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port + more))
            return port


def workers(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Rank to process."""
    found = {}
    for task in Path(f"/proc/{torchrun.pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{child}/environ").read_text()
                if match := re.search(r"(?:^|\0)RANK=(\d+)\0", environment):
                    found[int(match[1])] = child
    return found


def wait_until(condition: Callable[[], object], said: Callable[[], str]) -> None:
    end = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.1)


def ended(start: Start, folder: Path, *flags: str, kill: int | None = None) -> str:
    """What a server of two ranks says, and its folder `run` then has, of a run of six epochs with two
    clients, of which this rank is killed once there are checkpoints."""
    folder.mkdir()
    port, out = free_ports(2), folder / "run"
    server = start(
        [
            *TORCHRUN,
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_ports(1)),
            "--max-restarts",
            "1",
            "-m",
            "dsl_server",
            *SMALL,
            "--epochs",
            "6",
            "--checkpoint-every",
            "0.5",
            "--listen",
            f"127.0.0.1:{port}",
            "--resume",
            str(out),
            *flags,
        ],
        folder / "server.log",
    )
    clients = []
    for client in range(2):
        words = ["--server", f"127.0.0.1:{port}", "--patience", "60", "--name", f"c{client}"]
        words = [program("dsl-client"), *words, "--out", str(folder / f"c{client}")]
        clients.append(start(words, folder / f"client-{client}.log"))

    def said() -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in folder.glob("*.log"))

    if kill is not None:
        metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
        wait_until(lambda: metrics.exists() and len(list(checkpoints.glob("0*"))) > 1, said)
        os.kill(workers(server)[kill], signal.SIGKILL)
    wait_until(lambda: all(process.poll() is not None for process in [server, *clients]), said)
    assert [process.returncode for process in [server, *clients]] == [0, 0, 0], said()
    return (folder / "server.log").read_text()


def assert_counted_once(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples_trained"] == 6 * 600
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [*range(1, 7)]


def test_a_rank_is_killed_and_nothing_counts_twice(start: Start, tmp_path: Path) -> None:
    log = ended(start, tmp_path / "killed", "--deterministic", kill=1)
    assert re.search(r"dsl-server: error: rank 1 was lost in tick \d+: ", log), log
    out = tmp_path / "killed/run"
    assert_counted_once(out)
    for name in ("audit.jsonl", "audit-1.jsonl"):
        events = [json.loads(line) for line in (out / name).read_text().splitlines()]
        met = [
            (event["event"], event["name"]) for event in events if event["event"] in ("joined", "came back")
        ]
        assert [event for event, _ in met] == ["joined", "came back"]
        assert met[0][1] == met[1][1], "each has its rank again"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--deterministic"], ["--deterministic", "--fsdp"]], ids=" ".join)
def test_the_weights_are_those_of_a_run_that_nothing_befell(
    start: Start, tmp_path: Path, flags: list[str]
) -> None:
    ended(start, tmp_path / "whole", *flags)
    ended(start, tmp_path / "killed", *flags, kill=0)
    assert_counted_once(tmp_path / "killed/run")
    whole, killed = (loaded(tmp_path / of / "run/checkpoint/part.safetensors") for of in ("whole", "killed"))
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "csl"],
        ["--server-sync", "every:4", "--tick-batches", "2"],
        ["--method", "cse-fsl"],
        ["--method", "csl", "--deterministic"],
        ["--fsdp", "--tick-batches", "2"],
    ],
    ids=" ".join,
)
def test_a_rank_is_killed_whatever_it_was_about(start: Start, tmp_path: Path, flags: list[str]) -> None:
    kill = len(flags) % 2
    log = ended(start, tmp_path / "killed", *flags, kill=kill)
    assert re.search(rf"dsl-server: error: rank {kill} was lost in tick \d+: ", log), log
    summary = json.loads((tmp_path / "killed/run/summary.json").read_text())
    sent = 6 * 600 if "cse-fsl" not in flags else 6 * 2 * 128
    assert summary["samples_trained"] == sent
