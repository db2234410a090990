"""An emulated link changes nothing but the time, and leaves nothing behind."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from dsl_lab.link import Link
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(30)

FAST = 100e6  # bytes per second
NOISE = 2.5  # times as long as it should take: the machine has other work


@contextmanager
def linked(rate: float = FAST, delay: float = 0.0) -> Iterator[tuple[Link, socket.socket, socket.socket]]:
    """A link, and the two ends of a connection through it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Link(listener.getsockname()[1], rate, delay) as link,
    ):
        near = socket.create_connection(("127.0.0.1", link.port))
        far, _ = listener.accept()
        with near, far:
            yield link, near, far


def received(end: socket.socket, size: int) -> bytes:
    """So many bytes, or those until the other end is closed."""
    data = bytearray()
    while len(data) < size and (more := end.recv(min(1 << 16, size - len(data)))):
        data += more
    return bytes(data)


def sends(end: socket.socket, data: bytes) -> Future[None]:
    return in_thread(end.sendall, data)


def test_bytes_arrive_unchanged_both_ways_at_once_and_are_counted() -> None:
    dice = random.Random(0)
    up, down = dice.randbytes(1_000_003), dice.randbytes(700_001)
    with linked(delay=0.01) as (link, near, far):
        sends(near, up), sends(far, down)
        at_far = in_thread(received, far, len(up))
        assert received(near, len(down)) == down
        assert at_far.result(timeout=10) == up
        assert (link.up.bytes, link.down.bytes) == (len(up), len(down))


@pytest.mark.parametrize("upward", [True, False], ids=["up", "down"])
def test_a_link_is_as_fast_as_its_rate_and_never_faster(upward: bool) -> None:
    rate, data = 4e6, bytes(2_000_000)
    with linked(rate) as (_, near, far):
        source, sink = (near, far) if upward else (far, near)
        start = time.perf_counter()
        sends(source, data)
        assert received(sink, len(data)) == data
        seconds = time.perf_counter() - start
    assert len(data) / rate <= seconds < NOISE * len(data) / rate


def test_a_delay_does_not_lower_the_rate() -> None:
    rate, delay, data = 4e6, 0.25, bytes(2_000_000)
    with linked(rate, delay) as (_, near, far):
        start = time.perf_counter()
        sends(near, data)
        received(far, len(data))
        seconds = time.perf_counter() - start
    assert len(data) / rate + delay <= seconds < NOISE * len(data) / rate + delay


def test_a_round_trip_takes_two_delays() -> None:
    with linked(delay=0.1) as (_, near, far):
        start = time.perf_counter()
        near.sendall(b"?")
        assert received(far, 1) == b"?"
        assert time.perf_counter() - start >= 0.1
        far.sendall(b"!")
        assert received(near, 1) == b"!"
        assert 0.2 <= time.perf_counter() - start < 0.2 * NOISE


def test_two_connections_share_the_rate() -> None:
    rate, data = 4e6, bytes(1_000_000)
    with socket.create_server(("127.0.0.1", 0)) as listener, Link(listener.getsockname()[1], rate) as link:
        nears = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(2)]
        fars = [listener.accept()[0] for _ in range(2)]
        start = time.perf_counter()
        for near in nears:
            sends(near, data)
        readers = [in_thread(received, far, len(data)) for far in fars]
        assert all(reader.result(timeout=10) == data for reader in readers)
        assert 2 * len(data) / rate <= time.perf_counter() - start < NOISE * 2 * len(data) / rate
        for end in (*nears, *fars):
            end.close()


def test_a_sender_feels_the_rate_soon() -> None:
    """What it is ahead of the link by lies in its own buffer: about a second of this rate."""
    rate, total = 1e6, 4_000_000
    with linked(rate, delay=0.02) as (link, near, far):
        reader = in_thread(received, far, total)
        sent, ahead = 0, 0
        while sent < total:
            sent += near.send(bytes(min(10_000, total - sent)))
            ahead = max(ahead, sent - link.up.bytes)
        assert reader.result(timeout=10) == bytes(total)
        assert ahead < 2e6


@pytest.mark.parametrize("which", ["near", "far"])
def test_closing_one_end_closes_the_other(which: str) -> None:
    with linked(delay=0.01) as (_, near, far):
        closed, other = (near, far) if which == "near" else (far, near)
        closed.sendall(b"the last words")
        closed.close()
        assert received(other, 100) == b"the last words"
        wait_for(lambda: is_gone(other))


def is_gone(end: socket.socket) -> bool:
    """Whether what is sent there is refused."""
    try:
        end.sendall(b"anyone?")
    except OSError:
        return True
    return False


def test_one_way_may_be_closed_alone() -> None:
    with linked(delay=0.01) as (_, near, far):
        near.sendall(b"that is all")
        near.shutdown(socket.SHUT_WR)
        assert received(far, 100) == b"that is all"
        far.sendall(b"and here is the answer")
        far.close()
        assert received(near, 100) == b"and here is the answer"


def test_where_nobody_listens_a_connection_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Link(port, FAST) as link, socket.create_connection(("127.0.0.1", link.port)) as near:
        assert received(near, 1) == b""


def test_its_end_ends_every_connection_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())  # one of another test may end meanwhile
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Link(listener.getsockname()[1], rate=1000, delay=1.0) as link:
            near = socket.create_connection(("127.0.0.1", link.port))
            far, _ = listener.accept()
            near.sendall(bytes(10_000))  # ten seconds' worth, still inside
            reader = in_thread(received, far, 10_000)
            assert not set(threading.enumerate()) <= before
        assert len(reader.result(timeout=5)) < 10_000
        wait_for(lambda: is_gone(near))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", link.port))
        near.close(), far.close()
    wait_for(lambda: set(threading.enumerate()) <= before)
