"""The training loop of a server of several ranks. Only the thread that runs it makes collectives.

A tick: each rank takes what waits at it, up to so many batches or for so long; the ranks tell each other what
they have (`ranks.Header`); and all make one and the same step of the mean of the gradients of all these
batches, by samples. A rank with nothing gives zeros. Or each steps on its own, and every so many ticks
weights, statistics and momentum are made one. What has to find the ranks' weights alike, and all of them
between two steps, stands until that is so: a checkpoint, the end of a round, an errand.

Where the part lies divided over the ranks (`common/methods/divided.py`), all of them go through the network
equally often: who has fewer batches or errands than another goes along with noise.

With a fixed order a tick is one batch of each client that is still in the epoch, at whichever rank, however
long that takes; rounds end for all ranks together."""

import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError, LostRankError, SplitLearningError
from common.methods.base import Answer, Gather, Method, Tail
from common.parts import Spec, State
from common.run import Run
from dsl_server.inbox import Errand, Inbox, Job, RoundEnd, Save, Spare, Trained
from dsl_server.ranks import Header, Headers, Ranks
from dsl_server.rounds import Rounds
from dsl_server.saver import Follower, Saver, Unsaved
from dsl_server.sharing import Sharing
from dsl_server.trainer import OnTrained, Trainer, failure_of, tell

_ERRANDS = 32  # of a tick


@dataclass(frozen=True)
class Pace:
    """batches: that close a rank's share of a tick. seconds: after which it closes in any case. local: ticks
    of local steps from one mean of the ranks' weights to the next; 0: every step is a common one. fsdp: the
    part lies divided over the ranks."""

    batches: int = 1
    seconds: float = 0.02
    local: int = 0
    fsdp: bool = False

    @classmethod
    def of(cls, batches: int, milliseconds: float, sync: str, fsdp: bool = False) -> "Pace":
        """As flags say it. Raises ConfigError."""
        if batches < 1:
            raise ConfigError(f"--tick-batches {batches} is below 1")
        if not 1 <= milliseconds <= 60_000:
            raise ConfigError(f"--tick-ms {milliseconds:g}: choose from 1 to 60000")
        match = re.fullmatch(r"step|every:([1-9][0-9]{0,8})", sync)
        if match is None:
            raise ConfigError(f"--server-sync {sync!r}: choose step, or every:H, such as every:8")
        if fsdp and match[1]:
            raise ConfigError(f"--fsdp: every step is a common one; leave --server-sync {sync} out")
        return cls(batches, milliseconds / 1000, int(match[1] or 0), fsdp)


def check(run: Run, method: Method, pace: Pace) -> None:
    """Raises ConfigError where several ranks cannot make this run."""
    own = method.gather is not Gather.EACH or method.copies or method.round_step or method.memory
    if own or method.new_head or method.tail is not Tail.NONE:
        raise ConfigError(
            f"--method {method.name}: a server of several ranks needs one part that steps on each batch; "
            "choose dsl, csl or cse-fsl, or start one process"
        )
    if pace.fsdp and run.server_modules > 1:
        raise ConfigError(f"--server-modules {run.server_modules}: not with --fsdp; leave one of them out")
    refused = {
        f"--quorum {run.quorum}": run.least_clients < run.clients,
        "--sync relay": run.sync == "relay",
        "--replay": run.replay,
        f"--concatenate {run.concatenate}": run.concatenate > 1,
        f"--round-timeout {run.round_timeout:g}": run.round_timeout,
        "--measure-memory": run.measure_memory,
    }
    for flag, said in refused.items():
        if said:
            raise ConfigError(
                f"{flag}: not for a server of several ranks; leave it out, or start one process"
            )
    if run.fixed_order and pace.batches > 1:
        raise ConfigError(
            f"--tick-batches {pace.batches}: with --fixed-order a tick is one batch of each client; leave it "
            "out"
        )


