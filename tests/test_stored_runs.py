"""The runs stored with the benchmark, reported anew: every number in every form is that of its summary.json.

Read here by plain `json`, and written as numbers by this file's own hand.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.run import Run
from dsl_lab import report, table
from dsl_lab.runs import find
from tests.finished import counted, make
from tests.test_report import Page

PAPER = Path(__file__).parent.parent / "benchmarks" / "paper"
STORED = ("smoke", "cpu")

if not PAPER.exists():
    pytest.skip("benchmarks are not in this distribution", allow_module_level=True)


def summaries(scale: str) -> dict[str, Any]:
    """By the name of the run."""
    paths = sorted((PAPER / scale).glob("*/server/summary.json"))
    assert paths, scale
    return {path.parent.parent.name: json.loads(path.read_text()) for path in paths}


def rows(scale: str) -> list[list[str]]:
    """Of the table, but for the method's name: one of all the runs that differ in their seeds."""
    alike: dict[str, list[list[float | None]]] = {}
    for name, summary in summaries(scale).items():
        alike.setdefault(name.rpartition("-seed")[0], []).append(numbers(summary))
    forms = [percent, percent, mb, mb, mb, mb, one_digit, *[mib] * 6]
    several = any(len(runs) > 1 for runs in alike.values())
    return [
        [*([str(len(runs))] if several else []), *map(cell, forms, zip(*runs, strict=True))]
        for runs in alike.values()
    ]


def numbers(summary: Any) -> list[float | None]:
    up, down, socket = (summary["wire"][key] for key in ("up", "down", "socket"))
    return [
        summary["test"]["accuracy"],
        summary["test"]["client_only_accuracy"],
        up["activations"] + up["labels"] + up["gradients"],
        down["activations"] + down["gradients"],
        socket["up"],
        socket["down"],
        summary["seconds"]["wall"],
        summary["peak_bytes"]["client"],
        summary["peak_bytes"]["server"],
        *tensors(summary),
    ]


def tensors(summary: Any) -> list[int]:
    """At the client, at the server, held while it waits, in one process."""
    memory = summary["memory"]
    crossing = 4 * Run().batch_size * math.prod(summary["cut_shape"])
    together = memory["held"] + memory["server"] - crossing if memory["held"] else memory["server"]
    return [*(memory[key] for key in ("client", "server", "held")), max(memory["client"], together)]


def cell(form: Callable[[float], str], values: Sequence[float | None]) -> str:
    told = [value for value in values if value is not None]
    if not told:
        return "–"
    mean = math.fsum(told) / len(told)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in told) / max(1, len(told) - 1))
    return f"{form(mean)} ± {form(spread)}" if spread else form(mean)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def one_digit(seconds: float) -> str:
    return f"{seconds:,.1f}"


def mib(count: float) -> str:
    return f"{count / 1024 / 1024:,.1f}"


def mb(count: float) -> str:
    return f"{count / 1e6:,.2f}" if count >= 5000 else "<0.01" if count else "0"


@pytest.mark.parametrize("scale", STORED)
def test_markdown_and_page_have_every_summarys_numbers(tmp_path: Path, scale: str) -> None:
    runs = find(PAPER / scale)
    html, markdown, *_ = report.publish(runs, tmp_path / "report.html")
    wanted = sorted(rows(scale))
    shown = [row[1:] for row in Page(html.read_text()).rows if len(row) == len(wanted[0]) + 1]
    assert sorted(row for row in shown if row in wanted) == wanted
    lines = [line.strip("| ").split(" | ") for line in markdown.read_text().splitlines()]
    assert sorted(line[1:] for line in lines if line[1:] in wanted) == wanted


@pytest.mark.parametrize("scale", STORED)
def test_csv_has_every_summarys_numbers(scale: str) -> None:
    lines = list(csv.DictReader(io.StringIO(table.comma_separated(find(PAPER / scale)))))
    stored = summaries(scale)
    assert sorted(line["run"] for line in lines) == sorted(stored)
    for line in lines:
        summary = stored[line["run"]]
        wire, seconds = summary["wire"], summary["seconds"]
        wanted = {
            "method": summary["method"],
            "split": summary["split"],
            "clients": summary["clients"],
            "seed": summary["seed"],
            "accuracy": summary["test"]["accuracy"],
            "client_only_accuracy": summary["test"]["client_only_accuracy"],
            "payload_up_bytes": total(wire["up"], "activations", "labels", "gradients"),
            "payload_down_bytes": total(wire["down"], "activations", "gradients"),
            "messages_up_bytes": total(wire["up"], *wire["up"]),
            "messages_down_bytes": total(wire["down"], *wire["down"]),
            "socket_up_bytes": wire["socket"]["up"],
            "socket_down_bytes": wire["socket"]["down"],
            "wall_s": seconds["wall"],
            **{f"{end}_{phase}_s": s for end in ("client", "server") for phase, s in seconds[end].items()},
            **{f"{end}_peak_bytes": summary["peak_bytes"][end] for end in ("client", "server")},
        }
        told = {key: "" if value is None else str(value) for key, value in wanted.items()}
        assert {key: line[key] for key in told} == told


@pytest.mark.parametrize("scale", STORED)
def test_what_is_stored_is_what_the_runs_give(scale: str) -> None:
    """Tables, which the README shows; pictures differ with matplotlib's version."""
    runs = find(PAPER / scale)
    assert (PAPER / scale / "report.md").read_text() == table.markdown(runs)
    assert (PAPER / scale / "report.csv").read_text() == table.comma_separated(runs)
    readme = (PAPER / "README.md").read_text()
    rows = [line for line in table.markdown(runs).splitlines() if line.startswith("| ")]
    assert [row for row in rows if row not in readme] == []


@pytest.mark.parametrize("scale", STORED)
def test_decoupled_runs_send_half_of_what_conventional_ones_do(scale: str) -> None:
    """The paper's claim, of these runs: but for labels, it is exactly half, and none of it comes down."""
    by_name = summaries(scale)
    for name, csl in by_name.items():
        if "-csl-" in name:
            dsl = by_name[name.replace("-csl-", "-dsl-")]["wire"]
            assert dsl["down"]["gradients"] == 0
            assert dsl["up"]["activations"] == csl["wire"]["up"]["activations"]
            assert csl["wire"]["down"]["gradients"] == csl["wire"]["up"]["activations"]


def test_what_one_process_needs_is_what_was_counted_of_one(tmp_path: Path) -> None:
    """From what the two ends hold apart, beside the count of both in one thread (benchmarks/memory): the same
    but for the labels where a client waits; else short of the weights that the resting end keeps."""
    for line in map(json.loads, (PAPER.parent / "memory" / "results.jsonl").read_text().splitlines()):
        kind, row = line["of"][:2]
        if kind != "columns" or "server in" in row:
            continue
        method, _, split = row.split()
        found, shape = line["found"], [16, 32, 32] if split in "sm" else [32, 16, 16]
        live = {key: found[key] for key in ("client", "server", "held")}
        run = counted(make(tmp_path / row, method.lower(), batch_size=128), live, shape)
        assert run.one_process is not None
        if method == "CSL":
            assert found["both"] == run.one_process - 1024
        else:
            assert 0.96 * found["both"] < run.one_process < found["both"]


def total(counts: Any, *kinds: str) -> int:
    return sum(counts[kind] for kind in kinds)
