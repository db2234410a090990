"""Each test is named after a way in which the system could wait for ever, and does not.

A DSL client is told nothing back, so one that nobody wakes would train on air, or stand still. The
rule: whatever ends a run reaches every client, whatever it waits for, with the reason.
"""

import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from common.errors import ClosedError, FullError, SplitLearningError
from common.meter import Clock, Traffic
from common.methods import METHODS, build_method
from common.methods.base import Answer, Received, ServerPart, Smashed
from common.methods.hosting import Hosting
from common.run import Run
from common.wire import rpc
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece
from dsl_client.connection import Connection
from dsl_client.stream import Examination, Flow, Outgoing, Segment, Stretch
from dsl_server import service
from dsl_server.inbox import Errand, Job
from dsl_server.record import Record
from dsl_server.server import Server
from tests.federation import Batches, connect, serving, small_run, spec_of, train
from tests.ordinary import member, smashed
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(30)

SOON_S = 10.0  # ample for what should take a moment


@pytest.fixture(autouse=True)
def _no_answer_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that hangs in one test must not keep the test process from ending."""
    made: list[Job | Errand] = []

    def recording(kind: type[Any]) -> Callable[..., Any]:
        def make(*arguments: Any, **more: Any) -> Any:
            made.append(kind(*arguments, **more))
            return made[-1]

        return make

    monkeypatch.setattr(service, "Job", recording(Job))
    monkeypatch.setattr(service, "Errand", recording(Errand))
    yield
    for thread in threading.enumerate():
        if thread.name == "trainer":
            thread.join(5)  # what it still serves, it answers
    for item in made:
        if not item.answer.done():
            item.answer.set_exception(ClosedError("the test is over"))


def step_of(monkeypatch: pytest.MonkeyPatch, method: str, before: Callable[[int], None]) -> None:
    """Every step of the server begins with this, which is told the step's number, from 1."""
    ordinary, count = METHODS[method](), iter(range(1, 1_000_000))

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        before(next(count))
        return ordinary.server_step(part, group)

    changed = dataclasses.replace(ordinary, server_step=step)
    monkeypatch.setitem(METHODS, method, lambda: changed)


def failing_at(number: int) -> Callable[[int], None]:
    def before(step: int) -> None:
        if step == number:
            raise RuntimeError("out of luck")

    return before


def waiting_for(gate: threading.Event) -> Callable[[int], None]:
    def before(_: int) -> None:
        assert gate.wait(20)

    return before


def trains(server: Server, name: str, samples: int = 40) -> tuple[Connection, Future[Any]]:
    """A client of the run, training in a thread of its own."""
    ((connection, client),) = all_train(server, name, samples=samples)
    return connection, client


def all_train(server: Server, *names: str, samples: int = 40) -> list[tuple[Connection, Future[Any]]]:
    """Clients of the run, training in threads of their own once they are all in."""
    clients = []
    for connection, client in [connect(server, name) for name in names]:
        data, test = Batches(server.run, client, samples), Batches(server.run, 9, 20)
        clients.append((connection, in_thread(train, server.run, connection, client, data, test)))
    return clients


def told(client: Future[Any]) -> SplitLearningError:
    """What ended this client, which must be an error of ours."""
    error = client.exception(timeout=SOON_S)
    assert isinstance(error, SplitLearningError), error
    return error


def ended(server: Server) -> SplitLearningError:
    """What ended the run, as who waits for the server is told."""
    with pytest.raises(SplitLearningError) as caught:
        server.wait(timeout=SOON_S)
    return caught.value


# ---------------------------------------------------------------- the server's step fails


