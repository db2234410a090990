"""What the clients of a process have in common: the way to the server, the network as it is built, the data.

Each is made once, by who needs it first, and nobody changes it: a client trains a copy of the network, on a
share of the data.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from common.nets.cut import CutNet
from common.tls import Credentials
from dsl_client.batches import Batches, Indices
from dsl_client.connection import channel_to
from dsl_client.data import Dataset

T = TypeVar("T")


class Once(Generic[T]):
    """What is made by who asks first; who asks meanwhile waits for it."""

    def __init__(self) -> None:
        self._made: T | None = None
        self._lock = threading.Lock()

    def __call__(self, make: Callable[[], T]) -> T:
        if self._made is None:
            with self._lock:
                self._made = make() if self._made is None else self._made
        return self._made


class Commons:
    """Of the clients of one run. target: the server at which several share a connection, host:port; else a
    client has all of this to itself."""

    def __init__(self, target: str | None = None, credentials: Credentials | None = None) -> None:
        self.channel = channel_to(target, credentials) if target else None
        self.sets = Once[tuple[Dataset, Dataset]]()
        self.shares = Once[Sequence[Indices]]()
        self.test = Once[Batches]()  # where each is scored by the whole of it
        self._net = Once[CutNet]()

    def net(self, build: Callable[[], CutNet]) -> CutNet:
        """A network of the caller's own, like that of all the others."""
        return copy.deepcopy(self._net(build)) if self.channel else build()

    def close(self) -> None:
        if self.channel:
            self.channel.close()
