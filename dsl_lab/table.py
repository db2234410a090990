"""Finished runs as one table: on a console, as Markdown, as CSV.

A row is a series of runs that differ only in their seeds; in CSV it is a run, its numbers as they were
counted. Knows which numbers are shown, under which heading and in which unit, but nothing of the files that
they come from, nor of the page and the figures, which write numbers as is done here.
MB is 10^6 bytes, as networks count; MiB is 2^20 bytes, as memory does.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsl_lab.reference import NOTE, reference
from dsl_lab.runs import FinishedRun, Runs
from dsl_lab.series import Group, Series, grouped, labels, shared

NOTES = (
    "Joined: the client's part and the server's. Client alone: with its own auxiliary head. "
    "Payload: tensors of training (activations, labels, gradients; not weights). "
    "Socket: all that the kernel counted, evaluation and HTTP/2 included. "
    "Peak: most memory held at once. MB = 10⁶ bytes, MiB = 2²⁰ bytes."
)
LIVE = (
    "Tensors: their most bytes at once; held: those that a client kept while it waited for an answer. "
    "One process: what one with both ends would need at least (what is held and the server's peak, their "
    "activations counted once; where nothing is held, the larger peak, without the other end's weights)."
)
SPREAD = "±: standard deviation of the runs, which differ in their seeds."
_SETTINGS = ("method", "model", "split", "head", "sync", "clients", "data", "partition", "recipe")
_COUNTS = ("train_limit", "test_limit", "epochs", "batch_size", "seed")


@dataclass(frozen=True)
class Column:
    """of: the number of a run, if it has it. text: how it is written. rare: left out where no run has it."""

    group: str
    name: str
    of: Callable[[FinishedRun], float | None]
    text: Callable[[float | None], str]
    rare: bool = False


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.2%}"


def plain(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def megabytes(count: float | None) -> str:
    """In MB; `0` is none at all, `<0.01` is a little, `n/a` was not counted."""
    if not count:
        return "n/a" if count is None else "0"
    return "<0.01" if count < 5_000 else f"{count / 1e6:,.2f}"


def mebibytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.1f}"


def seconds(count: float | None) -> str:
    return "–" if count is None else f"{count:,.1f}"


COLUMNS = (
    Column("test accuracy", "joined", lambda run: run.summary.test.accuracy, percent),
    Column("test accuracy", "client alone", lambda run: run.summary.test.client_only_accuracy, percent),
    Column("test accuracy", "authors", lambda run: reference(run).accuracy, percent, rare=True),
    Column("test metric", "joined", lambda run: run.metric, plain, rare=True),
    Column("test metric", "client alone", lambda run: run.client_metric, plain, rare=True),
    Column("payload, MB", "up", lambda run: run.payload_up, megabytes),
    Column("payload, MB", "down", lambda run: run.payload_down, megabytes),
    Column("payload, MB", "paper up", lambda run: reference(run).up, megabytes, rare=True),
    Column("payload, MB", "paper down", lambda run: reference(run).down, megabytes, rare=True),
    Column("socket, MB", "up", lambda run: run.socket_up, megabytes),
    Column("socket, MB", "down", lambda run: run.socket_down, megabytes),
    Column("time, s", "wall", lambda run: run.summary.seconds.wall, seconds),
    Column("time, s", "authors", lambda run: reference(run).wall, seconds, rare=True),
    Column("peak, MiB", "client", lambda run: run.summary.peak_bytes.client or None, mebibytes, rare=True),
    Column("peak, MiB", "server", lambda run: run.summary.peak_bytes.server or None, mebibytes, rare=True),
    Column("peak, MiB", "authors", lambda run: reference(run).peak, mebibytes, rare=True),
    Column("tensors, MiB", "client", lambda run: run.live_client, mebibytes, rare=True),
    Column("tensors, MiB", "server", lambda run: run.live_server, mebibytes, rare=True),
    Column("tensors, MiB", "held", lambda run: run.held, mebibytes, rare=True),
    Column("tensors, MiB", "one process", lambda run: run.one_process, mebibytes, rare=True),
)


def headings(group: Group) -> list[tuple[str, str]]:
    """The columns: the group, and the column's own name."""
    several = [("", "runs")] if _several(group) else []
    return [("", "method"), *several, *((column.group, column.name) for column in _columns(group))]


