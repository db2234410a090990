"""Who came, went, was refused or lost, and what was saved: a line each in audit.jsonl.

Of a server of several ranks each has its own: audit.jsonl, audit-1.jsonl and so on.
"""

import time
from collections.abc import Callable
from typing import Literal
from urllib.parse import unquote

from common.errors import ClosedError
from common.rundir import RunFolder

Event = Literal["joined", "came back", "took over", "refused", "away", "left", "lost", "checkpoint"]


class Audit:
    """`on_failure`: told why it cannot be written; nobody is served unrecorded."""

    def __init__(self, folder: RunFolder, on_failure: Callable[[ClosedError], None], rank: int = 0) -> None:
        self._folder, self._on_failure = folder, on_failure
        self._file = f"audit-{rank}.jsonl" if rank else "audit.jsonl"

    def __call__(self, event: Event, peer: str, name: str, reason: object = "") -> None:
        """`peer`: an address as gRPC has it. JSON escapes what a client may have put into its name."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "event": event,
            "peer": unquote(peer),
            "name": name[:64],
            "reason": str(reason),
        }
        try:
            self._folder.add_line(self._file, line)
        except OSError as error:
            self._on_failure(ClosedError(f"the server cannot write its audit log: {error.strerror}"))
