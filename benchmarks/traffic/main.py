"""Bytes against accuracy: CSL and DSL with codecs, sent seldom, late, or once.

1,000 training and 5,000 test images of CIFAR-10, ResNet-20, batch 128, 30 epochs, crops and
flips, several seeds; cut at m and at d with one client, at m with three clients whose shares are dealt
by dirichlet:0.3, and at m with one client for 50 epochs. Every run is a server and its clients, each a
process of its own; bytes are those that the meter counted while training: all kinds but `evaluation`,
framing included, up and down.

    python benchmarks/traffic/main.py IMAGES.npz [--results runs/traffic.jsonl] [--seeds 3] [--at-once 2]
    python benchmarks/traffic/main.py --results benchmarks/traffic/results.jsonl

What has finished is a line of --results and is not repeated, unless its settings were others. Table and
picture are of what has finished; without images nothing is run. IMAGES.npz holds train_images
(N, 32, 32, 3) uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
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
TITLES = {
    "m": "one client, cut at m",
    "d": "one client, cut at d",
    "3 non-IID": "three clients, dirichlet:0.3, cut at m",
    "50 epochs": "one client, cut at m, 50 epochs",
}
PLACES: dict[str, dict[str, Setting]] = {
    "m": {"split": "m"},
    "d": {"split": "d"},
    "3 non-IID": {"split": "m", "clients": 3, "partition": "dirichlet:0.3", "sync": "average"},
    "50 epochs": {"split": "m", "epochs": 50},
}
ONCE: dict[str, Setting] = {"method": "ampere"}
ROWS: dict[str, dict[str, Setting]] = {
    "CSL": {"method": "csl"},
    "CSL fp16": {"method": "csl", "codec": ["activations=fp16+zstd", "gradients=fp16+zstd"]},
    "CSL bf16": {"method": "csl", "codec": ["activations=bf16+zstd", "gradients=bf16+zstd"]},
    "CSL fp8": {"method": "csl", "codec": ["activations=fp8+zstd", "gradients=fp8+zstd"]},
    "CSL int8": {"method": "csl", "codec": ["activations=int8+zstd", "gradients=int8+zstd"]},
    "CSL int4, int8": {"method": "csl", "codec": ["activations=int4+zstd", "gradients=int8+zstd"]},
    "CSL topk": {"method": "csl", "codec": ["activations=int4+zstd", "gradients=topk:0.1+zstd"]},
    "CSL topk, feedback": {
        "method": "csl",
        "codec": ["activations=int4+zstd", "gradients=topk:0.1+zstd+ef"],
    },
    "CSL randtopk": {
        "method": "csl",
        "codec": ["activations=int4+zstd", "gradients=randtopk:0.1:0.1+zstd"],
    },
    "DSL": {"method": "dsl"},
    "DSL fp16": {"method": "dsl", "codec": "activations=fp16+zstd"},
    "DSL bf16": {"method": "dsl", "codec": "activations=bf16+zstd"},
    "DSL fp8": {"method": "dsl", "codec": "activations=fp8+zstd"},
    "DSL int8": {"method": "dsl", "codec": "activations=int8+zstd"},
    "DSL int4": {"method": "dsl", "codec": "activations=int4+zstd"},
    "DSL int3": {"method": "dsl", "codec": "activations=int3+zstd"},
    "DSL int2": {"method": "dsl", "codec": "activations=int2+zstd"},
    "DSL topk": {"method": "dsl", "codec": "activations=topk:0.1+zstd"},
    "DSL randtopk": {"method": "dsl", "codec": "activations=randtopk:0.1:0.1+zstd"},
    "DSL int4, 1 in 4": {"method": "dsl", "codec": "activations=int4+zstd", "send_every": 4},
    "DSL int4, 1 in 4, replay": {
        "method": "dsl",
        "codec": "activations=int4+zstd",
        "send_every": 4,
        "replay": "64MB",
        "reuse": 4,
    },
    "DSL int4, 1 epoch in 6, replay": {
        "method": "dsl",
        "codec": "activations=int4+zstd",
        "send_every_epochs": 6,
        "replay": "64MB",
        "reuse": 6,
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
    "DSL, budget 1/100, replay": {"method": "dsl", "budget": "39MB", "replay": "64MB", "reuse": 6},
    "once int4": {**ONCE, "codec": "activations=int4+zstd"},
    "once int3": {**ONCE, "codec": "activations=int3+zstd"},
    "once int2": {**ONCE, "codec": "activations=int2+zstd"},
    "once int4, mean of 3": {**ONCE, "codec": "activations=int4+zstd", "sync_every": 3},
    "once int3, mean of 3": {**ONCE, "codec": "activations=int3+zstd", "sync_every": 3},
}
AT: dict[str, Sequence[str]] = {
    "m": tuple(row for row in ROWS if "mean" not in row),
    "d": (
        *("CSL", "CSL int8", "CSL int4, int8", "DSL", "DSL int8", "DSL int4", "DSL int3", "DSL int2"),
        *("DSL int4, 1 in 4, replay", "DSL int4, last 5, replay", "once int4", "once int3", "once int2"),
    ),
    "3 non-IID": ("CSL", "DSL", "DSL int4", "once int4", "once int4, mean of 3", "once int3, mean of 3"),
    "50 epochs": ("CSL", "DSL", "DSL int4", "once int4", "once int3"),
}
FIRST = ("CSL", "DSL", "DSL int4", "DSL int3", "once int4", "once int3", "once int4, mean of 3")


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    place: str
    row: str
    settings: Mapping[str, Setting]
    accuracy: float
    up: int  # bytes of training
    down: int
    day: str

    @property
    def seed(self) -> int:
        seed = self.settings["seed"]
        assert isinstance(seed, int)
        return seed

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

    @property
    def settings(self) -> dict[str, Setting]:
        """All but where the images lie."""
        settings = {**COMMON, **ROWS[self.row], **PLACES[self.place], "seed": self.seed}
        if settings["method"] == "ampere":
            settings["method_arg"] = f"server_epochs={settings['epochs']}"  # as many steps as in DSL
        return settings


def cells(seeds: int, places: Sequence[str], rows: Sequence[str]) -> Iterator[Cell]:
    """What the headlines are made of first, with all its seeds."""
    for headline in (True, False):
        for seed in range(seeds):
            for place in places:
                for row in AT[place]:
                    if row in rows and (row in FIRST) is headline:
                        yield Cell(place, row, seed)


class Store:
    """Finished runs, a line of JSON each. A run of other settings than a cell's is not that cell's."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        lines = file.read_text().splitlines() if file.exists() else []
        self._results = [Result(**json.loads(line)) for line in lines]

    def get(self, cell: Cell) -> Result | None:
        told = json.loads(json.dumps(cell.settings))
        with self._lock:
            return next((result for result in self._results if result.settings == told), None)

    def add(self, result: Result) -> None:
        with self._lock, self._file.open("a") as file:
            self._results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")


