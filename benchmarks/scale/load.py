"""Senders: clients of the real protocol that compute nothing. One process has many, each with a connection of
its own.

A sender joins, opens one endless segment, and while it is told to sends batches as fast as the server takes
them.
"""

import asyncio
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch

from benchmarks.scale.net import SAMPLE_BYTES, be_patient
from common.methods.base import Smashed
from common.wire import codec, pieces, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.options import SLACK_BYTES, client_options
from common.wire.pieces import PIECE_BYTES

SPEC = BatchSpec((16, 32, 32), 128, 10)
ENDLESS = 1 << 31
Sent = tuple[int, int, float]  # client, number of the batch, when its first byte was handed over


class Frames:
    """A batch of so many samples as messages; only the first differs from one batch to the next."""

    def __init__(self, samples: int) -> None:
        batch = Smashed(torch.rand(samples, *SPEC.cut_shape), torch.randint(0, 10, (samples,)))
        self._first, *rest = codec.pack_batch(pb.StreamActivationsRequest, 1, batch, SPEC)
        self._rest = [pieces.encode(piece) for piece in rest]
        assert batch.z.nbytes == samples * SAMPLE_BYTES

    def numbered(self, sequence: int) -> Sequence[bytes]:
        self._first.head.batch.sequence = sequence
        return [pieces.encode(self._first), *self._rest]


class Sender:
    def __init__(self, port: int, name: str, sent: list[Sent]) -> None:
        options = [*client_options(2 * PIECE_BYTES + SLACK_BYTES), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self._name, self._sent, self._sequence, self.client = name, sent, 0, -1

    async def join(self) -> None:
        call = self._channel.unary_stream(
            rpc.JOIN.path, pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString
        )
        request = pb.JoinRequest(
            oldest_version=rpc.VERSION, newest_version=rpc.VERSION, name=self._name, codecs=pb.Codec.values()
        )
        self._membership = call(request, wait_for_ready=True)
        welcome = (await self._membership.read()).welcome
        self.client, self._session = welcome.client, welcome.session

    async def open(self) -> None:
        call = self._channel.stream_unary(rpc.STREAM_ACTIVATIONS.path)
        self._call: Any = call()
        segment = pb.Segment(session=self._session, first_sequence=1, batches=ENDLESS, samples=1 << 40)
        await self._call.write(pb.StreamActivationsRequest(segment=segment).SerializeToString())

    async def send(self, frames: Frames, going: asyncio.Event) -> None:
        """Batch after batch; the one that it is at when it is to stop is sent to its end."""
        while going.is_set():
            self._sequence += 1
            messages = frames.numbered(self._sequence)
            self._sent.append((self.client, self._sequence, time.monotonic()))
            for message in messages:
                await self._call.write(message)


async def _load(ports: Sequence[int], names: Sequence[str], parent: Connection) -> None:
    sent: list[Sent] = []
    frames: dict[int, Frames] = {}
    senders = [[Sender(port, name, sent) for name in names] for port in ports]
    going = asyncio.Event()
    loop = asyncio.get_running_loop()
    parent.send("ready")
    tasks: list[asyncio.Task[None]] = []
    while True:
        # None but "stop" comes while anything is sent; this thread waits for it beside the loop.
        try:
            command, *arguments = await loop.run_in_executor(None, parent.recv)
        except EOFError:
            return
        if command == "join":
            start = time.monotonic()
            await asyncio.gather(*(sender.join() for sender in senders[arguments[0]]))
            parent.send(time.monotonic() - start)
        elif command == "open":
            await asyncio.gather(*(sender.open() for sender in senders[arguments[0]]))
            parent.send(None)
        elif command == "go":
            server, samples = arguments
            frames.setdefault(samples, Frames(samples))
            going.set()
            tasks = [asyncio.create_task(sender.send(frames[samples], going)) for sender in senders[server]]
        elif command == "stop":
            going.clear()
            await asyncio.gather(*tasks)
            parent.send(list(sent))
            sent.clear()


def main(ports: Sequence[int], names: Sequence[str], parent: Connection) -> None:
    torch.set_num_threads(1)
    be_patient()
    asyncio.run(_load(ports, names, parent))
