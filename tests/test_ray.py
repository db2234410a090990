"""Clients as tasks of a Ray cluster: the run is that of local processes, and nothing is left behind.

Ray is at work in processes that the tests start, since what it sets up it sets up once in a process.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from dsl_lab.engines import Where
from dsl_lab.launch import Experiment, launch
from tests.test_paper import until

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray (the extra ray) is not installed here", allow_module_level=True)

pytestmark = pytest.mark.timeout(300)  # some 20 s where nothing else runs

RUN: dict[str, Any] = {
    "model": "resnet8",
    "split": "1",
    "data": "sample",
    "train_limit": 100,
    "test_limit": 20,
    "epochs": 1,
    "clients": 2,
    "fixed_order": True,
    "deterministic": True,
}
CASES: dict[str, Any] = {
    "same": {},
    "failing": {"also": [["--certs", "nowhere"], []]},
    "many": {"settings": {**RUN, "clients": 1000}},
}
# Runs the cases on one cluster, which begins and ends with them, and prints why those that fail do.
DRIVER = """
import json, sys
from pathlib import Path
from common.errors import SplitLearningError
from dsl_lab.engines import Where, opened
from dsl_lab.launch import Experiment, launch
folder, run, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
told = {}
with opened(Where(engine="ray", client_cpus=0.5)) as engine:
    for name, case in cases.items():
        try:
            case = {"settings": run, "in_order": True, "out": folder / name} | case
            launch(Experiment(**case), engine=engine)
        except SplitLearningError as error:
            told[name] = str(error)
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Place:
    """Where Ray keeps its files; every process that has begun with this environment is of this test."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback alone
        }

    def processes(self) -> dict[int, str]:
        """Those that live, and what they are called."""
        mark, found = f"RAY_TMPDIR={self.folder}".encode(), {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has gone meanwhile
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        return found


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Its path is short, as that of a socket has to be. Whatever happens, no process is left."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Place(Path(folder))
        try:
            yield made
        finally:
            for process in made.processes():
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class Done:
    folder: Path
    told: dict[str, str]
    """Why a case failed, by its name."""
    processes: dict[int, str]
    """Those that were left when the driver had ended."""
    files: list[Path]


@pytest.fixture(scope="module")
def done(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("ray")
    arguments = [str(folder), json.dumps(RUN), json.dumps(CASES)]
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout.splitlines()[-1])
    return Done(folder, told, place.processes(), list(place.folder.iterdir()))


def test_the_run_is_that_of_local_processes(done: Done, tmp_path: Path) -> None:
    """Score, samples and bytes are equal, and so is every weight, at both ends."""
    assert "same" not in done.told, done.told
    launch(Experiment(RUN, tmp_path, in_order=True))
    ours, theirs = (
        json.loads((folder / "server" / "summary.json").read_text())
        for folder in (done.folder / "same", tmp_path)
    )
    for key in ("test", "samples_trained", "cut_shape"):
        assert ours[key] == theirs[key]
    for way in ("up", "down"):
        counted, wanted = ({k: n for k, n in each["wire"][way].items()} for each in (ours, theirs))
        assert counted == wanted
    for end in ("server", "client-0", "client-1"):
        ours, theirs = (
            (folder / end / "checkpoint" / "part.safetensors").read_bytes()
            for folder in (done.folder / "same", tmp_path)
        )
        assert ours == theirs, end
    parts = {(tmp_path / f"client-{n}/checkpoint/part.safetensors").read_bytes() for n in range(2)}
    assert len(parts) == 2, "the clients are not one and the same"


def test_logs_and_folders_come_back(done: Done) -> None:
    for index in range(2):
        folder = done.folder / "same" / f"client-{index}"
        assert json.loads((folder / "run.json").read_text())["role"] == f"client-{index}"
        assert {"summary.json", "checkpoint"} <= {path.name for path in folder.iterdir()}
        log = (done.folder / "same" / f"client-{index}.log").read_text()
        assert f"client {index} of 2" in log
        assert "finished" in log


def test_a_client_that_fails_ends_the_run_with_its_reason(done: Done) -> None:
    assert "dsl-client: error: --certs nowhere" in done.told["failing"]


def test_a_run_that_has_no_room_is_refused_at_once(done: Done) -> None:
    said = done.told["many"]
    assert "--engine ray: 1000 clients train at once, of 0.5 CPU each, and the cluster has room for" in said
    assert "say a smaller --client-cpus, fewer clients, or start more nodes" in said
    assert not (done.folder / "many").exists()


def test_of_a_cluster_that_was_begun_nothing_is_left(done: Done) -> None:
    assert done.processes == {}
    assert done.files == []


@pytest.fixture
def standing(place: Place) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of this machine that is there already: its address, and what who joins it needs to know."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--include-dashboard=false", f"--temp-dir={place.folder}", "--num-cpus=2"]
    environment = {**place.environment, **secret}
    with open(os.devnull, "wb") as nowhere:
        cluster = subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere)
    try:
        yield f"127.0.0.1:{port}", environment
    finally:
        cluster.terminate()
        cluster.wait(20)


@pytest.mark.slow
def test_ctrl_c_ends_the_clients_and_lets_a_cluster_be(
    standing: tuple[str, dict[str, str]], place: Place, tmp_path: Path
) -> None:
    address, environment = standing
    until(lambda: any("raylet" in name for name in place.processes().values()))
    before = len(place.processes())
    command = [sys.executable, "-m", "dsl_lab", "bench", "paper", "--out", str(tmp_path)]
    command += ["--methods", "csl", "--splits", "1", "--clients", "1", "--epochs", "500", "--engine", "ray"]
    bench = subprocess.Popen(
        [*command, "--ray-address", address, "--client-cpus", "0.5"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    audit = tmp_path / "resnet8-sample-1-1-csl-seed0" / "server" / "audit.jsonl"
    until(lambda: bench.poll() is not None or (audit.exists() and '"joined"' in audit.read_text()))
    bench.send_signal(signal.SIGINT)
    words, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130, words
    assert "the same command goes on" in words
    left = [name for name in place.processes().values() if "dsl" in name]
    assert left == []
    assert len(place.processes()) >= before, "the cluster is not this run's to end"


# ---------------------------------------------------------------- judged without a cluster


def node(address: str, **resources: float) -> dict[str, Any]:
    return {"Alive": True, "NodeManagerAddress": address, "Resources": resources}


def test_room_is_counted_node_by_node() -> None:
    from dsl_lab.on_ray import Tasks

    nodes = [node("10.0.0.1", CPU=3.0), node("10.0.0.1", CPU=1.0, GPU=1.0)]
    for where, fit in (
        (Where("ray", client_cpus=1), 4),
        (Where("ray", client_cpus=2), 1),  # which is not 4 / 2
        (Where("ray", client_cpus=0.1), 40),
        (Where("ray", client_cpus=0.1, client_gpus=0.25), 4),
    ):
        tasks = Tasks(where, nodes, "10.0.0.1")
        with pytest.raises(ConfigError, match=f"has room for {fit} "), tasks.room(fit + 1, lambda: None):
            pass


def test_clients_on_other_machines_have_to_be_allowed() -> None:
    from dsl_lab.on_ray import Tasks

    nodes = [node("10.0.0.1", CPU=2.0), node("10.0.0.2", CPU=2.0), {**node("10.0.0.3"), "Alive": False}]
    with pytest.raises(ConfigError, match=r"would run on 10\.0\.0\.2, and nothing .* say --insecure"):
        Tasks(Where("ray"), nodes, "10.0.0.1")
    assert Tasks(Where("ray", insecure=True), nodes, "10.0.0.1").host == "10.0.0.1"
    assert Tasks(Where("ray"), nodes[:1], "10.0.0.1").host == "127.0.0.1"


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    from dsl_lab import on_ray

    with socket.socket() as listener:  # bound, and nobody listens
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"--ray-address {address}: no cluster there .*refused"),
            on_ray.cluster(address, Where("ray")),
        ):
            pass
