"""The server's training loop. Only the thread that runs it touches the server's parts."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from common.errors import StepError
from common.meter import Clock
from common.methods.base import Answer, Received, Smashed
from common.methods.hosting import Hosting
from dsl_server.inbox import Exam, Inbox, Job, RoundEnd, Score, Trained, Work, answered

OnTrained = Callable[[int, float, Mapping[str, float]], None]  # samples, mean loss, the method's facts


class Trainer:
    """Steps on groups and scores exams, one after the other, as the inbox gives them."""

    def __init__(self, hosting: Hosting, device: torch.device, clock: Clock) -> None:
        self._hosting, self._device, self._clock = hosting, device, clock

    def train(self, inbox: Inbox, on_trained: OnTrained) -> None:
        """Until the inbox ends. Raises StepError, after telling who waits, when a step fails."""
        items = iter(inbox)
        first = list(itertools.islice(items, 1))  # the wait for it is not the trainer's idleness
        for work in itertools.chain(first, self._clock.iterator("idle", items)):
            try:
                if isinstance(work, RoundEnd):
                    self._hosting.end_round()
                elif isinstance(work, Exam):
                    work.answer.set_result(self._score(work.smashed))
                else:
                    answer = self._step(work)
                    samples = sum(len(job.smashed.y) for job in work)
                    on_trained(samples, answer.loss.item(), answer.facts)
            except Exception as error:
                failure = _failure(work, error)
                for waiting in answered(work):
                    if not waiting.answer.done():  # it was answered, and then counting it failed
                        waiting.answer.set_exception(failure)
                raise failure from error

    def _step(self, jobs: Sequence[Job]) -> Answer:
        group = [
            Received(*self._on_device(job.smashed), client=job.client, progress=job.progress) for job in jobs
        ]
        with self._clock("step"):
            answer = self._hosting.step(group)
            loss = answer.loss.item()
        if not math.isfinite(loss):
            raise StepError(f"the loss is {loss}; lower --lr")
        gradients = answer.gradients or [None] * len(jobs)
        for job, gradient in zip(jobs, gradients, strict=True):
            job.answer.set_result(Trained(gradient, loss))
        return answer

    def _score(self, smashed: Smashed) -> Score:
        correct, loss = self._hosting.score(*self._on_device(smashed))
        return Score(correct, loss)

    def _on_device(self, smashed: Smashed) -> tuple[torch.Tensor, torch.Tensor]:
        z, y = (tensor.to(self._device, non_blocking=True) for tensor in (smashed.z, smashed.y))
        return z, y


def _failure(work: Work, error: Exception) -> StepError:
    text = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
    if isinstance(work, RoundEnd):
        return StepError(f"the server could not end a round: {text}")
    if isinstance(work, Exam):
        return StepError(f"the server could not score a batch of client {work.client}: {text}")
    batches = ", ".join(f"{job.sequence} of client {job.client}" for job in work)
    return StepError(f"the server's step on batch {batches} failed: {text}")
