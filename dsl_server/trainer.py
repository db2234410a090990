"""The server's training loop. Only the thread that runs it touches the server's part."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from common.errors import StepError
from common.meter import Clock
from common.methods.base import Answer, Method, ServerPart, Smashed
from common.optim import learning_rate, set_learning_rate
from common.run import Run
from dsl_server.inbox import Exam, Inbox, Job, Score, Trained, Work

OnTrained = Callable[[int, float], None]  # samples, mean loss


class Trainer:
    """Steps on groups and scores exams, one after the other, as the inbox gives them."""

    def __init__(
        self, run: Run, method: Method, part: ServerPart, device: torch.device, clock: Clock
    ) -> None:
        self._run, self._method, self._part, self._device, self._clock = run, method, part, device, clock

    def train(self, inbox: Inbox, on_trained: OnTrained) -> None:
        """Until the inbox ends. Raises StepError, and ends the inbox with it, when a step fails."""
        items = iter(inbox)
        first = list(itertools.islice(items, 1))  # the wait for it is not the trainer's idleness
        for work in itertools.chain(first, self._clock.iterator("idle", items)):
            try:
                if isinstance(work, Exam):
                    work.answer.set_result(self._score(work.smashed))
                else:
                    on_trained(sum(len(job.smashed.y) for job in work), self._step(work))
            except Exception as error:
                failure = _failure(work, error)
                for waiting in [work] if isinstance(work, Exam) else work:
                    waiting.answer.set_exception(failure)
                raise failure from error

    def _step(self, jobs: Sequence[Job]) -> float:
        progress = sum(job.progress for job in jobs) / len(jobs)
        set_learning_rate(self._part.optimizer, learning_rate(self._run, progress))
        with self._clock("step"):
            answer = self._method.server_step(self._part, [self._on_device(j.smashed) for j in jobs])
            loss = answer.loss.item()
        if not math.isfinite(loss):
            raise StepError(f"the loss is {loss}; lower --lr")
        self._answer(jobs, answer, loss)
        return loss

    def _answer(self, jobs: Sequence[Job], answer: Answer, loss: float) -> None:
        gradients = answer.gradients if self._method.answers else [None] * len(jobs)
        for job, gradient in zip(jobs, gradients, strict=True):
            job.answer.set_result(Trained(gradient, loss))

    def _score(self, smashed: Smashed) -> Score:
        batch = self._on_device(smashed)
        self._part.top.eval()
        with torch.no_grad():
            logits = self._part.top(batch.z)
            loss = F.cross_entropy(logits, batch.y, reduction="sum")
            correct = (logits.argmax(1) == batch.y).sum()
        self._part.top.train()
        return Score(int(correct), loss.item())

    def _on_device(self, smashed: Smashed) -> Smashed:
        return Smashed(
            smashed.z.to(self._device, non_blocking=True), smashed.y.to(self._device, non_blocking=True)
        )


def _failure(work: Work, error: Exception) -> StepError:
    text = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
    if isinstance(work, Exam):
        return StepError(f"the server could not score a batch of client {work.client}: {text}")
    batches = ", ".join(f"{job.sequence} of client {job.client}" for job in work)
    return StepError(f"the server's step on batch {batches} failed: {text}")
