"""What a batch holds is let go when it is over, not when Python happens to look for circles of references:
by then, on a busy server, that may be much memory."""

import gc
from pathlib import Path

import pytest
from torch import Tensor

from tests.federation import Batches, federation, small_run

pytestmark = pytest.mark.timeout(90)


def left_to_the_collector(method: str, epochs: int, folder: Path) -> int:
    """Tensors of a batch that a run of so many epochs leaves in circles."""
    gc.collect()
    gc.disable()
    try:
        run = small_run(method=method, clients=2, epochs=epochs)
        federation(run, folder, [Batches(run, seed, 16) for seed in range(2)])
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return sum(isinstance(each, Tensor) and each.shape[:1] == (run.batch_size,) for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("method", ["dsl", "csl", "psl", "ushape", "gapsl", "cyclesl"])
def test_no_batch_is_left_in_a_circle(method: str, tmp_path: Path) -> None:
    few, many = (left_to_the_collector(method, epochs, tmp_path / str(epochs)) for epochs in (1, 9))
    more = 8 * 2 * 2  # batches: eight epochs of two clients
    assert many - few < more / 2
