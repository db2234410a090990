"""A real server on loopback, spoken to with the generated classes and with bytes of every sort.

Each of our status codes means one thing; INTERNAL and UNKNOWN would be a fault of ours, whatever
came in. `tests/ordinary.py` is the client here, so that what ours never sends can be sent.
"""

import copy
import dataclasses
import errno
import json
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
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
from common.wire.rpc import SERVICE
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
    assert score.metric == int((logits.argmax(1) == y).sum())
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
def test_f1_another_version_is_refused_with_both_ranges(oldest: int, newest: int, dsl: Server) -> None:
    with member(dsl) as client:
        request = pb.JoinRequest(oldest_version=oldest, newest_version=newest, name="other")
        with refused(Code.FAILED_PRECONDITION, "version 1", f"{oldest} to {newest}"):
            next(client.stub.Join(request, timeout=DEADLINE_S))


def test_f1_a_client_of_a_later_release_that_still_speaks_ours_is_welcome(tmp_path: Path) -> None:
    with serving(small_run(clients=2), tmp_path) as server, member(server) as client:
        request = pb.JoinRequest(oldest_version=1, newest_version=9, name="later")
        assert next(client.stub.Join(request, timeout=DEADLINE_S)).welcome.version == 1


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
    client.sequence = server.rounds.members()[0].received.sequence  # some may have been right
    client.send([smashed(client.run)])


# ---------------------------------------------------------------- what is no batch of this run


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
        wait_for(lambda: server.rounds.members()[0].laid == 2)  # 1 in the step, 2 in the lane
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


def test_an_evaluation_must_open_as_one(dsl: Server) -> None:
    score = pb.EvaluateRequest(client_score=pb.ClientScore(head_metric=1))
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
        score = pb.EvaluateRequest(client_score=pb.ClientScore(head_metric=correct, train_loss=train_loss))
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
