"""What holds for every test: torch computes in one thread.

The tensors of tests are small; threads that wait for one another would cost more than they compute,
and sums would be those of another number of cores.
"""

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.ended import Runs


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> "Runs":
    """Finished runs by their names: the folders that both ends left."""
    from tests.ended import Runs

    return Runs(lambda: tmp_path_factory.mktemp("run"))
