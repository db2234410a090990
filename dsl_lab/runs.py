"""A finished run's folder, read into types, and several of them as one table.

Knows the files that a run leaves (run.json, metrics.jsonl, summary.json) and nothing of how they
came to be. The types below mirror the files key by key. MB is 10^6 bytes, as networks count;
MiB is 2^20 bytes, as memory does.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from common.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    accuracy: float
    client_only_accuracy: float | None
    """Of the client with its own head; None where the method has no such head."""


@dataclass(frozen=True)
class Up:
    """Bytes that left the clients, by kind."""

    activations: int
    labels: int
    evaluation: int
    weights: int
    control: int
    framing: int


@dataclass(frozen=True)
class Down:
    """Bytes that the server sent back, by kind."""

    gradients: int
    weights: int
    control: int
    framing: int


@dataclass(frozen=True)
class Both:
    """Bytes both ways."""

    up: int
    down: int


@dataclass(frozen=True)
class Wire:
    up: Up
    down: Down
    socket: Both | None
    """What the kernel counted on the connections: HTTP/2 is in it."""


@dataclass(frozen=True)
class ClientSeconds:
    """Mean of the clients."""

    forward: float
    backward: float
    encode: float
    wait: float


@dataclass(frozen=True)
class ServerSeconds:
    forward: float
    backward: float
    decode: float
    idle: float


@dataclass(frozen=True)
class Seconds:
    wall: float
    client: ClientSeconds
    server: ServerSeconds


@dataclass(frozen=True)
class Peak:
    """Most memory held at once, in bytes."""

    client: int
    server: int


@dataclass(frozen=True)
class Summary:
    """summary.json, as far as it is shown."""

    test: Score
    wire: Wire
    seconds: Seconds
    peak_bytes: Peak


@dataclass(frozen=True)
class Evaluation:
    """A line of metrics.jsonl. Bytes count from the run's start."""

    epoch: int
    test: Score
    wire: Both


@dataclass(frozen=True)
class About:
    """run.json."""

    name: str
    run: dict[str, Any]
    versions: dict[str, Any]
    machine: str
    started: str
    command: list[str] | None


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    about: About
    summary: Summary
    evaluations: tuple[Evaluation, ...]

    @property
    def method(self) -> str:
        return str(self.about.run.get("method", "?"))

    @property
    def payload_up(self) -> int:
        """Bytes of the tensors that training sent up."""
        return self.summary.wire.up.activations + self.summary.wire.up.labels

    @property
    def payload_down(self) -> int:
        """Bytes of the tensors that training sent back."""
        return self.summary.wire.down.gradients

    @property
    def serialized_up(self) -> int:
        """Bytes of all messages up: evaluation, weights, control and framing too."""
        return sum(astuple(self.summary.wire.up))

    @property
    def serialized_down(self) -> int:
        """Bytes of all messages down."""
        return sum(astuple(self.summary.wire.down))

    @property
    def label(self) -> str:
        """For example `DSL · resnet20 · m · 2 clients`."""
        return " · ".join([self.method.upper(), *map(self.fact, _IDENTITY)])

    def fact(self, key: str) -> str:
        """A setting in words, for example `2 clients`."""
        value = self.about.run.get(key, "?")
        return _WORDS.get(key, "{value}").format(value=value, s="" if value == 1 else "s")


_REMEDY = "give the server's folder of a run that has ended"
_IDENTITY = ("model", "split", "clients")
_TELLING = (*_IDENTITY, "head", "sync", "data", "partition", "recipe", "epochs", "seed")
_WORDS = {
    "clients": "{value} client{s}",
    "epochs": "{value} epoch{s}",
    "head": "{value} head",
    "partition": "{value} shares",
    "recipe": "{value} recipe",
    "seed": "seed {value}",
    "sync": "sync {value}",
}

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
    "Payload: tensors of training (activations and labels up, gradients down). "
    "Socket: all that the kernel counted, evaluation and HTTP/2 included. "
    "Peak: most memory held at once. MB = 10⁶ bytes, MiB = 2²⁰ bytes."
)


