"""What tests of crashes share: a federation whose server dies and starts anew, and what holds at its end."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import Checkpoints
from common.errors import ClosedError, StaleError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import ClientPart
from common.nets.cut import build
from common.parts import client_part, state_of
from common.run import Run
from common.rundir import RunFolder
from dsl_client.client import measurements
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_client.trainer import Trainer
from dsl_server.server import Server
from tests.federation import CPU, Batches, spec_of

Disturb = Callable[["Life"], None]


@dataclass
class Life:
    """A server and its reincarnations, on one port and folder."""

    run: Run
    folder: Path
    server: Server | None = None
    port: int = 0
    troubles: list[str] = field(default_factory=list)

    def start(self, resume: bool = False) -> Server:
        out = RunFolder(self.folder / "server", self.run, "server", goes_on=resume)
        listen = f"127.0.0.1:{self.port}"
        end = time.monotonic() + 10
        while True:
            try:
                self.server = Server(
                    self.run, listen, CPU, out, on_trouble=self.troubles.append, resume=resume
                )
                break
            except Exception:
                if time.monotonic() > end:  # the port is free again a moment after
                    raise
                time.sleep(0.05)
        self.port = self.server.port
        self.server.start()
        return self.server

    def crash(self) -> None:
        """Its calls are cut, and nothing of what it knew is written."""
        assert self.server
        server, self.server = self.server, None
        server._saver.close(StaleError("crashed"))
        server._grpc.stop(grace=None).wait()
        server.rounds.close(ClosedError("crashed"))
        server.inbox.close(ClosedError("crashed"))
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
        mine = [state_of(part) for part in (*self.parts, *self.server.hosting.parts)]
        theirs = [state_of(part) for part in (*other.parts, *other.server.hosting.parts)]
        return all(
            list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in zip(mine, theirs, strict=True)
        )


def live(
    run: Run, folder: Path, data: Sequence[Batches], disturb: Disturb = lambda _: None, names: str = "client"
) -> Outcome:
    """A whole federation, disturbed meanwhile; clients in threads, which outlive their server."""
    run = settled(run)
    life = Life(run, folder)
    life.start()
    test = Batches(run, seed=99, samples=20)
    with ThreadPoolExecutor(len(data) + 1) as pool:
        joined = []
        for index in range(len(data)):
            connection = Connection(f"127.0.0.1:{life.port}", Traffic(), Clock(), memory=Memory())
            joined.append((connection, connection.join(f"{names}-{index}", patience=30).client))
        parts = [
            pool.submit(_train, run, connection, index, data[index], test) for connection, index in joined
        ]
        disturbed = pool.submit(disturb, life)
        done, _ = wait([*parts, disturbed], 60, FIRST_EXCEPTION)
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


def _train(run: Run, connection: Connection, client: int, data: Batches, test: Batches) -> ClientPart:
    method, clock = build_method(run), Clock()
    part = client_part(run, method, build(run), CPU)
    try:
        Trainer(run, client, method, part, connection, spec_of(run), clock).train(data, test)
        connection.leave(measurements(clock, CPU))
    except BaseException as error:
        connection.close(str(error) or type(error).__name__)
        raise
    return part


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
    assert outcome.summary["samples_trained"] == planned
    lines = (outcome.server._folder.path / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines]
    assert epochs == sorted(set(epochs)), "a line for each epoch, none twice"
    assert epochs[-1] == run.epochs
