"""What does it cost that each batch counts exactly once, whatever crashes?

Client and server are real processes, each with one core of its own. For each method: samples per second
without checkpoints, and with one every so many seconds, with clients that remember in memory and in a folder
(--state). One round runs all of them, one after the other; ratios are of the same round. Then the parts, one
by one, in this process: a checkpoint's capture (in the trainer's thread) and its writing (beside it), a
batch's digest, a batch kept in a file, a client's state in memory and as files.

    python benchmarks/durability/main.py [--every 5 30 120] [--epochs 6] [--batches 30] [--rounds 3]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from common.checkpoint import Checkpoints, Saved
from common.methods import build_method, settled
from common.methods.base import Smashed
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import client_part, copied, server_part, state_of
from common.run import Run
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import batch_spec
from common.wire.pieces import Piece
from dsl_client.memory import Memory, Snapshot
from dsl_client.spool import Spool
from dsl_client.stream import Stretch
from dsl_lab.launch import Experiment, Setting, launch

SERVER_CORE, CLIENT_CORE = 0, 1
SIZE = 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """every: seconds from one checkpoint to the next, 0 for none. state: the client remembers in a folder."""

    every: float = 0.0
    state: bool = False

    def __str__(self) -> str:
        if not self.every:
            return "without"
        return f"every {self.every:g} s, {'--state' if self.state else 'in memory'}"


@dataclass(frozen=True)
class Remembering(Experiment):
    """Each client with a folder of its own to remember in."""

    def commands(self, port: int, door: int) -> list[list[str]]:
        server, *clients = super().commands(port, door)
        return [
            server,
            *([*each, "--state", str(self.out / f"state-{i}")] for i, each in enumerate(clients)),
        ]


@dataclass(frozen=True)
class Measured:
    rate: float  # samples a second, from the client's first batch to the server's last receipt
    checkpoints: int  # that were written


def settings(method: str, options: argparse.Namespace) -> dict[str, Setting]:
    return {
        "method": method,
        "model": options.model,
        "split": options.split,
        "epochs": options.epochs,
        "eval_every": 0,
        "data": f"npz:{options.file}",
    }


def over_the_wire(method: str, variant: Variant, options: argparse.Namespace) -> Measured:
    values = settings(method, options) | {"checkpoint_every": variant.every}
    kind = Remembering if variant.state else Experiment
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        out = Path(folder)
        launch(kind(values, out, cores=[SERVER_CORE, CLIENT_CORE]))
        seconds = json.loads((out / "client-0" / "summary.json").read_text())["seconds"]["train"]
        audit = map(json.loads, (out / "server" / "audit.jsonl").read_text().splitlines())
        checkpoints = sum(line["event"] == "checkpoint" for line in audit)
    return Measured(options.epochs * options.batches * SIZE / seconds, checkpoints)


def parts(method_name: str, options: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Of each part its name, its milliseconds (median), and its megabytes."""
    run = settled(Run(**(settings(method_name, options) | {"checkpoint_every": 5.0})))  # type: ignore[arg-type]
    method, net = build_method(run), build(run)
    server, client = server_part(run, method, net, CPU), client_part(run, method, net, CPU)
    spec = batch_spec(run, method, net)
    z, y = torch.rand(SIZE, *spec.cut_shape), torch.arange(SIZE) % spec.classes
    for part in (server, client):  # so that there is momentum
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
    hosting = Hosting(run, method, server)
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        place = Path(folder)
        captured = hosting.state()
        size = _megabytes(captured)
        yield "a checkpoint's capture, in the trainer's thread", milliseconds(hosting.state, options), size
        checkpoints = Checkpoints(place / "checkpoints")
        numbers = iter(range(1, 10**6))

        def write() -> None:
            number = next(numbers)
            checkpoints.write(Saved(number, captured, {}))
            checkpoints.drop(keep=lambda known: known > number - 3)

        yield "its writing, beside it", milliseconds(write, options), size
        frame = list(codec.pack_batch(pb.StreamActivationsRequest, 1, Smashed(z, y), spec))
        size = sum(piece.size for piece in frame) / 1e6
        yield "CRC-32 of a batch, at each end", milliseconds(lambda: codec.sealed(frame), options), size
        if method.one_way:
            spool = Spool(2**30, place / "spool")
            (place / "spool").mkdir(exist_ok=True)

            def keep() -> None:
                number = next(numbers)
                spool.append(Stretch(0, number, 1, SIZE), numbered(frame, number))
                spool.trim(number)

            yield "a batch kept in a file and thrown away", milliseconds(keep, options), size
        state = state_of(client)
        for what, memory in (("memory", Memory()), ("files", Memory(place / "state"))):
            remember = partial(remembered, memory, state, numbers)
            yield f"a client's state kept in {what}", milliseconds(remember, options), _megabytes(state)


