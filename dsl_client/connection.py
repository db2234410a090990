"""The client's connection: its membership of the run, and the calls that a member makes."""

import threading
import time
from typing import Any

import grpc

from common import tls
from common.errors import ClosedError, SplitLearningError, WireError
from common.meter import Clock, Traffic
from common.methods.base import Method
from common.parts import Spec, State
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.options import SLACK_BYTES, client_options
from common.wire.pieces import PIECE_BYTES
from dsl_client.stream import Examination, Flow, Segment, following, telling, told

ANSWER_S = 30.0  # for Join's and Leave's answer, once connected
PREFLIGHT_S = 1.0  # how often it is asked why there is no connection yet


class Connection:
    """`target`: host:port. Nothing is sent before `join`."""

    def __init__(
        self, target: str, traffic: Traffic, clock: Clock, credentials: tls.Credentials | None = None
    ) -> None:
        self._channel = _channel(target, credentials)
        self._target, self._clock, self._credentials = target, clock, credentials
        self.flow = Flow()
        self._calls = {which: self._prepared(which, traffic) for which in rpc.RPCS}
        self._segments: list[Segment] = []
        self._examination: Examination | None = None  # the last one
        self._leaving = False
        self._over: SplitLearningError | None = None
        self._session, self._client = "", -1

    def join(self, name: str, patience: float) -> pb.Welcome:
        """Waits up to `patience` seconds for the server. Raises RefusedError or ClosedError."""
        self._connect(patience)
        request = pb.JoinRequest(
            oldest_version=rpc.VERSION, newest_version=rpc.VERSION, name=name, codecs=codec.CODEC_NAMES
        )
        membership = self._calls[rpc.JOIN](request)
        late = threading.Timer(ANSWER_S, membership.cancel)  # a deadline would end the membership too
        late.start()
        try:
            with telling():
                welcome: pb.Welcome = following(membership).welcome
        finally:
            late.cancel()
        if welcome.version != rpc.VERSION:
            raise WireError(f"the server speaks protocol version {welcome.version}, not {rpc.VERSION}")
        self._session, self._client = welcome.session, welcome.client
        threading.Thread(target=self._watch, args=[membership], name="membership", daemon=True).start()
        return welcome

    def segment(
        self,
        epoch: int,
        first_sequence: int,
        batches: int,
        samples: int,
        spec: BatchSpec,
        method: Method,
        depth: int,
        first_epoch: int = 0,
    ) -> Segment:
        """Opens a segment. Waits for the receipt of the one before the last, and for no other."""
        self.check_open()
        while len(self._segments) > 1:
            self._segments.pop(0).receipt()
        opening = pb.Segment(
            session=self._session,
            epoch=epoch,
            first_sequence=first_sequence,
            batches=batches,
            samples=samples,
            first_epoch=first_epoch,
        )
        start = self._calls[rpc.STREAM_ACTIVATIONS].future if method.one_way else self._calls[rpc.TRAIN]
        segment = Segment(start, opening, self._client, spec, method, depth, self._clock, self.flow)
        self._segments.append(segment)
        if self._over:  # meanwhile; whoever ended it did not see this segment
            segment.fail(self._over)
        return segment

    def evaluation(self, epoch: int, after_sequence: int, spec: BatchSpec, depth: int) -> Examination:
        """Opens an evaluation of the network as it is after this client's batch of that number."""
        self.check_open()
        opening = pb.Evaluation(session=self._session, epoch=epoch, after_sequence=after_sequence)
        self._examination = Examination(
            self._calls[rpc.EVALUATE], opening, self._client, spec, depth, self._clock, self.flow
        )
        if self._over:
            self._examination.fail(self._over)
        return self._examination

    def sync(
        self, purpose: pb.SyncPurpose, epoch: int, state: State, samples: int, specs: dict[str, Spec]
    ) -> State:
        """Gives a part, or none, and gets one, or none: see SyncPurpose. Waits for the other clients."""
        self.check_open()
        head = pb.Weights(session=self._session, epoch=epoch, purpose=purpose, samples=samples)
        with telling(), self._clock("wait"):
            responses = self._calls[rpc.SYNC_WEIGHTS](codec.pack_weights(pb.SyncWeightsRequest, head, state))
            first = following(responses)
            return codec.unpack_weights(first, map(rpc.judged, responses), specs)[1]

    def settle(self) -> None:
        """Waits until the server has trained on all that was sent."""
        while self._segments:
            self._segments.pop(0).receipt()

    def leave(self, measurements: pb.Measurements) -> None:
        """Says goodbye, once all is settled."""
        self.settle()
        self._leaving = True
        request = pb.LeaveRequest(session=self._session, measurements=measurements)
        with telling():
            self._calls[rpc.LEAVE](request, timeout=ANSWER_S)

    def close(self, failure: str = "") -> None:
        """Ends the membership. A failure is told to the server if it is still there."""
        if failure and self._session and not self._over:
            try:
                request = pb.LeaveRequest(session=self._session, failure=failure)
                self._calls[rpc.LEAVE](request, timeout=2)
            except grpc.RpcError:
                pass  # it has gone, or does not know us: there is no one to tell
        for segment in self._segments:
            segment.fail(ClosedError(failure or "this client has left the run"))
        self._channel.close()

    def _connect(self, patience: float) -> None:
        """Raises IdentityError as soon as it is certain that waiting is of no use."""
        end = time.monotonic() + patience
        while True:
            ready = grpc.channel_ready_future(self._channel)  # each asks once: what came may be gone already
            try:
                ready.result(min(PREFLIGHT_S, max(0.0, end - time.monotonic())))
                return
            except grpc.FutureTimeoutError:
                ready.cancel()
                tls.preflight(self._target, self._credentials)
            if time.monotonic() >= end:
                raise ClosedError(
                    f"no server at {self._target} within {patience:g} s; is dsl-server running there and the "
                    "port open? --patience waits longer"
                )

    def check_open(self) -> None:
        """Raises why the membership is over, if it is."""
        if self._over:
            raise self._over

    def _prepared(self, which: rpc.Rpc, traffic: Traffic) -> Any:
        kind = "stream" if which.requests_stream else "unary"
        kind += "_stream" if which.responses_stream else "_unary"
        write = rpc.writer(which.request, which.requests_in_pieces)
        read = rpc.reader(which.response, which.responses_in_pieces)
        return getattr(self._channel, kind)(
            which.path,
            request_serializer=traffic.writing(which, "up", self._clock.function("encode", write)),
            response_deserializer=traffic.reading(which, "down", read),
        )

    def _watch(self, membership: Any) -> None:
        try:
            for _ in membership:
                pass
            over: SplitLearningError = ClosedError("the server ended this client's membership")
        except grpc.RpcError as error:
            over = told(error)
        if not self._leaving:
            self._over = over
            for segment in list(self._segments):
                segment.fail(over)
            if self._examination:
                self._examination.fail(over)


def _channel(target: str, credentials: tls.Credentials | None) -> grpc.Channel:
    options = client_options(2 * PIECE_BYTES + SLACK_BYTES)
    if credentials is None:
        return grpc.insecure_channel(target, options)
    shown = (credentials.authority, credentials.key, credentials.certificate)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*shown), options)
