"""A server, put together: the port, the service, the inbox, the trainer's thread."""

import contextlib
import json
import math
import re
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common import chance, checkpoint
from common.checkpoint import Checkpoints, Saved
from common.errors import ClosedError, ConfigError, SplitLearningError, StaleError
from common.live import Gauge
from common.meter import Clock, Traffic
from common.methods import build_method, settled
from common.methods.base import Received, Tail
from common.methods.hosting import Hosting
from common.parts import (
    Spec,
    State,
    averaged_state,
    client_part,
    found_under,
    server_part,
    specs,
    state_of,
    under,
)
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials, Guard
from common.wire.codec import BatchSpec, batch_spec
from common.wire.options import SLACK_BYTES, server_options
from common.wire.pieces import PIECE_BYTES
from common.wire.rpc import RPCS, Rpc
from dsl_server.audit import Audit
from dsl_server.gate import Gate
from dsl_server.inbox import Inbox, Job
from dsl_server.intake import Intake
from dsl_server.kernel import Sockets
from dsl_server.ledger import Ledger
from dsl_server.places import Everywhere, Places, agreed_names
from dsl_server.ranks import GRACE_S, Ranks
from dsl_server.record import RankRecord, Record
from dsl_server.room import memory_warning
from dsl_server.rounds import Rounds
from dsl_server.saver import Follower, Saver, Unsaved
from dsl_server.service import Service, add_to
from dsl_server.sharing import Sharing, begin
from dsl_server.shelf import DiskShelf
from dsl_server.tally import Tally
from dsl_server.ticks import Pace, Ticks, check
from dsl_server.trainer import Trainer
from dsl_server.watch import Watch

_CALLS_OF_A_CLIENT = 4  # Join, a segment, the one before it that awaits its receipt, and one more
# Many threads wait for what they hold in turn, Python's lock, and the trainer gives it up at every operation
# of torch: with Python's own 5 ms before another lets go, 64 clients' threads left it a tenth of its speed.
# Below a millisecond, those that wait wake up too often only to ask for it once more.
SWITCH_S = 0.001
LINGER_S = 10.0  # for clients that may not have heard that they have left, to ask again
_ANY = ("0.0.0.0", "[::]", "")
_SPARE_CALLS = 8  # of a connection: health, reflection, clients that are one too many


