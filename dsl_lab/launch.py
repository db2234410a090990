"""A whole federation: one server, a process of this machine, and its clients, each a process of its own.

Where the clients run an engine says: here, or (`engines.py`) elsewhere.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from common.errors import ConfigError, SplitLearningError
from dsl_lab.link import Link

Setting = str | int | float | bool | Sequence[str]
LOOPBACK = "127.0.0.1"
END_S = 15.0  # for the other processes, once one has ended the run
POLL_S = 0.1


class LaunchError(SplitLearningError):
    """A process of the experiment failed; the message has its last words."""


class Process(Protocol):
    """A program under way: a process of this machine, or what stands for one of another."""

    def poll(self) -> int | None: ...  # its exit code, once it has ended

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Command:
    """What is to be started.

    line: as a person would type it. out: the folder that it writes, which stands there after --out.
    log: a file for all that it says. environment: beside that of wherever it runs. core: if held to one of
    this machine.
    """

    line: Sequence[str]
    out: Path
    log: Path
    environment: Mapping[str, str]
    core: int | None = None


class Engine(Protocol):
    """Where clients run. host: the address of this machine by which they reach the server."""

    @property
    def host(self) -> str: ...

    def room(self, clients: int, on_wait: Callable[[], None]) -> AbstractContextManager[object]:
        """While it is open so many clients can run at once. Raises ConfigError where they cannot."""

    def start(self, command: Command) -> Process:
        """A client. Once it has ended, its folder and its log are where the command says, on this machine."""


class Local:
    """Each client a process of this machine, beside the server."""

    host = LOOPBACK

    def room(self, clients: int, on_wait: Callable[[], None]) -> AbstractContextManager[object]:
        return nullcontext()

    def start(self, command: Command) -> Process:
        return start(command)


LOCAL = Local()


@dataclass(frozen=True)
class Experiment:
    """settings: the run's, by name. cores: those of the server, then of each client, if held.

    device: where each of them computes. host: this machine's address, to the clients.
    link: given the server's port, the slow link by which all clients reach it.
    also: further flags of each client. in_order: clients join one after the other, so each has its number.
    processes: the clients are divided over so many (dsl-client --replicas), with `workers` of each process
    computing at a time, and `also` of each process; 0: each client is a process of its own.
    """

    settings: Mapping[str, Setting]
    out: Path
    threads: int = 1
    cores: Sequence[int] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    link: Callable[[int], Link] | None = None
    device: str = "auto"
    also: Sequence[Sequence[str]] = ()
    in_order: bool = False
    host: str = LOOPBACK
    processes: int = 0
    workers: int = 1

    @property
    def clients(self) -> int:
        clients = self.settings.get("clients", 1)
        assert isinstance(clients, int), "a whole number, like --clients"
        return clients

    @property
    def server_folder(self) -> Path:
        return self.out / "server"

    def commands(self, port: int, door: int) -> list[list[str]]:
        """The server's command line, then each client's, which goes to the port `door`: the very ones
        that are run."""
        server = ["dsl-server", "--listen", f"{self.host}:{port}", "--out", str(self.server_folder)]
        for name, value in self.settings.items():
            server += _flag(name, value)
        shared = [self._shared(door, number) for number in range(self.processes)]
        clients = shared or [self._alone(door, number) for number in range(self.clients)]
        where = [] if self.device == "auto" else ["--device", self.device]
        open_to_all = [] if self.host == LOOPBACK else ["--insecure"]
        return [[*command, *where, *open_to_all] for command in (server, *clients)]

    def command(self, index: int, line: Sequence[str]) -> Command:
        """The server's, which is 0, or a client's."""
        return Command(
            line,
            self.out / f"client-{index - 1}" if index else self.server_folder,
            self.log(index),
            {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE", **self.environment},
            self.cores[index] if self.cores else None,
        )

    def log(self, index: int) -> Path:
        """The server's, which is 0, or a client's."""
        return self.out / (f"client-{index - 1}.log" if index else "server.log")

    def _alone(self, door: int, number: int) -> list[str]:
        """The command line of a client that has a process to itself."""
        name = f"client-{number}"
        where = ["--server", f"{self.host}:{door}", "--name", name, "--out", str(self.out / name)]
        return ["dsl-client", *where, *(self.also[number] if self.also else ())]

    def _shared(self, door: int, number: int) -> list[str]:
        """The command line of a process of several clients."""
        count = self.clients // self.processes + (number < self.clients % self.processes)
        name = f"clients-{number}"
        where = ["--server", f"{self.host}:{door}", "--name", name, "--out", str(self.out / name)]
        many = ["--replicas", str(count), "--workers", str(min(self.workers, count))]
        return ["dsl-client", *where, *many, *(self.also[number] if self.also else ())]


def launch(
    experiment: Experiment, on_wait: Callable[[], None] = lambda: None, engine: Engine = LOCAL
) -> list[list[str]]:
    """Runs it to its end; the commands that it was. Raises LaunchError if a process fails, ConfigError where
    the engine has no room for the clients."""
    experiment = replace(experiment, host=engine.host)
    with ExitStack() as stack:
        stack.enter_context(engine.room(experiment.clients, on_wait))
        port = _free_port(engine.host)
        link = stack.enter_context(experiment.link(port)) if experiment.link else None
        commands = experiment.commands(port, link.port if link else port)
        _run(experiment, commands, on_wait, engine)
        return commands


def _run(
    experiment: Experiment, lines: Sequence[Sequence[str]], on_wait: Callable[[], None], engine: Engine
) -> None:
    experiment.out.mkdir(parents=True, exist_ok=True)
    processes: list[Process] = []
    try:
        for index, line in enumerate(lines):
            while experiment.in_order and index > 1 and _joined(experiment) < index - 1:
                _check(experiment, processes)
                on_wait()
                time.sleep(POLL_S)
            command = experiment.command(index, line)
            processes.append(engine.start(command) if index else start(command))
        while any(process.poll() is None for process in processes):
            _check(experiment, processes)
            on_wait()
            time.sleep(POLL_S)
        _check(experiment, processes)
    finally:
        _end(processes)


def program(name: str) -> str:
    """The path of one of our programs, beside the interpreter or on the PATH. Raises ConfigError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; run pip install -e . first")
    return found


