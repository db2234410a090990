"""A step of the server that is taken whole or not at all: what is not finite never stays in its part."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from common.errors import NonFiniteError
from common.methods.base import Answer


class Guard:
    """Of the weights, buffers and momentum of one part, which stay where they are in memory.

    Numbers whose squares overflow (about 1e19) count as not finite: nothing can be learned from them.
    agreed: of a part that lies divided over several places, the sum over these, in place: so all judge alike.
    """

    def __init__(self, state: Sequence[Tensor], agreed: Callable[[Tensor], None] = lambda _: None) -> None:
        self._agreed = agreed
        self._numbers = [tensor for tensor in state if tensor.is_floating_point()]
        self._counters = [tensor for tensor in state if not tensor.is_floating_point()]
        self._before = [[tensor.clone() for tensor in some] for some in (self._numbers, self._counters)]

    def step(self, rule: Callable[[], Answer]) -> Answer:
        """What the rule's step makes, its loss on the host. Raises NonFiniteError.

        After any error the part is as it was before. It is judged by what has become of it: a gradient that
        is not finite leaves no finite weight, a batch that overflows no finite statistics, and a rule may
        have stepped more than once.
        """
        for before, now in self._pairs():
            torch._foreach_copy_(before, now)
        try:
            return self._judged(rule())
        except BaseException:
            for before, now in self._pairs():
                torch._foreach_copy_(now, before)
            raise

    def _judged(self, answer: Answer) -> Answer:
        gradients = [gradient for gradient in answer.gradients if gradient is not None]
        norm = get_total_norm([*self._numbers, *gradients])
        self._agreed(norm)
        if answer.loss is None:
            loss, size = None, norm.item()
        else:  # read together: on a GPU the host waits once
            loss, size = torch.stack([answer.loss, norm]).tolist()
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss}")
        if not math.isfinite(size):
            raise NonFiniteError("a gradient, or a weight, is not finite")
        return answer if loss is None else replace(answer, loss=torch.tensor(loss))

    def _pairs(self) -> Sequence[tuple[list[Tensor], list[Tensor]]]:
        pairs = zip(self._before, (self._numbers, self._counters), strict=True)
        return [(before, now) for before, now in pairs if now]
