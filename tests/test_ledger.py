"""The ledger, worked by hand: who may join, which numbers are taken, what a checkpoint has of it."""

import hashlib
import json
from typing import Any

import pytest

from common.errors import (
    ConflictError,
    ForbiddenError,
    FullError,
    RefusedError,
    SequenceError,
    StaleError,
    TakenError,
)
from dsl_server.ledger import Account, Ledger, Mark, Newcomer, hashed

pytestmark = pytest.mark.timeout(60)

ANN, BOB = "a" * 32, "b" * 32


def joined(ledger: Ledger, name: str = "ann", identity: str = ANN, **settings: Any) -> Account:
    return ledger.join(Newcomer(name, identity, **settings))


def take(ledger: Ledger, account: Account, sequence: int, **changes: Any) -> Mark | None:
    """A batch of 8 samples, whose digest is ten times its number."""
    batch: dict[str, Any] = {
        "session": account.session,
        "samples": 8,
        "digest": 10 * sequence,
        "last": False,
    } | changes
    return ledger.receive(account, sequence=sequence, **batch)


def learned(ledger: Ledger, account: Account, count: int) -> None:
    """So many batches came, and were learned from."""
    for _ in range(count):
        mark = take(ledger, account, account.received.sequence + 1)
        assert mark is not None
        ledger.apply(account, mark)


def after_a_crash(ledger: Ledger, snapshot: Any = None, **settings: Any) -> Ledger:
    text = json.dumps(ledger.snapshot() if snapshot is None else snapshot)
    return Ledger.restored(ledger.places, json.loads(text), **settings)


# ---------------------------------------------------------------- marks


def test_a_mark_counts_batches_samples_and_epochs_and_chains_their_digests() -> None:
    nothing = hashlib.sha256(b"").hexdigest()
    first = hashlib.sha256(f"{nothing} 1 8 77".encode()).hexdigest()
    second = hashlib.sha256(f"{first} 2 3 78".encode()).hexdigest()
    assert Mark() == Mark(0, 0, nothing, 0)
    assert Mark().then(8, 77, last=False) == Mark(1, 8, first, 0)
    assert Mark().then(8, 77, last=False).then(3, 78, last=True) == Mark(2, 11, second, 1)


@pytest.mark.parametrize("other", [(3, 77, 8, 78), (8, 77, 3, 79), (8, 78, 3, 77)])
def test_two_chains_are_equal_only_if_all_before_was_equal_in_its_order(
    other: tuple[int, int, int, int],
) -> None:
    one = Mark().then(8, 77, last=False).then(3, 78, last=True)
    first_samples, first, second_samples, second = other
    assert one.chain != Mark().then(first_samples, first, False).then(second_samples, second, True).chain


# ---------------------------------------------------------------- who is there


def test_places_go_by_who_comes_first_and_sessions_cannot_be_guessed() -> None:
    ledger = Ledger(3)
    accounts = [joined(ledger, "ann"), joined(ledger, "bob", BOB), joined(ledger, "cid", "")]
    assert [account.client for account in accounts] == [0, 1, 2]
    assert [account.sessions for account in accounts] == [1, 1, 1]
    assert len({account.session for account in accounts}) == 3
    assert all(len(account.session) == 32 for account in accounts)
    assert [ledger.account(account.session) for account in accounts] == accounts


def test_of_an_identity_only_a_hash_is_kept() -> None:
    account = joined(Ledger(1))
    assert account.identity == hashed(ANN) == hashlib.sha256(ANN.encode()).hexdigest()
    assert hashed("") == ""


def test_one_too_many_is_refused_and_so_is_who_has_no_identity_twice() -> None:
    ledger = Ledger(1)
    joined(ledger, identity="")
    for identity in ("", ANN):
        with pytest.raises(FullError, match=r"'ann' is one too many.*client 0 \(ann\).*--clients 2"):
            joined(ledger, identity=identity)


def test_of_a_name_of_which_there_is_one_only_no_stranger_has_another() -> None:
    ledger = Ledger(2)
    joined(ledger)
    with pytest.raises(TakenError, match="each client needs a certificate of its own"):
        joined(ledger, identity=BOB, single=True)
    assert joined(ledger, identity=BOB).client == 1


