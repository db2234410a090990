"""Accuracy of DSL and CSL side by side, and of plain backpropagation, on real CIFAR-10 images.

5,000 training and 2,000 test images, ResNet-20, batch 128, 6 epochs, one client, a cosine schedule that
peaks at 0.1 after a warm-up of a fifth, no augmentation (six epochs are too few for it to pay), several
seeds. DSL and CSL run as real server and client processes. A run that has finished is not repeated, so the
benchmark can be stopped and started again.

    python benchmarks/accuracy/main.py IMAGES.npz [--split m] [--rows ROW...] [--out FOLDER] [--seeds 3]

IMAGES.npz holds train_images (N, 32, 32, 3) uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import json
import math
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import grpc
import torch
from torch import nn
from torch.nn import functional as F

from common.nets.cut import build
from common.optim import learning_rate, progress_of, set_learning_rate, sgd
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches
from dsl_lab.launch import Experiment, LaunchError, Setting, launch

COMMON: dict[str, Setting] = {
    "model": "resnet20",
    "epochs": 6,
    "augment": False,
    "eval_every": 0,
}
ROWS: dict[str, dict[str, Setting]] = {
    "CSL": {"method": "csl"},
    "DSL, head strided": {"method": "dsl", "head": "strided"},
    "DSL, head conv": {"method": "dsl", "head": "conv"},
    "DSL, head gap": {"method": "dsl", "head": "gap"},
    "DSL, head mlp": {"method": "dsl", "head": "mlp"},
    "DSL, head copy": {"method": "dsl", "head": "copy"},
    "DSL, head infopro": {"method": "dsl", "head": "infopro"},
    "DSL, head flat, lr 0.01": {"method": "dsl", "head": "flat", "lr": 0.01},
    "DSL, head flat, lr 0.1": {"method": "dsl", "head": "flat"},
    "CSL, recipe paper": {"method": "csl", "recipe": "paper", "epochs": 6},
}
BACKPROPAGATION = "plain backpropagation"


def over_the_wire(images: Path, row: str, split: str, seed: int, out: Path) -> tuple[float, float | None]:
    """Test accuracy of the joined network, and of the client alone where it has a head."""
    settings = {**COMMON, **ROWS[row], "split": split, "data": f"npz:{images}", "seed": seed}
    experiment = Experiment(settings, out)
    summary = experiment.server_folder / "summary.json"
    if not summary.exists():
        try:
            launch(experiment)
        except LaunchError as error:
            if "NaN or infinite" not in str(error):
                raise
            return math.nan, math.nan  # the client's weights ran away, and the server refused what it sent
    test = json.loads(summary.read_text())["test"]
    return test["accuracy"], test["client_only_accuracy"]


def backpropagation(images: Path, seed: int, out: Path) -> tuple[float, None]:
    """The whole network in this process, one ordinary loop, on the batches that the client makes."""
    result = out / "accuracy.json"
    if not result.exists():
        run = Run(model="resnet20", split="m", epochs=6, augment=False, data=f"npz:{images}", seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(_trained_whole(run)))
    return json.loads(result.read_text()), None


def _trained_whole(run: Run) -> float:
    cpu, net = torch.device("cpu"), build(run)
    whole = nn.Sequential(*net.bottom, *net.top)
    optimizer = sgd(whole.parameters(), run)
    train, test = data.load(run.data, run.image_shape, run.class_count)
    batches = Batches(train, None, run.batch_size, seed=run.seed, device=cpu)
    for epoch in range(run.epochs):
        for index, (x, y) in enumerate(batches.epoch(epoch)):
            progress = progress_of(run, epoch, index, len(batches))
            set_learning_rate(optimizer, learning_rate(run, progress))
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()
    whole.eval()
    with torch.no_grad():
        tests = Batches(test, None, run.batch_size, seed=0, shuffle=False, device=cpu).epoch(0)
        correct = sum(int((whole(x).argmax(1) == y).sum()) for x, y in tests)
    return correct / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="an npz file")
    parser.add_argument("--split", default="m")
    parser.add_argument(
        "--rows", nargs="+", default=[BACKPROPAGATION, *ROWS], choices=[BACKPROPAGATION, *ROWS]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = options.images.resolve()
    print(f"{date.today()}, {platform.machine()}, CPU, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, grpcio {grpc.__version__}; cut at {options.split}, ", end="")
    print(f"seeds 0 to {options.seeds - 1}\n")
    print("| method | test accuracy, mean (each seed) | client alone, mean |\n|---|---|---|")
    for row in options.rows:
        scores: list[tuple[float, float | None]] = []
        for seed in range(options.seeds):
            folder = options.out / options.split / row.replace(", ", "-").replace(" ", "-") / str(seed)
            run = backpropagation(images, seed, folder) if row == BACKPROPAGATION else None
            scores.append(run or over_the_wire(images, row, options.split, seed, folder))
        print(_line(row, scores), flush=True)


def _line(row: str, scores: Sequence[tuple[float, float | None]]) -> str:
    joined = [joined for joined, _ in scores]
    alone = [alone for _, alone in scores if alone is not None]
    each = ", ".join(f"{value:.3f}" for value in joined)
    return (
        f"| {row} | {statistics.mean(joined):.3f} ({each}) | "
        f"{f'{statistics.mean(alone):.3f}' if alone else '–'} |"
    )


if __name__ == "__main__":
    main()
