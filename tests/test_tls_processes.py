"""The programs with certificates: commands as a person types them, and how long a refusal takes."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsl_lab.launch import program
from tests.certificates import copy, make
from tests.programs import Start, ends, programs, refused, serve

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("processes") / "certs", "ward-7", "ward-8")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as start:
        yield start


def test_a_run_with_certificates_from_the_commands_to_the_end(start: Start, tmp_path: Path) -> None:
    for words in (["init"], ["client", "ward-7"], ["client", "ward-8"]):
        command, *name = words
        made = subprocess.run(
            [program("dsl"), "certs", command, str(tmp_path / "certs"), *name],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert made.returncode == 0, made.stderr
    copy(tmp_path / "certs" / "clients" / "ward-7", tmp_path / "node-7")  # as to another machine
    nodes = [tmp_path / "node-7", tmp_path / "certs" / "clients" / "ward-8"]
    server, address = serve(start, "--certs", tmp_path / "certs", "--clients", 2)
    clients = [start("dsl-client", "--server", address, "--certs", node) for node in nodes]
    for process in (*clients, server):
        code, said = ends(process, 90)
        assert code == 0, said
    lines = [
        json.loads(line) for line in (tmp_path / "dsl-server-0" / "audit.jsonl").read_text().splitlines()
    ]
    assert sorted((line["event"], line["name"]) for line in lines) == [
        ("joined", "ward-7"),
        ("joined", "ward-8"),
        ("left", "ward-7"),
        ("left", "ward-8"),
    ]
    description = json.loads((tmp_path / "dsl-server-0" / "run.json").read_text())
    assert str(tmp_path / "certs") in description["command"]
    assert "PRIVATE" not in json.dumps(description)


def test_c17_a_client_with_certificates_at_a_server_without(start: Start, made: Path) -> None:
    _, address = serve(start)
    said = refused(start, "--server", address, "--certs", made / "clients" / "ward-7")
    assert "does not speak TLS" in said


def test_a_client_with_certificates_may_start_before_its_server(start: Start, made: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    client = start("dsl-client", "--server", address, "--certs", made / "clients" / "ward-7")
    time.sleep(6)
    assert client.poll() is None
    serve(start, "--certs", made, "--listen", address)
    code, words = ends(client, 60)
    assert code == 0, words
