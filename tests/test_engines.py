"""Where the clients of a sweep run: what the flags may say, and Ray where it is not installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from dsl_lab.engines import Where, opened
from dsl_lab.launch import LOCAL, Experiment


def test_clients_are_local_processes_unless_it_is_said() -> None:
    with opened(Where()) as engine:
        assert engine is LOCAL


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        (Where(client_cpus=2), "--client-cpus is for clients on Ray: say --engine ray, or leave it out"),
        (Where(ray_address="10.0.0.1:6379"), "--ray-address is for clients on Ray"),
        (Where("ray", client_cpus=0), "--client-cpus 0 must be above 0"),
        (Where("ray", client_cpus=float("nan")), "--client-cpus nan must be above 0"),
        (Where("ray", client_gpus=-1), "--client-gpus -1 must be 0 or above"),
        (Where("ray", client_gpus=1.5), "--client-gpus 1.5: Ray gives parts of one, or whole ones"),
        (
            Where("ray", "ray://head:10001"),
            "--ray-address ray://head:10001: the server runs here, so .* the address host:port",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_ray_is_asked(where: Where, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint), opened(where):
        pass


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_a_line_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsl_lab", "bench", "paper", "--engine", "ray", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dsl: error: --engine ray needs Ray: pip install 'decoupled-split-learning[ray]'"
    ]


def test_where_the_server_is_open_to_other_machines_all_say_so(tmp_path: Path) -> None:
    here, there = (Experiment({"clients": 1}, tmp_path, host=host) for host in ("127.0.0.1", "10.0.0.1"))
    assert not any("--insecure" in line for line in here.commands(1, 2))
    server, client = there.commands(1, 2)
    assert server[:3] == ["dsl-server", "--listen", "10.0.0.1:1"]
    assert client[:3] == ["dsl-client", "--server", "10.0.0.1:2"]
    assert server[-1] == client[-1] == "--insecure"
