"""The server's training loop. Only the thread that runs it touches the server's parts."""

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from common.errors import ClosedError, SplitLearningError, StepError
from common.meter import Clock
from common.methods.base import Answer, Received
from common.methods.hosting import Hosting
from dsl_server.inbox import Errand, Inbox, Job, RoundEnd, Save, Spare, Trained, Work, answered

# Samples, mean loss if the server knows one, what the method noted, samples learned from once more, and steps
# that were left out.
OnTrained = Callable[[int, float | None, Mapping[str, float], int, int], None]


class Trainer:
    """Steps on groups and does errands, one after the other, as the inbox gives them.

    in_rounds: what is held is learned from again at their ends, not in between. on_applied: told of each
    batch that has been learned from, and of the loss if the server knows it. save: makes a checkpoint of what
    is so now. on_gone: told of each client that went away while its batch was being learned from.
    """

    def __init__(
        self,
        hosting: Hosting,
        device: torch.device,
        clock: Clock,
        in_rounds: bool = False,
        on_applied: Callable[[Job, float | None], None] = lambda *_: None,
        save: Callable[[], None] = lambda: None,
        on_gone: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._hosting, self._device, self._clock = hosting, device, clock
        self._replays, self._on_applied, self._save = not in_rounds, on_applied, save
        self._on_gone = on_gone

    def ask_save(self, inbox: Inbox) -> None:
        """By any thread: a checkpoint is due."""
        inbox.ask_save()

    def train(self, inbox: Inbox, on_trained: OnTrained) -> None:
        """Until the inbox ends. Raises StepError, after telling who waits, when a step fails."""
        items = iter(inbox)
        first = list(itertools.islice(items, 1))  # the wait for it is not the trainer's idleness
        for work in itertools.chain(first, self._clock.iterator("idle", items)):
            try:
                self._do(work, on_trained)
            except ClosedError as gone:  # a client, while its batch was with it
                for job in answered(work):
                    self._on_gone(job.client)
                tell(work, gone)
            except Exception as error:
                failure = failure_of(work, error)
                tell(work, failure)
                raise failure from error

    def _do(self, work: Work, on_trained: OnTrained) -> None:
        if isinstance(work, Errand):
            while self._replays and self._hosting.can_replay:  # it is to see all that has been learned
                self._replay(on_trained)
            work.answer.set_result(work.do(self._hosting))
        elif isinstance(work, Spare):
            self._replay(on_trained)
        elif isinstance(work, Save):
            with self._clock("step"):
                self._save()
        elif isinstance(work, RoundEnd):
            with self._clock("step"):
                answer = self._hosting.end_round()
            if answer is not None:
                _count(0, answer, on_trained)
        else:
            with self._clock("step"):
                answer = self._hosting.step([self._received(job) for job in work])
            loss = _count(sum(len(job.batch.z) for job in work), answer, on_trained)
            gradients = answer.gradients or [None] * len(work)
            for job, gradient in zip(work, gradients, strict=True):
                self._on_applied(job, loss)
                job.answer.set_result(Trained(gradient, loss))

    def _replay(self, on_trained: OnTrained) -> None:
        with self._clock("step"):
            answer = self._hosting.replay()
        _count(0, answer, on_trained)

    def _received(self, job: Job) -> Received:
        return Received(
            self._on_device(job.batch.z),
            self._on_device(job.batch.y),
            client=job.client,
            progress=job.progress,
            wanted=job.wanted,
            through_tail=partial(self._through_tail, job),
            parcel=job.batch.parcel,
        )

    def _through_tail(self, job: Job, output: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        gradient = self._on_device(job.through_tail(output))
        waited = time.perf_counter() - start
        self._clock.add("idle", waited)  # while the client computes
        self._clock.add("step", -waited)
        return gradient

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def _count(samples: int, answer: Answer, on_trained: OnTrained) -> float | None:
    """Tells what a step came to; its mean loss, if the server knows one."""
    loss = None if answer.loss is None else answer.loss.item()
    on_trained(samples, loss, answer.facts, answer.replayed, answer.skipped)
    return loss


def tell(work: Work, error: SplitLearningError) -> None:
    """Those who wait for an answer."""
    for waiting in answered(work):
        if not waiting.answer.done():  # it was answered, and then counting it failed
            waiting.answer.set_exception(error)


def failure_of(work: Work, error: Exception) -> StepError:
    """What could not be done, and why, in a line."""
    text = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
    if isinstance(work, RoundEnd | Save | Spare):
        what = {RoundEnd: "end a round", Save: "make a checkpoint", Spare: "learn again from what it holds"}[
            type(work)
        ]
        return StepError(f"the server could not {what}: {text}")
    if isinstance(work, Errand):
        return StepError(f"the server could not {work.what} of client {work.client}: {text}")
    batches = ", ".join(f"{job.sequence} of client {job.client}" for job in work)
    return StepError(f"the server's step on batch {batches} failed: {text}")
