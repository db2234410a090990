"""What a caller may cost the server: by a stream that says nothing, by call after call that is refused, or
that anyone may make."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from common.wire.rpc import PING

OPENING_S = 60.0  # for the first message of a stream: on a slow link it has another's batches before it
PROMPT = 100  # refusals, or answers to strangers, that are told at once
WITHIN_S = 1.0  # so many in this time
HELD_S = 1.0  # how long those above are not told
STRANGERS = (PING.path,)  # who calls these need not be a member

Context = grpc.ServicerContext


class Gate(grpc.ServerInterceptor):
    """Stands before every method. Refusing costs more than asking, so who asks without end must wait for it.

    A caller that waits has a call open, and of these a connection has only so many: so it asks no more.
    """

    def __init__(self) -> None:
        self._told = deque[float](maxlen=PROMPT)  # when the last ones were
        self._lock = threading.Lock()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        method = getattr(handler, kind)
        if details.method in STRANGERS:
            method = self._held(method)
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            self._guarded(method, handler.request_streaming, handler.response_streaming),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _held(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def held(request: Any, context: Context) -> Any:
            answer = method(request, context)
            self._hold(context)
            return answer

        return held

    def _guarded(
        self, method: Callable[..., Any], requests_stream: bool, responses_stream: bool
    ) -> Callable[..., Any]:
        def begun(request: Any, context: Context) -> Any:
            return _in_time(request, context) if requests_stream else request

        def unary(request: Any, context: Context) -> Any:
            try:
                return method(begun(request, context), context)
            except Exception:
                self._hold(context)
                raise

        def stream(request: Any, context: Context) -> Iterator[Any]:
            try:
                yield from method(begun(request, context), context)
            except Exception:
                self._hold(context)
                raise

        return stream if responses_stream else unary

    def _hold(self, context: Context) -> None:
        """What is one of too many is told later, unless nobody waits for it any more."""
        gone, now = threading.Event(), time.monotonic()
        if not context.add_callback(gone.set):
            return
        with self._lock:
            many = len(self._told) == PROMPT and now - self._told[0] < WITHIN_S
            self._told.append(now)
        if many:
            gone.wait(HELD_S)


def _in_time(requests: Iterator[Any], context: Context) -> Iterator[Any]:
    """The requests. Ends the call if the first does not come."""
    late = threading.Timer(OPENING_S, context.cancel)
    late.daemon = True
    late.start()
    try:
        first = next(requests, None)
    finally:
        late.cancel()
    if first is not None:
        yield first
        yield from requests
