"""`dsl bench paper`: the paper's experiment (arXiv 2601.19261, section IV) between real processes.

Methods x splits x clients x data sets x seeds, each run a server and its clients; then the four figures.
As in the paper, CSL and DSL clients take turns with one part.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console

from common.errors import ConfigError
from common.run import Run
from dsl_lab.engines import Where, opened
from dsl_lab.launch import Experiment, Setting
from dsl_lab.sweep import sweep

Name = Literal["smoke", "cpu", "paper"]
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """What is swept where no flag narrows it; and what all its runs have in common."""

    splits: tuple[str, ...]
    clients: tuple[int, ...]
    data: tuple[str, ...]
    epochs: int
    settings: Mapping[str, Setting]


SCALES: Mapping[Name, Scale] = {
    "smoke": Scale(
        splits=("1", "2"),  # of three blocks: s, m and d are one and the same
        clients=(1,),
        data=("sample",),
        epochs=2,
        settings={"model": "resnet8", "head": "strided", "train_limit": 1000, "test_limit": 500},
    ),
    "cpu": Scale(
        splits=("s", "m", "d"),
        clients=(1, 5),
        data=("cifar10",),
        epochs=10,
        settings={"model": "resnet20", "head": "strided", "train_limit": 5000, "test_limit": 2000},
    ),
    "paper": Scale(
        splits=("s", "m", "d"),
        clients=(1, 5, 10),
        data=("cifar10", "cifar100"),
        epochs=50,
        settings={"model": "resnet110", "head": "flat", "recipe": "paper", "batch_size": 128},
    ),
}
IN_TURN = ("csl", "dsl")  # other methods say themselves what becomes of the clients' parts


@dataclass(frozen=True)
class Paper:
    """Sweeps methods, splits, clients and data sets, each run between real processes, and draws the paper's
    four figures. What has finished is not repeated: after Ctrl-C, the same command goes on."""

    scale: Name = "smoke"
    """smoke: ResNet-8 on the packaged images, a minute. cpu: ResNet-20 on a part of CIFAR-10, for two cores.
    paper: ResNet-110 on all of CIFAR-10 and CIFAR-100 for 50 epochs, for a GPU."""
    methods: tuple[str, ...] = ("csl", "dsl")
    """Which methods: any that `dsl methods` lists."""
    splits: tuple[str, ...] = ()
    """Where the network is cut: s, m, d or block counts. Default: the scale's."""
    clients: tuple[int, ...] = ()
    """With how many clients. Default: the scale's."""
    data: tuple[str, ...] = ()
    """On which data: sample, cifar10, cifar100, npz:FILE or any other source. Default: the scale's."""
    seeds: tuple[int, ...] = (0,)
    """With which seeds; several are one line or bar, with a mean and a spread."""
    epochs: int | None = None
    """Passes over the data. Default: the scale's."""
    head: str | None = None
    """The DSL client's auxiliary head. Default: the scale's (at the paper's, flat)."""
    train_limit: int | None = None
    """Train on only so many images, drawn by the seed; 0: all. Default: the scale's."""
    test_limit: int | None = None
    """Score only so many test images; 0: all. Default: the scale's."""
    device: str = "auto"
    """Where servers and clients compute: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Where the runs and the report go. Default: runs/paper-SCALE."""
    where: Where = field(default_factory=Where)


def paper(options: Paper, console: Console) -> Path:
    """Runs what has not finished; the report's path. Raises ConfigError, LaunchError."""
    from dsl_lab import report, runs, table

    out = options.out or Path("runs") / f"paper-{options.scale}"
    planned = experiments(options, out)
    _check(planned)
    with opened(options.where) as engine:
        sweep(planned, out, console, engine)
    some = runs.find(out)
    console.print()
    table.show(some, console)
    path, *others = report.publish(some, out / "report.html")
    console.print(f"\n{path} and {len(others)} tables and figures beside it", soft_wrap=True)
    return path


def experiments(options: Paper, out: Path) -> list[Experiment]:
    """Those of one seed first, and side by side what is to be compared."""
    return [
        Experiment(settings, out / str(settings["name"]), device=options.device)
        for settings in _all_settings(options)
    ]


def _all_settings(options: Paper) -> Iterator[dict[str, Setting]]:
    scale = SCALES[options.scale]
    limits = {"train_limit": options.train_limit, "test_limit": options.test_limit, "head": options.head}
    narrowed = {key: value for key, value in limits.items() if value is not None}
    common: dict[str, Setting] = {**scale.settings, **narrowed, "measure_memory": True}
    epochs = scale.epochs if options.epochs is None else options.epochs
    every = product(
        _once("--seeds", options.seeds),
        _once("--data", options.data or scale.data),
        _once("--clients", options.clients or scale.clients),
        _once("--splits", options.splits or scale.splits),
        _once("--methods", options.methods),
    )
    for seed, data, clients, split, method in every:
        yield {
            "name": f"{common['model']}-{_word(data)}-{clients}-{split}-{method}-seed{seed}",
            "method": method,
            "split": split,
            "clients": clients,
            "data": data,
            "seed": seed,
            "epochs": epochs,
            "sync": "relay" if method in IN_TURN and clients > 1 else "auto",
            **common,
        }


def _once(flag: str, values: tuple[T, ...]) -> list[T]:
    if not values:
        raise ConfigError(f"{flag} needs at least one value")
    return list(dict.fromkeys(values))


def _word(source: str) -> str:
    """For a folder's name: `npz:some/where/images.npz` is `images`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(source.partition(":")[2]).stem or source)


def _check(planned: list[Experiment]) -> None:
    """Raises ConfigError for what no server would begin, before the first one does."""
    from common.methods import settled  # imports torch
    from common.nets.cut import blocks_at_client

    for experiment in planned:
        run = settled(Run(**dict(experiment.settings)))  # type: ignore[arg-type]  # of just these types
        blocks_at_client(run.model, run.split)
