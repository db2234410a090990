"""A thousand clients on one machine: a real server, and clients as replicas of a few processes.

They train the demo's network (ResNet-8 cut at m, head strided) with their parts averaged each epoch. Told are
time, accuracy, bytes, and the most memory that all processes had at once: PSS, as the kernel counts it, in
which what processes share counts once.

    python benchmarks/replicas/main.py [--clients 1000] [--processes 1] [--workers 2] [--epochs 30] ...
"""

import argparse
import json
import os
import platform
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from dsl_lab.launch import Experiment, launch

EVERY_S = 0.5  # between looks at the memory
COLUMNS = (
    *("ended well", "method", "epochs", "samples", "accuracy", "seconds", "up MB", "down MB"),
    *("server MiB", "clients MiB", "all MiB"),
)


@dataclass
class Memory:
    """Of the processes that this one has started, MiB: the most of each program, and of all at once."""

    peaks: dict[str, float] = field(default_factory=dict)
    due: float = 0.0

    def look(self) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + EVERY_S
        now: dict[str, float] = {}
        for process in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            name, mib = held(process)
            now[name] = now.get(name, 0.0) + mib
        for name, mib in {**now, "all": sum(now.values())}.items():
            self.peaks[name] = max(mib, self.peaks.get(name, 0.0))


def held(process: str) -> tuple[str, float]:
    """Which program it is, and its PSS in MiB; 0 of one that has just ended."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
    except OSError:
        return "gone", 0.0
    return "server" if "dsl-server" in command else "clients", int(found[1]) / 1024 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1, help="over which the clients are divided")
    parser.add_argument("--workers", type=int, default=2, help="of each process, that compute at a time")
    parser.add_argument("--rest", choices=("memory", "disk"), default="memory")
    parser.add_argument("--method", default="dsl")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--data", default="sample", help="any of dsl-client's; npz:FILE for instance")
    parser.add_argument("--test-limit", type=int, default=2000, help="of the test images; 0: all")
    parser.add_argument("--out", type=Path, help="a folder that stays; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(measured(options, options.out or Path(temporary) / "run"))


def measured(options: argparse.Namespace, out: Path) -> str:
    settings = {
        "method": options.method,
        "sync": "average",
        "model": "resnet8",
        "split": "m",
        "head": "strided",
        "clients": options.clients,
        "epochs": options.epochs,
        "lr": options.lr,
        "data": options.data,
        "test_limit": options.test_limit,
    }
    memory = Memory()
    started = time.monotonic()
    launch(
        Experiment(
            settings,
            out,
            device="cpu",
            also=[["--rest", options.rest]] * options.processes,
            processes=options.processes,
            workers=options.workers,
        ),
        memory.look,
    )
    seconds = time.monotonic() - started
    summary = json.loads((out / "server/summary.json").read_text())
    ended = [json.loads(path.read_text()) for path in out.glob("clients-*/replicas.json")]
    well = sum(each["ended_well"] for each in ended)
    peaks = {name: f"{mib:,.0f}" for name, mib in memory.peaks.items()}
    row = [
        f"{well} of {options.clients}",
        options.method,
        str(options.epochs),
        f"{summary['samples_trained']:,}",
        f"{summary['test']['accuracy']:.3f}",
        f"{seconds:,.0f}",
        *(f"{sum(summary['wire'][way].values()) / 1e6:,.0f}" for way in ("up", "down")),
        peaks["server"],
        peaks["clients"],
        peaks["all"],
    ]
    what = (
        f"{date.today()}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {torch.__version__}; {options.data}; processes {options.processes}, "
        f"workers {options.workers}, rest {options.rest}"
    )
    rule = "---|" * len(COLUMNS)
    return f"{what}\n\n| {' | '.join(COLUMNS)} |\n|{rule}\n| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
