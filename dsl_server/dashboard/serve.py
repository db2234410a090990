"""The page's port, served by a thread beside the run."""

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.tls import is_loopback

if TYPE_CHECKING:
    from dsl_server.watch import View

READERS = 64  # connections at once; a further one is told 503
LAST_S = 2.0  # for readers to hear how the run ended


class Dashboard:
    """Bound at once, so that a port in use is told before anything is begun; port 0 is any.

    look: at the run once more, now. Raises ConfigError when the port cannot be bound, or what the page needs
    is not installed.
    """

    def __init__(self, port: int, host: str) -> None:
        _check_installed()
        self._socket = _bound(port, host)
        self._host, self.port = self._socket.getsockname()[:2]
        self._only_loopback = is_loopback(f"{self._host}:{self.port}")
        self.look: Callable[[], None] = lambda: None
        self._end: Callable[[], None] = lambda: None

    @property
    def greeting(self) -> str:
        """Where it is, for a person."""
        if self._only_loopback:
            host = f"[{self._host}]" if ":" in self._host else self._host
            return f"the run is shown at http://{host}:{self.port}"
        return f"the run is shown, unencrypted and to anyone, at http://THIS-HOST:{self.port}"

    def start(self, look: Callable[[], "View"]) -> None:
        """look: gives the run as it is at this moment; any thread may call it."""
        import uvicorn

        from dsl_server.dashboard.app import app_of
        from dsl_server.dashboard.feed import Feed

        feed = Feed(look)
        server = uvicorn.Server(
            uvicorn.Config(
                app_of(feed, self._only_loopback),
                http="h11",
                ws="none",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                limit_concurrency=READERS,
                timeout_graceful_shutdown=int(LAST_S),
            )
        )
        thread = threading.Thread(
            target=server.run, args=([self._socket],), name="dashboard", daemon=True
        )  # it leaves signals alone, since it is not the main thread
        thread.start()

        def end() -> None:
            feed.end()
            server.should_exit = True
            thread.join(2 * LAST_S)

        self.look, self._end = feed.tick, end

    def stop(self) -> None:
        """Tells whoever looks how the run has ended, and ends."""
        self._end()
        self._socket.close()


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--dashboard needs {error.name}: pip install 'decoupled-split-learning[ui]'"
        ) from error


def _bound(port: int, host: str) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--dashboard {port}: say a port from 0 (any) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as unless_bound:
            bound = unless_bound.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
            unless_bound.pop_all()
        return bound
    except OSError as error:
        raise ConfigError(
            f"--dashboard {port}: {host} cannot be bound ({error.strerror}); choose another port, or "
            "--dashboard-host"
        ) from error
