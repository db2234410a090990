"""The quickstart's commands, run as they stand there: but for the port, which is a free one."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsl_lab.launch import program
from tests.documents import commands
from tests.programs import address_in

pytestmark = pytest.mark.timeout(300)  # of which it needs thirty, with the machine to itself


def started(folder: Path, words: Sequence[str], *more: str) -> subprocess.Popen[str]:
    command = [program(words[0]), *words[1:], *more]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_quickstart_runs_to_its_report(tmp_path: Path) -> None:
    server, client, report = commands(Path("docs/quickstart.md"))
    assert [words[0] for words in (server, client, report)] == ["dsl-server", "dsl-client", "dsl"]
    running = [started(tmp_path, server, "--listen", "127.0.0.1:0")]
    try:
        address = address_in(running[0])
        running += [started(tmp_path, client, "--server", address) for _ in range(2)]
        for process in running:
            words, _ = process.communicate(timeout=250)
            assert process.returncode == 0, words
    finally:
        for process in running:
            process.kill()
            process.communicate()
    subprocess.run(
        [program(report[0]), *report[1:]], cwd=tmp_path, check=True, timeout=60, capture_output=True
    )
    assert "<html" in (tmp_path / "report.html").read_text()
    (folder,) = (tmp_path / "runs").glob("*-run-server")
    left = {path.name for path in folder.iterdir()}
    assert {"run.json", "metrics.jsonl", "summary.json", "audit.jsonl", "checkpoint"} <= left
