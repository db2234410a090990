"""Who is in the run, what is due from each, and where clients meet. No bytes, no sockets, no network."""

from typing import Any

import pytest
import torch

from common.errors import (
    ClosedError,
    ConflictError,
    FullError,
    RefusedError,
    SequenceError,
    StaleError,
    WireError,
)
from common.parts import State
from dsl_server import rounds as module
from dsl_server.ledger import Ledger, Newcomer
from dsl_server.rounds import Member, Rounds
from tests.federation import small_run
from tests.threads import in_thread, waits

pytestmark = pytest.mark.timeout(60)

OVER = ClosedError("the run is over because the test says so")


def rounds_of(clients: int, **settings: Any) -> Rounds:
    return Rounds(small_run(clients=clients, **settings))


def joined(rounds: Rounds, name: str, **settings: Any) -> Member:
    return rounds.join(Newcomer(name, **settings))


def receive(rounds: Rounds, member: Member, sequence: int) -> None:
    """One sample comes, and lies in its lane."""
    mark = rounds.receive(member, sequence, 1, digest=sequence, last=False)
    assert mark is not None
    rounds.laid(member.client, mark)


def part(weight: float, batches: int = 0) -> State:
    return {"w": torch.tensor([weight, 2 * weight]), "num_batches_tracked": torch.tensor(batches)}


# ---------------------------------------------------------------- who is in


def test_members_get_places_from_0_and_sessions_of_their_own() -> None:
    rounds = rounds_of(3)
    members = [joined(rounds, name) for name in ("ann", "bob", "ann")]
    assert [member.client for member in members] == [0, 1, 2]
    assert len({member.session for member in members}) == 3
    assert all(len(member.session) >= 32 for member in members), "not to be guessed"
    assert [rounds.member(member.session) for member in members] == members
    assert [member.account for member in members] == rounds.members()


def test_one_client_too_many_is_refused_with_the_names_and_the_remedy() -> None:
    rounds = rounds_of(2)
    joined(rounds, "ann")
    joined(rounds, "bob")
    with pytest.raises(FullError) as caught:
        joined(rounds, "eve")
    said = str(caught.value)
    for part_of_it in ("'eve'", "client 0 (ann)", "client 1 (bob)", "2", "--clients 3"):
        assert part_of_it in said


def test_a_place_is_not_free_again_after_its_client_left() -> None:
    rounds = rounds_of(1)
    rounds.leave(joined(rounds, "ann"))
    with pytest.raises(FullError):
        joined(rounds, "bob")


@pytest.mark.parametrize("session", ["", "guess", "0" * 32])
def test_an_unknown_session_is_refused(session: str) -> None:
    rounds = rounds_of(2)
    joined(rounds, "ann")
    with pytest.raises(RefusedError, match="names no present member"):
        rounds.member(session)


def test_the_session_of_who_has_left_is_refused() -> None:
    rounds = rounds_of(2)
    member = joined(rounds, "ann")
    rounds.leave(member)
    with pytest.raises(RefusedError, match="join first"):
        rounds.member(member.session)


# ---------------------------------------------------------------- what is due


def test_batches_are_due_one_after_the_other() -> None:
    rounds = rounds_of(1)
    member = joined(rounds, "ann")
    for sequence in (1, 2, 3):
        rounds.begin_segment(member, sequence)
        receive(rounds, member, sequence)
        rounds.end_segment(member)
    assert member.account.received.sequence == member.account.received.samples == 3


@pytest.mark.parametrize("came", [0, 1, 2, 4, 2**64 - 1])
def test_a_gap_or_a_repetition_is_refused_with_the_number_that_is_due(came: int) -> None:
    rounds = rounds_of(1)
    member = joined(rounds, "ann")
    receive(rounds, member, 1)
    receive(rounds, member, 2)
    with pytest.raises(
        SequenceError, match=rf"client 0 \(ann\): batch {came} came, but batch 3 is due"
    ) as caught:
        receive(rounds, member, came)
    assert caught.value.expected == 3


def test_a_call_waits_for_what_an_earlier_call_still_delivers() -> None:
    rounds = rounds_of(1)
    member = joined(rounds, "ann")
    following = in_thread(rounds.wait_until_received, member, 2)
    receive(rounds, member, 1)
    assert waits(following)
    receive(rounds, member, 2)
    assert following.result(timeout=5) is None