class Ticks(Trainer):
    """part_specs: of a client's part, as it is averaged. goes_back: clients come back to waypoints only. The
    rest of its arguments are the trainer's."""

    def __init__(
        self,
        ranks: Ranks,
        pace: Pace,
        run: Run,
        rounds: Rounds,
        sharing: Sharing,
        part_specs: Mapping[str, Spec],
        goes_back: bool,
        *trainers: Any,
        **more: Any,
    ) -> None:
        super().__init__(*trainers, **more)
        self._ranks, self._pace, self._rounds, self._sharing = ranks, pace, rounds, sharing
        self._fixed, self._averages = run.fixed_order, run.sync == "average"
        self._goes_back, self._part_specs = goes_back, part_specs
        self._jobs: list[Job] = []  # taken, and not learned from yet
        self._errands: list[Errand] = []  # taken, of a divided part
        self._stands: Errand | RoundEnd | Save | None = None
        self._ended = False
        self._astray = set[int]()  # clients that cannot come back to where they are now
        self._save_due = self._saving = False
        self._ticks = 0  # in which anything was learned
        self._since = 0  # samples of this rank's local steps since the ranks' weights were one
        self._counted = self._scored = self._skipped = 0
        self._loss = 0.0
        self._news = b""
        self._given = 0  # samples behind the clients' parts for an average

    def ask_save(self, inbox: Inbox) -> None:
        """As the trainer's, of the first rank."""
        self._save_due = True

    def train(self, inbox: Inbox, on_trained: OnTrained) -> None:
        """Until the clients of all ranks have left. Raises StepError when a step fails, and ClosedError when
        another rank ends before, or is lost, or the inbox is closed: after telling the other ranks, and who
        waits here."""
        self._on_trained = on_trained
        try:
            while not self._tick(inbox):
                pass
            with self._ranks.together():
                self._hosting.put_together(self._ranks.first)
            self._ranks.end()
        except Exception as error:
            failure = error if isinstance(error, SplitLearningError) else failure_of(self._jobs, error)
            tell(self._jobs, failure)
            for errand in self._errands:
                tell(errand, failure)
            self._ranks.fail(failure)
            raise failure from error

    def _tick(self, inbox: Inbox) -> bool:
        """Whether it was the last."""
        with self._clock("idle"):
            try:
                self._take(inbox)
            except SplitLearningError as error:
                self._ranks.say(error)
                self._ranks.exchange(Header(failed=1.0))  # so that all end at the same place
                raise
            headers = self._ranks.exchange(self._header())
        if headers.any("failed"):
            raise self._ranks.said() or LostRankError("a rank ended the run, and did not say why")
        self._count_all(headers)
        if headers.any("news"):
            self._sharing.hear(self._ranks.from_each(self._news))
        if headers.any("errands"):
            self._run_together(headers.most("errands"))
        if headers.any("part_samples") and headers.all("parts_ready"):
            self._average(headers.total("part_samples"))
        if self._fixed and headers[0].save_now and headers.all("in_step"):
            self._make_checkpoint()
        learns = headers.any("samples") and (headers.all("ready") or not self._fixed)
        if learns:
            self._learn(headers)
        over = headers.all("ended")
        if self._pace.local and (headers.any("wants_mean") or over or (learns and self._is_due())):
            self._mean()
        if not self._fixed and headers[0].save_now:
            self._save_in_any_order(inbox, headers)
        if headers.any("at_round_end") and headers.all("at_round_end", "ended"):
            self._hosting.end_round()
            self._stands = None
        return over

    # ------------------------------------------------------------ what waits here

    def _take(self, inbox: Inbox) -> None:
        """What waits at this rank, until there is enough, or its time is up, or it has to stand."""
        end = time.monotonic() + self._pace.seconds
        enough = 1 if self._fixed else self._pace.batches
        if inbox.closed:
            raise inbox.closed
        while (
            not (self._stands or self._ended) and len(self._jobs) < enough and len(self._errands) < _ERRANDS
        ):
            work = inbox.take(max(0.0, end - time.monotonic()))
            if isinstance(work, Spare):
                return
            if isinstance(work, Errand) and not (self._jobs or self._since):
                self._errand(work)
                if time.monotonic() >= end:
                    return
            elif isinstance(work, Errand | RoundEnd | Save):
                self._stands = work
            elif work is not None:
                self._jobs.extend(work)
            elif inbox.closed:
                raise inbox.closed
            else:
                self._ended = True
        if isinstance(self._stands, Errand) and not (self._jobs or self._since):
            errand, self._stands = self._stands, None
            self._errand(errand)

    def _errand(self, errand: Errand) -> None:
        if self._pace.fsdp:
            self._errands.append(errand)
        else:
            self._run(errand)

    def _run_together(self, most: int) -> None:
        """The errands that wait here. most: at the rank that has most of them."""
        with self._ranks.together():
            for _ in range(most - len(self._errands)):
                self._hosting.accompany()
        while self._errands:
            self._run(self._errands.pop(0))

    def _run(self, errand: Errand) -> None:
        try:
            with self._ranks.together():
                done = errand.do(self._hosting)
        except Exception as error:  # whatever a network of the user's raises
            failure = error if isinstance(error, LostRankError) else failure_of(errand, error)
            with suppress(InvalidStateError):  # its client is lost
                errand.answer.set_exception(failure)
            raise failure from error
        with suppress(InvalidStateError):
            errand.answer.set_result(done)

    def _header(self) -> Header:
        jobs, stands, saver = self._jobs, self._stands, self._sharing.saver
        self._news = self._sharing.news()
        ready, self._given = self._rounds.given() if self._averages else (True, 0)
        return replace(
            self._counts(),
            batches=len(jobs),
            samples=sum(len(job.batch.z) for job in jobs),
            progress=sum(len(job.batch.z) * job.progress for job in jobs),
            ready=bool(jobs) or isinstance(stands, RoundEnd) or self._ended,
            at_round_end=isinstance(stands, RoundEnd),
            at_save=isinstance(stands, Save),
            in_step=not self._astray,
            ended=self._ended and not jobs,
            wants_save=isinstance(saver, Follower) and saver.is_due,
            save_now=self._save_due and isinstance(saver, Saver) and saver.is_free,
            errands=len(self._errands),
            wants_mean=isinstance(stands, Errand),
            part_samples=self._given,
            parts_ready=ready,
            news=len(self._news),
        )

    def _counts(self) -> Header:
        """What this rank has learned since it said so last."""
        header = Header(counted=self._counted, scored=self._scored, loss=self._loss, skipped=self._skipped)
        self._counted = self._scored = self._skipped = 0
        self._loss = 0.0
        return header

    def _count_all(self, headers: Headers) -> None:
        """By the first rank, what all have learned."""
        saver = self._sharing.saver
        if not isinstance(saver, Saver | Unsaved) or not self._ranks.first:
            return
        if headers.any("wants_save") and not self._save_due:
            saver.request()
        samples, scored, skipped = (int(headers.total(name)) for name in ("counted", "scored", "skipped"))
        if samples or skipped:
            self._on_trained(samples, headers.total("loss") / scored if scored else None, {}, 0, skipped)
            saver.stir()

    # ------------------------------------------------------------ what the ranks do together

    def _learn(self, headers: Headers) -> None:
        with self._clock("step"), self._ranks.together():
            received = [self._received(job) for job in self._jobs]
            if self._pace.local:
                answers = [self._hosting.step([batch]) for batch in received]
                self._skipped += sum(answer.skipped for answer in answers)
            else:
                samples = headers.total("samples")
                progress = headers.total("progress") / samples
                before = self._hosting.skipped
                answers = self._hosting.joint_step(
                    received, samples, progress, self._ranks.sum, headers.most("batches")
                )
                self._skipped += (self._hosting.skipped - before) if self._ranks.first else 0
        self._ticks += 1
        jobs, self._jobs = self._jobs, []
        for job, answer in zip(jobs, answers, strict=True):
            self._answer(job, answer)

    def _answer(self, job: Job, answer: Answer) -> None:
        samples = len(job.batch.z)
        self._counted += samples
        self._since += samples if self._pace.local else 0
        loss = None if answer.loss is None else answer.loss.item()
        if loss is not None:
            self._scored += samples
            self._loss += samples * loss
        if self._goes_back:
            (self._astray.discard if job.waypoint else self._astray.add)(job.client)
        self._on_applied(job, loss)
        job.answer.set_result(Trained(answer.gradients[0] if answer.gradients else None, loss))

    def _is_due(self) -> bool:
        return self._ticks % self._pace.local == 0

    def _mean(self) -> None:
        """Weights, statistics and momentum of the ranks become one, by the samples since they were."""
        samples = torch.tensor(float(self._since), dtype=torch.float64)
        self._ranks.sum(samples)
        if samples:
            with self._clock("step"):
                self._hosting.mean_over_places(self._since / samples.item(), self._ranks.sum)
        self._since = 0

    def _average(self, samples: float) -> None:
        """Of the clients' parts, at all ranks: those who wait for it go on."""
        floats = {name: spec for name, spec in self._part_specs.items() if spec[0].is_floating_point}
        counters = {name: spec for name, spec in self._part_specs.items() if name not in floats}
        state = self._rounds.own_mean()
        mean = _flat(state, floats, torch.float64) * (self._given / samples)
        largest = _flat(state, counters, torch.int64)
        self._ranks.sum(mean)
        self._ranks.largest(largest)
        made = {**_taken_apart(mean, floats), **_taken_apart(largest, counters)}
        self._rounds.averaged({name: made[name] for name in self._part_specs})

    def _save_in_any_order(self, inbox: Inbox, headers: Headers) -> None:
        if not self._goes_back:
            self._make_checkpoint()
        elif headers.all("at_save", "ended"):
            self._make_checkpoint()
            self._saving, self._stands = False, None
            inbox.saved()
        elif not self._saving:  # clients can go back to certain batches only: until then
            self._saving = True
            inbox.ask_save()

    def _make_checkpoint(self) -> None:
        if self._pace.local:
            self._mean()
        self._count_all(
            self._ranks.exchange(self._counts())
        )  # of this tick: what is saved is all that is learned
        self._save_due = False
        with self._clock("step"):
            with self._ranks.together():
                self._hosting.put_together(self._ranks.first)
            self._save()


def _flat(state: State, specs: Mapping[str, Spec], dtype: torch.dtype) -> Tensor:
    """One tensor of all of them, in the order of the specs; zeros where there are none."""
    tensors = [state.get(name, torch.zeros(shape)).reshape(-1) for name, (_, shape) in specs.items()]
    return torch.cat([torch.empty(0, dtype=dtype), *(tensor.to(dtype) for tensor in tensors)])


def _taken_apart(flat: Tensor, specs: Mapping[str, Spec]) -> State:
    parts = flat.split([math.prod(shape) for _, shape in specs.values()])
    return {
        name: part.to(dtype).reshape(shape)
        for part, (name, (dtype, shape)) in zip(parts, specs.items(), strict=True)
    }
