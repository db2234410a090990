"""Finished runs as a web page: its numbers, its figures, and that it stands alone. The runs are made up."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import ConfigError
from dsl_lab import figures, report
from dsl_lab.runs import FinishedRun, read
from dsl_lab.series import grouped
from tests.finished import CSL_ROW, DSL_ROW, dsl_and_csl, make


@pytest.fixture
def pair(tmp_path: Path) -> list[FinishedRun]:
    return dsl_and_csl(tmp_path)


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


def test_the_page_has_the_summaries_numbers(tmp_path: Path, pair: list[FinishedRun]) -> None:
    page = page_of(pair, tmp_path)
    assert DSL_ROW in page.rows
    assert CSL_ROW in page.rows
    assert "Split learning, measured" in page.text
    assert "MB = 10⁶ bytes" in page.text


def test_the_page_tells_its_figures_in_words(tmp_path: Path, pair: list[FinishedRun]) -> None:
    words = [figures.render(drawing, grouped(pair), "svg")[1] for drawing in figures.DRAWINGS]
    assert page_of(pair, tmp_path).spoken == words


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
    assert ["a-dsl-run", started, "x86_64, 2 cores <Linux>", versions] in page.rows
    assert ["method", "dsl", "csl"] in page.rows
    assert ["model", "resnet20"] in page.rows
    assert "dsl-server --name a-csl-run --method csl" in page.text
    assert str(tmp_path) not in page.text
    given = page_of(pair, tmp_path, ("dsl demo --note '<b> & more'",))
    assert "dsl demo --note '<b> & more'" in given.text
    assert "dsl-server --name" not in given.text


def test_the_same_runs_give_the_same_page(tmp_path: Path, pair: list[FinishedRun]) -> None:
    pages = [report.write(pair, tmp_path / "new" / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_many_runs_of_any_method_are_drawn(tmp_path: Path) -> None:
    methods = [*["dsl", "csl"] * 5, "sglr", "fedavg"]
    many = [
        read(make(tmp_path / f"{n}", method, seed=n, model="resnet1202")) for n, method in enumerate(methods)
    ]
    assert len(page_of(many, tmp_path).spoken) == len(figures.DRAWINGS)


def test_all_forms_of_a_report_lie_side_by_side(tmp_path: Path, pair: list[FinishedRun]) -> None:
    files = report.publish(pair, tmp_path / "out" / "paper.html")
    names = [str(file.relative_to(tmp_path / "out")) for file in files]
    assert names[:3] == ["paper.html", "paper.md", "paper.csv"]
    assert names[3:] == [f"paper-figures/{drawing.name}.png" for drawing in figures.DRAWINGS]
    assert all(file.stat().st_size for file in files)


def test_what_cannot_be_reported_is_refused(tmp_path: Path, pair: list[FinishedRun]) -> None:
    with pytest.raises(ConfigError, match="no runs to report"):
        report.write([], tmp_path / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(pair, tmp_path / "file" / "report.html")
