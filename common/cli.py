"""What the programs' entry points share: environment, flags, device, and how they end.

Knows torch only inside `device_of`: `--help` must not wait for it.
"""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

from common.errors import ConfigError, SplitLearningError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SHELLS = ("bash", "zsh", "fish")  # whose completion there is
TUNABLES = "GLIBC_TUNABLES"  # by which glibc is told
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Stopped(BaseException):
    """The user, or the system, wants the program to end. Not an Exception: nothing may swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)


def prepare() -> None:
    """Before torch and grpc are imported: idle threads of several processes must not burn the cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def keep_freed_memory() -> None:
    """Has glibc's allocator keep what is freed, up to 2 GiB, for the next step's tensors; unless somebody has
    set it. Else it gives large tensors back to the system in every step, and each step faults them in again,
    page by page (benchmarks/malloc).
    """
    told = TUNABLES in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or told:
        return
    allocator = ctypes.CDLL(None)
    allocator.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that it takes: above it a block is the system's
    allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start_for_many_threads() -> None:
    """Before torch and grpc are imported: starts the process anew, once, as the same one, with glibc's
    allocator as many threads need it, without caches of each thread's own; unless somebody has set it.

    Such a cache keeps (before glibc 2.38) the few bytes beside each block that is aligned, so that the block
    cannot be joined again with what is free around it: each thread that ever computed holds some tensors'
    memory.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.arena_max=2"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def flags(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--print-completion SHELL` as the flag parser knows it. Raises ConfigError."""
    if not arguments or arguments[0] != "--print-completion":
        return list(arguments)
    if len(arguments) != 2 or arguments[1] not in SHELLS:
        raise ConfigError(f"--print-completion {' '.join(arguments[1:])}: say {', '.join(SHELLS)}")
    return ["--tyro-print-completion", arguments[1]]


def parse(kind: type[T], arguments: Sequence[str], default: T, program: str, description: str) -> T:
    """The flags as a `kind`. Ends the program, with the reason, when they are wrong."""
    return tyro.cli(kind, prog=program, description=description, args=flags(arguments), default=default)


def device_of(name: str) -> "torch.device":
    """`cpu`, `cuda`, `cuda:N` or `auto` (a GPU if there is one). Raises ConfigError."""
    import torch

    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in known:
        raise ConfigError(f"--device {name!r}: this machine has {', '.join(known)}; or say auto")
    return torch.device(name)


def run_to_the_end(program: str, body: Callable[[], int]) -> int:
    """The exit code of the body. An error of ours is told in one line; a signal, or that nobody reads what is
    printed any more (`dsl --help | head`), ends it in order."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return body()
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except SplitLearningError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Stopped as stopped:
        print(f"{program}: stopped ({stopped})", file=sys.stderr, flush=True)
        return stopped.exit_code
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it; the interpreter would find that at its end, and tell of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code. For programs whose every file is closed by now.

    Not by sys.exit: gRPC's daemon threads, and ours, may be within torch or gRPC at this moment. When
    such a thread comes back to an interpreter that is ending, Python before 3.14 kills it amid C++, and
    that aborts the process: the exit code would be lost, and with it the reason.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
