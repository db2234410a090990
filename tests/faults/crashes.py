"""What tests of crashes share: a federation whose server dies and starts anew, and what holds at its end."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import Checkpoints
from common.errors import ClosedError, ConfigError, StaleError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import ClientPart, Tail
from common.parts import state_of
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_server.ledger import Ledger
from dsl_server.server import Server
from tests.faults.proxy import Proxy
from tests.federation import CPU, Batches, train
from tests.threads import in_thread

Disturb = Callable[["Life"], None]


@dataclass
class Life:
    """A server and its reincarnations, on one port and folder."""

    run: Run
    folder: Path
    server: Server | None = None
    port: int = 0
    proxy: Proxy | None = None  # by which clients come, if they do
    credentials: Credentials | None = None
    troubles: list[str] = field(default_factory=list)

    def start(self, resume: bool = False) -> Server:
        out = RunFolder(self.folder / "server", self.run, "server", goes_on=resume)
        listen = f"127.0.0.1:{self.port}"
        end = time.monotonic() + 10
        while True:
            try:
                self.server = Server(
                    self.run,
                    listen,
                    CPU,
                    out,
                    credentials=self.credentials,
                    on_trouble=self.troubles.append,
                    resume=resume,
                )
                break
            except ConfigError as error:
                if "bound" not in str(error):
                    raise
                if time.monotonic() > end:  # the port is free again a moment after
                    raise
                time.sleep(0.05)
        self.port = self.server.port
        self.server.start()
        return self.server

    @property
    def door(self) -> int:
        """The port that clients come to."""
        return self.proxy.port if self.proxy else self.port

    @property
    def ledger(self) -> Ledger:
        assert self.server
        return self.server.rounds.ledger

    def crash(self, on_dead: Callable[[], None] = lambda: None) -> None:
        """Its calls are cut, and nothing of what it knew is written."""
        assert self.server
        server, self.server = self.server, None
        server._saver.close(StaleError("crashed"))
        server._grpc.stop(grace=None).wait()
        server.rounds.close(ClosedError("crashed"))
        server.inbox.close(ClosedError("crashed"))
        on_dead()
        for thread in threading.enumerate():  # a dead server writes no more: this one finishes what it began
            if thread.name.startswith("saver_"):
                thread.join(10)
        server._thread.join(10)
        server.sockets.close()

    def wait_for_samples(self, samples: int) -> bool:
        """Until the server has learned from so many; False when it has ended before."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert self.server
            if self.server.record.samples_trained >= samples:
                return True
            if self.server.rounds._finished():
                return False
            time.sleep(0.002)
        raise AssertionError(f"{samples} samples did not come in time")


@dataclass(frozen=True)
class Outcome:
    parts: list[ClientPart]
    server: Server
    summary: dict[str, Any]
    ledger: dict[str, Any]

    def same_as(self, other: "Outcome") -> bool:
        """Bit for bit, at both ends."""
        mine, theirs = (
            [*map(state_of, end.parts), *map(state_of, end.server.hosting.parts)] for end in (self, other)
        )
        return all(
            list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in zip(mine, theirs, strict=True)
        )


def live(
    run: Run,
    folder: Path,
    data: Sequence[Batches],
    disturb: Disturb = lambda _: None,
    names: str = "client",
    proxied: bool = False,
) -> Outcome:
    """A whole federation, disturbed meanwhile; clients in threads, which outlive their server."""
    run = settled(run)
    life = Life(run, folder)
    life.start()
    test = Batches(run, seed=99, samples=20)
    with ExitStack() as stack:
        if proxied:
            life.proxy = stack.enter_context(Proxy(life.port))
        pool = stack.enter_context(ThreadPoolExecutor(len(data) + 1))
        joined = []
        for index in range(len(data)):
            connection = Connection(f"127.0.0.1:{life.door}", Traffic(), Clock(), memory=Memory())
            joined.append((connection, connection.join(f"{names}-{index}", patience=30).client))
        parts = [
            pool.submit(train, run, connection, index, data[index], test) for connection, index in joined
        ]
        disturbed = pool.submit(disturb, life)
        everything: list[Future[Any]] = [*parts, disturbed]
        done, _ = wait(everything, 60, FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises what went wrong first
        trained = [part.result(timeout=0) for part in parts]
        assert life.server
        assert life.server.wait(timeout=10), "every client has left"
        summary = life.server.finish()
        life.server.stop(ClosedError("the run is over"))
        for connection, _ in joined:
            connection.close()
    return Outcome(trained, life.server, summary, newest(folder)["rounds"]["ledger"])


def comes(
    life: Life,
    data: Batches,
    memory: Memory,
    name: str = "ann",
    patience: float = 30.0,
    takeover: bool = False,
    credentials: Credentials | None = None,
) -> tuple[Connection, Future[ClientPart]]:
    """A client in a thread of its own, from its Join to its goodbye, or to what ends it."""
    target = f"127.0.0.1:{life.door}"
    connection = Connection(target, Traffic(), Clock(), credentials, memory)

    def whole() -> ClientPart:
        client = connection.join(name, patience, takeover).client
        return train(life.run, connection, client, data, Batches(life.run, seed=99, samples=20))

    return connection, in_thread(whole)


def newest(folder: Path) -> dict[str, Any]:
    """The facts of the newest checkpoint."""
    checkpoints = Checkpoints(folder / "server" / "checkpoints")
    return dict(checkpoints.read(checkpoints.numbers()[-1]).facts)


def check_exact(outcome: Outcome, run: Run, data: Sequence[Batches], sent: Callable[[int], int]) -> None:
    """The oracle: every planned batch was applied once, in its order, and every sample counted once.

    sent: of a client, the batches that the plan has it send.
    """
    accounts = outcome.ledger["accounts"]
    assert [account["client"] for account in accounts] == list(range(len(data)))
    for account in accounts:
        assert account["applied"]["sequence"] == sent(account["client"])
        assert account["left"]
    planned = sum(account["applied"]["samples"] for account in accounts)
    if build_method(run).tail is Tail.ALL:  # which numbers no batches
        planned = run.epochs * sum(share.samples for share in data)
    assert outcome.summary["samples_trained"] == planned
    lines = (outcome.server._folder.path / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines]
    assert epochs == sorted(set(epochs)), "a line for each epoch, none twice"
    assert epochs[-1] == run.epochs
