"""What is measured by wrapping: seconds by a clock that is set by hand, bytes by numbers worked by hand."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common import meter
from common.meter import DOWN, UP, Clock, Traffic, peak_bytes
from common.methods.base import Smashed
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece
from common.wire.rpc import Malformed
from tests.threads import in_thread


class Hand:
    """A clock's hand that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: hand.now))
    return hand


# ---------------------------------------------------------------- seconds


def test_a_phase_is_as_long_as_what_is_done_in_it(hand: Hand) -> None:
    clock = Clock()
    with clock("forward"):
        hand.passes(1.5)
    hand.passes(10)
    with clock("forward"), clock("wait"):
        hand.passes(0.25)
    assert clock.seconds("wait", "forward", "never") == {"wait": 0.25, "forward": 1.75, "never": 0.0}
    assert list(clock.seconds("wait", "forward")) == ["wait", "forward"], "in the order asked for"


def test_a_phase_that_fails_counts_too(hand: Hand) -> None:
    def fails() -> None:
        hand.passes(2)
        raise ValueError("no")

    clock = Clock()
    with pytest.raises(ValueError, match="no"):
        clock.function("step", fails)()
    assert clock.seconds("step") == {"step": 2.0}


def test_time_can_be_given_and_taken_back(hand: Hand) -> None:
    clock = Clock()
    clock.add("decode", 3.0)
    clock.add("decode", -1.0)
    assert clock.seconds("decode") == {"decode": 2.0}


def test_a_function_is_timed_and_otherwise_itself(hand: Hand) -> None:
    def double(number: int, *, plus: int = 0) -> int:
        hand.passes(0.5)
        return 2 * number + plus

    clock = Clock()
    timed = clock.function("encode", double)
    assert [timed(2), timed(3, plus=1)] == [4, 7]
    assert clock.seconds("encode") == {"encode": 1.0}


def test_of_an_iterator_only_the_waiting_is_timed(hand: Hand) -> None:
    def items() -> Iterator[str]:
        hand.passes(1)
        yield "a"
        hand.passes(2)
        yield "b"
        hand.passes(4)

    clock, got = Clock(), []
    for item in clock.iterator("idle", items()):
        got.append(item)
        hand.passes(100)  # the use of an item is not the wait for it
    assert got == ["a", "b"]
    assert clock.seconds("idle") == {"idle": 7.0}


def test_a_module_is_timed_in_training_only(hand: Hand) -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hand.passes(0.5)
            return 2 * x

    clock, module = Clock(), Slow()
    clock.module("forward", module)
    assert module(torch.ones(1)).item() == 2
    module.eval()(torch.ones(1))
    module.train()(torch.ones(1))
    assert clock.seconds("forward") == {"forward": 1.0}


def test_any_thread_may_add() -> None:
    clock = Clock()

    def add() -> None:
        for _ in range(2000):
            clock.add("step", 0.5)

    for thread in [in_thread(add) for _ in range(4)]:
        thread.result(timeout=20)
    assert clock.seconds("step") == {"step": 4000.0}


# ---------------------------------------------------------------- bytes

SPEC = BatchSpec((3, 5, 2), 8, 10)  # 120 bytes a sample, and a label


def written(
    traffic: Traffic, which: rpc.Rpc, kind: Any, direction: Any, messages: Any, pieces: bool = True
) -> int:
    """Writes the messages; how many bytes they were."""
    write = traffic.writing(which, direction, rpc.writer(kind, pieces))
    return sum(len(write(message)) for message in messages)


def batch(samples: int) -> Smashed:
    return Smashed(torch.randn(samples, 3, 5, 2), torch.zeros(samples, dtype=torch.int64))


def counted(traffic: Traffic) -> dict[str, int]:
    """The kinds that are not 0, as up/activations for example."""
    by_kind = traffic.by_kind()
    return {f"{d}/{kind}": n for d, kinds in by_kind.items() for kind, n in kinds.items() if n}


