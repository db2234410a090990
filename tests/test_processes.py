"""The programs themselves: real processes over loopback, on real images, and what ends them."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsl_lab.launch import Experiment, launch, program

SMALL = {
    "model": "resnet8",
    "split": "1",
    "data": "sample",
    "train_limit": 700,
    "test_limit": 100,
    "epochs": 2,
    "eval_every": 0,
}
SAMPLE_BYTES = 16 * 32 * 32 * 4  # of one sample's activations at the cut
BATCH_BYTES = 128 * SAMPLE_BYTES

Start = Callable[..., subprocess.Popen[str]]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("method", ["dsl", "csl"])
@pytest.mark.parametrize(
    ("clients", "sync"),
    [
        *(pytest.param(1, sync, marks=pytest.mark.slow) for sync in ("none", "average", "relay")),
        *((3, sync) for sync in ("none", "average", "relay")),
    ],
)
def test_a_run_between_processes_ends_with_exact_counts(
    method: str, clients: int, sync: str, tmp_path: Path
) -> None:
    settings = {**SMALL, "method": method, "clients": clients, "sync": sync, "measure_memory": True}
    experiment = Experiment(settings, tmp_path)
    launch(experiment)

    summary = summary_of(experiment.server_folder)
    up, down = summary["wire"]["up"], summary["wire"]["down"]
    assert summary["samples_trained"] == 2 * 700
    assert up["activations"] == 2 * 700 * SAMPLE_BYTES
    assert up["labels"] == 2 * 700
    assert down["gradients"] == (2 * 700 * SAMPLE_BYTES if method == "csl" else 0)
    scored = 100 * (clients if sync == "none" else 1)  # clients with one and the same part share the work
    assert up["evaluation"] == scored * (SAMPLE_BYTES + 1)
    assert (up["weights"] > 0) == (sync == "relay" or (sync == "average" and clients > 1))
    assert 0 < summary["test"]["accuracy"] <= 1
    assert (summary["test"]["client_only_accuracy"] is not None) == (method == "dsl")
    memory, own = summary["memory"], []
    for client in range(clients):
        assert (tmp_path / f"client-{client}" / "checkpoint" / "part.safetensors").exists()
        own.append(summary_of(tmp_path / f"client-{client}")["memory"])
    assert set(memory) == {"client", "server", "held"}
    assert memory["client"] == max(each["peak"] for each in own) > BATCH_BYTES
    assert memory["held"] == max(each["held"] for each in own)
    assert (memory["held"] > BATCH_BYTES) == (method == "csl"), "who is not answered waits for nothing"
    assert memory["server"] > BATCH_BYTES
    lines = (experiment.server_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [2]


def test_the_summary_has_the_layout_that_reports_read(tmp_path: Path) -> None:
    experiment = Experiment({**SMALL, "train_limit": 64, "epochs": 1}, tmp_path)
    launch(experiment)
    summary = summary_of(experiment.server_folder)
    assert list(summary) == [
        *("method", "model", "split", "cut_shape", "clients", "epochs", "seed", "samples_trained"),
        *("test", "wire", "seconds", "peak_bytes"),
    ]
    assert set(summary["test"]) == {"accuracy", "loss", "client_only_accuracy"}
    assert set(summary["wire"]) == {"up", "down", "socket"}
    kinds_up = {"activations", "labels", "gradients", "evaluation", "weights", "control", "framing"}
    assert set(summary["wire"]["up"]) == kinds_up
    assert set(summary["wire"]["down"]) == {
        "activations",
        "gradients",
        "evaluation",
        "weights",
        "control",
        "framing",
    }
    assert set(summary["seconds"]["client"]) == {"forward", "backward", "encode", "wait"}
    assert set(summary["seconds"]["server"]) == {"forward", "backward", "decode", "idle"}
    assert summary["cut_shape"] == [16, 32, 32]
    assert min(summary["peak_bytes"].values()) > 0
    socket_counts = summary["wire"]["socket"]
    if socket_counts is not None:
        assert sum(summary["wire"]["up"].values()) == pytest.approx(socket_counts["up"], rel=0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(program, *flags) is a process whose words are read as text; all are gone at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str, *flags: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                [program(name), *flags, "--out", str(tmp_path / f"out-{len(running)}")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


@pytest.fixture
def address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def long_run(clients: int, *flags: str) -> list[str]:
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*small, "--epochs", "500", "--clients", str(clients), *flags]


def ends(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Its exit code and its words; a failure if it does not end in time."""
    words, _ = process.communicate(timeout=seconds)
    return process.returncode, words


