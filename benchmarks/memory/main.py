"""What a client needs of memory: by method, modules and heads, and with gradient checkpointing.

ResNet-110, batch 128, fp32, on the CPU. Bytes are those of live tensors (common/live.py), in the rules that
the programs run, with nothing between the two ends; compute is CPU seconds of a client's step on one thread,
as a ratio to a step of plain DSL right before it, the median of several. Accuracy is of
ResNet-56 cut at s, so that three modules have two blocks each (four in ResNet-110): 5,000 training and 10,000
test images of CIFAR-10, halved to 16 x 16, batch 128, 6 epochs, no augmentation, in one thread
(dsl_lab.simulate), which gives the weights of the real system bit for bit.

    python benchmarks/memory/main.py                 the four columns, and the frontier's peaks and compute
    python benchmarks/memory/main.py IMAGES.npz      its accuracies, too: 60 runs of one or two minutes
    ... [--results runs/memory.jsonl] [--seeds 10] [--rounds 5]

What has finished is a line of --results and is not repeated. IMAGES.npz holds train_images (N, 32, 32, 3)
uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from common.live import Gauge, Storages
from common.methods import build_method
from common.methods.base import Received, Sent, Smashed, run_step
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import client_part, kept_by, server_part
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches
from dsl_lab.simulate import federate

CPU, MIB, BATCH = torch.device("cpu"), 2**20, 128
HEADS = ("gap", "mlp", "strided")
MODULES = (2, 3, 4, 6)
KEPT = (6, 4, 3, 2, 1)  # blocks
PORTIONS = (2, 3, 4, 8)
PLAIN = "DSL strided"  # the best head of benchmarks/accuracy: what compute and accuracy are compared with
AIM, COMPUTE, POINTS = 0.58, 1.15, 0.01  # of CSL's peak saved; of plain DSL's compute; of its accuracy lost

COLUMNS: dict[str, dict[str, Any]] = {
    **{f"CSL at {split}": {"method": "csl", "split": split} for split in "smd"},
    **{f"DSL at {split}": {"split": split} for split in "smd"},
    **{
        f"DSL at {split}, the server in {modules}": {"split": split, "server_modules": modules}
        for split, modules in (("s", 3), ("m", 2))
    },
}
ROWS: dict[str, dict[str, Any]] = {
    "CSL": {"method": "csl"},
    **{f"CSL, keep {n}": {"method": "csl", "keep_blocks": n} for n in KEPT},
    **{f"DSL {head}": {"head": head} for head in HEADS},
    **{f"DSL strided, keep {n}": {"head": "strided", "keep_blocks": n} for n in KEPT},
    **{
        f"DSL {head}, {modules} modules": {"head": head, "client_modules": modules}
        for head in HEADS
        for modules in MODULES
    },
    **{f"DSL strided, {n} portions": {"head": "strided", "method_arg": (f"portions={n}",)} for n in PORTIONS},
    **{
        f"DSL strided, 2 portions, keep {n}": {
            "head": "strided",
            "method_arg": ("portions=2",),
            "keep_blocks": n,
        }
        for n in (9, 8)
    },
    **{
        f"DSL {head}, 2 modules, keep {n}": {"head": head, "client_modules": 2, "keep_blocks": n}
        for head in ("mlp", "strided")
        for n in (4, 3)
    },
}
# Those whose accuracy is measured. Keeping fewer blocks changes no bit, and so no accuracy.
TRAINED = (
    "DSL strided",
    "DSL strided, 2 modules",
    "DSL strided, 3 modules",
    "DSL strided, 2 portions",
    "DSL strided, 3 portions",
    "CSL",
)
SMALL: dict[str, Any] = {
    "model": "resnet56",
    "split": "s",
    "image": (3, 16, 16),
    "epochs": 6,
    "augment": False,
}


class Store:
    """Lines of JSON in a file: what has been measured, by what it is of."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self._lines = {json.dumps(line["of"]): line for line in map(json.loads, lines)}

    def get(self, *of: str | int) -> dict[str, float] | None:
        line = self._lines.get(json.dumps(of))
        return line["found"] if line else None

    def have(self, make: Callable[[], dict[str, float]], *of: str | int) -> dict[str, float]:
        """What is known of it, else what `make` finds."""
        found = self.get(*of)
        if found is None:
            found = make()
            self._lines[json.dumps(of)] = line = {"of": of, "found": found}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return found


