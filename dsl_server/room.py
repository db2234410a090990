"""What this machine has room for: open files and memory, before a run with many clients begins."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError
from common.limits import allow_files
from common.progress import megabytes

_OTHER_FILES = 128  # the process's own: libraries, logs, event queues, the page's readers


def make_room_for_files(clients: int) -> None:
    """Lets the process open as many files as it may: a client is a connection. Raises ConfigError where that
    are too few."""
    needed = clients + _OTHER_FILES
    if (most := allow_files(needed)) < needed:
        raise ConfigError(
            f"--clients {clients}: this process may have {most} files open and needs {needed}, one a client: "
            "raise the limit (ulimit -Hn), or let several servers share the clients"
        )


def memory_warning(clients: int, inbox: int, batch_bytes: int, available: int | None = None) -> str:
    """A line, where the clients' inboxes may hold more than there is; else none. They fill only when clients
    are faster than the server, so this is no reason not to begin. available: bytes, else those of this
    machine."""
    available = available_bytes() if available is None else available
    held = clients * (inbox + 1) * batch_bytes  # one more is on its way in
    if not available or held <= available:
        return ""
    return (
        f"the inboxes of {clients} clients may come to {megabytes(held)} ({inbox} batches of "
        f"{megabytes(batch_bytes)} each, and one that is arriving), and this machine has "
        f"{megabytes(available)} free: lower --inbox, --batch-size or --clients"
    )


def available_bytes() -> int:
    """Memory that a process of this machine, or container, may still take; 0 where that is not to be
    known."""
    return min(filter(None, _limits()), default=0)


def _limits() -> Iterator[int]:
    for name, scale in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        try:
            text = Path(name).read_text()
        except OSError:
            continue
        words = text.partition("MemAvailable:")[2].split() if scale > 1 else text.split()
        if words and words[0].isdecimal():
            yield int(words[0]) * scale
