"""Does every batch count exactly once, whatever happens to the processes?

A run that lasts, of real processes, and a random fault every few seconds: the server or a client killed or
asked to end, and started again; stopped for a while (SIGSTOP); the server and clients killed at once. When
all is trained the count must be exact, nothing may be left over, and memory must not have grown.

The plan is finite, so epochs are chosen by a short run without faults before; faults go on until the clients
have finished, or for --minutes. The exit code is 1 if anything is not as it must be.

    python benchmarks/soak/main.py [--minutes 10] [--every 20] [--clients 8] [--method dsl] [--seed 0]
"""

import argparse
import json
import math
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from common.checkpoint import Checkpoints
from dsl_client.batches import partition
from dsl_lab.launch import Experiment, Setting, launch, program

IMAGES, TEST_IMAGES, SIDE, BATCH = 36, 8, 16, 8  # images: of each client, so that its last batch is short
PROBE_EPOCHS = 20
SHARE = 0.5  # of the rate without faults that is counted on with them
END_S = 300.0  # for the rest, once there are no more faults
WARM_S = 60.0  # of a process, in which it grows in any case
WRONG = re.compile(r"Traceback|UNKNOWN|INTERNAL|StatusCode")
HAS_LEFT = "has left: it has trained to the end"


@dataclass
class Sample:
    """Of one process, at a time since it was started."""

    seconds: float
    resident: int
    descriptors: int


@dataclass
class Life:
    """One process from its start to its end."""

    name: str
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def look(self) -> None:
        place = Path(f"/proc/{self.process.pid}")
        try:
            pages = int((place / "statm").read_text().split()[1])
            descriptors = len(os.listdir(place / "fd"))
        except (OSError, IndexError):
            return  # it has just ended
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        if resident:
            self.samples.append(Sample(time.monotonic() - self.started, resident, descriptors))

    @property
    def seconds(self) -> float:
        return self.samples[-1].seconds if self.samples else 0.0


class Program:
    """The server or a client, and its incarnations. again: the command that goes on with it."""

    def __init__(self, name: str, command: Sequence[str], again: Sequence[str], log: Path) -> None:
        self.name, self._command, self._again, self.log = name, command, again, log
        self.lives: list[Life] = []
        self.stopped = False  # by SIGSTOP

    def start(self) -> None:
        first, *rest = self._again if self.lives else self._command
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [program(first), *rest], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.lives.append(Life(self.name, process))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.lives[-1].process

    @property
    def done(self) -> bool:
        """Whether it has come to its end by itself, and well."""
        code = self.process.poll()
        if code is None:
            return False
        text = self.log.read_text(errors="replace").rstrip()
        last = text.rsplit("\n", 1)[-1]
        return (code == 0 and "finished" in last) or (code == 77 and HAS_LEFT in last)

    def signal(self, number: signal.Signals) -> bool:
        """Whether it was still there to get it."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(number)
        return True

    def end(self) -> None:
        """It is not to live on, whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class SoakError(Exception):
    """Something is not as it must be."""