def test_who_comes_back_has_its_place_and_a_new_session_and_the_old_one_is_over() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    old = account.session
    learned(ledger, account, 2)
    assert joined(ledger, run_id=ledger.run_id, session=old) is account
    assert (account.sessions, account.present, account.received.sequence) == (2, True, 2)
    assert ledger.account(account.session) is account
    with pytest.raises(StaleError):
        ledger.account(old)
    with pytest.raises(StaleError):
        take(ledger, account, 3, session=old)
    assert not ledger.away(old)
    assert account.present


def test_whose_place_was_taken_is_fenced_off_also_after_a_crash() -> None:
    ledger = Ledger(1)
    old = joined(ledger).session
    ledger = after_a_crash(ledger)
    before = joined(ledger, run_id=ledger.run_id, session=old).session
    after = joined(ledger, run_id=ledger.run_id, takeover=True).session
    ledger = after_a_crash(ledger)
    for session in (old, before):
        with pytest.raises(RefusedError, match="another process has taken the place of client 0"):
            joined(ledger, run_id=ledger.run_id, session=session)
    assert joined(ledger, run_id=ledger.run_id, session=after).present


def test_where_names_are_certified_an_identity_is_that_of_its_name() -> None:
    ledger = Ledger(2)
    joined(ledger, single=True)
    with pytest.raises(ForbiddenError, match="this --state folder is that of 'ann', not of 'bob'"):
        joined(ledger, "bob", ANN, single=True)
    assert joined(ledger, "ann's new name", ANN, takeover=True).client == 0, (
        "a name that anyone may choose says nothing"
    )


def test_another_process_of_who_is_there_must_say_that_it_takes_over() -> None:
    ledger = Ledger(1)
    old = joined(ledger).session
    with pytest.raises(TakenError, match="--takeover"):
        joined(ledger, run_id=ledger.run_id)
    account = joined(ledger, run_id=ledger.run_id, takeover=True)
    with pytest.raises(RefusedError, match=r"another process has taken the place of client 0 \(ann\)"):
        joined(ledger, run_id=ledger.run_id, session=old)
    assert ledger.account(account.session) is account


def test_another_process_of_who_has_gone_away_need_not() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    assert ledger.away(account.session)
    assert not ledger.away(account.session)
    with pytest.raises(StaleError):
        take(ledger, account, 1)
    assert joined(ledger, run_id=ledger.run_id).present


@pytest.mark.parametrize("identity", ["", ANN, BOB])
@pytest.mark.parametrize("run_id", ["0" * 16, None])
def test_who_comes_back_to_what_is_not_its_run_is_refused(identity: str, run_id: str | None) -> None:
    ledger = Ledger(2)
    account = joined(ledger)
    if identity == ANN and run_id is None:
        assert joined(ledger, run_id=ledger.run_id, session=account.session) is account
        return
    with pytest.raises(RefusedError, match=r"which does not know it.*--resume.*--state"):
        joined(ledger, identity=identity, run_id=run_id or ledger.run_id)
    assert len(ledger.accounts) == 1


@pytest.mark.parametrize(
    ("fate", "says"), [({"left": True}, "it has trained to the end"), ({"lost": "its lease"}, "its lease")]
)
def test_who_has_gone_for_good_does_not_come_back(fate: dict[str, Any], says: str) -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    vars(account).update(fate)
    with pytest.raises(RefusedError, match=says):
        joined(ledger, run_id=ledger.run_id, session=account.session)
    with pytest.raises(StaleError):
        ledger.account(account.session)


def test_an_empty_session_is_nobodys() -> None:
    ledger = Ledger(1)
    joined(ledger)
    for each in (ledger, after_a_crash(ledger)):
        with pytest.raises(StaleError):
            each.account("")


