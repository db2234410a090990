"""C16, C18: a server that is not one of ours. Its client ends with one line, unlearned."""

import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from common.errors import ConfigError, SplitLearningError, WireError
from common.meter import Clock, Traffic
from common.methods import build_method
from common.methods.base import ClientPart
from common.nets.cut import build
from common.parts import client_part, state_of
from common.run import Run
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import encode
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_client.trainer import Trainer
from tests.faults.site import MIB, SHAPE, SOON_S, averaged, same
from tests.federation import CPU, Batches, small_run, spec_of, train
from tests.memory import grows_by_less_than
from tests.threads import POLLED, in_thread, wait_for

if sys.version_info >= (3, 14):
    pass
else:
    pass

pytestmark = pytest.mark.timeout(60)

Answer = Callable[[Iterator[bytes]], Iterable[bytes]]


class Malicious:
    """A server that welcomes one client, tells it `then` what it likes, and answers its other calls so."""

    def __init__(
        self, run: Run, welcome: bytes | None = None, then: Sequence[Any] = (), **answers: Answer
    ) -> None:
        self._run, self._answers, self._over = run, answers, threading.Event()
        greeting = pb.Welcome(version=rpc.VERSION, run=run.to_json(), client=0, session="s")
        self._welcome = welcome or pb.JoinResponse(welcome=greeting).SerializeToString()
        self._then = then
        handlers: dict[str, Any] = {
            which.name: grpc.stream_stream_rpc_method_handler(self._serve(which)) for which in rpc.RPCS
        }
        self._server = grpc.server(ThreadPoolExecutor(6), options=[("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpc.SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._over.set()
        self._server.stop(grace=None).wait()

    def _serve(self, which: rpc.Rpc) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            if which is rpc.JOIN:
                yield self._welcome
                yield from (message.SerializeToString() for message in self._then)
                self._over.wait(20)
            elif answer := self._answers.get(which.name):
                yield from itertools.takewhile(lambda _: context.is_active(), answer(requests))
            elif which is rpc.LEAVE:
                yield b""

        return serve


@contextlib.contextmanager
def malicious(run: Run, **answers: Answer) -> Iterator[Connection]:
    server = Malicious(run, None, **answers)
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
    try:
        connection.join("ann", patience=SOON_S)
        yield connection
    finally:
        connection.close()
        server.stop()


def after(requests: int, *answers: Any) -> Answer:
    """Reads so many requests, then gives these answers."""

    def answer(incoming: Iterator[bytes]) -> Iterator[bytes]:
        list(itertools.islice(incoming, requests))
        for message in answers:
            yield message if isinstance(message, bytes) else message.SerializeToString()

    return answer


def endless(requests: int, message: Any) -> Answer:
    def answer(incoming: Iterator[bytes]) -> Iterator[bytes]:
        list(itertools.islice(incoming, requests))
        raw = message.SerializeToString()
        while True:
            yield raw

    return answer


def gradient(
    sequence: int = 1, shape: Sequence[int] = SHAPE, dtype: Any = pb.DTYPE_FLOAT32, fill: float = 0.0
) -> pb.TrainResponse:
    spec = pb.TensorSpec(dtype=dtype, shape=shape)
    data = torch.full([max(0, side) for side in shape], fill).numpy().tobytes()
    return pb.TrainResponse(gradient=pb.Gradient(sequence=sequence, gradient=spec), data=data)


def headless(data: bytes) -> pb.TrainResponse:
    """A gradient's head with other data than it says."""
    return pb.TrainResponse(gradient=gradient().gradient, data=data)


def told(client: Future[Any]) -> SplitLearningError:
    """What ended this client, which must be an error of ours, of one line, in good time."""
    error = client.exception(timeout=SOON_S)
    assert isinstance(error, SplitLearningError), error
    assert "\n" not in str(error)
    return error


def learned(part: ClientPart) -> dict[str, Tensor]:
    """What a step changes when its gradient has come; statistics are of what went forward."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {name: t.clone() for name, t in state_of(part).items() if not name.endswith(statistics)}


def trains(run: Run, connection: Connection) -> tuple[ClientPart, Future[Any]]:
    """A part of this run, and its training meanwhile."""
    part = client_part(run, build_method(run), build(run), CPU)
    trainer = Trainer(run, 0, build_method(run), part, connection, spec_of(run), Clock())
    data = Batches(run, 0, 8)
    return part, in_thread(trainer.train, data, data)


def ends_unlearned(run: Run, **answers: Answer) -> SplitLearningError:
    """What ends a client of this server before its first step was made."""
    with malicious(run, **answers) as connection:
        before = learned(client_part(run, build_method(run), build(run), CPU))
        part, client = trains(run, connection)
        error = told(client)
        assert same(learned(part), before), "it has learned nothing from that"
    return error


NONSENSE: dict[str, tuple[list[Any], str]] = {
    "of another shape": ([gradient(shape=(8, 16, 4, 16))], "gradient: shape"),
    "of fewer samples": ([gradient(shape=(7, 16, 8, 8))], "gradient: shape"),
    "of a negative shape": ([gradient(shape=(-8, 16, 8, 8))], "gradient: shape"),
    "of a terabyte": ([pb.TrainResponse(gradient=gradient(shape=(0, 2**28)).gradient)], "gradient: shape"),
    "of another type": ([gradient(dtype=pb.DTYPE_INT64)], "gradient: dtype DTYPE_INT64"),
    "not a number": ([gradient(fill=math.nan)], "the gradient of batch 1: NaN or infinite"),
    "infinite": ([gradient(fill=math.inf)], "the gradient of batch 1: NaN or infinite"),
    "for a batch to come": ([gradient(sequence=2)], "the gradient of batch 2 came; that of batch 1 was due"),
    "for no batch": ([gradient(sequence=0)], "the gradient of batch 0 came; that of batch 1 was due"),
    "cut short": ([headless(b"abc")], "the stream ended"),
    "too long": ([headless(bytes(40_000))], "has more than"),
    "no gradient": ([pb.TrainResponse(gradient=pb.Gradient(sequence=1))], "has no gradient"),
    "without a head": ([pb.TrainResponse(data=b"abc")], "expected the beginning of a frame (gradient)"),
    "an output": ([pb.TrainResponse(output=pb.Output(sequence=1))], "(gradient), got output"),
    "sparse": (
        [
            pb.TrainResponse(
                gradient=pb.Gradient(
                    sequence=1, gradient=gradient().gradient.gradient, payload=[pb.TensorSpec()]
                )
            )
        ],
        "in this run tensors travel as they are",
    ),
    "malformed": ([b"\xff\xff"], "a message"),
    "malformed later": ([headless(b""), b"\xff"], "a message"),
    "garbage": ([bytes(range(256)) * 8], "a message"),
    "another head in its midst": ([headless(b"abcd"), gradient()], "a new frame began"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_c18_a_gradient_that_cannot_be_ends_the_client_unlearned(what: str) -> None:
    answers, says = NONSENSE[what]
    error = ends_unlearned(small_run(method="csl"), Train=after(2, *answers))
    assert isinstance(error, WireError)
    assert says in str(error)


def test_c18_an_answer_above_the_limit_ends_the_client_unlearned() -> None:
    error = ends_unlearned(small_run(method="csl"), Train=after(2, headless(bytes(3 * MIB))))
    assert "larger than max" in str(error)


ENDLESS: dict[str, tuple[Any, str]] = {
    "data": (pb.TrainResponse(data=bytes(1000)), "expected the beginning of a frame"),
    "pieces of nothing": (pb.TrainResponse(of_output=True), "expected the beginning of a frame"),
    "heads": (headless(b"abcd"), "a new frame began"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_c18_an_answer_without_end_ends_the_client_unlearned(what: str) -> None:
    message, says = ENDLESS[what]
    assert says in str(ends_unlearned(small_run(method="csl"), Train=endless(2, message)))


def test_c18_a_gradient_that_is_followed_by_nothing_but_emptiness_ends_the_client_unlearned() -> None:
    def answer(incoming: Iterator[bytes]) -> Iterator[bytes]:
        list(itertools.islice(incoming, 2))
        yield headless(b"abcd").SerializeToString()
        yield from itertools.repeat(b"")

    error = ends_unlearned(small_run(method="csl"), Train=answer)
    assert str(error) == "a piece has neither head nor data"


def test_c18_gradients_without_end_take_no_memory_and_end_the_client() -> None:
    """The first is right, so it is learned from; the others answer batches that were not sent."""
    run = small_run(method="csl", epochs=1)
    with malicious(run, Train=endless(2, gradient())) as connection, grows_by_less_than(100 * MIB):
        assert "answered a batch that was not sent" in str(told(trains(run, connection)[1]))


@pytest.mark.parametrize("raw", [b"\xff\xff", bytes(range(256)), gradient(fill=1.0).SerializeToString()])
def test_c16_c18_whatever_a_dsl_client_is_answered_it_learns_nothing_from_it(raw: bytes) -> None:
    """A gradient is no receipt, so it is either refused or of no account."""
    run = small_run(method="dsl", epochs=1)

    def ended(receipt: bytes) -> dict[str, Tensor]:
        """The part after an epoch for which this was the receipt; what has ended it is an error of ours."""
        with malicious(run, StreamActivations=after(2, receipt), Evaluate=after(10, b"\xff")) as connection:
            part, client = trains(run, connection)
            assert isinstance(told(client), WireError)
            return learned(part)

    right = pb.StreamActivationsResponse(applied=1).SerializeToString()
    assert same(ended(raw), ended(right))


def score(**fields: Any) -> pb.EvaluateResponse:
    return pb.EvaluateResponse(score=pb.Score(**fields))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([b"\xff"], "a message"),
        ([pb.EvaluateResponse(data=b"abc")], "is not a score"),
        ([pb.EvaluateResponse(output=pb.Output(sequence=1))], "is not a score"),
        ([score(samples=8), score(samples=8)], "went on after the score"),
        ([], "closed the stream before it answered"),
    ],
)
def test_c18_a_score_that_is_none_ends_the_client(answers: Sequence[Any], says: str) -> None:
    run = small_run(method="csl", epochs=1)
    with malicious(run, Train=after(2, gradient()), Evaluate=after(3, *answers)) as connection:
        assert says in str(told(trains(run, connection)[1]))


def test_c18_an_average_that_cannot_be_leaves_the_client_with_its_own_weights() -> None:
    run = small_run(method="dsl", sync="average", epochs=1)
    state = averaged(run)
    name = "bottom.0.0.weight"
    wrong: dict[str, dict[str, Tensor]] = {
        f"{name}: NaN or infinite": state | {name: state[name] * math.nan},
        f"{name}: shape": state | {name: torch.zeros(1)},
        "'more' differs": state | {"more": torch.zeros(1)},
    }

    def ended(*frame: bytes) -> tuple[str, dict[str, Tensor]]:
        receipt = after(2, pb.StreamActivationsResponse(applied=1))
        with malicious(run, StreamActivations=receipt, SyncWeights=after(1, *frame)) as connection:
            part, client = trains(run, connection)
            return str(told(client)), learned(part)

    said, own = ended(b"\xff")
    assert "a message" in said
    for says, theirs in wrong.items():
        pieces = codec.pack_weights(pb.SyncWeightsResponse, pb.Weights(), theirs)
        said, kept = ended(*map(encode, pieces))
        assert says in said
        assert same(kept, own), "its own weights stay"


def welcomed(raw: bytes) -> SplitLearningError:
    """What a client says to such a welcome."""
    server = Malicious(small_run(), raw)
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
    try:

        def join() -> None:
            Run.from_json(connection.join("ann", patience=SOON_S).run)

        return told(in_thread(join))
    finally:
        connection.close()
        server.stop()


WELCOMES: dict[str, tuple[dict[str, Any], type[SplitLearningError]]] = {
    "of another version": ({"version": 99}, WireError),
    "with a run that is no JSON": ({"run": "{"}, ConfigError),
    "with a run that is a list": ({"run": "[]"}, ConfigError),
    "with a run that is a number": ({"run": "1e999"}, ConfigError),
    "with a run that is deep": ({"run": "[" * 100_000}, ConfigError),
    "with settings of another time": ({"run": '{"spy": true}'}, ConfigError),
    "with settings of another type": ({"run": '{"epochs": "many"}'}, ConfigError),
}


@pytest.mark.parametrize("what", WELCOMES)
def test_c18_a_welcome_that_cannot_be_ends_the_client(what: str) -> None:
    fields, kind = WELCOMES[what]
    greeting: dict[str, Any] = {"version": rpc.VERSION, "run": small_run().to_json(), "session": "s"} | fields
    assert isinstance(welcomed(pb.JoinResponse(welcome=pb.Welcome(**greeting)).SerializeToString()), kind)


@pytest.mark.parametrize("raw", [b"\xff\xff", b"\x0a\x05ab", bytes(range(256))])
def test_c18_a_malformed_welcome_ends_the_client(raw: bytes) -> None:
    assert isinstance(welcomed(raw), WireError)


def moved_to(address: str) -> bytes:
    return pb.JoinResponse(moved=pb.Moved(address=address)).SerializeToString()


@pytest.mark.parametrize("address", ["", "nowhere", "a b:50051", "host:port", f"{'x' * 300}:1"])
def test_c18_to_be_sent_to_what_is_no_address_ends_the_client(address: str) -> None:
    error = welcomed(moved_to(address))
    assert isinstance(error, WireError)
    assert "which is no host:port" in str(error)


@pytest.mark.filterwarnings(POLLED)
def test_c18_a_client_that_is_sent_in_a_circle_ends() -> None:
    server = Malicious(small_run())
    server._welcome = moved_to(f"127.0.0.1:{server.port}")
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock())
    try:
        error = told(in_thread(lambda: connection.join("ann", patience=SOON_S)))
    finally:
        connection.close()
        server.stop()
    assert f"the server at 127.0.0.1:{server.port} sent this client on 4 times" in str(error)


def test_c18_a_welcome_above_the_limit_ends_the_client() -> None:
    assert "larger than max" in str(welcomed(bytes(5 * MIB)))


def test_c18_a_batch_to_come_that_is_said_to_be_saved_ends_the_client_and_it_throws_nothing_away() -> None:
    run = small_run(checkpoint_every=60.0)
    saved = pb.JoinResponse(durable=pb.Durable(sequence=10**12))
    held, memory = threading.Event(), Memory()

    def reads_and_says_nothing(requests: Iterator[bytes]) -> Iterator[bytes]:
        list(requests)
        held.wait(SOON_S)
        yield b""

    server = Malicious(run, then=[saved], StreamActivations=reads_and_says_nothing)
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), memory=memory)
    memory.spool(run.spool_bytes)
    try:
        connection.join("ann", patience=SOON_S)
        wait_for(lambda: connection._over is not None)
        assert "says that it has batch 1000000000000 of this client" in str(connection._over)
        assert memory.durable == 0
    finally:
        held.set()
        connection.close()
        server.stop()


def test_c18_batches_to_come_that_the_server_says_it_has_are_not_left_out() -> None:
    run = small_run(checkpoint_every=60.0, epochs=1)
    greeting = pb.Welcome(version=rpc.VERSION, run=run.to_json(), session="s", received=3)
    server = Malicious(run, pb.JoinResponse(welcome=greeting).SerializeToString())
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), memory=Memory())
    data = Batches(run, 0, 8)
    try:
        client = connection.join("ann", patience=SOON_S).client
        error = told(in_thread(train, run, connection, client, data, data))
        assert "says that it has batch 3 of this client, which has made 0" in str(error)
    finally:
        connection.close()
        server.stop()
