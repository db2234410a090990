"""A run's metrics as they come: whole lines of its metrics.jsonl, each once."""

from pathlib import Path

from dsl_lab.runs import Evaluation, evaluation_of


class Lines:
    """Of the server's folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / "metrics.jsonl", 0

    def new(self) -> list[Evaluation]:
        """Those that have come since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")  # a line that is still being written waits
        self._offset += len(whole) + len(newline)
        return [evaluation_of(self._path.parent, line) for line in whole.decode().splitlines()]
