"""Does a client that chooses what it sends train at full speed over a slow link?

Real server and client processes, each with one core and one thread; between them an emulated link
(dsl_lab/link.py). For each link and each way of sending: the client's samples per second, from its first
batch to the server's last receipt, against those of the same client without a link, and of one that sends
nothing. One repetition runs all rows, one after the other; ratios are of the same repetition.

    python benchmarks/link/main.py [IMAGES.npz] [--samples 2048] [--epochs 6] [--repetitions 3]
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import grpc
import torch

from dsl_lab.launch import Experiment, Setting, launch
from dsl_lab.link import Link

SERVER_CORE, CLIENT_CORE = 0, 1
DELAY_S = 0.02  # one way
MBIT = 1e6 / 8  # bytes per second
COMMON: dict[str, Setting] = {"model": "resnet20", "split": "m", "augment": False, "eval_every": 0}


@dataclass(frozen=True)
class Row:
    """link: Mbit/s each way, or none. brief: so slow that one epoch of three batches must do."""

    sent: str
    link: float | None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    brief: bool = False

    @property
    def learns(self) -> bool:
        """Whether the accuracy can be compared."""
        return self.sent != "nothing" and not self.brief


AUTO: dict[str, Setting] = {"link": "auto"}
ROWS = (
    Row("nothing", None, {"budget": "1kB"}),
    Row("chosen", None, AUTO),
    Row("chosen", 100, AUTO),
    Row("chosen", 10, AUTO),
    Row("chosen", 2, AUTO),
    Row("int4+zstd", 10, {"codec": ["activations=int4+zstd"]}),
    Row("fp32", 10, brief=True),
)


@dataclass(frozen=True)
class Measured:
    """speed: samples per second. sent: bytes to train on."""

    speed: float
    batches: Counter[str]
    sent: int
    accuracy: float


def measure(row: Row, options: argparse.Namespace, out: Path) -> Measured:
    settings = {**COMMON, **row.settings, "epochs": options.epochs, "train_limit": options.samples}
    settings["test_limit"] = options.test
    if options.images:
        settings["data"] = f"npz:{options.images.resolve()}"
    if row.brief:
        settings |= {"epochs": 1, "train_limit": 3 * 128, "test_limit": 100}
    link = partial(Link, rate=row.link * MBIT, delay=DELAY_S) if row.link else None
    launch(Experiment(settings, out, cores=[SERVER_CORE, CLIENT_CORE], link=link))
    client = json.loads((out / "client-0" / "summary.json").read_text())
    test = json.loads((out / "server" / "summary.json").read_text())["test"]
    speed = client["samples"] / client["seconds"]["train"]
    sent = client["wire"]["up"]["activations"]
    return Measured(speed, Counter(client.get("batches", {})), sent, test["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", type=Path, help="an npz file; else the package's sample")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, one core a side, Python {platform.python_version()}, ")
    print(f"torch {torch.__version__}, grpcio {grpc.__version__}; resnet20 cut at m, batch 128, ")
    print(f"{options.samples} images, {options.epochs} epochs; medians of {options.repetitions} interleaved ")
    print("repetitions\n")
    measured: list[list[Measured]] = [[] for _ in ROWS]
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        for repetition in range(options.repetitions):
            for index, row in enumerate(ROWS):
                measured[index].append(measure(row, options, out / f"{repetition}-{index}"))
    heads = ["link", "sent", "samples/s", "to no link", "to nothing sent", "batches", "MB up", "accuracy"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row, runs in zip(ROWS, measured, strict=True):
        print(line(row, runs, measured[0], measured[1]))


def line(row: Row, runs: Sequence[Measured], idle: Sequence[Measured], free: Sequence[Measured]) -> str:
    """A row of the table: medians, and what was sent over all repetitions. idle: that sent nothing. free:
    without a link."""
    speed = statistics.median(run.speed for run in runs)
    total = sum((run.batches for run in runs), Counter[str]())
    batches = ", ".join(f"{100 * n / total.total():.0f}% {name}" for name, n in total.most_common())
    sent = statistics.median(run.sent for run in runs) / 1e6
    accuracy = f"{statistics.median(run.accuracy for run in runs):.3f}" if row.learns else "–"
    where = f"{row.link:g} Mbit/s" if row.link else "none"
    cells = [where, row.sent, f"{speed:.0f}", ratio(runs, free), ratio(runs, idle), batches or "all"]
    return f"| {' | '.join([*cells, f'{sent:.1f}', accuracy])} |"


def ratio(runs: Sequence[Measured], others: Sequence[Measured]) -> str:
    pairs = zip(runs, others, strict=True)
    return f"{statistics.median(run.speed / other.speed for run, other in pairs):.2f}"


if __name__ == "__main__":
    main()
