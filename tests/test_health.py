"""`dsl health` against real servers on loopback, as a container's health check would call it."""

import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from common.errors import ClosedError, ConfigError, IdentityError
from common.tls import Credentials
from dsl_lab import certs
from dsl_lab.health import health
from dsl_lab.launch import program
from dsl_server.server import Server
from tests.certificates import make
from tests.federation import connect, serving, small_run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a client, and a probe that is revoked as soon as it is made."""
    folder = make(tmp_path_factory.mktemp("health") / "certs", "ward-7", "probe")
    certs.run(certs.Revoke(folder, "probe"))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(small_run(), tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    credentials = Credentials.read(folder, "server")
    with serving(small_run(), tmp_path_factory.mktemp("secured"), credentials) as server:
        yield server


def asked(server: Server, probe: Path | None = None, alive: bool = False, patience: float = 5.0) -> str:
    return health(f"localhost:{server.port}", probe, patience, alive)


def test_a_server_that_takes_clients_is_well(plain: Server) -> None:
    assert asked(plain) == f"the server at localhost:{plain.port} answers: SERVING"


def test_with_certificates_a_client_s_is_needed(secured: Server, folder: Path) -> None:
    assert "SERVING" in asked(secured, folder / "clients" / "ward-7")
    with pytest.raises(IdentityError, match="takes clients with a certificate: say --certs FOLDER"):
        asked(secured, patience=1)


def test_a_revoked_probe_asks_for_health_and_joins_nothing(secured: Server, folder: Path) -> None:
    probe = folder / "clients" / "probe"
    assert "SERVING" in asked(secured, probe)
    with pytest.raises(IdentityError, match=r"the certificate of probe .* is revoked"):
        connect(secured, "probe", Credentials.read(probe, "client"))


def test_certificates_of_another_authority_are_told_of(secured: Server, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "ward-7") / "clients" / "ward-7"
    with pytest.raises(IdentityError, match="it is not of the authority in"):
        asked(secured, other, patience=1)


def test_a_server_s_own_folder_is_no_client_s(secured: Server, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no client\.pem"):
        asked(secured, folder)


def test_who_takes_no_clients_is_alive_all_the_same(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        server._health.enter_graceful_shutdown()  # as `drain` begins
        with pytest.raises(ClosedError, match="takes no clients now"):
            asked(server)
        assert asked(server, alive=True).endswith("answers: NOT_SERVING")


def test_what_is_no_dsl_server_is_not_well() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(ClosedError, match="is no dsl-server that is well: UNIMPLEMENTED"):
            health(f"127.0.0.1:{port}", None, 5.0, alive=True)
    finally:
        other.stop(grace=0).wait()


def test_the_command_says_a_line_and_ends_with_0_or_1(plain: Server, tmp_path: Path) -> None:
    def run(*flags: str) -> tuple[int, str]:
        done = subprocess.run(
            [program("dsl"), "health", *flags], capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, done.stdout + done.stderr

    address = f"localhost:{plain.port}"
    assert run("--server", address) == (0, f"the server at {address} answers: SERVING\n")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        nowhere = f"127.0.0.1:{nobody.getsockname()[1]}"
        said = run("--server", nowhere, "--patience", "0.5")
    assert said == (1, f"dsl: error: no server answers at {nowhere} within 0.5 s\n")
    code, said_of_files = run("--certs", str(tmp_path))
    assert code == 1
    assert "has no client.pem" in said_of_files
