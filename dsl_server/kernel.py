"""What the kernel counted on the server's connections: everything, HTTP/2 and TLS included.

Linux tells a socket's bytes by its diagnostics interface (TCP_INFO), read here with pyroute2. They
are gone with the socket, so the connections are read every second and when a client leaves.
"""

import platform
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

INTERVAL_S = 1.0
_TCP_INFO = 1 << 1  # the extension asked for: INET_DIAG_INFO
_LISTEN = 10


class Sockets:
    """Counts bytes of the TCP connections to a port. `counts()` is None where the kernel is mute."""

    def __init__(self) -> None:
        self._port = 0
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}
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
            # By another thread: pyroute2 runs an event loop, and this one may be a notebook's, that has one.
            with ThreadPoolExecutor(1) as another:
                another.submit(self._read, socket.AF_INET).result()
        except (OSError, ImportError):  # no permission, no such kernel interface, no pyroute2
            return False
        return True

    def _read(self, family: int) -> None:
        from pyroute2 import DiagSocket  # here: the module takes a while, and is not for every system

        with DiagSocket() as diagnostics:
            diagnostics.bind()
            for entry in diagnostics.get_sock_stats(family=family, extensions=_TCP_INFO):
                info = entry.get_attr("INET_DIAG_INFO")
                if entry["idiag_sport"] != self._port or entry["idiag_state"] == _LISTEN or not info:
                    continue
                peer = (entry["idiag_dst"], entry["idiag_dport"])
                self._seen[peer] = (info["tcpi_bytes_received"], info["tcpi_bytes_acked"])