class Server:
    """`listen`: host:port, port 0 for any. Raises ConfigError when the run or the port cannot be.

    on_lost: told why a client is gone that the run goes on without. on_trouble: told what is wrong with the
    disk, while it is, and for what there is too little memory. credentials: with them clients need a
    certificate, and are who it says. resume: go on from the newest checkpoint in the folder. threads: of the
    arithmetic; 0: as torch has it. alone: whether it has its process to itself; else its peak memory is not
    known, and Python's threads switch as they do there. ranks: the other processes that it is one server
    with, if any; pace: of their ticks; advertise: where clients find this one.
    """

    def __init__(
        self,
        run: Run,
        listen: str,
        device: torch.device,
        folder: RunFolder,
        on_lost: Callable[[ClosedError], None] = lambda _: None,
        credentials: Credentials | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
        resume: bool = False,
        threads: int = 0,
        alone: bool = True,
        ranks: Ranks | None = None,
        pace: Pace | None = None,
        advertise: str = "",
    ) -> None:
        run = settled(run)
        if alone:
            sys.setswitchinterval(SWITCH_S)
        self.ranks = ranks
        self._threads = 1 if run.deterministic else threads
        self.run, self._folder, self._on_lost, self._on_trouble = run, folder, on_lost, on_trouble
        chance.seed(run.seed)  # for dropout
        self.method = build_method(run)
        if ranks:
            pace = pace or Pace()
            check(run, self.method, pace)
        net = chance.built(run)
        fsdp = ranks is not None and pace is not None and pace.fsdp
        self.part = server_part(run, self.method, net, torch.device("cpu") if fsdp else device)
        self.traffic, self._clock = Traffic(), Clock()
        for layers in [*(stage.layers for stage in self.part.inner), self.part.outermost]:
            self._clock.module("forward", layers)
        on_disk = run.replay and run.replay_on == "disk"
        shelf = DiskShelf(folder.path / "replay") if on_disk else None
        gauge = Gauge(device) if run.measure_memory else None
        self.hosting = Hosting(run, gauge.around(self.method) if gauge else self.method, self.part, shelf)
        together = self.method.in_rounds or run.fixed_order
        in_turn = together and run.sync != "relay"  # whose turns are an order already
        places = self._places(ranks, single=credentials is not None)
        own = places.own
        self.inbox = Inbox(
            run.clients,
            run.inbox,
            in_turn,
            self.method.gather,
            run.round_timeout,
            run.least_clients,
            can_spare=lambda: self.hosting.can_replay and not run.fixed_order,
            in_step=self.method.goes_back,
            on_epoch_end=lambda end: self.rounds.apply(end.client, end.mark),
            together=run.clients if ranks and run.fixed_order else run.concatenate,
            places=own,
        )
        self._checkpoints = Checkpoints(folder.path / "checkpoints")
        saved, self._kept = self._found() if resume and (ranks is None or ranks.first) else (None, [])
        if ranks:
            saved = self._begun(ranks, saved)
        binding = not self.method.goes_back  # whose batches are made again may come a little different
        ledger = Ledger(own, ranks.common if ranks else "", binding)
        if saved:
            ledger = Ledger.restored(own, saved.facts["rounds"]["ledger"], binding)
        self.rounds = Rounds(run, self._close, self._lose, self._averaged, ledger)
        if ranks:
            self.rounds.share(partial(agreed_names, ranks))
        self.sockets = Sockets()
        kind = Record if ranks is None or ranks.first else RankRecord
        self.record = kind(
            run,
            net.cut_shape,
            folder,
            self.traffic,
            self.sockets,
            self._clock,
            device,
            Tally(run.clients, self.rounds.client_of),
            gauge,
            alone,
        )
        self.watch = Watch(
            run, self.method, self.inbox, self.rounds, self.record, self.traffic, self.sockets, own
        )
        self._saver = self._made_saver() if run.lasts else Unsaved()
        self._sharing: Sharing | None = None
        self._failure: SplitLearningError | None = None
        self._thread = threading.Thread(target=self._train, name="trainer", daemon=True)
        theirs = client_part(run, self.method, net, torch.device("cpu"))
        relayed = run.sync == "relay"
        part_specs = specs(state_of(theirs) if relayed else averaged_state(theirs, self.method))
        spec = batch_spec(run, self.method, net)
        batch_bytes = run.batch_size * 4 * math.prod(spec.cut_shape)
        if self.method.send_every and (warning := memory_warning(run.clients, run.inbox, batch_bytes)):
            on_trouble(warning)
        self._audit = Audit(folder, self.rounds.close, ranks.rank if ranks else 0)
        guard = Guard(credentials.folder) if credentials else None
        self._intake = Intake(run, self.method, spec, self.inbox, self.rounds, self._clock, self._saver)
        trains = self._ticks(ranks, pace or Pace(), own, part_specs) if ranks else Trainer
        self._trainer = trains(
            self.hosting,
            device,
            self._clock,
            in_turn,
            on_applied=self._learned,
            save=self._saver.take,
            on_gone=self.inbox.owe if run.lasts else lambda _: None,
        )
        self._service = Service(
            run,
            self.method,
            spec,
            part_specs,
            self.inbox,
            self.rounds,
            self.record,
            self._audit,
            guard,
            self._saver,
            self._intake,
            net.fingerprint,
            places,
        )
        if saved:
            self._restore(saved, part_specs)
            places.restore(Ledger.restored(run.clients, saved.facts["rounds"]["ledger"]).accounts)
        if ranks and fsdp:
            self._divide(ranks, spec)
        if ranks and not ranks.first:
            chance.seed(run.seed - ranks.rank)  # no two ranks drop out alike
        self._grpc, self._pool, self._health, self.port = listen_on(
            listen, run.clients, self._service, self.traffic, credentials, tally=self.record.tally
        )
        self.sockets.watch(self.port)
        if ranks:
            reached = ranks.from_each(_reached(listen, advertise, self.port).encode())
            places.open([address.decode() for address in reached])

    def start(self) -> None:
        self._saver.start(self._kept)
        self._thread.start()
        self._grpc.start()
        self._service.expect_back()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def drain(self, reason: StaleError, grace: float) -> None:
        """Ends this process's part in the run in order, for another to go on with it: nobody joins any more,
        what has come is learned from and saved, and clients are told to come back."""
        self._health.enter_graceful_shutdown()
        self.rounds.drain(reason)
        done = threading.Timer(grace, self._saver.close, [ClosedError("the time to drain was over")])
        done.daemon = True
        done.start()
        with contextlib.suppress(ClosedError):
            self._saver.commit()
        done.cancel()
        self.rounds.close(reason)

    def wait(self, timeout: float) -> bool:
        """Whether the run is finished. Raises the reason if it has ended before."""
        try:
            if not self.rounds.wait_until_finished(timeout):
                return False
        except ClosedError as closed:
            raise self._failure or closed from None
        self._thread.join()
        if self._failure:  # of a step after the last client had left
            raise self._failure
        return True

    def failed(self, within: float) -> SplitLearningError | None:
        """Why the trainer has ended, if it has, or does within so many seconds, or is finding out."""
        self._thread.join(within)
        if self.ranks and self.ranks.in_doubt:
            self._thread.join(2 * GRACE_S)
        return self._failure

    def finish(self) -> dict[str, Any]:
        """After the run: the part saved, the summary written and returned. Raises ConfigError where the disk
        will not have them."""
        try:
            facts = {"run": asdict(self.run), "run_id": self.rounds.ledger.run_id}
            checkpoint.save(self._folder.path / "checkpoint", self.hosting.state_of(self.part), facts)
            return self.record.write_summary()
        except OSError as error:
            raise ConfigError(f"{self._folder.path} cannot be written: {error.strerror}") from error

    def stop(self, reason: ClosedError) -> None:
        """Ends the run, if it has not ended, and tells every client why."""
        self.rounds.wait_until_heard(LINGER_S)
        self._health.enter_graceful_shutdown()
        self.rounds.close(reason)
        self._saver.close(reason)
        self._grpc.stop(grace=2).wait()
        self.inbox.close(reason)
        self.sockets.close()

    def join(self) -> None:
        """After `stop`: waits until its threads have ended, of which the trainer's may be within a step."""
        if self._thread.ident is not None:
            self._thread.join()
        self._pool.shutdown()
        self._service.close()
        self.sockets.join()

    def _found(self) -> tuple[Saved | None, list[Saved]]:
        """The newest checkpoint that is whole, and the facts of all that are, the oldest first. Raises
        ConfigError where there are some and none is."""
        self._checkpoints.tidy()
        newest, kept = None, deque[Saved]()
        for saved in self._checkpoints.newest(self._on_trouble):
            newest = newest or saved
            kept.appendleft(Saved(saved.number, {}, saved.facts))
        if newest is not None:
            last = newest.number
            self._checkpoints.drop(keep=lambda number: number <= last)
        elif self._checkpoints.numbers():
            raise ConfigError(f"--resume {self._folder.path}: no checkpoint of it can be read")
        return newest, list(kept)

    def _places(self, ranks: Ranks | None, single: bool) -> Places | Everywhere:
        """single: of each name there is but one client."""
        if ranks is None:
            return Everywhere(self.run.clients)
        return Places(self.run.clients, ranks.rank, ranks.size, ranks, single)

    def _begun(self, ranks: Ranks, saved: Saved | None) -> Saved | None:
        """What this rank goes on from, of what the first one found; else it begins with that one's
        weights."""
        tensors = self.hosting.state()
        goes_on = begin(ranks, tensors, saved)
        if goes_on is None:
            self.hosting.load(tensors)
        return goes_on

    def _divide(self, ranks: Ranks, spec: BatchSpec) -> None:
        from common.methods.divided import Divided  # takes a while

        y = torch.zeros(spec.label_shape(2), dtype=torch.float32 if spec.numbers else torch.int64)
        like = Received(torch.zeros(2, *spec.cut_shape), y, client=0, progress=0.0)
        self.hosting.divide(Divided(self.part, ranks.mesh(), like), ranks.sum)

    def _ticks(
        self, ranks: Ranks, pace: Pace, own: Sequence[int], part_specs: Mapping[str, Spec]
    ) -> Callable[..., Trainer]:
        self._sharing = Sharing(ranks, own, self.record, self.rounds, self.watch, self._intake, self._saver)
        goes_back = self.method.goes_back
        return partial(Ticks, ranks, pace, self.run, self.rounds, self._sharing, part_specs, goes_back)

    def _made_saver(self) -> Saver | Follower:
        if self.ranks and not self.ranks.first:
            return Follower(self._handed_over)
        return Saver(
            self._checkpoints,
            self.run.checkpoints,
            self.run.checkpoint_every,
            lambda: self._trainer.ask_save(self.inbox),
            self._captured,
            self._saved,
            self._troubled,
        )

    def _handed_over(self) -> None:
        assert self._sharing is not None
        self._sharing.hand_over()

    def _learned(self, job: Job, loss: float | None) -> None:
        self.rounds.apply(job.client, job.mark)
        self.record.tally.trained(job.client, len(job.batch.z), loss)
        self._saver.stir()

    def _averaged(self, epoch: int, samples: Mapping[int, int]) -> None:
        if self.method.tail is Tail.ALL:  # else they were counted with their batches
            self.record.averaged(epoch, samples)

    def _captured(self) -> tuple[State, dict[str, Any]]:
        """All that a server needs to go on from here. By the trainer's thread, between two steps."""
        elsewhere = self._sharing.gathered() if self._sharing else []
        with self.rounds.still():  # whose averages the record counts
            meeting, rounds = self.rounds.state()
            record = self.record.state()
        answers, answered = self._intake.state()
        tensors = {
            **under("hosting", self.hosting.state()),
            **under("rounds", meeting),
            **under("answers", answers),
        }
        for theirs, known in elsewhere:
            tensors |= under("answers", theirs)
            answered |= known["answered"]
            rounds["ledger"]["accounts"] += known["accounts"]
        facts = {
            "run": asdict(self.run),
            "rounds": rounds,
            "answered": answered,
            "record": record,
            **({"made": self._sharing.made} if self._sharing else {}),
        }
        return tensors, facts

    def _restore(self, saved: Saved, part_specs: Mapping[str, Spec]) -> None:
        facts = saved.facts
        try:
            if facts["run"] != json.loads(json.dumps(asdict(self.run))):
                raise ConfigError(f"--resume {self._folder.path}: its checkpoints are of another run")
            self.hosting.load(found_under("hosting", saved.tensors))
            self.rounds.restore(found_under("rounds", saved.tensors), facts["rounds"], list(part_specs))
            places = self.rounds.ledger.places
            own = {client: last for client, last in facts["answered"].items() if int(client) in places}
            self._intake.restore(found_under("answers", saved.tensors), own)
            accounts = self.rounds.members()
            gone = [account.client for account in accounts if account.gone]
            ended = [account.client for account in accounts if account.applied.epochs > self.hosting.rounds]
            self.inbox.resume(gone, ended)
            self.record.restore(facts["record"], [account.client for account in accounts if account.lost])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"--resume {self._folder.path}: checkpoint {saved.number} is not one of this release: {error}"
            ) from error

    def _saved(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """A checkpoint is on disk; these are kept, the oldest first."""
        ledgers = [facts["rounds"]["ledger"]["accounts"] for facts in kept]
        floors = {account["client"]: account["applied"]["sequence"] for account in ledgers[0]}
        places = [account["client"] for account in ledgers[-1]]
        self.rounds.keep_from(floors, places)
        if self._sharing:
            self._sharing.saved(kept[-1]["made"], floors, places)
        applied = ", ".join(
            f"client {a['client']} up to batch {a['applied']['sequence']}" for a in ledgers[-1]
        )
        self.watch.saved()
        self._audit("checkpoint", "", "", applied)

    def _troubled(self, trouble: str | None) -> None:
        serving = health_pb2.HealthCheckResponse
        self._health.set("", serving.NOT_SERVING if trouble else serving.SERVING)
        self._on_trouble(
            f"no checkpoint can be written: {trouble}" if trouble else "checkpoints can be written again"
        )

    def _close(self, reason: ClosedError) -> None:
        self.inbox.close(reason)
        self._saver.close(reason)

    def _lose(self, client: int, reason: ClosedError) -> None:
        # The record first: once the inbox has no clients left, `wait` is over and the summary is written.
        try:
            self.record.lost(client)
        except OSError as error:
            self.rounds.close(ClosedError(f"the server cannot write its metrics: {error.strerror}"))
        self.inbox.lose(client, reason)
        self._on_lost(reason)

    def _train(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # each thread has its own number
        try:
            self._trainer.train(self.inbox, self.record.trained)
        except SplitLearningError as error:
            self._failure = error
            self.rounds.close(error if isinstance(error, StaleError) else ClosedError(str(error)))


def _reached(listen: str, advertise: str, port: int) -> str:
    """Where clients find what listens there, as others are told."""
    host, _, number = (advertise or listen).rpartition(":")
    if advertise and not number.isdecimal():
        host, number = advertise, ""
    if host in _ANY:
        host = socket.gethostname()
    return f"{host}:{number if advertise and number else port}"


def listen_on(
    listen: str,
    clients: int,
    service: object,
    traffic: Traffic,
    credentials: Credentials | None,
    rpcs: Sequence[Rpc] = RPCS,
    tally: Tally | None = None,
) -> tuple[grpc.Server, ThreadPoolExecutor, health.HealthServicer, int]:
    """A server of these RPCs, with health checks and reflection, that has not begun; the threads that it
    answers with, its health, and its port. Raises ConfigError where that cannot be had."""
    members = _CALLS_OF_A_CLIENT * clients
    of_a_connection = members + _SPARE_CALLS  # which may be that of all clients
    calls = members + of_a_connection + _SPARE_CALLS  # so no connection can have the places of the others
    pool = ThreadPoolExecutor(calls, thread_name_prefix="rpc")
    server = grpc.server(
        pool,
        interceptors=[Gate()],
        options=server_options(PIECE_BYTES * 2 + SLACK_BYTES, of_a_connection, clients),
        maximum_concurrent_rpcs=calls,  # refuse at once what would otherwise wait for a thread
    )
    add_to(server, service, traffic, rpcs, tally)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = (rpcs[0].service, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    host, _, number = listen.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", number) or int(number) > 65535:
        raise ConfigError(f"--listen {listen}: say host:port, with a port from 0 to 65535")
    try:
        port = _port(server, listen, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"--listen {listen}: cannot be bound; is the port in use? Choose another"
        ) from error
    return server, pool, healthy, port


def _port(server: grpc.Server, listen: str, credentials: Credentials | None) -> int:
    if credentials is None:
        return server.add_insecure_port(listen)
    own = [(credentials.key, credentials.certificate)]
    tls = grpc.ssl_server_credentials(own, credentials.authority, require_client_auth=True)
    return server.add_secure_port(listen, tls)
