"""SplitFed: split learning with federated averaging, in three versions.

C. Thapa, M. A. P. Chamikara, S. Camtepe and L. Sun, "SplitFed: When Federated Learning Meets Split
Learning", AAAI 2022. https://arxiv.org/abs/2004.12088 (versions 1 and 2). Version 3: M. Gawali et al.,
"Comparison of Privacy-Preserving Distributed Deep Learning Methods in Healthcare", 2020,
https://arxiv.org/abs/2012.12591.

    v1  a server part for each client; at an epoch's end server parts and client parts are averaged
    v2  one server part, stepped on each client's batch in turn, in random order; client parts averaged
    v3  as v1, but the clients' parts are never averaged

Averages are weighted by samples (the authors' code does not weight them). The authors' code makes a new
server optimizer for every batch and so loses its momentum; here it is kept.
"""

from collections.abc import Sequence

import torch

from common.methods.base import Answer, Gather, Method, Received, ServerPart
from common.methods.csl import client_step, server_step
from common.run import Sync


def splitfed_v1() -> Method:
    return _splitfed("splitfed-v1", copies=True, sync="average")


def splitfed_v2() -> Method:
    return Method(
        "splitfed-v2",
        client_step,
        server_step_v2,
        local_loss=False,
        answer_every=1,
        gather=Gather.ALL,
        sync="average",
    )


def splitfed_v3() -> Method:
    return _splitfed("splitfed-v3", copies=True, sync="none")


def server_step_v2(part: ServerPart, group: Sequence[Received]) -> Answer:
    order = torch.randperm(len(group), generator=part.generator).tolist()
    answers = {index: server_step(part, [group[index]]) for index in order}
    gradients = [answers[index].gradients[0] for index in range(len(group))]
    losses = [answer.loss for answer in answers.values() if answer.loss is not None]
    return Answer(torch.stack(losses).mean(), gradients)


def _splitfed(name: str, copies: bool, sync: Sync) -> Method:
    return Method(name, client_step, server_step, local_loss=False, answer_every=1, copies=copies, sync=sync)
