"""What a client sends where it may choose: within its budget, or as much as the link takes without a wait."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.travel import Travel
from common.methods import build_method
from common.methods.base import Smashed
from dsl_client import pace
from dsl_client.pace import SKIPPED, Adaptive, Thrifty, Weights, pace_of
from dsl_client.stream import Flow
from tests.federation import small_run

pytestmark = pytest.mark.timeout(60)

# What is decided does not hang on which codecs there are: these stand for any.
BYTES = {"fp32": 4096.0, "fp16": 2048.0, "int8+zstd": 900.0, "int4+zstd": 500.0, "int2+zstd": 250.0}
LADDER = tuple(BYTES)


@pytest.fixture(autouse=True)
def _ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LADDER", LADDER)


class Fixed(Weights):
    """Samples of which each codec makes these bytes."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self._bytes = dict(weights or BYTES)
        self.weighed = 0

    def weigh(self, batch: Smashed) -> None:
        self.weighed += 1


class Segment:
    """Notes what it is told to do."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.full, self.done, self._weights = False, list[str](), weights or BYTES

    def send(self, batch: Smashed, choice: str, most: int | None = None) -> int:
        size = int(len(batch.z) * self._weights[choice])
        if most is not None and size > most:
            self.done.append(SKIPPED)
            return 0
        self.done.append(choice)
        return 0 if most is None else size

    def skip(self, batch: Smashed) -> None:
        self.done.append(SKIPPED)


def batch(samples: int = 10) -> Smashed:
    return Smashed(torch.zeros(samples, 1), torch.zeros(samples, dtype=torch.int64))


# ---------------------------------------------------------------- a budget


def spent(
    budget: int, epochs: int, batches: int = 4, real: dict[str, float] | None = None
) -> tuple[list[str], Thrifty]:
    """What becomes of each epoch's batches of 10 samples: `7` is int4+zstd seven times, and so on."""
    thrifty, told = Thrifty(Fixed(), budget, epochs, lambda _: None), list[str]()
    for epoch in range(epochs):
        thrifty.begin(epoch, 10 * batches)
        segment: Any = Segment(real)
        wire = thrifty.over(segment)
        for _ in range(batches):
            wire(batch())
        told.append(" ".join(segment.done))
    return told, thrifty


EPOCH = 40 * 500  # of int4+zstd


def told(*counts: tuple[int, str]) -> str:
    return " ".join(name for count, name in counts for _ in range(count))


def test_sending_begins_in_the_epoch_from_which_the_rest_fits() -> None:
    epochs, thrifty = spent(2 * EPOCH, epochs=5)
    assert epochs == [told((4, SKIPPED))] * 3 + [told((4, "int4+zstd"))] * 2
    assert thrifty.spent == 2 * EPOCH


def test_a_byte_less_and_it_begins_an_epoch_later() -> None:
    assert spent(2 * EPOCH - 1, epochs=3)[0] == [told((4, SKIPPED))] * 2 + [told((4, "int8+zstd"))]


def test_what_buys_every_epoch_in_a_finer_codec_is_spent_on_it() -> None:
    assert spent(3 * 40 * 900, epochs=3)[0] == [told((4, "int8+zstd"))] * 3
    assert spent(3 * 40 * 4096, epochs=3)[0] == [told((4, "fp32"))] * 3
    assert spent(10**12, epochs=3)[0] == [told((4, "fp32"))] * 3


def test_what_an_epoch_leaves_buys_a_finer_codec_in_the_next() -> None:
    """Of 2.8 epochs in int4+zstd the first takes one, and int8+zstd takes 1.8."""
    epochs, _ = spent(int(2.8 * EPOCH), epochs=2)
    assert epochs == [told((4, "int4+zstd")), told((4, "int8+zstd"))]


