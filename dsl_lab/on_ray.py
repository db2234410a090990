"""Clients as tasks of a Ray cluster (the extra `ray`). The only module that knows Ray.

A task starts dsl-client as a process, on whatever machine of the cluster it has been given, waits for it, and
gives back its exit code, its log and its folder. Room for all clients of a run is taken at once, before any
starts: they train together, so one that waited for another's place would wait for ever.
"""

import io
import os
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.errors import ConfigError
from dsl_lab.engines import Where
from dsl_lab.launch import END_S, LOOPBACK, POLL_S, Command, Process, program

ANSWER_S = 5.0  # for a cluster to take a connection
ROOM_S = 60.0  # for room that other work of the cluster has
_UNIT = 10_000  # of a core or a GPU: Ray counts in these parts

Ended = tuple[int, bytes, bytes]  # exit code, log, and the folder as a tar archive


@contextmanager
def cluster(address: str | None, where: Where) -> Iterator["Tasks"]:
    """Joined for as long as this is open; without an address it is begun, and ended. Raises ConfigError."""
    settings: dict[str, Any] = {
        "address": address or "local",
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    with ExitStack() as stack:
        if address:
            _check_answers(address)
        else:
            folder = tempfile.TemporaryDirectory(
                prefix="ray-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
            )
            settings |= {"include_dashboard": False, "_temp_dir": stack.enter_context(folder)}
        stack.callback(_shutdown)
        try:
            with _undisturbed():
                ray.init(**settings)
            tasks = Tasks(where, ray.nodes(), ray.util.get_node_ip_address())
        except ConfigError:
            raise
        except Exception as error:  # Ray's own, of many kinds
            raise ConfigError(
                f"--engine ray: no cluster at {settings['address']}: {_first(error)}"
            ) from error
        yield tasks


class Tasks:
    """The engine. nodes: as Ray tells of them. here: this machine's address among theirs.

    Raises ConfigError where clients would run on other machines and nobody has said --insecure.
    """

    def __init__(self, where: Where, nodes: Sequence[Mapping[str, Any]], here: str) -> None:
        self._nodes = [node for node in nodes if node["Alive"]]
        self._needs = {"CPU": where.client_cpus} | ({"GPU": where.client_gpus} if where.client_gpus else {})
        self._places: Iterator[PlacementGroupSchedulingStrategy] = iter(())
        others = sorted({node["NodeManagerAddress"] for node in self._nodes} - {here})
        if others and not where.insecure:
            some = f"{', '.join(others[:3])}{' ...' if others[3:] else ''}"
            raise ConfigError(
                f"--engine ray: clients would run on {some}, and nothing on the way is encrypted; on a "
                "private network say --insecure"
            )
        self.host = here if others else LOOPBACK

    @contextmanager
    def room(self, clients: int, on_wait: Callable[[], None]) -> Iterator[None]:
        self._check_size(clients)
        with _undisturbed():
            group = placement_group([self._needs] * clients, strategy="SPREAD")
        try:
            deadline = time.monotonic() + ROOM_S
            while not self._is_there(group):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"--engine ray: for {ROOM_S:.0f} s other work has had what {clients} clients need at "
                        "once; wait for it, or start more nodes"
                    )
                on_wait()
            self._places = (PlacementGroupSchedulingStrategy(group, index) for index in range(clients))
            yield
        finally:
            with _undisturbed():
                remove_placement_group(group)

    def start(self, command: Command) -> Process:
        with _undisturbed():
            run = ray.remote(
                num_cpus=self._needs["CPU"],
                num_gpus=self._needs.get("GPU", 0),
                max_retries=0,  # who starts a client again is another client to the server
                scheduling_strategy=next(self._places),
            )(_run)
            return _Client(run.remote(command.line, command.environment), command)

    def _check_size(self, clients: int) -> None:
        fit = sum(self._fit(node["Resources"]) for node in self._nodes)
        if fit < clients:
            each = " and ".join(f"{count:g} {kind}" for kind, count in self._needs.items())
            has = " and ".join(f"{self._sum(kind):g} {kind}" for kind in self._needs)
            nodes = f"{len(self._nodes)} node{'s' if len(self._nodes) > 1 else ''}"
            raise ConfigError(
                f"--engine ray: {clients} clients train at once, of {each} each, and the cluster has room "
                f"for {fit} ({nodes} with {has}): say a smaller --client-cpus, fewer clients, or start more "
                "nodes"
            )

    def _fit(self, resources: Mapping[str, float]) -> int:
        """How many clients a node can hold."""
        return min(
            round(resources.get(kind, 0.0) * _UNIT) // max(1, round(count * _UNIT))
            for kind, count in self._needs.items()
        )

    def _sum(self, kind: str) -> float:
        return sum(float(node["Resources"].get(kind, 0.0)) for node in self._nodes)

    @staticmethod
    def _is_there(group: Any) -> bool:
        with _undisturbed():
            return bool(group.wait(timeout_seconds=POLL_S))


class _Client:
    """A task, as a process. When it has ended, what it left is put where the command says."""

    def __init__(self, task: Any, command: Command) -> None:
        self._task, self._command = task, command
        self._code: int | None = None

    def poll(self) -> int | None:
        with _undisturbed():
            if self._code is None and ray.wait([self._task], timeout=0)[0]:
                self._code = self._taken()
        return self._code

    def terminate(self) -> None:
        with _undisturbed():
            ray.cancel(self._task)

    def kill(self) -> None:
        with _undisturbed():
            ray.cancel(self._task, force=True)

    def _taken(self) -> int:
        try:
            code, log, files = ray.get(self._task)
        except ray.exceptions.RayError as error:
            self._command.log.write_text(f"{self._command.line[0]}, a task of Ray: {_first(error)}\n")
            return 1
        self._command.log.write_bytes(log)
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(self._command.out.parent, filter="data")
        return int(code)


def _run(line: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """The task. Ray ends it by a KeyboardInterrupt, which ends the client in order."""
    with tempfile.TemporaryDirectory(prefix="dsl-client-") as name:
        place = line.index("--out") + 1
        out, log = Path(name) / Path(line[place]).name, Path(name) / "log"
        with log.open("wb") as words:
            process = subprocess.Popen(
                [program(line[0]), *line[1:place], str(out), *line[place + 1 :]],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
            )
        try:
            with suppress(KeyboardInterrupt):
                while process.poll() is None:
                    time.sleep(POLL_S)
        finally:
            code = _ended(process)
        return code, log.read_bytes(), _packed(out)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; if it is still running it is asked to stop, then made to."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _packed(folder: Path) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        if folder.exists():
            files.add(folder, folder.name)
    return archive.getvalue()


def _check_answers(address: str) -> None:
    """Ray itself would try for more than a minute, with many words. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return  # which Ray looks for on this machine
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: no cluster there ({error}); give what ray start --head has said"
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A signal that comes while Ray is at work is handled after it: what a handler raises there is lost.
    And the handler that Ray sets is taken back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _shutdown() -> None:
    with _undisturbed():
        ray.shutdown()


def _first(error: Exception) -> str:
    """A line of what Ray says: of a task that failed the last one, which is what failed in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
