"""What a client sends where it may choose: a codec for each batch, or nothing.

`Adaptive` keeps the client's own training at full speed on the link that there is. `Thrifty` spends a
number of bytes over the epochs, late: features that are not ready teach the server little
(benchmarks/traffic). Both stand between a method's step and its segment.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.codecs.travel import LADDER, Travel, Way
from common.methods.base import Sent, Smashed
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

    def over(self, segment: Segment) -> Wire:
        """A method's wire, that sends by this segment what it chooses to."""
        ...


class Weights:
    """Bytes of a sample in each codec of the ladder, as last weighed; at first, at most."""

    def __init__(self, travel: Travel, client: int, shape: tuple[int, ...]) -> None:
        self._travel, self._client = travel, client
        self._bytes = {name: float(codec.sizes((1, *shape)).most) for name, codec in travel.ladder.items()}

    def __getitem__(self, name: str) -> float:
        return self._bytes[name]

    def weigh(self, batch: Smashed) -> None:
        """Encodes it in every codec, and sends nothing."""
        for name in LADDER:
            parcel = self._travel.encode(Way.BATCH, batch.z, self._client, 0, name)
            self._bytes[name] = parcel.size / len(batch.z)


@dataclass
class _Window:
    """A few batches, and the link meanwhile. sending: seconds that gRPC took to take what was sent."""

    batches: int = 0
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0
    bytes: int = 0
    sending: float = 0.0

    @property
    def saturated(self) -> bool:
        return self.skipped > 0 or self.sending > _SATURATED * self.seconds

    @property
    def rate(self) -> float:
        """Bytes per second that the link took while it was asked to take some."""
        return self.bytes / max(1e-9, self.sending)

    @property
    def over(self) -> bool:
        """It has seen enough: of a link that is full, at least how long it took for something."""
        return self.batches >= _WINDOW and (self.bytes > 0 or not self.skipped)


class Adaptive:
    """Never waits: where the outbox is full a batch is skipped. Looks at the link every few batches.

    A link that was too slow has shown its rate: the finest codec is taken that asks for four fifths of it,
    and held. One that was fast enough has not, since what it takes at once may lie in buffers: when the hold
    is over the next finer codec is tried. If that was too much, the next hold is twice as long.
    """

    def __init__(self, weights: Weights, flow: Flow, tell: Tell) -> None:
        self._weights, self._flow, self._tell = weights, flow, tell
        self._rung = LADDER.index(_USUAL)
        self._hold, self._held = 1, 0  # windows
        self.counts = Counter[str]()
        self._window, self._mark = _Window(), self._now()

    @property
    def choice(self) -> str:
        return LADDER[self._rung]

    def begin(self, epoch: int, samples: int) -> int:
        self._mark = self._now()  # what lies between epochs is not the link's matter
        return 0

    def over(self, segment: Segment) -> Wire:
        def wire(batch: Sent) -> None:
            assert isinstance(batch, Smashed), "nothing comes back"
            full = segment.full
            if full:
                segment.skip(batch)
            else:
                segment.send(batch, self.choice)
            self.counts[SKIPPED if full else self.choice] += 1
            self._count(len(batch.z), full)
            if self._window.over:
                self._look(batch)

        return wire

    def _now(self) -> tuple[float, int, float]:
        return time.perf_counter(), self._flow.bytes, self._flow.seconds

    def _count(self, samples: int, skipped: bool) -> None:
        before, self._mark, window = self._mark, self._now(), self._window
        window.batches += 1
        window.samples += samples
        window.skipped += skipped
        window.seconds += self._mark[0] - before[0]
        window.bytes += self._mark[1] - before[1]
        window.sending += self._mark[2] - before[2]

    def _look(self, batch: Smashed) -> None:
        window, self._window = self._window, _Window()
        self._held += 1
        if window.saturated:
            self._held = 0
            if self._rung < len(LADDER) - 1:
                self._weights.weigh(batch)
                self._slow_down(window.rate, window.samples / window.seconds)
        elif self._held >= self._hold and self._rung > 0:
            self._take(self._rung - 1, "room for more")

    def _slow_down(self, rate: float, samples: float) -> None:
        """To what asks for a share of this rate, in bytes per second, at so many samples per second."""
        needs = [samples * self._weights[name] for name in LADDER]
        rung = next((r for r, need in enumerate(needs) if need <= _SHARE * rate), len(LADDER) - 1)
        if rung > self._rung:
            self._hold = min(2 * self._hold, _LONGEST_HOLD)
            self._take(rung, f"{rate / 1e6:.2f} MB/s go through")

    def _take(self, rung: int, why: str) -> None:
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

    def over(self, segment: Segment) -> Wire:
        index = 0

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


def pace_of(run: Run, weights: Weights, flow: Flow, tell: Tell) -> Pace | None:
    """None where the run says what is sent."""
    if run.budget:
        return Thrifty(weights, run.budget_bytes // run.clients, run.epochs, tell)
    return Adaptive(weights, flow, tell) if run.link == "auto" else None
