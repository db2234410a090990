"""Finished runs drawn: the files, what each figure says in words, and labels that keep apart."""

import itertools
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from common.errors import ConfigError
from dsl_lab import figures
from dsl_lab.panels import STYLE
from dsl_lab.runs import Runs, read
from dsl_lab.series import grouped
from tests.finished import counted, dsl_and_csl, make, the_papers


def test_figures_are_told_in_words(tmp_path: Path) -> None:
    pair = dsl_and_csl(tmp_path)
    accuracy, traffic, memory, time, cost = (
        figures.render(drawing, grouped(pair), "svg")[1] for drawing in figures.DRAWINGS
    )
    assert "DSL 61.25%; DSL, client alone 55.50%; CSL 61.25%." in accuracy
    assert "DSL up 60.05 MB; DSL down 0.01 MB; CSL up 60.05 MB; CSL down 48.01 MB." in traffic
    assert "DSL 61.25% after 60.01 MB; CSL 61.25% after 108.00 MB." in cost
    assert "DSL client forward 2.0 backward 3.5 encode / decode 0.2 wait / idle 1.5;" in time
    assert "CSL client 420.0 MiB; CSL server 1,500.0 MiB." in memory


def test_figures_as_files(tmp_path: Path) -> None:
    files = figures.write(dsl_and_csl(tmp_path), tmp_path / "figures")
    assert [file.name for file in files] == [f"{drawing.name}.png" for drawing in figures.DRAWINGS]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs to report"):
        figures.write([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        figures.write(dsl_and_csl(tmp_path), tmp_path / "file" / "figures")


def test_many_series_stand_in_panels_of_one_scale(tmp_path: Path) -> None:
    """Nothing that is written overlaps, and each panel has only its own."""
    runs = [
        read(make(tmp_path / f"{method}{split}{clients}", method, split=split, clients=clients))
        for clients in (1, 10)
        for split in ("s", "m", "d")
        for method in ("csl", "dsl")
    ]
    for drawing in figures.DRAWINGS:
        figure = drawn(drawing, runs)
        assert [axes.get_title("left") for axes in figure.axes][:4] == [
            "1 client · cut at s",
            "1 client · cut at m",
            "1 client · cut at d",
            "10 clients · cut at s",
        ]
        assert len({axes.get_xlim() for axes in figure.axes}) == 1
        assert overlaps(figure) == []


@pytest.mark.parametrize("drawing", figures.DRAWINGS, ids=lambda drawing: str(drawing.name))
def test_nothing_written_overlaps(tmp_path: Path, drawing: figures.Drawing) -> None:
    alike = [read(make(tmp_path / f"{n}", "dsl", accuracy=0.5 + n / 50, seed=n)) for n in range(3)]
    theirs = [the_papers(tmp_path / method, method) for method in ("dsl", "csl")]
    long = [read(make(tmp_path / f"{n}-long", "splitfed-v2", data="a" * 30, head=f"b{n}")) for n in range(3)]
    for runs in (dsl_and_csl(tmp_path), [*alike, *theirs], long):
        assert overlaps(drawn(drawing, runs)) == [], runs


def test_several_seeds_are_one_line_and_one_bar(tmp_path: Path) -> None:
    runs = [read(make(tmp_path / f"{n}", "dsl", accuracy=0.5 + n / 10, seed=n)) for n in range(3)]
    words = [figures.render(drawing, grouped(runs), "svg")[1] for drawing in figures.DRAWINGS]
    assert words[0].endswith("DSL 60.00%; DSL, client alone 55.50%.")
    assert words[1].count("DSL up") == 1


def test_what_is_held_and_what_one_process_needs_are_drawn(tmp_path: Path) -> None:
    """Where the tensors of all runs were counted; no number lies on the line of another."""
    (memory,) = (drawing for drawing in figures.DRAWINGS if drawing.name == "memory")
    live = {"csl": (500, 400, 480), "dsl": (480, 400, 0)}
    runs = [
        counted(
            make(tmp_path / f"{method}{n}", method, split=split, seed=n, batch_size=8),
            {
                key: (count + n) * 2**20
                for key, count in zip(("client", "server", "held"), counts, strict=True)
            }
            | ({} if counts[2] else {"held": 0}),
            [16, 32, 32],
        )
        for method, counts in live.items()
        for n, split in enumerate(("s", "s", "m"))
    ]
    figure = drawn(memory, runs)
    assert overlaps(figure) == []
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["held while waiting", "one process for both"]
    line = {
        round(artist.get_xdata()[0])
        for axes in figure.axes
        for artist in axes.lines
        if artist.get_xdata()[0] > 1
    }
    assert 880 in line, "480.5 held and 400.5 at the server, of which 0.5 are the same: the mean of two seeds"
    none = [run for run in runs if run.method == "dsl"]
    assert "held while waiting" not in {t.get_text() for t in drawn(memory, none).legends[0].get_texts()}


def drawn(drawing: figures.Drawing, runs: Runs) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        drawing.draw(figure, grouped(runs))
        FigureCanvasAgg(figure).draw()
    return figure


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that touch, and texts that are cut off at the figure's edge."""
    shown = [(text.get_text(), text.get_window_extent()) for text in written(figure)]
    whole = figure.bbox.padded(1)
    cut = [
        (name, "edge") for name, box in shown if not (whole.contains(*box.min) and whole.contains(*box.max))
    ]
    return cut + [
        (one, other)
        for (one, box), (other, its) in itertools.combinations(shown, 2)
        if box.padded(-0.5).overlaps(its.padded(-0.5))
    ]


def written(figure: Figure) -> list[Text]:
    """Every text that is seen. (A figure also has tick labels beyond its axes' ends, which are not.)"""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if axes.axison:
            texts += [axes._left_title, *axes.texts]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                places = axis.get_majorticklocs()
                ticks = zip(places, axis.get_major_ticks(len(places)), strict=True)
                texts += [tick.label1 for at, tick in ticks if low <= at <= high]
    return [text for text in texts if text.get_visible() and text.get_text()]
