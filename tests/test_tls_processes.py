"""The programs with certificates: commands as a person types them, and how long a refusal takes."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsl_lab import certs
from dsl_lab.launch import program
from tests.certificates import DAY, copy, make, remade

pytestmark = pytest.mark.timeout(120)

SMALL = ["--model", "resnet8", "--split", "1", "--train-limit", "200", "--test-limit", "50", "--epochs", "1"]
SOON_S = 5.0
LOADED_S = 20.0  # where torch, too, has to be imported first, on a machine with other work

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("processes") / "certs", "ward-7", "ward-8")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(program, *flags) is a process whose words are read as text; all are gone at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str, *flags: object) -> subprocess.Popen[str]:
        out = tmp_path / f"{name}-{len(running)}"
        running.append(
            subprocess.Popen(
                [program(name), *map(str, flags), "--out", str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def serve(start: Start, *flags: object) -> tuple[subprocess.Popen[str], str]:
    """A server on a port of its own choice, its greeting read; and its address here."""
    process = start(
        "dsl-server", *SMALL, *([] if "--listen" in flags else ["--listen", "127.0.0.1:0"]), *flags
    )
    assert process.stdout is not None
    greeting = process.stdout.readline()
    found = re.search(r"--server \S+:(\d+)", greeting)
    assert found, greeting
    return process, f"127.0.0.1:{found[1]}"


def ends(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    words, _ = process.communicate(timeout=seconds)
    return process.returncode, words


def refused(start: Start, *flags: object, within: float = SOON_S) -> str:
    """What a client says, in a line, that is refused in time for all its patience."""
    before = time.monotonic()
    code, words = ends(start("dsl-client", "--patience", 60, *flags), 30)
    assert time.monotonic() - before < within, words
    assert code == 77, words
    lines = [line for line in words.splitlines() if "waiting for the server" not in line]
    assert len(lines) == 1, words
    assert lines[0].startswith("dsl-client: error: ")
    return lines[0]


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


def test_d1_to_d4_a_client_that_is_refused_says_why_in_a_line_and_soon(
    start: Start, made: Path, tmp_path: Path
) -> None:
    folder, other = copy(made, tmp_path / "certs"), make(tmp_path / "other", "ward-7")
    server, address = serve(start, "--certs", folder)
    ward7, ward8 = folder / "clients" / "ward-7", folder / "clients" / "ward-8"

    assert "takes clients with a certificate: say --certs FOLDER" in refused(start, "--server", address)
    theirs = ("--server", address, "--certs", other / "clients" / "ward-7")
    assert "cannot be trusted: " in refused(start, *theirs)
    named = ("--server", address, "--certs", ward7, "--name", "ward-8")
    assert "this certificate is that of 'ward-7', not of 'ward-8'" in refused(start, *named, within=LOADED_S)
    certs.run(certs.Revoke(folder, "ward-7"))
    taken_back = ("--server", address, "--certs", ward7)
    assert "the certificate of ward-7 " in refused(start, *taken_back, within=LOADED_S)
    remade(ward8, "client", folder, -2 * DAY, -DAY)
    said = refused(start, "--server", address, "--certs", ward8)
    assert "client.pem has expired: it was valid until " in said
    assert "this machine's clock says " in said

    assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    code, _ = ends(server, 20)
    assert code == 143
    lines = (tmp_path / "dsl-server-0" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["refused", "refused"]


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


def refuses(process: subprocess.Popen[str]) -> str:
    code, said = ends(process, 30)
    assert code == 2, said
    assert len(said.splitlines()) == 1
    return said


def test_d11_other_machines_are_served_with_certificates_or_by_name(start: Start) -> None:
    said = refuses(start("dsl-server", "--listen", "0.0.0.0:0"))
    assert said.startswith("dsl-server: error: --listen 0.0.0.0:0: without --certs nothing is encrypted")
    assert "--insecure" in said
    server, address = serve(start, "--listen", "0.0.0.0:0", "--insecure")
    client = start("dsl-client", "--server", address)
    for process in (client, server):
        code, words = ends(process, 60)
        assert code == 0, words


def test_d11_a_client_goes_to_other_machines_with_certificates_or_by_name(start: Start) -> None:
    said = refuses(start("dsl-client", "--server", "gpu-host:50051"))
    assert said.startswith("dsl-client: error: --server gpu-host:50051: without --certs nothing is encrypted")
    assert "--insecure" in said
    nowhere = ("--server", "gpu-host.invalid:1", "--insecure", "--patience", 1)
    code, said = ends(start("dsl-client", *nowhere), 30)
    assert code == 69, said


@pytest.mark.parametrize("name", ["dsl-server", "dsl-client"])
def test_d11_a_key_that_others_may_read_is_refused(
    name: str, start: Start, made: Path, tmp_path: Path
) -> None:
    folder = copy(made, tmp_path / "certs")
    own, key = (
        (folder, "server.key") if name == "dsl-server" else (folder / "clients" / "ward-7", "client.key")
    )
    (own / key).chmod(0o644)
    said = refuses(start(name, "--certs", own))
    assert f"{own / key} can be read by others (mode 0644): chmod 600 {own / key}" in said
