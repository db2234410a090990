"""A client of a run, for Python: the one that `dsl-client` starts, to be embedded in another program."""

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from common import cli, tls
from common.errors import ClosedError, SplitLearningError
from common.run import Run
from dsl.naming import Function, name_of
from dsl.server import said_of
from dsl_client import client
from dsl_client.datasets import Pair
from dsl_client.memory import Memory
from dsl_client.trainer import Scored, Step

__all__ = ["Client", "Scored", "Step"]

Source = str | Pair  # by name, or (train, test)

_log = logging.getLogger("dsl")


class Client:
    """Holds private data and the bottom of the network; all else it is told by the server.

    with dsl.Client("gpu-host:50051", certs="ward-7", data="folder:/data/ward-7") as client:
        folder = client.train()

    Arguments are those of `dsl-client`. server: its host:port. data: where the data is, if not where the run
    says: a source by name, or (train, test), two torch Datasets (docs/data.md). allow: functions of this
    side's own that the run may call, to build its network or as its loss, metric or data: themselves or
    their names, `package.module:function`. state: where to keep what it needs to go on after this process,
    in a run with checkpoints. patience: seconds to wait for a server that is not there. threads: of its
    arithmetic; 0: as torch has it. alone: False where the server, or another client, is in this process: then
    its peak memory is not its own, and is 0.

    Raises ConfigError for what cannot be. What befalls it on the way is told to the logger `dsl`.
    """

    def __init__(
        self,
        server: str,
        *,
        name: str | None = None,
        data: Source | None = None,
        allow: Function | Sequence[Function] = (),
        certs: str | Path | None = None,
        insecure: bool = False,
        device: str = "auto",
        out: str | Path | None = None,
        state: str | Path | None = None,
        patience: float = 60.0,
        threads: int = 0,
        alone: bool = True,
    ) -> None:
        certificates, where = certs and Path(certs), state and Path(state)
        tls.check_exposure("--server", server, certificates or None, insecure)
        credentials = tls.Credentials.read(certificates, "client") if certificates else None
        allowed = [allow] if isinstance(allow, str) or callable(allow) else allow
        self._out = Path(out) if out else where / "out" if where else None
        self._patience, self._threads = patience, threads
        self._reason: ClosedError | None = None
        self._joined = self._closed = False
        self._client = client.Client(
            server,
            name or (credentials and credentials.name) or socket.gethostname()[:64],
            cli.device_of(device),
            data,
            credentials,
            Memory(where or None, on_trouble=_log.warning),
            [name_of("allow", function) for function in allowed],
            alone,
        )

    @property
    def index(self) -> int:
        """Which client of the run it is, from 0; -1 before it has joined."""
        return self._client.index

    def join(self, takeover: bool = False) -> Run:
        """The run that this client is now a member of.

        takeover: with `state`, end the membership that another process has with it. Raises RefusedError when
        the server will not have it, ClosedError when there is no server in time.
        """
        with self._telling_why():
            run = self._client.join(self._patience, takeover)
        self._joined = True
        return run

    def build(self) -> None:
        """Builds the network ahead of `train`. Clients that share a process all do so before one trains, for
        first weights and dropout are of torch's one source of chance. Raises ConfigError."""
        self._client.build()

    def train(
        self,
        on_step: Callable[[Step], None] | None = None,
        on_scored: Callable[[Scored], None] | None = None,
    ) -> Path:
        """From the data to the goodbye, joining first if need be; the folder with all that is left.

        on_step: called after each batch, on_scored after each evaluation. Raises ConfigError when data or
        network do not suit the run, StepError when the loss is not finite, ClosedError, with the reason, when
        the run ends before.
        """
        if self._closed:
            raise self._reason or ClosedError("this client has left its run; make another")
        if not self._joined:
            self.join()

        def stepped(step: Step) -> None:
            if self._reason:
                raise self._reason
            if on_step:
                on_step(step)

        before = torch.get_num_threads()
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with self._telling_why():
                return self._client.train(self._out, stepped, on_scored or (lambda _: None), _log.info)
        except BaseException as error:
            self._leave(error)
            raise
        finally:
            self._leave(None)
            torch.set_num_threads(before)

    def stop(self, reason: str = "the client was stopped") -> None:
        """Ends the membership, from any thread: `train` raises ClosedError, the server is told the reason."""
        if not self._closed:
            self._reason = ClosedError(reason)
            self._close("" if self._client.can_return else reason)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Ends the membership. An error of ours is told to the server; of another's only what it is called,
        for its words may be about the data."""
        if isinstance(error, SplitLearningError):
            self._close(error.told)
        elif isinstance(error, Exception) or not self._client.can_return:
            self._close("" if error is None else "it was stopped" + said_of(error))
        else:
            self._close("")  # it may come back

    def _close(self, failure: str) -> None:
        if not self._closed:
            self._closed = True
            self._client.close(failure)

    @contextmanager
    def _telling_why(self) -> Iterator[None]:
        """Within it, whatever `stop` led to is raised as its reason."""
        try:
            yield
        except (SplitLearningError, ValueError) as error:  # the latter is gRPC's, of a closed connection
            if self._reason is None or error is self._reason:
                raise
            raise self._reason from error
