"""Every method on the same network, images and budget of samples, with ten clients in real processes.

2,000 training and 1,000 test images of CIFAR-10, ResNet-8 cut after its first block, batch 32, 10 epochs,
no augmentation, dealt out alike (iid) and by a Dirichlet distribution (dirichlet:0.1), several seeds. Runs
go seed by seed, so that stopping early leaves a whole table of fewer seeds. What has finished is kept in
--out and not repeated, unless its settings were others; so is what has failed: remove its folder to try
it again.

    python benchmarks/methods/main.py IMAGES.npz [--out runs/methods] [--seeds 3] [--only psl sglr] [--table]

IMAGES.npz holds train_images (N, 32, 32, 3) uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import torch

from dsl_lab.launch import Experiment, LaunchError, Setting, launch

COMMON: dict[str, Setting] = {
    "clients": 10,
    "model": "resnet8",
    "split": "1",
    "head": "strided",  # the best of benchmarks/accuracy
    "batch_size": 32,
    "epochs": 10,
    "train_limit": 2000,
    "test_limit": 1000,
    "augment": False,
    "eval_every": 0,
    "fixed_order": True,  # so that a run repeats
}
PARTITIONS = ("iid", "dirichlet:0.1")
ROWS: dict[str, dict[str, Setting]] = {
    "csl-relay": {"method": "csl", "sync": "relay"},
    "psl": {"method": "psl"},
    "splitfed-v1": {"method": "splitfed-v1"},
    "splitfed-v2": {"method": "splitfed-v2"},
    "splitfed-v3": {"method": "splitfed-v3"},
    "sglr": {"method": "sglr"},
    "sglr-sqrt": {"method": "sglr", "method_arg": "alpha=0.5"},
    "gapsl": {"method": "gapsl"},
    "gapsl-direction": {"method": "gapsl", "method_arg": "gda=direction"},
    "gapsl-exact": {"method": "gapsl", "method_arg": "gda=exact"},
    "epsl": {"method": "epsl"},
    "cyclesl": {"method": "cyclesl"},
    "cyclesl-average": {"method": "cyclesl", "sync": "average"},
    "dsl": {"method": "dsl"},
    "dsl-average": {"method": "dsl", "sync": "average"},
    "dsl-relay": {"method": "dsl", "sync": "relay"},
    "cse-fsl": {"method": "cse-fsl"},
}
# What the papers say: the partition, who is above, who is below.
CLAIMS = (
    ("iid", "sglr", "psl"),
    ("dirichlet:0.1", "gapsl", "splitfed-v1"),
    ("dirichlet:0.1", "splitfed-v1", "psl"),
)


@dataclass(frozen=True)
class Result:
    """What one run came to. `failed`: why it did not end; the numbers are then 0."""

    settings: Mapping[str, Setting]
    failed: str = ""
    accuracy: float = 0.0
    up: int = 0  # bytes of training: all but what is sent to be scored
    down: int = 0
    wall: float = 0.0  # seconds, from the first client's arrival to the end, scoring included
    whole: float = 0.0  # seconds, with the start of all processes


Results = Mapping[str, Mapping[str, Sequence[Result]]]  # by row and partition, in the order of seeds


# ---------------------------------------------------------------- runs


def settings_of(images: Path, row: str, partition: str, seed: int) -> dict[str, Setting]:
    return {**COMMON, **ROWS[row], "partition": partition, "data": f"npz:{images}", "seed": seed}


def folder_of(out: Path, row: str, partition: str, seed: int) -> Path:
    return out / row / partition.replace(":", "-") / str(seed)


def finished(folder: Path, settings: Mapping[str, Setting]) -> Result | None:
    """The run that has ended there, if it was of these settings. Where the images lie does not count."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text()))
    return result if _told(result.settings) == _told(settings) else None


def _told(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {name: value for name, value in settings.items() if name != "data"}


def run(folder: Path, settings: Mapping[str, Setting]) -> Result:
    """Runs it in the folder, which it empties first."""
    shutil.rmtree(folder, ignore_errors=True)
    experiment, start = Experiment(settings, folder), time.perf_counter()
    try:
        launch(experiment)
        summary = json.loads((experiment.server_folder / "summary.json").read_text())
        result = Result(settings, whole=time.perf_counter() - start, **_numbers(summary))
    except LaunchError as error:
        result = Result(settings, failed=_reason(error), whole=time.perf_counter() - start)
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1))
    return result


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    bytes_of = {
        way: sum(n for kind, n in summary["wire"][way].items() if kind != "evaluation")
        for way in ("up", "down")
    }
    return {"accuracy": summary["test"]["accuracy"], "wall": summary["seconds"]["wall"], **bytes_of}


def _reason(error: LaunchError) -> str:
    """The first process's last words: the server's, where it has failed."""
    words = str(error).rpartition(" (logs in ")[0] or str(error)
    return words.split("; dsl-", 1)[0]


