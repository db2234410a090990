"""U-shaped networks over the wire: output down, gradient up, while the server's one trainer waits.

Each test is of a message that is wrong or out of order, or of a way in which that wait could go on for
ever, and does not. `tests/ordinary.py` is the client, so that what ours never sends can be sent; where
the client is ours, the server is the one that talks nonsense.
"""

import contextlib
import copy
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor, nn

from common.errors import ClosedError, WireError
from common.meter import Clock, Traffic
from common.methods import build_method
from common.methods.base import Smashed
from common.nets.cut import build
from common.optim import sgd
from common.parts import client_part, state_of
from common.run import Run
from common.wire import rpc
from common.wire import split_learning_pb2 as pb
from dsl_client.connection import Connection
from dsl_client.stream import Stretch
from dsl_client.trainer import Trainer
from dsl_server.inbox import Inbox, Job, ThroughTail
from dsl_server.server import Server
from tests.faults.test_c1_malformed import MALFORMED
from tests.federation import CPU, Batches, arrived, connect, serving, small_run, spec_of
from tests.ordinary import DEADLINE_S, Ordinary, batch_message, member, refused, smashed
from tests.test_hangs import SOON_S, Pretender, all_train, ended, gone, gradient, told
from tests.test_service import same, weights
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
OUTPUT = (64, 2, 2)  # of one sample, at the end of the middle
BOTH = pytest.mark.parametrize("learning", ["csl", "dsl"])


def ushape(learning: str = "csl", **settings: Any) -> Run:
    return small_run(method="ushape", method_arg=(f"learning={learning}",), **settings)


def unlabelled(kind: type[Any], sequence: int, batch: Smashed) -> Any:
    """A whole batch in one message, without labels."""
    spec = pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=batch.z.shape)
    return kind(batch=pb.Batch(sequence=sequence, activations=spec), data=batch.z.numpy().tobytes())


def gradient_of(sequence: int, value: Tensor) -> pb.TrainRequest:
    spec = pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=value.shape)
    data = value.numpy().tobytes()
    return pb.TrainRequest(gradient=pb.Gradient(sequence=sequence, gradient=spec), data=data)


def tensor_of(spec: pb.TensorSpec, data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*spec.shape)


class Exchange:
    """One segment, message by message."""

    def __init__(self, client: Ordinary, sent: Sequence[Smashed], **changes: Any) -> None:
        self._client, self._batches = client, sent
        self._requests: queue.Queue[Any] = queue.Queue()
        self.call = client.stub.Train(iter(self._requests.get, None), timeout=DEADLINE_S)
        opening = client.opening(pb.TrainRequest, sent)
        for name, value in changes.items():
            setattr(opening.segment, name, value)
        self.send(opening)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._requests.put(message)

    def output(self, index: int = 0) -> Tensor:
        """Sends this batch; its output."""
        sequence = self._client.sequence + 1 + index
        self.send(unlabelled(pb.TrainRequest, sequence, self._batches[index]))
        answer = next(self.call)
        assert answer.output.sequence == sequence
        return tensor_of(answer.output.output, answer.data)

    def finish(self) -> list[pb.TrainResponse]:
        """No more messages; the answers that are left."""
        self._requests.put(None)
        return list(self.call)


def exchange(client: Ordinary, batches: Sequence[Smashed], alone: bool | None = None) -> list[Tensor]:
    """A segment as it should be, with gradients of 0.01; the cut gradients that came back."""
    alone = "dsl" in client.run.method_arg[0] if alone is None else alone
    segment, back = Exchange(client, batches), []
    for index in range(len(batches)):
        u = segment.output(index)
        segment.send(gradient_of(client.sequence + 1 + index, torch.full_like(u, 0.01)))
        if not alone:
            answer = next(segment.call)
            assert answer.gradient.sequence == client.sequence + 1 + index
            back.append(tensor_of(answer.gradient.gradient, answer.data))
    assert segment.finish() == []
    client.sequence += len(batches)
    return back


