"""A real server on loopback, spoken to with the generated classes and with bytes of every sort.

Each of our status codes means one thing; INTERNAL and UNKNOWN would be a fault of ours, whatever
came in. `tests/ordinary.py` is the client here, so that what ours never sends can be sent.
"""

import copy
import dataclasses
import errno
import json
import math
import random
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import torch.nn.functional as F
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import Tensor

from common.errors import SplitLearningError
from common.methods import METHODS
from common.methods.base import Answer, Received, ServerPart, Smashed
from common.nets.cut import build
from common.parts import client_part, state_of
from common.run import Run
from common.rundir import RunFolder
from common.wire import codec
from common.wire import rpc as rpcs
from common.wire import split_learning_pb2 as pb
from common.wire.codec import Arrived
from common.wire.rpc import RPCS, SERVICE, Rpc
from dsl_server import rounds
from dsl_server.kernel import Sockets
from dsl_server.server import Server
from tests.federation import CPU, Batches, federation, serving, small_run
from tests.ordinary import DEADLINE_S, Ordinary, batch_message, member, refused, smashed
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
KINDS: dict[str, Any] = {"dsl": pb.StreamActivationsRequest, "csl": pb.TrainRequest}
SAMPLE_BYTES = 16 * 8 * 8 * 4  # one sample of small_run at the cut


@pytest.fixture
def dsl(tmp_path: Path) -> Iterator[Server]:
    with serving(small_run(method="dsl"), tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ordinary]:
    """A member of a DSL run, for what must leave no trace: one for all such tests."""
    run = small_run(method="dsl", clients=2)
    with serving(run, tmp_path_factory.mktemp("standing")) as server, member(server) as client:
        yield client


