"""Segments come in, jobs go out: each batch judged, numbered by the ledger and laid into its client's lane.

A segment is what a client sends of one epoch in one call. It declares how much it holds, and is held to it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.codecs import Encoded, Parcel
from common.codecs.floats import fp32
from common.errors import ClosedError, DigestError, RefusedError, WireError
from common.meter import Clock
from common.methods.base import Method, Tail, is_waypoint
from common.optim import progress_of
from common.parts import State
from common.run import Run
from common.sampling import drawn
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import Arrived, BatchSpec
from common.wire.pieces import Digest, Piece
from dsl_server.inbox import EpochEnd, Inbox, Job, Trained
from dsl_server.ledger import Mark
from dsl_server.rounds import Member, Rounds
from dsl_server.saver import Keeper

Pieces = Iterator[Piece[Any]]


class Intake:
    """`check` and `jobs` are called by the thread of a client's call, `state` by the trainer's."""

    def __init__(
        self,
        run: Run,
        method: Method,
        spec: BatchSpec,
        inbox: Inbox,
        rounds: Rounds,
        clock: Clock,
        saver: Keeper,
    ) -> None:
        self._run, self._method, self._spec = run, method, spec
        self._inbox, self._rounds, self._clock, self._saver = inbox, rounds, clock, saver
        self._last: dict[int, Job] = {}  # client to what it sent last, where it may have to be told once more
        self._kept_bytes = Counter[int]()  # by client: received since a checkpoint was last asked for

    def check(self, member: Member, segment: pb.Segment) -> None:
        """Raises WireError where no client of this run would send such a segment."""
        if not 0 <= segment.epoch < self._run.epochs or not 1 <= segment.batches <= segment.samples:
            raise WireError(
                f"{member}: a segment of epoch {segment.epoch} with {segment.batches} batches and "
                f"{segment.samples} samples; the run has epochs 0 to {self._run.epochs - 1}"
            )
        first = segment.first_epoch
        if first > segment.epoch if self._run.budget else first != self._method.first_epoch:
            raise WireError(
                f"{member}: a segment of epoch {segment.epoch} says that sending began in {first}; the run "
                f"has it begin in {self._method.first_epoch}"
            )
        if segment.place and not member.account.identity:
            raise WireError(f"{member}: a segment from batch {segment.place} on; all of it is due")
        if not (self._method.send_every or self._method.afterwards):
            raise RefusedError(f"{self._method.name} sends no batches")

    def jobs(self, member: Member, segment: pb.Segment, requests: Pieces) -> Iterator[tuple[Job, bool]]:
        """The jobs of an open segment, each checked, and whether each is fresh: else it has come before, and
        this is the job that it was. Raises WireError unless the segment holds what it declared."""
        place, samples, sits_out = segment.place, 0, member.client not in drawn(self._run, segment.epoch)
        end = segment.place + segment.batches
        for first in requests:
            batch, digest = None, 0
            if first.head.WhichOneof("head") == "skipped":
                sequence, size = codec.unpack_skipped(first, self._spec, whole=sits_out)
            elif sits_out:
                raise WireError(f"{member} sends in epoch {segment.epoch}, for whose round it was not drawn")
            else:
                batch, digest = self._unpacked(first, requests)
                sequence, size = batch.sequence, len(batch.z)
            place, samples, last = place + 1, samples + size, place + 1 == end
            over = samples != segment.samples if last else samples > segment.samples
            if over or place > end:
                raise _miscounted(member, segment, place - segment.place, samples)
            mark = self._rounds.receive(member, sequence, size, digest, last)
            if batch is not None:
                job, fresh = self._job(member, batch, mark, segment, place - 1)
                if fresh:
                    self._lay(job, last)
                yield job, fresh  # its call may end here
            elif mark is not None:
                self._laid(member.client, mark, last)
        if place < end:
            raise _miscounted(member, segment, place - segment.place, samples)

    def _unpacked(self, first: Piece[Any], rest: Pieces) -> tuple[Arrived, int]:
        """A batch and its digest, 0 where the run has none."""
        # The time that the pieces take to come is the network's, not the decoder's.
        own, due = Clock(), first.head.batch.digest if self._run.lasts else None
        try:
            with own("decode"):
                pieces = own.iterator("network", rest)
                digest = Digest(first, pieces) if self._run.lasts else None
                batch = codec.unpack_batch(first, digest or pieces, self._spec)
                if digest is not None and digest.value != due:
                    raise DigestError(f"batch {batch.sequence} came with other bytes than it was sent with")
        finally:
            spent = own.seconds("decode", "network")
            self._clock.add("decode", spent["decode"] - spent["network"])
        return batch, digest.value if digest else 0

    def _job(
        self, member: Member, batch: Arrived, mark: Mark | None, segment: pb.Segment, place: int
    ) -> tuple[Job, bool]:
        """Of the batch at this place of its epoch, and whether it is fresh."""
        last = self._last.get(member.client)
        if mark is None and last is not None and last.sequence == batch.sequence:
            return last, False
        batches = segment.place + segment.batches
        progress = progress_of(self._run, segment.epoch, place, batches, segment.first_epoch)
        job = Job(
            member.client,
            batch,
            progress,
            self._method.answered(place),
            mark or Mark(),
            waypoint=is_waypoint(place, batches),
        )
        return job, mark is not None

    def _lay(self, job: Job, last: bool) -> None:
        """Into its client's lane, whatever becomes of its call meanwhile: it counts as received.

        last: of its epoch.
        """
        if self._run.lasts:
            if self._method.goes_back:
                self._last[job.client] = job
            self._kept_bytes[job.client] += job.batch.parcel.size
            if self._kept_bytes[job.client] > self._run.spool_bytes / (2 * self._run.checkpoints):
                self._kept_bytes.clear()  # its client's spool must not fill before the next checkpoint
                self._saver.request()
        if self._method.tail is Tail.LAST:  # it counts only when its gradient has come
            job.answer.add_done_callback(partial(self._through, job.client, job.mark, last))
            self._inbox.put(job)
        else:
            self._inbox.put(job)
            self._laid(job.client, job.mark, last)

    def _laid(self, client: int, mark: Mark, last: bool) -> None:
        if last:
            self._inbox.put(EpochEnd(client, mark))
        self._rounds.laid(client, mark)

    def _through(self, client: int, mark: Mark, last: bool, answer: Future[Trained]) -> None:
        """By the trainer: a batch has been through its client's last layers, or could not."""
        with suppress(ClosedError):  # of the run: there is nothing to wait for any more
            if answer.exception() is None:
                self._laid(client, mark, last)
            else:
                self._rounds.give_back(client)

    def state(self) -> tuple[State, dict[str, Any]]:
        """What a checkpoint holds of it: what each client was answered last, which it may not have got."""
        tensors: State = {}
        facts: dict[str, Any] = {}
        for client, job in self._last.items():
            trained = job.answer.result() if _is_well(job.answer) else None
            if trained is None:
                continue
            facts[str(client)] = {"sequence": job.sequence, "loss": trained.loss, "wanted": job.wanted}
            if trained.gradient is not None:
                tensors[f"{client}.gradient"] = trained.gradient
            if _is_well(job.through_tail.output):
                tensors[f"{client}.output"] = job.through_tail.output.result()
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The last answers, as `state` gave them."""
        for client, known in facts.items():
            nothing = torch.empty(0)
            batch = Arrived(nothing, nothing, known["sequence"], Parcel(fp32(), Encoded((0,), [nothing])))
            job = Job(int(client), batch, 0.0, known["wanted"])
            job.answer.set_result(Trained(tensors.get(f"{client}.gradient"), known["loss"]))
            if (output := tensors.get(f"{client}.output")) is not None:
                job.through_tail.output.set_result(output)
            self._last[int(client)] = job


def _is_well(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None


def _miscounted(member: Member, segment: pb.Segment, batches: int, samples: int) -> WireError:
    return WireError(
        f"{member}: epoch {segment.epoch} was to have {segment.batches} batches of {segment.samples} "
        f"samples; {batches} batches of {samples} came"
    )
