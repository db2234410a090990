"""How a program shows where it is: a live picture on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


class Progress:
    """`show` replaces the live picture, as often as one likes; `log` writes a line that stays."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._plain_due = time.monotonic() + PLAIN_INTERVAL_S

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Nothing is live any more: the terminal is as it was, whatever now becomes of the process."""
        self._live.stop()

    def log(self, line: str) -> None:
        self._console.print(Text(f"{self._program}: {line}"))

    def show(self, line: str, picture: RenderableType | None = None) -> None:
        """line: all that is shown, now and then, where there is no terminal. picture: instead, on one."""
        if self._console.is_terminal:
            self._live.update(
                picture or Text(f"{self._program}: {line}", style="cyan", no_wrap=True, overflow="ellipsis")
            )
        elif time.monotonic() >= self._plain_due:
            self._plain_due = time.monotonic() + PLAIN_INTERVAL_S
            self.log(line)


def megabytes(count: int) -> str:
    """Bytes in units of 10^6, for a person."""
    return f"{count / 1e6:,.1f} MB"
