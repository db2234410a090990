"""What those who look at the page are told: the run as it is, about once a second, and only what has changed.

Three texts, each whole, so that who comes late or comes back needs nothing of what was before: the run
itself (`view`), the lines of metrics.jsonl (`lines`), and how far it had come when (`points`). Knows no HTTP,
but the form of server-sent events.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from dsl_server.dashboard.history import History, Point
from dsl_server.watch import View

TICK_S = 1.0  # from one look at the run to the next
POLL_S = 0.2  # until a reader finds that there has been one
RETRY_MS = 2000  # after which a reader whose connection broke comes back
QUIET_S = 15.0  # after so long without news a comment shows that the connection still stands

Texts = dict[str, str]  # by the name of the event: JSON


class Feed:
    """`look` gives the run as it is at this moment. Any thread may `tick` or `end`."""

    def __init__(self, look: Callable[[], View]) -> None:
        self._look, self._history, self._lock = look, History(), threading.Lock()
        self._written: tuple[View | None, Texts] = None, {}
        self._ended = False
        self._tell(look())

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def lines(self) -> tuple[Mapping[str, Any], ...]:
        """Of metrics.jsonl, as they are there."""
        return self._view.lines

    def tick(self) -> None:
        """Looks at the run again. One that is finished stays so, whatever becomes of its server."""
        with self._lock:
            if not (self._ended or self._view.finished):
                self._tell(self._look())

    def end(self) -> None:
        """The last look, at a run that is over."""
        self.tick()
        self._ended = True

    def texts(self) -> Texts:
        """The run as it is, made once for all who read it."""
        view, texts = self._written
        if view is not self._view:
            view, points = self._view, self._history.points
            run = view.to_dict()
            lines = run.pop("lines")
            texts = {
                "points": _json([[p.seconds, p.samples, p.up, p.down] for p in points]),
                "lines": _json(lines),
                "view": _json(run),
            }
            self._written = view, texts
        return texts

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events until the run is over: first the whole, then what is no longer as it was."""
        told: Texts = {}
        seen, since = None, time.monotonic()
        yield f"retry: {RETRY_MS}\n\n"
        while True:
            last, view = self._ended, self._view
            if view is not seen:
                seen, texts = view, self.texts()
                for name, text in texts.items():
                    if told.get(name) != text:
                        since = time.monotonic()
                        yield f"event: {name}\ndata: {text}\n\n"
                told = texts
            elif time.monotonic() - since > QUIET_S:
                since = time.monotonic()
                yield ": nothing new\n\n"
            if last:
                return
            await asyncio.sleep(POLL_S)

    def _tell(self, view: View) -> None:
        up, down = (sum(view.wire[way].values()) for way in ("up", "down"))
        if view.seconds:
            self._history.add(Point(round(view.seconds, 1), view.samples, up, down))
        self._view = view


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
