"""A finished run's server: what clients' parts make of samples goes in, what the top makes of it comes out.

    reader, a thread for each call     one thread for all calls       the call's own thread
    pieces -> batch -> channel (bounded) ..-> top(batch) .............-> pieces

Nothing is learned, and nothing of a sample is kept. Each batch is a step of its own, so what a client is
answered does not depend, not in a bit, on who else asks at the time.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import unquote

import grpc
import torch
from grpc_health.v1 import health_pb2
from torch import Tensor

from common.channel import Channel
from common.ended import Ended, check_served
from common.errors import (
    ClosedError,
    ConfigError,
    IdentityError,
    RefusedError,
    SplitLearningError,
    StepError,
    WireError,
)
from common.meter import Traffic
from common.methods.base import ServerPart
from common.own import first_words
from common.prediction import Exchange, exchange
from common.tls import Credentials, Guard
from common.wire import codec
from common.wire import prediction_pb2 as pb
from common.wire.pieces import Piece
from common.wire.rpc import PREDICTION_RPCS, VERSION
from dsl_server.intake import Pieces
from dsl_server.server import listen_on
from dsl_server.service import Context, opening_of

CLIENTS = 16  # that may ask at the same time, each by as many calls as in training
AHEAD = 2  # batches of a call that are read while one before them is answered


@dataclass
class Tally:
    """What has been served. Any thread may count."""

    samples: int = 0
    calls: int = 0  # that are open
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, samples: int = 0, calls: int = 0) -> None:
        with self._lock:
            self.samples += samples
            self.calls += calls


class Predictor:
    """`listen`: host:port, port 0 for any. Raises ConfigError when the part or the port cannot be.

    on_refused: told who may not ask, and why. credentials: with them clients need a certificate.
    """

    def __init__(
        self,
        ended: Ended[ServerPart],
        listen: str,
        device: torch.device,
        on_refused: Callable[[str], None] = lambda _: None,
        credentials: Credentials | None = None,
    ) -> None:
        check_served(ended)
        self.traffic, self.tally = Traffic(), Tally()
        guard = Guard(credentials.folder) if credentials else None
        service = Service(ended, device, guard, self.tally, on_refused)
        self._grpc, _, self._health, self.port = listen_on(
            listen, CLIENTS, service, self.traffic, credentials, PREDICTION_RPCS
        )

    def start(self) -> None:
        self._grpc.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float) -> None:
        """Takes no more calls; those that are open have so many seconds to come to their end."""
        self._health.enter_graceful_shutdown()
        self._grpc.stop(grace).wait()


class Service:
    """One method for each RPC, named as the protocol names it. Without a guard everyone may ask."""

    def __init__(
        self,
        ended: Ended[ServerPart],
        device: torch.device,
        guard: Guard | None,
        tally: Tally,
        on_refused: Callable[[str], None],
    ) -> None:
        self._ended, self._device, self._tally = ended, device, tally
        self._guard, self._on_refused = guard, on_refused
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=self._begin)

    def Inspect(self, request: pb.InspectRequest, context: Context) -> pb.InspectResponse:
        self._admit(context)
        if not request.oldest_version <= VERSION <= request.newest_version:
            raise RefusedError(
                f"the server speaks protocol version {VERSION}, the client {request.oldest_version} to "
                f"{request.newest_version}; install the same release on both"
            )
        ended = self._ended
        return pb.InspectResponse(
            version=VERSION,
            run=ended.run.to_json(),
            run_id=ended.run_id,
            network=ended.net.fingerprint,
            classes=ended.run.class_count,
            activations=ended.net.cut_shape,
            output=ended.output_shape,
            batch_size=ended.run.batch_size,
        )

    def Predict(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.PredictResponse]]:
        self._admit(context)
        opening: pb.Prediction = opening_of(requests, "prediction")
        terms = self._agreed(opening)
        call = _Call(requests, terms, self._output)
        if not context.add_callback(lambda: call.end(ClosedError("the caller has gone"))):
            return
        self._tally.add(calls=1)
        try:
            for sequence, output in call.outputs():
                self._tally.add(samples=len(output))
                yield from codec.pack_output(pb.PredictResponse, sequence, output, terms.down, opening.client)
        finally:
            self._tally.add(calls=-1)

    def _admit(self, context: Context) -> None:
        if self._guard is None:
            return
        try:
            self._guard.admit(context.auth_context())
        except IdentityError as error:
            self._on_refused(f"refused {unquote(context.peer())}: {error}")
            raise

    def _agreed(self, opening: pb.Prediction) -> Exchange:
        """Raises RefusedError where the caller's part cannot be one that this one learned with."""
        ended = self._ended
        if opening.run_id and ended.run_id and opening.run_id != ended.run_id:
            raise RefusedError(
                f"this server serves run {ended.run_id}; the client's part is of run {opening.run_id[:32]!r}"
            )
        if opening.network != ended.net.fingerprint:
            raise RefusedError(f"this server serves another network than the client has ({ended.run.model})")
        try:
            return exchange(ended, opening.codec)
        except ConfigError as error:
            raise WireError(str(error)) from None

    def _output(self, z: Tensor) -> "Future[Tensor]":
        return self._model.submit(self._finish, z)

    def _finish(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self._ended.part.top(z.to(self._device))
        return output.cpu()

    def _begin(self) -> None:
        if self._ended.run.deterministic:
            torch.set_num_threads(1)  # each thread has its own number


class _Call:
    """The batches of one call, read ahead of the answers: the next one comes while one is finished."""

    def __init__(
        self, requests: Pieces, terms: Exchange, finish: Callable[[Tensor], "Future[Tensor]"]
    ) -> None:
        self._requests, self._terms, self._finish = requests, terms, finish
        self._waiting = Channel[tuple[int, Future[Tensor]]](AHEAD)
        self._failure: SplitLearningError | None = None

    def end(self, reason: ClosedError) -> None:
        self._waiting.close(reason)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Each batch's number and output. Raises WireError for what is no batch."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        for sequence, output in self._waiting:
            try:
                made = output.result()
            except Exception as error:  # the network's code may raise anything
                raise StepError(
                    f"the server could not predict batch {sequence}: {first_words(error)}"
                ) from error
            yield sequence, made
        if self._failure:
            raise self._failure

    def _read(self) -> None:
        over = ClosedError("all batches have come")
        try:
            for first in self._requests:
                batch = codec.unpack_batch(first, self._requests, self._terms.up)
                self._waiting.put((batch.sequence, self._finish(batch.z)))
        except (ClosedError, grpc.RpcError):
            pass  # the call is over: there is nobody to tell
        except SplitLearningError as error:
            self._failure = error
        finally:
            self._waiting.close(over)
