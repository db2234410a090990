"""gRPC ignores options that it does not know, in silence: so here is what each of ours effects.

One end has the project's options, the other next to none, so that what is seen is the former's doing. The
proofs of three options are those of cases, too: E2, E6 and B9.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from common.wire import options
from common.wire.options import Options, client_options, server_options
from tests.faults.proxy import Direction, Proxy
from tests.ordinary import DEADLINE_S
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
LIMIT = 1 << 20  # bytes of a message
STREAMS = 3
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
DIRECT = ("grpc.enable_http_proxy", 0)
ANY_PINGS = ("grpc.http2.min_ping_interval_without_data_ms", 1)
PING_BYTES = 17  # on the wire, and as many in answer
ENDS = pytest.mark.parametrize("end", ["client", "server"])


@contextlib.contextmanager
def plain_server(of_server: Options) -> Iterator[tuple[int, list[str]]]:
    """Its port, and the calls that came, by name."""
    over, made = threading.Event(), list[str]()

    def unary(name: str, behaviour: Callable[[bytes, grpc.ServicerContext], bytes]) -> Any:
        def counted(request: bytes, context: grpc.ServicerContext) -> bytes:
            made.append(name)
            return behaviour(request, context)

        return grpc.unary_unary_rpc_method_handler(counted)

    def hold(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(lambda: made.append("Hold, which is over"))
        yield b"here"
        over.wait()

    def metadata(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("x-much", "a" * int(request)),))
        return b""

    handlers = {
        "Take": unary("Take", lambda *_: b""),
        "Give": unary("Give", lambda request, _: bytes(int(request))),
        "GiveMetadata": unary("GiveMetadata", metadata),
        "Fail": unary("Fail", lambda _, context: context.abort(Code.UNAVAILABLE, "not today")),
        "Hold": grpc.unary_stream_rpc_method_handler(hold),
    }
    server = grpc.server(ThreadPoolExecutor(4), options=of_server)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("plain", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, made
    finally:
        over.set()
        server.stop(grace=None).wait()


@contextlib.contextmanager
def channel_to(port: int, of_client: Options) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", of_client) as channel:
        yield channel


@contextlib.contextmanager
def pair(end: str, others: Options) -> Iterator[tuple[grpc.Channel, Proxy, list[str]]]:
    """A client and a server, one of them with the project's options; the calls that were made."""
    of_client, of_server = client_options(LIMIT), server_options(LIMIT, STREAMS)
    if end == "client":
        of_server = others
    else:
        of_client = [DIRECT, *others]
    with (
        plain_server(of_server) as (port, made),
        Proxy(port) as proxy,
        channel_to(proxy.port, of_client) as channel,
    ):
        yield channel, proxy, made


def held(channel: grpc.Channel) -> Any:
    """A call that both ends keep open, and that carries nothing more."""
    hold: Any = channel.unary_stream("/plain/Hold")
    stream = hold(b"")
    assert next(stream) == b"here"
    return stream


def code_of(channel: grpc.Channel, name: str, request: bytes = b"", **more: Any) -> grpc.StatusCode:
    ask: Any = channel.unary_unary(f"/plain/{name}")
    try:
        ask(request, timeout=DEADLINE_S, **more)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return Code.OK


# ---------------------------------------------------------------- sizes


@ENDS
def test_f6_max_receive_message_length_refuses_longer_messages(end: str) -> None:
    with pair(end, UNLIMITED) as (channel, _, _made):
        for size, code in ((LIMIT - 100, Code.OK), (LIMIT + 1, Code.RESOURCE_EXHAUSTED)):
            name, request = ("Give", str(size).encode()) if end == "client" else ("Take", bytes(size))
            assert code_of(channel, name, request) is code


@ENDS
def test_f6_max_send_message_length_lets_no_longer_message_out(end: str) -> None:
    with pair(end, UNLIMITED) as (channel, proxy, _made):
        way: Direction = "up" if end == "client" else "down"
        for size, code in ((LIMIT - 100, Code.OK), (LIMIT + 1, Code.RESOURCE_EXHAUSTED)):
            name, request = ("Take", bytes(size)) if end == "client" else ("Give", str(size).encode())
            before = proxy.passed[way]
            assert code_of(channel, name, request) is code
            assert (proxy.passed[way] - before > size) == (code is Code.OK)


@ENDS
def test_f6_max_metadata_size_begins_to_refuse_above_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance, the more the larger, and all of 16 KiB: here a third of them. The project's limit is what
    gRPC has of itself, so it takes another to see that it is gRPC's to follow."""
    monkeypatch.setattr(options, "METADATA_BYTES", 2000)
    with pair(end, []) as (channel, _, _made):

        def code(size: int) -> grpc.StatusCode:
            if end == "client":
                return code_of(channel, "GiveMetadata", str(size).encode())
            return code_of(channel, "Take", metadata=(("x-much", "a" * size),))

        assert {code(1000) for _ in range(20)} == {Code.OK}
        assert Code.RESOURCE_EXHAUSTED in {code(7000) for _ in range(60)}


def test_f6_max_concurrent_streams_keeps_further_calls_back() -> None:
    with pair("server", []) as (channel, _, made):
        streams = [held(channel) for _ in range(STREAMS)]
        take: Any = channel.unary_unary("/plain/Take")
        further = take.future(b"", timeout=DEADLINE_S)
        assert waits(in_thread(further.result), 0.3)
        assert "Take" not in made
        streams.pop().cancel()
        further.result()
        for stream in streams:
            stream.cancel()


