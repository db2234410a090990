"""What the kernel counted on the server's connections: everything, HTTP/2 and TLS included.

Linux tells a socket's bytes by its diagnostics interface (sock_diag(7), TCP_INFO), asked here for one port
alone and read field by field: with thousands of connections a reader of everything takes seconds. They are
gone with the socket, so the connections are read every second and when a client leaves.
"""

import platform
import socket
import struct
import threading
from collections.abc import Iterator

INTERVAL_S = 1.0
_SOCK_DIAG = 4  # of netlink's families
_BY_FAMILY, _DUMP = 20, 0x301  # SOCK_DIAG_BY_FAMILY; NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3  # of netlink's messages
_INFO = 2  # INET_DIAG_INFO, an attribute
_CONNECTED = 0xFFF & ~(1 << 10)  # all states but LISTEN
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, number, port
_REQUEST = struct.Struct("=BBBxIHH44x")  # inet_diag_req_v2: family, protocol, extensions, states, ports
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_MESSAGE_BYTES = 72  # inet_diag_msg
_PEER = slice(6, 40)  # of it: the other end's port, our address, its address
_BYTES = struct.Struct("=120xQQ")  # tcp_info: tcpi_bytes_acked, tcpi_bytes_received


class Sockets:
    """Counts bytes of the TCP connections to a port. `counts()` is None where the kernel is mute."""

    def __init__(self) -> None:
        self._port = 0
        self._seen: dict[bytes, tuple[int, int]] = {}  # by the other end
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.available = platform.system() == "Linux" and self._works()

    def watch(self, port: int) -> None:
        """Counts this port's connections from now on."""
        self._port = port
        if self.available:
            self._thread = threading.Thread(target=self._watch, name="kernel-counts", daemon=True)
            self._thread.start()

    def read(self) -> None:
        """Takes the present counts."""
        if not self.available:
            return
        with self._lock:
            for family in (socket.AF_INET, socket.AF_INET6):
                self._read(family)

    def counts(self) -> dict[str, int] | None:
        """{"up": bytes received, "down": bytes sent and acknowledged}, over all connections."""
        if not self.available:
            return None
        with self._lock:
            counts = self._seen.values()
            return {"up": sum(up for up, _ in counts), "down": sum(down for _, down in counts)}

    def close(self) -> None:
        self._stop.set()

    def join(self) -> None:
        """After `close`: waits until its thread has ended."""
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.read()

    def _works(self) -> bool:
        try:
            list(_connections(socket.AF_INET, 1))
        except OSError:  # no permission, no such kernel interface
            return False
        return True

    def _read(self, family: int) -> None:
        for peer, acked, received in _connections(family, self._port):
            self._seen[peer] = (received, acked)


def _connections(family: int, port: int) -> Iterator[tuple[bytes, int, int]]:
    """Of each connection to this port of ours: its other end, bytes acknowledged, bytes received. Raises
    OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as diagnostics:
        asked = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _CONNECTED, socket.htons(port), 0)
        diagnostics.send(_HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, _DUMP, 1, 0) + asked)
        while True:
            for kind, body in _messages(diagnostics.recv(1 << 16)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "the kernel tells nothing of sockets")
                info = _attribute(body[_MESSAGE_BYTES:], _INFO)
                if len(info) >= _BYTES.size:
                    yield bytes(body[_PEER]), *_BYTES.unpack_from(info)


def _messages(received: bytes) -> Iterator[tuple[int, memoryview]]:
    rest = memoryview(received)
    while len(rest) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(rest)
        yield kind, rest[_HEADER.size : length]
        rest = rest[_aligned(length) :]


def _attribute(rest: memoryview, wanted: int) -> memoryview:
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == wanted:
            return rest[_ATTRIBUTE.size : length]
        rest = rest[max(_ATTRIBUTE.size, _aligned(length)) :]
    return rest[:0]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