def test_what_does_not_buy_the_last_epoch_buys_the_coarsest_or_one_batch_in_so_many() -> None:
    assert spent(40 * 250, epochs=3)[0][-1] == told((4, "int2+zstd"))
    epochs, _ = spent(40 * 250 - 1, epochs=3)  # one in two
    assert epochs[-1] == " ".join(["int2+zstd", SKIPPED] * 2)
    assert epochs[:2] == [told((4, SKIPPED))] * 2
    assert spent(2500, epochs=1)[0][-1] == told((1, "int2+zstd"), (3, SKIPPED))  # one in four
    assert spent(2499, epochs=1)[0][-1] == told((4, SKIPPED)), "not even one"
    assert spent(0, epochs=1)[0][-1] == told((4, SKIPPED))


def test_batches_that_turn_out_larger_do_not_break_the_budget() -> None:
    real = {name: 1.5 * size for name, size in BYTES.items()}
    epochs, thrifty = spent(2 * EPOCH, epochs=3, real=real)
    assert thrifty.spent <= 2 * EPOCH
    assert epochs[1] == told((4, "int4+zstd")), "it was thought to do"
    assert epochs[2] == told((4, "int2+zstd")) or SKIPPED in epochs[2]


def test_the_server_is_told_where_sending_began() -> None:
    thrifty = Thrifty(Fixed(), 2 * EPOCH, 4, lambda _: None)
    assert [thrifty.begin(epoch, 40) for epoch in range(4)] == [0, 1, 2, 2]


def test_batches_are_weighed_once_an_epoch_and_counted_by_codec() -> None:
    weights: Any = Fixed()
    thrifty, segment = Thrifty(weights, 2 * EPOCH, 3, lambda _: None), Segment()
    for epoch in range(3):
        thrifty.begin(epoch, 40)
        wire = thrifty.over(segment)  # type: ignore[arg-type]
        for _ in range(4):
            wire(batch())
    assert weights.weighed == 3
    assert thrifty.counts == {SKIPPED: 4, "int4+zstd": 8}


