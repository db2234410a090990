"""Does decoupling hide the work of one side behind the other's?

Client and server each have one core of their own. For each split: seconds of training by DSL and by
CSL between real processes, and each side's own compute on the same batches with nobody at the
other end (its rule in a loop, on its core): alone, and both at once, which is what the machine takes
away from two cores that share their memory. One repetition runs all of them, one after the other;
ratios are of the same repetition.

    python benchmarks/overlap/main.py [--model resnet20] [--splits m d] [--batches 20] [--repetitions 3]
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
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import grpc
import numpy as np
import torch

from common.methods import build_method
from common.methods.base import Smashed
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches
from dsl_lab.launch import Experiment, Setting, launch

SERVER_CORE, CLIENT_CORE = 0, 1
SIZE = 128


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


def over_the_wire(method: str, split: str, options: argparse.Namespace) -> float:
    """Seconds from the client's first batch to the server's last receipt."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            settings(method, split, options), Path(folder), cores=[SERVER_CORE, CLIENT_CORE]
        )
        launch(experiment)
        summary = json.loads((Path(folder) / "client-0" / "summary.json").read_text())
        return float(summary["seconds"]["train"])


def compute(sides: Sequence[str], split: str, options: argparse.Namespace) -> list[float]:
    """Seconds that each side's DSL rule takes for the same batches, on its core; all at the same time."""
    processes = [_side(side, split, options) for side in sides]
    return [float(process.communicate()[0]) for process in processes]


def _side(side: str, split: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    core = CLIENT_CORE if side == "client" else SERVER_CORE
    command = [sys.executable, __file__, "--side", side, "--method", "dsl", "--splits", split]
    command += ["--model", options.model, "--head", options.head, "--file", str(options.file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pinned = ["taskset", "-c", str(core), *command]
    return subprocess.Popen(pinned, env=environment, stdout=subprocess.PIPE, text=True)


def measure_side(options: argparse.Namespace) -> float:
    values = settings(options.method, options.splits[0], options)
    run = Run(**values)  # type: ignore[arg-type]
    method, net, cpu = build_method(run), build(run), torch.device("cpu")
    client, server = client_part(run, method, net, cpu), server_part(run, net, cpu)
    train, _ = data.load(run.data, run.image_shape, run.class_count)
    batches = Batches(train, None, SIZE, seed=0, augment=True, device=cpu)
    with torch.no_grad():
        sent = [Smashed(client.bottom(x), y) for x, y in batches.epoch(0)]
    gradients: Iterator[torch.Tensor | None] = iter([torch.randn_like(s.z) * 1e-4 for s in sent])
    start = time.perf_counter()
    if options.side == "server":
        for smashed in sent:
            method.server_step(server, [smashed])
        return time.perf_counter() - start
    for x, y in batches.epoch(0):
        step = method.client_step(client, x, y)
        next(step)
        try:
            step.send(next(gradients) if method.answers else None)
        except StopIteration:
            continue
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--head", default="gap")
    parser.add_argument("--splits", nargs="+", default=["m", "d"])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--queue", type=int, default=2, help="depth of outbox and inbox")
    parser.add_argument("--side", choices=["client", "server"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        print(measure_side(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.file = Path(folder) / "images.npz"
        write_images(options.file, options.batches * SIZE)
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
    heads = ["split", "DSL s", "CSL s", "client alone s", "server alone s", "both at once s"]
    heads += ["DSL / slower alone", "DSL / both at once", "CSL / DSL"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for split in options.splits:
        rows = []
        for _ in range(options.repetitions):
            dsl, csl = (over_the_wire(method, split, options) for method in ("dsl", "csl"))
            (client,), (server,) = compute(["client"], split, options), compute(["server"], split, options)
            both = max(compute(["client", "server"], split, options))
            slower = max(client, server)
            rows.append((dsl, csl, client, server, both, dsl / slower, dsl / both, csl / dsl))
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        cells = " | ".join(f"{value:.2f}" for value in middle)
        print(f"| {split} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