def test_a_server_that_has_forgotten_what_its_client_threw_away_does_not_go_on() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    learned(ledger, account, 3)
    old = after_a_crash(ledger)
    with pytest.raises(RefusedError, match=r"up to 4, and the server has them up to 3 only.*the newest"):
        joined(old, run_id=old.run_id, durable=4)
    assert joined(old, run_id=old.run_id, durable=3).received.sequence == 3


# ---------------------------------------------------------------- what has come


def test_each_number_is_taken_once_in_its_order() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    assert [mark and mark.sequence for mark in (take(ledger, account, n) for n in (1, 2, 2, 1, 3))] == [
        1,
        2,
        None,
        None,
        3,
    ]
    assert (account.received.sequence, account.received.samples, ledger.duplicates) == (3, 24, 2)
    assert account.applied == Mark()


@pytest.mark.parametrize("came", [2, 3, 2**64 - 1])
def test_a_gap_is_refused_with_the_number_that_is_due_and_changes_nothing(came: int) -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    with pytest.raises(SequenceError, match=f"batch {came} came, but batch 1 is due") as caught:
        take(ledger, account, came)
    assert caught.value.expected == 1
    assert account.received == Mark()


def test_who_has_no_identity_repeats_nothing() -> None:
    ledger = Ledger(1)
    account = joined(ledger, identity="")
    take(ledger, account, 1)
    with pytest.raises(SequenceError, match="batch 1 came, but batch 2 is due"):
        take(ledger, account, 1)


def test_a_number_stands_for_certain_bytes_unless_they_may_be_made_again() -> None:
    for binding in (True, False):
        ledger = Ledger(1, binding=binding)
        account = joined(ledger)
        take(ledger, account, 1)
        if binding:
            with pytest.raises(ConflictError, match="batch 1 came before, with other contents"):
                take(ledger, account, 1, digest=11)
        else:
            assert take(ledger, account, 1, digest=11) is None
        assert account.received.then(8, 20, last=False) == take(ledger, account, 2)


def test_what_is_given_back_is_due_again_and_may_then_be_of_other_bytes() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    learned(ledger, account, 2)
    take(ledger, account, 3)
    ledger.give_back(account)
    assert account.received == account.applied
    assert (account.received.sequence, account.laid) == (2, 2)
    mark = take(ledger, account, 3, digest=31)
    assert mark is not None
    assert mark.sequence == 3


def test_nothing_is_learned_from_that_has_not_come_and_nothing_is_forgotten() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    learned(ledger, account, 2)
    for mark in (account.applied.then(8, 30, last=False), Mark()):
        with pytest.raises(AssertionError):
            ledger.apply(account, mark)


# ---------------------------------------------------------------- what lasts


def test_after_a_crash_what_was_learned_from_is_known_and_the_rest_is_due_again() -> None:
    ledger = Ledger(2)
    account = joined(ledger)
    learned(ledger, account, 2)
    take(ledger, account, 3)
    other = joined(ledger, "bob", BOB)
    other.left = True
    after = after_a_crash(ledger)
    assert after.run_id == ledger.run_id
    known, gone = after.accounts
    assert (known.received, known.applied, known.laid, known.latest) == (account.applied,) * 2 + (2, None)
    assert (known.client, known.name, known.identity, known.sessions) == (0, "ann", hashed(ANN), 1)
    assert (known.present, known.session, gone.left) == (False, "", True)
    assert joined(after, run_id=after.run_id, session=account.session) is known
    assert take(after, known, 3) == account.received


def test_a_checkpoint_holds_no_secret() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    text = json.dumps(ledger.snapshot())
    assert ANN not in text
    assert account.session not in text


def test_a_snapshot_stays_as_it_was() -> None:
    ledger = Ledger(1)
    account = joined(ledger)
    snapshot = ledger.snapshot()
    learned(ledger, account, 2)
    assert after_a_crash(ledger, snapshot).accounts[0].applied == Mark()


def test_whether_numbers_bind_is_the_runs_and_not_the_checkpoints() -> None:
    ledger = Ledger(1)
    joined(ledger)
    after = after_a_crash(ledger, binding=False)
    account = joined(after, run_id=after.run_id)
    take(after, account, 1)
    assert take(after, account, 1, digest=11) is None
