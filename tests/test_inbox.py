"""Lanes in, groups out: who is served when, who waits, and that closing wakes everyone with the reason."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.errors import ClosedError
from common.methods.base import Gather, Smashed
from dsl_server.inbox import EpochEnd, Exam, Inbox, Item, Job, RoundEnd, Work
from tests.threads import in_thread, waits

pytestmark = pytest.mark.timeout(20)

OVER = ClosedError("the run is over because the test says so")


def job(client: int, sequence: int) -> Job:
    return Job(client, sequence, Smashed(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)), 0.0)


def exam(client: int) -> Exam:
    return Exam(client, Smashed(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)))


def inbox_of(*lanes: str, fixed_order: bool = False, gather: Gather = Gather.EACH) -> Inbox:
    """An inbox whose lanes hold these items: `b` a batch, `x` an exam, `|` the end of an epoch."""
    inbox = Inbox(len(lanes), 100, fixed_order, gather)
    for client, lane in enumerate(lanes):
        sequence = 0
        for sign in lane:
            if sign == "b":
                sequence += 1
                inbox.put(job(client, sequence))
            elif sign in "x|":
                inbox.put(exam(client) if sign == "x" else EpochEnd(client))
    return inbox


def served(inbox: Inbox) -> str:
    """All that the inbox gives once every client has left: `0.2` is the second batch of client 0."""
    for client in range(len(inbox._lanes)):
        inbox.leave(client)
    return " ".join(told(work) for work in inbox if not isinstance(work, RoundEnd))


def told(work: Work) -> str:
    if isinstance(work, RoundEnd):
        return "|"
    if isinstance(work, Exam):
        return f"x{work.client}"
    return "+".join(f"{job.client}.{job.sequence}" for job in work)


# ---------------------------------------------------------------- as they come


def test_batches_that_come_first_are_served_first() -> None:
    assert served(inbox_of("bbb")) == "0.1 0.2 0.3"


def test_a_full_lane_starves_no_other() -> None:
    assert served(inbox_of("bbbbb", "b", "bb")) == "0.1 1.1 2.1 0.2 2.2 0.3 0.4 0.5"


def test_one_fast_client_is_served_no_more_often_than_the_others_who_have_something() -> None:
    inbox = Inbox(2, 2, fixed_order=False)
    for sequence in (1, 2):
        inbox.put(job(0, sequence))
    inbox.put(job(1, 1))
    work, order = iter(inbox), []
    for sequence in range(3, 20):  # client 0's lane is filled up again at once
        order.append(told(next(work)))
        if order[-1].startswith("0"):
            inbox.put(job(0, sequence))
        else:
            inbox.put(job(1, sequence))
    clients = [entry[0] for entry in order]
    assert clients == ["0", "1"] * 8 + ["0"]


def test_a_silent_client_holds_up_no_one() -> None:
    inbox = inbox_of("bb", "")
    work = iter(inbox)
    assert [told(next(work)), told(next(work))] == ["0.1", "0.2"]


def test_ends_of_epochs_are_of_no_account_as_they_come() -> None:
    assert served(inbox_of("b|b|", "|b|")) == "0.1 1.1 0.2"


def test_exams_take_their_place_in_their_lane() -> None:
    """What a client wants scored is scored after the batches that it sent before."""
    order = served(inbox_of("bbx", "b")).split()
    assert order.index("x0") > order.index("0.2")


# ---------------------------------------------------------------- in fixed order


def test_fixed_order_takes_one_of_each_client_in_turn_whatever_the_lengths() -> None:
    order = served(inbox_of("bbb|bbb|", "bb|bb|", "bbb|bbb|", fixed_order=True))
    first = "0.1 1.1 2.1 0.2 1.2 2.2 0.3 2.3"  # client 1 waits for the end of the epoch
    second = "0.4 1.3 2.4 0.5 1.4 2.5 0.6 2.6"
    assert order == f"{first} {second}"


def test_a_round_ends_once_every_client_has_come_to_the_end_of_the_epoch() -> None:
    inbox = inbox_of("bb|xb|", "b|xb|", "b|xbb|", fixed_order=True)
    for client in range(3):
        inbox.leave(client)
    order = [told(work) for work in inbox]
    first, exams, second = "0.1 1.1 2.1 0.2", "x0 x1 x2", "0.3 1.2 2.2 2.3"
    assert " ".join(order) == f"{first} | {exams} {second} |"


def test_fixed_order_examines_between_epochs() -> None:
    order = served(inbox_of("bb|xxb|x", "b|xb|x", "bb|xxb|x", fixed_order=True))
    first, exams = "0.1 1.1 2.1 0.2 2.2", "x0 x1 x2 x0 x2"
    second = "0.3 1.2 2.3"
    assert order == f"{first} {exams} {second} x0 x1 x2"


def test_fixed_order_does_not_depend_on_who_is_faster() -> None:
    """The same batches, put by threads that race, come out in the same order."""
    lanes = ("bbbbb|xxbbb|x", "bb|xb|x", "bbbb|xbb|x")
    expected = served(inbox_of(*lanes, fixed_order=True))
    for fast in range(3):
        inbox = Inbox(3, 2, fixed_order=True)
        for client in (fast, (fast + 1) % 3, (fast + 2) % 3):
            in_thread(put_all, inbox, client, lanes[client])
        assert " ".join(told(work) for work in inbox if not isinstance(work, RoundEnd)) == expected


def put_all(inbox: Inbox, client: int, lane: str) -> None:
    for index, sign in enumerate(lane):
        if sign == "|":
            inbox.put(EpochEnd(client))
        else:
            inbox.put(exam(client) if sign == "x" else job(client, lane[: index + 1].count("b")))
    inbox.leave(client)


def test_fixed_order_waits_for_the_slowest_client_of_the_epoch() -> None:
    inbox = inbox_of("bb", "", fixed_order=True)
    work = iter(inbox)
    taken = in_thread(lambda: told(next(work)))
    assert waits(taken)
    inbox.put(job(1, 1))
    assert taken.result(timeout=5) == "0.1"


def test_fixed_order_waits_no_longer_for_a_client_that_left() -> None:
    inbox = inbox_of("bb", "", fixed_order=True)
    work = iter(inbox)
    taken = in_thread(lambda: told(next(work)))
    assert waits(taken)
    inbox.leave(1)
    assert taken.result(timeout=5) == "0.1"


def test_what_a_client_sent_before_it_left_is_still_served_in_order() -> None:
    inbox = inbox_of("bbb|", "bb|", fixed_order=True)
    inbox.leave(1)
    assert served(inbox) == "0.1 1.1 0.2 1.2 0.3"


def test_gather_all_makes_one_group_of_a_batch_from_every_client() -> None:
    order = served(inbox_of("bbb|b|", "b|b|", "bb|b|", fixed_order=True, gather=Gather.ALL))
    assert order == "0.1+1.1+2.1 0.2+2.2 0.3 0.4+1.2+2.3"


def test_gather_all_examines_one_by_one() -> None:
    assert served(inbox_of("b|x", "b|x", fixed_order=True, gather=Gather.ALL)) == "0.1+1.1 x0 x1"


# ---------------------------------------------------------------- who waits, and who wakes them


@pytest.mark.parametrize("item", [job(0, 3), exam(0), EpochEnd(0)], ids=["batch", "exam", "epoch end"])
def test_a_full_lane_holds_its_client_back_until_something_is_taken(item: Item) -> None:
    inbox = Inbox(2, 2, fixed_order=False)
    for sequence in (1, 2):
        inbox.put(job(0, sequence))
    late = in_thread(inbox.put, item)
    assert waits(late)
    inbox.put(job(1, 1))  # another client's lane has room
    assert told(next(iter(inbox))) == "0.1"
    assert late.result(timeout=5) is None


def test_closing_wakes_a_client_that_is_held_back_with_the_reason() -> None:
    inbox = Inbox(1, 1, fixed_order=False)
    inbox.put(job(0, 1))
    late = in_thread(inbox.put, job(0, 2))
    assert waits(late)
    inbox.close(OVER)
    assert late.exception(timeout=5) is OVER


def test_closing_wakes_the_trainer_that_waits_for_work() -> None:
    for fixed_order in (False, True):
        inbox = Inbox(2, 1, fixed_order)
        work = in_thread(lambda inbox: list(inbox), inbox)
        assert waits(work)
        inbox.close(OVER)
        assert work.result(timeout=5) == []


def test_closing_tells_the_reason_to_who_waits_for_an_answer() -> None:
    inbox = Inbox(2, 5, fixed_order=False)
    items: list[Job | Exam] = [job(0, 1), job(0, 2), exam(0), job(1, 1)]
    for item in items:
        inbox.put(item)
    inbox.put(EpochEnd(1))
    inbox.close(OVER)
    assert [item.answer.exception(timeout=1) for item in items] == [OVER] * 4


@pytest.mark.parametrize("fixed_order", [False, True])
def test_closing_during_a_step_tells_the_reason_to_the_clients_that_were_next(fixed_order: bool) -> None:
    """Two batches were taken at once; the step on the first fails and the trainer goes home."""
    inbox = Inbox(3, 2, fixed_order)
    jobs = [job(client, 1) for client in range(3)]
    for item in jobs:
        inbox.put(item)
    work: Iterator[Any] = iter(inbox)
    assert told(next(work)) == "0.1"
    inbox.close(OVER)
    del work
    assert [item.answer.exception(timeout=1) for item in jobs[1:]] == [OVER, OVER]


def test_a_closed_inbox_takes_nothing_and_gives_nothing() -> None:
    inbox = inbox_of("bb", "b")
    inbox.close(OVER)
    with pytest.raises(ClosedError) as caught:
        inbox.put(job(0, 3))
    assert caught.value is OVER
    assert list(inbox) == []


def test_the_first_reason_stands() -> None:
    inbox = inbox_of("b")
    inbox.close(OVER)
    inbox.close(ClosedError("something else, later"))
    with pytest.raises(ClosedError) as caught:
        inbox.put(job(0, 2))
    assert caught.value is OVER


@pytest.mark.parametrize("fixed_order", [False, True])
def test_the_work_is_over_when_everyone_has_left(fixed_order: bool) -> None:
    inbox = Inbox(2, 2, fixed_order)
    work = in_thread(lambda: list(inbox))
    inbox.leave(0)
    assert waits(work)
    inbox.leave(1)
    assert work.result(timeout=5) == []
