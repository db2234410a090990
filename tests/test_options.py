"""gRPC ignores options that it does not know, in silence: so here is what ours effect.

What notices a frozen peer is in tests/test_processes.py, what is too long in tests/faults/test_c_hostile.py.
"""

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.rundir import RunFolder
from dsl_server.server import Server
from tests.federation import CPU, connect, serving, small_run

pytestmark = pytest.mark.timeout(30)


def test_a_proxy_in_the_environment_is_of_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(small_run(), tmp_path) as server:
        connection, client = connect(server)
        assert client == 0
        connection.close()


def test_a_second_server_cannot_share_the_port(tmp_path: Path) -> None:
    run = small_run(sync="none")
    with serving(run, tmp_path) as first, pytest.raises(ConfigError, match="is the port in use"):
        Server(run, f"127.0.0.1:{first.port}", CPU, RunFolder(tmp_path / "second", run, "server"))
