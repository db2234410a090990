"""Every method on the same network, images and budget of samples, with ten clients.

2,000 training and 1,000 test images of CIFAR-10, ResNet-8 cut after its second block, batch 16, 10 epochs,
no augmentation, dealt out alike (iid) and by a Dirichlet distribution (dirichlet:0.1), several seeds.

Seed 0 runs as a server and ten clients, each a process of its own: its bytes and seconds are measured. The
other seeds run in one thread (dsl_lab.simulate), which gives the same weights bit for bit: the tests hold
the real system to it, and `--check ROW` compares the two here. What has finished is kept in --out and not
repeated, unless its settings were others; so is what has failed: remove its folder to try it again.

    python benchmarks/methods/main.py IMAGES.npz [--out runs/methods] [--seeds 3] [--only psl sglr] [--table]

IMAGES.npz holds train_images (N, 32, 32, 3) uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import torch

from common.errors import SplitLearningError
from common.methods import build_method, settled
from common.methods.base import ClientPart
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import defaults_from
from dsl_client import batches as dealing
from dsl_client import data
from dsl_lab.launch import Experiment, LaunchError, Setting, launch
from dsl_lab.simulate import federate

COMMON: dict[str, Setting] = {
    "clients": 10,
    "model": "resnet8",
    "split": "2",
    "head": "strided",  # the best of benchmarks/accuracy
    "batch_size": 16,
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
    "dsl-lambda": {"method": "dsl", "sync": "average", "method_arg": ["lambda_=0.5", "q=2"]},
    "dsl-modules": {"method": "dsl", "sync": "average", "client_modules": 2, "server_modules": 2},
    "cse-fsl": {"method": "cse-fsl"},
    "fsl-sage": {"method": "fsl-sage", "method_arg": ["l=2"]},
    "ampere": {"method": "ampere", "method_arg": ["server_batch=16"]},
    "ushape": {"method": "ushape", "sync": "average"},
    "ushape-dsl": {"method": "ushape", "sync": "average", "method_arg": ["learning=dsl"]},
    "fedavg": {"method": "fedavg"},
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


def simulated(folder: Path, settings: Mapping[str, Setting]) -> Result:
    """The same run in one thread, with nothing between clients and server; only its accuracy counts."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        result = Result(settings, accuracy=_simulated(settings), whole=time.perf_counter() - start)
    except SplitLearningError as error:
        result = Result(settings, failed=str(error), whole=time.perf_counter() - start)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1))
    return result


def _simulated(settings: Mapping[str, Setting]) -> float:
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    given["method_arg"] = (arg,) if isinstance(arg := given.get("method_arg", ()), str) else arg
    run = settled(replace(defaults_from(None, None), **given))
    method, cpu = build_method(run), torch.device("cpu")
    train, test = (
        dealing.limited(images, limit, run.seed)
        for images, limit in zip(
            data.load(run.data, run.image_shape, run.class_count),
            (run.train_limit, run.test_limit),
            strict=True,
        )
    )
    shares = dealing.partition(train.labels, run.partition, run.clients, run.seed)
    batches = [
        dealing.Batches(
            train, mine, run.batch_size, seed=run.seed, client=client, augment=run.augment, device=cpu
        )
        for client, mine in enumerate(shares)
    ]
    clients = [client_part(run, method, build(run), cpu) for _ in shares]
    hosting = Hosting(run, method, server_part(run, method, build(run), cpu))
    federate(run, method, clients, hosting, batches)
    scored = clients if run.sync == "none" else clients[-1:]  # else the parts are one and the same
    exam = dealing.Batches(test, None, run.batch_size, seed=run.seed, shuffle=False, device=cpu)
    right = sum(_right(part, hosting, x, y) for part in scored for x, y in exam.epoch(0))
    return right / (len(scored) * exam.samples)


@torch.no_grad()
def _right(part: ClientPart, hosting: Hosting, x: torch.Tensor, y: torch.Tensor) -> int:
    for module in part.modules.values():
        module.eval()
    u = hosting.output(part.bottom(x))
    logits = u if part.tail is None else part.tail(u)
    return int((logits.argmax(1) == y).sum())


def check(images: Path, out: Path, rows: Iterable[str]) -> None:
    """Runs seed 0 of these rows in one thread too, and tells whether the accuracies are the same."""
    for row in rows:
        for partition in PARTITIONS:
            settings = settings_of(images, row, partition, 0)
            real = kept_or_run(folder_of(out, row, partition, 0), settings)
            alone = simulated(folder_of(out / "simulated", row, partition, 0), settings)
            verdict = "the same" if real.accuracy == alone.accuracy else "NOT the same"
            print(f"{row}, {partition}: {real.accuracy} and {alone.accuracy}: {verdict}")


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
        result = run(folder, settings) if settings["seed"] == 0 else simulated(folder, settings)
        outcome = result.failed or f"accuracy {result.accuracy:.3f}"
        print(f"{'/'.join(folder.parts[-3:])}: {outcome}, {result.whole:.0f} s", file=sys.stderr, flush=True)
    return result


def simulate_all(images: Path, out: Path, seeds: int, rows: Sequence[str]) -> None:
    """All that runs in one thread, on all cores; nothing is timed meanwhile."""
    places = [(row, p, seed) for seed in range(1, seeds) for p in PARTITIONS for row in rows]
    folders = [folder_of(out, *place) for place in places]
    settings = [settings_of(images, *place) for place in places]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(kept_or_run, folders, settings))


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
    flags = (
        f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in ROWS[row].items()
    )
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
    """Of the runs that were measured: bytes of both partitions are alike, seconds their median."""
    ended = [result for results in there.values() for result in results if result.wall]
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
    parser.add_argument("--check", nargs="+", choices=ROWS, help="compare the wire with one thread")
    options = parser.parse_args()
    images = options.images.resolve()
    if options.check:
        check(images, options.out, options.check)
        return
    if not options.table:
        simulate_all(images, options.out, options.seeds, options.only)
    result_of = finished if options.table else kept_or_run
    results = collect(images, options.out, options.seeds, result_of, options.only)
    print(heading(results), "", *table(results), "", sep="\n")
    print(*verdicts(results), sep="\n")


if __name__ == "__main__":
    main()
