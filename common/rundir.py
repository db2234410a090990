"""The folder that a process leaves: run.json, metrics.jsonl, checkpoint/, summary.json; audit.jsonl."""

import fcntl
import json
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.disk import replace_file
from common.errors import ConfigError
from common.run import Run, checked

PACKAGES = ("decoupled-split-learning", "torch", "numpy", "grpcio", "protobuf")


class RunFolder:
    """Raises ConfigError when it cannot be made, or has a run in it already, unless that goes on.

    owned: this process writes the run's files; else it only adds lines of its own.
    """

    def __init__(
        self, path: Path | None, run: Run, role: str, goes_on: bool = False, owned: bool = True
    ) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.path = path or Path("runs") / f"{stamp}-{run.name}-{role}"
        if owned and (self.path / "run.json").exists() and not goes_on:
            raise ConfigError(f"--out {self.path} holds a run already; choose another folder or remove it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if owned and not (goes_on and (self.path / "run.json").exists()):
                self._write("run.json", _description(run, role))
        except OSError as error:
            raise ConfigError(f"--out {self.path}: {error.strerror}") from error

    def add_metrics(self, line: dict[str, Any]) -> None:
        self.add_line("metrics.jsonl", line)

    def add_line(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, lines: int) -> list[dict[str, Any]]:
        """Keeps so many lines of metrics.jsonl, and gives them."""
        metrics = self.path / "metrics.jsonl"
        if not metrics.exists():
            return []
        kept: dict[str, dict[str, Any]] = {}
        for text in metrics.read_text().splitlines(keepends=True)[:lines]:
            with suppress(ValueError):  # of a file that lost its end with the machine's power
                kept[text] = json.loads(text)
        replace_file(metrics, "".join(kept))
        return list(kept.values())

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", summary)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        replace_file(self.path / name, json.dumps(content, indent=2) + "\n")


class Held:
    """A folder held by this process as long as it lives: no second one can go on with the same run.

    Raises ConfigError when another has it, or it cannot be written.
    """

    def __init__(self, folder: Path, flag: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / ".lock").open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{flag} {folder}: another process goes on with it; stop that one") from None
        except OSError as error:
            raise ConfigError(f"{flag} {folder}: {error.strerror}") from error

    def release(self) -> None:
        self._file.close()


def run_of(folder: Path) -> Run:
    """The run that the folder is of. Raises ConfigError where there is none, or it is over."""
    try:
        described = json.loads((folder / "run.json").read_text())["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume {folder} holds no run that could go on: {error}") from error
    if (folder / "summary.json").exists():
        raise ConfigError(f"--resume {folder}: that run has ended; its summary.json is there")
    run = Run(**checked(described, f"{folder}/run.json"))
    if not run.lasts:
        raise ConfigError(
            f"--resume {folder}: that run made no checkpoints; start it with --checkpoint-every"
        )
    return run


def _description(run: Run, role: str) -> dict[str, Any]:
    return {
        "name": run.name,
        "role": role,
        "run": asdict(run),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
