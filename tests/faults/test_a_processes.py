"""A: the programs themselves are killed, asked to end and started again. Nothing is lost or done twice."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from common.checkpoint import Checkpoints
from common.errors import ConfigError
from dsl_lab.launch import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]  # most of it is torch's import, by each process

SAMPLES, EPOCHS = 240, 3
RUN = [
    *("--model", "resnet8", "--split", "1", "--batch-size", "10", "--epochs", EPOCHS),
    *("--train-limit", SAMPLES, "--test-limit", 40, "--lr", 0.02),
    *("--checkpoint-every", 0.1, "--lease", 30, "--deterministic"),
]
DEADLINE_S = 100.0  # for what takes seconds, on a machine with other work
Process = subprocess.Popen[str]
Undisturbed = Callable[[str, int], Path]


class Federation:
    """The processes of one run, and where their things are."""

    def __init__(self, folder: Path, *flags: object) -> None:
        self.folder, self._flags = folder, flags
        self.address = ""
        self.processes: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def out(self) -> Path:
        return self.folder / "server"

    def start(self, name: str, *flags: object) -> Process:
        self.processes.append(
            subprocess.Popen(
                [program(name), *map(str, flags)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self.processes[-1]

    def serve(self, resume: bool = False, heard: bool = True) -> Process:
        """heard: its greeting has been read, so it listens; and its address is known."""
        where = ["--listen", self.address or "127.0.0.1:0"]
        flags = ["--resume", self.out] if resume else ["--out", self.out, *RUN, *self._flags]
        server = self.start("dsl-server", *where, *flags)
        if heard:
            assert server.stdout is not None
            greeting = server.stdout.readline()
            found = re.search(r"--server \S+:(\d+)", greeting)
            assert found, greeting
            self.address = f"127.0.0.1:{found[1]}"
        return server

    def join(self, index: int, *flags: object) -> Process:
        where = ["--server", self.address, "--state", self.folder / f"state-{index}"]
        return self.start("dsl-client", *where, "--name", f"client-{index}", *flags)

    def applied(self) -> int:
        """The batches that the newest checkpoint has, of all clients."""
        checkpoints = Checkpoints(self.out / "checkpoints")
        while numbers := checkpoints.numbers():
            try:
                facts = checkpoints.read(numbers[-1]).facts
            except ConfigError:  # it has been removed at this moment
                continue
            return sum(a["applied"]["sequence"] for a in facts["rounds"]["ledger"]["accounts"])
        return 0

    def wait_for(self, batches: int) -> None:
        end = time.monotonic() + DEADLINE_S
        while self.applied() < batches:
            assert time.monotonic() < end
            self.check()
            time.sleep(0.005)

    def check(self) -> None:
        for process in self.processes:
            if process.poll() not in (None, 0, -signal.SIGKILL):
                raise AssertionError(process.communicate()[0])

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(*flags: object) -> Federation:
        made.append(Federation(tmp_path / f"run-{len(made)}", *flags))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a run that nobody disturbs, by method and clients."""

    @functools.cache
    def made(method: str, clients: int) -> Path:
        run = Federation(tmp_path_factory.mktemp(method), "--method", method, "--clients", clients)
        try:
            for process in (run.serve(), *all_join(run, clients)):
                succeeds(process)
        finally:
            run.end()
        return run.folder

    return made


def first_joined(run: Federation, clients: int) -> None:
    """Until so many are members: clients are counted as they come."""
    audit, end = run.out / "audit.jsonl", time.monotonic() + DEADLINE_S
    while clients > (audit.read_text().count('"joined"') if audit.exists() else 0):
        assert time.monotonic() < end
        run.check()
        time.sleep(0.01)


def said(process: Process) -> str:
    return process.communicate(timeout=DEADLINE_S)[0]


def succeeds(process: Process) -> str:
    words = said(process)
    assert process.returncode == 0, words
    assert "Traceback" not in words
    return words


def kill(process: Process) -> None:
    assert process.poll() is None, said(process)
    process.kill()
    process.wait()


