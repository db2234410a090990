"""The RPCs, by name: what each carries and how that becomes bytes.

Ordinary messages are protobuf's own business; tensor streams travel as pieces. What cannot be read is a
value, not an exception: gRPC turns an exception of a deserializer into INTERNAL, and a malformed message
deserves INVALID_ARGUMENT. `judged` raises it where it can be answered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from common.errors import WireError
from common.wire import pieces
from common.wire import prediction_pb2 as prediction
from common.wire import split_learning_pb2 as pb
from common.wire.pieces import Piece

SERVICE: str = pb.DESCRIPTOR.services_by_name["SplitLearningService"].full_name
PREDICTION: str = prediction.DESCRIPTOR.services_by_name["PredictionService"].full_name
EXPECTED = "dsl-expected-seq"  # beside ABORTED: the number of the batch that is due
VERSION = 1  # of the protocol; a range is agreed on at Join

T = TypeVar("T")


@dataclass(frozen=True)
class Rpc:
    """request, response: message types. Whether each comes as a stream, and as pieces."""

    name: str
    request: type[Message]
    response: type[Message]
    requests_stream: bool = False
    responses_stream: bool = False
    requests_in_pieces: bool = False
    responses_in_pieces: bool = False
    service: str = SERVICE

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


JOIN = Rpc("Join", pb.JoinRequest, pb.JoinResponse, responses_stream=True)
STREAM_ACTIVATIONS = Rpc(
    "StreamActivations",
    pb.StreamActivationsRequest,
    pb.StreamActivationsResponse,
    requests_stream=True,
    requests_in_pieces=True,
)
TRAIN = Rpc("Train", pb.TrainRequest, pb.TrainResponse, True, True, True, True)
SYNC_WEIGHTS = Rpc("SyncWeights", pb.SyncWeightsRequest, pb.SyncWeightsResponse, True, True, True, True)
EVALUATE = Rpc("Evaluate", pb.EvaluateRequest, pb.EvaluateResponse, True, True, True, True)
DESCRIBE = Rpc("Describe", pb.DescribeRequest, pb.DescribeResponse)
LEAVE = Rpc("Leave", pb.LeaveRequest, pb.LeaveResponse)
PING = Rpc("Ping", pb.PingRequest, pb.PingResponse)

RPCS = (JOIN, STREAM_ACTIVATIONS, TRAIN, SYNC_WEIGHTS, EVALUATE, DESCRIBE, LEAVE, PING)

INSPECT = Rpc("Inspect", prediction.InspectRequest, prediction.InspectResponse, service=PREDICTION)
PREDICT = Rpc(
    "Predict", prediction.PredictRequest, prediction.PredictResponse, True, True, True, True, PREDICTION
)
PREDICTION_RPCS = (INSPECT, PREDICT)  # of a finished run's server

Write = Callable[[Any], bytes]
Read = Callable[[bytes], Any]


def writer(kind: type[Message], in_pieces: bool) -> Write:
    return pieces.encode if in_pieces else kind.SerializeToString


@dataclass(frozen=True)
class Malformed:
    """Bytes that are no message. Not an exception that is handed on and raised later: it would hold frames
    that hold it, and gRPC's call with them, until Python next looks for such circles; and a connection whose
    calls are not let go takes no more of them.
    """

    reason: str


def reader(kind: type[Message], in_pieces: bool) -> Read:
    """Gives a Piece or a message of this kind, or Malformed."""

    def read(raw: bytes) -> Piece[Message] | Message | Malformed:
        try:
            return pieces.decode(kind, raw) if in_pieces else kind.FromString(raw)
        except WireError as error:
            return Malformed(str(error))
        except DecodeError as error:
            return Malformed(f"not a {kind.DESCRIPTOR.name}: {error}")

    return read


def judged(read: T | Malformed) -> T:
    """What was read. Raises WireError if it was malformed."""
    if isinstance(read, Malformed):
        raise WireError(read.reason)
    return read
