"""Files that are there whole or not at all, and disks that are full for a while."""

import os
import time
from collections.abc import Callable
from pathlib import Path

RETRY_S = 2.0  # until a disk that was full is tried again


def replace_file(path: Path, text: str, mode: int = 0o666) -> None:
    """Whoever reads it sees all of this text, or what was there before. mode: who may read and write it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _never(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def until_written(
    write: Callable[[], None],
    on_trouble: Callable[[str | None], None],
    given_up: Callable[[float], bool] = _never,
) -> bool:
    """Writes as often as it takes, for a disk that is full may have room again; False when it was given up.

    on_trouble: told once why it cannot be, and None when it could at last. given_up: waits so many seconds,
    and says whether nobody wants it any more.
    """
    trouble = ""
    while True:
        try:
            write()
            break
        except OSError as error:
            if not trouble:
                trouble = f"{error.strerror or error}; free some space"
                on_trouble(trouble)
        if given_up(RETRY_S):
            return False
    if trouble:
        on_trouble(None)
    return True
