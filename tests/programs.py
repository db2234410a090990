"""What tests of the programs share: processes whose words are read, a server's address, a refusal."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dsl_lab.launch import program

SMALL = ["--model", "resnet8", "--split", "1", "--train-limit", "200", "--test-limit", "50", "--epochs", "1"]
SOON_S = 5.0
LOADED_S = 20.0  # where torch, too, has to be imported first, on a machine with other work

Start = Callable[..., subprocess.Popen[str]]


@contextlib.contextmanager
def programs(folder: Path) -> Iterator[Start]:
    """start(program, *flags) is a process whose words are read as text; all are gone at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str, *flags: object) -> subprocess.Popen[str]:
        out = folder / f"{name}-{len(running)}"
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
    return process, address_in(process)


def address_in(server: subprocess.Popen[str]) -> str:
    """The address that a server's greeting has, here; the greeting is read."""
    assert server.stdout is not None
    greeting = server.stdout.readline()
    found = re.search(r"--server \S+:(\d+)", greeting)
    assert found, greeting
    return f"127.0.0.1:{found[1]}"


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


def refuses(process: subprocess.Popen[str]) -> str:
    code, said = ends(process, 30)
    assert code == 2, said
    assert len(said.splitlines()) == 1
    return said
