"""What memory a process has and has had, as the kernel counts it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def resident_bytes(process: int | str = "self") -> int:
    """process: its number, or this one."""
    return _counted("VmRSS", process)


@contextmanager
def grows_by_less_than(most: int) -> Iterator[None]:
    """Even the peak within it is at most so many bytes above what there was before, and nothing is reserved
    that would be a hundred times more."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    except OSError:
        pytest.skip("this kernel does not let a process's peak be counted anew")
    resident, reserved = _counted("VmRSS"), _counted("VmPeak")
    yield
    assert _counted("VmHWM") - resident < most
    assert _counted("VmPeak") - reserved < max(2**32, 100 * most)


def _counted(name: str, process: int | str = "self") -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return 1024 * int(found[1])