@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_step_that_fails_ends_every_client_with_the_reason(
    method: str, clients: int, fixed_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of(monkeypatch, method, failing_at(3))
    run = small_run(method=method, clients=clients, fixed_order=fixed_order, epochs=50)
    with serving(run, tmp_path) as server:
        everyone = [client for _, client in all_train(server, *"ab"[:clients])]
        for client in everyone:
            said = str(told(client))
            assert "out of luck" in said
            assert "the server's step on batch" in said
        assert "RuntimeError: out of luck" in str(ended(server))


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_the_batch_that_was_next_when_a_step_failed_is_not_forgotten(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fixed order both clients' batches are taken at once; the first one's step fails."""
    step_of(monkeypatch, method, failing_at(1))
    run = small_run(method=method, clients=2, fixed_order=True)
    with serving(run, tmp_path) as server, member(server) as ann, member(server) as bob:
        both = [in_thread(client.send, [smashed(run)]) for client in (ann, bob)]
        for each in both:
            error: Any = each.exception(timeout=SOON_S)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "out of luck" in error.details()


def test_a_client_that_waits_for_its_last_receipts_is_told_that_a_step_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def before(step: int) -> None:
        assert gate.wait(20)
        if step == 2:
            raise RuntimeError("out of luck")

    step_of(monkeypatch, "dsl", before)
    run = small_run(method="dsl", inbox=9, epochs=1)
    with serving(run, tmp_path) as server:
        connection, _ = connect(server)
        segment = connection.segment(Stretch(0, 1, 3, 24), spec_of(run), build_method(run), 9)
        for _ in range(3):
            segment(smashed(run))
        segment.finish()
        settled = in_thread(connection.settle)
        assert waits(settled)
        gate.set()
        assert "out of luck" in str(told(settled))
        connection.close()


def test_a_step_that_fails_after_its_client_left_is_not_taken_for_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client need not wait for its receipts before it says goodbye, though ours does."""
    gate = threading.Event()

    def before(step: int) -> None:
        assert gate.wait(20)
        if step == 2:
            raise RuntimeError("out of luck")

    step_of(monkeypatch, "dsl", before)
    with serving(small_run(method="dsl", inbox=9), tmp_path) as server, member(server) as client:
        sending = in_thread(client.stream, [smashed(server.run)] * 3)
        wait_for(lambda: server.rounds.members()[0].received.sequence == 3)
        client.leave()
        gate.set()
        assert "out of luck" in str(ended(server))
    assert isinstance(sending.exception(timeout=SOON_S), grpc.RpcError), "there is no receipt"


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = METHODS["csl"]()

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        answer = ordinary.server_step(part, group)
        return Answer(answer.loss * math.nan, answer.gradients)

    changed = dataclasses.replace(ordinary, server_step=step)
    monkeypatch.setitem(METHODS, "csl", lambda: changed)
    with serving(small_run(method="csl"), tmp_path) as server:
        _, client = trains(server, "ann")
        assert "the loss is nan; lower --lr" in str(told(client))
        assert "the loss is nan" in str(ended(server))


def test_a_scoring_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Hosting, "score", score)
    run = small_run(method="dsl", clients=2, epochs=1)
    with serving(run, tmp_path) as server:
        everyone = [client for _, client in all_train(server, "ann", "bob")]
        for client in everyone:
            assert "out of luck" in str(told(client))
        assert "out of luck" in str(ended(server))


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_count_that_fails_after_the_answers_are_out_ends_the_run(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Record, "trained", trained)
    with serving(small_run(method=method, clients=2, epochs=50), tmp_path) as server:
        everyone = [client for _, client in all_train(server, "ann", "bob")]
        for client in everyone:
            assert "out of luck" in str(told(client))
        assert "out of luck" in str(ended(server))


# ---------------------------------------------------------------- the server goes


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_server_that_is_stopped_tells_the_clients_that_train(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method, clients=2), tmp_path) as server:
        everyone = [client for _, client in all_train(server, "ann", "bob", samples=20_000)]
        wait_for(lambda: all(member.laid > 1 for member in server.rounds.members()))
        server.stop(ClosedError("the server was stopped (Ctrl-C)"))
        for client in everyone:
            assert "the server was stopped (Ctrl-C)" in str(told(client))
        assert "Ctrl-C" in str(ended(server))


