"""A client that predicts: by its bottom and a server that has the rest; or, alone, by its own head.

    portion -> bottom -> z -> server -> logits, or an output for this client's own last layers
                           -> its head -> logits

While one batch is with the server the next ones are computed, and sent.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.ended import Ended, check_served
from common.errors import ClosedError, ConfigError, RefusedError
from common.meter import Clock, Traffic
from common.methods.base import ClientPart, Smashed, Tail
from common.nets.named import versions
from common.prediction import exchange
from common.run import Run
from common.tls import Credentials
from common.wire import codec
from common.wire import prediction_pb2 as pb
from common.wire.pieces import Piece
from common.wire.rpc import INSPECT, PREDICT, PREDICTION_RPCS, VERSION, judged
from dsl_client.connection import ANSWER_S, calls_by, channel_to, wait_for
from dsl_client.samples import Portion
from dsl_client.stream import Flow, Outgoing, telling

AHEAD = 2  # batches that are with the server, or on the way there


@dataclass(frozen=True)
class Predicted:
    """logits (B, classes), on the host. alone: by the client's own head."""

    portion: Portion
    logits: Tensor
    alone: bool


class Remote:
    """A finished run's server, as a function of batches: `send` them, and take each `output` in order.

    chosen: what activations travel as, where not as in the run. Raises ConfigError, RefusedError or
    ClosedError where there is none within `patience` seconds that can finish this client's samples.
    """

    def __init__(
        self,
        target: str,
        ended: Ended[ClientPart],
        traffic: Traffic,
        patience: float,
        credentials: Credentials | None = None,
        chosen: str = "",
    ) -> None:
        check_served(ended)
        self._terms = exchange(ended, chosen)
        self._client, self._sent, self._taken = ended.client, 0, 0
        clock, self._channel = Clock(), channel_to(target, credentials)
        try:
            wait_for(self._channel, target, credentials, patience)
            calls = calls_by(self._channel, PREDICTION_RPCS, traffic, clock)
            request = pb.InspectRequest(oldest_version=VERSION, newest_version=VERSION)
            with telling():
                _check(judged(calls[INSPECT](request, timeout=ANSWER_S)), ended, target)
            opening = pb.Prediction(
                run_id=ended.run_id, network=ended.net.fingerprint, codec=chosen, client=ended.client
            )
            piece = Piece(pb.PredictRequest(prediction=opening))
            self._stream = Outgoing(calls[PREDICT], piece, AHEAD, clock, Flow())
        except BaseException:
            self._channel.close()
            raise

    def send(self, z: Tensor) -> None:
        """Never waits for the server as long as no more than AHEAD outputs are to be taken."""
        self._sent += 1
        batch = Smashed(z, torch.empty(0, dtype=torch.int64))
        self._stream.put(codec.pack_batch(pb.PredictRequest, self._sent, batch, self._terms.up, self._client))

    def output(self, samples: int) -> Tensor:
        """Of the first batch whose output has not been taken, of so many samples. Raises why not."""
        self._taken += 1
        first, rest = self._stream.following()
        shape = (samples, *self._terms.output_shape)
        return codec.unpack_output(first, rest, self._taken, shape, self._terms.down)

    def close(self) -> None:
        self._stream.finish()
        self._channel.close()


class Predictor:
    """remote: the server; without one the client predicts alone. on_away: told why the server is gone, if the
    client then goes on alone; without it, it does not. Whether it can at all, check_alone tells."""

    def __init__(
        self,
        ended: Ended[ClientPart],
        remote: Remote | None,
        on_away: Callable[[ClosedError], None] | None = None,
    ) -> None:
        self._part, self._method, self._remote, self._on_away = ended.part, ended.method, remote, on_away

    def predict(self, portions: Iterable[Portion]) -> Iterator[Predicted]:
        """In their order. Raises ClosedError when the server goes, unless the client goes on alone."""
        waiting = deque[tuple[Portion, Tensor]]()
        for portion in portions:
            with torch.no_grad():
                z: Tensor = self._part.bottom(portion.x)
            if len(waiting) == AHEAD:
                yield self._finished(*waiting.popleft())
            if self._remote is not None:
                with self._or_alone():
                    self._remote.send(z)
            waiting.append((portion, z))
        while waiting:
            yield self._finished(*waiting.popleft())

    def _finished(self, portion: Portion, z: Tensor) -> Predicted:
        output = self._answer(len(z))
        with torch.no_grad():
            logits = self._alone(z) if output is None else self._whole(output.to(z.device))
        return Predicted(portion, logits.cpu(), alone=output is None)

    def _answer(self, samples: int) -> Tensor | None:
        if self._remote is not None:
            with self._or_alone():
                return self._remote.output(samples)
        return None

    def _whole(self, output: Tensor) -> Tensor:
        """The logits of what the server made."""
        tail = self._part.tail
        return output if tail is None else _called(tail, output)

    def _alone(self, z: Tensor) -> Tensor:
        layers = self._part.tail if self._method.tail is Tail.ALL else self._part.head
        assert layers is not None, "it was checked that this client can predict alone"
        return _called(layers, z)

    @contextmanager
    def _or_alone(self) -> Iterator[None]:
        """Within it, a server that goes away is done without, where that is asked."""
        try:
            yield
        except ClosedError as error:
            if self._on_away is None or isinstance(error, RefusedError):
                raise
            self._remote = None
            self._on_away(error)


def _called(layers: nn.Module, z: Tensor) -> Tensor:
    logits: Tensor = layers(z)
    return logits


def _check(told: pb.InspectResponse, ended: Ended[ClientPart], target: str) -> None:
    """Raises ConfigError unless this client's part learned together with what is served."""
    run, theirs = ended.run, told.run_id
    if ended.run_id and theirs and ended.run_id != theirs:
        raise ConfigError(
            f"the server at {target} serves run {theirs}, and {ended.folder} is of run {ended.run_id}: give "
            "the folder that this client left of that run"
        )
    if told.network != ended.net.fingerprint:
        raise ConfigError(
            f"the server at {target} serves another network ({Run.from_json(told.run).model}) than this "
            f"client builds from {ended.folder} ({run.model}; here: {versions(run.model)})"
        )
    if not (ended.run_id and theirs) and Run.from_json(told.run) != run:
        raise ConfigError(f"the server at {target} serves another run than that of {ended.folder}")
