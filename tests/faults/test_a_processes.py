"""A: the programs themselves are killed, asked to end and started again. Nothing is lost or done twice."""

import functools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.processes import DEADLINE_S, Federation, Process, all_join, check, kill, said, succeeds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]  # most of it is torch's import, by each process

FROZEN_S = 12.0  # longer than clients ping in vain: twice 4 s
Undisturbed = Callable[[str, int], Path]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(*flags: object) -> Federation:
        made.append(Federation(tmp_path / f"run-{len(made)}", *flags))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a run that nobody disturbs, by method and clients."""

    @functools.cache
    def made(method: str, clients: int) -> Path:
        run = Federation(tmp_path_factory.mktemp(method), "--method", method, "--clients", clients)
        try:
            for process in (run.serve(), *all_join(run, clients)):
                succeeds(process)
        finally:
            run.end()
        return run.folder

    return made


def test_a1_e6_b4_a_server_that_is_frozen_then_killed_is_replaced_by_another_and_no_bit_differs(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    server = run.serve()
    clients = all_join(run)
    run.wait_for(10)
    server.send_signal(signal.SIGSTOP)
    second = run.serve(resume=True, heard=False)
    assert "another process goes on with it; stop that one" in said(second)
    assert second.returncode == 2
    run.processes.remove(second)
    server.send_signal(signal.SIGCONT)
    kill(server)
    server = run.serve(resume=True)
    for process in (server, *clients):
        succeeds(process)
    check(run, undisturbed("dsl", 2), 2)


def test_b4_a_server_that_was_frozen_and_goes_on_has_its_clients_back_and_no_bit_differs(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    server = run.serve()
    clients = all_join(run)
    run.wait_for(10)
    server.send_signal(signal.SIGSTOP)
    time.sleep(FROZEN_S)
    server.send_signal(signal.SIGCONT)
    for process in (server, *clients):
        succeeds(process)
    audit = (run.out / "audit.jsonl").read_text()
    assert audit.count('"came back"') >= 2, "they had left, since nothing answered their pings"
    check(run, undisturbed("dsl", 2), 2)


def test_a3_a4_a_client_killed_and_started_again_from_its_folder_does_only_what_is_left(
    federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    server = run.serve()
    first, second = all_join(run)
    run.wait_for(8)
    kill(second)
    spool = run.folder / "state-1" / "spool"
    (spool / ".000000000999.tmp").write_bytes(b"torn")  # as it is when it dies while it writes
    kept = {path.name: path.read_bytes() for path in spool.iterdir() if not path.name.startswith(".")}
    second = run.join(1)
    for process in (server, first, second):
        succeeds(process)
    assert kept, "of what it had sent"
    check(run, undisturbed("dsl", 2), 2)


@pytest.mark.parametrize("at", [20, 45])
def test_a3_a7_a_client_of_csl_killed_in_a_step_goes_on_where_the_server_is(
    at: int, federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server = run.serve()
    client = run.join(0)
    run.wait_for(at)
    kill(client)
    client = run.join(0)
    for process in (server, client):
        succeeds(process)
    check(run, undisturbed("csl", 1), 1)


@pytest.mark.parametrize("server_first", [True, False], ids=["server first", "clients first"])
def test_a6_all_are_killed_at_once_and_started_again_in_either_order(
    server_first: bool, federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "dsl", "--clients", 2)
    everyone = [run.serve(), *all_join(run)]
    run.wait_for(20)
    for process in everyone:
        kill(process)
    server = run.serve(resume=True) if server_first else None
    clients = [run.join(index) for index in range(2)]
    server = server or run.serve(resume=True)
    for process in (server, *clients):
        succeeds(process)
    check(run, undisturbed("dsl", 2), 2)


@pytest.mark.parametrize(
    ("number", "called"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=["SIGTERM", "SIGINT"]
)
def test_a10_a11_server_and_client_that_are_asked_to_end_do_so_and_another_goes_on(
    number: int, called: str, federation: Callable[..., Federation], undisturbed: Undisturbed
) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server, client = run.serve(), run.join(0)
    run.wait_for(16)
    client.send_signal(number)
    words = said(client)
    assert client.returncode == 128 + number, words
    assert "Traceback" not in words
    assert f"stopped ({called})" in words
    run.processes.remove(client)
    assert server.poll() is None
    assert '"lost"' not in (run.out / "audit.jsonl").read_text(), "it has its place"
    client = run.join(0)
    run.wait_for(40)
    server.send_signal(signal.SIGTERM)
    words = succeeds(server)
    assert f"drained: go on with --resume {run.out}" in words
    server = run.serve(resume=True)
    for process in (server, client):
        succeeds(process)
    check(run, undisturbed("csl", 1), 1)


def test_a10_a_second_signal_ends_a_server_at_once(federation: Callable[..., Federation]) -> None:
    run = federation("--method", "csl", "--clients", 1)
    server, client = run.serve(), run.join(0)
    run.wait_for(1)
    client.send_signal(signal.SIGSTOP)  # so that there is something to wait for
    server.send_signal(signal.SIGTERM)
    end = time.monotonic() + DEADLINE_S
    while catches(server, signal.SIGTERM):  # until it has heard the first one
        assert time.monotonic() < end
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    words = said(server)
    assert server.returncode in (-signal.SIGTERM, 0), words  # 0: it was done already
    run.processes.remove(server)


def catches(process: Process, number: int) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    found = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


# ---------------------------------------------------------------- E11: whoever writes checkpoints is killed


WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from common.checkpoint import Checkpoints, Saved
torch.set_num_threads(1)
dice, checkpoints = random.Random(0), Checkpoints(Path(sys.argv[1]))
tensors = {f"t{i}": torch.randn(1000) for i in range(100)}
for _ in range(25):
    child = os.fork()
    if not child:
        number = max(checkpoints.numbers(), default=0)
        while True:
            number += 1
            checkpoints.write(Saved(number, tensors, {"number": number}))
            checkpoints.drop(keep=lambda known: known > number - 3)
    time.sleep(dice.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for number in checkpoints.numbers():
        assert checkpoints.read(number).facts == {"number": number}
print("whole:", len(checkpoints.numbers()))
"""


def test_e11_of_25_writers_that_are_killed_none_leaves_what_cannot_be_read(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split("whole:")[1]) >= 1
