"""A server of a run, for Python: the one that `dsl-server` starts."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from common import cli, tls
from common.errors import ClosedError, ConfigError, StaleError
from common.methods import settled
from common.run import Run
from common.rundir import Held, RunFolder, run_of
from dsl.lines import Lines
from dsl.results import Evaluation, Results, read
from dsl_server import server

_POLL_S = 0.1
_log = logging.getLogger("dsl")


class Server:
    """Holds the top of the network and learns from the activations that clients send.

    with dsl.Server(run, "127.0.0.1:0") as server:
        print(server.address)
        results = server.wait()

    The port is bound at once, and served from `start` on, which `with` calls. Arguments are those of
    `dsl-server`: listen, a host:port, port 0 for any; out, the run's folder; certs, that of its certificates;
    device, where it computes; resume, the folder of a run with checkpoints to go on with, in place of `run`.
    threads: of its arithmetic; 0: as torch has it. alone: False where clients are in this process: then its
    peak memory is not its own, and is 0. What befalls it on the way is told to the logger `dsl`.

    Raises ConfigError when the run, the port or the folder cannot be.
    """

    def __init__(
        self,
        run: Run | None = None,
        listen: str = "127.0.0.1:50051",
        *,
        out: str | Path | None = None,
        certs: str | Path | None = None,
        insecure: bool = False,
        device: str = "auto",
        resume: str | Path | None = None,
        threads: int = 0,
        alone: bool = True,
    ) -> None:
        certificates, goes_on = certs and Path(certs), resume is not None
        if run is not None and resume is not None:
            raise ConfigError(f"resume={resume}: that run's settings are those that it has; leave out run")
        tls.check_exposure("--listen", listen, certificates or None, insecure)
        credentials = tls.Credentials.read(certificates, "server") if certificates else None
        where = cli.device_of(device)
        self.run = run_of(Path(resume)) if resume is not None else settled(run or Run())
        place = resume if resume is not None else out
        folder = RunFolder(None if place is None else Path(place), self.run, "server", goes_on)
        self.folder = folder.path
        self._held = Held(self.folder, "--resume" if goes_on else "--out")
        try:
            self._server = server.Server(
                self.run,
                listen,
                where,
                folder,
                lambda reason: _log.warning("%s; the others go on", reason),
                credentials,
                _log.warning,
                goes_on,
                threads,
                alone,
            )
        except BaseException:
            self._held.release()
            if not goes_on:
                _withdraw(self.folder)
            raise
        self.port = self._server.port
        self.address = f"{listen.rpartition(':')[0]}:{self.port}"
        self._started = self._stopped = False
        self._results: Results | None = None

    def start(self) -> None:
        """From now on clients may join."""
        self._started = True
        self._server.start()

    def wait(self, timeout: float | None = None) -> Results:
        """Waits for the end of the run; what it came to.

        timeout: seconds; then TimeoutError. Raises ClosedError, with the reason, when the run ends before it
        is finished: a client was lost, for instance. Raises StepError when a step of the server's failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self.finished(_POLL_S):
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"the run is not finished after {timeout:g} s")
        assert self._results is not None, "it is finished"
        return self._results

    def finished(self, timeout: float = 0.0) -> bool:
        """Whether the run is finished, at the latest after so many seconds. Raises as `wait` does."""
        if self._results is None and self._server.wait(timeout):
            self._server.finish()
            self._results = read(self.folder)
        return self._results is not None

    def lines(self) -> Iterator[Evaluation]:
        """Each evaluation of the joined network as it comes, to the end of the run. Raises as `wait` does."""
        lines, over = Lines(self.folder), False
        while not over:
            over = self.finished(_POLL_S)
            yield from lines.new()

    def drain(self, grace: float = 20.0) -> None:
        """In a run with checkpoints: ends this process's part in it, for `resume` to go on from.

        Within `grace` seconds what has come is learned from and saved, and clients are told to come back.
        """
        reason = StaleError("the server is draining: it will be back")
        self._server.drain(reason, grace)
        self._stop(reason)

    def stop(self, reason: str = "the server was stopped") -> None:
        """Ends the run, unless it is finished, and tells every client why. Nothing of it is left running."""
        self._stop(ClosedError(reason))

    def _stop(self, reason: ClosedError) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._server.stop(reason)
        self._server.join()
        self._held.release()

    def __enter__(self) -> "Server":
        if not self._started:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("the server was stopped" + said_of(error))


def said_of(error: BaseException | None) -> str:
    """What stopped a program, for whom it leaves; nothing of what its own code said."""
    if error is None:
        return ""
    return " (Ctrl-C)" if isinstance(error, KeyboardInterrupt) else f" ({type(error).__name__})"


def _withdraw(folder: Path) -> None:
    """The folder of a run that could not begin, so that the next may have it."""
    for name in ("run.json", ".lock"):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
