"""The folder that a process leaves: run.json, metrics.jsonl, checkpoint/, summary.json; audit.jsonl."""

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.run import Run

PACKAGES = ("decoupled-split-learning", "torch", "numpy", "grpcio", "protobuf")


class RunFolder:
    """Raises ConfigError when it cannot be made, or has a run in it already."""

    def __init__(self, path: Path | None, run: Run, role: str) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.path = path or Path("runs") / f"{stamp}-{run.name}-{role}"
        if (self.path / "run.json").exists():
            raise ConfigError(f"--out {self.path} holds a run already; choose another folder or remove it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("run.json", _description(run, role))
        except OSError as error:
            raise ConfigError(f"--out {self.path}: {error.strerror}") from error

    def add_metrics(self, line: dict[str, Any]) -> None:
        self.add_line("metrics.jsonl", line)

    def add_line(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", summary)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, self.path / name)  # whoever reads sees all of it or nothing


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