def remembered(memory: Memory, state: dict[str, torch.Tensor], numbers: Iterator[int]) -> None:
    memory.keep(Snapshot(next(numbers), copied(state), {}, waypoint=False), goes_back=False)


def numbered(frame: Sequence[Piece[Any]], number: int) -> list[Piece[Any]]:
    for piece in frame:
        if piece.head.WhichOneof("head") == "batch":
            piece.head.batch.sequence = number
    return list(frame)


def milliseconds(do: Callable[[], object], options: argparse.Namespace) -> float:
    do()
    times = []
    for _ in range(options.repetitions):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _megabytes(tensors: dict[str, torch.Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def write_images(path: Path, count: int) -> None:
    """Noise: what the images show does not matter to the time that they take."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", count), ("test", SIZE)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(path, **arrays)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def report(options: argparse.Namespace) -> None:
    print(f"{date.today()}, {platform.machine()}, one core a side, Python {platform.python_version()}, ")
    print(f"torch {torch.__version__}, grpcio {grpc.__version__}; {options.model} cut at {options.split}, ")
    print(f"{options.epochs} epochs of {options.batches} batches of {SIZE}; ")
    print(f"{os.cpu_count()} cores\n")
    if options.rounds:
        report_rates(options)
    print(f"Parts, alone and on one thread, median of {options.repetitions}:\n")
    print("| method | part | ms | MB |\n|---|---|---:|---:|")
    with one_thread():
        for method in options.methods:
            for what, median, size in parts(method, options):
                print(f"| {method} | {what} | {median:.2f} | {size:.2f} |")


def report_rates(options: argparse.Namespace) -> None:
    print(f"Median of {options.rounds} interleaved rounds:\n")
    variants = [Variant(), *(Variant(every, state) for every in options.every for state in (False, True))]
    each = [(method, variant) for method in options.methods for variant in variants]
    measured: dict[tuple[str, Variant], list[Measured]] = {key: [] for key in each}
    for _ in range(options.rounds):
        for method, variant in each:
            measured[method, variant].append(over_the_wire(method, variant, options))
    print("| method | checkpoints | samples/s | ratio to without (median, range) | written |")
    print("|---|---|---:|---:|---:|")
    for method, variant in each:
        mine, without = measured[method, variant], measured[method, Variant()]
        ratios = [one.rate / other.rate for one, other in zip(mine, without, strict=True)]
        rate = statistics.median(one.rate for one in mine)
        written = statistics.median(one.checkpoints for one in mine)
        print(
            f"| {method} | {variant} | {rate:.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {written:g} |"
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["dsl", "csl"])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--split", default="m")
    parser.add_argument("--every", nargs="+", type=float, default=[5.0, 30.0, 120.0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=30, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="0: the parts only")
    parser.add_argument("--repetitions", type=int, default=20, help="of each part")
    parser.add_argument("--disk", type=Path, help="where runs are written; else the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.file = Path(folder) / "images.npz"
        write_images(options.file, options.batches * SIZE)
        report(options)


if __name__ == "__main__":
    main()
