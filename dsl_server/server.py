"""A server, put together: the port, the service, the inbox, the trainer's thread."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common import checkpoint
from common.errors import ClosedError, ConfigError, SplitLearningError
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import Gather
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import averaged_state, client_part, server_part, specs, state_of
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials, Guard
from common.wire.codec import batch_spec
from common.wire.options import SLACK_BYTES, server_options
from common.wire.pieces import PIECE_BYTES
from common.wire.rpc import SERVICE
from dsl_server.audit import Audit
from dsl_server.gate import Gate
from dsl_server.inbox import Inbox
from dsl_server.kernel import Sockets
from dsl_server.record import Record
from dsl_server.rounds import Rounds
from dsl_server.service import Service, add_to
from dsl_server.shelf import DiskShelf
from dsl_server.trainer import Trainer

_CALLS_OF_A_CLIENT = 4  # Join, a segment, the one before it that awaits its receipt, and one more
_SPARE_CALLS = 8  # of a connection: health, reflection, clients that are one too many


class Server:
    """`listen`: host:port, port 0 for any. Raises ConfigError when the run or the port cannot be.

    on_lost: told why a client is gone that the run goes on without.
    credentials: with them clients need a certificate, and are who it says.
    """

    def __init__(
        self,
        run: Run,
        listen: str,
        device: torch.device,
        folder: RunFolder,
        on_lost: Callable[[ClosedError], None] = lambda _: None,
        credentials: Credentials | None = None,
    ) -> None:
        run = settled(run)
        self.run, self._folder, self._on_lost = run, folder, on_lost
        self.method = build_method(run)
        net = build(run)
        self.part = server_part(run, self.method, net, device)
        self.traffic, self._clock = Traffic(), Clock()
        for layers in [*(stage.layers for stage in self.part.inner), self.part.outermost]:
            self._clock.module("forward", layers)
        on_disk = run.replay and run.replay_on == "disk"
        shelf = DiskShelf(folder.path / "replay") if on_disk else None
        self.hosting = Hosting(run, self.method, self.part, shelf)
        rounds = self.method.copies or self.method.round_step is not None  # something is done at their end
        together = self.method.gather is Gather.ALL or rounds or run.fixed_order
        in_turn = together and run.sync != "relay"  # whose turns are an order already
        self.inbox = Inbox(
            run.clients,
            run.inbox,
            in_turn,
            self.method.gather,
            run.round_timeout,
            run.least_clients,
            can_spare=lambda: self.hosting.can_replay and not run.fixed_order,
        )
        self.rounds = Rounds(run, on_close=self.inbox.close, on_lost=self._lose)
        self.sockets = Sockets()
        self.record = Record(run, net.cut_shape, folder, self.traffic, self.sockets, self._clock, device)
        self._trainer = Trainer(self.hosting, device, self._clock, in_turn)
        self._failure: SplitLearningError | None = None
        self._thread = threading.Thread(target=self._train, name="trainer", daemon=True)
        theirs = client_part(run, self.method, net, torch.device("cpu"))
        relayed = run.sync == "relay"
        part_specs = specs(state_of(theirs) if relayed else averaged_state(theirs, self.method))
        spec = batch_spec(run, self.method, net)
        audit = Audit(folder, on_failure=self.rounds.close)
        guard = Guard(credentials.folder) if credentials else None
        service = Service(
            run,
            self.method,
            spec,
            part_specs,
            self.inbox,
            self.rounds,
            self.record,
            self._clock,
            audit,
            guard,
        )
        self._grpc, self._health, self.port = _listen(listen, run.clients, service, self.traffic, credentials)
        self.sockets.watch(self.port)

    def start(self) -> None:
        self._thread.start()
        self._grpc.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def wait(self, timeout: float) -> bool:
        """Whether the run is finished. Raises the reason if it has ended before."""
        if not self.rounds.wait_until_finished(timeout):
            return False
        self._thread.join()
        if self._failure:  # of a step after the last client had left
            raise self._failure
        return True

    def finish(self) -> dict[str, Any]:
        """After the run: the part saved, the summary written and returned."""
        try:
            checkpoint.save(self._folder.path / "checkpoint", self.part, {"run": asdict(self.run)})
            return self.record.write_summary()
        except OSError as error:
            raise ConfigError(f"{self._folder.path} cannot be written: {error.strerror}") from error

    def stop(self, reason: ClosedError) -> None:
        """Ends the run, if it has not ended, and tells every client why."""
        self._health.enter_graceful_shutdown()
        self.rounds.close(reason)
        self._grpc.stop(grace=2).wait()
        self.inbox.close(reason)
        self.sockets.close()

    def _lose(self, client: int, reason: ClosedError) -> None:
        # The record first: once the inbox has no clients left, `wait` is over and the summary is written.
        try:
            self.record.lost(client)
        except OSError as error:
            self.rounds.close(ClosedError(f"the server cannot write its metrics: {error.strerror}"))
        self.inbox.lose(client, reason)
        self._on_lost(reason)

    def _train(self) -> None:
        try:
            self._trainer.train(self.inbox, self.record.trained)
        except SplitLearningError as error:
            self._failure = error
            self.rounds.close(ClosedError(str(error)))


def _listen(
    listen: str, clients: int, service: Service, traffic: Traffic, credentials: Credentials | None
) -> tuple[grpc.Server, health.HealthServicer, int]:
    members = _CALLS_OF_A_CLIENT * clients
    of_a_connection = members + _SPARE_CALLS  # which may be that of all clients
    calls = members + of_a_connection + _SPARE_CALLS  # so no connection can have the places of the others
    server = grpc.server(
        ThreadPoolExecutor(calls, thread_name_prefix="rpc"),
        interceptors=[Gate()],
        options=server_options(PIECE_BYTES * 2 + SLACK_BYTES, of_a_connection),
        maximum_concurrent_rpcs=calls,  # refuse at once what would otherwise wait for a thread
    )
    add_to(server, service, traffic)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host, _, number = listen.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", number) or int(number) > 65535:
        raise ConfigError(f"--listen {listen}: say host:port, with a port from 0 to 65535")
    try:
        port = _port(server, listen, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"--listen {listen}: cannot be bound; is the port in use? Choose another"
        ) from error
    return server, healthy, port


def _port(server: grpc.Server, listen: str, credentials: Credentials | None) -> int:
    if credentials is None:
        return server.add_insecure_port(listen)
    own = [(credentials.key, credentials.certificate)]
    tls = grpc.ssl_server_credentials(own, credentials.authority, require_client_auth=True)
    return server.add_secure_port(listen, tls)
