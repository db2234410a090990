"""Finished runs as a table: its numbers, its widths, and the names of the runs. The runs are made up."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from dsl_lab import figures, table
from dsl_lab.runs import FinishedRun, read
from dsl_lab.series import grouped
from tests.finished import CSL_ROW, DSL_ROW, counted, dsl_and_csl, make, the_papers


@pytest.fixture
def pair(tmp_path: Path) -> list[FinishedRun]:
    return dsl_and_csl(tmp_path)


def test_table_has_the_summaries_numbers(pair: list[FinishedRun]) -> None:
    assert table.rows(grouped(pair)) == [DSL_ROW, CSL_ROW]
    assert len(table.headings(grouped(pair))) == len(DSL_ROW)


def test_seeds_are_one_row_with_a_mean_and_a_spread(tmp_path: Path) -> None:
    seeds = [read(make(tmp_path / f"{n}", "dsl", accuracy=0.5 + n / 10, seed=n)) for n in range(3)]
    csl = read(make(tmp_path / "csl", "csl"))
    group = grouped([*seeds, csl])
    assert table.headings(group)[:3] == [("", "method"), ("", "runs"), ("test accuracy", "joined")]
    assert [row[:5] for row in table.rows(group)] == [
        ["DSL", "3", "60.00% ± 10.00%", "55.50%", "48.02"],
        ["CSL", "1", "61.25%", "–", "48.02"],
    ]
    assert "±" in table.notes(group)
    assert "±" not in table.notes(grouped([csl]))


def test_the_papers_numbers_stand_beside_a_run_like_the_papers(tmp_path: Path) -> None:
    group = grouped([the_papers(tmp_path / method, method) for method in ("csl", "dsl")])
    heads = table.headings(group)
    csl, dsl = (dict(zip(heads, row, strict=True)) for row in table.rows(group))
    assert (csl["test accuracy", "authors"], dsl["test accuracy", "authors"]) == ("84.48%", "85.12%")
    assert csl["payload, MB", "paper down"] == "81,920.00"
    assert dsl["payload, MB", "paper down"] == "0"
    assert "arXiv 2601.19261" in table.notes(group)


def test_tensors_are_shown_where_they_were_counted(tmp_path: Path, pair: list[FinishedRun]) -> None:
    live = {"client": 3 * 2**20, "server": 5 * 2**20, "held": 0}
    dsl = counted(make(tmp_path / "counted", "dsl"), live, [16, 32, 32])
    group = grouped([dsl, pair[1]])
    names = ("client", "server", "held", "one process")
    assert table.headings(group)[-4:] == [("tensors, MiB", name) for name in names]
    assert [row[-4:] for row in table.rows(group)] == [["3.0", "5.0", "0.0", "5.0"], ["–"] * 4]
    assert "DSL client 3.0 MiB; DSL server 5.0 MiB." in spoken([dsl])
    assert spoken([dsl]).endswith("Held while waiting, and one process for both: DSL 0.0 and 5.0 MiB.")
    assert "client 420.0 MiB" in spoken([dsl, pair[1]]), "what not all have is not compared"
    assert "waiting" not in spoken([dsl, pair[1]])


def test_one_process_holds_what_a_client_waits_with_and_the_server_s_peak(tmp_path: Path) -> None:
    """By hand: 10 MiB held and 7 of the server, of which 8 x 16 x 32 x 32 x 4 bytes are the same."""
    mib = 2**20
    live = {"client": 12 * mib, "server": 7 * mib, "held": 10 * mib}
    csl = counted(make(tmp_path / "a", "csl", batch_size=8), live, [16, 32, 32])
    assert csl.one_process == 16.5 * mib
    assert "CSL 10.0 and 16.5 MiB." in spoken([csl])
    (line,) = csv.DictReader(io.StringIO(table.comma_separated([csl])))
    assert (line["client_held_bytes"], line["one_process_bytes"]) == (str(10 * mib), str(16 * mib + mib // 2))
    assert "One process" in table.notes(grouped([csl]))
    little = counted(make(tmp_path / "b", "csl", batch_size=8), {**live, "held": mib}, [16, 32, 32])
    assert little.one_process == 12 * mib, "no less than the client alone"
    unknown = counted(make(tmp_path / "c", "csl"), live, [16, 32, 32])
    assert unknown.one_process is None, "without the batch's size"


def spoken(some: list[FinishedRun]) -> str:
    """The memory's figure in words."""
    (memory,) = (drawing for drawing in figures.DRAWINGS if drawing.name == "memory")
    return figures.render(memory, grouped(some), "svg")[1]


def test_csv_has_every_runs_own_numbers(tmp_path: Path, pair: list[FinishedRun]) -> None:
    dsl, csl = csv.DictReader(io.StringIO(table.comma_separated(pair)))
    assert (dsl["run"], dsl["accuracy"], dsl["client_only_accuracy"]) == ("a-dsl-run", "0.6125", "0.555")
    assert (csl["client_only_accuracy"], csl["socket_up_bytes"]) == ("", "")
    assert (dsl["messages_up_bytes"], csl["payload_down_bytes"]) == ("60046400", "48000000")
    assert (dsl["client_wait_s"], dsl["server_peak_bytes"]) == ("1.5", str(1500 * 2**20))
    assert dsl["reference_up"] == ""


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


def test_little_is_not_shown_as_nothing() -> None:
    assert [table.megabytes(n) for n in (None, 0, 1, 5_000, 1_234_567_890)] == [
        "n/a",
        "0",
        "<0.01",
        "0.01",
        "1,234.57",
    ]
