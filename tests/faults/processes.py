"""The real programs as one federation, to be killed and started again; and what holds at its end."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import equal

from common.checkpoint import Checkpoints
from common.errors import ConfigError
from dsl_lab.launch import program

SAMPLES, EPOCHS = 240, 3
RUN = [
    *("--model", "resnet8", "--split", "1", "--batch-size", "10", "--epochs", EPOCHS),
    *("--train-limit", SAMPLES, "--test-limit", 40, "--lr", 0.02),
    *("--checkpoint-every", 0.1, "--lease", 30, "--deterministic"),
]
DEADLINE_S = 100.0  # for what takes seconds, on a machine with other work
Process = subprocess.Popen[str]


class Federation:
    """The processes of one run, and where their things are.

    address: where the server listens; without one, at a port of its choice on loopback.
    """

    def __init__(self, folder: Path, *flags: object, address: str = "") -> None:
        self.folder, self._flags, self.address = folder, flags, address
        self.processes: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def out(self) -> Path:
        return self.folder / "server"

    def start(self, name: str, *flags: object, within: Sequence[str] = ()) -> Process:
        """within: a command that starts it, as `ip netns exec`."""
        self.processes.append(
            subprocess.Popen(
                [*within, program(name), *map(str, flags)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self.processes[-1]

    def serve(self, resume: bool = False, heard: bool = True, within: Sequence[str] = ()) -> Process:
        """heard: its greeting has been read, so it listens; and its address is known."""
        where = ["--listen", self.address or "127.0.0.1:0"]
        flags = ["--resume", self.out] if resume else ["--out", self.out, *RUN, *self._flags]
        server = self.start("dsl-server", *where, *flags, within=within)
        if heard:
            assert server.stdout is not None
            greeting = server.stdout.readline()
            found = re.search(r"--server \S+:(\d+)", greeting)
            assert found, greeting
            self.address = self.address or f"127.0.0.1:{found[1]}"
        return server

    def join(self, index: int, *flags: object, server: str = "", within: Sequence[str] = ()) -> Process:
        where = ["--server", server or self.address, "--state", self.folder / f"state-{index}"]
        return self.start("dsl-client", *where, "--name", f"client-{index}", *flags, within=within)

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