def test_what_never_comes_is_not_waited_for_longer_than_patience_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    rounds = rounds_of(1)
    member = joined(rounds, "ann")
    receive(rounds, member, 1)
    with pytest.raises(SequenceError, match=r"batch 6 .*, but batch 2 is due") as caught:
        rounds.wait_until_received(member, 5)
    assert caught.value.expected == 2


def test_a_call_that_begins_too_early_in_the_sequence_is_refused_at_once() -> None:
    rounds = rounds_of(1)
    member = joined(rounds, "ann")
    for sequence in (1, 2, 3):
        receive(rounds, member, sequence)
    with pytest.raises(SequenceError, match=r"batch 2 .*, but batch 4 is due") as caught:
        rounds.wait_until_received(member, 1)
    assert caught.value.expected == 4


# ---------------------------------------------------------------- averages


def test_the_average_is_the_mean_weighted_by_samples() -> None:
    rounds = rounds_of(3, sync="average")
    members = [joined(rounds, name) for name in "abc"]
    waiting = [
        in_thread(rounds.average, member, 0, part(weight, batches), samples)
        for member, weight, batches, samples in zip(
            members, (1.0, 2.0, 6.0), (4, 9, 2), (10, 30, 60), strict=True
        )
    ]
    for each in waiting:
        mean = each.result(timeout=5)
        # (10 * 1 + 30 * 2 + 60 * 6) / 100 = 4.3; the counter cannot be averaged: the largest stands.
        assert torch.allclose(mean["w"], torch.tensor([4.3, 8.6]))
        assert mean["w"].dtype is torch.float32
        assert mean["num_batches_tracked"].item() == 9


def test_an_average_waits_for_every_client() -> None:
    rounds = rounds_of(3, sync="average")
    members = [joined(rounds, name) for name in "abc"]
    first = in_thread(rounds.average, members[2], 0, part(1.0), 1)
    second = in_thread(rounds.average, members[0], 0, part(2.0), 1)
    assert waits(first)
    assert waits(second)
    rounds.average(members[1], 0, part(6.0), 1)
    assert first.result(timeout=5)["w"][0] == second.result(timeout=5)["w"][0] == 3.0


def test_the_average_does_not_depend_on_who_comes_first() -> None:
    """Also in the last bit: sums of floats depend on the order."""
    weights = [0.1, 1e8, -1e8]
    means = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        rounds = rounds_of(3, sync="average")
        members = [joined(rounds, name) for name in "abc"]
        waiting = []
        for client in order:
            waiting.append(in_thread(rounds.average, members[client], 0, part(weights[client]), client + 1))
            if client != order[-1]:
                assert waits(waiting[-1], 0.02)
        means.append(waiting[0].result(timeout=5)["w"])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


@pytest.mark.parametrize("epoch", [1, 7, 2**32 - 1])
def test_the_average_of_another_epoch_is_refused(epoch: int) -> None:
    rounds = rounds_of(2, sync="average")
    member = joined(rounds, "ann")
    with pytest.raises(WireError, match=f"the average of epoch 0 is due, not {epoch}"):
        rounds.average(member, epoch, part(1.0), 1)


def test_averages_follow_one_another_epoch_by_epoch() -> None:
    rounds = rounds_of(2, sync="average", epochs=4)
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    for epoch in range(3):
        other = in_thread(rounds.average, ann, epoch, part(1.0 + epoch), 1)
        mean = rounds.average(bob, epoch, part(3.0 + epoch), 1) if waits(other) else {}
        assert mean["w"][0] == other.result(timeout=5)["w"][0] == 2.0 + epoch
    with pytest.raises(WireError, match="the average of epoch 3 is due, not 2"):
        rounds.average(ann, 2, part(1.0), 1)


def test_a_client_gives_its_part_once_an_epoch() -> None:
    rounds = rounds_of(2, sync="average")
    member = joined(rounds, "ann")
    assert waits(in_thread(rounds.average, member, 0, part(1.0), 1))
    with pytest.raises(WireError, match=r"client 0 \(ann\)"):
        rounds.average(member, 0, part(1.0), 1)


