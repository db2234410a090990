"""SGLR: server-side local gradient averaging, and split learning rates.

S. Pal, M. Uniyal, J. Park, P. Vepakomma, R. Raskar, M. Bennis, M. Jeon and J. Choi, "Server-Side Local
Gradient Averaging and Learning Rate Acceleration for Scalable Split Learning", 2021.
https://arxiv.org/abs/2112.05929

SplitLr: the server's learning rate is the clients' times C ** alpha, for the C clients of the step.
SplitAvg: a share phi of the clients, drawn anew each step, is sent one and the same averaged gradient;
the others their own. `position` averages sample by sample, as the authors' code does (Eq. 15 calls a
sum the average); `global`, the default, averages over clients and samples to one row for all, as in
CycleSL's code, and needs no batches of one size.

phi = 1 all the time diverges in the paper; `phase` averages only in the first or last part of the run.
As in psl.py, a client's own gradient is that of its own mean loss, which is what SGD asks for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from common.errors import ConfigError
from common.methods.base import Answer, Gather, Method, Received, ServerPart
from common.methods.csl import client_step
from common.methods.psl import joint_step

Average = Literal["position", "global"]
Phase = Literal["all", "first", "last"]


def sglr(
    alpha: float = 1.0,
    phi: float = 0.5,
    splitavg: Average = "global",
    phase: Phase = "all",
    fraction: float = 0.6,
) -> Method:
    """phi, fraction: 0 to 1. `fraction` of the run is averaged where `phase` is first or last. Raises
    ConfigError."""
    if not (0 <= phi <= 1 and 0 <= fraction <= 1):
        raise ConfigError(f"sglr: phi {phi} and fraction {fraction} must be from 0 to 1")
    rule = partial(_server_step, alpha, phi, splitavg, phase, fraction)
    return Method("sglr", client_step, rule, local_loss=False, answer_every=1, gather=Gather.ALL, sync="none")


def _server_step(
    alpha: float,
    phi: float,
    splitavg: Average,
    phase: Phase,
    fraction: float,
    part: ServerPart,
    group: Sequence[Received],
) -> Answer:
    for parameters in part.optimizer.param_groups:
        parameters["lr"] *= len(group) ** alpha  # set anew before every step
    loss, gradients = joint_step(part, group)
    active = torch.randperm(len(group), generator=part.generator)[: round(phi * len(group))].tolist()
    if active and _in_phase(phase, fraction, group[0].progress):
        mean = AVERAGES[splitavg]([gradients[k] for k in active])
        for k in active:
            gradients[k] = mean.expand_as(gradients[k])
    return Answer(loss, gradients)


def position_average(gradients: Sequence[Tensor]) -> Tensor:
    """Mean over clients at each position: (B, C, H, W) each, of one B for all, to (B, C, H, W)."""
    sizes = {len(gradient) for gradient in gradients}
    if len(sizes) > 1:
        raise ConfigError(
            f"sglr: splitavg=position needs batches of one size, not {sorted(sizes)}; use splitavg=global"
        )
    return torch.stack(list(gradients)).mean(0)


def global_average(gradients: Sequence[Tensor]) -> Tensor:
    """Mean over clients, weighted by samples, and positions: (B_k, C, H, W) each to (1, C, H, W)."""
    return torch.cat(list(gradients)).mean(0, keepdim=True)


AVERAGES = {"position": position_average, "global": global_average}


def _in_phase(phase: Phase, fraction: float, progress: float) -> bool:
    if phase == "all":
        return True
    return progress < fraction if phase == "first" else progress + fraction >= 1