def rows(group: Group) -> list[list[str]]:
    """A row of text for each series, in the order of its headings."""
    several = _several(group)
    return [
        [
            name,
            *([str(len(series.runs))] if several else []),
            *(_cell(series, column) for column in _columns(group)),
        ]
        for name, series in zip(labels(group), group, strict=True)
    ]


def notes(group: Group) -> str:
    """What the columns mean."""
    told = any(reference(series.first).up for series in group)
    live = any(series.first.live_client is not None for series in group)
    return " ".join(
        [NOTES, *([LIVE] if live else []), *([SPREAD] if _several(group) else []), *([NOTE] if told else [])]
    )


def markdown(runs: Runs) -> str:
    """The table, what the runs share, and what the columns mean."""
    group = grouped(runs)
    heads = [f"{name} ({over})" if over else name for over, name in headings(group)]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows(group)]
    lines = ["| " + " | ".join(row) + " |" for row in [heads, rule, *body]]
    return "\n".join([*lines, "", " ".join(filter(None, [_shared_sentence(group), notes(group)])), ""])


def comma_separated(runs: Runs) -> str:
    """CSV: a line for each run with its settings, then what it counted, in bytes, seconds and fractions."""
    others = any(run.metric is not None for run in runs)
    lines = [_facts(run, others) for run in runs]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def show(runs: Runs, console: Console) -> None:
    """Print the table; where it is too wide for the console, with a column for each series."""
    group = grouped(runs)
    heads, body = headings(group), rows(group)
    upright = _grid([" ".join(heading).replace(",", "").split() for heading in heads], body)
    boundless = console.options.update_width(1000)
    if console.measure(upright, options=boundless).maximum <= console.width:
        console.print(upright)
    else:
        names = [" ".join(filter(None, heading)) for heading in heads]
        first, *others = zip(names, *body, strict=True)
        console.print(_grid([[name] for name in first], others))
    console.print("", " ".join(filter(None, [_shared_sentence(group), notes(group)])), sep="\n", markup=False)


def _several(group: Group) -> bool:
    return any(len(series.runs) > 1 for series in group)


def _columns(group: Group) -> list[Column]:
    return [
        column
        for column in COLUMNS
        if not column.rare or any(column.of(series.first) is not None for series in group)
    ]


def _cell(series: Series, column: Column) -> str:
    stat = series.stat(column.of)
    if stat is None:
        return column.text(None)
    return column.text(stat.mean) + (f" ± {column.text(stat.spread)}" if stat.spread else "")


def _facts(run: FinishedRun, others: bool) -> dict[str, object]:
    """A run's line of CSV. What it has not is empty. others: there are metrics beside accuracy."""
    summary, beside = run.summary, asdict(reference(run))
    return {
        "run": run.title,
        **{key: run.fact(key) if key == "data" else run.about.run.get(key) for key in (*_SETTINGS, *_COUNTS)},
        "accuracy": summary.test.accuracy,
        "client_only_accuracy": summary.test.client_only_accuracy,
        **({"metric": run.metric, "client_only_metric": run.client_metric} if others else {}),
        "payload_up_bytes": run.payload_up,
        "payload_down_bytes": run.payload_down,
        "messages_up_bytes": run.serialized_up,
        "messages_down_bytes": run.serialized_down,
        "socket_up_bytes": run.socket_up,
        "socket_down_bytes": run.socket_down,
        "wall_s": summary.seconds.wall,
        **{f"client_{phase}_s": spent for phase, spent in asdict(summary.seconds.client).items()},
        **{f"server_{phase}_s": spent for phase, spent in asdict(summary.seconds.server).items()},
        "client_peak_bytes": summary.peak_bytes.client or None,
        "server_peak_bytes": summary.peak_bytes.server or None,
        "client_tensor_bytes": run.live_client,
        "server_tensor_bytes": run.live_server,
        "client_held_bytes": run.held,
        "one_process_bytes": run.one_process,
        **{f"reference_{name}": value for name, value in beside.items()},
    }


def _grid(heads: Sequence[Sequence[str]], body: Iterable[Sequence[str]]) -> Table:
    """A table of plain text; a heading has a line for each of its words."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, words in enumerate(heads):
        justify: Literal["left", "right"] = "right" if place else "left"
        grid.add_column(Text("\n".join(words)), justify=justify, overflow="fold", vertical="bottom")
    for row in body:
        grid.add_row(*map(Text, row))
    return grid


def _shared_sentence(group: Group) -> str:
    return f"All runs: {shared(group)}." if shared(group) else ""