@pytest.fixture(params=["csl", "dsl"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with serving(ushape(request.param), tmp_path) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Ordinary]:
    with member(server) as client:
        yield client


# ---------------------------------------------------------------- as it should be


@BOTH
def test_a_client_made_of_the_generated_classes_alone_trains_through_its_tail(
    learning: str, tmp_path: Path
) -> None:
    run = ushape(learning, schedule="constant", warmup=0.0)
    with serving(run, tmp_path) as server, member(server) as client:
        middle, tail = copy.deepcopy(server.part.top), build(run).top[-1:]
        optimizer = sgd(middle.parameters(), run)
        batches = [smashed(run, seed=1), smashed(run, 3, seed=2)]
        segment = Exchange(client, batches)
        for index, batch in enumerate(batches):
            z = batch.z.clone().requires_grad_()
            ours = middle(z)
            u = segment.output(index)
            assert u.shape == (len(batch.y), *OUTPUT)
            assert torch.equal(u, ours)

            leaf = u.clone().requires_grad_()
            nn.functional.cross_entropy(tail(leaf), batch.y).backward()
            assert leaf.grad is not None
            segment.send(gradient_of(index + 1, leaf.grad))
            optimizer.zero_grad()
            ours.backward(leaf.grad)
            optimizer.step()
            if learning == "csl":
                answer = next(segment.call)
                assert answer.gradient.sequence == index + 1
                assert not answer.gradient.loss, "the server knows no label, and so no loss"
                assert z.grad is not None
                assert torch.equal(tensor_of(answer.gradient.gradient, answer.data), z.grad)
        assert segment.finish() == []
        client.leave()
        assert server.wait(timeout=SOON_S)
        for name, tensor in middle.state_dict().items():
            assert torch.equal(tensor, server.part.top.state_dict()[name]), name
        assert server.record.samples_trained == 11


def test_a_gradient_may_come_in_messages_of_any_size_and_without_its_mark(client: Ordinary) -> None:
    segment = Exchange(client, [smashed(client.run)])
    whole = gradient_of(1, torch.ones_like(segment.output()))
    cuts = range(0, len(whole.data), 1000)
    segment.send(pb.TrainRequest(gradient=whole.gradient))
    segment.send(*(pb.TrainRequest(data=whole.data[at : at + 1000]) for at in cuts))
    assert len(segment.finish()) == ("csl" in client.run.method_arg[0])


# ---------------------------------------------------------------- a message is wrong


def refusal(segment: Exchange, says: str, code: Any = Code.INVALID_ARGUMENT) -> None:
    with refused(code, says):
        segment.finish()


def zeros(sequence: int = 2, shape: Sequence[int] = (8, *OUTPUT), fill: float = 0.0) -> pb.TrainRequest:
    return gradient_of(sequence, torch.full(tuple(shape), fill))


def of_type(dtype: Any) -> pb.TrainRequest:
    message = zeros()
    message.gradient.gradient.dtype = dtype
    return message


def labelled(run: Run) -> Any:
    return batch_message(pb.TrainRequest, 2, smashed(run))


def with_empty_labels(run: Run) -> Any:
    message = unlabelled(pb.TrainRequest, 2, smashed(run))
    message.batch.labels.SetInParent()
    return message


FOR_A_BATCH: dict[str, tuple[Callable[[Run], Any], str]] = {
    "with labels": (labelled, "batch 2 has labels; in this run they stay with the client"),
    "with labels of nothing": (with_empty_labels, "batch 2 has labels"),
    "a gradient": (lambda _: zeros(), "expected the beginning of a frame (batch), got gradient"),
    "only data": (lambda _: pb.TrainRequest(data=b"abc"), "(batch), got only data"),
    "nothing": (lambda _: pb.TrainRequest(), "(batch), got only data"),
    "marked data": (lambda _: pb.TrainRequest(of_gradient=True, data=b"abc"), "(batch), got only data"),
}


@pytest.mark.parametrize("what", FOR_A_BATCH)
def test_what_is_no_batch_is_refused_and_changes_nothing(what: str, client: Ordinary, server: Server) -> None:
    make, says = FOR_A_BATCH[what]
    exchange(client, [smashed(client.run)])
    before = weights(server)
    segment = Exchange(client, [smashed(client.run)])
    segment.send(make(client.run))
    refusal(segment, says)
    assert same(weights(server), before)
    exchange(client, [smashed(client.run)])
    assert not same(weights(server), before)


FOR_A_GRADIENT: dict[str, tuple[Sequence[Any], str]] = {
    "of another shape": ([zeros(shape=(8, 64, 4, 1))], "gradient: shape [8, 64, 4, 1]; the run needs"),
    "of fewer samples": ([zeros(shape=(7, *OUTPUT))], "gradient: shape"),
    "of the activations' shape": ([zeros(shape=(8, 16, 8, 8))], "gradient: shape"),
    "of no shape": ([zeros(shape=())], "gradient: shape []"),
    "of whole numbers": ([of_type(pb.DTYPE_INT64)], "gradient: dtype DTYPE_INT64"),
    "of no type": ([of_type(0)], "gradient: dtype DTYPE_UNSPECIFIED"),
    "of another time's type": ([of_type(99)], "gradient: dtype 99"),
    "not a number": ([zeros(fill=math.nan)], "the gradient of batch 2: NaN or infinite"),
    "infinite": ([zeros(fill=-math.inf)], "the gradient of batch 2: NaN or infinite"),
    "of the batch before": ([zeros(1)], "the gradient of batch 1 came; that of batch 2 was due"),
    "of the batch after": ([zeros(3)], "the gradient of batch 3 came; that of batch 2 was due"),
    "of no batch": ([zeros(0)], "the gradient of batch 0 came"),
    "of no tensor": ([pb.TrainRequest(gradient=pb.Gradient(sequence=2))], "an output without a gradient"),
    "another batch": (
        [unlabelled(pb.TrainRequest, 3, Smashed(torch.zeros(8, 16, 8, 8), torch.zeros(8)))],
        "expected the beginning of a frame (gradient), got batch",
    ),
    "another segment": ([pb.TrainRequest(segment=pb.Segment())], "(gradient), got segment"),
    "only data": ([pb.TrainRequest(of_gradient=True, data=b"abc")], "(gradient), got only data"),
    "cut short": ([pb.TrainRequest(gradient=zeros().gradient, data=b"abc")], "the stream ended"),
    "too long": ([pb.TrainRequest(gradient=zeros().gradient, data=bytes(9000))], "has more than"),
    "begun twice": ([pb.TrainRequest(gradient=zeros().gradient, data=b"abcd"), zeros()], "a new frame began"),
    "nothing": ([], "the stream ended before the gradient of batch 2"),
}


@pytest.mark.parametrize("what", FOR_A_GRADIENT)
def test_what_is_no_gradient_is_refused_and_changes_nothing(
    what: str, client: Ordinary, server: Server
) -> None:
    """Nor does the trainer wait on, nor has the batch left a trace in BatchNorm's statistics."""
    messages, says = FOR_A_GRADIENT[what]
    exchange(client, [smashed(client.run)])
    before = weights(server)
    segment = Exchange(client, [smashed(client.run, seed=5)])
    segment.output()
    segment.send(*messages)
    refusal(segment, says)
    wait_for(lambda: same(weights(server), before))
    exchange(client, [smashed(client.run)])
    assert not same(weights(server), before), "the same member's next batch is trained on"
    wait_for(lambda: server.record.samples_trained == 16)


def test_malformed_bytes_in_place_of_a_gradient_are_an_invalid_argument(
    client: Ordinary, server: Server
) -> None:
    before = weights(server)
    batch = unlabelled(pb.TrainRequest, 1, smashed(client.run))
    opening = client.opening(pb.TrainRequest, [smashed(client.run)])
    for raw in MALFORMED:
        with refused(Code.INVALID_ARGUMENT):
            client.raw(rpc.TRAIN, [opening.SerializeToString(), batch.SerializeToString(), raw])
    wait_for(lambda: same(weights(server), before))
    exchange(client, [smashed(client.run)])


def test_an_answered_batch_before_a_wrong_one_counts(client: Ordinary, server: Server) -> None:
    segment = Exchange(client, [smashed(client.run)] * 2)
    u = segment.output()
    segment.send(zeros(1, u.shape))
    if "csl" in client.run.method_arg[0]:
        next(segment.call)
    segment.output(1)
    segment.send(zeros(2, (1, *OUTPUT)))
    refusal(segment, "gradient: shape")
    client.sequence = 1
    exchange(client, [smashed(client.run)])
    wait_for(lambda: server.record.samples_trained == 16)


@pytest.mark.parametrize(
    ("declared", "says"),
    [({"batches": 1}, "batches"), ({"samples": 17}, "samples"), ({"batches": 3, "samples": 24}, "batches")],
)
def test_a_segment_that_is_not_what_it_declared_is_refused(
    declared: dict[str, int], says: str, client: Ordinary, server: Server
) -> None:
    segment = Exchange(client, [smashed(client.run)] * 2, **declared)
    with refused(Code.INVALID_ARGUMENT, says):
        for index in range(2):
            u = segment.output(index)
            segment.send(zeros(index + 1, u.shape))
            if "csl" in client.run.method_arg[0]:
                next(segment.call)
        segment.finish()
    client.sequence = server.rounds.members()[0].received.sequence
    exchange(client, [smashed(client.run)])


def test_streaming_activations_one_way_is_refused(client: Ordinary) -> None:
    with refused(Code.FAILED_PRECONDITION, "ushape answers batches; send them by Train"):
        client.stream([smashed(client.run)])
    exchange(client, [smashed(client.run)])


def test_who_is_in_an_exchange_cannot_leave_before_its_end(client: Ordinary, server: Server) -> None:
    """The trainer waits for it; and `wait` for the trainer, once everyone has left."""
    segment = Exchange(client, [smashed(client.run)])
    u = segment.output()
    with refused(Code.FAILED_PRECONDITION, "its segment"):
        client.leave()
    segment.send(zeros(1, u.shape))
    segment.finish()
    client.leave()
    assert server.wait(timeout=SOON_S)


def test_a_call_that_is_cancelled_ends_the_wait_for_its_gradient(client: Ordinary, server: Server) -> None:
    before = weights(server)
    for _ in range(3):
        segment = Exchange(client, [smashed(client.run)])
        segment.output()
        segment.call.cancel()
        segment.send(None)
    wait_for(lambda: same(weights(server), before))
    exchange(client, [smashed(client.run)])


# ---------------------------------------------------------------- a client goes while the trainer waits

WAYS: dict[str, Callable[[Ordinary], Any]] = {
    "is killed": Ordinary.close,
    "ends its membership, not its call": lambda client: client.membership.cancel(),
    "says that it failed, and keeps its call": lambda client: client.stub.Leave(
        pb.LeaveRequest(session=client.session, failure="no more"), timeout=DEADLINE_S
    ),
}


@contextlib.contextmanager
def three(run: Run, folder: Path) -> Iterator[tuple[Server, list[Ordinary], Exchange]]:
    """Three members, and an exchange of the last one that is given its output and owes a gradient."""
    with serving(run, folder) as server, contextlib.ExitStack() as stack:
        members = [stack.enter_context(member(server, name)) for name in "abc"]
        segment = Exchange(members[2], [smashed(run)])
        stack.callback(segment.send, None)
        segment.output()
        yield server, members, segment


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quorum", [0, 2])
@BOTH
def test_a_client_that_goes_while_the_trainer_waits_for_it_is_not_waited_for(
    learning: str, quorum: int, way: str, tmp_path: Path
) -> None:
    with three(ushape(learning, clients=3, quorum=quorum), tmp_path) as (server, (ann, bob, cid), _):
        waiting = in_thread(exchange, ann, [smashed(server.run)])
        assert waits(waiting), "there is one trainer"
        WAYS[way](cid)
        if quorum:
            waiting.result(timeout=SOON_S)
            exchange(bob, [smashed(server.run)])
            ann.leave()
            bob.leave()
            assert server.wait(timeout=SOON_S)
            assert server.finish()["samples_trained"] == 16, "cid's batch has no gradient"
        else:
            error: Any = waiting.exception(timeout=SOON_S)
            assert error.code() is Code.FAILED_PRECONDITION
            for text in (error.details(), str(ended(server))):
                assert "client 2 (c) " in text
            with refused(Code.FAILED_PRECONDITION, "client 2 (c) "):
                list(bob.membership)
            server._thread.join(SOON_S)
            assert not server._thread.is_alive()


def test_another_client_that_goes_ends_the_wait_too(tmp_path: Path) -> None:
    with three(ushape(clients=3), tmp_path) as (server, (ann, _, cid), _):
        ann.close()
        assert "client 0 (a) went away" in str(ended(server))
        server._thread.join(SOON_S)
        assert not server._thread.is_alive()
        with refused(Code.FAILED_PRECONDITION, "client 0 (a) went away"):
            list(cid.membership)


@BOTH
@pytest.mark.parametrize("fixed_order", [False, True])
def test_the_others_finish_without_a_client_that_dies_with_an_output(
    fixed_order: bool, learning: str, tmp_path: Path
) -> None:
    run = ushape(learning, clients=3, quorum=2, fixed_order=fixed_order)
    with serving(run, tmp_path) as server:
        dying, _ = connect(server, "ann")
        others = all_train(server, "bob", "cid")
        segment = dying.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        assert in_thread(segment, smashed(run)).result(timeout=SOON_S) is not None
        gone(dying)
        for connection, client in others:
            client.result(timeout=SOON_S)
            connection.close()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 2 * 2 * 40


def test_a_slow_client_holds_the_others_up_and_no_more(tmp_path: Path) -> None:
    with three(ushape("dsl", clients=3), tmp_path) as (server, (ann, _, _), segment):
        waiting = in_thread(exchange, ann, [smashed(server.run)])
        assert waits(waiting, 0.5)
        segment.send(zeros(1))
        waiting.result(timeout=SOON_S)
        assert segment.finish() == []


@pytest.mark.parametrize("quorum", [0, 2])
@BOTH
def test_with_a_round_timeout_a_silent_client_is_lost(learning: str, quorum: int, tmp_path: Path) -> None:
    run = ushape(learning, clients=3, quorum=quorum, round_timeout=0.5)
    with three(run, tmp_path) as (server, (ann, bob, cid), segment):
        waiting = in_thread(exchange, ann, [smashed(run)])
        says = "client 2 (c) kept the others waiting for more than 0.5 s"
        if quorum:
            waiting.result(timeout=SOON_S)
            exchange(bob, [smashed(run)])
        else:
            assert says in str(ended(server))
            assert says in waiting.exception(timeout=SOON_S).details()  # type: ignore[union-attr]
        with refused(Code.FAILED_PRECONDITION, says):
            list(cid.membership)
        segment.send(zeros(1))
        refusal(segment, says, Code.FAILED_PRECONDITION)


def test_a_client_that_does_not_read_its_output_is_lost_too(tmp_path: Path) -> None:
    """Flow control holds the output back: the service's thread stands in the sending of it."""
    run = ushape("dsl", image=(3, 64, 64), batch_size=64, clients=2, quorum=1, round_timeout=1.0)
    with serving(run, tmp_path) as server, member(server, "ann") as ann, member(server, "bob") as bob:
        mute = Exchange(ann, [smashed(run)])
        batch = unlabelled(pb.TrainRequest, 1, smashed(run, 4))
        spec, data = batch.batch, batch.data
        spec.activations.shape[0] = 64
        mute.send(pb.TrainRequest(batch=spec))
        mute.send(*[pb.TrainRequest(data=data)] * 16)
        wait_for(lambda: server.rounds.members()[0].lost)
        assert "kept the others waiting" in str(server.rounds.members()[0].lost)
        exchange(bob, [smashed(run, 2)])
        mute.send(None)


# ---------------------------------------------------------------- the server goes while the trainer waits


@BOTH
def test_a_server_that_is_stopped_while_it_waits_for_a_gradient_says_so(
    learning: str, tmp_path: Path
) -> None:
    run = ushape(learning)
    with serving(run, tmp_path) as server:
        connection, _ = connect(server)
        segment = connection.segment(Stretch(0, 1, 2, 16), spec_of(run), build_method(run), 2)
        u = in_thread(segment, smashed(run)).result(timeout=SOON_S)
        in_thread(server.stop, ClosedError("the server was stopped (Ctrl-C)")).result(timeout=SOON_S)
        server._thread.join(SOON_S)
        assert not server._thread.is_alive()
        wait_for(lambda: connection._over is not None)

        def go_on() -> None:
            segment(torch.zeros_like(u))
            segment(smashed(run))

        assert "the server was stopped (Ctrl-C)" in str(told(in_thread(go_on)))
        connection.close()


def test_a_call_that_owes_a_gradient_ends_when_the_server_stops(client: Ordinary, server: Server) -> None:
    segment = Exchange(client, [smashed(client.run)])
    segment.output()
    stopped = in_thread(server.stop, ClosedError("enough"))
    error: Any = in_thread(lambda: next(segment.call)).exception(timeout=SOON_S)
    assert error.code() in (Code.UNAVAILABLE, Code.CANCELLED, Code.FAILED_PRECONDITION)
    assert stopped.result(timeout=SOON_S) is None
    segment.send(None)


# ---------------------------------------------------------------- both sides of the wait, at once


def test_who_fails_a_wait_twice_at_once_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the question whether it is done and the answer the other side may have been faster."""
    tail = ThroughTail()
    tail.fail(ClosedError("first"))
    monkeypatch.setattr(Future, "done", lambda _: False)
    tail.fail(ClosedError("second"))
    with pytest.raises(ClosedError, match="first"):
        tail.output.result(timeout=0)


def test_a_wait_that_has_failed_before_it_began_is_told_why() -> None:
    tail = ThroughTail()
    tail.fail(ClosedError("gone"))
    with pytest.raises(ClosedError, match="gone"):
        tail(torch.zeros(1))
    with pytest.raises(ClosedError, match="gone"):
        tail.give(torch.zeros(1))


@pytest.mark.parametrize("by", ["lose", "close"])
def test_what_ends_a_lane_ends_the_wait_of_the_trainer_for_it(by: str) -> None:
    inbox = Inbox(2, 4, fixed_order=False)
    jobs = [Job(c, arrived(torch.zeros(1, 1), torch.zeros(0)), 0.0) for c in (0, 1)]
    for job in jobs:
        inbox.put(job)
    assert next(iter(inbox)) == [jobs[0]], "and the other one is of the same tick"
    waiting = in_thread(jobs[0].through_tail, torch.zeros(1))
    assert waits(waiting)
    if by == "close":
        inbox.close(ClosedError("over"))
        assert isinstance(jobs[1].answer.exception(timeout=0), ClosedError)
    else:
        inbox.lose(1, ClosedError("another"))
        assert waits(waiting)
        assert isinstance(jobs[1].through_tail.gradient.exception(timeout=0), ClosedError)
        inbox.lose(0, ClosedError("over"))
    assert "over" in str(told(waiting))


# ---------------------------------------------------------------- the server talks nonsense


class Patient(Pretender):
    """Answers each of the client's frames with one of these, and reads on before the next."""

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)  # the opening
        for answer in self._answers:
            next(requests)
            yield answer if isinstance(answer, bytes) else answer.SerializeToString()