class Soak:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._random = random.Random(options.seed)
        experiment = Experiment(self.settings(options.epochs), folder)
        port = free_port()
        commands = experiment.commands(port, port)
        again = ["dsl-server", "--listen", f"127.0.0.1:{port}", "--resume", str(experiment.server_folder)]
        self.server = Program("server", commands[0], again, folder / "server.log")
        self.clients = []
        for index, command in enumerate(commands[1:]):
            lasting = [*command, "--state", str(folder / f"state-{index}"), "--patience", "180"]
            name = f"client-{index}"
            self.clients.append(Program(name, lasting, lasting, folder / f"{name}.log"))
        self.everyone = [self.server, *self.clients]
        self.faults = Counter[str]()
        self._over = threading.Event()

    def settings(self, epochs: int) -> dict[str, Setting]:
        options = self._options
        return {
            "method": options.method,
            "clients": options.clients,
            "model": "resnet8",
            "split": "1",
            "data": f"npz:{options.file}",
            "image": [str(side) for side in (3, SIDE, SIDE)],
            "batch_size": BATCH,
            "augment": False,
            "epochs": epochs,
            "eval_every": 20,
            "sync": options.sync,
            "sync_every": 20,
            "lr": 0.01,
            "seed": options.seed,
            "checkpoint_every": options.checkpoint_every,
            "spool": "64MB",
            "lease": 300.0,
        }

    def run(self) -> float:
        """The whole of it; the seconds that it took. Raises SoakError."""
        start = time.monotonic()
        watching = threading.Thread(target=self._watch, daemon=True)
        try:
            for each in self.everyone:
                each.start()
            watching.start()
            self._until(self._all_joined, 120.0, "not every client has joined")
            end = start + 60 * self._options.minutes
            while time.monotonic() < end and not self._finished():
                if self._pause(self._options.every):
                    self._disturb()
            self._until(self._finished, END_S, f"not finished {END_S:g} s after the last fault")
        finally:
            self._over.set()
            for each in self.everyone:
                if each.lives:
                    each.end()
        return time.monotonic() - start

    # ------------------------------------------------------------ faults

    def _disturb(self) -> None:
        kinds: list[Callable[[], str]] = [
            lambda: self._bounce([self.server], signal.SIGKILL),
            lambda: self._bounce([self.server], signal.SIGTERM),
            lambda: self._bounce(self._some(1), signal.SIGKILL),
            lambda: self._bounce(self._some(1), signal.SIGTERM),
            lambda: self._freeze(self.server),
            lambda: self._freeze(self._random.choice(self.clients)),
            lambda: self._bounce([self.server, *self._some(3)], signal.SIGKILL),
        ]
        what = self._random.choice(kinds)()
        self.faults[what] += 1

    def _some(self, most: int) -> list[Program]:
        spared = [client for client in self.clients if client.name not in self._options.spare]
        return self._random.sample(spared, min(len(spared), self._random.randint(1, most)))

    def _bounce(self, programs: Sequence[Program], number: signal.Signals) -> str:
        """Ends them, and starts them again a moment later, in any order."""
        what = "both" if len(programs) > 1 else "server" if programs[0] is self.server else "client"
        hit = [each for each in programs if each.name not in self._options.spare and each.signal(number)]
        self._say(f"{number.name} {', '.join(each.name for each in hit)}")
        for each in hit:
            code = each.process.wait(60)
            good = {-number} if number == signal.SIGKILL else {-number, 0, 128 + number}
            if code not in good and not each.done:
                raise SoakError(f"{each.name} ended with {code} after {number.name}: {each.log}")
        self._random.shuffle(hit)
        for each in hit:
            self._over.wait(self._random.uniform(0, 3))
            if not each.done:
                each.start()
        return f"{number.name} {what}"

    def _freeze(self, each: Program) -> str:
        seconds = self._random.uniform(1, 15)
        self._say(f"SIGSTOP {each.name} for {seconds:.1f} s")
        each.stopped = True
        if each.signal(signal.SIGSTOP):
            self._over.wait(seconds)
            each.signal(signal.SIGCONT)
        each.stopped = False
        return f"SIGSTOP {'server' if each is self.server else 'client'}"

    # ------------------------------------------------------------ what is so

    def _all_joined(self) -> bool:
        return all(f" of {len(self.clients)} at " in client.log.read_text() for client in self.clients)

    def _finished(self) -> bool:
        return all(each.done for each in self.everyone)

    def _pause(self, seconds: float) -> bool:
        """Whether the run goes on after so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check()
            if self._finished():
                return False
            time.sleep(0.2)
        return True

    def _until(self, so: Callable[[], bool], seconds: float, otherwise: str) -> None:
        end = time.monotonic() + seconds
        while not so():
            self._check()
            if time.monotonic() > end:
                raise SoakError(otherwise)
            time.sleep(0.2)

    def _check(self) -> None:
        for each in self.everyone:
            if each.process.poll() is not None and not each.done:
                words = each.log.read_text(errors="replace").strip().splitlines()[-1:]
                raise SoakError(f"{each.name} ended with {each.process.returncode}: {' '.join(words)}")

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            for each in self.everyone:
                if each.process.poll() is None and not each.stopped:
                    each.lives[-1].look()

    def _say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------ what it came to

    def wrongs(self) -> list[str]:
        """All that is not as it must be, at the end."""
        options, server = self._options, self._folder / "server"
        shares = partition(torch.zeros(options.clients * IMAGES), "iid", options.clients, options.seed)
        plan = [(options.epochs * math.ceil(len(s) / BATCH), options.epochs * len(s)) for s in shares]
        checkpoints = Checkpoints(server / "checkpoints")
        found: list[str] = []
        saved = next(checkpoints.newest(found.append), None)
        if saved is None:
            return [*found, "there is no checkpoint that can be read"]
        accounts = saved.facts["rounds"]["ledger"]["accounts"]
        if len(accounts) != options.clients:
            found.append(f"the ledger has {len(accounts)} clients")
        by_name = {account["name"]: account for account in accounts}
        for name in (client.name for client in self.clients):
            account = by_name.get(name)
            if account is None:
                found.append(f"the ledger has no {name}")
                continue
            applied = account["applied"]
            batches, samples = plan[account["client"]]
            if (applied["sequence"], applied["samples"]) != (batches, samples):
                found.append(
                    f"{name}: {applied['sequence']} batches of {applied['samples']} samples were applied; "
                    f"planned were {batches} of {samples}"
                )
            if applied["epochs"] != options.epochs or not account["left"] or account["lost"]:
                found.append(f"{name}: its account is not closed: {account}")
        found += self._wrong_files(server, sum(samples for _, samples in plan))
        return found

    def _wrong_files(self, server: Path, planned: int) -> list[str]:
        found = []
        trained = json.loads((server / "summary.json").read_text())["samples_trained"]
        if trained != planned:
            found.append(f"samples_trained is {trained}; planned were {planned}")
        lines = [json.loads(line)["epoch"] for line in (server / "metrics.jsonl").read_text().splitlines()]
        epochs, every = self._options.epochs, 20
        due = sorted({*range(every, epochs + 1, every), epochs})
        if sorted(lines) != due:
            found.append(f"metrics.jsonl has {len(lines)} lines, {len(due)} were due: {lines}")
        for each in self.everyone:
            for line in each.log.read_text(errors="replace").splitlines():
                if WRONG.search(line):
                    found.append(f"{each.log.name}: {line}")
        found += [f"left over: {path}" for path in self._folder.rglob("*.tmp")]
        return found


def growth(lives: Sequence[Life]) -> list[str]:
    """A line of a table for each process that has lived for long enough, the one that lived longest first."""
    rows = []
    for life in sorted(lives, key=lambda life: -life.seconds):
        samples = [s for s in life.samples if s.seconds >= max(WARM_S, life.seconds / 4)]
        if life.seconds < 2 * WARM_S or len(samples) < 8:
            continue  # too short to say anything
        quarter = len(samples) // 4
        ends = [*samples[:quarter]], [*samples[-quarter:]]
        times = [s.seconds / 3600 for s in samples]
        slope = statistics.linear_regression(times, [s.resident / 1e6 for s in samples]).slope
        of_descriptors = statistics.linear_regression(times, [float(s.descriptors) for s in samples]).slope
        first, last = (statistics.median(s.resident for s in end) / 1e6 for end in ends)
        was, now = (statistics.median(s.descriptors for s in end) for end in ends)
        rows.append(
            f"| {life.name} | {life.seconds:.0f} | {first:.1f} | {last:.1f} | {slope:+.1f} "
            f"| {was:g} | {now:g} | {of_descriptors:+.1f} |"
        )
    return rows


def rate(options: argparse.Namespace) -> float:
    """Epochs a second without faults."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, Path(folder) / "unused")
        launch(Experiment(soak.settings(PROBE_EPOCHS), Path(folder)))
        clients = [Path(folder) / f"client-{index}" / "summary.json" for index in range(options.clients)]
        slowest = max(json.loads(path.read_text())["seconds"]["train"] for path in clients)
        return PROBE_EPOCHS / float(slowest)


