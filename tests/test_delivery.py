"""Batches to a server that goes and comes back: each arrives, in its order, whatever calls it takes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import ClosedError, RefusedError, SplitLearningError
from common.meter import Clock
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece
from dsl_client.delivery import Delivery
from dsl_client.spool import Spool
from dsl_client.stream import Call, Flow
from tests.frames import BYTES, SAMPLES, frame, stretch_of
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

OVER = ClosedError("the run is over because the test says so")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class FakeCall:
    """A call as gRPC has it: its requests are pulled by a thread of its own."""

    def __init__(self, line: "FakeLine", requests: Iterator[Piece[Any]], generation: int) -> None:
        self._line, self._requests, self._generation = line, requests, generation
        self._code: grpc.StatusCode | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        in_thread(self._pull)

    def _pull(self) -> None:
        code = grpc.StatusCode.OK
        for piece in self._requests:
            if not self._line.takes(piece, self._generation):
                code = UNAVAILABLE
                break
        if code is grpc.StatusCode.OK:
            self._line.receipts.wait(30)
        self.end(code if self._generation == self._line.generation else UNAVAILABLE)

    def end(self, code: grpc.StatusCode) -> None:
        with self._lock:
            if self._code is not None:
                return
            self._code = code
        for callback in self._callbacks:
            callback()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._code is None:
                self._callbacks.append(callback)
                return True
        return False

    def cancel(self) -> None:
        self.end(grpc.StatusCode.CANCELLED)

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str:
        return "the test cut it off"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class FakeLine:
    """A server that takes each number once, and is cut off when the test says so."""

    def __init__(self, received: int = 0) -> None:
        self.generation, self.received, self.duplicates = 1, received, 0
        self.calls: list[FakeCall] = []
        self.openings: list[pb.Segment] = []
        self.came: list[int] = []  # the numbers of all that came
        self.cut_after: list[int] = []  # messages from one cut to the next
        self.forgets = 0  # batches that the server forgets when it is cut off
        self.back = threading.Event()  # while it is not set the server is away
        self.back.set()
        self.receipts = threading.Event()
        self.receipts.set()
        self.refusal: SplitLearningError | None = None
        self.reading = threading.Event()
        self.reading.set()
        self.delivery: Delivery | None = None  # that it is to tell of a new membership

    @property
    def session(self) -> str:
        return f"session {self.generation}"

    def start_segment(self) -> Call:
        generation = self.generation

        def start(requests: Iterator[Piece[Any]]) -> FakeCall:
            self.calls.append(FakeCall(self, requests, generation))
            return self.calls[-1]

        return start

    def takes(self, piece: Piece[Any], generation: int) -> bool:
        assert self.reading.wait(30)
        if generation != self.generation:
            return False
        if self.cut_after:
            self.cut_after[0] -= 1
            if self.cut_after[0] < 0:
                del self.cut_after[0]
                return False
        head = piece.head
        kind = head.WhichOneof("head")
        if kind == "segment":
            assert head.segment.session == self.session
            self.openings.append(head.segment)
            return True
        number = getattr(head, kind).sequence
        self.came.append(number)
        if number > self.received + 1:
            return False
        if number <= self.received:
            self.duplicates += 1
        self.received = max(self.received, number)
        return True

    def come_back(self, error: SplitLearningError, generation: int) -> int:
        assert self.back.wait(30)
        if self.refusal:
            raise self.refusal
        if generation == self.generation:
            self.generation += 1
            self.received -= min(self.forgets, self.received)
            self.forgets = 0
            assert self.delivery
            self.delivery.resume(self.received)
        return self.received


class Bench:
    def __init__(self, line: FakeLine, spool: Spool | None = None, depth: int = 2) -> None:
        self.line, self.spool, self.flow = line, spool or Spool(10**6), Flow()
        self.delivery = Delivery(line, self.spool, depth, Clock(), self.flow, line.received)
        line.delivery = self.delivery

    def put_epoch(self, epoch: int, skips: bool = False) -> None:
        """Three batches, the second perhaps skipped."""
        stretch = stretch_of(epoch)
        stream = self.delivery.stream(stretch)
        first = stretch.first_sequence
        for numbers in [[first], [first + 1, first + 2]] if skips else [[first], [first + 1], [first + 2]]:
            stream.put(frame(*numbers))
        stream.finish()


@pytest.fixture
def made() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(*arguments: Any, **settings: Any) -> Bench:
        benches.append(Bench(*arguments, **settings))
        return benches[-1]

    yield make
    for bench in benches:
        for event in (bench.line.back, bench.line.receipts, bench.line.reading):
            event.set()
        bench.delivery.close(OVER)


def test_each_stretch_goes_by_a_call_of_its_own_and_settles_with_its_receipt(made: Any) -> None:
    bench = made(FakeLine())
    bench.line.receipts.clear()
    bench.put_epoch(0)
    bench.put_epoch(1)
    settling = in_thread(bench.delivery.settle)
    wait_for(lambda: bench.line.received == 6)
    assert waits(settling), "the receipts have not come"
    bench.line.receipts.set()
    assert settling.result(timeout=5) is None
    assert bench.line.came == [1, 2, 3, 4, 5, 6]
    assert [(o.first_sequence, o.batches, o.samples, o.place) for o in bench.line.openings] == [
        (1, 3, 3 * SAMPLES, 0),
        (4, 3, 3 * SAMPLES, 0),
    ]
    assert bench.flow.waiting == 0
    assert bench.flow.bytes == 6 * BYTES


def test_what_is_skipped_travels_with_the_next_batch(made: Any) -> None:
    bench = made(FakeLine())
    bench.put_epoch(0, skips=True)
    bench.delivery.settle()
    assert bench.line.came == [1, 2, 3]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("cut", range(8))
def test_wherever_a_call_is_cut_off_the_rest_goes_by_another_from_where_the_server_is(
    cut: int, skips: bool, made: Any
) -> None:
    line = FakeLine()
    line.cut_after = [cut]
    bench = made(line)
    for epoch in range(2):
        bench.put_epoch(epoch, skips)
    bench.delivery.settle()
    assert line.received == 6
    assert sorted(set(line.came)) == [1, 2, 3, 4, 5, 6]
    for opening in line.openings:
        rest = opening.batches * SAMPLES
        assert opening.samples == rest
        assert (opening.first_sequence + opening.batches - 1) % 3 == 0, "to the end of its epoch"
        assert opening.place == (opening.first_sequence - 1) % 3
    assert bench.flow.waiting == 0


@pytest.mark.parametrize("forgets", [1, 3, 6])
def test_what_the_server_has_forgotten_is_sent_once_more(forgets: int, made: Any) -> None:
    bench = made(FakeLine())
    for epoch in range(2):
        bench.put_epoch(epoch)
    bench.delivery.settle()
    bench.line.forgets = forgets
    bench.line.cut_after = [2]
    bench.put_epoch(2)
    bench.delivery.settle()
    assert bench.line.came == [*range(1, 8), *range(8 - forgets, 10)]
    assert bench.line.received == 9
    assert bench.flow.waiting == 0


def test_many_failures_one_after_the_other_are_mended(made: Any) -> None:
    line = FakeLine()
    line.cut_after = [0, 1, 2, 0, 1, 3, 1, 2]
    line.forgets = 1
    bench = made(line)
    for epoch in range(4):
        bench.put_epoch(epoch)
    bench.delivery.settle()
    assert line.received == 12
    assert line.generation == 9


def test_a_client_goes_on_while_the_server_is_away_until_the_spool_is_full(made: Any) -> None:
    line = FakeLine()
    line.back.clear()
    line.cut_after = [0]
    bench = made(line, Spool(6 * (BYTES + 100)), depth=1)
    computing = in_thread(lambda: [bench.put_epoch(epoch) for epoch in range(4)])
    wait_for(lambda: bench.spool.last == 6)
    assert waits(computing), "there is no room for more"
    line.back.set()
    wait_for(lambda: line.received == 6)
    assert waits(computing), "what was sent may be forgotten yet"
    bench.spool.trim(6)
    computing.result(timeout=5)
    bench.delivery.settle()
    assert line.received == 12


def test_while_the_server_is_there_but_slow_no_more_waits_than_an_outbox_takes(made: Any) -> None:
    line = FakeLine()
    line.reading.clear()
    bench = made(line, depth=2)
    computing = in_thread(lambda: [bench.put_epoch(epoch) for epoch in range(4)])
    wait_for(lambda: bench.delivery.full)
    assert waits(computing)
    assert bench.spool.last <= 3
    line.reading.set()
    computing.result(timeout=5)
    bench.delivery.settle()
    assert line.received == 12
    assert not bench.delivery.full


def test_what_cannot_be_mended_ends_it_with_the_reason_for_everyone(made: Any) -> None:
    line = FakeLine()
    line.refusal = RefusedError("the run goes on without it")
    line.cut_after = [1]
    bench = made(line)
    bench.delivery.stream(stretch_of(0)).put(frame(1))
    for late in (bench.delivery.settle, lambda: bench.delivery.kept(99), lambda: bench.put_epoch(1)):
        assert in_thread(late).exception(timeout=5) is line.refusal


def test_closing_wakes_everyone_and_cancels_the_calls(made: Any) -> None:
    line = FakeLine()
    line.reading.clear()
    bench = made(line, depth=1)
    computing = in_thread(lambda: [bench.put_epoch(epoch) for epoch in range(4)])
    settling = in_thread(bench.delivery.settle)
    keeping = in_thread(bench.delivery.kept, 99)
    wait_for(lambda: bool(line.calls))
    assert all(waits(each, 0.02) for each in (computing, settling, keeping))
    bench.delivery.close(OVER)
    assert [each.exception(timeout=5) for each in (computing, settling, keeping)] == [OVER] * 3
    wait_for(lambda: all(call.code() is grpc.StatusCode.CANCELLED for call in line.calls))


def test_who_waits_until_batches_are_kept_does_not_wait_for_the_server(made: Any) -> None:
    line = FakeLine()
    line.back.clear()
    line.cut_after = [0]
    bench = made(line, depth=5)
    bench.put_epoch(0)
    bench.delivery.kept(3)
    assert bench.spool.last == 3
    assert line.received == 0


def test_the_next_process_sends_what_the_one_before_kept_and_makes_it_no_second_time(
    made: Any, tmp_path: Path
) -> None:
    spool = Spool(10**6, tmp_path)
    for number in (1, 2, 3, 4):
        spool.append(stretch_of((number - 1) // 3), frame(number))
    line = FakeLine(received=1)
    bench = made(line, Spool(10**6, tmp_path))
    bench.put_epoch(1)  # it begins again where its state was: before batch 4
    bench.delivery.settle()
    assert line.came == [2, 3, 4, 5, 6]
    assert bench.flow.waiting == 0
    assert [(o.first_sequence, o.place, o.samples) for o in line.openings] == [
        (2, 1, 2 * SAMPLES),
        (4, 0, 3 * SAMPLES),
    ]


@pytest.mark.parametrize("damage", ["cut off", "removed"])
def test_a_batch_that_was_kept_and_is_damaged_ends_it(damage: str, made: Any, tmp_path: Path) -> None:
    spool = Spool(10**6, tmp_path)
    spool.append(stretch_of(0), frame(1))
    bench_spool = Spool(10**6, tmp_path)
    file = tmp_path / f"{1:012}"
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    bench = made(FakeLine(), bench_spool)
    bench.delivery.stream(stretch_of(0))
    assert isinstance(in_thread(bench.delivery.settle).exception(timeout=5), SplitLearningError)
    assert bench.line.came == []