def output(
    sequence: int = 1, shape: Sequence[int] = (8, *OUTPUT), dtype: Any = pb.DTYPE_FLOAT32, fill: float = 0.0
) -> pb.TrainResponse:
    spec = pb.TensorSpec(dtype=dtype, shape=shape)
    data = torch.full([max(0, side) for side in shape], fill).numpy().tobytes()
    return pb.TrainResponse(output=pb.Output(sequence=sequence, output=spec), data=data)


@contextlib.contextmanager
def pretending(answers: Sequence[Any], learning: str = "csl") -> Iterator[tuple[Run, Connection]]:
    run = ushape(learning)
    pretender = Patient(run, answers)
    connection = Connection(f"127.0.0.1:{pretender.port}", Traffic(), Clock())
    try:
        connection.join("ann", patience=SOON_S)
        yield run, connection
    finally:
        connection.close()
        pretender.stop()


NO_OUTPUT: dict[str, tuple[Any, str]] = {
    "of another shape": (output(shape=(8, 64, 4, 1)), "output: shape [8, 64, 4, 1]; the run needs"),
    "of fewer samples": (output(shape=(7, *OUTPUT)), "output: shape"),
    "of a negative shape": (output(shape=(-8, *OUTPUT)), "output: shape"),
    "of another type": (output(dtype=pb.DTYPE_INT64), "output: dtype DTYPE_INT64"),
    "not a number": (output(fill=math.nan), "the output of batch 1: NaN or infinite"),
    "infinite": (output(fill=math.inf), "the output of batch 1: NaN or infinite"),
    "for a batch to come": (output(2), "the output of batch 2 came; that of batch 1 was due"),
    "for no batch": (output(0), "the output of batch 0 came"),
    "cut short": (pb.TrainResponse(output=output().output, data=b"abc"), "the stream ended"),
    "too long": (pb.TrainResponse(output=output().output, data=bytes(9000)), "has more than"),
    "a gradient": (gradient(), "expected the beginning of a frame (output), got gradient"),
    "without a head": (pb.TrainResponse(of_output=True, data=b"abc"), "(output), got only data"),
    "malformed": (b"\xff\xff", "a message"),
}
NO_GRADIENT: dict[str, tuple[Any, str]] = {
    "an output": (output(), "expected the beginning of a frame (gradient), got output"),
    "of the output's shape": (gradient(shape=(8, *OUTPUT)), "gradient: shape"),
    "not a number": (gradient(fill=math.nan), "the gradient of batch 1: NaN or infinite"),
    "for a batch to come": (gradient(2), "the gradient of batch 2 came; that of batch 1 was due"),
    "none": (pb.TrainResponse(gradient=pb.Gradient(sequence=1)), "has no gradient"),
    "malformed": (b"\xff\xff", "a message"),
}


