"""What holds for every test: torch computes in one thread.

The tensors of tests are small; threads that wait for one another would cost more than they compute,
and sums would be those of another number of cores.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