# ---------------------------------------------------------------- pings


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings are sent after a fraction of a second, and not waited for much longer."""
    monkeypatch.setattr(options, "KEEPALIVE_MS", 300)
    monkeypatch.setattr(options, "PING_TIMEOUT_MS", 1000)


def sent_by(end: str) -> Direction:
    return "up" if end == "client" else "down"


@ENDS
@pytest.mark.usefixtures("soon")
def test_f6_keepalive_time_sends_pings_into_the_silence(end: str) -> None:
    with pair(end, [ANY_PINGS]) as (channel, proxy, _made):
        stream, way = held(channel), sent_by(end)
        before = proxy.passed[way]
        wait_for(lambda: proxy.passed[way] >= before + 4 * PING_BYTES)
        stream.cancel()


@pytest.mark.usefixtures("soon")
def test_f6_max_pings_without_data_lets_a_client_s_pings_go_on() -> None:
    """Of themselves they would stop after the second, and a server that freezes later not be noticed."""
    with pair("client", [ANY_PINGS]) as (channel, proxy, _made):
        stream, before = held(channel), proxy.passed["up"]
        wait_for(lambda: proxy.passed["up"] >= before + 6 * PING_BYTES)
        stream.cancel()


@ENDS
@pytest.mark.usefixtures("soon")
def test_f6_ping_timeout_ends_a_call_through_a_blackhole(end: str) -> None:
    with pair(end, [ANY_PINGS]) as (channel, proxy, made):
        stream = held(channel)
        proxy.blackhole()
        if end == "client":
            error: Any = in_thread(next, stream).exception(DEADLINE_S)
            assert error.code() is Code.UNAVAILABLE
        else:
            wait_for(lambda: "Hold, which is over" in made)
        stream.cancel()


@pytest.mark.usefixtures("soon")
def test_f6_min_ping_interval_without_data_lets_idle_clients_ping() -> None:
    """Of itself a server that is silent takes more than a ping in five minutes for an attack."""
    silent = [option for option in server_options(LIMIT, STREAMS) if option[0] != "grpc.keepalive_time_ms"]
    with (
        plain_server(silent) as (port, _),
        Proxy(port) as proxy,
        channel_to(proxy.port, client_options(LIMIT)) as channel,
    ):
        stream, before = held(channel), proxy.passed["up"]
        wait_for(lambda: proxy.passed["up"] >= before + 8 * PING_BYTES or not stream.is_active())
        assert stream.is_active()
        stream.cancel()


@ENDS
def test_f6_keepalive_timeout_is_how_long_the_kernel_sends_again_before_it_gives_up(end: str) -> None:
    """A blackhole that swallows what is under way is noticed by TCP, not by pings."""
    with pair(end, [ANY_PINGS]) as (channel, proxy, _made):
        stream = held(channel)
        port = proxy.port if end == "client" else proxy.target
        with connections() as found:
            (own,) = [
                each
                for each in found
                if (each.getpeername() if end == "client" else each.getsockname())[1] == port
            ]
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == options.PING_TIMEOUT_MS
        stream.cancel()


@contextlib.contextmanager
def connections() -> Iterator[list[socket.socket]]:
    """Those of this process, by TCP."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile, or not connected, or no socket
                end = stack.enter_context(socket.socket(fileno=os.dup(int(number))))
                if end.family in (socket.AF_INET, socket.AF_INET6) and end.getpeername():
                    found.append(end)
        yield found


# ---------------------------------------------------------------- connecting


@pytest.fixture(scope="module")
def gaps() -> list[float]:
    """Seconds between the first attempts of a client to connect, where each ends at once."""
    times = list[float]()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        channel_to(listener.getsockname()[1], client_options(LIMIT)) as channel,
    ):
        grpc.channel_ready_future(channel)
        while len(times) < 9:
            listener.accept()[0].close()
            times.append(time.monotonic())
    return [after - before for before, after in itertools.pairwise(times)]


def test_f6_initial_reconnect_backoff_makes_the_second_attempt_soon(gaps: list[float]) -> None:
    """Gaps are a fifth longer or shorter, by chance; of themselves all would be about as long."""
    assert min(gaps[:2]) < 0.5 * max(gaps)


def test_f6_max_reconnect_backoff_keeps_attempts_coming(gaps: list[float]) -> None:
    """Of themselves they would be 5 seconds apart by now, and 2 minutes later on."""
    assert max(gaps) < 4


def test_f6_min_reconnect_backoff_gives_up_soon_on_a_connection_that_says_nothing() -> None:
    with plain_server([]) as (port, _), Proxy(port) as proxy:
        proxy.blackhole()
        with channel_to(proxy.port, client_options(LIMIT)) as channel:
            grpc.channel_ready_future(channel)
            wait_for(lambda: proxy.accepted >= 3)


def test_f6_enable_retries_sends_nothing_twice_whatever_a_service_config_says() -> None:
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    asked: Any = [*client_options(LIMIT), ("grpc.service_config", config)]
    with plain_server([]) as (port, made), channel_to(port, asked) as channel:
        assert code_of(channel, "Fail") is Code.UNAVAILABLE
        assert made == ["Fail"]
