"""Finished runs as a table: its numbers, its widths, and the names of the runs. The runs are made up."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dsl_lab import table
from dsl_lab.runs import FinishedRun, read
from tests.finished import CSL_ROW, DSL_ROW, dsl_and_csl, make


@pytest.fixture
def pair(tmp_path: Path) -> list[FinishedRun]:
    return dsl_and_csl(tmp_path)


def test_table_has_the_summaries_numbers(pair: list[FinishedRun]) -> None:
    assert table.rows(pair) == [DSL_ROW, CSL_ROW]
    assert len(table.HEADINGS) == len(DSL_ROW)


def test_markdown_has_the_table_and_says_what_a_megabyte_is(pair: list[FinishedRun]) -> None:
    lines = table.markdown(pair).splitlines()
    assert lines[2:4] == ["| " + " | ".join(row) + " |" for row in (DSL_ROW, CSL_ROW)]
    assert "All runs: resnet20 · m · 2 clients · sample · 2 epochs." in lines[-1]
    assert "MB = 10⁶ bytes" in lines[-1]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_console_of_any_width_gets_every_number_whole(pair: list[FinishedRun], width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    table.show(pair, console)
    assert isinstance(console.file, io.StringIO)
    words = console.file.getvalue().split()
    assert {*DSL_ROW, *CSL_ROW} <= set(words)


def test_labels_tell_runs_apart(tmp_path: Path, pair: list[FinishedRun]) -> None:
    assert table.labels(pair) == ["DSL", "CSL"]
    deep = read(make(tmp_path / "deep", "dsl", split="d", clients=1))
    assert table.labels([pair[0], deep]) == ["DSL · m · 2 clients", "DSL · d · 1 client"]
    assert table.shared([pair[0], deep]) == "resnet20 · sample · 2 epochs"
    again = read(make(tmp_path / "again", "dsl"))
    assert table.labels([pair[0], again]) == ["DSL · a-dsl-run", "DSL · again"]
    assert table.labels([again, again]) == ["DSL · again", "DSL · again #2"]


def test_little_is_not_shown_as_nothing() -> None:
    assert [table.megabytes(n) for n in (None, 0, 1, 5_000, 1_234_567_890)] == [
        "n/a",
        "0",
        "<0.01",
        "0.01",
        "1,234.57",
    ]
