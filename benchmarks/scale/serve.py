"""The server's process: the real server, or one of the lean two, with a clock at its trainer's end."""

import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import lean
from benchmarks.scale.net import be_patient
from common.methods import settled
from common.run import Run
from common.rundir import RunFolder
from dsl_server.inbox import Job
from dsl_server.server import SWITCH_S, Server

Applied = tuple[int, int, float]  # client, number of the batch, when: monotonic seconds
REAL, THREADS, LOOP = "dsl-server", "thread a call", "event loop"


class Observed(Server):
    """The server as it is, that notes when a batch has been learned from."""

    applied: list[Applied]

    def _learned(self, job: Job, loss: float | None) -> None:
        super()._learned(job, loss)
        self.applied.append((job.client, job.sequence, time.monotonic()))


def _real(run: Run, folder: Path, applied: list[Applied]) -> int:
    run = settled(run)
    server = Observed(run, "127.0.0.1:0", torch.device("cpu"), RunFolder(folder, run, "server"), threads=1)
    server.applied = applied
    server.start()
    return server.port


def _lean(kind: type[lean.Lean]) -> Callable[[Run, Path, list[Applied]], int]:
    def serve(run: Run, folder: Path, applied: list[Applied]) -> int:
        def note(client: int, sequence: int) -> None:
            applied.append((client, sequence, time.monotonic()))

        return kind(settled(run), note).port

    return serve


FRONTS: dict[str, Callable[[Run, Path, list[Applied]], int]] = {
    REAL: _real,
    THREADS: _lean(lean.Threads),
    LOOP: _lean(lean.Loop),
}


def main(front: str, settings: dict[str, Any], folder: Path, parent: Connection) -> None:
    """Tells its port; then, whenever it is asked, what has been applied since it was asked last."""
    torch.set_num_threads(1)
    be_patient()
    sys.setswitchinterval(SWITCH_S)  # of each, as the real server has it
    applied: list[Applied] = []
    parent.send(FRONTS[front](Run(**settings), folder, applied))
    while True:
        try:
            parent.recv()
        except EOFError:
            return
        known = len(applied)
        parent.send(applied[:known])
        del applied[:known]
