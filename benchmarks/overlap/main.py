"""Does decoupling hide the work of one side, and of the link, behind the other's?

Client and server each have one core of their own. For each split and link: samples per second of DSL and of
CSL between real processes, once they are under way: a run's time less that of a shorter one, so that first
steps, whose memory the system has yet to find, and the pipeline's filling and draining are not counted. Each
also as a fraction of its bound, which is samples over the longest of the client's compute, the server's, and
the bytes of one way over the link's rate.

Compute is each side's rule in a loop over some of the same batches on its core, after a first one, with
nobody at the other end: alone, and both at once, which is what the machine takes away from two cores that
share their memory ("of both at once" is the fraction of the bound that this makes). One repetition runs all
of them, one after the other; ratios are of the same repetition. Links are emulated by a relay on loopback
(dsl_lab/link.py).

    python benchmarks/overlap/main.py [--model resnet20] [--splits m d] [--links 0 20 100] [--repetitions 3]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import torch

from common import cli
from common.methods import build_method
from common.methods.base import Received, Sent, run_step
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches
from dsl_lab.launch import Experiment, Setting, launch
from dsl_lab.link import Link

SERVER_CORE, CLIENT_CORE = 0, 1
SIZE = 128
FIRST = 4  # batches, which are trained on and not counted
COMPUTED = 8  # batches at most, by which a side's compute is known
MBIT = 1e6 / 8  # bytes per second


def settings(method: str, split: str, options: argparse.Namespace) -> dict[str, Setting]:
    return {
        "method": method,
        "model": options.model,
        "split": split,
        "head": options.head,
        "epochs": 1,
        "eval_every": 0,
        "data": f"npz:{options.file}",
        "outbox": options.queue,
        "inbox": options.queue,
    }


def over_the_wire(
    method: str, split: str, round_trip: float, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds for the batches after the first ones; and the bytes of their activations.

    round_trip: milliseconds of the link, 0 for none.
    """
    (less, _), (seconds, sent) = (
        run_of(batches, method, split, round_trip, options) for batches in (FIRST, FIRST + options.batches)
    )
    return seconds - less, sent * options.batches / (FIRST + options.batches)


def run_of(
    batches: int, method: str, split: str, round_trip: float, options: argparse.Namespace
) -> tuple[float, int]:
    """Seconds from the client's first batch to the server's last receipt; and the activations' bytes."""
    link = partial(Link, rate=options.mbit * MBIT, delay=round_trip / 2000) if round_trip else None
    with tempfile.TemporaryDirectory() as folder:
        run = settings(method, split, options) | {"train_limit": batches * SIZE}
        launch(Experiment(run, Path(folder), cores=[SERVER_CORE, CLIENT_CORE], link=link))
        client, server = (
            json.loads((Path(folder) / name / "summary.json").read_text()) for name in ("client-0", "server")
        )
        return float(client["seconds"]["train"]), int(server["wire"]["up"]["activations"])


def compute(method: str, sides: Sequence[str], split: str, options: argparse.Namespace) -> list[float]:
    """Seconds that each side's rule takes for a run's batches, on its core; all at the same time."""
    processes = [_side(method, side, split, options) for side in sides]
    return [float(process.communicate()[0]) for process in processes]