# ---------------------------------------------------------------- memory and compute


def images() -> tuple[Tensor, Tensor]:
    """Noise: what they show does not matter to what they take."""
    return torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10


def needs(run: Run, steps: int = 2) -> dict[str, float]:
    """Bytes, of both ends in one thread. The server's step comes as early as the method lets it: while the
    client waits, or when its step is over."""
    method, net, both = build_method(run), build(run), Storages()
    client, server = client_part(run, method, net, CPU), server_part(run, method, net, CPU)
    ours, theirs = Gauge(CPU, steps), Gauge(CPU, steps)
    client_step, server_step = ours.around(method).client_step, theirs.around(method).server_step
    both.see([*kept_by(client), *kept_by(server)])

    def learn(batch: Smashed) -> Tensor | None:
        answer = server_step(server, [Received(batch.z, batch.y, 0, 0.0, not method.one_way)])
        return answer.gradients[0] if answer.gradients else None

    def step(x: Tensor, y: Tensor) -> None:
        sent: list[Smashed] = []

        def wire(batch: Sent) -> Tensor | None:
            assert isinstance(batch, Smashed), "a batch"
            return sent.append(batch) if method.one_way else learn(batch)

        run_step(client_step(client, x, y), wire)
        for batch in sent:
            learn(batch)

    for _ in range(steps):
        x, y = images()
        both.see([x, y])
        with both:
            step(x, y)
    return {"client": ours.peak, "server": theirs.peak, "held": ours.held, "both": both.peak}


class Client:
    """One of ResNet-110 cut at s, with nobody at the other end."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        run = Run(model="resnet110", split="s", **settings)
        self._method = build_method(run)
        self._part = client_part(run, self._method, build(run), CPU)

    def peak(self) -> dict[str, float]:
        """Bytes: the peak, and what is held while it waits."""
        gauge = Gauge(CPU, steps=2)
        step = gauge.around(self._method).client_step
        for _ in range(2):
            run_step(step(self._part, *images()), self._wire)
        return {"peak": gauge.peak, "held": gauge.held}

    def seconds(self) -> tuple[float, float]:
        """Of the CPU for one step: in user mode, and with the kernel's share, which gives fresh pages."""
        x, y = images()
        start = resource.getrusage(resource.RUSAGE_THREAD)
        run_step(self._method.client_step(self._part, x, y), self._wire)
        end = resource.getrusage(resource.RUSAGE_THREAD)
        user = end.ru_utime - start.ru_utime
        return user, user + end.ru_stime - start.ru_stime

    def _wire(self, sent: Sent) -> Tensor | None:
        assert isinstance(sent, Smashed), "a batch"
        return None if self._method.one_way else torch.full_like(sent.z, 1e-6)


def compute(row: str, rounds: int) -> dict[str, float]:
    """Of a step, as a ratio to one of plain DSL's right before it; the first of each warms up."""
    client, other = Client(ROWS[row]), Client(ROWS[PLAIN])
    pairs = [(other.seconds(), client.seconds()) for _ in range(1 + rounds)][1:]
    ratios = [[mine / its for its, mine in zip(*pair, strict=True)] for pair in pairs]
    compute, kernel = (statistics.median(column) for column in zip(*ratios, strict=True))
    return {"compute": compute, "with_kernel": kernel}


def plain(row: str) -> str:
    """The row that this one is a variant of."""
    return row.partition(",")[0]


# ---------------------------------------------------------------- accuracy


def halved(images: data.Dataset) -> data.Dataset:
    """Images of half the side: the means of four pixels."""
    return replace(images, inputs=F.avg_pool2d(images.inputs.float(), 2).round().to(torch.uint8))