def write_images(path: Path, count: int) -> None:
    """Noise: what the images show does not matter here."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", count), ("test", TEST_IMAGES * 8)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(path, **arrays)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def report(options: argparse.Namespace, soak: Soak, seconds: float, wrongs: Sequence[str]) -> None:
    lives = [life for each in soak.everyone for life in each.lives]
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, ")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}; ")
    print(f"{options.method}, sync {options.sync}, ")
    print(f"{options.clients} clients, {options.epochs} epochs, a fault every {options.every:g} s, ")
    print(f"seed {options.seed}, spared: {', '.join(options.spare) or 'nobody'}\n")
    print(f"{seconds:.0f} s, {sum(soak.faults.values())} faults, {len(lives)} processes:")
    print(", ".join(f"{count} x {what}" for what, count in sorted(soak.faults.items())) + "\n")
    heads = ["process", "lived s", "first quarter MB", "last quarter MB", "MB an hour"]
    heads += ["descriptors first", "last", "an hour"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    servers = growth(soak.server.lives)
    clients = growth([life for client in soak.clients for life in client.lives])
    print("\n".join([*servers[:3], *clients[:3]]) + "\n")
    if wrongs:
        print("**Not as it must be:**\n")
        print("\n".join(f"- {wrong}" for wrong in wrongs))
    else:
        print("Exact: every batch and every sample that was planned was learned from once.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, at most")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one fault to the next")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--method", default="dsl")
    parser.add_argument("--sync", default="none", choices=["none", "average"])
    parser.add_argument("--epochs", type=int, default=0, help="0: as many as the minutes should take")
    parser.add_argument("--checkpoint-every", type=float, default=2.0)
    parser.add_argument("--spare", nargs="*", default=["client-0"], help="never killed: server, client-N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where logs and checkpoints stay; else they are removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.file = Path(temporary) / "images.npz"
        write_images(options.file, options.clients * IMAGES)
        if not options.epochs:
            options.epochs = max(PROBE_EPOCHS, round(SHARE * rate(options) * 60 * options.minutes))
        folder = options.out or Path(temporary) / "soak"
        folder.mkdir(parents=True)
        soak = Soak(options, folder)
        seconds, wrongs = 0.0, list[str]()
        start = time.monotonic()
        try:
            soak.run()
            wrongs = soak.wrongs()
        except SoakError as failure:
            wrongs = [str(failure)]
        seconds = time.monotonic() - start
        report(options, soak, seconds, wrongs)
    sys.exit(1 if wrongs else 0)


if __name__ == "__main__":
    main()