def check(run: Federation, before: Path, clients: int) -> None:
    """The oracle: planned batches once each, and at every end the weights of the undisturbed run."""
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["samples_trained"] == EPOCHS * SAMPLES
    accounts, planned = (accounts_of(folder / "server") for folder in (run.folder, before))
    assert accounts == planned, "numbers, samples and the hash over all batches"
    for end in ("server", *(f"state-{index}/out" for index in range(clients))):
        ours, theirs = (
            load_file(folder / end / "checkpoint" / "part.safetensors") for folder in (run.folder, before)
        )
        assert ours.keys() == theirs.keys()
        assert all(equal(ours[name], theirs[name]) for name in ours), f"{end}: not bit for bit"
    left = [path for path in run.folder.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not left


def accounts_of(server: Path) -> list[Any]:
    checkpoints = Checkpoints(server / "checkpoints")
    facts = checkpoints.read(checkpoints.numbers()[-1]).facts
    return [(a["client"], a["left"], a["applied"]) for a in facts["rounds"]["ledger"]["accounts"]]


def all_join(run: Federation, clients: int = 2) -> list[Process]:
    """One after the other: their order is that of the run."""
    started = []
    for index in range(clients):
        first_joined(run, index)
        started.append(run.join(index))
    return started


def test_a1_e6_b4_a_server_that_is_frozen_then_killed_is_replaced_by_another_and_no_bit_differs(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    server = run.serve()
    clients = all_join(run)
    run.wait_for(10)
    server.send_signal(signal.SIGSTOP)
    second = run.serve(resume=True, heard=False)
    assert "another process goes on with it; stop that one" in said(second)
    assert second.returncode == 2
    run.processes.remove(second)
    server.send_signal(signal.SIGCONT)
    kill(server)
    server = run.serve(resume=True)
    for process in (server, *clients):
        succeeds(process)
    check(run, undisturbed("dsl", 2), 2)


def test_a3_a4_a_client_killed_and_started_again_from_its_folder_does_only_what_is_left(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    server = run.serve()
    first, second = all_join(run)
    run.wait_for(8)
    kill(second)
    spool = run.folder / "state-1" / "spool"
    (spool / ".000000000999.tmp").write_bytes(b"torn")  # as it is when it dies while it writes
    kept = {path.name: path.read_bytes() for path in spool.iterdir() if not path.name.startswith(".")}
    second = run.join(1)
    for process in (server, first, second):
        succeeds(process)
    assert kept, "of what it had sent"
    check(run, undisturbed("dsl", 2), 2)


@pytest.mark.parametrize("at", [20, 45])
def test_a3_a7_a_client_of_csl_killed_in_a_step_goes_on_where_the_server_is(
    at: int, federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server = run.serve()
    client = run.join(0)
    run.wait_for(at)
    kill(client)
    client = run.join(0)
    for process in (server, client):
        succeeds(process)
    check(run, undisturbed("csl", 1), 1)


@pytest.mark.parametrize("server_first", [True, False], ids=["server first", "clients first"])
def test_a6_all_are_killed_at_once_and_started_again_in_either_order(
    server_first: bool, federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    everyone = [run.serve(), *all_join(run)]
    run.wait_for(20)
    for process in everyone:
        kill(process)
    server = run.serve(resume=True) if server_first else None
    clients = [run.join(index) for index in range(2)]
    server = server or run.serve(resume=True)
    for process in (server, *clients):
        succeeds(process)
    check(run, undisturbed("dsl", 2), 2)


def test_a10_a11_server_and_client_that_are_asked_to_end_do_so_and_another_goes_on(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server, client = run.serve(), run.join(0)
    run.wait_for(16)
    client.send_signal(signal.SIGTERM)
    words = said(client)
    assert client.returncode == 128 + signal.SIGTERM, words
    assert "stopped (SIGTERM)" in words
    run.processes.remove(client)
    assert server.poll() is None
    assert '"lost"' not in (run.out / "audit.jsonl").read_text(), "it has its place"
    client = run.join(0)
    run.wait_for(40)
    server.send_signal(signal.SIGTERM)
    words = succeeds(server)
    assert f"drained: go on with --resume {run.out}" in words
    server = run.serve(resume=True)
    for process in (server, client):
        succeeds(process)
    check(run, undisturbed("csl", 1), 1)


def test_a10_a_second_signal_ends_a_server_at_once(federation: Callable[..., Federation]) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server, client = run.serve(), run.join(0)
    run.wait_for(1)
    client.send_signal(signal.SIGSTOP)  # so that there is something to wait for
    server.send_signal(signal.SIGTERM)
    end = time.monotonic() + DEADLINE_S
    while catches(server, signal.SIGTERM):  # until it has heard the first one
        assert time.monotonic() < end
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    words = said(server)
    assert server.returncode in (-signal.SIGTERM, 0), words  # 0: it was done already
    run.processes.remove(server)


def catches(process: Process, number: int) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    found = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


# ---------------------------------------------------------------- E11: whoever writes checkpoints is killed


WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from common.checkpoint import Checkpoints, Saved
torch.set_num_threads(1)
dice, checkpoints = random.Random(0), Checkpoints(Path(sys.argv[1]))
tensors = {f"t{i}": torch.randn(1000) for i in range(100)}
for _ in range(25):
    child = os.fork()
    if not child:
        number = max(checkpoints.numbers(), default=0)
        while True:
            number += 1
            checkpoints.write(Saved(number, tensors, {"number": number}))
            checkpoints.drop(keep=lambda known: known > number - 3)
    time.sleep(dice.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for number in checkpoints.numbers():
        assert checkpoints.read(number).facts == {"number": number}
print("whole:", len(checkpoints.numbers()))
"""


def test_e11_of_25_writers_that_are_killed_none_leaves_what_cannot_be_read(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split("whole:")[1]) >= 1
