"""Completion for shells: each program prints a script that its shell takes, and by which bash completes."""

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from common.cli import SHELLS, flags
from common.errors import ConfigError
from dsl_lab.launch import program

PROGRAMS = ("dsl", "dsl-server", "dsl-client")
pytestmark = pytest.mark.timeout(60)


@functools.cache
def script(name: str, shell: str) -> str:
    command = [program(name), "--print-completion", shell]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def completed(name: str, *words: str) -> list[str]:
    """What bash has for the last of the words, once it has read the script as ~/.bashrc does."""
    asked = " ".join(f"'{word}'" for word in (name, *words))
    code = f"""
    source <(printf '%s' "$SCRIPT")
    COMP_WORDS=({asked}); COMP_CWORD={len(words)}; COMP_LINE='{name} {" ".join(words)}'
    COMP_POINT=${{#COMP_LINE}}
    "$(complete -p {name} | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "SCRIPT": script(name, "bash")}
    done = subprocess.run(
        ["bash", "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("dsl-server", "--meth"), ["--method", "--method-arg"]),
        (("dsl-server", "--sync", "re"), ["relay"]),
        (("dsl-server", "--clients", "2", "--recipe", ""), ["modern", "paper"]),
        (("dsl-client", "--pat"), ["--patience"]),
        (("dsl", "do"), ["doctor"]),
        (("dsl", "doctor", "--ins"), ["--insecure"]),
        (("dsl", "certs", "rev"), ["revoke"]),
    ],
    ids=" ".join,
)
def test_bash_completes(words: Sequence[str], expected: list[str]) -> None:
    assert sorted(completed(*words)) == expected


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_shell_takes_its_script(name: str, shell: str) -> None:
    printed = script(name, shell)
    assert name in printed
    where = shutil.which(shell)
    if where is None:
        pytest.skip(f"{shell} is not installed here")
    done = subprocess.run([where, "-n"], input=printed, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]], ids=str)
def test_another_shell_is_told_which_there_are(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="say bash, zsh, fish"):
        flags(["--print-completion", *words])
