"""`dsl bench paper`: what it sweeps; broken off and gone on with, as real processes."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import ConfigError
from common.methods import settled
from common.run import RECIPES, Run
from dsl_lab.launch import program
from dsl_lab.paper import SCALES, Paper, experiments, paper
from dsl_lab.reference import reference
from tests.finished import the_papers

PATIENCE_S = 240.0  # a few seconds where nothing else runs


def test_the_papers_scale_is_the_papers_experiment(tmp_path: Path) -> None:
    planned = experiments(Paper(scale="paper"), tmp_path)
    assert len(planned) == 2 * 3 * 3 * 2
    assert len({experiment.out for experiment in planned}) == len(planned)
    for experiment in planned:
        told = {**RECIPES["paper"], **experiment.settings}
        run = settled(Run(**told))  # type: ignore[arg-type]
        assert (run.model, run.epochs, run.batch_size, run.lr) == ("resnet110", 50, 128, 1e-3)
        as_run = the_papers(tmp_path / str(told.pop("name")), str(told.pop("method")), **told)
        assert reference(as_run).up, "it is one that stands beside the paper's"


def test_flags_narrow_a_sweep(tmp_path: Path) -> None:
    options = Paper("cpu", ("ampere", "csl", "csl"), ("m",), (3,), ("npz:a/b c.npz",), (0, 1), epochs=4)
    names = [experiment.out.name for experiment in experiments(options, tmp_path)]
    assert names == [
        f"resnet20-b-c-3-m-{method}-seed{seed}" for seed in (0, 1) for method in ("ampere", "csl")
    ]
    settings = experiments(options, tmp_path)[0].settings
    assert (settings["epochs"], settings["sync"], settings["data"]) == (4, "auto", "npz:a/b c.npz")


def test_every_scale_can_begin(tmp_path: Path) -> None:
    for scale in SCALES:
        for experiment in experiments(Paper(scale), tmp_path):
            assert settled(Run(**dict(experiment.settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (Paper(methods=("csl", "magic")), "--method 'magic'"),
        (Paper(splits=("x",)), "--split 'x'"),
        (Paper(clients=(0,)), "--clients 0 is below 1"),
        (Paper(seeds=()), "--seeds needs at least one value"),
    ],
)
def test_what_no_server_would_begin_is_refused_at_once(
    tmp_path: Path, options: Paper, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        paper(replace(options, out=tmp_path / "out"), Console())
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(600)
def test_a_sweep_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    """Finished runs are left alone; the one under way is made anew."""
    out = tmp_path / "sweep"
    done, broken = (out / f"resnet8-sample-1-1-{method}-seed0" for method in ("csl", "dsl"))
    with bench(out) as first:
        until((broken / "server" / "run.json").exists)
        first.send_signal(signal.SIGINT)
        words, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130, words
    assert "1/2  resnet8-sample-1-1-csl-seed0: accuracy" in words
    assert "the same command goes on" in words
    assert not (broken / "server" / "summary.json").exists()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done.rglob("*.*")}
    begun = (broken / "server" / "run.json").stat().st_mtime_ns

    with bench(out) as second:
        words, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, words
    assert "2 runs, 1 of them finished" in words
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done.rglob("*.*")} == before
    assert (broken / "server" / "run.json").stat().st_mtime_ns > begun
    assert {path.suffix for path in out.glob("report.*")} == {".html", ".md", ".csv"}
    assert len(list((out / "report-figures").glob("*.png"))) == 5


@contextlib.contextmanager
def bench(out: Path) -> Iterator[subprocess.Popen[str]]:
    """The smallest sweep: two runs of one client and one epoch."""
    small = ["--splits", "1", "--clients", "1", "--epochs", "1", "--train-limit", "100", "--test-limit", "50"]
    process = subprocess.Popen(
        [program("dsl"), "bench", "paper", "--out", str(out), *small],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
