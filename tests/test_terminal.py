"""The live views: what they show fits the terminal, and leaves it as it was."""

import io
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from common.picture import Picture, duration
from common.progress import Progress
from dsl_client import terminal as of_client
from dsl_client.watch import View as ClientsView
from dsl_lab.launch import program
from dsl_server import terminal
from tests.programs import SMALL
from tests.test_watch import a_client, a_view

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


def drawn(picture: Picture, width: int, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(picture)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_the_servers_view_has_every_number_and_fits(width: int) -> None:
    clients = [a_client(0), a_client(1, state="waiting", loss=None), a_client(2, state="awaited", name="")]
    lines = drawn(terminal.picture_of(a_view(clients), "dsl-server"), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "dsl-server  dsl on resnet20 cut at m" in text
    assert "epoch 3/4  62%  1:00 left" in text
    for item in (
        "clients 2/3",
        "7,500 samples",
        "loss 1.250",
        "accuracy 0.500",
        "up 1,234.5 MB",
        "down 0.1 MB",
    ):
        assert item in text, item
    rows = [line.split() for line in lines[-3:]]
    numbers = ["3/4", "123", "1", "1,234.5", "0.1"]
    assert rows[0] == ["0", "ward-0", "training", *numbers, "1.250", "0.4", "s"]
    assert rows[1] == ["1", "ward-1", "waiting", *numbers, "–", "0.4", "s"]
    assert rows[2] == ["2", "–", "awaited", *["–"] * 7]


def test_of_many_clients_those_are_shown_that_matter() -> None:
    clients = [a_client(index) for index in range(100)]
    clients[7] = a_client(7, state="left")
    clients[42] = a_client(42, state="away")
    clients[77] = a_client(77, state="lost")
    clients[99] = a_client(99, epoch=0)  # far behind
    lines = drawn(terminal.picture_of(a_view(clients), "dsl-server"), 80)
    shown = [int(found[1]) for line in lines if (found := re.match(r"(\d+) ward-", line))]
    assert len(shown) == terminal.MOST_ROWS
    assert shown == sorted(shown)
    assert {42, 77, 99} < set(shown)
    assert 7 not in shown
    assert lines[-1] == "and 80 more: 79 training, 1 left"


def test_on_a_low_terminal_there_are_fewer_rows() -> None:
    lines = drawn(
        terminal.picture_of(a_view([a_client(index) for index in range(100)]), "dsl-server"), 80, 12
    )
    assert len(lines) < 12
    assert lines[-1] == "and 96 more: 96 training"


def test_the_line_where_there_is_no_terminal() -> None:
    assert terminal.line_of(a_view([a_client(0)])) == (
        "clients 1/1  epoch 3/4  2,500 samples  25/s  loss 1.250  accuracy 0.500  up 1,234.5 MB  down 0.1 MB"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_clients_view_has_every_number_and_fits(width: int) -> None:
    view = ClientsView(
        client=1,
        clients=3,
        name="run",
        method="dsl",
        model="resnet20",
        place="m",
        state="training",
        epoch=2,
        epochs=4,
        batch=5,
        batches=8,
        done=0.65625,
        samples=2500,
        rate=123.4,
        loss=1.25,
        metric="accuracy",
        score=0.5,
        alone=0.25,
        queue=1,
        outbox=2,
        waits=0.125,
        wire={"up": {"activations": 1_234_500_000}, "down": {"control": 60_000}},
        phases={},
        seconds=100.0,
        left_s=3725.0,
    )
    lines = drawn(of_client.picture_of(view, "dsl-client"), width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("dsl-client  1 of 3  dsl on resnet20 cut at m")
    assert lines[0].endswith("epoch 3/4  66%  1:02:05 left")
    assert lines[1] == "2,500 samples  accuracy 0.500 (alone 0.250)"
    assert lines[-1].split() == ["training", "3/4", "5/8", "123", "1/2", "1,234.5", "0.1", "1.250", "12%"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (59.6, "1:00"), (185, "3:05"), (3729, "1:02:09")],
)
def test_a_duration_is_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_elsewhere_there_are_lines_and_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("dsl-server") as progress:
        progress.show("epoch 1/4", terminal.picture_of(a_view([a_client(0)]), "dsl-server"))
        progress._plain_due = 0.0
        progress.show("epoch 2/4", terminal.picture_of(a_view([a_client(0)]), "dsl-server"))
        progress.show("epoch 3/4")
    assert capsys.readouterr().err == "dsl-server: epoch 2/4\n"


@pytest.mark.timeout(60)
def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    """A real server on a terminal of 100 columns, ended by its control character."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [program("dsl-server"), *SMALL, "--listen", "127.0.0.1:0", "--out", str(tmp_path / "out")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(theirs)
    said = ""
    try:
        until = time.monotonic() + 40
        while "awaited" not in said and time.monotonic() < until:
            said += os.read(ours, 4096).decode()
        assert "dsl on resnet8 cut at 1" in said
        assert "clients 0/1" in said
        process.send_signal(signal.SIGINT)
        while chunk := _read(ours):
            said += chunk
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert said.rstrip().endswith("dsl-server: stopped (Ctrl-C)")
    assert said.rfind(HIDDEN) < said.rfind(SHOWN)
    after = said[said.rfind(SHOWN) :]
    assert "awaited" not in after, "nothing of the picture stays"


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # its other end is closed
        return ""
