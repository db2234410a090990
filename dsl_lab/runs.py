"""A finished run's folder, read into types.

Knows the files that a run leaves (run.json, metrics.jsonl, summary.json), but neither how they came
to be nor how they are shown. The types mirror the files key by key.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.errors import ConfigError

# The settings that name a run, and how a setting is put in words.
IDENTITY = ("model", "split", "cut", "clients")
_WORDS = {
    "client_modules": "{value} client module{s}",
    "clients": "{value} client{s}",
    "cut": "cut after {value}",
    "epochs": "{value} epoch{s}",
    "head": "{value} head",
    "metric": "scored by {value}",
    "partition": "{value} shares",
    "recipe": "{value} recipe",
    "seed": "seed {value}",
    "server_modules": "{value} server module{s}",
    "sync": "sync {value}",
    "train_limit": "{value:,} training images",
}
SERVER = "server"  # the role, and in a sweep the folder, of a run's server
_SPLITS = ("s", "m", "d")  # the later, the more of the network the client has
_REMEDY = "give the server's folder of a run that has ended"


@dataclass(frozen=True)
class Metric:
    """Of a run that is not scored by accuracy."""

    name: str
    joined: float
    client_only: float | None


@dataclass(frozen=True)
class Score:
    accuracy: float | None
    """None where the run's metric is another."""
    client_only_accuracy: float | None
    """Of the client with its own head; None where the method has no such head."""
    metric: Metric | None

    @property
    def name(self) -> str:
        """Of the metric, the last part: accuracy, or another."""
        return self.metric.name.rpartition(":")[2] if self.metric else "accuracy"

    @property
    def joined(self) -> float | None:
        """By whichever metric."""
        return self.metric.joined if self.metric else self.accuracy

    @property
    def client_only(self) -> float | None:
        return self.metric.client_only if self.metric else self.client_only_accuracy


@dataclass(frozen=True)
class Up:
    """Bytes that left the clients, by kind."""

    activations: int
    labels: int
    gradients: int
    evaluation: int
    weights: int
    control: int
    framing: int


@dataclass(frozen=True)
class Down:
    """Bytes that the server sent back, by kind."""

    activations: int
    gradients: int
    evaluation: int
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
    """Most memory held at once, in bytes; 0 where it is not known, since both ends shared a process."""

    client: int
    server: int


@dataclass(frozen=True)
class Live:
    """Most bytes of tensors at once; held: that a client kept while it waited for an answer."""

    client: int
    server: int
    held: int


@dataclass(frozen=True)
class Summary:
    """summary.json, as far as it is shown."""

    test: Score
    wire: Wire
    seconds: Seconds
    peak_bytes: Peak
    memory: Live | None
    """None where tensors were not counted."""
    cut_shape: list[int] | None
    """Of a sample's activations, fp32."""


@dataclass(frozen=True)
class Losses:
    """Means of the samples trained on since the last evaluation; None where an end has no loss of its own."""

    loss: float | None
    """The server's."""
    client_loss: float | None


@dataclass(frozen=True)
class Evaluation:
    """A line of metrics.jsonl. Bytes and seconds count from the run's start, epochs from 1."""

    epoch: int
    seconds: float
    samples_trained: int
    train: Losses
    test: Score
    wire: Both


