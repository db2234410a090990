"""Finished runs drawn: the files, what each figure says in words, and labels that keep apart."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from dsl_lab import figures
from tests.finished import dsl_and_csl


def test_figures_are_told_in_words(tmp_path: Path) -> None:
    pair = dsl_and_csl(tmp_path)
    accuracy, traffic, cost, time, memory = (
        figures.render(drawing, pair, "svg")[1] for drawing in figures.DRAWINGS
    )
    assert "DSL  61.25%; DSL, client alone  55.50%; CSL  61.25%." in accuracy
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


def test_labels_at_lines_ends_keep_apart() -> None:
    assert figures._spread([0.9, 0.1, 0.95], 0.1) == pytest.approx([0.9, 0.1, 1.0])
    crowded = sorted(figures._spread([0.99, 0.99, 0.98, 0.97], 0.1))
    assert crowded == pytest.approx([0.7, 0.8, 0.9, 1.0])
