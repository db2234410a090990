"""Runs as series: which are one, what they are called, how they are dealt to panels. The runs are made up."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from dsl_lab.runs import FinishedRun, read
from dsl_lab.series import Stat, grouped, labels, panels, shared
from tests.finished import dsl_and_csl, make


@pytest.fixture
def pair(tmp_path: Path) -> list[FinishedRun]:
    return dsl_and_csl(tmp_path)


def test_runs_that_differ_in_their_seeds_are_one(tmp_path: Path, pair: list[FinishedRun]) -> None:
    seeds = [read(make(tmp_path / f"{n}", "dsl", accuracy=n / 10, seed=n)) for n in (1, 2, 3)]
    one, csl = grouped([*seeds, pair[1]])
    assert (len(one.runs), len(csl.runs)) == (3, 1)
    assert one.stat(lambda run: run.summary.test.accuracy) == Stat(pytest.approx(0.2), pytest.approx(0.1))
    assert one.by_epoch(lambda line: line.test.accuracy)[2] == Stat(pytest.approx(0.2), pytest.approx(0.1))
    assert csl.stat(lambda run: run.summary.test.accuracy) == Stat(0.6125)
    assert csl.stat(lambda run: run.summary.test.client_only_accuracy) is None
    assert csl.by_epoch(lambda line: line.test.client_only_accuracy) == {}


def test_runs_of_two_machines_are_two(tmp_path: Path, pair: list[FinishedRun]) -> None:
    elsewhere = make(tmp_path / "elsewhere", "dsl")
    about = json.loads((elsewhere / "run.json").read_text())
    (elsewhere / "run.json").write_text(json.dumps({**about, "machine": "another"}))
    group = grouped([pair[0], read(elsewhere)])
    assert labels(group) == ["DSL · a-dsl-run", "DSL · elsewhere"]
    assert labels([*group, group[1]]) == ["DSL · a-dsl-run", "DSL · elsewhere", "DSL · elsewhere #2"]


def test_labels_tell_series_apart(tmp_path: Path, pair: list[FinishedRun]) -> None:
    assert labels(grouped(pair)) == ["DSL", "CSL"]
    deep = read(make(tmp_path / "deep", "dsl", split="d", clients=1))
    group = grouped([pair[0], deep])
    assert labels(group) == ["DSL · m · 2 clients", "DSL · d · 1 client"]
    assert shared(group) == "resnet20 · sample · 2 epochs"


def test_where_the_data_lies_is_not_told(tmp_path: Path) -> None:
    runs = [read(make(tmp_path / f"{n}", "dsl", data=f"npz:/some/where/{n}.npz")) for n in range(2)]
    assert labels(grouped(runs)) == ["DSL · npz:0.npz", "DSL · npz:1.npz"]


def test_few_series_are_one_panel_and_many_are_dealt(tmp_path: Path, pair: list[FinishedRun]) -> None:
    (panel,) = panels(grouped(pair))
    assert (panel.title, panel.names) == ("", ["DSL", "CSL"])
    many = [
        read(make(tmp_path / f"{method}{split}{data}", method, split=split, data=data))
        for data in ("cifar10", "cifar100")
        for split in ("s", "m")
        for method in ("csl", "dsl")
    ]
    dealt = panels(grouped(many))
    assert [panel.title for panel in dealt] == [
        f"{data} · cut at {split}" for data in ("cifar10", "cifar100") for split in ("s", "m")
    ]
    assert all(panel.names == ["CSL", "DSL"] for panel in dealt)


def test_few_series_are_dealt_where_each_panel_compares_some(tmp_path: Path, pair: list[FinishedRun]) -> None:
    deep = [read(make(tmp_path / f"deep-{method}", method, split="d")) for method in ("dsl", "csl")]
    assert [panel.title for panel in panels(grouped([*pair, *deep]))] == ["cut at m", "cut at d"]
    assert [panel.title for panel in panels(grouped([*pair, deep[0]]))] == [""]


def test_names_in_a_panel_say_only_what_differs_there(tmp_path: Path) -> None:
    runs = [
        read(make(tmp_path / f"{head}{clients}", "dsl", clients=clients, head=head, sync=sync))
        for clients, sync in ((1, "none"), (5, "relay"), (10, "relay"))
        for head in ("gap", "flat")
    ]
    assert [panel.names for panel in panels(grouped(runs))] == [["DSL · gap head", "DSL · flat head"]] * 3


def test_no_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="no runs to report"):
        grouped([])
