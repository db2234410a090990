"""A server put together: its port, and how its process ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import ConfigError
from common.meter import Clock, Traffic
from common.methods import build_method
from common.nets.cut import build
from common.parts import client_part
from common.run import Run
from common.rundir import RunFolder
from dsl_client.client import measurements
from dsl_client.connection import Connection
from dsl_client.trainer import Trainer
from dsl_server.server import Server
from tests.federation import CPU, Batches, connect, serving, small_run, spec_of, train
from tests.ordinary import Ordinary, smashed
from tests.threads import in_thread, wait_for

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


# ---------------------------------------------------------------- what its clients say of their time


def test_waiting_for_the_others_is_not_taken_off_the_time_of_the_steps(tmp_path: Path) -> None:
    run = small_run(clients=2, sync="average", epochs=1)
    clock, data = Clock(), Batches(run, 0, 16)
    with serving(run, tmp_path) as server:
        waits = Connection(f"127.0.0.1:{server.port}", Traffic(), clock)
        method, client = build_method(run), waits.join("waits", patience=10).client
        part = client_part(run, method, build(run), CPU)
        training = in_thread(Trainer(run, client, method, part, waits, spec_of(run), clock).train, data, data)
        late, index = connect(server, "late")
        wait_for(lambda: clock.seconds("train")["train"] > 0)  # its steps are over: it waits for the late one
        time.sleep(0.5)
        train(run, late, index, data, data)
        training.result(timeout=10)
        measured = measurements(clock, CPU).seconds
        waits.leave(measurements(clock, CPU))
        waits.close()
        late.close()
    assert measured["wait"] > 0.5
    assert 0 < measured["backward"] < measured["train"]
