"""What tests of a server of several ranks share: processes that are its ranks, a store where they meet, as
torchrun gives them one, and clients in threads of the first."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from common.errors import ClosedError
from common.meter import Clock, Traffic
from common.methods import settled
from common.nets.cut import build
from common.parts import State, state_of
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials
from dsl_client.connection import Connection
from dsl_server.ranks import Ranks, afresh
from dsl_server.server import Server
from dsl_server.ticks import Pace
from tests.federation import CPU, Batches, train

END_S = 180.0  # ample: on a machine with other work torch alone takes a while to import
Spawn = Callable[..., list[subprocess.Popen[str]]]


@contextlib.contextmanager
def spawning() -> Iterator[Spawn]:
    """spawn(size, module, scenario, *arguments): processes of `module`'s function of that name; each is given
    its rank, and how to be a rank of any server."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running: list[subprocess.Popen[str]] = []

    def spawn(size: int, module: str, scenario: str, *arguments: object) -> list[subprocess.Popen[str]]:
        for rank in range(size):
            words = [sys.executable, "-m", "tests.ranks", module, scenario, str(store.port), str(rank)]
            running.append(
                subprocess.Popen(
                    [*words, *map(str, arguments)],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return running[-size:]

    yield spawn
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def all_end_well(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    said = [process.communicate(timeout=END_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


class Meeting:
    """Where a process of `spawning` becomes a rank."""

    def __init__(self, port: int, rank: int) -> None:
        self.rank = rank
        self._store = TCPStore("127.0.0.1", port, is_master=False)

    def ranks(self, name: str, size: int, timeout: float = 30.0) -> Ranks:
        met = afresh(PrefixStore(name, self._store), self.rank, size, timeout)
        return Ranks(met, self.rank, size, CPU, timeout)


@contextlib.contextmanager
def rank_of(
    ranks: Ranks, run: Run, folder: Path, pace: Pace | None = None, credentials: Credentials | None = None
) -> Iterator[Server]:
    """This rank's server, on a free port of loopback; stopped at the end."""
    run = settled(run)
    out = RunFolder(folder, run, "server", owned=ranks.first)
    server = Server(run, "127.0.0.1:0", CPU, out, credentials=credentials, ranks=ranks, pace=pace)
    server.start()
    try:
        yield server
    finally:
        server.stop(ClosedError("the test is over"))


def federation_of_ranks(
    meeting: Meeting,
    name: str,
    size: int,
    run: Run,
    folder: Path,
    data: Sequence[Batches],
    pace: Pace | None = None,
    certs: Path | None = None,
) -> tuple[Server, list[State], dict[str, Any]] | None:
    """A server of so many ranks, its clients in threads of the first: what that one and they came to.

    certs: a folder as of `dsl certs`, with clients named client-0 and so on.
    """
    ranks, run = meeting.ranks(name, size), settled(run)
    own = Credentials.read(certs, "server") if certs else None
    with rank_of(ranks, run, folder, pace, own) as server:
        if not ranks.first:
            assert server.wait(timeout=60)
            save(folder / f"rank-{ranks.rank}.safetensors", server.hosting.state_of(server.part))
            return None
        test = Batches(run, seed=99, samples=20)
        nets = [build(run) for _ in data]
        members = []
        for client in range(len(data)):
            who = f"client-{client}"
            theirs = Credentials.read(certs / "clients" / who, "client") if certs else None
            connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), theirs)
            members.append((connection, connection.join(who, patience=10).client))
        with ThreadPoolExecutor(len(data)) as pool:
            parts = [
                pool.submit(train, run, connection, client, data[client], test, nets[client])
                for connection, client in members
            ]
            states = [state_of(part.result(timeout=60)) for part in parts]
        assert [client for _, client in members] == list(range(len(data)))
        assert server.wait(timeout=30)
        for connection, _ in members:
            connection.close()
        return server, states, server.finish()


def save(file: Path, state: State) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, file)


def loaded(file: Path) -> dict[str, Tensor]:
    return load_file(file)


if __name__ == "__main__":
    import faulthandler
    import importlib

    faulthandler.dump_traceback_later(END_S - 10, exit=True)
    module, scenario, port, rank, *arguments = sys.argv[1:]
    getattr(importlib.import_module(module), scenario)(Meeting(int(port), int(rank)), *arguments)
    sys.stdout.flush()
    os._exit(0)  # as the programs end: gRPC's threads may be amid C++