def test_a_part_trained_on_nothing_has_no_weight() -> None:
    rounds = rounds_of(2, sync="average")
    with pytest.raises(WireError, match="trained on 0 samples"):
        rounds.average(joined(rounds, "ann"), 0, part(1.0), 0)


# ---------------------------------------------------------------- turns


def test_turns_go_by_client_and_epoch_and_the_part_is_handed_on() -> None:
    rounds = rounds_of(3, sync="relay")
    members = [joined(rounds, name) for name in "abc"]
    log: list[str] = []

    def client(index: int) -> None:
        for epoch in range(2):
            before = rounds.take_turn(members[index], epoch)
            log.append(f"{index}:{before['w'][0].item():g}" if before else f"{index}:first")
            rounds.end_turn(members[index], epoch, part(10.0 * epoch + index))

    for each in [in_thread(client, index) for index in (2, 0, 1)]:
        each.result(timeout=5)
    assert log == ["0:first", "1:0", "2:1", "0:2", "1:10", "2:11"]


def test_who_is_not_at_its_turn_waits_for_it() -> None:
    rounds = rounds_of(2, sync="relay")
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    assert rounds.take_turn(ann, 0) == {}
    waiting = in_thread(rounds.take_turn, bob, 0)
    assert waits(waiting)
    rounds.end_turn(ann, 0, part(5.0))
    assert waiting.result(timeout=5)["w"][0] == 5.0


def test_a_turn_that_is_over_is_refused() -> None:
    rounds = rounds_of(2, sync="relay")
    ann = joined(rounds, "ann")
    rounds.end_turn(ann, 0, part(1.0))
    with pytest.raises(WireError, match=r"client 0 \(ann\): its turn of epoch 0 is over"):
        rounds.take_turn(ann, 0)


def test_only_who_is_at_its_turn_may_end_it() -> None:
    rounds = rounds_of(2, sync="relay")
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    for member, epoch in ((bob, 0), (ann, 1)):
        with pytest.raises(WireError, match="it is not its turn"):
            rounds.end_turn(member, epoch, part(1.0))


# ---------------------------------------------------------------- the end


def test_the_run_is_finished_when_every_place_was_taken_and_left() -> None:
    rounds = rounds_of(2)
    assert not rounds.wait_until_finished(timeout=0.01)
    ann = joined(rounds, "ann")
    rounds.leave(ann)
    assert not rounds.wait_until_finished(timeout=0.01), "a place is still free"
    bob = joined(rounds, "bob")
    finished = in_thread(rounds.wait_until_finished)
    assert waits(finished)
    rounds.leave(bob)
    assert finished.result(timeout=5) is True


def test_closing_wakes_all_who_wait_with_the_reason() -> None:
    told: list[ClosedError] = []
    rounds = Rounds(small_run(clients=3, sync="average"), on_close=told.append)
    ann, bob, cid = (joined(rounds, name) for name in ("ann", "bob", "cid"))
    waiting = [
        in_thread(rounds.average, ann, 0, part(1.0), 1),
        in_thread(rounds.average, bob, 0, part(1.0), 1),
        in_thread(rounds.take_turn, cid, 0),
        in_thread(rounds.next_durable, ann, 0),
        in_thread(rounds.wait_until_finished),
        in_thread(rounds.wait_until_received, cid, 1),
    ]
    assert all(waits(each, 0.02) for each in waiting)
    rounds.close(OVER)
    assert [each.exception(timeout=5) for each in waiting] == [OVER] * len(waiting)
    assert told == [OVER]


def test_who_comes_after_the_end_is_told_the_reason() -> None:
    rounds = rounds_of(2, sync="average")
    member = joined(rounds, "ann")
    rounds.close(OVER)
    for late in (
        lambda: joined(rounds, "bob"),
        lambda: rounds.member(member.session),
        lambda: rounds.next_durable(member, 0),
        lambda: rounds.average(member, 0, part(1.0), 1),
        lambda: rounds.end_turn(member, 0, part(1.0)),
        lambda: rounds.take_turn(member, 1),
    ):
        with pytest.raises(ClosedError) as caught:
            late()
        assert caught.value is OVER


