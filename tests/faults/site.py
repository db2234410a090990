"""A server to which bad things are done, with a member of its run."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from common.methods import METHODS
from common.nets.cut import build
from common.parts import client_part, state_of
from common.run import Run
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from dsl_server.server import Server
from tests.federation import CPU, serving, spec_of
from tests.ordinary import DEADLINE_S, Ordinary, batch_message, member, refused, smashed
from tests.threads import wait_for

Code = grpc.StatusCode
MIB = 1 << 20
SOON_S = 10.0  # ample for what should take a moment
KINDS: dict[str, Any] = {"dsl": pb.StreamActivationsRequest, "csl": pb.TrainRequest}
RPC_OF = {"dsl": rpc.STREAM_ACTIVATIONS, "csl": rpc.TRAIN}
SHAPE = (8, 16, 8, 8)  # of a whole batch of small_run at the cut
Z_BYTES = 4 * math.prod(SHAPE)

Change = Callable[[Any], None]


def weights(server: Server) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(server.part).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def averaged(run: Run) -> dict[str, Tensor]:
    """A client's part, as it goes into an average."""
    return state_of(client_part(run, METHODS["dsl"](), build(run), CPU), momentum=False)


@dataclass
class Site:
    """A server and a member of its run, to whom bad things are done."""

    server: Server
    client: Ordinary

    @property
    def run(self) -> Run:
        return self.server.run

    @property
    def kind(self) -> Any:
        return KINDS[self.run.method]

    @property
    def rpc(self) -> rpc.Rpc:
        return RPC_OF[self.run.method]

    @property
    def trained(self) -> int:
        return self.server.record.samples_trained

    def valid(self) -> tuple[Any, Any]:
        """The two messages of a segment of one batch, which is due."""
        opening, frame = self.client.segment(self.kind, [smashed(self.run)])
        return opening, frame

    def send(self, messages: Sequence[Any]) -> None:
        raw = [m if isinstance(m, bytes) else m.SerializeToString() for m in messages]
        self.client.raw(self.rpc, raw)

    def evaluate(self, change: Change = lambda _: None) -> None:
        """A right batch is scored, and one that is changed."""
        batch = smashed(self.run)
        opening = pb.Evaluation(session=self.client.session, after_sequence=self.client.sequence)
        frames = [batch_message(pb.EvaluateRequest, number, batch) for number in (1, 2)]
        change(frames[1])
        messages = [pb.EvaluateRequest(evaluation=opening), *frames]
        (score,) = self.client.stub.Evaluate(iter(messages), timeout=DEADLINE_S)
        assert score.score.samples == 16

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """What happens within leaves no trace: the batch that was due before is due, and is trained on."""
        before, trained = weights(self.server), self.trained
        yield
        assert same(weights(self.server), before), "not a bit of the weights has changed"
        assert self.trained == trained
        self.client.send([smashed(self.run)])
        wait_for(lambda: self.trained == trained + 8)
        assert not same(weights(self.server), before), "the same member's next batch is trained on"

    def refuses(self, change: Change, *says: str) -> None:
        """A batch with this change, in training and in an evaluation, as an invalid argument."""
        with self.unharmed():
            opening, frame = self.valid()
            change(frame)
            with refused(Code.INVALID_ARGUMENT, *says):
                self.send([opening, frame])
        with self.unharmed(), refused(Code.INVALID_ARGUMENT, *says):
            self.evaluate(change)


@contextlib.contextmanager
def site_of(run: Run, folder: Path) -> Iterator[Site]:
    """At its end the member trains, is scored and leaves: the run is complete."""
    with serving(run, folder) as server, member(server) as client:
        site = Site(server, client)
        yield site
        client.send([smashed(run)])
        site.evaluate()
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 8 * client.sequence


@dataclass
class EncodedSite(Site):
    """In its run activations travel by a codec."""

    def packed(self) -> tuple[Any, Any]:
        """The two messages of a segment of one batch, by our own codec."""
        sequence, batch = self.client.sequence + 1, smashed(self.run)
        (piece,) = codec.pack_batch(self.kind, sequence, batch, spec_of(self.run))
        message = self.kind(batch=piece.head.batch, data=b"".join(piece.chunks))
        return self.client.opening(self.kind, [batch]), message

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        before, trained = weights(self.server), self.trained
        yield
        assert same(weights(self.server), before)
        assert self.trained == trained
        self.send(self.packed())
        self.client.sequence += 1
        wait_for(lambda: self.trained == trained + 8)

    def refuses_payload(self, declared: Sequence[pb.TensorSpec], payload: bytes, *says: str) -> None:
        """A batch whose activations come as this."""
        with self.unharmed():
            opening, frame = self.packed()
            del frame.batch.payload[:]
            frame.batch.payload.extend(declared)
            frame.data = payload + bytes(8)  # and eight labels
            with refused(Code.INVALID_ARGUMENT, *says):
                self.send([opening, frame])


@contextlib.contextmanager
def encoded_site(run: Run, folder: Path) -> Iterator[EncodedSite]:
    with serving(run, folder) as server, member(server) as client:
        yield EncodedSite(server, client)
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 8 * client.sequence
