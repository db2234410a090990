"""What a caller may cost the server: by a stream that says nothing, by call after call that is refused."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

OPENING_S = 60.0  # for the first message of a stream: on a slow link it has another's batches before it
PROMPT = 100  # refusals within a second that are told at once
HELD_S = 1.0  # how long those above are not told

Context = grpc.ServicerContext


class Gate(grpc.ServerInterceptor):
    """Stands before every method. Refusing costs more than asking, so who asks without end must wait for it.

    A caller that waits has a call open, and of these a connection has only so many: so it asks no more.
    """

    def __init__(self) -> None:
        self._refusals = deque[float](maxlen=PROMPT)  # when the last ones were
        self._lock = threading.Lock()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            self._guarded(getattr(handler, kind), handler.request_streaming, handler.response_streaming),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

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
        """A refusal that is one of too many is told later, unless nobody waits for it any more."""
        gone, now = threading.Event(), time.monotonic()
        if not context.add_callback(gone.set):
            return
        with self._lock:
            many = len(self._refusals) == PROMPT and now - self._refusals[0] < 1.0
            self._refusals.append(now)
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