def _side(method: str, side: str, split: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    core = CLIENT_CORE if side == "client" else SERVER_CORE
    command = [sys.executable, __file__, "--side", side, "--method", method, "--splits", split]
    command += ["--model", options.model, "--head", options.head, "--file", str(options.file)]
    command += ["--batches", str(options.batches)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pinned = ["taskset", "-c", str(core), *command]
    return subprocess.Popen(pinned, env=environment, stdout=subprocess.PIPE, text=True)


def measure_side(options: argparse.Namespace) -> float:
    values = settings(options.method, options.splits[0], options)
    run = Run(**values)  # type: ignore[arg-type]
    method, net, cpu = build_method(run), build(run), torch.device("cpu")
    client, server = client_part(run, method, net, cpu), server_part(run, method, net, cpu)
    train, _ = data.load(run.data, run.image_shape, run.class_count)
    batches = Batches(train, None, SIZE, seed=0, augment=True, device=cpu)
    made = list(islice(batches.epoch(0), COMPUTED + 1))
    with torch.no_grad():
        sent = [Received(client.bottom(x), y, client=0, progress=0.0) for x, y in made]
    answers = [None if method.one_way else torch.randn_like(batch.z) * 1e-4 for batch in sent]

    def step(index: int) -> None:
        if options.side == "server":
            method.server_step(server, [sent[index]])
        else:
            run_step(method.client_step(client, *made[index]), partial(_answered, answers[index]))

    step(0)
    start = time.perf_counter()
    for index in range(1, len(made)):
        step(index)
    return (time.perf_counter() - start) * options.batches / (len(made) - 1)


def _answered(answer: torch.Tensor | None, _: Sent) -> torch.Tensor | None:
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--head", default="gap")
    parser.add_argument("--splits", nargs="+", default=["m", "d"])
    parser.add_argument("--links", nargs="+", type=float, default=[0, 20, 100], help="their round trips, ms")
    parser.add_argument("--mbit", type=float, default=100, help="rate of the links, each way")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--queue", type=int, default=2, help="depth of outbox and inbox")
    parser.add_argument("--side", choices=["client", "server"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if options.side == "client":
            cli.keep_freed_memory()  # as dsl-client does
        torch.set_num_threads(1)
        print(measure_side(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.file = Path(folder) / "images.npz"
        write_images(options.file, (FIRST + options.batches) * SIZE)
        report(options)


def write_images(path: Path, count: int) -> None:
    """Noise: what the images show does not matter to the time that they take."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", count), ("test", SIZE)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(path, **arrays, classes=np.array([str(i) for i in range(10)]))


def report(options: argparse.Namespace) -> None:
    print(f"{date.today()}, {platform.machine()}, one core a side, Python {platform.python_version()}, ")
    print(f"torch {torch.__version__}, grpcio {grpc.__version__}; {options.model}, head {options.head}, ")
    print(f"{options.batches} batches of {SIZE}; median of {options.repetitions} interleaved repetitions\n")
    heads = ["split", "link", "DSL samples/s", "of its bound", "of both at once", "CSL samples/s"]
    heads += ["of its bound", "DSL / CSL", "client alone s", "server alone s", "both at once s"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for split in options.splits:
        for round_trip in options.links:
            rows = [row(split, round_trip, options) for _ in range(options.repetitions)]
            middle = [statistics.median(column) for column in zip(*rows, strict=True)]
            cells = " | ".join(f"{value:.2f}" for value in middle)
            link = f"{round_trip:g} ms, {options.mbit:g} Mbit/s" if round_trip else "loopback"
            print(f"| {split} | {link} | {cells} |", flush=True)


def row(split: str, round_trip: float, options: argparse.Namespace) -> list[float]:
    """One repetition of one row."""
    samples = options.batches * SIZE
    speeds, shares, alone = {}, {}, {}
    for method in ("dsl", "csl"):
        seconds, sent = over_the_wire(method, split, round_trip, options)
        (client,), (server,) = (compute(method, [side], split, options) for side in ("client", "server"))
        on_the_way = sent / (options.mbit * MBIT) if round_trip else 0.0
        bound = max(client, server, on_the_way)
        speeds[method], shares[method], alone[method] = samples / seconds, bound / seconds, [client, server]
        if method == "dsl":
            both = max(compute(method, ["client", "server"], split, options))
            of_both = max(both, on_the_way) / seconds
    ratio = speeds["dsl"] / speeds["csl"]
    return [speeds["dsl"], shares["dsl"], of_both, speeds["csl"], shares["csl"], ratio, *alone["dsl"], both]


if __name__ == "__main__":
    main()