@pytest.mark.parametrize("what", NO_OUTPUT)
def test_an_output_that_cannot_be_ends_the_client_with_a_wire_error(what: str) -> None:
    answer, says = NO_OUTPUT[what]
    with pretending([answer]) as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        error = told(in_thread(segment, smashed(run)))
        assert isinstance(error, WireError)
        assert says in str(error)


@pytest.mark.parametrize("what", NO_GRADIENT)
def test_a_gradient_after_an_output_that_cannot_be_does_too(what: str) -> None:
    answer, says = NO_GRADIENT[what]
    with pretending([output(), answer]) as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        u = in_thread(segment, smashed(run)).result(timeout=SOON_S)
        error = told(in_thread(segment, torch.zeros_like(u)))
        assert isinstance(error, WireError)
        assert says in str(error)


@pytest.mark.parametrize("answers", [[], [output()]])
def test_a_server_that_closes_the_stream_in_an_exchange_ends_the_client(answers: Sequence[Any]) -> None:
    with pretending(answers) as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)

        def exchanged() -> None:
            u = segment(smashed(run))
            assert u is not None
            segment(torch.zeros_like(u))

        error = told(in_thread(exchanged))
        assert isinstance(error, ClosedError)
        assert "the server closed the stream" in str(error)


def test_a_gradient_that_nobody_waits_for_ends_the_client() -> None:
    with pretending([output(), gradient()], "dsl") as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        u = in_thread(segment, smashed(run)).result(timeout=SOON_S)
        assert segment(torch.zeros_like(u)) is None
        segment.finish()
        assert "answered a batch that was not sent" in str(told(in_thread(connection.settle)))


@pytest.mark.parametrize("answers", [[output(fill=math.nan)], [output(), gradient(fill=math.nan)]])
def test_a_client_that_was_sent_nonsense_in_an_exchange_has_not_learned_from_it(
    answers: Sequence[Any],
) -> None:
    with pretending(answers) as (run, connection):
        part = client_part(run, build_method(run), build(run), CPU)
        learned = {name: t.clone() for name, t in state_of(part).items() if "bn" not in name}
        trainer = Trainer(run, 0, build_method(run), part, connection, spec_of(run), Clock())
        data = Batches(run, 0, 8)
        assert isinstance(told(in_thread(trainer.train, data, data)), WireError)
        ours = state_of(part)
        for name, tensor in learned.items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(ours[name], tensor), name


def test_no_thread_is_left_waiting_for_a_gradient(tmp_path: Path) -> None:
    with serving(ushape(), tmp_path) as server, member(server) as client:
        segment = Exchange(client, [smashed(server.run)])
        segment.output()
        segment.send(None)
        with refused(Code.INVALID_ARGUMENT):
            list(segment.call)
    server._thread.join(SOON_S)
    assert not [t for t in threading.enumerate() if t.name == "trainer" and t is server._thread]