def accuracy(file: Path, row: str, seed: int) -> dict[str, float]:
    """Of the joined network, after a whole run in one thread."""
    start = time.process_time()
    run = Run(**SMALL, **ROWS[row], data=f"npz:{file}", seed=seed)
    method = build_method(run)
    train, test = map(halved, data.load(run.data, (3, 32, 32), run.class_count))
    batches = Batches(train, None, run.batch_size, seed=run.seed, device=CPU)
    client = client_part(run, method, build(run), CPU)
    hosting = Hosting(run, method, server_part(run, method, build(run), CPU))
    federate(run, method, [client], hosting, [batches])
    client.bottom.eval()
    exam = Batches(test, None, run.batch_size, seed=0, shuffle=False, device=CPU)
    with torch.no_grad():
        right = sum(hosting.score(client.bottom(x), y)[0] for x, y in exam.epoch(0))
    return {"accuracy": right / exam.samples, "seconds": time.process_time() - start}


# ---------------------------------------------------------------- what is shown


def columns(store: Store) -> Iterator[str]:
    yield "| | client peak | server peak | held while waiting | one process for both |\n|---|---|---|---|---|"
    for row, settings in COLUMNS.items():
        found = store.have(partial(needs, Run(model="resnet110", **settings)), "columns", row)
        cells = (f"{found[name] / MIB:.1f}" for name in ("client", "server", "held", "both"))
        yield f"| {row} | {' | '.join(cells)} |"


def scores(store: Store, row: str, seeds: int) -> list[float]:
    found = (store.get("accuracy", row, seed) for seed in range(seeds))
    return [each["accuracy"] for each in found if each]


def lost(store: Store, row: str, seeds: int) -> list[float]:
    """Points below plain DSL with the best head, seed by seed; negative: above it."""
    pairs = ((store.get("accuracy", PLAIN, s), store.get("accuracy", row, s)) for s in range(seeds))
    return [100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs if one and other]


def frontier(store: Store, rounds: int) -> dict[str, dict[str, float]]:
    found = {row: store.have(Client(ROWS[row]).peak, "peak", row) for row in ROWS}
    return {
        row: {**client, **store.have(partial(compute, row, rounds), "compute", row)}
        for row, client in found.items()
    }


def table(store: Store, found: Mapping[str, Mapping[str, float]], seeds: int) -> Iterator[str]:
    yield "| | peak | below CSL | held | compute | with the kernel's | accuracy (each seed) | points lost |"
    yield "|---|---|---|---|---|---|---|---|"
    most = found["CSL"]["peak"]
    for row, client in found.items():
        bits = row.partition(", keep")[0]  # of this row, to the last one
        each, less = scores(store, bits, seeds), lost(store, bits, seeds)
        cells = [
            f"{client['peak'] / MIB:.1f}",
            f"{1 - client['peak'] / most:.1%}",
            f"{client['held'] / MIB:.1f}",
            f"{client['compute']:.2f}",
            f"{client['with_kernel']:.2f}",
            f"{statistics.mean(each):.3f} ({', '.join(f'{a:.3f}' for a in each)})" if each else "",
            _with_error(less),
        ]
        yield f"| {row} | {' | '.join(cells)} |"


def _with_error(values: Sequence[float]) -> str:
    """Their mean and, of several, its standard error."""
    if len(values) < 2 or not any(values):
        return f"{statistics.mean(values):.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


COLOURS = {"CSL": "#D55E00", "gap": "#56B4E9", "mlp": "#009E73", "strided": "#0072B2"}
KINDS = {"modules": ("o", "-"), "keep": ("s", ":"), "portions": ("^", "--")}
BOTH = ("DSL strided, 2 modules, keep 4", "DSL strided, 2 portions, keep 9")


