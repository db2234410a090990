"""What a client remembers from one membership of a run to the next: who it is, where it was, what it sent.

In memory it outlives its server; in a folder (--state) also its own process, killed at any instant.
"""

import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.checkpoint import Checkpoints, Saved
from common.disk import replace_file, until_written
from common.errors import ConfigError, RefusedError
from common.parts import State
from common.rundir import Held
from dsl_client.spool import Spool, told_of

_KEPT = 2  # snapshots of a client that need not go back: the newest, and one in case that is damaged


@dataclass(frozen=True)
class Snapshot:
    """A client after its batch of this number. waypoint: it may have to come back to here."""

    sequence: int
    tensors: State
    facts: dict[str, Any]
    waypoint: bool


class Memory:
    """folder: None for the memory of this process. on_trouble: told, loudly, of what cannot be read, or not
    be written for now.

    Raises ConfigError when another process has the folder, or it cannot be written.
    """

    def __init__(
        self, folder: Path | None = None, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._on_trouble = folder, on_trouble
        self.identity, self.run_id, self.durable = secrets.token_hex(16), "", 0
        self._spool: Spool | None = None
        self._snapshots: dict[int, Snapshot] = {}  # by a number that grows; on disk without their tensors
        self._made = 0
        self._lock = threading.Lock()
        self._disk: Checkpoints | None = None
        if folder is not None:
            self._held = Held(folder, "--state")
            self._disk = Checkpoints(folder / "snapshots", on_disk=False)
            self._disk.tidy()
            try:
                self._recall(folder)
            except ConfigError:
                self._held.release()
                raise

    @property
    def lasting(self) -> bool:
        """Whether it outlives the process."""
        return self._folder is not None

    def belongs_to(self, run_id: str) -> None:
        """The run that it is of, from now on. Raises RefusedError if it is of another."""
        if self.run_id and self.run_id != run_id:
            raise RefusedError(f"the server has run {run_id}; this client is in the middle of {self.run_id}")
        self.run_id = run_id
        self._write()

    def spool(self, limit: int) -> Spool:
        """Raises ConfigError where what was kept cannot be read."""
        folder = self._folder / "spool" if self._folder else None
        self._spool = Spool(limit, folder, self.durable, self._on_trouble)
        return self._spool

    def throw_away(self, sequence: int) -> bool:
        """What no checkpoint of the server can ask for: batches up to this one, and states before it; whether
        that is news. Raises WireError for a batch that is still to be made."""
        with self._lock:
            if sequence <= self.durable:
                return False
            if self._spool:
                self._spool.check_made(sequence)
            self.durable = sequence
            self._write()  # first: a join must not promise what is gone
            if self._spool:
                self._spool.trim(sequence)
            self._drop([n for n, snapshot in self._snapshots.items() if self._is_past(n, snapshot)])
            return True

    def keep(self, snapshot: Snapshot, goes_back: bool) -> None:
        """The newest state. Of those before it waypoints stay, if the client may have to go back, until they
        are thrown away; else the last one does."""
        number = self._made + 1
        if self._disk and self._folder:  # unlocked: if the disk is full, others must throw away
            facts = {**snapshot.facts, "sequence": snapshot.sequence, "waypoint": snapshot.waypoint}
            saved = Saved(number, snapshot.tensors, facts)
            self._until_written(partial(self._disk.write, saved), self._folder)
        with self._lock:
            self._made = number
            before = list(self._snapshots)
            tensors = {} if self._disk else snapshot.tensors
            self._snapshots[number] = Snapshot(snapshot.sequence, tensors, snapshot.facts, snapshot.waypoint)
            if goes_back:
                self._drop([n for n in before[-1:] if not self._snapshots[n].waypoint])
            else:
                self._drop(before[: 1 - _KEPT])

    def recalled(self, sequence: int | None = None) -> Snapshot | None:
        """The newest state: of all, or of those after the batch of this number."""
        with self._lock:
            for number, known in sorted(self._snapshots.items(), reverse=True):
                if sequence is not None and known.sequence != sequence:
                    continue
                if self._disk is None:
                    return known
                try:
                    saved = self._disk.read(number)
                except ConfigError as error:
                    self._on_trouble(f"{error}; the one before is used")
                    continue
                return Snapshot(known.sequence, dict(saved.tensors), dict(saved.facts), known.waypoint)
            return None

    def forget_after(self, snapshot: Snapshot) -> None:
        """The client goes on from here: what came later is no more."""
        with self._lock:
            self._drop([n for n, known in self._snapshots.items() if known.sequence > snapshot.sequence])

    def _is_past(self, number: int, snapshot: Snapshot) -> bool:
        return snapshot.sequence < self.durable and number != max(self._snapshots)

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._snapshots[number]
        if self._disk and numbers:
            self._disk.drop(keep=lambda number: number in self._snapshots)

    def _write(self) -> None:
        if self._folder is not None:
            known = {"identity": self.identity, "run_id": self.run_id, "durable": self.durable}
            file, text = self._folder / "client.json", json.dumps(known) + "\n"
            self._until_written(partial(replace_file, file, text, 0o600), self._folder)

    def _until_written(self, write: Callable[[], None], folder: Path) -> None:
        until_written(write, told_of(folder, self._on_trouble))

    def _recall(self, folder: Path) -> None:
        file = folder / "client.json"
        if not file.exists():
            self._write()
            return
        try:
            known = json.loads(file.read_text())
            self.identity, self.run_id = str(known["identity"]), str(known["run_id"])
            self.durable = int(known["durable"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--state {folder}: client.json cannot be read: {error}") from error
        assert self._disk is not None
        for saved in reversed(list(self._disk.newest(self._on_trouble))):
            facts = dict(saved.facts)
            self._snapshots[saved.number] = Snapshot(facts["sequence"], {}, facts, facts["waypoint"])
        self._made = max(self._disk.numbers(), default=0)
