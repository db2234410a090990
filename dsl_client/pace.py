"""What a client sends where it may choose: a codec for each batch, or nothing.

`Adaptive` keeps the client's own training at full speed on the link that there is. `Thrifty` spends a
number of bytes over the epochs, late: features that are not ready teach the server little
(benchmarks/traffic). Both stand between a method's step and its segment.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from common.codecs.travel import LADDER, Travel, Way
from common.methods.base import Method, Sent, Smashed
from common.run import Run
from dsl_client.stream import Flow, Segment

Wire = Callable[[Sent], Tensor | None]
Tell = Callable[[str], None]

SKIPPED = "skipped"  # counted as a codec is
_USUAL = "int4+zstd"  # the smallest that costs no accuracy (benchmarks/traffic)
_WINDOW = 8  # batches from one look at the link to the next
_SHARE = 0.8  # of the link's rate that is asked for
_SATURATED = 0.9  # of the time that gRPC took to take what was sent
_LONGEST_HOLD = 64  # windows


class Pace(Protocol):
    """choice: the codec of the latest batch, and of those that are scored. counts: batches by codec."""

    counts: Counter[str]

    @property
    def choice(self) -> str: ...

    def begin(self, epoch: int, samples: int) -> int:
        """Before an epoch of so many samples: the epoch in which sending began, or this one."""
        ...

    def over(self, segment: Segment, place: int = 0) -> Wire:
        """A method's wire, that sends by this segment what it chooses to. place: of its first batch."""
        ...

    def state(self) -> dict[str, Any]:
        """What it goes on from, in terms of JSON."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class Weights:
    """Bytes of a sample in each codec of the ladder, as last weighed; at first, at most."""

    def __init__(self, travel: Travel, client: int, shape: tuple[int, ...]) -> None:
        self._travel, self._client = travel, client
        self._bytes = {name: float(codec.sizes((1, *shape)).most) for name, codec in travel.ladder.items()}

    def __getitem__(self, name: str) -> float:
        return self._bytes[name]

    def state(self) -> dict[str, float]:
        return dict(self._bytes)

    def load(self, state: Mapping[str, float]) -> None:
        self._bytes = dict(state)

    def weigh(self, batch: Smashed) -> None:
        """Encodes it in every codec, and sends nothing."""
        for name in LADDER:
            parcel = self._travel.encode(Way.BATCH, batch.z, self._client, 0, name)
            self._bytes[name] = parcel.size / len(batch.z)


@dataclass
class _Window:
    """What came to pass within epochs since the last look at the link; what lies between them is not its
    matter."""

    batches: int = 0
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0
    bytes: int = 0  # that the link took
    sending: float = 0.0  # seconds that it took for them

    @property
    def saturated(self) -> bool:
        return self.skipped > 0 or self.sending > _SATURATED * self.seconds

    @property
    def rate(self) -> float:
        """Bytes per second of what the link took, while it was asked to take any."""
        return self.bytes / max(self.sending, 1e-9)


class Adaptive:
    """Never waits: where the outbox is full a batch is skipped. Looks at the link every few batches.

    A link that was too slow has shown its rate: the finest codec is taken that asks for four fifths of it,
    and held. One that was fast enough has not, since what it takes at once may lie in buffers: when the hold
    is over the next finer codec is tried. If that was too much, the hold before it is tried again is twice
    as long; if it did for as long, half as long.
    """

    def __init__(self, weights: Weights, flow: Flow, tell: Tell, first_epoch: int = 0) -> None:
        self._weights, self._flow, self._tell, self._first_epoch = weights, flow, tell, first_epoch
        self._rung = LADDER.index(_USUAL)
        self._holds = [1] * len(LADDER)  # by codec: windows that it waits to be tried
        self._held, self._settling = 0, False  # windows that the present one has been held
        self.counts = Counter[str]()
        self._window = _Window()
        self._latest = self._now()

    @property
    def choice(self) -> str:
        return LADDER[self._rung]

    def begin(self, epoch: int, samples: int) -> int:
        self._latest = self._now()
        return self._first_epoch

    def over(self, segment: Segment, place: int = 0) -> Wire:
        def wire(batch: Sent) -> None:
            assert isinstance(batch, Smashed), "nothing comes back"
            if segment.full:
                segment.skip(batch)
                self._window.skipped += 1
                self.counts[SKIPPED] += 1
            else:
                segment.send(batch, self.choice)
                self.counts[self.choice] += 1
            self._count(len(batch.z))
            if self._window.batches >= _WINDOW and self._window.bytes:  # else it has shown nothing
                window, self._window = self._window, _Window()
                self._look(window, batch)

        return wire

    def state(self) -> dict[str, Any]:
        return {"rung": self._rung, "holds": self._holds, "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._rung, self._holds = state["rung"], list(state["holds"])
        self.counts = Counter(state["counts"])

    def _now(self) -> tuple[float, int, float]:
        return time.perf_counter(), self._flow.bytes, self._flow.seconds

    def _count(self, samples: int) -> None:
        before, self._latest = self._latest, self._now()
        seconds, taken, sending = (now - then for now, then in zip(self._latest, before, strict=True))
        window = self._window
        window.batches, window.samples = window.batches + 1, window.samples + samples
        window.seconds, window.sending = window.seconds + seconds, window.sending + sending
        window.bytes += int(taken)

    def _look(self, window: _Window, batch: Smashed) -> None:
        if self._settling:  # what came before the step down was still on its way
            self._settling = False
        elif window.saturated:
            self._held, self._settling = 0, True
            if self._rung < len(LADDER) - 1:
                self._weights.weigh(batch)
                self._slow_down(window)
        else:
            self._held += 1
            if self._held == self._holds[self._rung]:
                self._holds[self._rung] = max(1, self._held // 2)
            if self._rung > 0 and self._held >= self._holds[self._rung - 1]:
                self._take(self._rung - 1, "room for more")

    def _slow_down(self, window: _Window) -> None:
        """To what asks for no more than a share of the rate, at so many samples in the same time."""
        most = _SHARE * window.rate * window.seconds
        fitting = [r for r, name in enumerate(LADDER) if window.samples * self._weights[name] <= most]
        self._holds[self._rung] = min(2 * self._holds[self._rung], _LONGEST_HOLD)
        rung = max(self._rung, min(fitting, default=len(LADDER) - 1))
        self._take(rung, f"{window.rate / 1e6:.2f} MB/s go through")

    def _take(self, rung: int, why: str) -> None:
        if rung != self._rung:
            self._rung, self._held = rung, 0
            self._tell(f"link: {why}; batches go as {self.choice}")


class Thrifty:
    """Spends no more than `budget` bytes on batches: from the end of the run back, as many epochs as it buys.

    Sending begins when it buys the epochs that are left in the usual codec; from then on each epoch goes in
    the finest codec in which those that are left can be had. Where it does not buy even the last epoch in
    the coarsest, that epoch's batches are sent here and there. Depends on the data alone, so runs repeat.
    """

    def __init__(self, weights: Weights, budget: int, epochs: int, tell: Tell) -> None:
        self._weights, self._tell = weights, tell
        self._budget, self._epochs = budget, epochs
        self.spent = 0
        self._began: int | None = None
        self._every = 1
        self._choice = _USUAL
        self._weighed = -1  # the epoch in which it was done last
        self._epoch = 0
        self.counts = Counter[str]()

    @property
    def choice(self) -> str:
        return self._choice

    def begin(self, epoch: int, samples: int) -> int:
        self._epoch, to_come = epoch, self._epochs - epoch
        left = self._budget - self.spent
        if self._began is None and (to_come == 1 or samples * to_come * self._weights[_USUAL] <= left):
            self._began = epoch
            self._tell(f"budget: sending begins with epoch {epoch + 1}")
        if self._began is None:
            return epoch
        needs = {name: samples * to_come * self._weights[name] for name in LADDER}
        before, self._choice = self._choice, next((n for n in LADDER if needs[n] <= left), LADDER[-1])
        self._every = max(1, math.ceil(needs[self._choice] / left)) if left > 0 else 1
        if self._choice != before or self._began == epoch:
            seldom = f", one in {self._every}" if self._every > 1 else ""
            self._tell(
                f"budget: {self.spent / 1e6:.1f} of {self._budget / 1e6:.1f} MB spent; batches of epoch "
                f"{epoch + 1} go as {self._choice}{seldom}"
            )
        return self._began

    def state(self) -> dict[str, Any]:
        return {
            "spent": self.spent,
            "began": self._began,
            "every": self._every,
            "choice": self._choice,
            "weighed": self._weighed,
            "weights": self._weights.state(),
            "counts": dict(self.counts),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.spent, self._began, self._every = state["spent"], state["began"], state["every"]
        self._choice, self._weighed = state["choice"], state["weighed"]
        self._weights.load(state["weights"])
        self.counts = Counter(state["counts"])

    def over(self, segment: Segment, place: int = 0) -> Wire:
        index = place

        def wire(batch: Sent) -> None:
            nonlocal index
            assert isinstance(batch, Smashed), "nothing comes back"
            if self._weighed < self._epoch:
                self._weights.weigh(batch)
                self._weighed = self._epoch
            size = 0
            if self._began is None or index % self._every:
                segment.skip(batch)
            else:
                size = segment.send(batch, self._choice, most=self._budget - self.spent)
            self.spent += size
            self.counts[self._choice if size else SKIPPED] += 1
            index += 1

        return wire


def pace_of(run: Run, method: Method, weights: Weights, flow: Flow, tell: Tell) -> Pace | None:
    """None where the run says what is sent."""
    if run.budget:
        return Thrifty(weights, run.budget_bytes // run.clients, run.epochs, tell)
    return Adaptive(weights, flow, tell, method.first_epoch) if run.link == "auto" else None
