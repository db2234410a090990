"""What programs share: the allocator's ways, and how they end, with their own exit code whatever their other
threads are at."""

import os
import platform
import subprocess
import sys

import pytest

BUSY = """
import sys, threading
import torch
from common import cli

busy = threading.Event()

def work():
    z = torch.randn(300, 300)
    while True:
        z @ z
        busy.set()

threading.Thread(target=work, daemon=True).start()
busy.wait()
print("the last words")
{end}(69)
"""


@pytest.mark.timeout(60)
def test_a_thread_within_torch_does_not_spoil_the_exit_code() -> None:
    script = BUSY.format(end="cli.leave")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (69, "the last words\n", "")


@pytest.mark.timeout(60)
def test_a_program_whose_reader_has_gone_keeps_its_exit_code() -> None:
    script = "from common import cli; print('x' * 100); cli.leave(65)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=buffered) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) == 65


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("unbuffered", "code"), [({}, 0), ({"PYTHONUNBUFFERED": "1"}, 141)])
def test_a_help_whose_reader_has_gone_ends_without_a_traceback(unbuffered: dict[str, str], code: int) -> None:
    """As with `dsl --help | head -1`: when all was said, or in the middle."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dsl_lab", "--help"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=50, env=plain | unbuffered
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (code, "")


STEPS = """
import resource
from common import cli

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [b"z" * 2**23 for _ in range(16)]
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{first}
for _ in range(2):
    faults_of_a_step()  # the first one, and the one by which the allocator learns what blocks there are
print(faults_of_a_step())
"""


def faults_of_a_step(first: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    script = [sys.executable, "-c", STEPS.format(first=first)]
    return int(subprocess.check_output(script, timeout=50, env=plain | environment))


@pytest.mark.timeout(60)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_is_freed_is_kept_for_the_next_step() -> None:
    kept, plain = faults_of_a_step("cli.keep_freed_memory()"), faults_of_a_step("")
    assert 10 * kept < plain
    left_alone = faults_of_a_step("cli.keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")
    assert 10 * kept < left_alone
