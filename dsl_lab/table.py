"""Finished runs as one table: a row for each run, on a console or as Markdown.

Knows which numbers of a run are shown, under which heading and in which unit, but nothing of the files
that they come from, nor of the page and the figures, which name runs and write numbers as is done here.
MB is 10^6 bytes, as networks count; MiB is 2^20 bytes, as memory does.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsl_lab.runs import IDENTITY, FinishedRun, Runs

# The columns: the group, and the column's own name.
HEADINGS = (
    ("", "method"),
    ("test accuracy", "joined"),
    ("test accuracy", "client alone"),
    ("payload, MB", "up"),
    ("payload, MB", "down"),
    ("socket, MB", "up"),
    ("socket, MB", "down"),
    ("time, s", "wall"),
    ("peak, MiB", "client"),
    ("peak, MiB", "server"),
)
NOTES = (
    "Joined: the client's part and the server's. Client alone: with its own auxiliary head. "
    "Payload: tensors of training (activations, labels, gradients; not weights). "
    "Socket: all that the kernel counted, evaluation and HTTP/2 included. "
    "Peak: most memory held at once. MB = 10⁶ bytes, MiB = 2²⁰ bytes."
)
_TELLING = (*IDENTITY, "head", "sync", "data", "partition", "recipe", "epochs", "seed")


def labels(runs: Runs) -> list[str]:
    """One short name for each run: its method and what tells it from the others."""
    told = [key for key in _TELLING if len({run.fact(key) for run in runs}) > 1]
    names = [" · ".join([run.method.upper(), *map(run.fact, told)]) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} · {run.about.name}" for name, run in zip(names, runs, strict=True)]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        names[place] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def shared(runs: Runs) -> str:
    """What all runs have in common, for example `resnet20 · m · 2 clients · sample · 3 epochs`."""
    facts = (*IDENTITY, "data", "epochs")
    return " · ".join(runs[0].fact(key) for key in facts if len({r.fact(key) for r in runs}) == 1)


def rows(runs: Runs) -> list[list[str]]:
    """A row of text for each run, in the order of HEADINGS."""
    return [[name, *_cells(run)] for name, run in zip(labels(runs), runs, strict=True)]


def markdown(runs: Runs) -> str:
    """The table, what the runs share, and what the columns mean."""
    heads = [f"{name} ({group})" if group else name for group, name in HEADINGS]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows(runs)]
    lines = ["| " + " | ".join(row) + " |" for row in [heads, rule, *body]]
    return "\n".join([*lines, "", " ".join(filter(None, [_shared_sentence(runs), NOTES])), ""])


def show(runs: Runs, console: Console) -> None:
    """Print the table; where it is too wide for the console, with a column for each run."""
    body = rows(runs)
    upright = _grid([" ".join(heading).replace(",", "").split() for heading in HEADINGS], body)
    boundless = console.options.update_width(1000)
    if console.measure(upright, options=boundless).maximum <= console.width:
        console.print(upright)
    else:
        names = [" ".join(filter(None, heading)) for heading in HEADINGS]
        first, *others = zip(names, *body, strict=True)
        console.print(_grid([[name] for name in first], others))
    console.print("", " ".join(filter(None, [_shared_sentence(runs), NOTES])), sep="\n", markup=False)


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.2%}"


def megabytes(count: int | None) -> str:
    """In MB; `0` is none at all, `<0.01` is a little, `n/a` was not counted."""
    if not count:
        return "n/a" if count is None else "0"
    return "<0.01" if count < 5_000 else f"{count / 1e6:,.2f}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def _cells(run: FinishedRun) -> list[str]:
    test, peak, socket = run.summary.test, run.summary.peak_bytes, run.summary.wire.socket
    return [
        percent(test.accuracy),
        percent(test.client_only_accuracy),
        megabytes(run.payload_up),
        megabytes(run.payload_down),
        megabytes(socket.up if socket else None),
        megabytes(socket.down if socket else None),
        f"{run.summary.seconds.wall:,.1f}",
        mebibytes(peak.client),
        mebibytes(peak.server),
    ]


def _grid(heads: Sequence[Sequence[str]], body: Iterable[Sequence[str]]) -> Table:
    """A table of plain text; a heading has a line for each of its words."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, words in enumerate(heads):
        justify: Literal["left", "right"] = "right" if place else "left"
        grid.add_column(Text("\n".join(words)), justify=justify, overflow="fold", vertical="bottom")
    for row in body:
        grid.add_row(*map(Text, row))
    return grid


def _shared_sentence(runs: Runs) -> str:
    return f"All runs: {shared(runs)}." if shared(runs) else ""
