"""C1: ten thousand messages that were valid once, and the fuzzer's corpus. Each gets a status of ours."""

import contextlib
import functools
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.methods import build_method
from common.nets.cut import build
from common.parts import averaged_state, client_part, state_of
from common.run import Run
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece
from common.wire.rpc import RPCS, Malformed, Rpc
from dsl_server import gate, rounds
from dsl_server.server import Server
from fuzz import wire
from tests.federation import CPU, Batches, connect, serving, small_run, spec_of, train
from tests.ordinary import DEADLINE_S, MANY, Ordinary, batch_message, member, refused, smashed

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
_spec_of = functools.cache(spec_of)
SOON_S = 10.0
KINDS: dict[str, Any] = {"dsl": pb.StreamActivationsRequest, "csl": pb.TrainRequest}
# What a wrong message may be told, and a right one. Not among them: INTERNAL and UNKNOWN, a fault of ours;
# DEADLINE_EXCEEDED, a call that hangs; UNAVAILABLE, a server that is gone.
TOLD = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.FAILED_PRECONDITION,
    Code.ABORTED,
    Code.OUT_OF_RANGE,
    Code.RESOURCE_EXHAUSTED,
    Code.DATA_LOSS,
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that will never come are not waited for."""
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.005)


# ---------------------------------------------------------------- no message at all

MALFORMED = (
    b"\xff",  # a number cut off
    b"\xa2\x06\x05ab",  # five bytes announced, two there
    b"\x7a\xff\xff\xff\xff\x0f",  # more bytes announced than there are on earth
    b"\x0b\x01",  # a group that does not end
    b"\x0e\x01",  # a wire type that does not exist
    b"\x00\x00",  # field 0
    b"\xff" * 11,  # a number without end
    random.Random(0).randbytes(3000),
)
STREAMS = [which for which in RPCS if which.requests_stream]


def site(which: Rpc, folder: Path) -> contextlib.AbstractContextManager[Server]:
    """A server that takes this RPC."""
    return serving(small_run(method="csl" if which is rpc.TRAIN else "dsl", epochs=MANY), folder)


@pytest.mark.parametrize("which", RPCS, ids=lambda which: which.name)
def test_c1_malformed_bytes_are_an_invalid_argument(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        for raw in MALFORMED:
            with refused(Code.INVALID_ARGUMENT):
                client.raw(which, [raw])
        assert server.record.samples_trained == 0
        client.send([smashed(server.run)])


@pytest.mark.parametrize("which", STREAMS, ids=lambda which: which.name)
def test_c1_malformed_bytes_in_the_midst_of_a_stream_are_too(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        declared = pb.NamedTensorSpec(name="w", spec=pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=[1]))
        first: Any = client.opening(KINDS[server.run.method], [smashed(server.run)])
        if which is rpc.EVALUATE:
            first = pb.EvaluateRequest(evaluation=pb.Evaluation(session=client.session))
        elif which is rpc.SYNC_WEIGHTS:
            first = pb.SyncWeightsRequest(weights=pb.Weights(session=client.session, tensors=[declared]))
        for raw in MALFORMED:
            with refused(Code.INVALID_ARGUMENT):
                client.raw(which, [first.SerializeToString(), raw])
        assert server.record.samples_trained == 0
        client.send([smashed(server.run)])


@pytest.mark.parametrize("which", STREAMS, ids=lambda which: which.name)
def test_c1_a_stream_of_nothing_is_an_invalid_argument(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT, "ended before its first message"):
            client.raw(which, [])
        client.send([smashed(server.run)])


# ---------------------------------------------------------------- ten thousand that were valid once


@dataclass
class Frames:
    """The messages of a valid call, each cut in two: what it says, and its data.

    What they say is damaged in every way. Data is cut, doubled or left out; its values stay, since any finite
    ones are valid, and what absurd ones do to a run is another matter.
    """

    dice: random.Random
    whole: Sequence[tuple[bytes, bytes]]

    @classmethod
    def of(cls, dice: random.Random, messages: Sequence[Any]) -> "Frames":
        whole = []
        for message in messages:
            head = type(message)()
            head.CopyFrom(message)
            if "data" in message.DESCRIPTOR.fields_by_name:
                head.ClearField("data")
            said = head.SerializeToString()
            whole.append((said, message.SerializeToString()[len(said) :]))
        return cls(dice, whole)

    def damaged(self) -> list[bytes]:
        stream = list(self.whole)
        for _ in range(self.dice.choice((1, 1, 2))):
            at = self.dice.randrange(len(stream)) if stream else 0
            match self.dice.randrange(16) if stream else 0:
                case 0:
                    stream.insert(at, (self.dice.randbytes(self.dice.randrange(60)), b""))
                case 1:
                    del stream[at]
                case 2:
                    stream.insert(at, self.dice.choice(self.whole))
                case 3:
                    self.dice.shuffle(stream)
                case 4:
                    stream[at] = (stream[at][0], self._data(stream[at][1]))
                case _:
                    stream[at] = (self._said(stream[at][0]), stream[at][1])
        return [said + data for said, data in stream]

    def _data(self, data: bytes) -> bytes:
        ways = (b"", data + data, data[: self.dice.randrange(len(data) + 1)], data + b"\0", b"\x7a\x00")
        return self.dice.choice(ways)

    def _said(self, said: bytes) -> bytes:
        raw, dice = bytearray(said), self.dice
        at = dice.randrange(len(raw) + 1)
        match dice.randrange(9):
            case 0 | 1 if raw:  # bits
                for _ in range(dice.randint(1, 3)):
                    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            case 2 if raw:  # bytes
                for _ in range(dice.randint(1, 3)):
                    raw[dice.randrange(len(raw))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            case 3 if raw:  # a length, or a number, one more or less
                raw[at - 1] = (raw[at - 1] + dice.choice((-1, 1))) % 256
            case 4:  # cut off
                del raw[at:]
            case 5:  # spliced with another
                other = dice.choice(self.whole)[0]
                raw[at:] = other[dice.randrange(len(other) + 1) :]
            case 6:  # a field, or half of one, twice
                end = dice.randrange(at, len(raw) + 1)
                raw[at:at] = bytes(raw[at:end] or raw)
            case 7:  # the whole of it twice: the fields are merged
                raw += bytes(raw)
            case _:
                raw[at:at] = dice.randbytes(dice.randint(1, 12))
        return bytes(raw)


@dataclass
class Thrower:
    """Throws damaged calls at a server, and notes what each was told."""

    server: Server
    client: Ordinary
    dice: random.Random
    seen: Counter[grpc.StatusCode] = field(default_factory=Counter)
    thrown: int = 0

    @property
    def received(self) -> int:
        """Batches of this client that the server has taken."""
        return self.server.rounds.members()[0].received.sequence

    def throw(self, which: Rpc, messages: Sequence[Any]) -> grpc.StatusCode:
        stream = Frames.of(self.dice, messages).damaged()
        code, details = self._answer(which, stream)
        self.seen[code] += 1
        self.thrown += 1
        assert code in TOLD, (which.name, code, details, stream)
        if stream and _malformed(which, stream):
            assert code is Code.INVALID_ARGUMENT, (which.name, code, stream)
        return code

    def _answer(self, which: Rpc, stream: Sequence[bytes]) -> tuple[grpc.StatusCode, str]:
        try:
            if which is rpc.JOIN:
                join: Any = self.client.channel.unary_stream(which.path)
                call = join(b"".join(stream), timeout=DEADLINE_S)
                next(call)
                call.cancel()
            else:
                self.client.raw(which, stream)
            return Code.OK, ""
        except grpc.RpcError as error:
            return error.code(), error.details() or ""


@pytest.fixture(autouse=True)
def _no_refusal_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "HELD_S", 0.0)


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_collector() -> Iterator[None]:
    """A call that a circle of references holds stays open for the connection, and of these it has few."""
    gc.disable()
    yield
    gc.enable()


def _malformed(which: Rpc, stream: Sequence[bytes]) -> bool:
    """Whether the first message, by which the server has to begin, is none."""
    read = rpc.reader(which.request, which.requests_in_pieces)
    return isinstance(read(stream[0] if which.requests_stream else b"".join(stream)), Malformed)


def segment(client: Ordinary, received: int, choice: str = "") -> list[Any]:
    """Two valid batches that are due, in several messages."""
    kind = pb.StreamActivationsRequest if build_method(client.run).one_way else pb.TrainRequest
    client.sequence = received
    batches = [smashed(client.run, 2), smashed(client.run, 1)]
    messages = [client.opening(kind, batches)]
    for number, batch in enumerate(batches, received + 1):
        pieces = codec.pack_batch(kind, number, batch, _spec_of(client.run), 0, choice)
        messages += cut_in_two(kind, pieces)
    return messages


def cut_in_two(kind: type[Any], pieces: Iterator[Piece[Any]]) -> list[Any]:
    """A frame of one piece as two messages, cut where a value ends."""
    (piece,) = pieces
    (name,) = (field.name for field, _ in piece.head.ListFields())
    data = b"".join(piece.chunks)
    half = len(data) // 8 * 4
    return [kind(**{name: getattr(piece.head, name)}, data=data[:half]), kind(data=data[half:])]


def evaluation(client: Ordinary, received: int) -> list[Any]:
    opening = pb.Evaluation(session=client.session, after_sequence=received)
    frames = [batch_message(pb.EvaluateRequest, i, smashed(client.run, 2)) for i in (1, 2)]
    closing = pb.EvaluateRequest(client_score=pb.ClientScore(head_metric=3, train_loss=1.5))
    return [pb.EvaluateRequest(evaluation=opening), *frames, closing]


def weights(client: Ordinary, state: dict[str, Tensor], **head: Any) -> list[pb.SyncWeightsRequest]:
    pieces = codec.pack_weights(pb.SyncWeightsRequest, pb.Weights(session=client.session, **head), state)
    return [pb.SyncWeightsRequest(weights=p.head.weights, data=b"".join(p.chunks)) for p in pieces]


@contextlib.contextmanager
def thrower(run: Run, folder: Path) -> Iterator[Thrower]:
    """A server of two places: for who throws, and for a client of ours that then trains and leaves."""
    with serving(run, folder) as server, member(server, "thrower") as client:
        connection, index = connect(server, "sound")
        thrower = Thrower(server, client, random.Random(run.method + run.sync))
        yield thrower
        assert thrower.seen[Code.INVALID_ARGUMENT] > thrower.thrown / 4
        client.leave()
        data = Batches(server.run, 1, 20)
        train(replace(server.run, epochs=2), connection, index, data, data)
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] >= 2 * 20
        connection.close()


def test_c1_two_thousand_malformed_messages_of_a_one_way_run(tmp_path: Path) -> None:
    """Its clients choose their codecs, so there are heads of every sort, and marks of batches not sent."""
    with thrower(small_run(method="dsl", clients=2, link="auto", epochs=MANY), tmp_path) as at:
        ladder = ["", *_spec_of(at.server.run).travel.ladder]
        while at.thrown < 2000:
            messages = segment(at.client, at.received, at.dice.choice(ladder))
            if at.thrown % 4 == 0:
                skipped = pb.Skipped(sequence=at.received + 1, samples=2)
                messages[1:3] = [pb.StreamActivationsRequest(skipped=skipped)]
            at.throw(rpc.STREAM_ACTIVATIONS, messages)


def test_c1_fifteen_hundred_malformed_messages_of_a_run_with_answers(tmp_path: Path) -> None:
    run = small_run(method="csl", clients=2, codec=("activations=int8+zstd", "gradients=int8"), epochs=MANY)
    with thrower(run, tmp_path) as at:
        while at.thrown < 1500:
            at.throw(rpc.TRAIN, segment(at.client, at.received))


def test_c1_five_hundred_malformed_messages_of_a_run_through_tails(tmp_path: Path) -> None:
    run = small_run(method="ushape", method_arg=("learning=csl",), clients=2, epochs=MANY)
    with thrower(run, tmp_path) as at:
        while at.thrown < 500:
            messages = segment(at.client, at.received)
            for number, place in ((at.received + 2, 5), (at.received + 1, 3)):
                spec = pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=[2 if place == 3 else 1, 64, 2, 2])
                gradient = pb.Gradient(sequence=number, gradient=spec)
                data = bytes(4 * spec.shape[0] * 256)
                messages.insert(place, pb.TrainRequest(gradient=gradient, of_gradient=True, data=data))
            at.throw(rpc.TRAIN, messages)


def test_c1_fifteen_hundred_malformed_evaluations(tmp_path: Path) -> None:
    with thrower(small_run(method="dsl", clients=2, epochs=MANY), tmp_path) as at:
        while at.thrown < 1500:
            at.throw(rpc.EVALUATE, evaluation(at.client, at.received))


def test_c1_fifteen_hundred_malformed_parts_to_be_averaged(tmp_path: Path) -> None:
    """The other client has left, so a part that is valid is an average at once."""
    run = small_run(method="dsl", clients=2, quorum=1, sync="average", epochs=1000)
    part = client_part(run, build_method(run), build(run), CPU)
    state = averaged_state(part, build_method(run))
    with serving(run, tmp_path) as server, member(server, "thrower") as client:
        with member(server, "gone") as gone:
            gone.leave()  # its place is taken, and nobody waits for it
        at, made = Thrower(server, client, random.Random(5)), 0
        while at.thrown < 1500:
            head = {"epoch": made, "purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 5}
            made += at.throw(rpc.SYNC_WEIGHTS, weights(client, state, **head)) is Code.OK
        assert at.seen[Code.INVALID_ARGUMENT] > at.thrown / 4
        client.send([smashed(run)])
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 8


def test_c1_five_hundred_malformed_turns_of_a_relay(tmp_path: Path) -> None:
    run = small_run(method="dsl", clients=1, sync="relay", epochs=1000)
    state = state_of(client_part(run, build_method(run), build(run), CPU))
    with serving(run, tmp_path) as server, member(server, "thrower") as client:
        at, turn = Thrower(server, client, random.Random(6)), 0
        while at.thrown < 500:
            take = at.dice.random() < 0.5
            purpose = pb.SYNC_PURPOSE_TAKE_TURN if take else pb.SYNC_PURPOSE_END_TURN
            frames = weights(client, {} if take else state, epoch=turn, purpose=purpose)
            code = at.throw(rpc.SYNC_WEIGHTS, frames)
            turn += code is Code.OK and _ended(server, client, turn)
        assert at.seen[Code.INVALID_ARGUMENT] > at.thrown / 4
        client.send([smashed(run)])
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 8


def _ended(server: Server, client: Ordinary, turn: int) -> bool:
    """Whether that turn is over: then it cannot be taken."""
    take = weights(client, {}, epoch=turn, purpose=pb.SYNC_PURPOSE_TAKE_TURN)
    try:
        list(client.stub.SyncWeights(iter(take), timeout=DEADLINE_S))
    except grpc.RpcError:
        return True
    return False


@pytest.mark.parametrize("epoch", [1, 2, 1000, 2**32 - 1])
def test_c1_a_turn_that_cannot_come_before_the_caller_s_own_is_refused_at_once(
    epoch: int, tmp_path: Path
) -> None:
    """It would wait for itself."""
    run = small_run(method="dsl", clients=1, sync="relay")
    with serving(run, tmp_path) as server, member(server) as client:
        take = weights(client, {}, epoch=epoch, purpose=pb.SYNC_PURPOSE_TAKE_TURN)
        with refused(Code.INVALID_ARGUMENT, f"its turn of epoch {epoch}"):
            list(client.stub.SyncWeights(iter(take), timeout=DEADLINE_S))
        first = weights(client, {}, epoch=0, purpose=pb.SYNC_PURPOSE_TAKE_TURN)
        assert len(list(client.stub.SyncWeights(iter(first), timeout=DEADLINE_S))) == 1
        client.send([smashed(run)])


def test_c1_two_and_a_half_thousand_malformed_greetings_and_goodbyes(tmp_path: Path) -> None:
    """Those that are valid after all take places, and leave them; a quorum of one goes on."""
    run = small_run(method="dsl", clients=40, quorum=1)
    with serving(run, tmp_path) as server, member(server, "thrower") as client:
        connection, index = connect(server, "sound")
        at = Thrower(server, client, random.Random(7))
        leaving = [Ordinary(server, f"leaving-{number}") for number in range(20)]
        sessions = [each.session for each in leaving]
        while at.thrown < 2500:
            if at.thrown % 2:
                codecs: Any = pb.Codec.values()
                greeting = pb.JoinRequest(oldest_version=1, newest_version=1, name="eve", codecs=codecs)
                at.throw(rpc.JOIN, [greeting])
                continue
            measured = pb.Measurements(seconds={"forward": 1.5, "wait": 0.25}, peak_bytes=1 << 30)
            goodbye = pb.LeaveRequest(session=sessions[-1], measurements=measured)
            if at.throw(rpc.LEAVE, [goodbye]) is Code.OK and len(sessions) > 1:
                sessions.pop()
        assert at.seen[Code.INVALID_ARGUMENT] > at.thrown / 4
        for each in leaving:
            each.close()
        while len(server.rounds.members()) < run.clients:
            with member(server, "late") as late:
                late.leave()
        client.leave()
        data = Batches(run, 1, 20)
        train(server.run, connection, index, data, data)
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == run.epochs * 20
        connection.close()


# ---------------------------------------------------------------- heads of every sort, by hypothesis


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ordinary]:
    run = small_run(method="dsl")
    with serving(run, tmp_path_factory.mktemp("standing")) as server, member(server) as client:
        yield client
        assert server.record.samples_trained == 0
        client.send([smashed(run)])
        client.leave()
        assert server.wait(timeout=SOON_S)


def tensor_specs(right: Sequence[int]) -> st.SearchStrategy[pb.TensorSpec]:
    """Anything but what the run needs: this shape, of float32 or of bytes."""
    sides = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-1, 20))
    shapes = st.one_of(st.lists(sides, max_size=6), st.permutations(right))
    dtypes = st.one_of(st.integers(0, 9), st.integers(-(2**31), 2**31 - 1))
    wrong = st.tuples(dtypes, shapes).filter(lambda spec: list(spec[1]) != list(right))
    return wrong.map(lambda spec: pb.TensorSpec(dtype=spec[0], shape=spec[1]))  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    activations=tensor_specs((8, 16, 8, 8)),
    labels=tensor_specs((8,)),
    payload=st.lists(tensor_specs((8, 16)), max_size=3),
    sequence=st.integers(0, 2**64 - 1),
    right=st.sampled_from(("activations", "labels", "neither")),
    data=st.binary(max_size=100),
)
def test_c1_whatever_a_head_declares_it_is_refused_as_an_invalid_argument(
    activations: pb.TensorSpec,
    labels: pb.TensorSpec,
    payload: list[pb.TensorSpec],
    sequence: int,
    right: str,
    data: bytes,
    standing: Ordinary,
) -> None:
    opening, frame = standing.segment(pb.StreamActivationsRequest, [smashed(standing.run)])
    if right != "activations":
        frame.batch.activations.CopyFrom(activations)
    if right != "labels":
        frame.batch.labels.CopyFrom(labels)
    frame.batch.payload.extend(payload)
    frame.batch.sequence, frame.data = sequence, data
    with refused(Code.INVALID_ARGUMENT):
        standing.raw(rpc.STREAM_ACTIVATIONS, [opening.SerializeToString(), frame.SerializeToString()])


# ---------------------------------------------------------------- the fuzzer's corpus, without the fuzzer


def test_c1_the_corpus_has_a_valid_input_for_each_reader_and_others() -> None:
    found = {path.name: path.read_bytes() for path in wire.CORPUS.iterdir()}
    assert set(found) == {name for name, _ in wire.seeds()}, "write it anew: python -m fuzz.wire"
    for reader in wire.READERS:
        assert wire.read(found[reader.name]) is not None


@pytest.mark.parametrize("path", sorted(wire.CORPUS.iterdir()), ids=lambda path: path.name)
def test_c1_the_corpus_is_read_or_refused_and_so_is_what_comes_of_it(path: Path) -> None:
    dice, raw = random.Random(path.name), path.read_bytes()
    wire.only_wire_errors(raw)
    for _ in range(100):
        damaged = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        wire.only_wire_errors(bytes(damaged))
        wire.only_wire_errors(raw[: dice.randrange(len(raw))])


def test_c1_an_error_of_another_kind_would_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Callable[[], None]:
        raise ValueError("no error of ours")

    monkeypatch.setattr(wire, "decode", broken)
    with pytest.raises(ValueError, match="no error of ours"):
        wire.only_wire_errors(wire.packed(0, [b"\x08\x01"]))