@pytest.fixture(params=["dsl", "csl"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with serving(small_run(method=request.param), tmp_path) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Ordinary]:
    with member(server) as client:
        yield client


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that will never come are not waited for."""
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.05)


def weights(server: Server) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(server.part).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def kind_of(client: Ordinary) -> Any:
    return KINDS[client.run.method]


def send(client: Ordinary, messages: Sequence[Any]) -> None:
    """Sends a segment's messages as they are, by the RPC of the run's method."""
    which = rpcs.TRAIN if client.run.method == "csl" else rpcs.STREAM_ACTIVATIONS
    client.raw(which, [message.SerializeToString() for message in messages])


def evaluation(client: Ordinary, batches: Sequence[Smashed], **changes: Any) -> list[pb.EvaluateRequest]:
    opening = {"session": client.session, "epoch": 0, "after_sequence": client.sequence} | changes
    frames = [batch_message(pb.EvaluateRequest, i + 1, batch) for i, batch in enumerate(batches)]
    return [pb.EvaluateRequest(evaluation=pb.Evaluation(**opening)), *frames]


def evaluate(client: Ordinary, messages: Sequence[pb.EvaluateRequest]) -> pb.Score:
    (answer,) = client.stub.Evaluate(iter(messages), timeout=DEADLINE_S)
    score: pb.Score = answer.score
    return score


def sync(client: Ordinary, state: dict[str, Tensor], **head: Any) -> list[pb.SyncWeightsResponse]:
    frame = codec.pack_weights(pb.SyncWeightsRequest, pb.Weights(session=client.session, **head), state)
    messages = [pb.SyncWeightsRequest(weights=p.head.weights, data=b"".join(p.chunks)) for p in frame]
    return list(client.stub.SyncWeights(iter(messages), timeout=DEADLINE_S))


# ---------------------------------------------------------------- any client may come


def test_a_client_made_of_the_generated_classes_alone_trains_with_dsl(dsl: Server) -> None:
    before = weights(dsl)
    with member(dsl) as client:
        assert (client.welcome.version, client.welcome.client) == (1, 0)
        assert Run.from_json(client.welcome.run) == dsl.run
        for segment in range(2):
            receipt = client.stream([smashed(dsl.run, seed=segment), smashed(dsl.run, 3)])
            assert receipt.applied == 2 * (segment + 1)
        client.leave()
        assert list(client.membership) == [], "the membership ends in order"
    assert dsl.wait(timeout=10)
    assert dsl.record.samples_trained == 2 * (dsl.run.batch_size + 3)
    assert not same(weights(dsl), before)


def test_a_client_made_of_the_generated_classes_alone_trains_with_csl(tmp_path: Path) -> None:
    with serving(small_run(method="csl"), tmp_path) as server, member(server) as client:
        top, batch = copy.deepcopy(server.part.top), smashed(server.run)
        z = batch.z.clone().requires_grad_()
        loss = F.cross_entropy(top(z), batch.y)
        loss.backward()
        (answer,) = client.train([batch])
        client.leave()
        assert server.wait(timeout=10)
    assert answer.gradient.sequence == 1
    assert answer.gradient.loss == pytest.approx(loss.item())
    assert list(answer.gradient.gradient.shape) == list(z.shape)
    gradient = torch.frombuffer(bytearray(answer.data), dtype=torch.float32).view_as(z)
    assert z.grad is not None
    assert torch.allclose(gradient, z.grad, atol=1e-7)


def test_data_may_come_in_messages_of_any_size_and_before_the_head_in_its_message(client: Ordinary) -> None:
    kind = kind_of(client)
    opening, whole = client.segment(kind, [smashed(client.run)])
    first, *rest = (kind(data=whole.data[at : at + 1000]) for at in range(0, len(whole.data), 1000))
    head = kind(batch=whole.batch).SerializeToString()
    messages = [opening.SerializeToString(), first.SerializeToString() + head]
    which = rpcs.TRAIN if client.run.method == "csl" else rpcs.STREAM_ACTIVATIONS
    assert client.raw(which, messages + [piece.SerializeToString() for piece in rest])


def test_the_joined_network_is_scored_as_it_is(client: Ordinary, server: Server) -> None:
    client.send([smashed(client.run, seed=1)])
    test = [smashed(client.run, seed=2), smashed(client.run, 3, seed=3)]
    before = weights(server)
    score = evaluate(client, evaluation(client, test))
    assert same(weights(server), before), "nothing is learned from a test, statistics included"
    z, y = torch.cat([batch.z for batch in test]), torch.cat([batch.y for batch in test])
    with torch.no_grad():
        logits = server.part.top.eval()(z)
    assert score.samples == len(y)
    assert score.correct == int((logits.argmax(1) == y).sum())
    assert score.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_health_says_serving(dsl: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{dsl.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(dsl: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{dsl.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE_S)
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


# ---------------------------------------------------------------- who may join, and who may speak


@pytest.mark.parametrize(("oldest", "newest"), [(2, 5), (0, 0), (3, 2)])
def test_another_protocol_version_is_refused_with_both_ranges(oldest: int, newest: int, dsl: Server) -> None:
    with member(dsl) as client:
        request = pb.JoinRequest(oldest_version=oldest, newest_version=newest, name="other")
        with refused(Code.FAILED_PRECONDITION, "version 1", f"{oldest} to {newest}"):
            next(client.stub.Join(request, timeout=DEADLINE_S))


def test_a_client_of_a_later_release_that_still_speaks_ours_is_welcome(tmp_path: Path) -> None:
    with serving(small_run(clients=2), tmp_path) as server, member(server) as client:
        request = pb.JoinRequest(oldest_version=1, newest_version=9, name="later")
        assert next(client.stub.Join(request, timeout=DEADLINE_S)).welcome.version == 1


def test_one_client_too_many_is_refused_at_once(tmp_path: Path) -> None:
    run = small_run(clients=2)
    with serving(run, tmp_path) as server, member(server, "ann") as ann, member(server, "bob"):
        request = pb.JoinRequest(oldest_version=1, newest_version=1, name="eve")
        says = ("'eve'", "client 0 (ann)", "client 1 (bob)", "--clients 3")
        with refused(Code.RESOURCE_EXHAUSTED, *says):
            next(ann.stub.Join(request, timeout=DEADLINE_S))
        ann.send([smashed(run)])  # the others go on


STRANGE_NAMES = {
    "none": "",
    "65 letters": "a" * 65,
    "a million letters": "a" * 1_000_000,
    "a blank": "a b",
    "a path": "../x",
    "a line's end": "ann\n",
    "not ASCII": "é",
    "a colour": "a\x1b[31m",
    "a slash": "a/b",
    "a zero": "a\x00",
}


@pytest.mark.parametrize("name", STRANGE_NAMES.values(), ids=STRANGE_NAMES)
def test_a_client_must_have_a_decent_name(name: str, standing: Ordinary) -> None:
    request = pb.JoinRequest(oldest_version=1, newest_version=1, name=name)
    with refused(Code.INVALID_ARGUMENT, "client name", "use 1 to 64 letters, digits") as caught:
        next(standing.stub.Join(request, timeout=DEADLINE_S))
    assert len(caught.value.details()) < 500
    assert caught.value.details().isprintable(), "a stranger must not write on our log"


@pytest.mark.parametrize("session", ["", "0" * 32])
def test_calls_that_name_no_member_are_refused(session: str, client: Ordinary) -> None:
    client.session = session
    with refused(Code.FAILED_PRECONDITION, "join first"):
        send(client, client.segment(kind_of(client), [smashed(client.run)]))
    with refused(Code.FAILED_PRECONDITION, "join first"):
        evaluate(client, evaluation(client, [smashed(client.run)]))
    with refused(Code.FAILED_PRECONDITION, "join first"):
        sync(client, {}, purpose=pb.SYNC_PURPOSE_TAKE_TURN)
    with refused(Code.FAILED_PRECONDITION, "join first"):
        client.leave()


def test_who_has_left_can_send_no_more(client: Ordinary) -> None:
    client.leave()
    with refused(Code.FAILED_PRECONDITION, "join first"):
        client.send([smashed(client.run)])


def test_a_dsl_client_is_refused_by_a_csl_server(tmp_path: Path) -> None:
    with serving(small_run(method="csl"), tmp_path) as server, member(server) as client:
        with refused(Code.FAILED_PRECONDITION, "csl answers batches", "Train"):
            client.stream([smashed(server.run)])
        client.train([smashed(server.run)])


def test_a_csl_client_is_refused_by_a_dsl_server(dsl: Server) -> None:
    with member(dsl) as client:
        with refused(Code.FAILED_PRECONDITION, "dsl answers nothing", "StreamActivations"):
            client.train([smashed(dsl.run)])
        client.stream([smashed(dsl.run)])


# ---------------------------------------------------------------- what is no message at all

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


def site(which: Rpc, folder: Path) -> Any:
    """A server that takes this RPC."""
    return serving(small_run(method="csl" if which is rpcs.TRAIN else "dsl"), folder)


@pytest.mark.parametrize("which", RPCS, ids=lambda which: which.name)
def test_malformed_bytes_are_an_invalid_argument(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        for raw in MALFORMED:
            with refused(Code.INVALID_ARGUMENT):
                client.raw(which, [raw])
        client.send([smashed(server.run)])


STREAMS = [which for which in RPCS if which.requests_stream]


@pytest.mark.parametrize("which", STREAMS, ids=lambda which: which.name)
def test_malformed_bytes_in_the_midst_of_a_stream_are_too(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        declared = pb.NamedTensorSpec(name="w", spec=pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=[1]))
        first: Any = client.opening(kind_of(client), [smashed(server.run)])
        if which is rpcs.EVALUATE:
            first = evaluation(client, [])[0]
        elif which is rpcs.SYNC_WEIGHTS:
            first = pb.SyncWeightsRequest(weights=pb.Weights(session=client.session, tensors=[declared]))
        for raw in MALFORMED:
            with refused(Code.INVALID_ARGUMENT):
                client.raw(which, [first.SerializeToString(), raw])
        client.send([smashed(server.run)])


@pytest.mark.parametrize("which", STREAMS, ids=lambda which: which.name)
def test_a_stream_of_nothing_is_an_invalid_argument(which: Rpc, tmp_path: Path) -> None:
    with site(which, tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT, "ended before its first message"):
            client.raw(which, [])
        client.send([smashed(server.run)])


def test_an_rpc_that_does_not_exist_is_unimplemented(dsl: Server) -> None:
    with member(dsl) as client, refused(Code.UNIMPLEMENTED):
        client.raw(dataclasses.replace(rpcs.LEAVE, name="Divide"), [b""])


def test_a_message_above_the_limit_is_refused(client: Ordinary) -> None:
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    frame.data = bytes(3 << 20)
    with refused(Code.RESOURCE_EXHAUSTED):
        send(client, [opening, frame])
    client.send([smashed(client.run)])


def test_a_small_message_that_swells_above_the_limit_is_refused(client: Ordinary) -> None:
    kind = kind_of(client)
    which = rpcs.TRAIN if client.run.method == "csl" else rpcs.STREAM_ACTIVATIONS
    opening = client.opening(kind, [smashed(client.run)])
    bomb = [opening.SerializeToString(), kind(data=bytes(100 << 20)).SerializeToString()]
    with refused(Code.RESOURCE_EXHAUSTED):
        client.raw(which, bomb, compression=grpc.Compression.Gzip)
    client.send([smashed(client.run)])


def test_too_much_metadata_is_refused(client: Ordinary) -> None:
    with refused(Code.RESOURCE_EXHAUSTED):
        client.raw(rpcs.LEAVE, [b""], metadata=(("x-much", "a" * 20_000),))
    client.send([smashed(client.run)])


# ---------------------------------------------------------------- what is no segment of this run


def test_a_batch_before_its_segment_is_refused(client: Ordinary) -> None:
    _, frame = client.segment(kind_of(client), [smashed(client.run)])
    with refused(Code.INVALID_ARGUMENT, "must open with its segment"):
        send(client, [frame])
    client.send([smashed(client.run)])


def test_data_with_the_opening_is_refused(client: Ordinary) -> None:
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    opening.data = b"abc"
    with refused(Code.INVALID_ARGUMENT, "must open with its segment, alone"):
        send(client, [opening, frame])
    client.send([smashed(client.run)])


def test_a_second_opening_in_a_stream_is_refused(client: Ordinary) -> None:
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    with refused(Code.INVALID_ARGUMENT, "expected the beginning of a frame (batch), got segment"):
        send(client, [opening, opening, frame])
    client.send([smashed(client.run)])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("first", [0, 1, 3, 9, 2**64 - 1])
def test_a_segment_that_does_not_follow_is_aborted_with_the_number_that_is_due(
    first: int, client: Ordinary
) -> None:
    client.send([smashed(client.run)])
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    opening.segment.first_sequence = frame.batch.sequence = first
    with refused(Code.ABORTED, "client 0 (ordinary)", "batch 2 is due") as caught:
        send(client, [opening, frame])
    assert ("dsl-expected-seq", "2") in caught.value.trailing_metadata()
    client.send([smashed(client.run)])


@pytest.mark.parametrize("sequence", [0, 1, 3, 2**64 - 1])
def test_a_gap_inside_a_segment_is_aborted_with_the_number_that_is_due(
    sequence: int, client: Ordinary, server: Server
) -> None:
    client.send([smashed(client.run)])
    before = weights(server)
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    frame.batch.sequence = sequence
    with refused(Code.ABORTED, f"batch {sequence} came, but batch 2 is due") as caught:
        send(client, [opening, frame])
    assert ("dsl-expected-seq", "2") in caught.value.trailing_metadata()
    assert same(weights(server), before)
    client.send([smashed(client.run)])


@pytest.mark.parametrize(
    ("frames", "declared"),
    [
        (1, {"batches": 2}),
        (1, {"batches": 2, "samples": 16}),
        (2, {"batches": 1}),
        (2, {"batches": 1, "samples": 8}),
        (1, {"samples": 7}),
        (1, {"samples": 9}),
        (2, {"samples": 12}),
        (0, {"batches": 1, "samples": 8}),
        (1, {"batches": 0}),
        (1, {"batches": 0, "samples": 0}),
        (1, {"samples": 0}),
        (1, {"batches": 9}),
        (1, {"batches": 2**32 - 1, "samples": 2**64 - 1}),
        (1, {"epoch": 2}),
        (1, {"epoch": 2**32 - 1}),
    ],
)
def test_a_segment_that_is_not_what_it_declared_is_refused(
    frames: int, declared: dict[str, int], client: Ordinary, server: Server
) -> None:
    batches = [smashed(client.run)] * frames
    opening, *messages = client.segment(kind_of(client), batches)
    for name, value in declared.items():
        setattr(opening.segment, name, value)
    with refused(Code.INVALID_ARGUMENT, "client 0 (ordinary)", "batches"):
        send(client, [opening, *messages])
    client.sequence = server.rounds.members()[0].received  # some may have been right
    client.send([smashed(client.run)])


# ---------------------------------------------------------------- what is no batch of this run


def shaped(*shape: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.batch.activations.shape[:] = shape

    return change


def with_value(value: float) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.data = message.data[:400] + struct.pack("<f", value) + message.data[404:]

    return change


def with_label(label: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.data = message.data[:-1] + bytes([label])

    return change


def changed(field: str, value: Any) -> Callable[[Any], None]:
    """Of the batch's head, `labels.dtype` for example."""

    def change(message: Any) -> None:
        *path, name = field.split(".")
        target = message.batch
        for step in path:
            target = getattr(target, step)
        if name == "shape":
            target.shape[:] = value
        else:
            setattr(target, name, value)

    return change


def without_head(message: Any) -> None:
    message.ClearField("batch")


def longer(by: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.data = message.data[:by] if by < 0 else message.data + bytes(by)

    return change


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "no dimension": (shaped(), "a batch of 0 samples"),
    "three dimensions": (shaped(8, 16, 64), "activations: shape [8, 16, 64]"),
    "five dimensions": (shaped(8, 16, 8, 8, 1), "activations: shape"),
    "another image": (shaped(8, 16, 4, 16), "the run needs [8, 16, 8, 8]"),
    "no samples": (shaped(0, 16, 8, 8), "a batch of 0 samples"),
    "fewer than no samples": (shaped(-8, 16, 8, 8), "a batch of -8 samples"),
    "a sample too many": (shaped(9, 16, 8, 8), "the run allows 1 to 8"),
    "two negative sides": (shaped(8, 16, -8, -8), "activations: shape"),
    "a terabyte": (shaped(8, 16, 8, 2**28), "activations: shape"),
    "more than all memory": (shaped(8, 2**62, 2**62, 2**62), "activations: shape"),
    "whole numbers": (changed("activations.dtype", pb.DTYPE_INT64), "activations: dtype DTYPE_INT64"),
    "no type": (changed("activations.dtype", 0), "activations: dtype DTYPE_UNSPECIFIED"),
    "a type of another time": (changed("activations.dtype", 99), "activations: dtype 99"),
    "labels that are floats": (changed("labels.dtype", pb.DTYPE_FLOAT32), "labels: dtype DTYPE_FLOAT32"),
    "labels too wide": (changed("labels.dtype", pb.DTYPE_UINT16), "labels: dtype DTYPE_UINT16"),
    "a label too few": (changed("labels.shape", [7]), "labels: shape [7]; the run needs [8]"),
    "labels in a square": (changed("labels.shape", [8, 1]), "labels: shape [8, 1]"),
    "a label out of range": (with_label(4), "label 4 in batch 2: the run has 4 classes"),
    "a label of minus one": (with_label(255), "label 255"),
    "not a number": (with_value(math.nan), "activations of batch 2: NaN or infinite"),
    "infinity": (with_value(math.inf), "activations of batch 2: NaN or infinite"),
    "minus infinity": (with_value(-math.inf), "activations of batch 2: NaN or infinite"),
    "a byte too few": (longer(-1), "the stream ended 1 bytes before the end of a frame"),
    "a byte too many": (longer(1), "declared bytes has more"),
    "no bytes": (longer(-(10**9)), "before the end of a frame"),
    "no head": (without_head, "expected the beginning of a frame (batch), got only data"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_batch_is_refused_and_changes_nothing(what: str, client: Ordinary, server: Server) -> None:
    change, says = WRONG[what]
    client.send([smashed(client.run)])
    before = weights(server)
    opening, frame = client.segment(kind_of(client), [smashed(client.run)])
    change(frame)
    with refused(Code.INVALID_ARGUMENT, says):
        send(client, [opening, frame])
    assert same(weights(server), before)
    client.send([smashed(client.run)])
    assert not same(weights(server), before), "the same member's next batch is trained on"
    wait_for(lambda: server.record.samples_trained == 16)


def test_a_right_batch_before_a_wrong_one_counts(client: Ordinary, server: Server) -> None:
    """The client learns from the refusal's number where to go on."""
    opening, first, second = client.segment(kind_of(client), [smashed(client.run)] * 2)
    second.batch.labels.dtype = 99
    with refused(Code.INVALID_ARGUMENT):
        send(client, [opening, first, second])
    client.sequence = 1
    client.send([smashed(client.run)])
    wait_for(lambda: server.record.samples_trained == 16)


def test_a_batch_is_trained_on_once_even_if_two_calls_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = slow_steps(monkeypatch, "dsl")
    with serving(small_run(method="dsl", inbox=1), tmp_path) as server, member(server) as client:
        batches = [smashed(server.run)] * 3
        first = in_thread(send, client, client.segment(pb.StreamActivationsRequest, batches))
        wait_for(lambda: server.rounds.members()[0].received == 2)  # 1 in the step, 2 in the lane
        client.sequence = 2
        again = in_thread(send, client, client.segment(pb.StreamActivationsRequest, batches[:1]))
        waits(again)  # it is refused, or waits for its turn
        gate.set()
        outcomes = [each.exception(timeout=10) for each in (first, again)]
        assert sum(outcome is None for outcome in outcomes) == 1
        wait_for(lambda: server.record.samples_trained >= 3 * 8)
        assert server.record.samples_trained == 3 * 8


def slow_steps(monkeypatch: pytest.MonkeyPatch, method: str) -> threading.Event:
    """Every step of the server waits until the event is set."""
    gate, ordinary = threading.Event(), METHODS[method]()

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        assert gate.wait(30)
        return ordinary.server_step(part, group)

    slow = dataclasses.replace(ordinary, server_step=step)
    monkeypatch.setitem(METHODS, method, lambda: slow)
    return gate


def test_a_slow_server_is_no_gap_in_the_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client opens its next segment while the server still works on the one before."""
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.2)
    gate = slow_steps(monkeypatch, "dsl")
    with serving(small_run(method="dsl", inbox=1), tmp_path) as server, member(server) as client:
        batches = [smashed(server.run)] * 4
        first = in_thread(send, client, client.segment(pb.StreamActivationsRequest, batches))
        client.sequence = 4
        following = in_thread(send, client, client.segment(pb.StreamActivationsRequest, batches))
        assert waits(following, 0.6), following.exception()
        gate.set()
        assert first.result(timeout=10) is None
        assert following.result(timeout=10) is None
        wait_for(lambda: server.record.samples_trained == 8 * 8)


# ---------------------------------------------------------------- what is no evaluation, no part


def test_an_evaluation_of_no_images_is_refused(client: Ordinary) -> None:
    client.send([smashed(client.run)])
    with refused(Code.INVALID_ARGUMENT, "no images"):
        evaluate(client, evaluation(client, []))
    assert evaluate(client, evaluation(client, [smashed(client.run)])).samples == 8


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_batch_of_an_evaluation_is_refused(what: str, standing: Ordinary) -> None:
    change, says = WRONG[what]
    opening, *_, frame = evaluation(standing, [smashed(standing.run)] * 2)
    change(frame)
    with refused(Code.INVALID_ARGUMENT, says):
        evaluate(standing, [opening, frame])
    assert evaluate(standing, evaluation(standing, [smashed(standing.run)])).samples == 8


def test_an_evaluation_must_open_as_one(dsl: Server) -> None:
    score = pb.EvaluateRequest(client_score=pb.ClientScore(head_correct=1))
    with member(dsl) as client:
        opening, frame = evaluation(client, [smashed(dsl.run)])
        for messages in ([frame], [score], [opening, opening, frame]):
            with refused(Code.INVALID_ARGUMENT):
                evaluate(client, messages)
        assert evaluate(client, [opening, frame, score]).samples == 8


@pytest.mark.usefixtures("impatient")
def test_an_evaluation_after_batches_that_never_came_is_aborted(dsl: Server) -> None:
    with member(dsl) as client:
        client.stream([smashed(dsl.run)])
        with refused(Code.ABORTED, "batch 2 is due") as caught:
            evaluate(client, evaluation(client, [smashed(dsl.run)], after_sequence=7))
        assert ("dsl-expected-seq", "2") in caught.value.trailing_metadata()
        assert evaluate(client, evaluation(client, [smashed(dsl.run)])).samples == 8


@pytest.mark.parametrize(
    ("correct", "train_loss"), [(9, 1.0), (2**64 - 1, 1.0), (4, math.nan), (4, math.inf)]
)
def test_a_score_that_cannot_be_is_refused(correct: int, train_loss: float, dsl: Server) -> None:
    """It would stand in metrics.jsonl as an accuracy above 1, or as what is no JSON."""
    with member(dsl) as client:
        score = pb.EvaluateRequest(client_score=pb.ClientScore(head_correct=correct, train_loss=train_loss))
        with refused(Code.INVALID_ARGUMENT):
            evaluate(client, [*evaluation(client, [smashed(dsl.run)]), score])


def test_an_evaluation_of_an_epoch_that_the_run_does_not_have_is_refused(dsl: Server) -> None:
    with member(dsl) as client:
        for epoch in (dsl.run.epochs, 2**32 - 1):
            with refused(Code.INVALID_ARGUMENT, f"epoch {epoch}"):
                evaluate(client, evaluation(client, [smashed(dsl.run)], epoch=epoch))


def test_an_evaluation_holds_no_more_batches_than_its_lane(
    dsl: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand images at the paper's cut are 650 MB."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, unpack = 0, codec.unpack_batch

    def watched(*arguments: Any) -> Arrived:
        nonlocal most
        batch = unpack(*arguments)
        alive.add(batch.z)
        most = max(most, len(alive))
        return batch

    monkeypatch.setattr(codec, "unpack_batch", watched)
    with member(dsl) as client:
        evaluate(client, evaluation(client, [smashed(dsl.run)] * 60))
    assert most <= 10, f"{most} of 60 batches were in memory at once"


@pytest.mark.parametrize(
    ("sync_mode", "head", "parts"),
    [
        ("none", {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 1}, True),
        ("none", {"purpose": pb.SYNC_PURPOSE_TAKE_TURN}, False),
        ("average", {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 1}, False),
        ("average", {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 0}, True),
        ("average", {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 1, "epoch": 1}, True),
        ("average", {"purpose": pb.SYNC_PURPOSE_TAKE_TURN}, False),
        ("average", {"purpose": pb.SYNC_PURPOSE_END_TURN}, True),
        ("average", {"samples": 1}, True),
        ("average", {"purpose": 99, "samples": 1}, True),
        ("relay", {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 1}, True),
        ("relay", {"purpose": pb.SYNC_PURPOSE_END_TURN}, False),
        ("relay", {"purpose": pb.SYNC_PURPOSE_END_TURN, "epoch": 1}, True),
    ],
)
def test_weights_that_the_run_does_not_want_are_refused(
    sync_mode: str, head: dict[str, Any], parts: bool, tmp_path: Path
) -> None:
    run = small_run(method="dsl", sync=sync_mode)
    mine = client_part(run, METHODS["dsl"](), build(run), CPU)
    state = state_of(mine, momentum=sync_mode == "relay")
    with serving(run, tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT):
            sync(client, state if parts else {}, **head)
        client.send([smashed(run)])


def test_weights_of_another_network_or_with_nan_are_refused(tmp_path: Path) -> None:
    run = small_run(method="dsl", sync="average", clients=2)
    state = state_of(client_part(run, METHODS["dsl"](), build(run), CPU), momentum=False)
    name = "bottom.0.0.weight"
    wrong = {
        f"{name}: shape": state | {name: torch.zeros(1)},
        f"{name}: dtype": state | {name: state[name].long()},
        f"{name}: NaN or infinite": state | {name: state[name] * math.nan},
        f"'{name}' differs": {key: value for key, value in state.items() if key != name},
    }
    with serving(run, tmp_path) as server, member(server) as client, member(server, "other") as other:
        for says, theirs in wrong.items():
            with refused(Code.INVALID_ARGUMENT, says):
                sync(client, theirs, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=1)
        given = in_thread(lambda: sync(other, state, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=1))
        (answer,) = sync(client, state, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=1)
        given.result(timeout=DEADLINE_S)
    assert [tensor.name for tensor in answer.weights.tensors] == list(state)


def test_metrics_that_cannot_be_written_end_the_run_with_the_reason(
    dsl: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_metrics(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "add_metrics", add_metrics)
    with member(dsl) as client:
        with refused(Code.FAILED_PRECONDITION, "No space left on device"):
            evaluate(client, evaluation(client, [smashed(dsl.run)]))
        with pytest.raises(SplitLearningError, match="No space left on device"):
            dsl.wait(timeout=10)


# ---------------------------------------------------------------- what went over the wire, in bytes


def wire_of(run: Run, folder: Path, samples: Sequence[int]) -> dict[str, Any]:
    """What a run's summary tells of the bytes that went over the wire."""
    data = [Batches(run, seed=index, samples=n) for index, n in enumerate(samples)]
    summary = federation(run, folder, data)[2]
    assert json.loads((folder / "server/summary.json").read_text()) == summary
    wire: dict[str, Any] = summary["wire"]
    return wire


@pytest.mark.parametrize("clients", [1, 2])
def test_in_dsl_activations_go_up_and_no_gradient_comes_down(clients: int, tmp_path: Path) -> None:
    run, samples = small_run(method="dsl", clients=clients), [44, 17][:clients]
    wire = wire_of(run, tmp_path, samples)
    trained, scored = run.epochs * sum(samples), run.epochs * clients * 20
    assert wire["up"]["activations"] == trained * SAMPLE_BYTES
    assert wire["up"]["labels"] == trained
    assert wire["up"]["evaluation"] == scored * (SAMPLE_BYTES + 1)
    assert wire["up"]["weights"] == 0
    control = wire["down"].pop("control")
    assert not any(wire["down"].values()), wire["down"]
    assert control < 2000 * clients, "a welcome, receipts and scores"


def test_in_csl_as_many_bytes_come_down_as_go_up(tmp_path: Path) -> None:
    run = small_run(method="csl", clients=2)
    wire = wire_of(run, tmp_path, [44, 17])
    assert wire["up"]["activations"] == wire["down"]["gradients"] == run.epochs * 61 * SAMPLE_BYTES
    assert wire["up"]["labels"] == run.epochs * 61
    assert wire["down"]["weights"] == 0


def test_averaged_parts_go_up_and_down_once_an_epoch(tmp_path: Path) -> None:
    run = small_run(method="dsl", clients=2, sync="average")
    wire = wire_of(run, tmp_path, [16, 8])
    state = state_of(client_part(run, METHODS["dsl"](), build(run), CPU), momentum=False)
    size = sum(tensor.nbytes for tensor in state.values())
    assert wire["up"]["weights"] == wire["down"]["weights"] == 2 * run.epochs * size


def test_the_answer_to_a_dsl_segment_is_a_receipt_and_nothing_else(dsl: Server) -> None:
    assert [field.name for field in pb.StreamActivationsResponse.DESCRIPTOR.fields] == ["applied"]
    with member(dsl) as client:
        messages = client.segment(pb.StreamActivationsRequest, [smashed(dsl.run)] * 3)
        raw = [message.SerializeToString() for message in messages]
        (receipt,) = client.raw(rpcs.STREAM_ACTIVATIONS, raw)
    assert receipt == pb.StreamActivationsResponse(applied=3).SerializeToString() == b"\x08\x03"


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_what_we_count_is_what_the_kernel_counts(method: str, tmp_path: Path) -> None:
    """Within 2 %: HTTP/2's frames are all that the kernel sees and we do not."""
    if Sockets().counts() is None:
        pytest.skip("this kernel does not tell what went over a socket")
    run = small_run(method=method, image=(3, 32, 32), batch_size=16)
    wire = wire_of(run, tmp_path, [48])
    directions = ["up", "down"] if method == "csl" else ["up"]
    for direction in directions:
        ours = sum(wire[direction].values())
        assert ours > 5e6
        assert 0.98 < wire["socket"][direction] / ours < 1.02


def test_a_head_that_lies_about_its_size_is_not_believed(dsl: Server) -> None:
    with member(dsl) as client:
        before, received = dsl.traffic.total("up"), 0
        for shape in ([8, 2**62, 2**62, 2**62], [8, 16, 8, -(2**40)], [2**40]):
            opening, frame = client.segment(pb.StreamActivationsRequest, [smashed(dsl.run)])
            frame.batch.activations.shape[:] = shape
            with refused(Code.INVALID_ARGUMENT):
                send(client, [opening, frame])
            received += len(opening.SerializeToString()) + len(frame.SerializeToString())
        assert 0 <= dsl.traffic.total("up") - before <= received


# ---------------------------------------------------------------- what may be anything at all


def mutated(messages: list[bytes], dice: random.Random) -> list[bytes]:
    """The messages of a stream, damaged in one to three places."""
    stream = list(messages)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(stream)) if stream else 0
        match dice.randrange(7) if stream else 6:
            case 0 | 1:  # bytes of the head, where the meaning is
                raw = bytearray(stream[at])
                for _ in range(dice.randint(1, 4)):
                    if raw:
                        raw[dice.randrange(min(len(raw), 70))] = dice.randrange(256)
                stream[at] = bytes(raw)
            case 2:
                stream[at] = stream[at][: dice.randrange(len(stream[at]) + 1)]
            case 3:
                del stream[at]
            case 4:
                stream.insert(at, dice.choice(messages))
            case 5:
                dice.shuffle(stream)
            case _:
                stream.insert(at, dice.randbytes(dice.randrange(200)))
    return stream


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_damaged_streams_get_one_of_our_statuses_and_the_server_lives(
    method: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_step(part: ServerPart, group: Sequence[Received]) -> Answer:
        return Answer(torch.zeros(()), [torch.zeros_like(batch.z) for batch in group])

    # Without the mathematics: what is finite but absurd may end a run, and is another matter.
    quick = dataclasses.replace(METHODS[method](), server_step=no_step)
    monkeypatch.setitem(METHODS, method, lambda: quick)
    dice, seen = random.Random(seed), set()
    which = rpcs.TRAIN if method == "csl" else rpcs.STREAM_ACTIVATIONS
    with serving(small_run(method=method), tmp_path) as server, member(server) as client:
        for attempt in range(60):
            client.sequence = server.rounds.members()[0].received
            batches = [smashed(server.run, 2), smashed(server.run, 1)]
            whole = [m.SerializeToString() for m in client.segment(KINDS[method], batches)]
            cut = [*whole[:2], whole[2][:900], *([] if attempt % 2 else [whole[2][900:]])]
            try:
                client.raw(which, mutated(cut if attempt % 5 == 0 else whole, dice))
                seen.add(Code.OK)
            except grpc.RpcError as error:
                seen.add(error.code())
        client.sequence = server.rounds.members()[0].received
        client.send([smashed(server.run)])
    assert seen <= {Code.OK, Code.INVALID_ARGUMENT, Code.ABORTED, Code.FAILED_PRECONDITION}
    assert Code.INVALID_ARGUMENT in seen


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", range(2))
def test_damaged_evaluations_and_weights_do_too(seed: int, tmp_path: Path) -> None:
    run, dice, seen = small_run(method="dsl", sync="average", clients=1), random.Random(seed), set()
    state = state_of(client_part(run, METHODS["dsl"](), build(run), CPU), momentum=False)
    with serving(run, tmp_path) as server, member(server) as client:
        exam = [m.SerializeToString() for m in evaluation(client, [smashed(run, 2), smashed(run, 1)])]
        head = pb.Weights(session=client.session, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=1)
        frame = codec.pack_weights(pb.SyncWeightsRequest, head, state)
        part = [rpcs.writer(pb.SyncWeightsRequest, True)(piece) for piece in frame]
        for _ in range(60):
            for which, messages in ((rpcs.EVALUATE, exam), (rpcs.SYNC_WEIGHTS, part)):
                try:
                    client.raw(which, mutated(messages, dice))
                    seen.add(Code.OK)
                except grpc.RpcError as error:
                    seen.add(error.code())
        assert evaluate(client, evaluation(client, [smashed(run)])).samples == 8
    assert seen <= {Code.OK, Code.INVALID_ARGUMENT, Code.ABORTED, Code.FAILED_PRECONDITION}
    assert Code.INVALID_ARGUMENT in seen
