"""A view of the run on a terminal: the totals, and a row for each client. Elsewhere it is a line."""

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from common.picture import NONE, Picture, compact, duration, heading, number, stage, table, totals
from common.progress import megabytes
from dsl_server.watch import ClientView, State, View

MOST_ROWS = 20
_OTHER_LINES = 8  # of a terminal: heading, totals, the table's head, the rest in words, a log line or two
_COLUMNS = {
    "client": 8,
    "state": 8,
    "epoch": 5,
    "samples/s": 9,
    "queue": 5,
    "up MB": 8,
    "down MB": 8,
    "loss": 6,
    "lag": 6,
}
# The states by how much they ask for attention, and their colours.
_STYLES: dict[State, str] = {
    "away": "magenta",
    "lost": "red",
    "waiting": "yellow",
    "training": "green",
    "awaited": "dim",
    "left": "blue",
}


def line_of(view: View) -> str:
    return "  ".join(
        [
            f"clients {view.here}/{view.clients_expected}",
            f"epoch {view.epoch + 1}/{view.epochs}",
            *_totals(view, view.samples / max(view.seconds, 1e-9)),
        ]
    )


def picture_of(view: View, program: str) -> Picture:
    def draw(width: int, height: int) -> Iterable[RenderableType]:
        about = f"{view.method} on {view.model} cut at {view.place}"
        yield heading(
            program, about, view.done, stage(view.epoch, view.epochs, view.done, view.left_s), width
        )
        items = [f"clients {view.here}/{view.clients_expected}", *_totals(view, view.rate)]
        yield totals(items, width)
        shown = those_that_matter(view.clients, max(1, min(MOST_ROWS, height - _OTHER_LINES)))
        yield table(_COLUMNS, [_row(client, view.epochs) for client in shown], width, left=2)
        if others := Counter(client.state for client in view.clients if client not in shown):
            counts = ", ".join(f"{others[state]} {state}" for state in _STYLES if others[state])
            yield Text(f"and {others.total()} more: {counts}", style="dim")

    return Picture(draw)


def those_that_matter(clients: Sequence[ClientView], most: int) -> list[ClientView]:
    """If they are too many: those in a state that asks for attention, of the others those that are behind.

    In the order of their numbers.
    """
    ranks = {state: rank for rank, state in enumerate(_STYLES)}
    ranked = sorted(clients, key=lambda client: (ranks[client.state], client.epoch, client.client))
    return sorted(ranked[:most], key=lambda client: client.client)


def _totals(view: View, rate: float) -> list[str]:
    other = view.test.get("metric")
    score = other["joined"] if other else view.test["accuracy"]
    up, down = (sum(view.wire[direction].values()) for direction in ("up", "down"))
    return [
        f"{view.samples:,} samples",
        f"{rate:,.0f}/s",
        f"loss {number(view.loss)}",
        f"{view.metric} {number(score)}",
        f"up {megabytes(up)}",
        f"down {megabytes(down)}",
    ]


def _row(client: ClientView, epochs: int) -> list[str | Text]:
    style = _STYLES[client.state]
    name = client.name or NONE
    row: list[str | Text] = [
        f"{client.client} {name}",
        Text(client.state, style=style),
        f"{client.epoch + 1}/{epochs}",
        f"{client.rate:,.0f}",
        str(client.queue),
        compact(client.up),
        compact(client.down),
        number(client.loss),
        duration(client.lag_s),
    ]
    if client.state == "awaited":
        return [row[0], row[1], *[NONE] * (len(row) - 2)]
    if client.state in ("left", "lost"):
        row[3], row[4], row[8] = NONE, NONE, NONE
    return row
