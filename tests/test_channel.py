"""A bounded queue that any end may close: order, waiting, and the reason that wakes everyone."""

import threading

import pytest

from common.channel import Channel
from common.errors import ClosedError, WireError
from tests.threads import in_thread, waits

pytestmark = pytest.mark.timeout(20)

OVER = ClosedError("over, says the test")


def test_items_come_out_as_they_went_in() -> None:
    channel = Channel[int](5)
    for item in range(5):
        channel.put(item)
    channel.close(OVER)
    assert list(channel) == [0, 1, 2, 3, 4]


def test_a_full_channel_holds_the_sender_back_until_something_is_taken() -> None:
    channel = Channel[str](2)
    channel.put("a")
    channel.put("b")
    late = in_thread(channel.put, "c")
    assert waits(late)
    items = iter(channel)
    assert next(items) == "a"
    assert late.result(timeout=5) is None
    assert [next(items), next(items)] == ["b", "c"]


def test_a_reader_waits_for_what_comes() -> None:
    channel = Channel[str](1)
    items = iter(channel)
    taken = in_thread(next, items)
    assert waits(taken)
    channel.put("a")
    assert taken.result(timeout=5) == "a"


def test_closing_wakes_a_sender_that_is_held_back_with_the_reason() -> None:
    channel = Channel[str](1)
    channel.put("a")
    late = [in_thread(channel.put, "b") for _ in range(3)]
    assert all(waits(each) for each in late)
    channel.close(OVER)
    assert [each.exception(timeout=5) for each in late] == [OVER] * 3
    assert list(channel) == ["a"], "what was refused is not in it"


def test_closing_wakes_a_reader() -> None:
    channel = Channel[str](1)
    items = in_thread(lambda: list(channel))
    assert waits(items)
    channel.close(OVER)
    assert items.result(timeout=5) == []


def test_what_was_put_before_the_close_can_still_be_read() -> None:
    channel = Channel[str](2)
    channel.put("a")
    channel.close(OVER)
    assert list(channel) == ["a"]
    assert list(channel) == []


def test_a_closed_channel_takes_nothing_even_with_room() -> None:
    channel = Channel[str](9)
    channel.close(OVER)
    with pytest.raises(ClosedError) as caught:
        channel.put("a")
    assert caught.value is OVER


def test_the_first_reason_stands() -> None:
    channel, later = Channel[str](1), WireError("later")
    channel.close(OVER)
    channel.close(later)
    with pytest.raises(ClosedError) as caught:
        channel.put("a")
    assert caught.value is OVER


def test_many_senders_and_readers_lose_nothing_and_repeat_nothing() -> None:
    channel = Channel[int](3)
    got: list[int] = []
    lock = threading.Lock()

    def send(start: int) -> None:
        for item in range(start, start + 200):
            channel.put(item)

    def read() -> None:
        for item in channel:
            with lock:
                got.append(item)

    readers = [in_thread(read) for _ in range(3)]
    senders = [in_thread(send, 200 * index) for index in range(4)]
    for sender in senders:
        sender.result(timeout=10)
    channel.close(OVER)
    for reader in readers:
        reader.result(timeout=10)
    assert sorted(got) == list(range(800))


def test_who_is_told_not_to_wait_adds_one_more_to_a_full_channel() -> None:
    channel = Channel[str](1)
    channel.put("a")
    channel.put("b", wait=False)
    assert waits(in_thread(channel.put, "c"))
    channel.close(ClosedError("done"))
    assert list(channel) == ["a", "b"]
