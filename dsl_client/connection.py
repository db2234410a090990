"""The client's connection: its membership of the run, and the calls that a member makes."""

import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import grpc

from common import tls
from common.errors import (
    ClosedError,
    ConfigError,
    DigestError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    WireError,
)
from common.meter import Clock, Traffic
from common.methods.base import Method, Tail
from common.parts import Spec, State
from common.run import Run
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.options import SLACK_BYTES, client_options
from common.wire.pieces import PIECE_BYTES, Piece
from dsl_client.delivery import Delivery
from dsl_client.memory import Memory
from dsl_client.stream import Call, Examination, Flow, Outgoing, Segment, Stretch, following, telling, told

ANSWER_S = 30.0  # for Join's and Leave's answer, once connected
WORD_S = 1.0  # for the server's word on why it is not there any more
PREFLIGHT_S = 1.0  # how often it is asked why there is no connection yet
LONGEST_PAUSE_S = 2.0  # from one attempt to come back to the next
MOVES = 4  # from one process of the server to the next, until a client has its place
FRUITLESS = 8  # times that a client comes back at least, and nothing gets through, until it gives up

T = TypeVar("T")
Idle = Callable[[], AbstractContextManager[None]]  # what is entered while a client waits


class Connection:
    """`target`: host:port. Nothing is sent before `join`.

    channel: one that it shares with others of this process; who made it closes it. In a run that lasts it
    outlives its memberships: `come_back` begins the next one.
    """

    def __init__(
        self,
        target: str,
        traffic: Traffic,
        clock: Clock,
        credentials: tls.Credentials | None = None,
        memory: Memory | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._target, self._traffic, self._clock = target, traffic, clock
        self._shared = channel
        self._credentials, self.memory = credentials, memory or Memory()
        self.flow = Flow()
        self._segments: list[Segment] = []
        self._examination: Examination | None = None  # the last one
        self._delivery: Delivery | None = None
        self._leaving = self._closed = self._lasting = False
        self._over: SplitLearningError | None = None
        self._membership: Any = None  # the call
        self._channels: list[grpc.Channel] = []  # the last one is used; closing one under a call is an error
        self.session, self.generation, self._client = "", 0, -1
        self._received = 0  # of this client's batches, when it last joined
        self._fruitless, self._got_through_at = 0, 0.0  # times that it came back since anything got through
        self._patience = 0.0
        self._returning, self._changing = threading.Lock(), threading.Lock()
        self._open()

    def join(self, name: str, patience: float, takeover: bool = False) -> pb.Welcome:
        """Waits up to `patience` seconds for the server. Raises RefusedError or ClosedError."""
        self._name, self._patience = name, patience
        if self.memory.run_id:  # it is in the middle of a run, whose server may be about to come back
            return self._join_again(takeover)
        end = time.monotonic() + patience
        try:
            return self._join(takeover)
        except RefusedError:
            raise
        except ClosedError:  # so may one be that went away while it was asked
            if time.monotonic() >= end:
                raise
        return self._join_again(takeover)

    def begin(self, run: Run, method: Method) -> None:
        """Before anything is sent: whether the run lasts, and so what is kept."""
        self._lasting = run.lasts
        if run.lasts and method.one_way and method.tail is not Tail.ALL:
            spool = self.memory.spool(run.spool_bytes)
            self._delivery = Delivery(self, spool, run.outbox, self._clock, self.flow, self._received)

    def come_back(self, error: SplitLearningError, generation: int) -> int:
        """Begins the next membership, if this error ended the one of that generation; the number of the last
        batch that the server has. Raises the error where coming back is of no use."""
        with self._returning:
            if not self._lasting or self._closed or not is_passing(error):
                raise error
            if generation == self.generation:
                self._fruitless += 1
                fruitless_s = time.monotonic() - self._got_through_at
                if self._fruitless > FRUITLESS and fruitless_s > self._patience:
                    raise error
                self._drop()
                self._join_again()
            return self._received

    def _join_again(self, takeover: bool = False) -> pb.Welcome:
        """Within the patience; a little later each time, and no two clients at the same time."""
        end, pause = time.monotonic() + self._patience, 0.1
        while True:
            try:
                if own := self._credentials:  # they may have been renewed meanwhile
                    self._credentials = tls.Credentials.read(own.folder, own.end)
                    self._open()
                return self._join(takeover)
            except RefusedError:
                raise
            except (ClosedError, ConfigError):  # certificates that are just being renewed, too
                if time.monotonic() >= end:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _join(self, takeover: bool) -> pb.Welcome:
        """At the server's address, or where that sends it."""
        if self._at != self._target:
            self._open()
        for _ in range(MOVES):
            answered = self._ask_in(takeover)
            if isinstance(answered, pb.Welcome):
                return answered
            if not re.fullmatch(r"[^\s]{1,255}:[0-9]{1,5}", answered.address):
                raise WireError(
                    f"the server sends this client to {answered.address[:64]!r}, which is no host:port"
                )
            self._open(answered.address)
        raise RefusedError(
            f"the server at {self._target} sent this client on {MOVES} times: its ranks disagree"
        )

    def _ask_in(self, takeover: bool) -> pb.Welcome | pb.Moved:
        """The welcome; or where to ask."""
        wait_for(self._channels[-1], self._at, self._credentials, self._patience)
        memory = self.memory
        request = pb.JoinRequest(
            oldest_version=rpc.VERSION,
            newest_version=rpc.VERSION,
            name=self._name,
            codecs=codec.CODEC_NAMES,
            identity=memory.identity,
            run_id=memory.run_id,
            durable=memory.durable,
            session=self.session,
            takeover=takeover,
        )
        membership = self._calls[rpc.JOIN](request)
        late = threading.Timer(ANSWER_S, membership.cancel)  # a deadline would end the membership too
        late.start()
        try:
            with telling():
                answer = following(membership)
        finally:
            late.cancel()
        if answer.WhichOneof("message") == "moved":
            moved: pb.Moved = answer.moved
            return moved
        welcome: pb.Welcome = answer.welcome
        if welcome.version != rpc.VERSION:
            raise WireError(f"the server speaks protocol version {welcome.version}, not {rpc.VERSION}")
        memory.belongs_to(welcome.run_id)
        if welcome.received > self._received:
            self._got_through()
        with self._changing:
            self._over, self._membership = None, membership
            self.session, self._client, self._received = welcome.session, welcome.client, welcome.received
            self.generation += 1
        if self._delivery:
            self._delivery.resume(welcome.received)
        watch = threading.Thread(
            target=self._watch, args=[membership, self.generation], name="membership", daemon=True
        )
        watch.start()
        return welcome

    @property
    def received(self) -> int:
        """The number of this client's last batch that the server had when it last joined."""
        return self._received

    def start_segment(self) -> Call:
        """What starts a one-way call of the present membership."""
        start: Call = self._calls[rpc.STREAM_ACTIVATIONS].future
        return start

    def segment(
        self, stretch: Stretch, spec: BatchSpec, method: Method, depth: int, place: int = 0, before: int = 0
    ) -> Segment:
        """Opens a segment: of a stretch what is left of it after `place` batches of `before` samples. Waits
        as `catch_up` does."""
        if self._delivery:
            return Segment(
                self._delivery.stream(stretch), stretch, self._client, spec, method, self._clock, place
            )
        self.check_open()
        self.catch_up()
        kind = pb.StreamActivationsRequest if method.one_way else pb.TrainRequest
        start = self.start_segment() if method.one_way else self._calls[rpc.TRAIN]
        opening = Piece(kind(segment=stretch.opening(self.session, place, before)))
        outgoing = Outgoing(start, opening, depth, self._clock, self.flow, seals=self._lasting)
        segment = Segment(outgoing, stretch, self._client, spec, method, self._clock, place)
        self._segments.append(segment)
        if self._over:  # meanwhile; whoever ended it did not see this segment
            segment.fail(self._over)
        return segment

    def catch_up(self) -> None:
        """Waits for the receipt of the segment before the last, and for no other."""
        while len(self._segments) > 1:
            self._segments.pop(0).receipt()

    def evaluation(self, epoch: int, after_sequence: int, spec: BatchSpec, depth: int) -> Examination:
        """Opens an evaluation of the network as it is after this client's batch of that number."""
        self.check_open()
        opening = pb.Evaluation(session=self.session, epoch=epoch, after_sequence=after_sequence)
        self._examination = Examination(
            self._calls[rpc.EVALUATE], opening, self._client, spec, depth, self._clock, self.flow
        )
        if self._over:
            self._examination.fail(self._over)
        return self._examination

    def sync(
        self,
        purpose: pb.SyncPurpose,
        epoch: int,
        state: State,
        samples: int,
        specs: dict[str, Spec],
        idle: Idle = nullcontext,
    ) -> State:
        """Gives a part, or none, and gets one, or none: see SyncPurpose. Waits for the other clients; idle:
        entered for that, when gRPC has taken the part."""
        self.check_open()
        head = pb.Weights(session=self.session, epoch=epoch, purpose=purpose, samples=samples)
        taken = threading.Event()
        with telling(), self._clock("wait"):
            pieces = codec.pack_weights(pb.SyncWeightsRequest, head, state)
            responses = self._calls[rpc.SYNC_WEIGHTS](_until_taken(pieces, taken))
            if responses.add_callback(taken.set):  # else it is over already
                taken.wait()
        with telling(), idle(), self._clock("wait"):
            first = following(responses)
            return codec.unpack_weights(first, map(rpc.judged, responses), specs)[1]

    def settle(self) -> None:
        """Waits until the server has trained on all that was sent."""
        while self._segments:
            self._segments.pop(0).receipt()
        if self._delivery:
            self._delivery.settle()
        self._got_through()

    def describe(self, class_names: Sequence[str]) -> None:
        """Tells the server what this client's classes are called. Raises RefusedError where the run's have
        other names."""
        while True:
            generation = self.generation
            try:
                self.check_open()
                request = pb.DescribeRequest(session=self.session, class_names=class_names)
                with telling():
                    self._calls[rpc.DESCRIBE](request, timeout=ANSWER_S)
                return
            except ClosedError as error:
                self.come_back(error, generation)

    def keep(self, last: int) -> None:
        """Waits until the batches up to this number will be delivered whatever happens to this process."""
        if self._delivery:
            self._delivery.kept(last)

    def leave(self, measurements: pb.Measurements) -> None:
        """Says goodbye, once all is settled. In a run that lasts, as often as it takes to be heard."""
        while True:
            generation = self.generation
            try:
                self.settle()
                self._leaving = True
                request = pb.LeaveRequest(session=self.session, measurements=measurements)
                with telling():
                    self._calls[rpc.LEAVE](request, timeout=ANSWER_S)
                return
            except ClosedError as error:
                self._leaving = False
                try:
                    self.come_back(error, generation)
                except RefusedError as refused:
                    if says_left(refused):
                        return  # it was heard, and its answer was lost
                    raise

    def _got_through(self) -> None:
        self._fruitless, self._got_through_at = 0, time.monotonic()

    def close(self, failure: str = "") -> None:
        """Ends the membership. A failure is told to the server if it is still there."""
        if failure and self.session and not self._over:
            try:
                request = pb.LeaveRequest(session=self.session, failure=failure)
                self._calls[rpc.LEAVE](request, timeout=2)
            except grpc.RpcError:
                pass  # it has gone, or does not know us: there is no one to tell
        self._closed = True
        reason = ClosedError(failure or "this client has left the run")
        for segment in self._segments:
            segment.fail(reason)
        if self._delivery:
            self._delivery.close(reason)
        if self._membership:
            self._membership.cancel()
        for channel in self._channels:
            if channel is not self._shared:
                channel.close()

    def why(self, error: SplitLearningError) -> SplitLearningError:
        """What ended the membership, where a call of it has found no more than that nobody is there: what the
        server said of it may come a moment later."""
        end = time.monotonic() + WORD_S
        while type(error) is ClosedError and not self._lasting and time.monotonic() < end:
            if self._over:
                return self._over
            time.sleep(0.01)
        return error

    def check_open(self) -> None:
        """Raises why the membership is over, if it is."""
        if self._over:
            raise self._over

    def _open(self, address: str = "") -> None:
        self._at = address or self._target
        shared = None if address else self._shared
        self._channels.append(shared or channel_to(self._at, self._credentials))
        self._calls = calls_by(self._channels[-1], rpc.RPCS, self._traffic, self._clock)

    def _drop(self) -> None:
        """What is left of a membership that is over."""
        over = self._over or ClosedError("this client joins anew")
        for segment in self._segments:
            segment.fail(over)
        self._segments.clear()
        if self._membership:
            self._membership.cancel()

    def _watch(self, membership: Any, generation: int) -> None:
        try:
            for told_ in membership:
                durable = rpc.judged(told_).durable
                if self.memory.throw_away(durable.sequence):  # each membership begins with one
                    self._got_through()
            over: SplitLearningError = ClosedError("the server ended this client's membership")
        except grpc.RpcError as error:
            over = told(error)
        except SplitLearningError as error:
            over = error
        except OSError as error:
            over = RefusedError(f"this client cannot write its --state: {error.strerror}")
        with self._changing:
            if self._leaving or generation != self.generation:
                return
            self._over = over
        for segment in list(self._segments):
            segment.fail(over)
        if self._examination:
            self._examination.fail(over)
        if self._delivery and not (self._lasting and is_passing(over)):
            self._delivery.close(over)


def says_left(refused: RefusedError) -> bool:
    """Whether the server refuses a client because it has trained to the end."""
    return "has left" in str(refused)


def is_passing(error: SplitLearningError) -> bool:
    """Whether who comes back may find it gone."""
    return isinstance(error, ClosedError | SequenceError | DigestError) and not isinstance(
        error, RefusedError
    )


def wait_for(
    channel: grpc.Channel, target: str, credentials: tls.Credentials | None, patience: float
) -> None:
    """Until the server is there. Raises ClosedError when it does not come, and IdentityError as soon as it is
    certain that waiting is of no use."""
    end = time.monotonic() + patience
    while True:
        # Asked anew each time, since each asks once: what came may be gone already.
        ready = grpc.channel_ready_future(channel)
        try:
            ready.result(min(PREFLIGHT_S, max(0.0, end - time.monotonic())))
            return
        except grpc.FutureTimeoutError:
            ready.cancel()
            tls.preflight(target, credentials)
        if time.monotonic() >= end:
            raise ClosedError(
                f"no server at {target} within {patience:g} s; is dsl-server running there and the port "
                "open? --patience waits longer"
            )


def _until_taken(items: Iterable[T], taken: threading.Event) -> Iterator[T]:
    """The same items; gRPC asks for the next one when it has taken this one."""
    yield from items
    taken.set()


def calls_by(
    channel: grpc.Channel, rpcs: Iterable[rpc.Rpc], traffic: Traffic, clock: Clock
) -> dict[rpc.Rpc, Any]:
    """What makes each of these calls over the channel, metered."""
    calls = {}
    for which in rpcs:
        kind = "stream" if which.requests_stream else "unary"
        kind += "_stream" if which.responses_stream else "_unary"
        write = rpc.writer(which.request, which.requests_in_pieces)
        read = rpc.reader(which.response, which.responses_in_pieces)
        calls[which] = getattr(channel, kind)(
            which.path,
            request_serializer=traffic.writing(which, "up", clock.function("encode", write)),
            response_deserializer=traffic.reading(which, "down", read),
        )
    return calls


def channel_to(target: str, credentials: tls.Credentials | None) -> grpc.Channel:
    options = client_options(2 * PIECE_BYTES + SLACK_BYTES)
    if credentials is None:
        return grpc.insecure_channel(target, options)
    shown = (credentials.authority, credentials.key, credentials.certificate)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*shown), options)
