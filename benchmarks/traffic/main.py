"""Bytes against accuracy: CSL and DSL with codecs, sent seldom, late, or once.

1,000 training and 5,000 test images of CIFAR-10, ResNet-20, batch 128, 30 epochs, crops and
flips, several seeds; cut at m and at d with one client, and at m with three clients whose shares are dealt
by dirichlet:0.3. Every run is a server and its clients, each a process of its own; bytes are those that the
meter counted while training: all kinds but `evaluation`, framing included, up and down.

    python benchmarks/traffic/main.py IMAGES.npz [--out runs/traffic] [--seeds 3] [--only m-csl ...]
                                                 [--at-once 2] [--table]

What has finished is kept in --out and not repeated, unless its settings were others. The table and
traffic.png (in --out) are of what has finished. IMAGES.npz holds train_images (N, 32, 32, 3) uint8,
train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import grpc
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsl_lab.launch import Experiment, LaunchError, Setting, launch

COMMON: dict[str, Setting] = {
    "model": "resnet20",
    "head": "strided",  # the best of benchmarks/accuracy
    "epochs": 30,
    "train_limit": 1000,
    "test_limit": 5000,
    "eval_every": 0,
    "fixed_order": True,  # so that a run repeats
}
PLACES: dict[str, dict[str, Setting]] = {
    "m": {"split": "m"},
    "d": {"split": "d"},
    "3 non-IID": {"split": "m", "clients": 3, "partition": "dirichlet:0.3", "sync": "average"},
}
ONCE: dict[str, Setting] = {"method": "ampere", "method_arg": "server_epochs=30"}
ROWS: dict[str, dict[str, Setting]] = {
    "CSL": {"method": "csl"},
    "CSL int8": {"method": "csl", "codec": ["activations=int8+zstd", "gradients=int8+zstd"]},
    "CSL int4, int8": {"method": "csl", "codec": ["activations=int4+zstd", "gradients=int8+zstd"]},
    "CSL topk": {"method": "csl", "codec": ["activations=int4+zstd", "gradients=topk:0.1+zstd"]},
    "CSL topk, feedback": {
        "method": "csl",
        "codec": ["activations=int4+zstd", "gradients=topk:0.1+zstd+ef"],
    },
    "DSL": {"method": "dsl"},
    "DSL int8": {"method": "dsl", "codec": "activations=int8+zstd"},
    "DSL int4": {"method": "dsl", "codec": "activations=int4+zstd"},
    "DSL int3": {"method": "dsl", "codec": "activations=int3+zstd"},
    "DSL int2": {"method": "dsl", "codec": "activations=int2+zstd"},
    "DSL int4, 1 in 4": {"method": "dsl", "codec": "activations=int4+zstd", "send_every": 4},
    "DSL int4, 1 in 4, replay": {
        "method": "dsl",
        "codec": "activations=int4+zstd",
        "send_every": 4,
        "replay": "64MB",
        "reuse": 4,
    },
    "DSL int4, last 5": {"method": "dsl", "codec": "activations=int4+zstd", "send_last_epochs": 5},
    "DSL int4, last 5, replay": {
        "method": "dsl",
        "codec": "activations=int4+zstd",
        "send_last_epochs": 5,
        "replay": "64MB",
        "reuse": 6,
    },
    "DSL, budget 1/100": {"method": "dsl", "budget": "39MB"},
    "once int4": {**ONCE, "codec": "activations=int4+zstd"},
    "once int3": {**ONCE, "codec": "activations=int3+zstd"},
    "once int2": {**ONCE, "codec": "activations=int2+zstd"},
    "once int4, mean of 3": {**ONCE, "codec": "activations=int4+zstd", "sync_every": 3},
    "once int3, mean of 3": {**ONCE, "codec": "activations=int3+zstd", "sync_every": 3},
}
KEY_ROWS = ("CSL", "DSL", "DSL int4", "once int4", "once int3")
AT: dict[str, Sequence[str]] = {
    "m": tuple(row for row in ROWS if "mean" not in row),
    "d": (
        *("CSL", "CSL int4, int8", "DSL", "DSL int8", "DSL int4", "DSL int3", "DSL int2"),
        *("DSL int4, 1 in 4, replay", "DSL int4, last 5, replay", "once int4", "once int3", "once int2"),
    ),
    "3 non-IID": ("CSL", "DSL", "DSL int4", "once int4", "once int4, mean of 3", "once int3, mean of 3"),
}


@dataclass(frozen=True)
class Result:
    """What one run came to. `failed`: why it did not end; the numbers are then 0."""

    settings: Mapping[str, Setting]
    failed: str = ""
    accuracy: float = 0.0
    up: int = 0  # bytes of training
    down: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return self.up + self.down


Results = Mapping[str, Mapping[str, Sequence[Result]]]  # by place and row, in the order of seeds


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Cell:
    place: str
    row: str
    seed: int

    def settings(self, images: Path) -> dict[str, Setting]:
        return {**COMMON, **ROWS[self.row], **PLACES[self.place], "data": f"npz:{images}", "seed": self.seed}

    def folder(self, out: Path) -> Path:
        words = f"{self.place} {self.row}".replace(",", "").replace("/", "-").replace(" ", "-")
        return out / words / str(self.seed)


def cells(seeds: int, only: Sequence[str]) -> Iterator[Cell]:
    """Seed by seed; the rows that the headline is made of first."""
    for seed in range(seeds):
        for key in (True, False):
            for place, rows in AT.items():
                for row in rows:
                    if (row in KEY_ROWS) is key and (not only or place in only):
                        yield Cell(place, row, seed)


def finished(cell: Cell, images: Path, out: Path) -> Result | None:
    """The run that has ended, if it was of these settings. Where the images lie does not count."""
    file = cell.folder(out) / "result.json"
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text()))
    return result if _told(result.settings) == _told(cell.settings(images)) else None


def _told(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {name: value for name, value in settings.items() if name != "data"}


def run(cell: Cell, images: Path, out: Path) -> None:
    """Unless it has been run."""
    if finished(cell, images, out):
        return
    shutil.rmtree(cell.folder(out), ignore_errors=True)  # of a run that was broken off
    settings, start = cell.settings(images), time.perf_counter()
    experiment = Experiment(settings, cell.folder(out))
    try:
        launch(experiment)
        result = _measured(settings, experiment.server_folder, time.perf_counter() - start)
    except LaunchError as error:
        result = Result(settings, failed=str(error))
    (cell.folder(out) / "result.json").write_text(json.dumps(asdict(result), indent=1))
    outcome = result.failed or f"{result.accuracy:.4f}, {result.bytes / 1e6:,.2f} MB, {result.seconds:.0f} s"
    print(f"{cell.place}, {cell.row}, seed {cell.seed}: {outcome}", file=sys.stderr, flush=True)


def _measured(settings: Mapping[str, Setting], folder: Path, seconds: float) -> Result:
    summary = json.loads((folder / "summary.json").read_text())
    up, down = (
        sum(n for kind, n in summary["wire"][way].items() if kind != "evaluation") for way in ("up", "down")
    )
    return Result(settings, accuracy=summary["test"]["accuracy"], up=up, down=down, seconds=seconds)


# ---------------------------------------------------------------- what came of it


def collect(images: Path, out: Path, seeds: int) -> Results:
    return {
        place: {
            row: [
                result
                for seed in range(seeds)
                if (result := finished(Cell(place, row, seed), images, out)) and not result.failed
            ]
            for row in rows
        }
        for place, rows in AT.items()
    }


def table(results: Results) -> Iterator[str]:
    """Markdown: bytes as a fraction of CSL's, accuracy beside that of DSL in fp32, seed by seed."""
    yield "| where | what is sent | MB up | MB down | of CSL's | accuracy, mean (each seed) | minus DSL's |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for place, rows in results.items():
        for row, runs in rows.items():
            if runs:
                yield f"| {place} | {row} | {_numbers(rows, runs)} |"


