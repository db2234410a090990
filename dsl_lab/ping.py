"""The calls of `dsl doctor`: health, and pings of any size, timed. A stranger's calls: no membership, no run.

The server's clock and the link are measured as NTP and ping do: by what a small message takes there and
back, and what a large one takes more.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import SplitLearningError
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from common.wire.options import SLACK_BYTES, client_options
from common.wire.pieces import PIECE_BYTES
from common.wire.rpc import PING

DEADLINE_S = 10.0  # of a call: what takes longer is called too slow
SMALL = 7  # pings without data, for the round trip and the clock
FIRST_BYTES = 1 << 14
LONG_S = 0.25  # a message that takes so long has shown the link's rate
WAY_BYTES, WAY_S = 6 * PIECE_BYTES, 1.5  # and of so many, or after so long, there is no further one


class CallError(SplitLearningError):
    """A call failed. code: gRPC's name of the status, such as UNAVAILABLE."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(details or code)
        self.code = code


@dataclass(frozen=True)
class Trip:
    """seconds: there and back. ahead: of the server's clock before ours, in seconds, give or take half of
    `seconds`."""

    seconds: float
    ahead: float
    answer: pb.PingResponse


class Caller:
    """`target`: host:port. Raises CallError wherever a call fails."""

    def __init__(self, target: str, credentials: Credentials | None) -> None:
        options = client_options(PIECE_BYTES + SLACK_BYTES)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            shown = (credentials.authority, credentials.key, credentials.certificate)
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(*shown), options)
        self._ping: Any = self._channel.unary_unary(
            PING.path,
            request_serializer=pb.PingRequest.SerializeToString,
            response_deserializer=pb.PingResponse.FromString,
        )

    def __enter__(self) -> "Caller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def serves(self) -> bool:
        """Whether the server says that it is ready."""
        check: Any = health_pb2_grpc.HealthStub(self._channel).Check
        answer = _called(check, health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def ping(self, up: int = 0, down: int = 0) -> Trip:
        """With so many bytes of data each way."""
        request = pb.PingRequest(answer_bytes=down, data=os.urandom(up))
        sent, began = time.time_ns(), time.perf_counter()
        answer: pb.PingResponse = _called(self._ping, request)
        seconds = time.perf_counter() - began
        came = sent + seconds * 1e9
        ahead = ((answer.received_ns - sent) + (answer.answered_ns - came)) / 2e9
        return Trip(seconds, ahead, answer)

    def small(self) -> list[Trip]:
        """Some pings without data, one after the other, the fastest first."""
        return sorted((self.ping() for _ in range(SMALL)), key=lambda trip: trip.seconds)


def median(trips: list[Trip]) -> float:
    return statistics.median(trip.seconds for trip in trips)


def rate(ping: Callable[[int], Trip], round_trip: float) -> float:
    """Bytes per second of one way: ping(n) sends n bytes that way, and takes longer than `round_trip` by what
    they take. Raises CallError where one does not pass."""
    size, passed, spent, rates = FIRST_BYTES, 0, 0.0, list[float]()
    while passed < WAY_BYTES and spent < WAY_S:
        seconds = ping(size).seconds
        taken = max(seconds - round_trip, seconds / 10)
        passed, spent = passed + size, spent + seconds
        rates.append(size / taken)
        if taken < LONG_S and size < PIECE_BYTES and spent < WAY_S:
            size, rates = 4 * size, []  # it has shown more of the way than of the link
    return statistics.median(rates)


def _called(call: Any, request: Any) -> Any:
    try:
        return call(request, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        told: Any = error
        raise CallError(told.code().name, told.details()) from None