def picture(store: Store, found: Mapping[str, Mapping[str, float]], seeds: int, file: Path) -> None:
    matplotlib.use("Agg")
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        figure.suptitle("ResNet-110 cut at s, batch 128: a client's memory, and what less of it costs")
        most = found["CSL"]["peak"] / MIB
        left, right = figure.subplots(1, 2, sharex=True)
        for axes in (left, right):
            axes.axvspan(0, (1 - AIM) * most, color="#E8F3E8", zorder=0)
            axes.set(xlabel="client's peak of live tensors, MiB (green: asked)", xlim=(45, most * 1.08))
            axes.grid(color="#E6E6E6")
            axes.set_axisbelow(True)
        _costs(left, found)
        _losses(right, found, store, seeds)
        figure.savefig(file, dpi=150)


def _costs(axes: Axes, found: Mapping[str, Mapping[str, float]]) -> None:
    """A curve for each way of needing less, from the row without it."""
    axes.set(title="compute", ylabel=f"CPU time of a client's step / that of {PLAIN}")
    for start in ("CSL", *(f"DSL {head}" for head in HEADS)):
        for kind, (marker, line) in KINDS.items():
            rows = [row for row in found if plain(row) == start and row.count(",") == 1 and kind in row]
            points = [(found[row]["peak"] / MIB, found[row]["compute"]) for row in [start, *rows]]
            if rows:
                words = f"{start}, {'blocks kept' if kind == 'keep' else kind}"
                axes.plot(*zip(*points, strict=True), marker + line, color=_colour(start), label=words)
            for row, point in zip(rows, points[1:], strict=True):
                number = next(word for word in row.split() if word.isdigit())
                axes.annotate(number, point, xytext=(3, 4), textcoords="offset points", fontsize=7)
    for row in BOTH:
        place = found[row]["peak"] / MIB, found[row]["compute"]
        axes.plot(*place, "*", color="black", markersize=9, label=row)
    axes.axhline(COMPUTE, color="#888888", linewidth=1)
    axes.legend(title="numbers: how many", fontsize=7)


def _losses(axes: Axes, found: Mapping[str, Mapping[str, float]], store: Store, seeds: int) -> None:
    """Small: a seed; large: their mean."""
    axes.set(title="accuracy (ResNet-56, 16 x 16 pixels, 6 epochs)", ylabel=f"points below {PLAIN}")
    for row in (PLAIN, "DSL strided, keep 4", "DSL strided, 3 modules", "DSL strided, 3 portions", *BOTH):
        each = lost(store, row.partition(", keep")[0], seeds)
        if each:
            place, mean = found[row]["peak"] / MIB, statistics.mean(each)
            axes.plot([place] * len(each), each, ".", color=_colour(row), alpha=0.5)
            axes.plot(place, mean, "o", color=_colour(row))
            aside = (
                {"xytext": (-7, -3), "ha": "right"}
                if row == PLAIN
                else {"xytext": (7, 4 if row in BOTH else -4)}
            )
            words = row.removeprefix("DSL strided, ")
            axes.annotate(words, (place, mean), textcoords="offset points", fontsize=8, **aside)
    axes.axhline(100 * POINTS, color="#888888", linewidth=1)
    axes.invert_yaxis()


def _colour(row: str) -> str:
    return COLOURS[plain(row).split()[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="an npz file")
    parser.add_argument("--results", type=Path, default=Path("runs/memory.jsonl"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TRAINED, help="train these rows and show nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(options.results)
    for seed in range(options.seeds if options.images else 0):
        for row in options.only or TRAINED:
            run = partial(accuracy, options.images, row, seed)
            found = store.have(run, "accuracy", row, seed)
            print(f"{row}, seed {seed}: {found['accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)
    if not options.only:
        show(store, options)


def show(store: Store, options: argparse.Namespace) -> None:
    print(f"{date.today()}, {platform.machine()}, one thread, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}; median of {options.rounds} rounds, seeds 0 to {options.seeds - 1}\n")
    print("MiB of live tensors, ResNet-110, batch 128, fp32:\n")
    for line in columns(store):
        print(line, flush=True)
    found = frontier(store, options.rounds)
    print("\nA client at s:\n")
    for line in table(store, found, options.seeds):
        print(line)
    file = options.results.with_suffix(".png")
    picture(store, found, options.seeds, file)
    print(f"\n{file}")


if __name__ == "__main__":
    main()
