"""Lanes in, groups out: who is served when, who waits, and that closing wakes everyone with the reason."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.errors import ClosedError
from common.methods.base import Gather
from dsl_server.inbox import EpochEnd, Errand, Inbox, Item, Job, RoundEnd, Save, Spare, Work
from dsl_server.ledger import Mark
from tests.federation import arrived
from tests.threads import in_thread, waits

pytestmark = pytest.mark.timeout(60)

OVER = ClosedError("the run is over because the test says so")


def job(client: int, sequence: int) -> Job:
    return Job(client, arrived(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), sequence), 0.0)


def exam(client: int) -> Errand:
    return Errand(client, "score a batch", lambda _: None)


def inbox_of(
    *lanes: str, fixed_order: bool = False, gather: Gather = Gather.EACH, together: int = 1
) -> Inbox:
    """An inbox whose lanes hold these items: `b` a batch, `x` an exam, `|` the end of an epoch."""
    inbox = Inbox(len(lanes), 100, fixed_order, gather, together=together)
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
    if isinstance(work, Errand):
        return f"x{work.client}"
    if isinstance(work, Save | Spare):
        return type(work).__name__.lower()
    return "+".join(f"{job.client}.{job.sequence}" for job in work)


# ---------------------------------------------------------------- as they come


def test_batches_that_come_first_are_served_first() -> None:
    assert served(inbox_of("bbb")) == "0.1 0.2 0.3"


def test_a_full_lane_starves_no_other() -> None:
    assert served(inbox_of("bbbbb", "b", "bb")) == "0.1 1.1 2.1 0.2 2.2 0.3 0.4 0.5"


@pytest.mark.parametrize("fixed_order", [False, True])
def test_waiting_batches_of_different_clients_are_served_together(fixed_order: bool) -> None:
    inbox = inbox_of("bbb|", "b|", "bb|", fixed_order=fixed_order, together=2)
    assert served(inbox) == "0.1+1.1 2.1 0.2+2.2 0.3"


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
    put_items(inbox, client, lane)
    inbox.leave(client)


def put_items(inbox: Inbox, client: int, lane: str) -> None:
    for index, sign in enumerate(lane):
        if sign == "|":
            inbox.put(EpochEnd(client))
        else:
            inbox.put(exam(client) if sign == "x" else job(client, lane[: index + 1].count("b")))


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
    items: list[Job | Errand] = [job(0, 1), job(0, 2), exam(0), job(1, 1)]
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


# ---------------------------------------------------------------- a client is lost

GONE = ClosedError("client 2 (cid) went away before the end of the run")


def test_what_a_lost_client_sent_is_dropped_and_who_waits_for_an_answer_is_told_why() -> None:
    inbox = Inbox(3, 2, fixed_order=False)
    items: list[Job | Errand] = [job(2, 1), exam(2)]
    for item in items:
        inbox.put(item)
    inbox.put(job(0, 1))
    late = in_thread(inbox.put, job(2, 2))
    assert waits(late), "its lane is full"
    inbox.lose(2, GONE)
    assert [item.answer.exception(timeout=5) for item in items] == [GONE] * 2
    assert late.exception(timeout=5) is GONE
    with pytest.raises(ClosedError, match="cid"):
        inbox.put(EpochEnd(2))
    assert served(inbox) == "0.1"


@pytest.mark.parametrize("gather", list(Gather))
def test_a_loss_completes_the_tick_that_waits_for_the_lost_client(gather: Gather) -> None:
    inbox = inbox_of("bb", "bb", "b", fixed_order=True, gather=gather)
    work = iter(inbox)
    first = [told(next(work)) for _ in range(1 if gather is Gather.ALL else 3)]
    assert "+".join(first) == "0.1+1.1+2.1"
    taken = in_thread(lambda: told(next(work)))
    assert waits(taken)
    inbox.lose(2, GONE)
    assert taken.result(timeout=5) == ("0.2+1.2" if gather is Gather.ALL else "0.2")


def test_a_loss_completes_the_round_that_waits_for_the_lost_client() -> None:
    inbox = inbox_of("b|xb", "b|xb", "b", fixed_order=True, gather=Gather.ALL)
    work = iter(inbox)
    assert told(next(work)) == "0.1+1.1+2.1"
    end = in_thread(lambda: told(next(work)))
    assert waits(end)
    inbox.lose(2, GONE)
    assert end.result(timeout=5) == "|"
    assert [told(next(work)) for _ in range(3)] == ["x0", "x1", "0.2+1.2"]


def test_the_batch_of_a_lost_client_that_the_trainer_has_taken_is_trained_on() -> None:
    inbox = inbox_of("b|", "b|", "b|", fixed_order=True)
    work = iter(inbox)
    assert told(next(work)) == "0.1"
    inbox.lose(2, GONE)
    assert [told(next(work)) for _ in range(3)] == ["1.1", "2.1", "|"]


@pytest.mark.parametrize("fixed_order", [False, True])
def test_the_work_is_over_when_the_last_one_who_had_not_left_is_lost(fixed_order: bool) -> None:
    inbox = Inbox(2, 2, fixed_order)
    work = in_thread(lambda: list(inbox))
    inbox.leave(0)
    assert waits(work)
    inbox.lose(1, GONE)
    assert work.result(timeout=5) == []


@pytest.mark.parametrize("gather", list(Gather))
@pytest.mark.parametrize("sent", range(9))
def test_wherever_a_client_is_lost_the_others_are_served_to_the_end(sent: int, gather: Gather) -> None:
    lane = "bb|bb|bb|"
    inbox = Inbox(3, 2, fixed_order=True, gather=gather)

    def lost_client() -> None:
        put_items(inbox, 2, lane[:sent])
        inbox.lose(2, GONE)

    for client in (0, 1):
        in_thread(put_all, inbox, client, lane)
    in_thread(lost_client)
    order = [told(work) for work in inbox]
    batches = "+".join(entry for entry in order if entry != "|").split("+")
    for client in "01":
        assert [b for b in batches if b[0] == client] == [f"{client}.{i}" for i in range(1, 7)]
    theirs = [b for b in batches if b[0] == "2"]
    assert theirs == [f"2.{i}" for i in range(1, len(theirs) + 1)]
    assert len(theirs) <= lane[:sent].count("b")
    assert order.count("|") == 3
    assert order[-1] == "|"


# ---------------------------------------------------------------- a client is late


def timed(*lanes: str, quorum: int, seconds: float = 0.2) -> Inbox:
    """An inbox as of `inbox_of`, in which a tick waits for so long, and everyone is there."""
    inbox = Inbox(len(lanes), 100, True, Gather.ALL, seconds, quorum)
    for client, lane in enumerate(lanes):
        inbox.join(client)
        put_items(inbox, client, lane)
    return inbox


def test_a_group_goes_on_without_who_is_late_and_its_batch_joins_a_later_one() -> None:
    inbox = timed("bbb|", "bbb|", "b", quorum=2)
    work = iter(inbox)
    assert [told(next(work)) for _ in range(2)] == ["0.1+1.1+2.1", "0.2+1.2"]
    inbox.put(job(2, 2))
    assert told(next(work)) == "0.3+1.3+2.2"
    inbox.put(job(2, 3))
    assert told(next(work)) == "2.3"


def test_what_is_to_be_scored_does_not_wait_for_who_is_late_either() -> None:
    work = iter(timed("|x", "|", quorum=1))
    assert [told(next(work)) for _ in range(2)] == ["|", "x0"]


def test_the_end_of_an_epoch_waits_for_who_is_late() -> None:
    inbox = timed("b|", "b|", "b", quorum=3, seconds=0.05)
    work = iter(inbox)
    assert told(next(work)) == "0.1+1.1+2.1"
    end = in_thread(lambda: told(next(work)))
    assert waits(end, 0.3), "nobody's batch is held up"
    inbox.put(EpochEnd(2))
    assert end.result(timeout=5) == "|"


@pytest.mark.parametrize(
    ("lanes", "quorum", "says"),
    [
        (("b", "b", ""), 3, "client 2 kept the others waiting for more than 0.2 s: "),
        (("b", "b", ""), 3, "raise --round-timeout, or allow a --quorum below 3"),
        (("", "b", ""), 2, "clients 0, 2 kept .* --quorum below 2"),
    ],
)
def test_too_few_to_go_on_without_who_is_late_is_an_error_that_names_them(
    lanes: tuple[str, ...], quorum: int, says: str
) -> None:
    with pytest.raises(ClosedError, match=says):
        next(iter(timed(*lanes, quorum=quorum)))


def test_who_is_out_of_batches_is_not_late_and_who_is_lost_makes_no_quorum() -> None:
    work = iter(timed("b|", "bb", "b", quorum=2))
    assert [told(next(work)) for _ in range(2)] == ["0.1+1.1+2.1", "1.2"]
    inbox = timed("b|", "bb", "b", "b", quorum=3)
    inbox.lose(3, GONE)
    work = iter(inbox)
    assert told(next(work)) == "0.1+1.1+2.1"
    with pytest.raises(ClosedError, match="client 2 kept the others waiting"):
        next(work)


def test_who_has_not_joined_yet_is_waited_for_as_long_as_it_takes() -> None:
    inbox = Inbox(2, 2, True, Gather.ALL, 0.05, 2)
    inbox.join(0)
    inbox.put(job(0, 1))
    taken = in_thread(lambda: told(next(iter(inbox))))
    assert waits(taken, 0.3)
    inbox.join(1)
    inbox.put(job(1, 1))
    assert taken.result(timeout=5) == "0.1+1.1"


def test_a_loss_while_a_tick_waits_is_no_lateness() -> None:
    inbox = timed("b", "b", "", quorum=2, seconds=15)
    taken = in_thread(lambda: told(next(iter(inbox))))
    assert waits(taken)
    inbox.lose(2, GONE)
    assert taken.result(timeout=5) == "0.1+1.1"


def test_closing_wakes_a_tick_that_waits_for_who_is_late() -> None:
    inbox = timed("b", "", quorum=2, seconds=15)
    work = in_thread(lambda: list(inbox))
    assert waits(work)
    inbox.close(OVER)
    assert work.result(timeout=5) == []


# ---------------------------------------------------------------- time for a checkpoint


def step(client: int, sequence: int, waypoint: bool = True) -> Job:
    return replace(job(client, sequence), waypoint=waypoint)


def given(work: Iterator[Work], count: int) -> list[str]:
    return [told(next(work)) for _ in range(count)]


def test_a_checkpoint_that_is_asked_for_comes_before_the_next_batch_and_once() -> None:
    inbox = inbox_of("bb", "b")
    inbox.ask_save()
    inbox.ask_save()
    assert given(iter(inbox), 4) == ["save", "0.1", "1.1", "0.2"]


@pytest.mark.parametrize("gather", list(Gather))
def test_it_comes_between_ticks_and_not_within_one(gather: Gather) -> None:
    inbox = inbox_of("bb", "bb", "bb", fixed_order=True, gather=gather)
    work = iter(inbox)
    first = told(next(work))
    inbox.ask_save()
    ticks = [["0.1+1.1+2.1"], ["0.2+1.2+2.2"]]
    if gather is Gather.EACH:
        ticks = [["0.1", "1.1", "2.1"], ["0.2", "1.2", "2.2"]]
    assert [first, *given(work, 2 * len(ticks[0]))] == [*ticks[0], "save", *ticks[1]]


@pytest.mark.parametrize("fixed_order", [False, True])
def test_who_waits_for_work_makes_a_checkpoint_meanwhile(fixed_order: bool) -> None:
    inbox = Inbox(2, 2, fixed_order)
    taken = in_thread(lambda: told(next(iter(inbox))))
    assert waits(taken)
    inbox.ask_save()
    assert taken.result(timeout=5) == "save"


def test_a_tick_that_waits_for_who_is_late_makes_one_meanwhile_and_waits_on() -> None:
    inbox = Inbox(2, 2, True, Gather.ALL, timeout=30.0, quorum=2)
    for client in range(2):
        inbox.join(client)
    inbox.put(job(0, 1))
    work = iter(inbox)
    inbox.ask_save()
    assert told(next(work)) == "save"
    taken = in_thread(lambda: told(next(work)))
    assert waits(taken)
    inbox.put(job(1, 1))
    assert taken.result(timeout=5) == "0.1+1.1"


def test_a_closed_inbox_makes_none() -> None:
    inbox = inbox_of("b")
    inbox.ask_save()
    inbox.close(OVER)
    assert list(inbox) == []


def test_one_is_made_too_when_the_last_has_left() -> None:
    """Whoever says goodbye waits until that is on disk."""
    inbox = Inbox(1, 2, fixed_order=False)
    work = iter(inbox)
    inbox.ask_save()
    assert told(next(work)) == "save"
    inbox.leave(0)
    assert list(work) == []


def test_where_clients_go_back_to_waypoints_one_waits_until_each_is_at_one_and_who_is_there_waits() -> None:
    inbox = Inbox(3, 10, fixed_order=False, in_step=True)
    for client, waypoint in ((0, False), (1, True), (2, False)):
        inbox.put(step(client, 1, waypoint))
    work = iter(inbox)
    assert given(work, 3) == ["0.1", "1.1", "2.1"]
    inbox.ask_save()
    inbox.put(step(1, 2))
    inbox.put(step(0, 2, waypoint=False))
    inbox.put(step(2, 2))
    assert given(work, 2) == ["0.2", "2.2"], "client 1 is at one, and waits"
    taken = in_thread(lambda: told(next(work)))
    inbox.put(step(2, 3))
    assert waits(taken), "client 0 is still astray, and has sent nothing"
    inbox.put(step(0, 3))
    assert taken.result(timeout=5) == "0.3"
    assert given(work, 3) == ["save", "1.2", "2.3"]


def test_in_fixed_order_all_go_on_until_each_is_at_a_waypoint() -> None:
    inbox = Inbox(2, 10, fixed_order=True, in_step=True)
    for sequence, waypoint in ((1, False), (2, False), (3, True), (4, False)):
        for client in range(2):
            inbox.put(step(client, sequence, waypoint))
    work = iter(inbox)
    assert given(work, 2) == ["0.1", "1.1"]
    inbox.ask_save()
    assert given(work, 6) == ["0.2", "1.2", "0.3", "1.3", "save", "0.4"]


def test_without_that_one_waits_for_nobody() -> None:
    inbox = Inbox(1, 10, fixed_order=False)
    for sequence in (1, 2):
        inbox.put(step(0, sequence, waypoint=False))
    work = iter(inbox)
    assert told(next(work)) == "0.1"
    inbox.ask_save()
    assert told(next(work)) == "save"


@pytest.mark.parametrize("how", ["lost", "left"])
@pytest.mark.parametrize("fixed_order", [False, True])
def test_who_is_astray_and_gone_holds_up_no_checkpoint(fixed_order: bool, how: str) -> None:
    inbox = Inbox(2, 10, fixed_order, in_step=True)
    inbox.put(step(0, 1, waypoint=False))
    inbox.put(step(1, 1))
    work = iter(inbox)
    assert given(work, 2) == ["0.1", "1.1"]
    inbox.ask_save()
    taken = in_thread(lambda: told(next(work)))
    assert waits(taken)
    if how == "lost":
        inbox.lose(0, GONE)
    else:
        inbox.leave(0)
    assert taken.result(timeout=5) == "save"


# ---------------------------------------------------------------- after a checkpoint


def test_it_goes_on_without_who_has_gone() -> None:
    for fixed_order in (False, True):
        inbox = Inbox(3, 5, fixed_order)
        inbox.resume(gone=[1], ended=[])
        for client in (0, 2):
            inbox.put(job(client, 7))
        assert given(iter(inbox), 2) == ["0.7", "2.7"]


def test_it_goes_on_with_who_is_at_the_end_of_its_epoch_waiting_for_the_others() -> None:
    inbox = Inbox(3, 5, fixed_order=True, gather=Gather.ALL)
    inbox.resume(gone=[], ended=[1])
    put_items(inbox, 0, "b|b|")
    put_items(inbox, 1, "b|")
    put_items(inbox, 2, "b|b|")
    assert given(iter(inbox), 4) == ["0.1+2.1", "|", "0.2+1.1+2.2", "|"]


def test_where_all_are_at_the_end_of_the_epoch_its_round_ends_first() -> None:
    inbox = Inbox(2, 5, fixed_order=True)
    inbox.resume(gone=[], ended=[0, 1])
    for client in range(2):
        put_items(inbox, client, "b|")
    assert given(iter(inbox), 4) == ["|", "0.1", "1.1", "|"]


def test_where_all_have_gone_the_work_is_over() -> None:
    inbox = Inbox(2, 5, fixed_order=True)
    inbox.resume(gone=[0, 1], ended=[])
    assert list(inbox) == []


@pytest.mark.parametrize("fixed_order", [False, True])
def test_each_end_of_an_epoch_is_told_when_all_before_it_were_served(fixed_order: bool) -> None:
    """Of batches that were skipped last nothing else tells."""
    log: list[str] = []
    inbox = Inbox(2, 5, fixed_order, on_epoch_end=lambda end: log.append(f"{end.client}|{end.mark.sequence}"))
    for client in range(2):
        inbox.put(job(client, 1))
        inbox.put(EpochEnd(client, Mark(3)))
        inbox.leave(client)
    for work in inbox:
        log.append(told(work))
    assert [entry for entry in log if entry != "|"] == ["0.1", "1.1", "0|3", "1|3"]