def collect(
    images: Path,
    out: Path,
    seeds: int,
    result_of: Callable[[Path, Mapping[str, Setting]], Result | None],
    rows: Iterable[str],
) -> Results:
    """A result for each row, partition and seed that `result_of` has one for; seed by seed."""
    results: dict[str, dict[str, list[Result]]] = {row: {p: [] for p in PARTITIONS} for row in rows}
    for seed in range(seeds):
        for partition in PARTITIONS:
            for row, there in results.items():
                settings = settings_of(images, row, partition, seed)
                result = result_of(folder_of(out, row, partition, seed), settings)
                if result is not None:
                    there[partition].append(result)
    return results


def kept_or_run(folder: Path, settings: Mapping[str, Setting]) -> Result:
    result = finished(folder, settings)
    if result is None:
        result = run(folder, settings)
        outcome = result.failed or f"accuracy {result.accuracy:.3f}"
        print(f"{'/'.join(folder.parts[-3:])}: {outcome}, {result.whole:.0f} s", file=sys.stderr, flush=True)
    return result


# ---------------------------------------------------------------- the table


def table(results: Results) -> Iterator[str]:
    """Markdown, line by line: a row for each method that has any result."""
    heads = ["method", "settings", *(f"accuracy, {p}" for p in PARTITIONS)]
    heads += ["MB up", "MB down", "wall, s"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * 2}{'---:|' * (len(heads) - 2)}"
    for row, there in results.items():
        if any(there.values()):
            cells = [row, _settings(row), *(_accuracy(there[p]) for p in PARTITIONS), *_costs(there)]
            yield f"| {' | '.join(cells)} |"


def _settings(row: str) -> str:
    """As flags of dsl-server."""
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in ROWS[row].items())
    return f"`{' '.join(flags)}`"


def _accuracy(results: Sequence[Result]) -> str:
    """Mean over the seeds that ended, the lowest and the highest, and how many failed."""
    values = [result.accuracy for result in results if not result.failed]
    failed = len(results) - len(values)
    if not values:
        return "failed" if failed else "–"
    note = f", {failed} of {len(results)} failed" if failed else ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}){note}"


def _costs(there: Mapping[str, Sequence[Result]]) -> list[str]:
    """Medians over all the runs of a row that ended."""
    ended = [result for results in there.values() for result in results if not result.failed]
    if not ended:
        return ["–"] * 3
    up, down, wall = (
        statistics.median(getattr(result, name) for result in ended) for name in ("up", "down", "wall")
    )
    return [f"{up / 1e6:,.1f}", f"{down / 1e6:,.1f}", f"{wall:.1f}"]


def verdicts(results: Results) -> Iterator[str]:
    """Under the table: the methods by accuracy, what the papers say of it, and what failed and why."""
    for partition in PARTITIONS:
        means = {row: _mean(there[partition]) for row, there in results.items()}
        ended = {row: mean for row, mean in means.items() if mean is not None}
        order = sorted(ended, key=lambda row: -ended[row])
        ranking = " > ".join(f"{row} {ended[row]:.3f}" for row in order)
        yield f"- By accuracy, {partition}: {ranking or 'nothing has finished'}."
    for partition, above, below in CLAIMS:
        first, second = (_mean(results.get(row, {}).get(partition, ())) for row in (above, below))
        yield f"- {above} above {below}, {partition}: {_verdict(first, second)}."
    for row, there in results.items():
        for partition, runs in there.items():
            for failed in (result for result in runs if result.failed):
                yield f"- Failed: {row}, {partition}, seed {failed.settings['seed']}: {failed.failed}"


def _mean(results: Sequence[Result]) -> float | None:
    """None where no run has ended."""
    values = [result.accuracy for result in results if not result.failed]
    return statistics.mean(values) if values else None


def _verdict(above: float | None, below: float | None) -> str:
    if above is None or below is None:
        return "not known, since one of them has no accuracy"
    return f"{'yes' if above > below else 'no'} ({above:.3f} and {below:.3f})"


def heading(results: Results) -> str:
    runs = [runs for there in results.values() for runs in there.values() if runs]
    repetitions = sorted({len(seeds) for seeds in runs})
    seeds = " or ".join(map(str, repetitions)) or "no"
    common = ", ".join(f"{name} {value}" for name, value in COMMON.items())
    return (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, CPU, one thread a process, "
        f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}; "
        f"{seeds} seed{'s' if repetitions != [1] else ''} a cell, from 0; {common}:"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="an npz file")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="some of the rows")
    parser.add_argument("--table", action="store_true", help="run nothing: tell what has finished")
    options = parser.parse_args()
    images = options.images.resolve()
    result_of = finished if options.table else kept_or_run
    results = collect(images, options.out, options.seeds, result_of, options.only)
    print(heading(results), "", *table(results), "", sep="\n")
    print(*verdicts(results), sep="\n")


if __name__ == "__main__":
    main()
