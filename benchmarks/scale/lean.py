"""gRPC's two servers in Python, each as little as it can be: one thread a call, or one event loop.

Both speak the protocol as far as senders need it (Join, StreamActivations), read the same pieces by the same
codec, and lay batches into bounded lanes, from which one thread takes one of each in turn and steps. There is
no ledger, no tally, no audit: what differs between the two is how gRPC is served, and nothing else.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import grpc
import torch

from common.methods import build_method
from common.methods.base import Received
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import server_part
from common.run import Run
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import Arrived, batch_spec
from common.wire.options import SLACK_BYTES, server_options
from common.wire.pieces import PIECE_BYTES

OnApplied = Callable[[int, int], None]  # client, sequence


class Lanes:
    """One lane a client; whoever fills them sees to it that none holds more than it may."""

    def __init__(self, clients: int) -> None:
        self._lanes: list[deque[Arrived]] = [deque() for _ in range(clients)]
        self._came = threading.Semaphore(0)

    def put(self, client: int, batch: Arrived) -> None:
        self._lanes[client].append(batch)
        self._came.release()

    def __iter__(self) -> Iterator[tuple[int, Arrived]]:
        """For ever: one batch from each lane that has any, round and round."""
        while True:
            for client, lane in enumerate(self._lanes):
                if lane:
                    self._came.acquire()
                    yield client, lane.popleft()
            self._came.acquire()  # until there is one again
            self._came.release()


class Lean(ABC):
    """What the two have in common: the welcome, the lanes, the thread that steps."""

    def __init__(self, run: Run, on_applied: OnApplied) -> None:
        self.run, self._on_applied = run, on_applied
        method, net = build_method(run), build(run)
        self.spec, self.network = batch_spec(run, method, net), net.fingerprint
        self._hosting = Hosting(run, method, server_part(run, method, net, torch.device("cpu")))
        self._clients, self.lanes = count(), Lanes(run.clients)
        self.port = 0

    def welcome(self) -> pb.JoinResponse:
        client = next(self._clients)
        session = str(client)
        return pb.JoinResponse(welcome=pb.Welcome(version=1, client=client, session=session))

    def step_for_ever(self) -> None:
        torch.set_num_threads(1)
        for client, batch in self.lanes:
            received = Received(
                batch.z, batch.y, client=client, progress=0.0, wanted=False, parcel=batch.parcel
            )
            self._hosting.step([received])
            self._on_applied(client, batch.sequence)
            self.free(client)

    @abstractmethod
    def free(self, client: int) -> None:
        """A batch of this client has been taken from its lane."""

    def handlers(self) -> grpc.GenericRpcHandler:
        join, stream = rpc.JOIN, rpc.STREAM_ACTIVATIONS
        methods = {
            join.name: grpc.unary_stream_rpc_method_handler(
                self.join, rpc.reader(join.request, False), rpc.writer(join.response, False)
            ),
            stream.name: grpc.stream_unary_rpc_method_handler(
                self.stream, rpc.reader(stream.request, True), rpc.writer(stream.response, False)
            ),
        }
        return grpc.method_handlers_generic_handler(rpc.SERVICE, methods)

    join: Any
    stream: Any


class Threads(Lean):
    """grpc.server: a thread for each call that is open."""

    def __init__(self, run: Run, on_applied: OnApplied) -> None:
        super().__init__(run, on_applied)
        self._room = [threading.Semaphore(run.inbox) for _ in range(run.clients)]
        calls = 2 * run.clients + 8
        options = server_options(PIECE_BYTES * 2 + SLACK_BYTES, calls, run.clients)
        self._grpc = grpc.server(ThreadPoolExecutor(calls), [self.handlers()], options=options)
        self.port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        threading.Thread(target=self.step_for_ever, daemon=True).start()

    def free(self, client: int) -> None:
        self._room[client].release()

    def join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> Iterator[pb.JoinResponse]:
        gone = threading.Event()
        context.add_callback(gone.set)
        yield self.welcome()
        gone.wait()

    def stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> pb.StreamActivationsResponse:
        pieces = map(rpc.judged, requests)
        client = int(next(pieces).head.segment.session)
        for first in pieces:
            batch = codec.unpack_batch(first, pieces, self.spec)
            self._room[client].acquire()
            self.lanes.put(client, batch)
        return pb.StreamActivationsResponse()


class Loop(Lean):
    """grpc.aio.server: all calls in one event loop. `serve` is the loop; nothing else may hold it up."""

    def __init__(self, run: Run, on_applied: OnApplied) -> None:
        super().__init__(run, on_applied)
        self._freed = deque[int]()
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True).start()
        ready.wait()
        threading.Thread(target=self.step_for_ever, daemon=True).start()

    async def serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = [asyncio.Semaphore(self.run.inbox) for _ in range(self.run.clients)]
        options = server_options(PIECE_BYTES * 2 + SLACK_BYTES, 2 * self.run.clients + 8, self.run.clients)
        server = grpc.aio.server(handlers=[self.handlers()], options=options)
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    def free(self, client: int) -> None:
        self._loop.call_soon_threadsafe(self._room[client].release)

    async def join(
        self, request: pb.JoinRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.JoinResponse]:
        yield self.welcome()
        await asyncio.Event().wait()  # the call's end cancels it

    async def stream(
        self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> pb.StreamActivationsResponse:
        pieces = aiter(requests)
        client = int(rpc.judged(await anext(pieces)).head.segment.session)
        async for read in pieces:
            frame = [rpc.judged(read)]
            declared = frame[0].head.batch
            due = sum(map(codec.declared_bytes, (declared.activations, declared.labels)))
            while sum(piece.size for piece in frame) < due:
                frame.append(rpc.judged(await anext(pieces)))
            batch = codec.unpack_batch(frame[0], iter(frame[1:]), self.spec)
            await self._room[client].acquire()
            self.lanes.put(client, batch)
        return pb.StreamActivationsResponse()
