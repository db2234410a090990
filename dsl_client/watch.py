"""What a client is doing, for whoever shows it: a terminal, Prometheus. Knows no way of showing any."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, TypeVar

from common.meter import Rate
from dsl_client.client import Client
from dsl_client.trainer import Scored, Step

State = Literal["beginning", "training", "waiting", "between"]
N = TypeVar("N", int, float)
_BUSY: tuple[State, ...] = ("training", "waiting", "beginning", "between")  # who says so for many
STALLED_S = 2.0  # without a step, within an epoch: then it waits
_WINDOW_S = 5.0


@dataclass(frozen=True)
class View:
    """This client at one moment.

    state: beginning (no batch yet), training, waiting (within an epoch, for room in the outbox or an answer),
    between (two epochs: it is scored, or waits for other clients).
    """

    client: int
    clients: int
    name: str  # of the run
    method: str
    model: str
    place: str  # where the network is cut
    state: State
    epoch: int  # from 0
    epochs: int
    batch: int  # of the epoch, from 1; 0 before the first
    batches: int
    done: float  # the fraction of the epochs that is behind it
    samples: int  # that this process has trained on
    rate: float  # of these a second, over the last seconds
    loss: float | None  # of the last batch: the client's own or the server's
    metric: str  # accuracy, or another
    score: float | None  # of the last evaluation, by that metric
    alone: float | None  # of the client's own head
    queue: int  # batches that wait in the outbox
    outbox: int  # that it takes
    waits: float  # the fraction of the last seconds that it has waited
    wire: Mapping[str, Mapping[str, int]]  # {"up" | "down": {kind: serialized bytes}}
    phases: Mapping[str, float]  # seconds: forward, backward, encode, wait; none ever falls
    seconds: float  # since it joined
    left_s: float | None  # until the end, if it goes on as until now; None while that is not to be told
    replicas: int = 0  # clients of this process that this is the sum of; 0: it is of one that is alone
    ended: int = 0  # of these


class Watch:
    """Of a client that has joined. Its trainer tells `step` and `scored`; any thread may ask for a view."""

    def __init__(self, client: Client) -> None:
        self._client, self._run = client, client.run
        self._rate, self._samples = Rate(), 0
        self._step: Step | None = None
        self._scored: Scored | None = None
        self._start = self._stepped_at = time.monotonic()
        self._first: float | None = None  # what was done when the first step of this process was
        self._waited: deque[tuple[float, float]] = deque([(self._start, 0.0)])  # when, and how long by then
        self._phases: dict[str, float] = {}
        self._lock = threading.Lock()

    def step(self, step: Step) -> None:
        self._samples += step.samples
        self._rate.add(step.samples)
        self._step, self._stepped_at = step, time.monotonic()

    def scored(self, score: Scored) -> None:
        self._scored = score

    def view(self) -> View:
        run, step, scored, now = self._run, self._step, self._scored, time.monotonic()
        done = (step.epoch + step.batch / step.batches) / run.epochs if step else 0.0
        with self._lock:
            phases = self._never_falling(self._client.phases())
            waits = self._waits(now, phases["wait"])
            left_s = self._left(now - self._start, done)
        return View(
            client=self._client.index,
            clients=run.clients,
            name=run.name,
            method=run.method,
            model=run.model,
            place=run.place,
            state=self._state(step, now),
            epoch=step.epoch if step else 0,
            epochs=run.epochs,
            batch=step.batch if step else 0,
            batches=step.batches if step else 0,
            done=done,
            samples=self._samples,
            rate=self._rate.per_second(),
            loss=None if step is None or step.loss is None else float(step.loss),
            metric=run.metric.rpartition(":")[2],
            score=scored.value if scored else None,
            alone=scored.alone if scored else None,
            queue=self._client.waiting,
            outbox=run.outbox,
            waits=waits,
            wire=self._client.traffic.by_kind(),
            phases=phases,
            seconds=now - self._start,
            left_s=left_s,
        )

    def _state(self, step: Step | None, now: float) -> State:
        if step is None:
            return "beginning"
        if step.batch == step.batches:
            return "between"
        return "training" if now - self._stepped_at < STALLED_S else "waiting"

    def _waits(self, now: float, waited: float) -> float:
        """A wait is counted when it is over; one that goes on for long is seen late."""
        self._waited.append((now, waited))
        while len(self._waited) > 2 and self._waited[1][0] <= now - _WINDOW_S:
            self._waited.popleft()
        then, before = self._waited[0]
        return min(1.0, (waited - before) / (now - then)) if now > then else 0.0

    def _left(self, seconds: float, done: float) -> float | None:
        """By what this process has done: one before it may have begun."""
        if self._first is None and done:
            self._first = done
        mine = done - (self._first or 0.0)
        return seconds * (1 - done) / mine if mine >= 0.01 else None

    def _never_falling(self, phases: dict[str, float]) -> dict[str, float]:
        """Forward passes are counted at once, a step when it is over."""
        self._phases = {name: max(s, self._phases.get(name, 0.0)) for name, s in phases.items()}
        return dict(self._phases)


def together(views: Sequence[View], ended: int) -> View:
    """Many clients of one run as one: what is counted is added up, epoch is that of the last of them, what is
    measured is a mean. ended: how many of them have. views: at least one."""
    states = {view.state for view in views}
    state = next((busy for busy in _BUSY if busy in states), views[0].state)
    return replace(
        views[0],
        client=-1,
        state=state,
        epoch=min(view.epoch for view in views),
        batch=sum(view.batch for view in views),
        batches=sum(view.batches for view in views),
        done=fmean(view.done for view in views),
        samples=sum(view.samples for view in views),
        rate=sum(view.rate for view in views),
        loss=_mean(view.loss for view in views),
        score=_mean(view.score for view in views),
        alone=_mean(view.alone for view in views),
        queue=sum(view.queue for view in views),
        outbox=sum(view.outbox for view in views),
        waits=fmean(view.waits for view in views),
        wire={way: _sums(view.wire[way] for view in views) for way in views[0].wire},
        phases=_sums(view.phases for view in views),
        seconds=max(view.seconds for view in views),
        left_s=max((view.left_s for view in views if view.left_s is not None), default=None),
        replicas=len(views),
        ended=ended,
    )


def _mean(numbers: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def _sums(counts: Iterable[Mapping[str, N]]) -> dict[str, N]:
    """By name; all have the same names."""
    each = list(counts)
    return {name: sum((count[name] for count in each[1:]), each[0][name]) for name in each[0]}
