"""A bounded queue between threads, which any of them may close, with a reason.

Like queue.Queue with the shutdown that Python 3.13 gave it: closing wakes everyone who waits.
"""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from common.errors import SplitLearningError

T = TypeVar("T")


class Channel(Generic[T]):
    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._closed: SplitLearningError | None = None
        self._changed = threading.Condition()

    @property
    def closed(self) -> bool:
        with self._changed:
            return self._closed is not None

    def put(self, item: T, wait: bool = True) -> None:
        """Adds an item; waits while the channel is full, unless told not to. Raises why it was closed."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                raise self._closed
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yields items as they come, until the channel is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._items)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def close(self, reason: SplitLearningError) -> None:
        """Refuses every later item. The first reason given is the one that is told."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()
