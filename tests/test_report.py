"""Run folders read, and shown as a table, a page and figures. The folders are made up."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.errors import ConfigError
from dsl_lab import report, runs
from dsl_lab.runs import FinishedRun


def evaluation(epoch: int, accuracy: float, alone: float | None, up: int, down: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "seconds": 6.0 * epoch,
        "samples_trained": 1000 * epoch,
        "train": {"loss": 1.2, "client_loss": None},
        "test": {"accuracy": accuracy, "loss": 1.0, "client_only_accuracy": alone},
        "wire": {"up": up, "down": down},
    }


def make(folder: Path, method: str, **settings: object) -> Path:
    """A finished run: dsl has a head's accuracy and no gradients, csl no head and no kernel count."""
    dsl = method == "dsl"
    run = {"method": method, "model": "resnet20", "split": "m", "clients": 2, "epochs": 2, "data": "sample"}
    about = {
        "name": folder.name,
        "run": {**run, **settings},
        "versions": {"python": "3.11.7", "torch": "2.12.0", "grpcio": "1.81.1"},
        "machine": "x86_64, 2 cores <Linux>",
        "started": "2026-02-11T09:42:07+0000",
        "command": ["dsl-server", "--name", folder.name, "--method", method],
    }
    lines = [
        evaluation(1, 0.41, 0.33 if dsl else None, 30_000_000, 5_000 if dsl else 24_000_000),
        evaluation(2, 0.6125, 0.555 if dsl else None, 60_000_000, 9_000 if dsl else 48_000_000),
    ]
    summary = {
        **run,
        "test": lines[-1]["test"],
        "wire": {
            "up": {
                "activations": 48_000_000,
                "labels": 16_000,
                "evaluation": 12_000_000,
                "weights": 0,
                "control": 400,
                "framing": 30_000,
            },
            "down": {
                "gradients": 0 if dsl else 48_000_000,
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
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[FinishedRun]:
    return [runs.read(make(tmp_path / f"a-{method}-run", method)) for method in ("dsl", "csl")]


DSL_ROW = ["DSL", "61.25%", "55.50%", "48.02", "0", "60.25", "0.07", "12.3", "420.0", "1,500.0"]
CSL_ROW = ["CSL", "61.25%", "–", "48.02", "48.00", "n/a", "n/a", "12.3", "420.0", "1,500.0"]


class Page(HTMLParser):
    """A page's table rows, ids, labels of figures, addresses, and all of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.spoken: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(value or "")
            elif key == "aria-label" and tag == "svg":
                self.spoken.append(value or "")
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def page_of(finished: list[FinishedRun], folder: Path, commands: tuple[str, ...] = ()) -> Page:
    return Page(report.write(finished, folder / "report.html", commands).read_text(encoding="utf-8"))


def test_bytes_of_a_run(pair: list[FinishedRun]) -> None:
    dsl, csl = pair
    assert (dsl.payload_up, dsl.payload_down) == (48_016_000, 0)
    assert (dsl.serialized_up, dsl.serialized_down) == (60_046_400, 9_000)
    assert (csl.payload_down, csl.serialized_down) == (48_000_000, 48_009_000)
    assert [e.wire.up for e in dsl.evaluations] == [30_000_000, 60_000_000]
    assert dsl.label == "DSL · resnet20 · m · 2 clients"


def test_table_has_the_summaries_numbers(pair: list[FinishedRun]) -> None:
    assert runs.table(pair) == [DSL_ROW, CSL_ROW]
    assert len(runs.HEADINGS) == len(DSL_ROW)


def test_markdown_has_the_table_and_says_what_a_megabyte_is(pair: list[FinishedRun]) -> None:
    lines = runs.markdown(pair).splitlines()
    assert lines[2:4] == ["| " + " | ".join(row) + " |" for row in (DSL_ROW, CSL_ROW)]
    assert "All runs: resnet20 · m · 2 clients · sample · 2 epochs." in lines[-1]
    assert "MB = 10⁶ bytes" in lines[-1]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_console_of_any_width_gets_every_number_whole(pair: list[FinishedRun], width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    runs.show(pair, console)
    assert isinstance(console.file, io.StringIO)
    words = console.file.getvalue().split()
    assert {*DSL_ROW, *CSL_ROW} <= set(words)


def test_labels_tell_runs_apart(tmp_path: Path, pair: list[FinishedRun]) -> None:
    assert runs.labels(pair) == ["DSL", "CSL"]
    deep = runs.read(make(tmp_path / "deep", "dsl", split="d", clients=1))
    assert runs.labels([pair[0], deep]) == ["DSL · m · 2 clients", "DSL · d · 1 client"]
    assert runs.shared([pair[0], deep]) == "resnet20 · sample · 2 epochs"
    again = runs.read(make(tmp_path / "again", "dsl"))
    assert runs.labels([pair[0], again]) == ["DSL · a-dsl-run", "DSL · again"]
    assert runs.labels([again, again]) == ["DSL · again", "DSL · again #2"]


def test_little_is_not_shown_as_nothing() -> None:
    assert [runs.megabytes(n) for n in (None, 0, 1, 5_000, 1_234_567_890)] == [
        "n/a",
        "0",
        "<0.01",
        "0.01",
        "1,234.57",
    ]


@pytest.mark.parametrize("name", ["summary.json", "run.json", "metrics.jsonl"])
def test_an_unfinished_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "half", "dsl")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"half holds no finished run \(no {name}\): give the server's"):
        runs.read(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no finished run"):
        runs.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("summary.json", "{", "Expecting property name"),
        ("summary.json", "[]", r"summary.json is \[\]"),
        ("summary.json", '{"test": {"accuracy": "high"}}', "summary.json: test: accuracy is 'high'"),
        ("run.json", '{"name": "x"}', "run.json: run is missing"),
        ("metrics.jsonl", "", "holds no evaluation"),
        ("metrics.jsonl", '{"epoch": 1, "te', "Unterminated string"),
        ("metrics.jsonl", '{"epoch": true}', "metrics.jsonl: epoch is True"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    folder = make(tmp_path / "broken", "dsl")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"broken.*{complaint}.*give the server's folder"):
        runs.read(folder)


def test_the_page_has_the_summaries_numbers(tmp_path: Path, pair: list[FinishedRun]) -> None:
    page = page_of(pair, tmp_path)
    assert DSL_ROW in page.rows
    assert CSL_ROW in page.rows
    assert "Split learning, measured" in page.text
    assert "MB = 10⁶ bytes" in page.text


def test_figures_are_told_in_words(tmp_path: Path, pair: list[FinishedRun]) -> None:
    accuracy, traffic, cost, time, memory = page_of(pair, tmp_path).spoken
    assert "DSL  61.25%; DSL, client alone  55.50%; CSL  61.25%." in accuracy
    assert "DSL up 60.05 MB; DSL down 0.01 MB; CSL up 60.05 MB; CSL down 48.01 MB." in traffic
    assert "DSL 61.25% after 60.01 MB; CSL 61.25% after 108.00 MB." in cost
    assert "DSL client forward 2.0 backward 3.5 encode / decode 0.2 wait / idle 1.5;" in time
    assert "CSL client 420.0 MiB; CSL server 1,500.0 MiB." in memory


def test_the_page_loads_nothing(tmp_path: Path, pair: list[FinishedRun]) -> None:
    page = page_of(pair, tmp_path)
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not any(word in text for word in ("<script", "<link", "@import", "url(http", "<!DOCTYPE svg"))


def test_the_page_says_how_it_was_made(tmp_path: Path, pair: list[FinishedRun]) -> None:
    page = page_of(pair, tmp_path)
    versions = "python 3.11.7, torch 2.12.0, grpcio 1.81.1"
    started = "2026-02-11 09:42:07+0000"
    assert ["DSL", "a-dsl-run", started, "x86_64, 2 cores <Linux>", versions] in page.rows
    assert ["method", "dsl", "csl"] in page.rows
    assert "dsl-server --name a-csl-run --method csl" in page.text
    assert str(tmp_path) not in page.text
    given = page_of(pair, tmp_path, ("dsl demo --note '<b> & more'",))
    assert "dsl demo --note '<b> & more'" in given.text
    assert "dsl-server --name" not in given.text


def test_the_same_runs_give_the_same_page(tmp_path: Path, pair: list[FinishedRun]) -> None:
    pages = [report.write(pair, tmp_path / "new" / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_figures_as_files(tmp_path: Path, pair: list[FinishedRun]) -> None:
    files = report.figures(pair, tmp_path / "figures")
    assert [file.name for file in files] == [f"{drawing.name}.png" for drawing in report.DRAWINGS]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_many_runs_of_any_method_are_drawn(tmp_path: Path) -> None:
    methods = [*["dsl", "csl"] * 5, "sglr", "fedavg"]
    many = [
        runs.read(make(tmp_path / f"{n}", method, seed=n, model="resnet1202"))
        for n, method in enumerate(methods)
    ]
    assert len(page_of(many, tmp_path).spoken) == len(report.DRAWINGS)


def test_what_cannot_be_reported_is_refused(tmp_path: Path, pair: list[FinishedRun]) -> None:
    with pytest.raises(ConfigError, match="no runs to report"):
        report.write([], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="no runs to report"):
        report.figures([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(pair, tmp_path / "file" / "report.html")


def test_labels_at_lines_ends_keep_apart() -> None:
    assert report._spread([0.9, 0.1, 0.95], 0.1) == pytest.approx([0.9, 0.1, 1.0])
    crowded = sorted(report._spread([0.99, 0.99, 0.98, 0.97], 0.1))
    assert crowded == pytest.approx([0.7, 0.8, 0.9, 1.0])
