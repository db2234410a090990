"""One live line: in a notebook's cell, on a terminal, or nowhere."""

import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from common import progress

_EVERY_S = 0.5  # a notebook's line is a message to the browser


class Progress:
    """`show` replaces the line, as often as one likes; `end` leaves one that stays. visible: else silent."""

    def __init__(self, visible: bool) -> None:
        self._cell = _Cell() if visible and _in_a_notebook() else None
        self._terminal = progress.Progress("dsl") if visible and not self._cell else None
        self._open = ExitStack()

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._open.enter_context(self._terminal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def show(self, line: str) -> None:
        if self._cell:
            self._cell.show(line)
        elif self._terminal:
            self._terminal.show(line)

    def end(self, line: str) -> None:
        if self._cell:
            self._cell.show(line, at_once=True)
        elif self._terminal:
            self._terminal.log(line)


class _Cell:
    """A line of a cell's output, that is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._due = 0.0

    def show(self, line: str, at_once: bool = False) -> None:
        if time.monotonic() < self._due and not at_once:
            return
        self._due = time.monotonic() + _EVERY_S
        from IPython.display import display

        shown = {"text/plain": line}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)


def _in_a_notebook() -> bool:
    """Whether this is the kernel of one. Who has not imported IPython is in none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
