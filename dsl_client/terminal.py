"""A view of the client on a terminal: its totals, and a row. Elsewhere it is a line."""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from common.picture import Picture, compact, heading, number, stage, table, totals
from common.progress import megabytes
from dsl_client.watch import State, View

_COLUMNS = {
    "state": 9,
    "epoch": 5,
    "batch": 7,
    "samples/s": 9,
    "outbox": 6,
    "up MB": 8,
    "down MB": 8,
    "loss": 6,
    "waits": 5,
}
_STYLES: dict[State, str] = {
    "beginning": "dim",
    "training": "green",
    "waiting": "yellow",
    "between": "cyan",
}


def line_of(view: View) -> str:
    return "  ".join(
        [
            *([f"{view.replicas} replicas, {view.ended} ended"] if view.replicas else []),
            f"epoch {view.epoch + 1}/{view.epochs}",
            f"batch {view.batch}/{view.batches}",
            f"{view.samples / max(view.seconds, 1e-9):,.0f} samples/s",
            f"loss {number(view.loss)}",
            score_of(view.metric, view.score, view.alone),
            bytes_of(view),
        ]
    )


def picture_of(view: View, program: str) -> Picture:
    def draw(width: int, height: int) -> Iterable[RenderableType]:
        about = f"{_who(view)} of {view.clients}  {view.method} on {view.model} cut at {view.place}"
        yield heading(
            program, about, view.done, stage(view.epoch, view.epochs, view.done, view.left_s), width
        )
        yield totals([f"{view.samples:,} samples", score_of(view.metric, view.score, view.alone)], width)
        yield table(_COLUMNS, [_row(view)], width, left=1)

    return Picture(draw)


def score_of(metric: str, score: float | None, alone: float | None) -> str:
    text = f"{metric} {number(score)}"
    return text if alone is None else f"{text} (alone {alone:.3f})"


def bytes_of(view: View) -> str:
    up, down = (sum(view.wire[direction].values()) for direction in ("up", "down"))
    return f"up {megabytes(up)}  down {megabytes(down)}"


def _who(view: View) -> str:
    return f"{view.replicas} replicas ({view.ended} ended)" if view.replicas else str(view.client)


def _row(view: View) -> list[str | Text]:
    up, down = (sum(view.wire[direction].values()) for direction in ("up", "down"))
    return [
        Text(view.state, style=_STYLES[view.state]),
        f"{view.epoch + 1}/{view.epochs}",
        f"{view.batch}/{view.batches}",
        f"{view.rate:,.0f}",
        f"{view.queue}/{view.outbox}",
        compact(up),
        compact(down),
        number(view.loss),
        f"{100 * view.waits:.0f}%",
    ]
