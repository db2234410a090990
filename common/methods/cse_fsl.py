"""CSE-FSL: local losses, parts averaged, and activations sent only from every h-th batch.

Y. Mu and C. Shen, "Federated Split Learning with Improved Communication and Storage Efficiency", 2025.
https://arxiv.org/abs/2507.15816

With h = 1 it is DSL with averaged parts (Han et al. 2021).
"""

from common.errors import ConfigError
from common.methods.base import Method
from common.methods.dsl import client_step, server_step


def cse_fsl(h: int = 5) -> Method:
    """h: batches from one that is sent to the next; the first of an epoch is sent. Raises ConfigError."""
    if h < 1:
        raise ConfigError(f"cse-fsl: h {h} is below 1")
    return Method(
        "cse-fsl", client_step, server_step, local_loss=True, send_every=h, sync="average", modular=True
    )