def test_a_client_that_is_between_two_calls_is_told_why_the_server_went_too(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        connection, _ = connect(server)
        method, spec = build_method(server.run), spec_of(server.run)
        server.stop(ClosedError("the server was stopped (Ctrl-C)"))
        wait_for(lambda: connection._over is not None)
        for call in (
            lambda: connection.segment(Stretch(0, 1, 1, 8), spec, method, 1)(smashed(server.run)),
            lambda: score(connection.evaluation(0, 0, spec, 2), smashed(server.run)),
            lambda: connection.sync(pb.SYNC_PURPOSE_TAKE_TURN, 0, {}, 0, {}),
        ):
            assert "the server was stopped (Ctrl-C)" in str(told(in_thread(call)))
        connection.close()


def test_a_client_in_the_midst_of_an_evaluation_is_told_why_the_server_went_too(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        connection, _ = connect(server)
        examination = connection.evaluation(0, 0, spec_of(server.run), 2)
        examination.send(smashed(server.run))
        wait_for(lambda: server.traffic.by_kind()["up"]["evaluation"] > 0)
        server.stop(ClosedError("the server was stopped (Ctrl-C)"))
        assert "the server was stopped (Ctrl-C)" in str(
            told(in_thread(score, examination, smashed(server.run)))
        )
        connection.close()


def score(examination: Examination, batch: Smashed) -> None:
    for _ in range(20):
        examination.send(batch)
    examination.finish(None)


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_server_that_is_stopped_in_the_midst_of_a_step_lets_its_clients_go_at_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step_of(monkeypatch, method, waiting_for(gate))
    with serving(small_run(method=method, clients=2, epochs=1000), tmp_path) as server:
        everyone = [client for _, client in all_train(server, "ann", "bob")]
        wait_for(lambda: method == "csl" or all(m.laid for m in server.rounds.members()))
        stopped = in_thread(server.stop, ClosedError("enough"))
        try:
            for client in everyone:
                told(client)
        finally:
            gate.set()
        assert stopped.result(timeout=SOON_S) is None


def test_a_server_that_dies_without_a_word_ends_its_clients(tmp_path: Path) -> None:
    """As kill -9 would: its port is closed, nobody is told anything."""
    run = small_run(method="dsl", epochs=100_000)
    with serving(run, tmp_path) as server:
        _, client = trains(server, "ann")
        wait_for(lambda: server.record.samples_trained > 0)
        server._grpc.stop(grace=0)
        assert "the server went away" in str(told(client))


def test_no_server_is_waited_for_no_longer_than_patience_lasts() -> None:
    connection = Connection("127.0.0.1:1", Traffic(), Clock())
    with pytest.raises(ClosedError, match=r"no server at 127\.0\.0\.1:1 within 0\.2 s"):
        connection.join("ann", patience=0.2)
    connection.close()


def test_a_client_that_is_refused_leaves_nothing_running(tmp_path: Path) -> None:
    """A timer left behind would keep its process from ending for half a minute."""
    with serving(small_run(clients=1), tmp_path) as server:
        ann, _ = connect(server, "ann")
        before = set(threading.enumerate())
        eve = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
        with pytest.raises(FullError, match="'eve' is one too many"):
            eve.join("eve", patience=SOON_S)
        eve.close()
        left = set(threading.enumerate()) - before
        assert [thread for thread in left if isinstance(thread, threading.Timer)] == []
        ann.close()


# ---------------------------------------------------------------- another client goes


def gone(connection: Connection) -> None:
    """As a process that is killed: the connection is over, and not a word was said."""
    connection._channels[-1].close()


def test_a_client_that_vanishes_ends_the_one_that_waits_for_it_in_an_average(tmp_path: Path) -> None:
    with serving(small_run(clients=2, sync="average"), tmp_path) as server:
        vanishing, _ = connect(server, "ann")
        _, waiting = trains(server, "bob")
        assert waits(waiting, 0.3), "bob has given its part and waits for ann's"
        gone(vanishing)
        assert "client 0 (ann) went away before the end of the run" in str(told(waiting))
        assert "client 0 (ann) went away" in str(ended(server))


def test_a_client_that_vanishes_ends_the_one_that_waits_for_its_turn(tmp_path: Path) -> None:
    with serving(small_run(clients=2, sync="relay"), tmp_path) as server:
        vanishing, _ = connect(server, "ann")
        _, waiting = trains(server, "bob")
        assert waits(waiting)
        gone(vanishing)
        assert "client 0 (ann) went away" in str(told(waiting))


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_client_that_vanishes_ends_the_one_whose_batch_waits_for_its_turn(
    method: str, tmp_path: Path
) -> None:
    """In fixed order nothing is served while one client is silent."""
    with serving(small_run(method=method, clients=2, fixed_order=True), tmp_path) as server:
        vanishing, _ = connect(server, "ann")
        _, waiting = trains(server, "bob")
        assert waits(waiting)
        gone(vanishing)
        assert "client 0 (ann) went away" in str(told(waiting))


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_a_client_that_joined_and_never_sent_anything_ends_the_others_when_it_dies(
    method: str, tmp_path: Path
) -> None:
    with serving(small_run(method=method, clients=2, epochs=100_000), tmp_path) as server:
        silent, _ = connect(server, "ann")
        _, training = trains(server, "bob")
        wait_for(lambda: server.record.samples_trained > 0)
        gone(silent)
        assert "client 0 (ann) went away" in str(told(training))
        assert "client 0 (ann) went away" in str(ended(server))


def test_a_client_that_vanishes_in_the_midst_of_a_batch_ends_the_run(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server, member(server, "ann") as ann:
        messages: queue.Queue[Any] = queue.Queue()
        opening, frame = ann.segment(pb.StreamActivationsRequest, [smashed(server.run)])
        frame.data = frame.data[:1000]
        messages.put(opening)
        messages.put(frame)
        call = ann.stub.StreamActivations.future(iter(messages.get, None))
        assert not call.done()
        ann.close()
        assert "client 0 (ann) went away" in str(ended(server))
        messages.put(None)


def test_a_client_that_fails_tells_the_others_why(tmp_path: Path) -> None:
    with serving(small_run(clients=2, sync="average"), tmp_path) as server:
        failing, _ = connect(server, "ann")
        _, waiting = trains(server, "bob")
        assert waits(waiting)
        failing.close("its disk is full")
        for error in (told(waiting), ended(server)):
            assert "client 0 (ann) failed: 'its disk is full'" in str(error)


def test_who_has_left_in_order_keeps_no_one_from_going_on(tmp_path: Path) -> None:
    with serving(small_run(clients=2, fixed_order=True), tmp_path) as server:
        one, first = trains(server, "ann", samples=8)
        two, second = trains(server, "bob", samples=40)
        first.result(timeout=SOON_S)
        one.close()
        second.result(timeout=SOON_S)
        assert server.wait(timeout=SOON_S)
        two.close()


# ---------------------------------------------------------------- a call is over before anyone looked


def put_twice(outgoing: Outgoing) -> None:
    for _ in range(2):
        outgoing.put(iter([]))


def test_an_outbox_is_closed_even_if_its_call_was_over_from_the_start() -> None:
    """gRPC calls no callback of a call that has ended already."""
    channel = grpc.insecure_channel("127.0.0.1:1", [("grpc.enable_http_proxy", 0)])
    stream: Any = channel.stream_unary("/nowhere/Nothing", request_serializer=lambda _: b"")

    def start(requests: Iterator[Piece[Any]]) -> Any:
        call = stream.future(requests)
        call.exception(timeout=SOON_S)  # nobody is there: it fails at once
        return call

    outgoing = Outgoing(start, Piece(pb.StreamActivationsRequest()), 1, Clock(), Flow())
    second = in_thread(put_twice, outgoing)
    try:
        assert "the server went away" in str(told(second))
    finally:
        outgoing.fail(ClosedError("the test is over"))
        channel.close()


# ---------------------------------------------------------------- the link is slow


class Stuck:
    """A call that takes nothing."""

    def add_callback(self, _: Callable[[], None]) -> bool:
        return True


def stuck(run: Run, flow: Flow) -> Segment:
    """A segment with an outbox of one, of which nothing is ever taken."""
    stretch = Stretch(0, 1, 1, 8)
    opening = Piece(pb.StreamActivationsRequest(segment=stretch.opening("s")))
    outgoing = Outgoing(lambda _: Stuck(), opening, 1, Clock(), flow)
    return Segment(outgoing, stretch, 0, spec_of(run), build_method(run), Clock())


def test_batches_that_are_skipped_are_told_of_without_waiting() -> None:
    run, flow = small_run(method="dsl"), Flow()

    first, second = stuck(run, flow), stuck(run, flow)
    assert not first.full
    first(smashed(run))
    assert first.full
    assert second.full, "what the one before it has to send goes first"
    first.skip(smashed(run))
    in_thread(first.finish).result(timeout=SOON_S)


def test_an_outbox_that_is_closed_is_not_full_so_that_who_sends_is_told_why() -> None:
    run = small_run(method="dsl")
    segment = stuck(run, Flow())
    segment(smashed(run))
    assert segment.full
    segment.fail(ClosedError("the server went away"))
    assert not segment.full
    with pytest.raises(ClosedError, match="went away"):
        segment(smashed(run))


# ---------------------------------------------------------------- the server answers nonsense


class Pretender:
    """A server that welcomes one client, and answers its first batch with these messages."""

    def __init__(self, run: Run, answers: Sequence[Any], close: bool = True) -> None:
        self._run, self._answers, self._close = run, answers, close
        self._over = threading.Event()
        handlers: dict[str, Any] = {
            "Join": grpc.unary_stream_rpc_method_handler(self._join),
            "Train": grpc.stream_stream_rpc_method_handler(self._train),
            "Leave": grpc.unary_unary_rpc_method_handler(lambda *_: b""),
        }
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpc.SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._over.set()
        self._server.stop(grace=None).wait()

    def _join(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        welcome = pb.Welcome(version=1, run=self._run.to_json(), client=0, session="s")
        yield pb.JoinResponse(welcome=welcome).SerializeToString()
        self._over.wait(20)

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)  # the opening
        next(requests)  # the batch
        yield from (a if isinstance(a, bytes) else a.SerializeToString() for a in self._answers)


def gradient(
    sequence: int = 1, shape: Sequence[int] = (8, 16, 8, 8), dtype: Any = pb.DTYPE_FLOAT32, fill: float = 0.0
) -> pb.TrainResponse:
    spec = pb.TensorSpec(dtype=dtype, shape=shape)
    data = torch.full([max(0, side) for side in shape], fill).numpy().tobytes()
    return pb.TrainResponse(gradient=pb.Gradient(sequence=sequence, gradient=spec), data=data)


@contextlib.contextmanager
def pretending(answers: Sequence[Any]) -> Iterator[tuple[Run, Connection]]:
    run = small_run(method="csl")
    pretender = Pretender(run, answers)
    connection = Connection(f"127.0.0.1:{pretender.port}", Traffic(), Clock())
    try:
        assert Run.from_json(connection.join("ann", patience=SOON_S).run) == run
        yield run, connection
    finally:
        connection.close()
        pretender.stop()


def test_a_server_that_closes_the_stream_without_an_answer_ends_the_client() -> None:
    with pretending([]) as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        error = told(in_thread(segment, smashed(run)))
        assert "the server closed the stream before it answered" in str(error)


def test_an_answer_to_a_batch_that_was_not_sent_ends_the_client() -> None:
    with pretending([gradient(), gradient(sequence=2)]) as (run, connection):
        segment = connection.segment(Stretch(0, 1, 1, 8), spec_of(run), build_method(run), 2)
        assert segment(smashed(run)) is not None
        segment.finish()
        error = told(in_thread(connection.settle))
        assert "answered a batch that was not sent" in str(error)


def test_a_call_that_finds_nobody_waits_for_the_servers_word(tmp_path: Path) -> None:
    """A server that is stopped says why, and listens no more: either may reach a client first."""
    nobody = ClosedError("the server went away (UNAVAILABLE)")
    with serving(small_run(), tmp_path) as server:
        connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
        connection.join("ann", patience=10)
        word = in_thread(connection.why, nobody)
        assert waits(word, 0.3)
        server.rounds.close(ClosedError("somebody pressed Ctrl-C"))
        assert "somebody pressed Ctrl-C" in str(word.result(10))
        connection.close()