def read(folder: Path) -> FinishedRun:
    """Raises ConfigError, naming the folder and the remedy, unless a run has ended there."""
    summary = _parsed(Summary, folder, "summary.json", _text(folder, "summary.json"))
    about = _parsed(About, folder, "run.json", _text(folder, "run.json"))
    lines = _text(folder, "metrics.jsonl").splitlines()
    if not lines:
        raise ConfigError(f"{folder}/metrics.jsonl holds no evaluation: {_REMEDY}")
    evaluations = tuple(_parsed(Evaluation, folder, "metrics.jsonl", line) for line in lines)
    return FinishedRun(folder, about, summary, evaluations)


def labels(runs: Sequence[FinishedRun]) -> list[str]:
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


def shared(runs: Sequence[FinishedRun]) -> str:
    """What all runs have in common, for example `resnet20 · m · 2 clients · sample · 3 epochs`."""
    facts = (*_IDENTITY, "data", "epochs")
    return " · ".join(runs[0].fact(key) for key in facts if len({r.fact(key) for r in runs}) == 1)


def table(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """A row of text for each run, in the order of HEADINGS."""
    return [[name, *_cells(run)] for name, run in zip(labels(runs), runs, strict=True)]


def markdown(runs: Sequence[FinishedRun]) -> str:
    """The table, what the runs share, and what the columns mean."""
    heads = [f"{name} ({group})" if group else name for group, name in HEADINGS]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table(runs)]
    lines = ["| " + " | ".join(row) + " |" for row in [heads, rule, *rows]]
    return "\n".join([*lines, "", " ".join(filter(None, [_shared_sentence(runs), NOTES])), ""])


def show(runs: Sequence[FinishedRun], console: "Console") -> None:
    """Print the table; where it is too wide for the console, with a column for each run."""
    rows = table(runs)
    upright = _grid([" ".join(heading).replace(",", "").split() for heading in HEADINGS], rows)
    boundless = console.options.update_width(1000)
    if console.measure(upright, options=boundless).maximum <= console.width:
        console.print(upright)
    else:
        names = [" ".join(filter(None, heading)) for heading in HEADINGS]
        first, *others = zip(names, *rows, strict=True)
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


def _grid(heads: Sequence[Sequence[str]], rows: Iterable[Sequence[str]]) -> "Table":
    """A table of plain text; a heading has a line for each of its words."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, words in enumerate(heads):
        justify: Literal["left", "right"] = "right" if place else "left"
        grid.add_column(Text("\n".join(words)), justify=justify, overflow="fold", vertical="bottom")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _shared_sentence(runs: Sequence[FinishedRun]) -> str:
    return f"All runs: {shared(runs)}." if shared(runs) else ""


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} holds no finished run (no {name}): {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{folder / name} is not text: {_REMEDY}") from error


def _parsed(kind: Any, folder: Path, name: str, text: str) -> Any:
    try:
        return _typed(kind, json.loads(text), name)
    except ValueError as error:
        raise ConfigError(f"{folder} cannot be read ({error}): {_REMEDY}") from error


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The JSON value as this type. Keys that the type does not know are passed over."""
    optional = type(None) in get_args(kind)
    if optional and value is None:
        return None
    whole = get_args(kind)[0] if optional else kind
    made: Any = get_origin(whole) or whole
    structured = is_dataclass(made)
    if structured and isinstance(value, dict):
        hints = get_type_hints(made).items()
        return made(**{key: _typed(hint, value.get(key), f"{where}: {key}") for key, hint in hints})
    if not structured and type(value) in ((int, float) if made is float else (made,)):
        return value
    raise ValueError(f"{where} is " + ("missing" if value is None else f"{value!r}"))
