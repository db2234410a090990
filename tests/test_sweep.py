"""A sweep: what counts as finished, how long the rest may take, and what stands in its way."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import ConfigError
from dsl_lab.launch import Experiment, LaunchError
from dsl_lab.sweep import finished, in_words, sweep, time_left
from tests.finished import make

NEVER = {"epochs": 1, "clients": 0}  # no server begins it, and no client waits for one


def ended(folder: Path) -> Experiment:
    """As if its server and its two clients had come to their end."""
    make(folder / "server", "dsl", codec=["activations=int8"])
    for index in range(2):
        make(folder / f"client-{index}", "dsl")
    return Experiment({"method": "dsl", "clients": 2, "epochs": 2, "sync": "auto"}, folder)


def test_a_run_has_finished_when_all_its_processes_have(tmp_path: Path) -> None:
    experiment = ended(tmp_path / "run")
    assert finished(experiment)
    (tmp_path / "run" / "client-1" / "summary.json").unlink()
    assert not finished(experiment)


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    ended(tmp_path / "run")
    assert finished(Experiment({"clients": 2, "codec": ("activations=int8",)}, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"run with --epochs 2, not 3: choose another --out"):
        finished(Experiment({"clients": 2, "epochs": 3}, tmp_path / "run"))


def test_nothing_is_run_where_all_has_finished(tmp_path: Path) -> None:
    experiment = ended(tmp_path / "run")
    before = {path: path.stat() for path in tmp_path.rglob("*.json")}
    console = Console(file=io.StringIO(), width=200)
    sweep([experiment], tmp_path, console)
    assert {path: path.stat() for path in tmp_path.rglob("*.json")} == before
    assert isinstance(console.file, io.StringIO)
    assert "1 runs, 1 of them finished" in console.file.getvalue()


def test_what_is_no_run_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which is of no run: choose another --out"):
        sweep([Experiment({"epochs": 1}, tmp_path / "run")], tmp_path, Console(file=io.StringIO()))
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_first_run_that_fails_ends_the_sweep(tmp_path: Path) -> None:
    broken = [Experiment(NEVER, tmp_path / f"{n}") for n in range(2)]
    with pytest.raises(LaunchError, match="--clients 0 is below 1"):
        sweep(broken, tmp_path, Console(file=io.StringIO()))
    assert not (tmp_path / "1").exists()


def test_a_later_run_that_fails_is_told_at_the_end(tmp_path: Path) -> None:
    runs = [ended(tmp_path / "good"), Experiment(NEVER, tmp_path / "bad")]
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(LaunchError, match=r"1 of 1 runs failed \(bad\): call it again"):
        sweep(runs, tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    assert "2/2  bad: failed: dsl-server: error: --clients 0" in console.file.getvalue()


@pytest.mark.parametrize(
    ("taken", "so_far", "part", "others", "left"),
    [
        ([], 5.0, 0.0, 3, None),
        ([], 5.0, 0.5, 3, 5.0 + 30.0),
        ([10.0, 20.0], 5.0, 0.0, 2, 10.0 + 30.0),
        ([10.0], 25.0, 0.9, 1, 10.0),
    ],
)
def test_the_time_left(
    taken: list[float], so_far: float, part: float, others: int, left: float | None
) -> None:
    assert time_left(taken, so_far, part, others) == left


def test_times_in_words() -> None:
    assert [in_words(s) for s in (None, 40.4, 720.0, 12_000.0)] == ["–", "40 s", "12 min", "3 h 20 min"]
