"""FedAvg: the federated baseline. The whole network is at the client, and only weights travel.

B. McMahan, E. Moore, D. Ramage, S. Hampson and B. Agüera y Arcas, "Communication-Efficient Learning of
Deep Networks from Decentralized Data", AISTATS 2017. https://arxiv.org/abs/1602.05629

A round is one epoch of every client; averages are weighted by samples, BatchNorm's buffers included;
momentum stays with its client.
"""

from collections.abc import Sequence

from torch import Tensor

from common.methods.base import Answer, ClientPart, Method, Received, ServerPart, Step, Tail


def fedavg() -> Method:
    return Method(
        "fedavg", client_step, server_step, local_loss=False, send_every=0, tail=Tail.ALL, sync="average"
    )


def client_step(part: ClientPart, x: Tensor, y: Tensor) -> Step:
    assert part.tail is not None, "FedAvg's client has the whole network"
    loss = part.loss(part.tail(part.bottom(x)), y)
    part.optimizer.zero_grad()
    loss.backward()
    part.optimizer.step()
    return loss.detach()
    yield  # never: no batch crosses a cut


def server_step(part: ServerPart, group: Sequence[Received]) -> Answer:
    raise AssertionError("FedAvg sends no batches")