def wait_until_training(process: subprocess.Popen[str]) -> None:
    """Until a client says that it is in: from then on it trains."""
    assert process.stdout is not None
    for line in process.stdout:
        if "epochs of" in line:
            time.sleep(1.5)
            return
    raise AssertionError("the client ended before it had joined")


def training(start: Start, address: str, clients: int, *flags: str) -> tuple[Any, Sequence[Any]]:
    server = start("dsl-server", *long_run(clients, "--listen", address, *flags))
    members = [start("dsl-client", "--server", address, "--name", f"site-{i}") for i in range(clients)]
    for member in members:
        wait_until_training(member)
    return server, members


@pytest.mark.timeout(90)
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_killed_server_ends_its_clients(method: str, start: Start, address: str) -> None:
    server, (client,) = training(start, address, 1, "--method", method)
    server.kill()
    code, words = ends(client, 10)
    assert code == 69, words
    assert "the server went away" in words


@pytest.mark.timeout(90)
def test_a_killed_client_ends_the_server_and_the_other_client_by_name(start: Start, address: str) -> None:
    server, (first, second) = training(start, address, 2, "--sync", "average")
    first.kill()
    for process, code in ((server, 69), (second, 77)):
        got, words = ends(process, 10)
        assert "(site-0) went away" in words or "(site-1) went away" in words
        assert got == code, words


@pytest.mark.timeout(120)
def test_with_a_quorum_the_others_finish_without_a_killed_client(start: Start, address: str) -> None:
    flags = ["--method", "psl", "--quorum", "2", "--epochs", "4", "--eval-every", "1"]
    server = start("dsl-server", *long_run(3, "--listen", address, *flags))
    clients = [start("dsl-client", "--server", address, "--name", f"site-{i}") for i in range(3)]
    assert any("epoch 1/4" in line for line in clients[1].stdout)
    clients[1].kill()
    for process in (server, clients[0], clients[2]):
        code, words = ends(process, 60)
        assert code == 0, words
        if process is server:
            assert "(site-1) went away before the end of the run; the others go on" in words
            assert re.search(r"finished without client \d \(site-1\): ", words.splitlines()[-1])


@pytest.mark.timeout(90)
def test_a_frozen_server_is_noticed_within_ten_seconds(start: Start, address: str) -> None:
    server, (client,) = training(start, address, 1)
    server.send_signal(signal.SIGSTOP)
    code, words = ends(client, 12)
    assert code == 69, words
    assert "the server went away" in words


@pytest.mark.timeout(90)
def test_a_frozen_client_is_noticed_within_ten_seconds(start: Start, address: str) -> None:
    server, (client,) = training(start, address, 1)
    client.send_signal(signal.SIGSTOP)
    code, words = ends(server, 12)
    assert code == 69, words
    assert "client 0 (site-0) went away" in words


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_server_tells_its_clients_and_ends_cleanly(
    number: signal.Signals, expected: int, start: Start, address: str
) -> None:
    server, (client,) = training(start, address, 1)
    server.send_signal(number)
    code, words = ends(server, 10)
    assert code == expected, words
    assert "Traceback" not in words
    code, words = ends(client, 10)
    assert code == 77, words
    assert "the server was stopped" in words
    assert "Traceback" not in words


