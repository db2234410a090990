"""What a client should know before it joins, and bytes for it to time (`dsl doctor`)."""

import math
import os
import time
from importlib.metadata import version

from common.errors import WireError
from common.methods.base import Method, Tail
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import PIECE_BYTES
from common.wire.rpc import VERSION

_RELEASE = version("decoupled-split-learning")
_NOISE = os.urandom(PIECE_BYTES)  # nothing on the way can make it smaller
_FLOAT32 = 4  # bytes


def answer(request: pb.PingRequest, received_ns: int, method: Method, spec: BatchSpec) -> pb.PingResponse:
    """received_ns: when the request had come, nanoseconds since 1970. Raises WireError where it asks for more
    than a piece."""
    if request.answer_bytes > PIECE_BYTES:
        raise WireError(f"answer_bytes {request.answer_bytes}: at most {PIECE_BYTES}")
    travels = method.tail is not Tail.ALL  # else the client has the whole network
    return pb.PingResponse(
        oldest_version=VERSION,
        newest_version=VERSION,
        release=_RELEASE,
        received_ns=received_ns,
        answered_ns=time.time_ns(),
        sample_bytes=_FLOAT32 * math.prod(spec.cut_shape) if travels else 0,
        one_way=method.one_way,
        data=_NOISE[: request.answer_bytes],
    )