def start(command: Command) -> subprocess.Popen[bytes]:
    """As a process of this machine."""
    pin = [] if command.core is None else ["taskset", "-c", str(command.core)]
    with command.log.open("wb") as log:
        return subprocess.Popen(
            [*pin, program(command.line[0]), *command.line[1:]],
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _joined(experiment: Experiment) -> int:
    """How many clients the server has taken in."""
    audit = experiment.server_folder / "audit.jsonl"
    return audit.read_text().count('"event": "joined"') if audit.exists() else 0


def _check(experiment: Experiment, processes: Sequence[Process]) -> None:
    failed = [index for index, process in enumerate(processes) if process.poll() not in (None, 0)]
    if failed:
        _wait(processes, END_S)  # whoever knows why says so last
        words = [_last_words(experiment, index) for index in failed]
        raise LaunchError(f"{'; '.join(words)} (logs in {experiment.out})")


def _last_words(experiment: Experiment, index: int) -> str:
    lines = experiment.log(index).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"process {index} ended without a word"


def _end(processes: Sequence[Process]) -> None:
    """Whatever is still running is asked to stop, then made to."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes, END_S)
    for process in processes:
        if process.poll() is None:
            process.kill()
    _wait(processes, END_S)


def _wait(processes: Sequence[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _flag(name: str, value: Setting) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if not isinstance(value, str | int | float):
        return [f"--{flag}", *value]
    return [f"--{flag}", str(value)]


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port
