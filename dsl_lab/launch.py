"""A whole federation on this machine: one server and its clients, each a process of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError, SplitLearningError
from dsl_lab.link import Link

Setting = str | int | float | bool | Sequence[str]
END_S = 15.0  # for the other processes, once one has ended the run


class LaunchError(SplitLearningError):
    """A process of the experiment failed; the message has its last words."""


@dataclass(frozen=True)
class Experiment:
    """settings: the run's, by name. cores: those of the server, then of each client, if held.

    device: where each of them computes.
    link: given the server's port, the slow link by which all clients reach it.
    also: further flags of each client. in_order: clients join one after the other, so each has its number.
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
        server = ["dsl-server", "--listen", f"127.0.0.1:{port}", "--out", str(self.server_folder)]
        for name, value in self.settings.items():
            server += _flag(name, value)
        clients = [
            [
                "dsl-client",
                "--server",
                f"127.0.0.1:{door}",
                "--name",
                f"client-{i}",
                "--out",
                str(self.out / f"client-{i}"),
                *(self.also[i] if self.also else ()),
            ]
            for i in range(self.clients)
        ]
        where = [] if self.device == "auto" else ["--device", self.device]
        return [[*command, *where] for command in (server, *clients)]


def launch(experiment: Experiment, on_wait: Callable[[], None] = lambda: None) -> list[list[str]]:
    """Runs it to its end; the commands that it was. Raises LaunchError if a process fails."""
    with ExitStack() as stack:
        port = _free_port()
        link = stack.enter_context(experiment.link(port)) if experiment.link else None
        commands = experiment.commands(port, link.port if link else port)
        _run(experiment, commands, on_wait)
        return commands


def _run(experiment: Experiment, commands: Sequence[Sequence[str]], on_wait: Callable[[], None]) -> None:
    experiment.out.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index, command in enumerate(commands):
            while experiment.in_order and index > 1 and not _has_joined(experiment, index - 2):
                _check(experiment, processes)
                on_wait()
                time.sleep(0.1)
            processes.append(_start(experiment, index, command))
        while any(process.poll() is None for process in processes):
            _check(experiment, processes)
            on_wait()
            time.sleep(0.1)
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


def _start(experiment: Experiment, index: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(experiment.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **threads, **experiment.environment}
    core = experiment.cores[index] if experiment.cores else None
    pin = [] if core is None else ["taskset", "-c", str(core)]
    with _log(experiment, index).open("wb") as log:
        return subprocess.Popen(
            [*pin, program(command[0]), *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _has_joined(experiment: Experiment, client: int) -> bool:
    """It describes the run that it has been told."""
    return (experiment.out / f"client-{client}" / "run.json").exists()


def _check(experiment: Experiment, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    failed = [index for index, process in enumerate(processes) if process.poll() not in (None, 0)]
    if failed:
        _wait(processes, END_S)  # whoever knows why says so last
        words = [_last_words(experiment, index) for index in failed]
        raise LaunchError(f"{'; '.join(words)} (logs in {experiment.out})")


def _last_words(experiment: Experiment, index: int) -> str:
    lines = _log(experiment, index).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"process {index} ended without a word"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whatever is still running is asked to stop, then made to."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    _wait(processes, END_S)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _log(experiment: Experiment, index: int) -> Path:
    return experiment.out / ("server.log" if index == 0 else f"client-{index - 1}.log")


def _flag(name: str, value: Setting) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if not isinstance(value, str | int | float):
        return [f"--{flag}", *value]
    return [f"--{flag}", str(value)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