def test_the_first_reason_stands_and_is_told_once() -> None:
    told: list[ClosedError] = []
    rounds = Rounds(small_run(), on_close=told.append)
    rounds.close(OVER)
    rounds.close(ClosedError("later"))
    assert told == [OVER]
    with pytest.raises(ClosedError) as caught:
        joined(rounds, "ann")
    assert caught.value is OVER


def test_a_client_lost_before_it_left_ends_the_run_and_is_named() -> None:
    rounds = rounds_of(2)
    ann = joined(rounds, "ann")
    rounds.lost(ann.account)
    with pytest.raises(ClosedError, match=r"client 0 \(ann\) went away before the end of the run"):
        rounds.wait_until_finished()


def test_a_client_lost_after_it_left_is_no_loss() -> None:
    rounds = rounds_of(2)
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    rounds.leave(ann)
    rounds.lost(ann.account)
    assert rounds.member(bob.session) == bob
    rounds.leave(bob)
    assert rounds.wait_until_finished() is True


def test_a_finished_run_cannot_be_closed_any_more() -> None:
    told: list[ClosedError] = []
    rounds = Rounds(small_run(), on_close=told.append)
    rounds.leave(joined(rounds, "ann"))
    rounds.close(OVER)
    assert told == []
    assert rounds.wait_until_finished() is True


# ---------------------------------------------------------------- a quorum


def test_with_a_quorum_the_run_goes_on_without_a_lost_client() -> None:
    lost: list[tuple[int, str]] = []
    rounds = Rounds(
        small_run(clients=3, quorum=2), on_lost=lambda client, why: lost.append((client, str(why)))
    )
    ann, bob, cid = (joined(rounds, name) for name in ("ann", "bob", "cid"))
    waiting = [in_thread(rounds.next_durable, cid, 0), in_thread(rounds.wait_until_received, cid, 9)]
    assert all(waits(each, 0.02) for each in waiting)
    rounds.lost(cid.account)
    rounds.lost(cid.account)
    assert lost == [(2, "client 2 (cid) went away before the end of the run")]
    for each in waiting:
        assert str(each.exception(timeout=5)) == cid.account.lost == lost[0][1]
    with pytest.raises(RefusedError, match="no present member"):
        rounds.member(cid.session)
    with pytest.raises(FullError):
        joined(rounds, "dan")
    rounds.leave(ann)
    assert not rounds.wait_until_finished(timeout=0.01)
    rounds.leave(bob)
    assert rounds.wait_until_finished() is True


def test_the_last_one_lost_finishes_a_run_that_the_others_have_left() -> None:
    rounds = rounds_of(2, quorum=1)
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    rounds.leave(ann)
    finished = in_thread(rounds.wait_until_finished)
    assert waits(finished)
    rounds.lost(bob.account, "failed: 'its disk is full'")
    assert finished.result(timeout=5) is True


@pytest.mark.parametrize("quorum", [2, 3, 0])
def test_with_fewer_than_the_quorum_the_run_is_over(quorum: int) -> None:
    rounds = rounds_of(3, quorum=quorum)
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    rounds.lost(ann.account)
    if quorum == 2:
        assert rounds.member(bob.session) == bob, "bob, and a client that is still to join"
        rounds.lost(bob.account)
    last = "bob" if quorum == 2 else "ann"
    with pytest.raises(ClosedError, match=rf"\({last}\) went away"):
        rounds.wait_until_finished()


def test_a_loss_completes_the_average() -> None:
    rounds = rounds_of(3, sync="average", quorum=2)
    ann, bob, cid = (joined(rounds, name) for name in ("ann", "bob", "cid"))
    waiting = [
        in_thread(rounds.average, member, 0, part(w), n) for member, w, n in ((ann, 1.0, 1), (bob, 5.0, 3))
    ]
    assert all(waits(each) for each in waiting)
    rounds.lost(cid.account)
    for each in waiting:
        assert each.result(timeout=5)["w"][0] == 4.0  # (1 * 1 + 3 * 5) / 4
    with pytest.raises(ClosedError, match="cid"):
        rounds.average(cid, 1, part(1.0), 1)