@pytest.mark.timeout(90)
def test_a_stopped_client_tells_the_server_and_ends_cleanly(start: Start, address: str) -> None:
    server, (client,) = training(start, address, 1)
    client.send_signal(signal.SIGINT)
    code, words = ends(client, 10)
    assert code == 130, words
    assert "Traceback" not in words
    code, words = ends(server, 10)
    assert code == 69, words
    assert "site-0" in words
    assert "it was stopped (Ctrl-C)" in words
    assert "Traceback" not in words


@pytest.mark.timeout(90)
def test_a_client_may_start_before_its_server(start: Start, address: str) -> None:
    client = start("dsl-client", "--server", address)
    time.sleep(6)
    start("dsl-server", *long_run(1, "--listen", address, "--epochs", "1"))
    code, words = ends(client, 60)
    assert code == 0, words


@pytest.mark.timeout(60)
def test_a_client_does_not_wait_for_ever(start: Start, address: str) -> None:
    code, words = ends(start("dsl-client", "--server", address, "--patience", "1"), 30)
    assert code == 69, words
    assert f"no server at {address} within 1 s" in words


@pytest.mark.timeout(90)
def test_one_client_too_many_is_refused_and_the_run_goes_on(start: Start, address: str) -> None:
    server, (client,) = training(start, address, 1)
    code, words = ends(start("dsl-client", "--server", address, "--name", "late"), 30)
    assert code == 77, words
    assert "'late' is one too many" in words
    assert "--clients 2" in words
    assert server.poll() is None
    assert client.poll() is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "9"], "--split '9': resnet20 has 9 blocks; choose s, m, d or 1 to 8"),
        (["--model", "resnet19"], "--model 'resnet19': choose resnetN"),
        (["--method", "dls"], "--method 'dls': choose from dsl, csl"),
        (["--head", "big"], "--head 'big': choose from gap, flat, mlp, conv, strided, copy, infopro"),
        (["--partition", "dirichlet:0"], "--partition 'dirichlet:0'"),
        (["--config", "no-such.toml"], "--config no-such.toml: No such file"),
        (["--recipe", "best"], "--recipe 'best': choose from modern, paper"),
        (["--device", "cuda:99"], "--device 'cuda:99': this machine has cpu"),
        (["--lr", "0"], "--lr 0.0 is not a positive number"),
        (["--listen", "256.1.1.1:1", "--insecure"], "--listen 256.1.1.1:1: cannot be bound"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(flags: list[str], words: str, start: Start) -> None:
    code, said = ends(start("dsl-server", *flags), 30)
    assert code == 2, said
    assert f"dsl-server: error: {words}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["dsl-server", "dsl-client"])
def test_an_unknown_flag_is_named_with_the_nearest_one(name: str, start: Start) -> None:
    near = {"dsl-server": "--methd", "dsl-client": "--sever"}[name]
    code, said = ends(start(name, near, "x"), 30)
    assert code == 2, said
    assert near in said
    assert {"dsl-server": "--method", "dsl-client": "--server"}[name] in said


@pytest.mark.timeout(90)
def test_data_that_a_client_lacks_ends_the_run_with_its_name(start: Start, address: str) -> None:
    server = start("dsl-server", *long_run(1, "--listen", address))
    client = start("dsl-client", "--server", address, "--data", "npz:missing.npz", "--name", "site")
    code, words = ends(client, 30)
    assert code == 2, words
    assert "missing.npz" in words
    code, words = ends(server, 10)
    assert code == 69, words
    assert "client 0 (site) failed" in words
    assert "missing.npz" in words


@pytest.mark.timeout(60)
def test_two_servers_cannot_share_a_port(start: Start, address: str) -> None:
    first = start("dsl-server", "--listen", address)
    assert first.stdout is not None
    first.stdout.readline()
    code, said = ends(start("dsl-server", "--listen", address), 30)
    assert code == 2, said
    assert f"--listen {address}: cannot be bound; is the port in use?" in said