def run(cell: Cell, images: Path, store: Store) -> None:
    """Unless it has been run. One that fails says why, and is tried again the next time."""
    if store.get(cell):
        return
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment({**cell.settings, "data": f"npz:{images}"}, Path(folder))
        try:
            launch(experiment)
        except LaunchError as error:
            print(f"{cell}: {error}", file=sys.stderr, flush=True)
            return
        result = _measured(cell, experiment.server_folder)
    store.add(result)
    told = f"{result.accuracy:.4f}, {result.bytes / 1e6:,.2f} MB"
    print(f"{cell.place}, {cell.row}, seed {cell.seed}: {told}", file=sys.stderr, flush=True)


def _measured(cell: Cell, folder: Path) -> Result:
    summary = json.loads((folder / "summary.json").read_text())
    up, down = (
        sum(n for kind, n in summary["wire"][way].items() if kind != "evaluation") for way in ("up", "down")
    )
    accuracy, day = summary["test"]["accuracy"], str(date.today())
    return Result(cell.place, cell.row, cell.settings, accuracy, up, down, day)


# ---------------------------------------------------------------- what came of it


def collect(store: Store, seeds: int) -> Results:
    return {
        place: {
            row: [result for seed in range(seeds) if (result := store.get(Cell(place, row, seed)))]
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
    base = {run.seed: run.accuracy for run in rows["DSL"]}
    differences = [run.accuracy - base[run.seed] for run in runs if run.seed in base]
    return f"{100 * statistics.mean(differences):+.1f} points" if differences else "–"


def picture(results: Results, file: Path) -> None:
    """Accuracy against bytes: a panel for each place, a numbered point for each row, its seeds as a bar."""
    matplotlib.use("Agg")
    shown = {place: rows for place, rows in results.items() if any(rows.values())}
    figure = Figure(figsize=(5.2 * len(shown), 6.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (place, rows) in zip(panels, shown.items(), strict=True):
        _panel(axes, place, {row: runs for row, runs in rows.items() if runs})
    panels[0].set_ylabel("test accuracy, mean of the seeds")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, place: str, rows: Mapping[str, Sequence[Result]]) -> None:
    colours = {"CSL": "#c44e52", "DSL": "#4c72b0", "once": "#55a868"}
    for number, (row, runs) in enumerate(rows.items(), 1):
        colour = colours[row.replace(",", "").split()[0]]
        megabytes = statistics.mean(run.bytes for run in runs) / 1e6
        values = [run.accuracy for run in runs]
        axes.vlines(megabytes, min(values), max(values), colors=colour, alpha=0.4, linewidth=3)
        label = f"{number}  {row}, {megabytes:,.{0 if megabytes > 100 else 1}f} MB"
        axes.plot(megabytes, _accuracy(runs), "o", color=colour, markersize=11, alpha=0.85, label=label)
        axes.annotate(
            str(number), (megabytes, _accuracy(runs)), ha="center", va="center", fontsize=7, color="white"
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB sent to train, up and down")
    axes.set_title(TITLES[place])
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=7, frameon=False)


def heading(results: Results) -> str:
    days = sorted({run.day for rows in results.values() for runs in rows.values() for run in runs})
    return (
        f"{' to '.join(days[:1] + days[1:][-1:])}, {platform.machine()}, {os.cpu_count()} cores, CPU, one "
        f"thread a process, Python {platform.python_version()}, torch {torch.__version__}, grpcio "
        f"{grpc.__version__}:"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="an npz file; none: only tell what has finished")
    parser.add_argument("--results", type=Path, default=Path("runs/traffic.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("runs/traffic.png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time: nothing is timed")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    store = Store(options.results)
    if options.images:
        images = options.images.resolve()
        with ThreadPoolExecutor(options.at_once) as pool:
            todo = cells(options.seeds, options.places, options.rows)
            list(pool.map(lambda cell: run(cell, images, store), todo))
    results = collect(store, options.seeds)
    print(heading(results), "", *table(results), sep="\n")
    picture(results, options.picture)


if __name__ == "__main__":
    main()
