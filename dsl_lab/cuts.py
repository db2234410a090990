"""`dsl cuts`: where a network can be cut, what each cut costs, and which one suits a link and a memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from common.errors import ConfigError
from common.run import bytes_of

if TYPE_CHECKING:
    from dsl_lab.costs import Costs

# Passes' worth of multiply-adds in a training step: the backward pass makes twice those of the forward pass.
_STEP = 3


@dataclass(frozen=True)
class Cuts:
    """Lists where a network can be cut, what each cut costs, and the best one for a link and a memory."""

    model: str
    """The network, as dsl-server's --model."""
    input: str = "3x32x32"
    """The shape of one input: channels x height x width."""
    classes: int = 10
    """How many classes there are."""
    batch_size: Annotated[int, tyro.conf.arg(name="batch-size")] = 128
    """Samples in a batch, for what must be held in memory."""
    link: str = ""
    """The clients' link, such as 10Mbit: marks the cut at which a batch takes the least time."""
    memory: str = ""
    """What a client may hold, such as 512MB: activations of a batch; weights, gradients and momentum."""
    speed: float = 10.0
    """With --link: billions of multiply-adds a second that a client makes."""


def cuts(options: Cuts, console: Console) -> None:
    """Prints the table. Raises ConfigError."""
    rows, best = listed(options)
    table = tabulated(options, rows, best)
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)
    console.print(_verdict(options, rows, best), soft_wrap=True)


def listed(options: Cuts) -> "tuple[list[Costs], Costs | None]":
    """All cuts, from the input on, and the best. Raises ConfigError."""
    rate, memory = _bits_of(options.link), bytes_of("--memory", options.memory)
    if options.batch_size < 1 or not options.speed > 0:
        raise ConfigError(f"--batch-size {options.batch_size}, --speed {options.speed}: must be above 0")
    image = _shape_of(options.input)
    from dsl_lab.costs import costs_of, places_in  # imports torch

    rows = costs_of(places_in(options.model, image, options.classes))
    if not rows:
        raise ConfigError(f"--model {options.model}: there is no layer that it can be cut after")
    return rows, best_of(rows, options.batch_size, rate, memory, options.speed)


def best_of(rows: Sequence["Costs"], batch: int, rate: float, memory: int, speed: float) -> "Costs | None":
    """rate: bits a second, or 0; memory: bytes, or 0; speed: billions of multiply-adds a second.

    Of those that fit the memory: with a link that at which the slower of the client's work and its sending is
    the fastest, else that which sends the least. A client that learns from its own loss does both at once.
    """
    fitting = [row for row in rows if not memory or row.client.bytes(batch) <= memory]
    return min(
        fitting, key=lambda row: (_seconds(row, rate, speed), row.sent_bytes, row.client.macs), default=None
    )


def _seconds(row: "Costs", rate: float, speed: float) -> float:
    """That a sample takes a client, its link being used at the same time."""
    return max(_STEP * row.client.macs / (speed * 1e9), 8 * row.sent_bytes / rate) if rate else 0.0


def tabulated(options: Cuts, rows: Sequence["Costs"], best: "Costs | None") -> Table:
    """A row for each cut; the best is marked where there is a link or a memory to choose by."""
    rate = _bits_of(options.link)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("cut after", "a sample\nsends", "\nkB"):
        table.add_column(heading, justify="right" if "kB" in heading else "left", no_wrap=True)
    for side in ("client", "server"):
        for heading in ("parameters", "MMACs", "MB a batch"):
            table.add_column(f"{side}\n{heading}", justify="right", no_wrap=True)
    if rate:
        table.add_column("samples/s\nover the link", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        shapes = " + ".join("x".join(map(str, shape)) for shape in row.shapes)
        sides = [
            text
            for side in (row.client, row.server)
            for text in (
                f"{side.parameters:,}",
                f"{side.macs / 1e6:,.1f}",
                f"{side.activation_bytes * options.batch_size / 1e6:,.1f}",
            )
        ]
        sent = [f"{rate / 8 / row.sent_bytes:,.1f}"] if rate else []
        mark = "best" if row is best and (options.link or options.memory) else ""
        style = "bold" if mark else None
        table.add_row(row.layer, shapes, f"{row.sent_bytes / 1e3:,.1f}", *sides, *sent, mark, style=style)
    return table


def _verdict(options: Cuts, rows: Sequence["Costs"], best: "Costs | None") -> str:
    of_a_resnet = ":" not in options.model
    said = " and ".join(filter(None, [options.link, options.memory]))
    if best is None:
        least = min(rows, key=lambda row: row.client.bytes(options.batch_size))
        return (
            f"No cut fits {options.memory} with a batch of {options.batch_size}; {least.layer} takes the "
            f"least, {least.client.bytes(options.batch_size) / 1e6:,.1f} MB. Choose a smaller --batch-size."
        )
    flag = "--split" if of_a_resnet else "--cut"
    run = f"dsl-server --model {options.model} {flag} {best.layer if said else flag[2:].upper()}"
    return f"Best for {said}: {run}" if said else f"Choose one: {run}"


def _shape_of(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6}){0,3}", text) is None or 0 in (sides := _sides(text)):
        raise ConfigError(f"--input {text[:40]!r}: say channels x height x width, such as 3x224x224")
    return sides


def _sides(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split("x"))


def _bits_of(text: str) -> float:
    """Of a rate such as 10Mbit, bits a second; 0 of none."""
    if not text:
        return 0.0
    match = re.fullmatch(r"([0-9]{1,9}(?:[.][0-9]{1,9})?) ?([kMG]?)bit(?:/s)?", text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--link {text[:40]!r}: say a rate, such as 10Mbit, 500kbit or 1Gbit")
    return float(match[1]) * 1000.0 ** " kMG".index(match[2] or " ")
