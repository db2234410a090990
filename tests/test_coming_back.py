"""A member whose connection goes and comes back at a server that lives; and what that saves meanwhile."""

import contextlib
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.methods.base import Smashed
from common.run import Run
from common.wire import split_learning_pb2 as pb
from common.wire.split_learning_pb2_grpc import SplitLearningServiceStub
from dsl_server.server import Server
from tests.federation import serving, small_run
from tests.ordinary import DEADLINE_S, batch_message, channel_to, smashed
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

IDENTITY = "a" * 32


def lasting(**settings: Any) -> Run:
    return small_run(**({"checkpoint_every": 1000.0} | settings))


class Process:
    """A client of the generated classes alone, that comes back by the same channel."""

    def __init__(self, server: Server, channel: grpc.Channel) -> None:
        self.server = server
        self.stub: Any = SplitLearningServiceStub(channel)  # type: ignore[no-untyped-call]
        self.session = self.run_id = ""

    def join(self) -> pb.Welcome:
        codecs: Any = pb.Codec.values()
        self.membership = self.stub.Join(
            pb.JoinRequest(
                oldest_version=1,
                newest_version=1,
                name="ann",
                codecs=codecs,
                identity=IDENTITY,
                run_id=self.run_id,
                session=self.session,
            ),
            timeout=DEADLINE_S,
        )
        welcome: pb.Welcome = next(self.membership).welcome
        self.session, self.run_id = welcome.session, welcome.run_id
        return welcome

    def messages(self, kind: type[Any], batches: list[Smashed], sent: int) -> Iterator[Any]:
        """A segment of these batches, of which so many are sent; then it stays open."""
        samples = sum(len(batch.y) for batch in batches)
        segment = pb.Segment(session=self.session, first_sequence=1, batches=len(batches), samples=samples)
        yield kind(segment=segment)
        for number, batch in enumerate(batches[:sent], 1):
            message = batch_message(kind, number, batch)
            message.batch.digest = zlib.crc32(message.data)
            yield message
        if sent < len(batches):
            threading.Event().wait(DEADLINE_S)


@contextlib.contextmanager
def process(server: Server) -> Iterator[Process]:
    with channel_to(server) as channel:
        yield Process(server, channel)


def test_who_was_cut_off_between_two_waypoints_comes_back_at_once(tmp_path: Path) -> None:
    """A checkpoint would have to wait for its batches, and they for its welcome."""
    run = lasting(method="csl")
    with serving(run, tmp_path) as server, process(server) as ann:
        ann.join()
        call = ann.stub.Train(ann.messages(pb.TrainRequest, [smashed(run)] * 3, sent=1), timeout=DEADLINE_S)
        next(call)
        call.cancel()
        ann.membership.cancel()
        assert ann.join().received == 1


def test_who_says_goodbye_is_heard_once_all_that_it_sent_is_learned_from(tmp_path: Path) -> None:
    """A checkpoint that has its goodbye, and not its last batches, could never have them again."""
    run, learns = lasting(epochs=1), threading.Event()
    with serving(run, tmp_path) as server, process(server) as ann:
        step = server.hosting.step

        def slow(group: Any) -> Any:
            assert learns.wait(DEADLINE_S)
            return step(group)

        server.hosting.step = slow  # type: ignore[method-assign]
        ann.join()
        requests = ann.messages(pb.StreamActivationsRequest, [smashed(run)], sent=1)
        call = ann.stub.StreamActivations.future(requests, timeout=DEADLINE_S)
        account = server.rounds.members()[0]
        wait_for(lambda: account.laid == 1)
        call.cancel()
        ann.membership.cancel()
        assert ann.join().received == 1
        leaving = in_thread(ann.stub.Leave, pb.LeaveRequest(session=ann.session))
        try:
            assert waits(leaving)
            assert not account.left
        finally:
            learns.set()
        leaving.result(timeout=10)
        assert (account.left, account.applied.sequence) == (True, 1)


def test_now_and_then_what_was_learned_is_saved_though_nobody_asks(tmp_path: Path) -> None:
    run = lasting(checkpoint_every=0.05, checkpoints=1)
    with serving(run, tmp_path) as server, process(server) as ann:
        ann.join()
        requests = ann.messages(pb.StreamActivationsRequest, [smashed(run)] * 2, sent=2)
        ann.stub.StreamActivations(requests, timeout=DEADLINE_S)
        assert next(ann.membership).durable.sequence == 2
