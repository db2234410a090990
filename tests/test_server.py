"""A server put together: its port, and how its process ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import ConfigError
from common.run import Run
from common.rundir import RunFolder
from dsl_server.server import Server
from tests.federation import CPU, small_run
from tests.ordinary import Ordinary, smashed
from tests.threads import in_thread

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "listen", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:70000", "256.0.0.1:1"]
)
def test_a_port_that_cannot_be_is_refused_by_name(listen: str, tmp_path: Path) -> None:
    run = small_run(sync="none")
    with pytest.raises(ConfigError, match=f"--listen {listen}"):
        Server(run, listen, CPU, RunFolder(tmp_path / "out", run, "server"))


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Any]:
    """A server process whose steps take a while, and its port."""
    run = Run(model="resnet110", split="1", batch_size=32, data="npz:unread")
    flags = ["--model", run.model, "--split", run.split, "--batch-size", "32", "--data", run.data]
    command = [
        sys.executable,
        "-m",
        "dsl_server",
        *flags,
        "--listen",
        "127.0.0.1:0",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    greeting = running.stderr.readline()
    yield SimpleNamespace(run=run, running=running, port=int(greeting.rsplit(":", 1)[1]))
    running.kill()
    running.communicate()


@pytest.mark.parametrize(("how", "code"), [("it is stopped", 143), ("its client vanishes", 69)])
def test_a_process_that_ends_in_the_midst_of_a_step_ends_with_its_own_code(
    how: str, code: int, process: Any
) -> None:
    """Not by the abort of a thread that the interpreter tears out of torch."""
    client = Ordinary(process)
    batch = smashed(process.run)
    sending = in_thread(client.stream, [batch] * 40)
    with pytest.raises(TimeoutError):
        sending.exception(timeout=1.5)  # it is in a step now, and will be for a while
    if how == "it is stopped":
        process.running.send_signal(signal.SIGTERM)
    else:
        client.close()
    _, words = process.running.communicate(timeout=60)
    assert process.running.returncode == code, words
    assert "terminate called" not in words
    client.close()