def test_the_part_that_a_lost_client_gave_before_counts_this_time_only() -> None:
    rounds = rounds_of(3, sync="average", quorum=2)
    ann, bob, cid = (joined(rounds, name) for name in ("ann", "bob", "cid"))
    lost = in_thread(rounds.average, cid, 0, part(9.0), 1)
    first = in_thread(rounds.average, ann, 0, part(1.0), 1)
    assert waits(lost)
    rounds.lost(cid.account)
    assert isinstance(lost.exception(timeout=5), ClosedError)
    assert waits(first), "bob remains"
    assert rounds.average(bob, 0, part(2.0), 1)["w"][0] == first.result(timeout=5)["w"][0] == 4.0
    second = in_thread(rounds.average, ann, 1, part(1.0), 1)
    assert rounds.average(bob, 1, part(2.0), 1)["w"][0] == second.result(timeout=5)["w"][0] == 1.5


def test_an_average_waits_for_clients_that_are_still_to_join() -> None:
    rounds = rounds_of(3, sync="average", quorum=1)
    ann, bob = joined(rounds, "ann"), joined(rounds, "bob")
    first = in_thread(rounds.average, ann, 0, part(1.0), 1)
    rounds.lost(bob.account)
    assert waits(first)
    assert rounds.average(joined(rounds, "cid"), 0, part(3.0), 1)["w"][0] == 2.0
    assert first.result(timeout=5)["w"][0] == 2.0


@pytest.mark.parametrize("attempt", range(20))
def test_a_loss_that_races_with_the_last_part_leaves_no_one_waiting(attempt: int) -> None:
    rounds = rounds_of(3, sync="average", quorum=2)
    members = [joined(rounds, name) for name in "abc"]
    for epoch in range(3):
        given = [in_thread(rounds.average, member, epoch, part(2.0), 1) for member in members[:2]]
        if epoch == 1:
            in_thread(rounds.lost, members[2].account)
        elif epoch == 0:
            given.append(in_thread(rounds.average, members[2], epoch, part(2.0), 1))
        for each in given:
            assert each.result(timeout=5)["w"][0] == 2.0


def test_of_every_second_epoch_an_average_is_due_and_of_the_last() -> None:
    rounds = rounds_of(1, sync="average", sync_every=2, epochs=5)
    member = joined(rounds, "one")
    for epoch in (0, 2):
        with pytest.raises(WireError, match="the average of epoch 1 is due, not"):
            rounds.average(member, epoch, part(1.0), 1)
    for epoch in (1, 3, 4):
        rounds.average(member, epoch, part(1.0), 1)
    with pytest.raises(WireError):
        rounds.average(member, 4, part(1.0), 1)


# ---------------------------------------------------------------- coming back

ANN = "a" * 32


def lasting(clients: int, **settings: Any) -> Rounds:
    """Of a run whose clients may come back."""
    return rounds_of(clients, checkpoint_every=1.0, **settings)


def again(rounds: Rounds, member: Member, **changes: Any) -> Member:
    """The member joins anew, from the process that it was."""
    known = {"identity": ANN, "run_id": rounds.ledger.run_id, "session": member.session}
    return joined(rounds, member.name, **(known | changes))


def test_who_comes_back_is_the_same_client_in_another_session_and_whoever_speaks_for_the_last_is_told() -> (
    None
):
    rounds = lasting(2, sync="average")
    ann = joined(rounds, "ann", identity=ANN)
    waiting = [
        in_thread(rounds.average, ann, 0, part(1.0), 1),
        in_thread(rounds.next_durable, ann, 0),
        in_thread(rounds.wait_until_received, ann, 9),
    ]
    assert all(waits(each, 0.02) for each in waiting)
    back = again(rounds, ann)
    assert (back.client, back.account) == (ann.client, ann.account)
    for each in waiting:
        assert isinstance(each.exception(timeout=5), RefusedError)
    with pytest.raises(StaleError, match="join first"):
        rounds.member(ann.session)
    assert rounds.member(back.session) == back


def test_who_is_away_may_come_back_and_only_one_without_an_identity_may_not() -> None:
    rounds = lasting(2)
    ann, bob = joined(rounds, "ann", identity=ANN), joined(rounds, "bob")
    assert rounds.away(ann)
    assert not rounds.away(ann), "that is known"
    assert not rounds.away(bob)
    with pytest.raises(StaleError):
        rounds.member(ann.session)
    back = again(rounds, ann)
    assert not rounds.away(ann), "its connection is not the last one"
    assert rounds.member(back.session) == back