@settings(deadline=None)
@given(
    st.integers(0, 400_000),
    st.integers(1, 6),
    st.integers(1, 9),
    st.floats(0.5, 2.0),
)
def test_whatever_batches_weigh_the_budget_holds_and_it_repeats(
    budget: int, epochs: int, batches: int, off: float
) -> None:
    real = {name: off * size for name, size in BYTES.items()}
    first, thrifty = spent(budget, epochs, batches, real)
    assert thrifty.spent <= budget
    assert thrifty.counts.total() == epochs * batches
    assert spent(budget, epochs, batches, real)[0] == first
    sends = [set(epoch.split()) != {SKIPPED} for epoch in first]
    usual = 10 * batches * BYTES["int4+zstd"]
    before = max(0, epochs - max(1, int(budget // usual)))
    assert not any(sends[:before])
    if off <= 1 and budget >= usual:
        assert all(sends[before:])


# ---------------------------------------------------------------- weights


def test_a_sample_weighs_at_most_what_its_codec_says_until_it_is_weighed() -> None:
    weights = Weights(Travel.of([], 0, chooses=True), 0, (16, 8, 8))
    first = {name: weights[name] for name in LADDER}
    assert first["fp32"] == 4096
    assert first["fp16"] == 2048
    assert list(first.values()) == sorted(first.values(), reverse=True)
    z = torch.randn(32, 16, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    weights.weigh(Smashed(z, torch.zeros(32, dtype=torch.int64)))
    assert (weights["fp32"], weights["fp16"]) == (4096, 2048)
    assert all(weights[name] < first[name] for name in LADDER[2:])


# ---------------------------------------------------------------- a link


class Road:
    """An Adaptive, and a clock and a link that do as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, first_epoch: int = 0) -> None:
        self.now, self.flow, self.segment, self.told = 0.0, Flow(), Segment(), list[str]()
        self.weights: Any = Fixed()
        if monkeypatch:
            monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.adaptive = Adaptive(self.weights, self.flow, self.told.append, first_epoch)
        self.begin()

    def begin(self) -> None:
        self.adaptive.begin(0, 100)
        segment: Any = self.segment
        self.wire = self.adaptive.over(segment)

    def batch(self, taken: int, sending: float = 0.0, full: bool = False, seconds: float = 1.0) -> None:
        """A batch of 10 samples, after a second in which the link took so much. Of one that is full the
        link is what it waits for."""
        self.now += seconds
        self.flow.bytes += taken
        self.flow.seconds += sending or seconds * full
        self.segment.full = full
        self.wire(batch())

    def window(self, taken: int = 80_000, sending: float = 0.0, full: bool = False) -> str:
        for _ in range(8):
            self.batch(taken // 8, sending / 8, full)
        return self.adaptive.choice

    def quiet(self, most: int = 200) -> int:
        """Windows without trouble until something changes."""
        before = self.adaptive.choice
        for count in range(1, most):
            if self.window() != before:
                return count
        return 0


@pytest.fixture
def road(monkeypatch: pytest.MonkeyPatch) -> Road:
    return Road(monkeypatch)


def climbed(road: Road, to: str) -> Road:
    while road.adaptive.choice != to:
        road.quiet()
    return road


def test_where_the_outbox_is_full_a_batch_is_skipped(road: Road) -> None:
    for full in (False, True, True, False):
        road.batch(1000, full=full)
    assert road.segment.done == ["int4+zstd", SKIPPED, SKIPPED, "int4+zstd"]
    assert road.adaptive.counts == {"int4+zstd": 2, SKIPPED: 2}


def test_a_link_that_is_fast_enough_is_tried_finer_window_by_window(road: Road) -> None:
    assert [road.window() for _ in range(5)] == ["int8+zstd", "fp16", "fp32", "fp32", "fp32"]
    assert road.weights.weighed == 0
    assert len(road.told) == 3


@pytest.mark.parametrize("how", [{"full": True}, {"sending": 8.0}])
@pytest.mark.parametrize(
    ("taken", "choice"),
    [
        (1_000_000, "fp32"),  # a burst: what goes through is enough for it
        (409_600, "fp32"),  # 80 samples of 4096 bytes are four fifths of it
        (409_592, "fp16"),
        (90_000, "int8+zstd"),
        (89_992, "int4+zstd"),
        (50_000, "int4+zstd"),
        (49_992, "int2+zstd"),
        (80, "int2+zstd"),
    ],
)
def test_a_link_that_is_too_slow_gets_the_finest_that_asks_for_four_fifths_of_its_rate(
    how: dict[str, Any], taken: int, choice: str, road: Road
) -> None:
    assert climbed(road, "fp32").window(taken, **how) == choice
    assert road.weights.weighed == 1


def test_a_link_that_is_nearly_busy_is_fast_enough(road: Road) -> None:
    assert road.window(sending=7.1) == "int8+zstd"


def test_a_link_that_is_too_slow_never_gets_a_finer_one(road: Road) -> None:
    assert road.window(10**9, full=True) == "int4+zstd"


def test_the_window_after_a_step_down_has_what_came_before_it_and_is_no_sign(road: Road) -> None:
    climbed(road, "fp16")
    assert road.window(90_000, full=True) == "int8+zstd"
    assert road.window(80, full=True) == "int8+zstd"
    assert road.window(80, full=True) == "int2+zstd"


def test_each_failure_doubles_the_hold_before_that_codec_is_tried_again(road: Road) -> None:
    climbed(road, "fp16")
    holds = []
    for _ in range(8):
        assert road.window(90_000, full=True) == "int8+zstd"
        road.window()  # what was on its way
        holds.append(road.quiet())
        assert road.adaptive.choice == "fp16"
    assert holds == [2, 4, 8, 16, 32, 64, 64, 64]


def test_a_codec_that_lasts_as_long_as_its_hold_has_its_hold_halved(road: Road) -> None:
    def fails(taken: int, to: str) -> int:
        assert road.window(taken, full=True) == to
        road.window()
        return road.quiet()

    climbed(road, "fp16")
    assert [fails(90_000, "int8+zstd") for _ in range(3)] == [2, 4, 8]
    climbed(road, "fp32")
    assert [fails(210_000, "fp16") for _ in range(3)] == [2, 4, 8]  # fp16 lasts for 8
    assert road.window(210_000, full=True) == "fp16"
    road.window()
    assert fails(90_000, "int8+zstd") == 8, "4, doubled"


def test_it_never_leaves_the_ladder(road: Road) -> None:
    assert [road.window(80, full=True) for _ in range(300)][-1] == LADDER[-1]
    climbed(road, LADDER[0])
    assert road.quiet() == 0


def test_a_link_that_has_become_fast_is_found_out(road: Road) -> None:
    for _ in range(300):
        road.window(80, full=True)
    windows = 0
    while road.adaptive.choice != "fp32":
        road.window()
        windows += 1
    assert windows < 80


@pytest.mark.parametrize("batches", [1, 3, 7, 8, 13])
def test_windows_go_on_from_epoch_to_epoch_and_what_lies_between_is_not_counted(
    batches: int, road: Road
) -> None:
    """Forty seconds of scoring at each epoch's end; in epochs 1000 bytes go through in a second."""
    for _ in range(200 // batches):
        for _ in range(batches):
            road.batch(1000, full=True)
        road.now += 40.0
        road.flow.bytes += 10**9
        road.begin()
    assert road.adaptive.choice == "int2+zstd"
    assert road.told == ["link: 0.00 MB/s go through; batches go as int2+zstd"]


def test_a_window_lasts_until_something_has_gone_through(road: Road) -> None:
    climbed(road, "fp32")
    for _ in range(80):
        road.batch(0, full=True)
    assert road.adaptive.choice == "fp32"
    road.batch(1_000_000, full=True)  # in 81 seconds: 810 samples of 900 bytes
    assert road.adaptive.choice == "int8+zstd"


def test_it_says_the_epoch_in_which_the_run_has_it_begin() -> None:
    run = small_run(epochs=4, link="auto", send_last_epochs=2)
    made = pace_of(run, build_method(run), Fixed(), Flow(), lambda _: None)
    assert made is not None
    assert (made.begin(2, 10), made.begin(3, 10)) == (2, 2)


STEP = st.tuples(
    st.booleans(),  # whether the outbox is full
    st.integers(0, 10**7),
    st.floats(0, 5),
    st.floats(0, 10),
    st.booleans(),  # whether an epoch begins
)


@settings(deadline=None, max_examples=50)
@given(st.lists(STEP, max_size=120))
def test_whatever_the_link_does_each_batch_is_sent_as_one_of_the_ladder_or_skipped(
    steps: Sequence[tuple[bool, int, float, float, bool]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        road = Road(patch)
        for full, taken, sending, seconds, begins in steps:
            if begins:
                road.begin()
            choice = road.adaptive.choice
            road.batch(taken, sending, full, seconds)
            assert road.segment.done[-1] == (SKIPPED if full else choice)
            assert road.adaptive.choice in LADDER
        assert road.adaptive.counts.total() == len(steps) == len(road.segment.done)


# A link that takes so many bytes a second, of an outbox of two; 50 batches of 10 samples a second.
@pytest.mark.parametrize(
    ("rate", "best"),
    [(10e6, "fp32"), (1.5e6, "fp16"), (0.6e6, "int8+zstd"), (0.33e6, "int4+zstd"), (0.16e6, "int2+zstd")],
)
def test_a_steady_link_gets_what_it_holds_nearly_all_the_time(
    rate: float, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Road(monkeypatch)
    outbox, left, ended = list[float](), 0.0, 0.0  # bytes, of the one that is sent, when the last had gone

    def drain(until: float) -> None:
        nonlocal left, ended
        while left or outbox:
            if not left:
                left, ended = outbox.pop(0), max(ended, until - 0.02)
            size, done = left, ended + left / rate
            if done > until:
                return
            road.flow.bytes += int(size)
            road.flow.seconds += done - ended
            left, ended = 0.0, done

    for _ in range(3000):
        drain(road.now + 0.02)
        before = len(road.segment.done)
        road.batch(0, full=len(outbox) >= 2, seconds=0.02)
        if road.segment.done[before] != SKIPPED:
            outbox.append(10 * BYTES[road.segment.done[before]])
    late = road.segment.done[1000:]
    assert late.count(best) > 0.85 * len(late)
    assert late.count(SKIPPED) < 0.05 * len(late)