@dataclass(frozen=True)
class About:
    """run.json."""

    name: str
    role: str | None
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
        up = self.summary.wire.up
        return up.activations + up.labels + up.gradients

    @property
    def payload_down(self) -> int:
        """Bytes of the tensors that training sent back."""
        return self.summary.wire.down.activations + self.summary.wire.down.gradients

    @property
    def serialized_up(self) -> int:
        """Bytes of all messages up: evaluation, weights, control and framing too."""
        return sum(astuple(self.summary.wire.up))

    @property
    def serialized_down(self) -> int:
        """Bytes of all messages down."""
        return sum(astuple(self.summary.wire.down))

    @property
    def socket_up(self) -> int | None:
        """Bytes that the kernel counted; None where it was not asked."""
        return self.summary.wire.socket.up if self.summary.wire.socket else None

    @property
    def socket_down(self) -> int | None:
        return self.summary.wire.socket.down if self.summary.wire.socket else None

    @property
    def live_client(self) -> int | None:
        """Most bytes of tensors at once, of the client that had most; None where they were not counted."""
        return self.summary.memory.client if self.summary.memory else None

    @property
    def live_server(self) -> int | None:
        return self.summary.memory.server if self.summary.memory else None

    @property
    def held(self) -> int | None:
        """Most bytes of tensors that a client kept while it waited for an answer."""
        return self.summary.memory.held if self.summary.memory else None

    @property
    def one_process(self) -> int | None:
        """Bytes of tensors that one process would need at least, if it had both ends of a batch.

        Where a client waits: what it holds then and the server's peak, the activations between them counted
        once. Else one end is done before the other begins: the larger peak, without what rests at the other.
        """
        memory, cut, batch = self.summary.memory, self.summary.cut_shape, self.about.run.get("batch_size")
        if memory is None:
            return None
        if not memory.held:
            return max(memory.client, memory.server)
        if not cut or not isinstance(batch, int):
            return None
        return max(memory.client, memory.held + memory.server - 4 * batch * math.prod(cut))

    @property
    def metric(self) -> float | None:
        """Of the joined network, where it is not accuracy."""
        return self.summary.test.metric.joined if self.summary.test.metric else None

    @property
    def client_metric(self) -> float | None:
        return self.summary.test.metric.client_only if self.summary.test.metric else None

    @property
    def title(self) -> str:
        """The folder's name, or in a sweep that of the run's."""
        return self.folder.parent.name if self.folder.name == SERVER else self.folder.name

    def fact(self, key: str) -> str:
        """A setting in words, for example `2 clients`; empty where there is nothing to say."""
        value = self.about.run.get(key)
        if not value:
            return ""
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if key == "data":
            value = _without_folders(value)
        if key == "model":
            value = value.removeprefix("__main__:")  # a script's, or a notebook's, own
        if key == "split" and self.about.run.get("cut"):
            return ""  # which only resnetN has
        if key == "split" and value.isdecimal():
            value = f"block {value}"
        return _WORDS.get(key, "{value}").format(value=value, s="" if value == 1 else "s")


Runs = Sequence[FinishedRun]


def read(folder: Path) -> FinishedRun:
    """Raises ConfigError, naming the folder and the remedy, unless a run has ended there."""
    summary = _parsed(Summary, folder, "summary.json", _text(folder, "summary.json"))
    about = _parsed(About, folder, "run.json", _text(folder, "run.json"))
    lines = _text(folder, "metrics.jsonl").splitlines()
    if not lines:
        raise ConfigError(f"{folder}/metrics.jsonl holds no evaluation: {_REMEDY}")
    evaluations = tuple(evaluation_of(folder, line) for line in lines)
    return FinishedRun(folder, about, summary, evaluations)


def evaluation_of(folder: Path, line: str) -> Evaluation:
    """Of a line of the folder's metrics.jsonl. Raises ConfigError where it is none."""
    evaluation: Evaluation = _parsed(Evaluation, folder, "metrics.jsonl", line)
    return evaluation


def find(folder: Path) -> list[FinishedRun]:
    """The run whose server's folder this is, or else all finished ones below it, in the order of a table.

    Raises ConfigError where there is none.
    """
    if (folder / "run.json").exists() or not folder.is_dir():
        return [read(folder)]
    ended = [path.parent for path in folder.rglob("summary.json") if (path.parent / "run.json").exists()]
    runs = [read(path) for path in ended if _role(path) == SERVER]
    if not runs:
        raise ConfigError(f"{folder} holds no finished run: {_REMEDY}, or one that holds such folders")
    return sorted(runs, key=_order)


def at_least_one(runs: Runs) -> Runs:
    """The same runs. Raises ConfigError when there are none."""
    if not runs:
        raise ConfigError("no runs to report: name at least one finished run's folder")
    return runs


def _order(run: FinishedRun) -> tuple[object, ...]:
    settings = run.about.run
    split = str(settings.get("split"))
    place = _SPLITS.index(split) if split in _SPLITS else len(_SPLITS)
    clients, seed = (int(settings.get(key, 0)) for key in ("clients", "seed"))
    return run.fact("data"), run.fact("model"), clients, place, split, run.method, seed, str(run.folder)


def _role(folder: Path) -> str | None:
    role: str | None = _parsed(About, folder, "run.json", _text(folder, "run.json")).role
    return role


def _without_folders(source: str) -> str:
    """npz:FILE, folder:DIR: where they lie is nobody's business."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{Path(path).name}" if colon else source


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