def test_a_waiting_call_of_who_goes_away_ends_and_may_be_made_again() -> None:
    rounds = lasting(2, sync="average")
    ann = joined(rounds, "ann", identity=ANN)
    waiting = in_thread(rounds.average, ann, 0, part(1.0), 1)
    assert waits(waiting)
    rounds.away(ann)
    assert isinstance(waiting.exception(timeout=5), StaleError)


def test_a_newcomer_to_what_is_being_received_waits_where_it_is_to_find_it_idle() -> None:
    rounds = lasting(1)
    ann = joined(rounds, "ann", identity=ANN)
    rounds.begin_segment(ann, 1)
    new = Newcomer("ann", ANN, rounds.ledger.run_id, ann.session)
    coming = in_thread(rounds.join, new, True)
    assert waits(coming)
    rounds.end_segment(ann)
    assert coming.result(timeout=5).account is ann.account


def test_one_segment_of_a_client_waits_for_the_one_before() -> None:
    rounds = lasting(1)
    ann = joined(rounds, "ann", identity=ANN)
    rounds.begin_segment(ann, 1)
    back = again(rounds, ann)
    following = in_thread(rounds.begin_segment, back, 1)
    assert waits(following)
    rounds.end_segment(ann)
    assert following.result(timeout=5) is None


def test_what_came_on_an_earlier_session_is_not_taken() -> None:
    rounds = lasting(1)
    ann = joined(rounds, "ann", identity=ANN)
    again(rounds, ann)
    with pytest.raises(RefusedError, match="another process has taken the place"):
        rounds.receive(ann, 1, 1, 1, last=False)
    assert ann.account.received.sequence == 0


def test_what_came_before_is_no_news_and_a_segment_of_it_may_begin() -> None:
    rounds = lasting(1)
    ann = joined(rounds, "ann", identity=ANN)
    receive(rounds, ann, 1)
    receive(rounds, ann, 2)
    back = again(rounds, ann)
    rounds.begin_segment(back, 1)
    assert rounds.receive(back, 1, 1, 1, last=False) is None
    assert rounds.receive(back, 2, 1, 2, last=False) is None
    with pytest.raises(ConflictError, match="batch 2 came before, with other contents"):
        rounds.receive(back, 2, 1, 3, last=False)


def test_a_call_waits_until_a_batch_is_learned_from() -> None:
    rounds = lasting(1)
    ann = joined(rounds, "ann", identity=ANN)
    receive(rounds, ann, 1)
    mark = rounds.receive(ann, 2, 1, 2, last=False)
    assert mark is not None
    waiting = in_thread(rounds.wait_until_applied, 0, 2)
    rounds.apply(0, ann.account.received)
    assert waiting.result(timeout=5) is None


def test_what_a_lost_client_waits_for_does_not_come() -> None:
    rounds = lasting(2, quorum=1)
    ann = joined(rounds, "ann", identity=ANN)
    receive(rounds, ann, 1)
    waiting = in_thread(rounds.wait_until_applied, 0, 1)
    assert waits(waiting)
    rounds.lost(ann.account)
    assert isinstance(waiting.exception(timeout=5), ClosedError)


def test_a_member_is_told_what_it_need_not_keep_as_soon_as_that_is_more() -> None:
    rounds = lasting(2)
    ann = joined(rounds, "ann", identity=ANN)
    waiting = in_thread(rounds.next_durable, ann, 0)
    rounds.keep_from({0: 0}, [0])
    assert waits(waiting)
    rounds.keep_from({0: 4, 1: 7}, [0, 1])
    assert waiting.result(timeout=5) == 4
    waiting = in_thread(rounds.next_durable, ann, 4)
    assert waits(waiting)
    rounds.leave(ann)
    assert waiting.result(timeout=5) is None


def test_while_the_server_drains_nobody_joins_and_no_segment_begins() -> None:
    rounds, soon = lasting(2), StaleError("the server is about to stop")
    ann = joined(rounds, "ann", identity=ANN)
    rounds.drain(soon)
    for late in (lambda: joined(rounds, "bob"), lambda: again(rounds, ann), lambda: begin(rounds, ann)):
        with pytest.raises(StaleError) as caught:
            late()
        assert caught.value is soon
    receive(rounds, ann, 1)  # of a segment that has begun


