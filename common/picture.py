"""What the programs' live views are drawn with: a heading with a bar, totals that wrap whole, a table.

Knows widths and colours, and nothing of what is shown.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NONE = "–"
_BAR = 40  # at most


class Picture:
    """Drawn anew at each refresh, in the width and height that there are then."""

    def __init__(self, draw: Callable[[int, int], Iterable[RenderableType]]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._draw(options.max_width, options.height or console.height)


def stage(epoch: int, epochs: int, done: float, left_s: float | None) -> str:
    """How far it is, epochs counted from 0, and how long it will take."""
    text = f"epoch {epoch + 1}/{epochs}  {100 * done:.0f}%"
    return text if left_s is None else f"{text}  {duration(left_s)} left"


def heading(program: str, about: str, done: float, after: str, width: int) -> Table:
    """One line: the program and what it is at, a bar of the fraction that is done, a few words after it."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    room = width - len(program) - len(about) - len(after) - 6
    bar = ProgressBar(total=1.0, completed=min(1.0, done), width=max(4, min(_BAR, room)))
    if room >= 8:
        grid.add_column(justify="right")
    grid.add_column(no_wrap=True, justify="right")
    title = Text.assemble((program, "bold cyan"), f"  {about}")
    grid.add_row(title, *([bar] if room >= 8 else []), Text(after, style="cyan"))
    return grid


def totals(items: Sequence[str], width: int) -> Text:
    """Side by side; an item that does not fit begins the next line."""
    lines = [""]
    for item in items:
        longer = f"{lines[-1]}  {item}" if lines[-1] else item
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(item)
    return Text("\n".join(lines))


def table(columns: Mapping[str, int], rows: Sequence[Sequence[str | Text]], width: int, left: int) -> Table:
    """columns: by name, each with its least width, so that it does not jump when its numbers grow.

    The first `left` of them begin at the left, the others end at the right. Where there is too little room
    the first one gives way.
    """
    airy = sum(columns.values()) + 2 * len(columns) <= width
    made = Table(
        box=None,
        header_style="dim",
        padding=(0, 2 if airy else 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for index, (name, least) in enumerate(columns.items()):
        made.add_column(
            name,
            justify="left" if index < left else "right",
            no_wrap=True,
            overflow="ellipsis",
            min_width=max(least, len(name)),
        )
    for row in rows:
        made.add_row(*row)
    return made


def number(value: float | None, places: int = 3) -> str:
    return NONE if value is None else f"{value:,.{places}f}"


def compact(count: int) -> str:
    """Bytes as MB, in no more characters than it takes to compare them."""
    value = count / 1e6
    return f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """As 0.4 s, 12 s, 3:05 or 1:02:09."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
