"""What a federation in threads borrows of its process and gives back: torch's generator, and its threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_borrowers = 0
_before: tuple[torch.Tensor, int] | None = None


@contextmanager
def borrowed() -> Iterator[None]:
    """The first who borrows notes what there was; the last who is done puts it back."""
    global _borrowers, _before
    with _lock:
        _borrowers += 1
        _before = _before or (torch.get_rng_state(), torch.get_num_threads())
    try:
        yield
    finally:
        with _lock:
            _borrowers -= 1
            if not _borrowers and _before:
                torch.set_rng_state(_before[0])
                torch.set_num_threads(_before[1])
                _before = None
