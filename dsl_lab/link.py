"""A slow link, emulated: a TCP relay on loopback that lets bytes through at a rate, and after a delay.

Its buffers are small, so a sender feels the rate soon: what it is ahead by lies in its own kernel's buffer,
about a second of a rate of 10 Mbit/s.
"""

import contextlib
import select
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

_CHUNK_S = 0.004  # of a way's time: what is read at once
_QUEUE_S = 0.02  # of a way's time: what may wait to pass
_SMALLEST = 4096  # bytes, of a buffer and a chunk
_SEGMENT = 1448  # bytes: loopback's 64 KiB would make the sender's buffer grow to megabytes
_POLL_S = 0.05  # how often it is asked whether the link is to end


@dataclass(frozen=True)
class Chunk:
    """due: when it comes out, by time.monotonic. data: empty where the sender has closed its end."""

    due: float
    data: bytes


class Way:
    """One direction of a link, which all its connections share. rate: bytes per second. delay: seconds."""

    def __init__(self, rate: float, delay: float) -> None:
        self._rate, self._delay = rate, delay
        self.chunk = max(_SMALLEST, round(rate * _CHUNK_S))
        self.buffer = max(_SMALLEST, round(rate * _QUEUE_S))
        self.bytes = 0  # that went in
        self._free = time.monotonic()  # when all of them will have passed
        self._lock = threading.Lock()

    def take(self, data: bytes) -> Chunk:
        """Bytes that go in now, behind all that went in before."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + len(data) / self._rate
            self.bytes += len(data)
            return Chunk(self._free + self._delay, data)

    def busy(self) -> float:
        """Seconds until there is room for more; below 0 if there is some."""
        with self._lock:
            return self._free - time.monotonic() - _QUEUE_S


class Link:
    """A port of its own that leads to target_port. rate: bytes per second, each way. delay: seconds, one way.

    Any number of connections share it. What one end closes is closed at the other, each way by itself.
    """

    def __init__(self, target_port: int, rate: float, delay: float = 0.0) -> None:
        self._target = ("127.0.0.1", target_port)
        self.up, self.down = Way(rate, delay), Way(rate, delay)
        self._listener = self._small(socket.socket())
        self._listener.bind(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_S)
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="link", daemon=True)]

    def __enter__(self) -> "Link":
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._threads[0].join()  # no connection comes any more
        _shut(*self._sockets.copy())
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with self._listener:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    near, _ = self._listener.accept()
                    far = self._small(socket.socket())
                    try:
                        far.connect(self._target)
                    except OSError:  # nobody listens there: what `_join` carries ends at once
                        _shut(near)
                    self._sockets |= {near, far}
                    self._threads.append(threading.Thread(target=self._join, args=(near, far), daemon=True))
                    self._threads[-1].start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """A connection, to its end at both sides."""
        with near, far:
            back = threading.Thread(target=_carry, args=(self.down, far, near), daemon=True)
            back.start()
            _carry(self.up, near, far)
            back.join()
            self._sockets -= {near, far}

    def _small(self, end: socket.socket) -> socket.socket:
        """With small buffers; a listener's are those of what it accepts."""
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            end.setsockopt(socket.SOL_SOCKET, option, self.up.buffer)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return end


def _carry(way: Way, source: socket.socket, sink: socket.socket) -> None:
    """All that comes from one end to the other, when it is due; then that no more will come."""
    inside = deque[Chunk]()
    reading = True
    try:
        while reading or inside:
            busy = way.busy()
            times = [inside[0].due - time.monotonic()] if inside else []
            times += [busy] if reading and busy > 0 else []
            sources = [source] if reading and busy <= 0 else []
            if select.select(sources, [], [], max(0.0, min(times)) if times else None)[0]:
                inside.append(way.take(source.recv(way.chunk)))
                reading = inside[-1].data != b""
            while inside and inside[0].due <= time.monotonic():
                data = inside.popleft().data
                sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)
    except OSError:
        _shut(source, sink)  # an end is gone: so is the other


def _shut(*ends: socket.socket) -> None:
    """Wakes whoever waits for them."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
