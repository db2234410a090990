"""A client made of the generated classes alone, as one in any other language would be."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import pytest
import torch

from common.methods.base import Smashed
from common.run import Run
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from common.wire.rpc import Rpc
from common.wire.split_learning_pb2_grpc import SplitLearningServiceStub
from dsl_server.server import Server
from tests.federation import spec_of

_spec_of = functools.cache(spec_of)
MANY = 10_000  # epochs of a run whose members may send any number of segments
DEADLINE_S = 20.0  # for what should take a moment: a call that hangs ends as DEADLINE_EXCEEDED


def smashed(run: Run, samples: int | None = None, seed: int = 0) -> Smashed:
    """Made-up activations of a whole batch, or of so many samples."""
    spec, g = _spec_of(run), torch.Generator().manual_seed(seed)
    size = samples or run.batch_size
    z = torch.randn(size, *spec.cut_shape, generator=g).relu()
    return Smashed(z, torch.randint(0, run.class_count, (size,), generator=g))


def batch_message(kind: type[Any], sequence: int, batch: Smashed) -> Any:
    """A whole batch, of at most 256 classes, in one message."""
    head = pb.Batch(
        sequence=sequence,
        activations=pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, shape=batch.z.shape),
        labels=pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=batch.y.shape),
    )
    return kind(batch=head, data=batch.z.numpy().tobytes() + batch.y.byte().numpy().tobytes())


def channel_to(server: Server, credentials: Credentials | None = None) -> grpc.Channel:
    target = f"127.0.0.1:{server.port}"
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    if credentials is None:
        return grpc.insecure_channel(target, options)
    shown = (credentials.authority, credentials.key, credentials.certificate)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*shown), options)


class Ordinary:
    """A member of the run. `sequence`: the number of its last batch that the server has.

    codecs: those that it knows; all, where none are given.
    """

    def __init__(
        self,
        server: Server,
        name: str = "ordinary",
        credentials: Credentials | None = None,
        codecs: Sequence[Any] | None = None,
    ) -> None:
        self.run, self.sequence = server.run, 0
        self.channel = channel_to(server, credentials)
        self.stub: Any = SplitLearningServiceStub(self.channel)  # type: ignore[no-untyped-call]
        known: Any = pb.Codec.values() if codecs is None else codecs
        request = pb.JoinRequest(oldest_version=1, newest_version=1, name=name, codecs=known)
        self.membership = self.stub.Join(request)
        self.welcome: pb.Welcome = next(self.membership).welcome
        self.session = self.welcome.session

    def opening(self, kind: type[Any], batches: Sequence[Smashed], **changes: Any) -> Any:
        """The message that opens a segment of these batches, with some of it changed."""
        segment: dict[str, Any] = {
            "session": self.session,
            "epoch": 0,
            "first_sequence": self.sequence + 1,
            "batches": len(batches),
            "samples": sum(len(batch.y) for batch in batches),
        }
        return kind(segment=pb.Segment(**(segment | changes)))

    def segment(self, kind: type[Any], batches: Sequence[Smashed]) -> list[Any]:
        """The messages of a segment that follows on what was sent before."""
        frames = [batch_message(kind, self.sequence + 1 + i, batch) for i, batch in enumerate(batches)]
        return [self.opening(kind, batches), *frames]

    def stream(self, batches: Sequence[Smashed]) -> pb.StreamActivationsResponse:
        """Sends a segment one way; its receipt."""
        messages = self.segment(pb.StreamActivationsRequest, batches)
        receipt: pb.StreamActivationsResponse = self.stub.StreamActivations(
            iter(messages), timeout=DEADLINE_S
        )
        self.sequence += len(batches)
        return receipt

    def train(self, batches: Sequence[Smashed]) -> list[pb.TrainResponse]:
        """Sends a segment; its answers, each a whole gradient in one message."""
        messages = self.segment(pb.TrainRequest, batches)
        answers = list(self.stub.Train(iter(messages), timeout=DEADLINE_S))
        self.sequence += len(batches)
        return answers

    def send(self, batches: Sequence[Smashed]) -> None:
        """Sends a segment in the way that the run's method wants it."""
        if self.run.method == "csl":
            self.train(batches)
        else:
            self.stream(batches)

    def leave(self) -> None:
        self.stub.Leave(pb.LeaveRequest(session=self.session), timeout=DEADLINE_S)

    def raw(self, rpc: Rpc, messages: Iterable[bytes], **options: Any) -> list[bytes]:
        """Calls with bytes as they are, without any class; the answers' bytes."""
        kind = "stream" if rpc.requests_stream else "unary"
        kind += "_stream" if rpc.responses_stream else "_unary"
        call = getattr(self.channel, kind)(rpc.path)
        request = iter(messages) if rpc.requests_stream else b"".join(messages)
        response = call(request, timeout=DEADLINE_S, **options)
        return list(response) if rpc.responses_stream else [response]

    def close(self) -> None:
        self.channel.close()


@contextlib.contextmanager
def member(
    server: Server, name: str = "ordinary", credentials: Credentials | None = None
) -> Iterator[Ordinary]:
    client = Ordinary(server, name, credentials)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *says: str) -> Iterator[Any]:
    """Expects this status, and its text to tell all of this."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error: Any = caught.value
    assert error.code() is code, error.details()
    for text in says:
        assert text in error.details()
