"""`dsl evaluate`: how well a finished run predicts, class by class, joined and alone, by real processes."""

import csv
import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from dsl_lab.launch import END_S, LaunchError, program

Way = Literal["joined", "alone"]
START_S = 120.0  # for the server to read its part


@dataclass(frozen=True)
class Evaluate:
    """Scores a finished run class by class: its parts joined over the wire, and a client alone."""

    server: tyro.conf.Positional[Path]
    """The server's folder of the run."""
    clients: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of its clients: one; or, where each has a part or a test set of its own, all of them."""
    data: str | None = None
    """A data source with labels; else the test set that each client scored the run on."""
    out: Path = Path("evaluation")
    """Where scores.json, tables of classes and confusion matrices go."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Scores:
    """What predictions are worth. confusion[i, j]: samples of class i that were taken for class j.

    names: of the classes. loss: the mean cross-entropy, in nats.
    """

    names: Sequence[str]
    confusion: NDArray[np.int64]
    loss: float

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / self.samples

    @property
    def rows(self) -> list[tuple[str, int, float, float]]:
        """Of each class its name, its support (how many there are), its recall (the share of these that was
        found) and its precision (the share of what was taken for it that is it): NaN where there are none."""
        right = self.confusion.diagonal()
        support, taken = self.confusion.sum(1), self.confusion.sum(0)
        return [
            (name, int(support[i]), _share(right[i], support[i]), _share(right[i], taken[i]))
            for i, name in enumerate(self.names)
        ]


def scores(lines: Sequence[dict[str, Any]]) -> Scores:
    """Of the lines of a predictions.jsonl whose samples all have labels."""
    logits = np.array([line["logits"] for line in lines], np.float64)  # (N, classes)
    labels = np.array([line["labelled"] for line in lines])
    classes = logits.shape[1]
    names = {line["labelled"]: line["label"] for line in lines}
    names |= {line["predicted"]: line["class"] for line in lines}
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, [line["predicted"] for line in lines]), 1)
    highest = logits.max(1, keepdims=True)
    spread = np.log(np.exp(logits - highest).sum(1)) + highest[:, 0]
    loss = float((spread - logits[np.arange(len(labels)), labels]).mean())
    return Scores([names.get(index, str(index)) for index in range(classes)], confusion, loss)


def evaluate(options: Evaluate, console: Console) -> None:
    """Raises ConfigError or LaunchError, with the last words of the process that failed."""
    if not options.clients:
        raise ConfigError("dsl evaluate needs a client's folder, after the server's")
    ways = _ways(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {way: _score(options, way) for way in ways}
        for way, score in found.items():
            _write(options.out, way, score)
            console.print(_table(score))
            console.print(_total(way, score), soft_wrap=True)
        totals = {
            way: {"accuracy": score.accuracy, "loss": score.loss, "samples": score.samples}
            for way, score in found.items()
        }
        (options.out / "scores.json").write_text(json.dumps(totals, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {options.out}: {error.strerror}") from error
    console.print(f"scores.json, tables and confusion matrices in {options.out}", soft_wrap=True)


def _ways(options: Evaluate) -> list[Way]:
    """In which ways this run's parts can predict. Raises ConfigError unless the folders are of one run."""
    from common.ended import described  # these import torch
    from common.methods import build_method
    from common.methods.base import Tail

    run, facts = described(options.server, "server")
    for folder in options.clients:
        theirs, its_facts = described(folder, "client")
        if (theirs, its_facts.get("run_id")) != (run, facts.get("run_id")):
            raise ConfigError(f"{folder} and {options.server} are of two runs")
    method = build_method(run)
    joined: list[Way] = ["joined"] if method.tail is not Tail.ALL else []
    return [*joined, "alone"] if method.local_loss or not joined else joined


def _score(options: Evaluate, way: Way) -> Scores:
    if way == "alone":
        return scores(_predicted(options, way, ["--alone"]))
    with _served(options) as address:
        return scores(_predicted(options, way, ["--server", address]))


@contextmanager
def _served(options: Evaluate) -> Iterator[str]:
    """The address of a server of the run, for as long as it is needed."""
    command = [program("dsl-server"), "--serve", str(options.server), "--listen", "127.0.0.1:0"]
    log = options.out / "server.log"
    with log.open("wb") as words:
        server = subprocess.Popen(
            [*command, "--device", options.device], stdin=subprocess.DEVNULL, stdout=words, stderr=words
        )
    try:
        yield _address(server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """As the server says it in its greeting. Raises LaunchError."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        if greeting := re.search(r"--server ([\d.]+:\d+)", log.read_text(errors="replace")):
            return greeting[1]
        time.sleep(0.05)
    raise LaunchError(_last_words(log))


def _predicted(options: Evaluate, way: Way, flags: Sequence[str]) -> list[dict[str, Any]]:
    """What each client predicts, one after the other. Raises LaunchError."""
    lines: list[dict[str, Any]] = []
    for index, client in enumerate(options.clients):
        path, log = (options.out / f"{way}-{index}.{kind}" for kind in ("jsonl", "log"))
        command = [program("dsl-client"), "predict", "--run", str(client), "--out", str(path), *flags]
        command += ["--device", options.device, *(["--data", options.data] if options.data else [])]
        with log.open("wb") as words:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, check=False)
        if done.returncode:
            raise LaunchError(_last_words(log))
        lines += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return lines


def _last_words(log: Path) -> str:
    words = log.read_text(errors="replace").strip().splitlines()
    return words[-1] if words else f"a process ended without a word ({log})"


def _write(out: Path, way: Way, score: Scores) -> None:
    with (out / f"{way}-classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "support", "recall", "precision"])
        writer.writerows(score.rows)
    with (out / f"{way}-confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["is \\ taken for", *score.names])
        writer.writerows(
            [name, *row] for name, row in zip(score.names, score.confusion.tolist(), strict=True)
        )


def _total(way: Way, score: Scores) -> str:
    return f"{way}: accuracy {score.accuracy:.4f}, loss {score.loss:.4f}, {score.samples:,} samples"


def _table(score: Scores) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for heading in ("support", "recall", "precision"):
        table.add_column(heading, justify="right")
    for name, support, recall, precision in score.rows:
        table.add_row(name, f"{support:,}", _percent(recall), _percent(precision))
    return table


def _share(part: int, whole: int) -> float:
    return int(part) / int(whole) if whole else math.nan


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"
