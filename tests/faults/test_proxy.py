"""Each fault of the proxy has the effect that it says, on connections to a plain echo server."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Direction, Proxy
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

SOON_S = 10.0  # ample for what should take a moment


def echo(end: socket.socket) -> None:
    """Until there is no more, or the connection is gone."""
    with end, contextlib.suppress(OSError):
        while data := end.recv(1 << 16):
            end.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Before a server that sends back what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=echo, args=[listener.accept()[0]], daemon=True).start()

        accepting = in_thread(accept)
        with Proxy(listener.getsockname()[1]) as proxy:
            yield proxy
        listener.shutdown(socket.SHUT_RDWR)
        accepting.result(SOON_S)


@contextlib.contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), SOON_S) as end:
        yield end


def received(end: socket.socket, size: int) -> bytes:
    """So many bytes, or those until the other end is closed."""
    data = bytearray()
    while len(data) < size and (more := end.recv(min(1 << 16, size - len(data)))):
        data += more
    return bytes(data)


def echoed(end: socket.socket, data: bytes) -> bytes:
    end.sendall(data)
    return received(end, len(data))


@contextlib.contextmanager
def echoing() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A connection through a proxy, both of its ends in the test's hands."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy(listener.getsockname()[1]) as proxy,
        connected(proxy) as near,
        listener.accept()[0] as far,
    ):
        far.settimeout(SOON_S)
        yield proxy, near, far


def is_gone(end: socket.socket) -> bool:
    """Whether what is sent there is refused."""
    try:
        end.sendall(b"anyone?")
    except OSError:
        return True
    return False


def test_without_a_fault_all_passes_unchanged_and_is_counted(proxy: Proxy) -> None:
    data = bytes(range(256)) * 20_000
    with connected(proxy) as end:
        sending = in_thread(end.sendall, data)
        assert received(end, len(data)) == data
        sending.result(SOON_S)
    assert (proxy.accepted, proxy.passed["up"], proxy.passed["down"]) == (1, len(data), len(data))


def test_one_way_may_be_closed_alone() -> None:
    with echoing() as (_, near, far):
        near.sendall(b"that is all")
        near.shutdown(socket.SHUT_WR)
        assert received(far, 100) == b"that is all"
        far.sendall(b"and here is the answer")
        far.close()
        assert received(near, 100) == b"and here is the answer"


@pytest.mark.parametrize(("ways", "seconds"), [((), 0.4), (("up",), 0.2), (("down",), 0.2)])
def test_a_delay_holds_every_byte_up_for_so_long(
    ways: tuple[Direction, ...], seconds: float, proxy: Proxy
) -> None:
    proxy.delay(0.2, *ways)
    with connected(proxy) as end:
        start = time.monotonic()
        assert echoed(end, b"?") == b"?"
        assert time.monotonic() - start >= seconds
        assert echoed(end, b"abc" * 100_000) == b"abc" * 100_000, "and in their order"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_throttle_lets_no_more_than_its_rate_through(way: Direction, proxy: Proxy) -> None:
    proxy.throttle(100_000, way)
    with connected(proxy) as end:
        start = time.monotonic()
        assert echoed(end, bytes(50_000)) == bytes(50_000)
        assert time.monotonic() - start >= 0.5
        proxy.pass_through()
        assert echoed(end, bytes(500_000)) == bytes(500_000)


def test_a_blackhole_lets_nothing_through_and_closes_nothing(proxy: Proxy) -> None:
    with connected(proxy) as end:
        assert echoed(end, b"before") == b"before"
        proxy.blackhole()
        end.sendall(b"within")
        answer = in_thread(received, end, 6)
        assert waits(answer)
        assert proxy.passed["up"] == 6
        proxy.pass_through()
        assert answer.result(SOON_S) == b"within", "TCP sends again what was swallowed"


def test_a_connection_into_a_blackhole_is_taken_and_silent(proxy: Proxy) -> None:
    proxy.blackhole()
    with connected(proxy) as end:
        end.sendall(b"hello?")
        answer = in_thread(received, end, 6)
        assert waits(answer)
        assert proxy.passed["up"] == 0
        proxy.pass_through()
        assert answer.result(SOON_S) == b"hello?"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_blackhole_one_way_leaves_the_other_open(way: Direction) -> None:
    with echoing() as (proxy, near, far):
        source, sink = (near, far) if way == "up" else (far, near)
        proxy.blackhole(way)
        source.sendall(b"lost")
        lost = in_thread(received, sink, 4)
        sink.sendall(b"heard")
        assert received(source, 5) == b"heard"
        assert waits(lost)
        proxy.pass_through()
        assert lost.result(SOON_S) == b"lost"


def test_what_is_closed_within_a_blackhole_is_open_at_the_other_end() -> None:
    with echoing() as (proxy, near, far):
        proxy.blackhole()
        near.close()
        end = in_thread(received, far, 1)
        assert waits(end)
        proxy.pass_through()
        assert end.result(SOON_S) == b""


@pytest.mark.parametrize("after", [0, 1, 1000, 100_000])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_lets_just_so_many_bytes_through(way: Direction, after: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1]) as proxy:
        proxy.cut(after, way, reset=False)
        with connected(proxy) as near, listener.accept()[0] as far:
            far.settimeout(SOON_S)
            source, sink = (near, far) if way == "up" else (far, near)
            source.sendall(b"x" * after + b"too much")
            assert received(sink, after + 1) == b"x" * after
            wait_for(lambda: is_gone(source))
            assert proxy.passed[way] == after


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_by_a_reset_is_an_error_at_both_ends(way: Direction) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1]) as proxy:
        proxy.cut(1000, way)
        with connected(proxy) as near, listener.accept()[0] as far:
            far.settimeout(SOON_S)
            (near if way == "up" else far).sendall(bytes(1000))
            for end in (near, far):
                with pytest.raises(ConnectionResetError):
                    received(end, 2000)


def test_a_cut_is_of_the_next_connection_alone(proxy: Proxy) -> None:
    with connected(proxy) as before:
        assert echoed(before, b"hello") == b"hello"
        proxy.cut(3)
        with connected(proxy) as cut, pytest.raises(ConnectionResetError):
            echoed(cut, b"hello")
        with connected(proxy) as after:
            assert echoed(after, b"hello") == b"hello"
        assert echoed(before, b"hello") == b"hello"


def test_a_reset_of_all_ends_those_that_are_open_and_no_later_one(proxy: Proxy) -> None:
    with connected(proxy) as one, connected(proxy) as two:
        for end in (one, two):
            assert echoed(end, b"hello") == b"hello"
        proxy.reset_all()
        for end in (one, two):
            with pytest.raises(ConnectionResetError):
                received(end, 1)
    with connected(proxy) as later:
        assert echoed(later, b"hello") == b"hello"


def test_where_nobody_listens_a_connection_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Proxy(port) as proxy, pytest.raises(ConnectionResetError), connected(proxy) as end:
        received(end, 1)


def test_its_end_ends_every_connection_and_leaves_no_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Proxy(listener.getsockname()[1]) as proxy:
            near = socket.create_connection(("127.0.0.1", proxy.port), SOON_S)
            far, _ = listener.accept()
            proxy.blackhole()
            near.sendall(b"never to come")
        wait_for(lambda: is_gone(near) and is_gone(far))
        near.close()
        far.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port))
    assert "proxy" not in [thread.name for thread in threading.enumerate()]
