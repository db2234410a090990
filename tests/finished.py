"""What tests share of finished runs: made-up folders, and the numbers that a table shows of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.run import RECIPES, Run
from dsl_lab.runs import FinishedRun, read

DSL_ROW = ["DSL", "61.25%", "55.50%", "48.02", "0", "60.25", "0.07", "12.3", "420.0", "1,500.0"]
CSL_ROW = ["CSL", "61.25%", "–", "48.02", "48.00", "n/a", "n/a", "12.3", "420.0", "1,500.0"]


def evaluation(epoch: int, accuracy: float, alone: float | None, up: int, down: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "seconds": 6.0 * epoch,
        "samples_trained": 1000 * epoch,
        "train": {"loss": 1.2, "client_loss": None},
        "test": {"accuracy": accuracy, "loss": 1.0, "client_only_accuracy": alone},
        "wire": {"up": up, "down": down},
    }


def make(folder: Path, method: str, accuracy: float = 0.6125, **settings: object) -> Path:
    """A finished run: dsl has a head's accuracy and no gradients, csl no head and no kernel count."""
    dsl = method == "dsl"
    run = {"method": method, "model": "resnet20", "split": "m", "clients": 2, "epochs": 2, "data": "sample"}
    about = {
        "name": folder.name,
        "role": "server",
        "run": {**run, **settings},
        "versions": {"python": "3.11.7", "torch": "2.12.0", "grpcio": "1.81.1"},
        "machine": "x86_64, 2 cores <Linux>",
        "started": "2026-02-11T09:42:07+0000",
        "command": ["dsl-server", "--name", folder.name, "--method", method],
    }
    lines = [
        evaluation(1, 0.41, 0.33 if dsl else None, 30_000_000, 5_000 if dsl else 24_000_000),
        evaluation(2, accuracy, 0.555 if dsl else None, 60_000_000, 9_000 if dsl else 48_000_000),
    ]
    summary = {
        **run,
        "test": lines[-1]["test"],
        "wire": {
            "up": {
                "activations": 48_000_000,
                "labels": 16_000,
                "gradients": 0,
                "evaluation": 12_000_000,
                "weights": 0,
                "control": 400,
                "framing": 30_000,
            },
            "down": {
                "activations": 0,
                "gradients": 0 if dsl else 48_000_000,
                "evaluation": 0,
                "weights": 0,
                "control": 7_000,
                "framing": 2_000,
            },
            "socket": {"up": 60_250_000, "down": 70_000} if dsl else None,
        },
        "seconds": {
            "wall": 12.34,
            "client": {"forward": 2, "backward": 3.5, "encode": 0.25, "wait": 1.5},
            "server": {"forward": 1.5, "backward": 3, "decode": 0.5, "idle": 6},
        },
        "peak_bytes": {"client": 420 * 2**20, "server": 1500 * 2**20},
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def counted(folder: Path, live: dict[str, int], cut_shape: list[int]) -> FinishedRun:
    """The run of this folder, with its tensors counted: bytes at the client, the server, and held."""
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "memory": live, "cut_shape": cut_shape}))
    return read(folder)


def dsl_and_csl(folder: Path) -> list[FinishedRun]:
    return [read(make(folder / f"a-{method}-run", method)) for method in ("dsl", "csl")]


def the_papers(folder: Path, method: str, **settings: object) -> FinishedRun:
    """A run with the paper's settings, but for those given."""
    paper = asdict(replace(Run(), model="resnet110", head="flat", data="cifar10", **RECIPES["paper"]))
    return read(make(folder, **{**paper, "method": method, "split": "d", **settings}))