def _numbers(rows: Mapping[str, Sequence[Result]], runs: Sequence[Result]) -> str:
    up, down = (statistics.mean(getattr(run, way) for run in runs) for way in ("up", "down"))
    each = ", ".join(f"{run.accuracy:.3f}" for run in runs)
    cells = [f"{up / 1e6:,.2f}", f"{down / 1e6:,.2f}", _fraction(rows, runs)]
    return " | ".join([*cells, f"{_accuracy(runs):.3f} ({each})", _difference(rows, runs)])


def _accuracy(runs: Sequence[Result]) -> float:
    return statistics.mean(run.accuracy for run in runs)


def _fraction(rows: Mapping[str, Sequence[Result]], runs: Sequence[Result]) -> str:
    if not rows["CSL"]:
        return "–"
    return f"1/{rows['CSL'][0].bytes / statistics.mean(run.bytes for run in runs):,.0f}"


def _difference(rows: Mapping[str, Sequence[Result]], runs: Sequence[Result]) -> str:
    """Mean over the seeds that both have."""
    base = {run.settings["seed"]: run.accuracy for run in rows["DSL"]}
    differences = [run.accuracy - base[run.settings["seed"]] for run in runs if run.settings["seed"] in base]
    return f"{100 * statistics.mean(differences):+.1f} points" if differences else "–"


def picture(results: Results, file: Path) -> None:
    """Accuracy against bytes: a panel for each place, a point for each row, its seeds as a bar."""
    matplotlib.use("Agg")
    shown = {place: rows for place, rows in results.items() if any(rows.values())}
    figure = Figure(figsize=(5.2 * len(shown), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (place, rows) in zip(panels, shown.items(), strict=True):
        _panel(axes, place, rows)
    panels[0].set_ylabel("test accuracy")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, place: str, rows: Mapping[str, Sequence[Result]]) -> None:
    colours = {"CSL": "#c44e52", "DSL": "#4c72b0", "once": "#55a868"}
    for row, runs in rows.items():
        if runs:
            colour = colours[row.replace(",", "").split()[0]]
            megabytes = statistics.mean(run.bytes for run in runs) / 1e6
            values = [run.accuracy for run in runs]
            axes.vlines(megabytes, min(values), max(values), colors=colour, alpha=0.4, linewidth=3)
            axes.plot(megabytes, statistics.mean(values), "o", color=colour)
            axes.annotate(
                row, (megabytes, statistics.mean(values)), (4, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xscale("log")
    axes.set_xlabel("MB sent to train, up and down")
    axes.set_title(f"{place}: {'three clients, dirichlet:0.3' if place[0] == '3' else 'one client'}")
    axes.grid(alpha=0.3)


def heading(seeds: int) -> str:
    return (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, CPU, one thread a process, Python "
        f"{platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}; seeds 0 to "
        f"{seeds - 1} as far as they are there:"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="an npz file")
    parser.add_argument("--out", type=Path, default=Path("runs/traffic"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PLACES, default=[], help="some of the places")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of the rows")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time: nothing is timed")
    parser.add_argument("--table", action="store_true", help="run nothing: tell what has finished")
    options = parser.parse_args()
    images = options.images.resolve()
    if not options.table:
        todo = [cell for cell in cells(options.seeds, options.only) if cell.row in options.rows]
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda cell: run(cell, images, options.out), todo))
    results = collect(images, options.out, options.seeds)
    print(heading(options.seeds), "", *table(results), sep="\n")
    picture(results, options.out / "traffic.png")


if __name__ == "__main__":
    main()
