"""`dsl demo`: DSL, then CSL, between real processes on this machine; one table, one report."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.errors import ConfigError
from dsl_lab import report, runs, table
from dsl_lab.launch import Experiment, Setting, launch

METHODS = ("dsl", "csl")


@dataclass(frozen=True)
class Demo:
    """Trains by DSL and then by CSL, one server and some clients, each a process of its own."""

    clients: int = 2
    """How many clients."""
    processes: int = 0
    """Divide them over so many processes (dsl-client --replicas); 0: each is a process of its own."""
    model: str = "resnet8"
    """The network: resnetN with N = 6n+2."""
    split: str = "m"
    """Where it is cut: s, m, d or a block count."""
    head: str = "strided"
    """The DSL client's auxiliary head: gap, flat, mlp, conv, strided, copy or infopro."""
    epochs: int = 4
    """Passes over the data."""
    data: str = "sample"
    """sample (10,000 images of Fashion-MNIST that come with this package) or any other source."""
    out: Path | None = None
    """Where the runs and the report go. Default: runs/<time>-demo."""


def demo(options: Demo, console: Console) -> Path:
    """Runs it; the report's path. Raises LaunchError when a process fails."""
    out = options.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S-demo")
    if not 0 <= options.processes <= options.clients:
        raise ConfigError(
            f"--processes {options.processes}: choose from 0 to {options.clients}, as many as --clients"
        )
    experiments = [
        Experiment(_settings(options, method), out / method, processes=options.processes)
        for method in METHODS
    ]
    where = f"in {options.processes} processes" if options.processes else "each a process of its own"
    console.print(f"One server and {options.clients} clients, {where}, on loopback.\n")
    commands: list[str] = []
    for experiment in experiments:
        commands += [shlex.join(command) for command in _run(experiment, console)]
    finished = [runs.read(experiment.server_folder) for experiment in experiments]
    console.print()
    table.show(finished, console)
    path = report.write(finished, out / "report.html", commands)
    console.print(f"\nThe report, with curves, bars and the commands: {path.resolve()}", soft_wrap=True)
    return path


def _settings(options: Demo, method: str) -> dict[str, Setting]:
    return {
        "name": f"demo-{method}",
        "method": method,
        "model": options.model,
        "split": options.split,
        "head": options.head,
        "clients": options.clients,
        "epochs": options.epochs,
        "data": options.data,
    }


def _run(experiment: Experiment, console: Console) -> list[list[str]]:
    start = time.monotonic()
    if not console.is_terminal:
        commands = launch(experiment)
        console.print(_progress(experiment, time.monotonic() - start))
        return commands
    with Live(console=console, refresh_per_second=4) as live:
        commands = launch(experiment, lambda: live.update(_progress(experiment, time.monotonic() - start)))
        live.update(_progress(experiment, time.monotonic() - start))
    return commands


def _progress(experiment: Experiment, seconds: float) -> Table:
    """One line: how far the run is, by what it has written so far."""
    lines = _metrics(experiment.server_folder / "metrics.jsonl")
    line = Table.grid(padding=(0, 2))
    cells = [
        f"[bold]{str(experiment.settings['method']).upper()}[/bold]",
        f"epoch {len(lines)}/{experiment.settings['epochs']}",
        f"{seconds:5.1f} s",
    ]
    if lines:
        last = lines[-1]
        cells += [
            f"accuracy {last['test']['accuracy']:.3f}",
            f"up {last['wire']['up'] / 1e6:,.0f} MB",
            f"down {last['wire']['down'] / 1e6:,.1f} MB",
        ]
    else:
        cells.append("starting" if seconds < 8 else "training")
    line.add_row(*cells)
    return line


def _metrics(path: Path) -> Sequence[dict[str, dict[str, float]]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a last line that is still being written is left out
    return [json.loads(line) for line in whole.splitlines()]