def begin(rounds: Rounds, member: Member) -> None:
    rounds.begin_segment(member, member.account.received.sequence + 1)


# ---------------------------------------------------------------- what is done again


def test_a_part_that_is_given_again_counts_once_and_an_average_that_was_made_is_had_again() -> None:
    told = list[tuple[int, dict[int, int]]]()
    run = small_run(clients=2, sync="average", checkpoint_every=1.0)
    rounds = Rounds(run, on_average=lambda *average: told.append(average))
    ann, bob = joined(rounds, "ann", identity=ANN), joined(rounds, "bob", identity="b" * 32)
    first = in_thread(rounds.average, ann, 0, part(1.0), 1)
    assert waits(first)
    ann = again(rounds, ann)
    second = in_thread(rounds.average, ann, 0, part(1.0), 1)
    assert waits(second)
    mean = rounds.average(bob, 0, part(3.0), 1)
    assert mean["w"][0].item() == 2.0
    mean = second.result(timeout=5)
    assert mean["w"][0].item() == 2.0
    ann = again(rounds, ann)
    mean = rounds.average(ann, 0, part(1.0), 1)
    assert mean["w"][0].item() == 2.0
    assert told == [(0, {0: 1, 1: 1})]
    with pytest.raises(WireError, match="the average of epoch 1 is due"):
        rounds.average(ann, 5, part(1.0), 1)


def test_a_turn_that_was_taken_and_ended_may_be_so_again_and_is_ended_once() -> None:
    rounds = lasting(2, sync="relay")
    ann = joined(rounds, "ann", identity=ANN)
    bob = joined(rounds, "bob", identity="b" * 32)
    assert rounds.take_turn(ann, 0) == {}
    ann = again(rounds, ann)
    assert rounds.take_turn(ann, 0) == {}
    rounds.end_turn(ann, 0, part(1.0))
    rounds.end_turn(again(rounds, ann), 0, part(9.0))
    assert rounds.take_turn(bob, 0)["w"][0] == 1.0


def test_what_was_averaged_and_handed_on_goes_on_after_a_checkpoint() -> None:
    names = list(part(0.0))
    rounds = lasting(2, sync="average")
    ann, bob = joined(rounds, "ann", identity=ANN), joined(rounds, "bob", identity="b" * 32)
    receive(rounds, ann, 1)
    waiting = in_thread(rounds.average, ann, 0, part(1.0, 3), 1)
    rounds.average(bob, 0, part(3.0, 5), 1)
    waiting.result(timeout=5)
    assert waits(in_thread(rounds.average, ann, 1, part(7.0), 1)), "its part is to be given again"
    tensors, facts = rounds.state()
    after = Rounds(
        small_run(clients=2, sync="average", checkpoint_every=1.0),
        ledger=Ledger.restored(2, facts["ledger"]),
    )
    after.restore(tensors, facts, names)
    ann, bob = again(after, ann), again(after, bob, identity="b" * 32)
    assert ann.account.received.sequence == 0, "it was not learned from"
    mean = after.average(ann, 0, part(1.0), 1)
    assert list(mean) == names
    assert (mean["w"][0].item(), mean["num_batches_tracked"].item()) == (2.0, 5)
    waiting = in_thread(after.average, ann, 1, part(2.0), 1)
    assert after.average(bob, 1, part(4.0), 1)["w"][0] == waiting.result(timeout=5)["w"][0] == 3.0


def test_the_turn_goes_on_after_a_checkpoint() -> None:
    rounds = lasting(2, sync="relay")
    ann = joined(rounds, "ann", identity=ANN)
    joined(rounds, "bob", identity="b" * 32)
    rounds.end_turn(ann, 0, part(5.0))
    tensors, facts = rounds.state()
    after = Rounds(
        small_run(clients=2, sync="relay", checkpoint_every=1.0), ledger=Ledger.restored(2, facts["ledger"])
    )
    after.restore(tensors, facts, list(part(0.0)))
    bob = joined(after, "bob", identity="b" * 32)
    assert after.take_turn(bob, 0)["w"][0] == 5.0