@pytest.mark.parametrize("piece_bytes", [50, 120, 240, 1 << 20])
@pytest.mark.parametrize("which", [rpc.TRAIN, rpc.STREAM_ACTIVATIONS], ids=lambda which: which.name)
def test_a_batch_is_activations_labels_and_framing(
    which: rpc.Rpc, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    traffic = Traffic()
    total = 0
    for samples in (2, 1):
        frame = codec.pack_batch(which.request, 1, batch(samples), SPEC)
        total += written(traffic, which, which.request, "up", frame)
    assert counted(traffic) == {"up/activations": 360, "up/labels": 3, "up/framing": total - 363}
    assert (traffic.total("up"), traffic.total("down")) == (total, 0)


@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
def test_a_batch_to_be_scored_is_evaluation(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    traffic = Traffic()
    frame = codec.pack_batch(pb.EvaluateRequest, 1, batch(3), SPEC)
    total = written(traffic, rpc.EVALUATE, pb.EvaluateRequest, "up", frame)
    assert counted(traffic) == {"up/evaluation": 363, "up/framing": total - 363}


@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
def test_a_gradient_is_gradients(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    traffic = Traffic()
    frame = codec.pack_gradient(pb.TrainResponse, 1, torch.randn(3, 3, 5, 2), SPEC, loss=0.5)
    total = written(traffic, rpc.TRAIN, pb.TrainResponse, "down", frame)
    assert counted(traffic) == {"down/gradients": 360, "down/framing": total - 360}


@pytest.mark.parametrize("piece_bytes", [10, 1 << 20])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_part_is_weights(direction: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    traffic, kind = Traffic(), pb.SyncWeightsRequest if direction == "up" else pb.SyncWeightsResponse
    frame = codec.pack_weights(kind, pb.Weights(), {"w": torch.randn(5), "n": torch.tensor(3)})
    total = written(traffic, rpc.SYNC_WEIGHTS, kind, direction, frame)
    assert counted(traffic) == {f"{direction}/weights": 28, f"{direction}/framing": total - 28}


def test_all_else_is_control() -> None:
    traffic = Traffic()
    welcome = pb.JoinResponse(welcome=pb.Welcome(run="x" * 100))
    down = written(traffic, rpc.JOIN, pb.JoinResponse, "down", [welcome], pieces=False)
    opening: Piece[Any] = Piece(pb.TrainRequest(segment=pb.Segment(session="s" * 32)))
    up = written(traffic, rpc.TRAIN, pb.TrainRequest, "up", [opening])
    assert counted(traffic) == {"up/control": up, "down/control": down}


def test_what_is_read_is_counted_as_what_is_written() -> None:
    ours, theirs = Traffic(), Traffic()
    write = ours.writing(rpc.TRAIN, "up", rpc.writer(pb.TrainRequest, True))
    read = theirs.reading(rpc.TRAIN, "up", rpc.reader(pb.TrainRequest, True))
    frame = list(codec.pack_batch(pb.TrainRequest, 1, batch(2), SPEC))
    for piece in [Piece(pb.TrainRequest(segment=pb.Segment(session="s"))), *frame]:
        assert read(write(piece)).head == piece.head
    assert ours.by_kind() == theirs.by_kind()


def test_what_cannot_be_read_is_counted_as_it_came() -> None:
    traffic = Traffic()
    read = traffic.reading(rpc.TRAIN, "up", rpc.reader(pb.TrainRequest, True))
    assert isinstance(read(b"\xff\xff\xff"), Malformed)
    assert counted(traffic) == {"up/control": 3}


def test_every_kind_is_told_even_if_nothing_of_it_came() -> None:
    assert Traffic().by_kind() == {"up": dict.fromkeys(UP, 0), "down": dict.fromkeys(DOWN, 0)}


HOSTILE = {
    "a terabyte": [2**20, 2**20],
    "more than memory": [2**62, 2**62, 2**62],
    "negative": [-(2**40)],
    "negative twice": [-(2**40), -2],
    "a thousand dimensions": [2**62] * 1000,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_head_that_lies_does_not_change_the_total(what: str) -> None:
    spec = pb.TensorSpec(dtype=pb.DTYPE_INT64, shape=HOSTILE[what])
    heads = {
        rpc.TRAIN: pb.TrainRequest(batch=pb.Batch(activations=spec, labels=spec)),
        rpc.EVALUATE: pb.EvaluateRequest(batch=pb.Batch(activations=spec, labels=spec)),
        rpc.SYNC_WEIGHTS: pb.SyncWeightsRequest(weights=pb.Weights(tensors=[pb.NamedTensorSpec(spec=spec)])),
    }
    for which, head in heads.items():
        traffic = Traffic()
        read = traffic.reading(which, "up", rpc.reader(which.request, True))
        raw = head.SerializeToString()
        read(raw)
        assert traffic.total("up") == len(raw)


def test_what_cannot_be_a_tensor_declares_no_bytes() -> None:
    """And is not worked out: numbers of a million digits would stop the server for minutes."""
    for shape in ([2**62] * 1000, [2**62, 2**62], [-1, 2], [1] * 1000):
        assert codec.declared_bytes(pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=shape)) < 2**63
    many = pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=[2**62] * 1000)
    assert codec.declared_bytes(many) == 0


def test_any_thread_may_count() -> None:
    traffic = Traffic()
    write = traffic.writing(rpc.LEAVE, "up", lambda _: b"12345")

    def count() -> None:
        for _ in range(2000):
            write(None)

    for thread in [in_thread(count) for _ in range(4)]:
        thread.result(timeout=20)
    assert traffic.total("up") == 4 * 2000 * 5


def test_the_peak_of_memory_is_at_least_what_torch_alone_takes() -> None:
    assert 50e6 < peak_bytes(torch.device("cpu")) < 1e12


# ---------------------------------------------------------------- bytes, where the client has the last layers

BARE = BatchSpec((3, 5, 2), 8, 10, labels=False, output_shape=(7,))


@pytest.mark.parametrize("piece_bytes", [10, 50, 120, 1 << 20])
def test_an_exchange_is_counted_by_kind_in_both_directions(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three samples: 120 bytes of activations and 28 of output each, and a gradient of either."""
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    ours, theirs = Traffic(), Traffic()
    z, u = torch.randn(3, 3, 5, 2), torch.randn(3, 7)
    up = [
        *codec.pack_batch(pb.TrainRequest, 1, Smashed(z, torch.zeros(0, dtype=torch.int64)), BARE),
        *codec.pack_gradient(pb.TrainRequest, 1, u, SPEC),
    ]
    down = [
        *codec.pack_output(pb.TrainResponse, 1, u, SPEC),
        *codec.pack_gradient(pb.TrainResponse, 1, z, SPEC),
    ]
    sizes = {}
    for direction, kind, frames in (("up", pb.TrainRequest, up), ("down", pb.TrainResponse, down)):
        write = ours.writing(rpc.TRAIN, direction, rpc.writer(kind, True))  # type: ignore[arg-type]
        read = theirs.reading(rpc.TRAIN, direction, rpc.reader(kind, True))  # type: ignore[arg-type]
        raw = [write(piece) for piece in frames]
        for message in raw:
            read(message)
        sizes[direction] = sum(map(len, raw))
    assert counted(ours) == {
        "up/activations": 360,
        "up/gradients": 84,
        "up/framing": sizes["up"] - 444,
        "down/activations": 84,
        "down/gradients": 360,
        "down/framing": sizes["down"] - 444,
    }
    assert ours.by_kind() == theirs.by_kind()
    for direction, kinds in ours.by_kind().items():
        assert sum(kinds.values()) == sizes[direction]


@pytest.mark.parametrize("piece_bytes", [10, 1 << 20])
def test_an_output_to_be_scored_is_evaluation(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PIECE_BYTES", piece_bytes)
    traffic = Traffic()
    frame = codec.pack_output(pb.EvaluateResponse, 1, torch.randn(3, 7), SPEC)
    total = written(traffic, rpc.EVALUATE, pb.EvaluateResponse, "down", frame)
    assert counted(traffic) == {"down/evaluation": 84, "down/framing": total - 84}
    score: Piece[Any] = Piece(pb.EvaluateResponse(score=pb.Score(samples=3)))
    control = written(traffic, rpc.EVALUATE, pb.EvaluateResponse, "down", [score])
    assert counted(traffic)["down/control"] == control
