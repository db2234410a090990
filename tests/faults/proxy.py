"""A TCP proxy on loopback that does to connections what bad networks do, whenever a test says so.

What a blackhole swallows is not lost to TCP, which would send it again: it passes once the hole is gone.
"""

import asyncio
import socket
import struct
import threading
import time
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, NamedTuple

from dsl_lab.link import Chunk, Way

Direction = Literal["up", "down"]  # client to server, server to client
_BOTH: tuple[Direction, Direction] = ("up", "down")
_FAST = 1e9  # bytes per second, where nothing is throttled
_INSIDE = 8  # chunks of a connection that may be on their way
_LINGER_NOT = struct.pack("ii", 1, 0)  # closing is an RST


class _Cut(NamedTuple):
    way: Direction
    after: int
    reset: bool


class Proxy:
    """A port that leads to target_port. A fault is in both directions, unless it is given one."""

    def __init__(self, target_port: int) -> None:
        self.target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0  # connections
        self.passed = dict.fromkeys(_BOTH, 0)  # bytes, of all connections
        self._ways = {way: Way(_FAST, 0.0) for way in _BOTH}
        self._open = {way: asyncio.Event() for way in _BOTH}
        self._cut: _Cut | None = None  # of the next connection
        self._ends: set[Writer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self.pass_through()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._over.set)
        self._thread.join()

    def delay(self, seconds: float, *ways: Direction) -> None:
        self._do(lambda: self._ways.update({way: Way(_FAST, seconds) for way in ways or _BOTH}))

    def throttle(self, rate: float, *ways: Direction) -> None:
        """To so many bytes per second, which all connections share."""
        self._do(lambda: self._ways.update({way: Way(rate, 0.0) for way in ways or _BOTH}))

    def blackhole(self, *ways: Direction) -> None:
        """Nothing passes; connections stay open, and new ones are taken and told nothing."""
        self._do(*[self._open[way].clear for way in ways or _BOTH])

    def pass_through(self) -> None:
        """The end of every fault, but for connections that have been cut."""
        self.delay(0.0)
        self._do(*[self._open[way].set for way in _BOTH])
        self._cut = None

    def cut(self, after: int, way: Direction = "up", reset: bool = True) -> None:
        """The next connection, after so many bytes that way: by an RST, or as by a process that ends."""
        self._cut = _Cut(way, after, reset)

    def reset_all(self) -> None:
        """Every connection that is open now."""
        self._do(lambda: _reset(*self._ends))

    def _do(self, *changes: Callable[[], object]) -> None:
        """In the proxy's thread; done when this returns."""
        done: Future[list[object]] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result([change() for change in changes]))
        done.result()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._over.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: Reader, near: Writer) -> None:
        self.accepted += 1
        cut, self._cut = self._cut, None
        task = self._loop.create_task(self._join(reader, near, cut))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, near_reader: Reader, near: Writer, cut: _Cut | None) -> None:
        """A connection, to its end."""
        ends = {near}
        try:
            await self._passable()
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.target)
            ends.add(far)
            self._ends |= ends
            for end in ends:
                end.transport.set_write_buffer_limits(high=0)  # drained: the kernel has it
            async with asyncio.TaskGroup() as group:
                for way, source, sink in zip(_BOTH, (near_reader, far_reader), (far, near), strict=True):
                    inside = asyncio.Queue[Chunk](_INSIDE)
                    group.create_task(self._take(way, source, inside))
                    group.create_task(self._give(way, inside, sink, ends, cut))
            for end in ends:
                end.close()
        except* OSError:  # an end is gone, or nobody listens there
            await self._passable()  # before that the other end cannot know
        finally:
            self._ends -= ends
            _reset(*ends)

    async def _passable(self) -> None:
        for way in _BOTH:
            await self._open[way].wait()

    async def _take(self, way: Direction, source: Reader, inside: asyncio.Queue[Chunk]) -> None:
        data = b"to begin with"
        while data:
            pace = self._ways[way]
            data = await source.read(pace.chunk)
            await inside.put(pace.take(data))
            await asyncio.sleep(max(0.0, pace.busy()))

    async def _give(
        self, way: Direction, inside: asyncio.Queue[Chunk], sink: Writer, ends: set[Writer], cut: _Cut | None
    ) -> None:
        left = cut.after if cut and cut.way == way else None  # bytes
        while left != 0 and (chunk := await inside.get()).data:
            await asyncio.sleep(max(0.0, chunk.due - time.monotonic()))
            await self._open[way].wait()
            data = chunk.data[:left]
            if sink.is_closing():
                return  # cut from the other side
            self.passed[way] += len(data)  # first: who has got them may ask
            sink.write(data)
            await sink.drain()
            left = left and left - len(data)
        await self._open[way].wait()
        if cut and left == 0 and cut.reset:
            _reset(*ends)
        elif left == 0:
            for end in ends:
                end.close()
        elif not sink.is_closing():
            sink.write_eof()


def _reset(*ends: Writer) -> None:
    for end in ends:
        if not end.is_closing():
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            end.transport.abort()
