"""What tests share: small runs, made-up images, a real server on loopback and clients in threads."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.codecs import Encoded, Parcel
from common.codecs.floats import fp32
from common.errors import ClosedError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import ClientPart
from common.nets.cut import CutNet, build
from common.parts import client_part
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire.codec import Arrived, BatchSpec, batch_spec
from dsl_client.connection import Connection
from dsl_client.trainer import Trainer
from dsl_server.server import Server

CPU = torch.device("cpu")


def small_run(**settings: Any) -> Run:
    """Six batches an epoch at most, 8x8 images, the smallest ResNet."""
    defaults = {
        "model": "resnet8",
        "split": "1",
        "image": (3, 8, 8),
        "classes": 4,
        "batch_size": 8,
        "epochs": 2,
        "lr": 0.05,
    }
    return Run(**{**defaults, **settings})


class Batches:
    """Made-up images in batches, in the shape of dsl_client.batches.Batches."""

    def __init__(self, run: Run, seed: int, samples: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, *run.image_shape, generator=g)
        self.y = torch.randint(0, run.class_count, (samples,), generator=g)
        self.samples, self._size = samples, run.batch_size

    def __len__(self) -> int:
        return -(-self.samples // self._size)

    def size(self, batch: int) -> int:
        return min(self._size, self.samples - batch * self._size)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self.plain(), start, None)

    def plain(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(self._size), self.y.split(self._size), strict=True)


def arrived(z: Tensor, y: Tensor, sequence: int = 1) -> Arrived:
    """A batch as the server has it, that travelled as it was."""
    return Arrived(z, y, sequence, Parcel(fp32(), Encoded(tuple(z.shape), [z])))


def spec_of(run: Run) -> BatchSpec:
    return batch_spec(run, build_method(run), build(run))


@contextlib.contextmanager
def serving(run: Run, folder: Path, credentials: Credentials | None = None) -> Iterator[Server]:
    """A real server on a free port of loopback, stopped at the end."""
    run = settled(run)
    out = RunFolder(folder / "server", run, "server")
    server = Server(run, "127.0.0.1:0", CPU, out, credentials=credentials)
    server.start()
    try:
        yield server
    finally:
        server.stop(ClosedError("the test is over"))


def connect(
    server: Server, name: str = "someone", credentials: Credentials | None = None
) -> tuple[Connection, int]:
    """A member of the run, and its index."""
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), credentials)
    return connection, connection.join(name, patience=10).client


def train(
    run: Run, connection: Connection, client: int, data: Batches, test: Batches, net: CutNet | None = None
) -> ClientPart:
    """One client, from its first epoch to its goodbye; its part. Tells the server if it fails."""
    from dsl_client.client import measurements

    torch.set_num_threads(1)  # of this thread, too: each has its own number
    method, clock, net = build_method(run), Clock(), net or build(run)
    part, spec = client_part(run, method, net, CPU), batch_spec(run, method, net)
    try:
        Trainer(run, client, method, part, connection, spec, clock).train(data, test)
        connection.leave(measurements(clock, CPU))
    except BaseException as error:
        connection.close(str(error) or type(error).__name__)
        raise
    return part


def federation(
    run: Run,
    folder: Path,
    data: Sequence[Batches],
    certs: Path | None = None,
    kind: type[Batches] = Batches,
) -> tuple[Server, list[ClientPart], dict[str, Any]]:
    """Every client in a thread of its own against a real server; the server, parts, and summary.

    certs: a folder as of `dsl certs`, with clients named client-0 and so on. kind: of the test's batches.
    """
    run = settled(run)
    test = kind(run, seed=99, samples=20)
    own = Credentials.read(certs, "server") if certs else None
    with serving(run, folder, own) as server, ThreadPoolExecutor(len(data)) as pool:
        names = [f"client-{index}" for index in range(len(data))]
        theirs = [certs and Credentials.read(certs / "clients" / name, "client") for name in names]
        nets = [build(run) for _ in data]  # by one thread: most networks draw from the generator of all
        members = [connect(server, *who) for who in zip(names, theirs, strict=True)]
        parts: list[Future[ClientPart]] = [
            pool.submit(train, run, connection, client, data[client], test, nets[client])
            for connection, client in members
        ]
        results = [part.result(timeout=60) for part in parts]
        assert server.wait(timeout=10), "every client has left"
        summary = server.finish()
        for connection, _ in members:
            connection.close()
    return server, results, summary
