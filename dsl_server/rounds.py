"""Who is in the run, what each has delivered, and where clients meet: averages and turns.

A pure matter of threads and numbers: knows no bytes, no sockets, no network. What has been delivered is the
ledger's; here threads wait for it.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common.errors import ClosedError, PlanError, RefusedError, SequenceError, StaleError, WireError
from common.parts import State, average, copied, found_under, under
from common.run import Run
from common.sampling import drawn
from dsl_server.ledger import Account, Ledger, Mark, Newcomer

Named = Callable[[tuple[str, ...], str], tuple[tuple[str, ...], str]]
PATIENCE_S = 10.0  # how long a call waits for an earlier one of its client that has not begun


@dataclass(frozen=True)
class Member:
    """A client of the run, as long as this session of it lasts."""

    account: Account
    session: str

    @property
    def client(self) -> int:
        return self.account.client

    @property
    def name(self) -> str:
        return self.account.name

    def __str__(self) -> str:
        return str(self.account)


class Rounds:
    """on_lost: told of each member that the run goes on without, and why. on_average: told with each average,
    while nothing else can change here, of its epoch and by client of the samples behind each part.

    ledger: of a run that goes on after a checkpoint; else a new one.
    """

    def __init__(
        self,
        run: Run,
        on_close: Callable[[ClosedError], None] = lambda _: None,
        on_lost: Callable[[int, ClosedError], None] = lambda *_: None,
        on_average: Callable[[int, dict[int, int]], None] = lambda *_: None,
        ledger: Ledger | None = None,
    ) -> None:
        self._run, self._shared = run, False
        self._first_named: Named = lambda names, by: (names, by)
        self._on_close, self._on_lost, self._on_average = on_close, on_lost, on_average
        self.ledger = ledger or Ledger(run.clients)
        self._receiving = set[int]()  # clients that have an open segment
        self._floors: dict[int, int] = {}  # client to the number that it need not keep
        self._saved = {account.client for account in self.ledger.accounts}  # whose place a checkpoint has
        self._parts: dict[int, tuple[State, int]] = {}  # of the average being made: client to part
        self._average: State = {}
        self._class_names: tuple[str, ...] = ()  # in label order, once a client has told them
        self._named_by = ""
        self._averages_made = 0
        self._turn = 0  # counts turns over the whole run
        self._meeting = set[int]()  # clients that wait here for others
        self._relayed: State = {}
        self._closed: ClosedError | None = None
        self._draining: ClosedError | None = None
        # One lock, and conditions for those who wait: for what a client does next, which is all that a batch
        # wakes; for what becomes of a client, as long as it is a member; and for the run as a whole.
        lock = threading.RLock()
        self._moved = [threading.Condition(lock) for _ in range(run.clients)]
        self._fate = [threading.Condition(lock) for _ in range(run.clients)]
        self._changed = threading.Condition(lock)

    def share(self, first_named: Named) -> None:
        """There are clients elsewhere, too: averages are made with theirs (`given`, `averaged`). first_named:
        tells them what the classes are called, and gives the names that were told first, and by whom."""
        self._shared, self._first_named = True, first_named

    def join(self, who: Newcomer, idle: bool = False) -> Member:
        """A new session of a client, which may have had a place before.

        idle: wait until nothing of its last session is being received. Raises what `Ledger.join` does,
        ClosedError when it is over, StaleError when the server is about to stop.
        """
        with self._changed:
            self._check_open()
            if self._draining:
                raise self._draining
            try:
                account = self.ledger.join(who)
            finally:
                self._changed.notify_all()  # it may be known now that it has left
            self._wake(account.client)  # who speaks for an earlier session of it
            member = Member(account, account.session)
            if idle:
                self._moved[member.client].wait_for(
                    lambda: self._over(member) or account.client not in self._receiving
                )
                self._check_open(member)
            return member

    def member(self, session: str) -> Member:
        """Raises RefusedError unless the session is that of a present member; StaleError where it may come
        back."""
        with self._changed:
            self._check_open()
            try:
                return Member(self.ledger.account(session), session)
            except StaleError as error:
                raise error if self._run.lasts else RefusedError(str(error)) from None

    def members(self) -> list[Account]:
        with self._changed:
            return list(self.ledger.accounts)

    def account(self, client: int) -> Account:
        with self._changed:
            return self.ledger.of(client)

    def client_of(self, session: str) -> int | None:
        """Whose session this is, if it is the last one of a member."""
        with self._changed:
            return self.ledger.client_of(session)

    def meeting(self) -> set[int]:
        """The clients that wait for others: for an average, for their turn."""
        with self._changed:
            return set(self._meeting)

    def ended(self) -> tuple[bool, ClosedError | None]:
        """Whether all have trained to the end; and why the run has ended before that, if it has."""
        with self._changed:
            return self._closed is None and self._finished(), self._closed

    def leave(self, member: Member) -> None:
        """The member has done all that it was to do."""
        with self._changed:
            member.account.left, member.account.heard = True, not member.account.identity
            self._wake(member.client)
            self._wake_givers()

    def heard(self, member: Member) -> None:
        """The member is being told that it has left: it need not ask again."""
        with self._changed:
            member.account.heard = True
            self._changed.notify_all()

    def wait_until_heard(self, timeout: float) -> None:
        """Once the run is finished: until all who have left know it."""
        with self._changed:
            if self._finished():
                self._changed.wait_for(lambda: all(a.heard for a in self.ledger.accounts), timeout)

    def agree(self, member: Member, class_names: Sequence[str]) -> None:
        """Of whoever tells them first the classes' names are the run's. Raises RefusedError where others are
        told: one label would mean two things."""
        with self._changed:
            if not self._class_names:
                self._class_names, self._named_by = self._first_named(tuple(class_names), str(member))
            if tuple(class_names) != self._class_names:
                ours, theirs = _listed(self._class_names), _listed(class_names)
                raise RefusedError(
                    f"the classes of {member} are {theirs}, and those of the run {ours}, as {self._named_by} "
                    "has them: give every client a folder of the same name for each class, also an empty one"
                )

    def away(self, member: Member) -> bool:
        """The member's connection has gone; whether that is news, and it may come back by another."""
        with self._changed:
            if member.account.gone or self._closed or not member.account.identity:
                return False
            was_there = self.ledger.away(member.session)
            self._wake(member.client)
            return was_there

    def lost(self, account: Account, how: str = "went away before the end of the run") -> ClosedError | None:
        """The client is gone. Unless it had left, or those that remain are a quorum, so is the run.

        Gives the reason, if this is news.
        """
        reason = ClosedError(f"{account} {how}")
        with self._changed:
            if account.gone or self._closed:
                return None
            lost = 1 + sum(bool(other.lost) for other in self.ledger.accounts)
            goes_on = self._run.clients - lost >= self._run.least_clients
            if goes_on:
                account.lost = str(reason)
                self._wake(account.client)
                self._wake_givers()
        if goes_on:
            self._on_lost(account.client, reason)
        else:
            self.close(reason)
        return reason

    def close(self, reason: ClosedError) -> None:
        """Ends the run: everyone who waits here, or comes, is told the reason. The first one stands."""
        with self._changed:
            if self._closed or self._finished():
                return
            self._closed = reason
            self._wake_all()
        self._on_close(reason)

    def drain(self, reason: ClosedError) -> None:
        """From now on nobody joins any more, and no segment begins."""
        with self._changed:
            self._draining = reason

    def next_durable(self, member: Member, known: int) -> int | None:
        """The number up to which the member need not keep its batches, once it is above `known`; None when it
        has left. Raises the reason if the run ends before, or its session does."""

        def floor() -> int:
            return self._floors.get(member.client, 0)

        fate = self._fate[member.client]
        self._wait_for(fate, lambda: member.account.left or floor() > known, member)
        return None if member.account.left else floor()

    def keep_from(self, floors: dict[int, int], places: Collection[int]) -> None:
        """Of each client, the number up to which every checkpoint that is kept has its batches. places: the
        clients whose place is in the newest."""
        with self._changed:
            self._floors = floors
            self._saved |= set(places)
            for fate in self._fate:
                fate.notify_all()

    def is_saved(self, member: Member) -> bool:
        """Whether the member has its place also when the server starts anew."""
        with self._changed:
            return member.client in self._saved

    def wait_until_finished(self, timeout: float | None = None) -> bool:
        """Whether every place was taken and all have gone. Raises the reason if the run ends before."""
        return self._wait_for(self._changed, self._finished, timeout=timeout)

    def begin_segment(self, member: Member, first_sequence: int) -> None:
        """From now on the member's batches come by this call. Waits for the one before it.

        Raises SequenceError, with the number that is due, when this segment does not follow.
        """
        with self._changed:
            self._wait_until_received(member, first_sequence - 1)
            self._moved[member.client].wait_for(
                lambda: self._over(member) or member.client not in self._receiving
            )
            self._check_open(member)
            if self._draining:
                raise self._draining
            if member.account.left:
                raise RefusedError(f"{member} has left")
            self._expect_at_most(member, first_sequence)
            self._receiving.add(member.client)
            self._moved[member.client].notify_all()

    def end_segment(self, member: Member) -> None:
        with self._changed:
            self._receiving.discard(member.client)
            self._moved[member.client].notify_all()

    def is_receiving(self, member: Member) -> bool:
        with self._changed:
            return member.client in self._receiving

    def wait_until_received(self, member: Member, sequence: int) -> None:
        """Until the member's batches up to this number have come. Raises SequenceError if they do not."""
        with self._changed:
            self._wait_until_received(member, sequence)
            due = member.account.laid + 1
            if sequence + 1 != due:
                raise SequenceError(f"{member}: batch {sequence + 1} came, but batch {due} is due", due)

    def receive(self, member: Member, sequence: int, samples: int, digest: int, last: bool) -> Mark | None:
        """As the ledger's. The batch is now to be laid in the member's lane, whatever becomes of its call.

        Raises PlanError where the member has sent all of its epochs.
        """
        with self._changed:
            self._check_open(member)
            before = member.account.received
            if sequence > before.sequence and before.epochs == self._run.epochs:
                raise PlanError(f"{member}: batch {sequence} came after the last one of its last epoch")
            return self.ledger.receive(member.account, member.session, sequence, samples, digest, last)

    def laid(self, client: int, mark: Mark) -> None:
        """The batch lies in the client's lane: what comes now comes after it."""
        with self._changed:
            self.ledger.of(client).laid = mark.sequence
            self._moved[client].notify_all()

    def give_back(self, client: int) -> None:
        """What came of this client and could not be applied is due again."""
        with self._changed:
            self.ledger.give_back(self.ledger.of(client))

    def apply(self, client: int, mark: Mark) -> None:
        """The server's part has learned of this client's batches up to the mark."""
        with self._changed:
            self.ledger.apply(self.ledger.of(client), mark)
            self._moved[client].notify_all()

    def wait_until_applied(self, client: int, sequence: int) -> None:
        """Until the server's part has learned of this client's batch of that number. Raises why it cannot."""
        account = self.ledger.of(client)
        self._wait_for(
            self._moved[client], lambda: account.applied.sequence >= sequence or bool(account.lost)
        )
        if account.applied.sequence < sequence:
            raise ClosedError(account.lost)

    def average(self, member: Member, epoch: int, part: State, samples: int) -> State:
        """The mean of the clients' parts of this epoch, once all that remain have come.

        The part of a client that was lost after it gave it counts. Raises WireError where another epoch's is
        due, samples is below 1, or the member was not drawn for the round.
        """
        if samples < 1:
            raise WireError(f"{member}: a part trained on {samples} samples has no weight in an average")
        if member.client not in drawn(self._run, epoch):
            raise WireError(f"{member}: a part of epoch {epoch}, for whose round it was not drawn")
        return self._meet(member, epoch, part, samples)

    def await_average(self, member: Member, epoch: int) -> State:
        """The same for who has sat the round out. Empty where nobody has ever given a part. Raises WireError
        where the member was drawn."""
        if member.client in drawn(self._run, epoch):
            raise WireError(f"{member}: no part of epoch {epoch}, for whose round it was drawn")
        return self._meet(member, epoch, {}, 0)

    def _meet(self, member: Member, epoch: int, part: State, samples: int) -> State:
        with self._changed:
            self._check_open(member)
            number, due = epoch // self._run.sync_every, self._averages_made  # of averages before this one
            again = number == due - 1 or member.client in self._parts
            comes_back = bool(member.account.identity)
            if not self._run.averages(epoch) or not (number == due or again) or (again and not comes_back):
                last = min((due + 1) * self._run.sync_every, self._run.epochs) - 1
                raise WireError(f"{member}: the average of epoch {last} is due, not {epoch}")
            if number < due:
                return self._average  # it had been made when its client went away
            self._parts[member.client] = (part, samples)
            self._wake_givers()
            with self._waits_for_others(member):
                made = self._moved[member.client]
                self._wait_for(made, lambda: self._averages_made > number or self._is_complete(), member)
            if self._averages_made == number:  # the first to wake makes it for all
                self._average = self._mean() or self._average
                self._on_average(epoch, {client: n for client, (_, n) in self._parts.items() if n})
                self._made()
            return self._average  # the next one cannot be made before this member has come back

    def given(self) -> tuple[bool, int]:
        """Where averages are shared: whether no client of this place is still to give its part of the next
        one; and then the samples behind those given, 0 if none was."""
        with self._changed:
            ready = self._all_given()
            return ready, sum(samples for _, samples in self._parts.values()) if ready else 0

    def own_mean(self) -> State:
        """The mean of the parts that are given; of none, none."""
        with self._changed:
            return self._mean()

    def averaged(self, mean: State) -> None:
        """The average of the parts of all places, none where nobody gave any: those who wait for it go on."""
        with self._changed:
            self._average = mean or self._average
            self._made()

    def _mean(self) -> State:
        """Of the parts that are here; of none, since all who were drawn are lost, none."""
        given = [self._parts[client] for client in sorted(self._parts) if self._parts[client][0]]
        return average([part for part, _ in given], [samples for _, samples in given]) if given else {}

    def _made(self) -> None:
        self._averages_made += 1
        for client in self._parts:
            self._moved[client].notify_all()
        self._parts.clear()

    def _is_complete(self) -> bool:
        return not self._shared and self._all_given()

    def take_turn(self, member: Member, epoch: int) -> State:
        """Waits for the member's turn; the part of the client before it, empty at the first turn. Raises
        WireError where that turn is over, or cannot be the next."""
        turn = epoch * self._run.clients + member.client
        with self._changed:
            self._check_open(member)
            if epoch >= self._run.epochs or self._turn <= turn - self._run.clients:
                raise WireError(f"{member}: its turn of epoch {epoch} cannot come before the one that is due")
        with self._waits_for_others(member):
            self._wait_for(self._moved[member.client], lambda: self._turn >= turn, member)
        if self._turn != turn:
            raise WireError(f"{member}: its turn of epoch {epoch} is over")
        return self._relayed

    def end_turn(self, member: Member, epoch: int, part: State) -> None:
        """Hands the part on to the next client. Raises WireError where it is not the member's turn."""
        turn = epoch * self._run.clients + member.client
        with self._changed:
            self._check_open(member)
            if self._turn > turn and member.account.identity:
                return  # it was handed on when its client went away
            if self._turn != turn:
                raise WireError(f"{member}: it is not its turn")
            self._relayed = part
            self._turn += 1
            self._moved[self._turn % self._run.clients].notify_all()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing changes here meanwhile."""
        with self._changed:
            yield

    def state(self) -> tuple[State, dict[str, Any]]:
        """What a checkpoint holds of it: tensors, and facts. An average that is being made is not of it: its
        parts are given again."""
        with self._changed:
            tensors = {**under("average", copied(self._average)), **under("relayed", copied(self._relayed))}
            facts = {
                "ledger": self.ledger.snapshot(),
                "averages_made": self._averages_made,
                "turn": self._turn,
                "class_names": [list(self._class_names), self._named_by],
            }
            return tensors, facts

    def restore(self, tensors: State, facts: dict[str, Any], names: Sequence[str]) -> None:
        """The rest, beside the ledger. names: of the parts, in their order."""
        self._average, self._relayed = (
            {name: state[name] for name in names if name in state}
            for state in (found_under("average", tensors), found_under("relayed", tensors))
        )
        self._averages_made, self._turn = facts["averages_made"], facts["turn"]
        names, self._named_by = facts["class_names"]
        self._class_names = tuple(names)

    def _expect_at_most(self, member: Member, sequence: int) -> None:
        due = member.account.received.sequence + 1
        comes_again = sequence < due and member.account.identity
        if sequence != due and not comes_again:
            raise SequenceError(f"{member}: batch {sequence} came, but batch {due} is due", due)

    def _wait_until_received(self, member: Member, sequence: int) -> None:
        """As long as an earlier segment is being received, however slowly; then for PATIENCE_S."""

        def receiving() -> bool:
            return member.client in self._receiving

        def moved() -> bool:
            return bool(self._over(member)) or receiving() or member.account.laid >= sequence

        while member.account.laid < sequence:
            self._check_open(member)
            if receiving():
                self._moved[member.client].wait()
            elif not self._moved[member.client].wait_for(moved, PATIENCE_S):
                return
        self._check_open(member)

    @contextmanager
    def _waits_for_others(self, member: Member) -> Iterator[None]:
        with self._changed:
            self._meeting.add(member.client)
        try:
            yield
        finally:
            with self._changed:
                self._meeting.discard(member.client)

    def _all_given(self) -> bool:
        """Whether every client that remains, or is still to join, has come to this average."""
        gone = {account.client for account in self.ledger.accounts if account.gone}
        return all(client in self._parts or client in gone for client in self.ledger.places)

    def _wake(self, client: int) -> None:
        """Whoever waits for anything of this client; and for the run."""
        for changed in (self._moved[client], self._fate[client], self._changed):
            changed.notify_all()

    def _wake_all(self) -> None:
        for client in range(self._run.clients):
            self._wake(client)

    def _wake_givers(self) -> None:
        """Those that wait for the average, once it can be made."""
        if self._parts and self._is_complete():
            for client in self._parts:
                self._moved[client].notify_all()

    def _finished(self) -> bool:
        places_taken = len(self.ledger.accounts) == len(self.ledger.places)
        return places_taken and all(account.gone for account in self.ledger.accounts)

    def _wait_for(
        self,
        changed: threading.Condition,
        condition: Callable[[], bool],
        member: Member | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Raises why there is nothing left to wait for, for anyone or for this member."""
        with changed:
            came = changed.wait_for(lambda: self._over(member) or condition(), timeout)
            if not condition():
                self._check_open(member)
            return bool(came)

    def _over(self, member: Member | None) -> ClosedError | None:
        """Why there is nothing left to do: for anyone, or for this member."""
        if self._closed or member is None:
            return self._closed
        account = member.account
        if account.lost:
            return ClosedError(account.lost)
        if account.session != member.session:
            return RefusedError(f"another process has taken the place of {account}")
        return None if account.present or account.left else StaleError(f"{account} has gone")

    def _check_open(self, member: Member | None = None) -> None:
        if reason := self._over(member):
            raise reason


def _listed(names: Sequence[str]) -> str:
    """The first few, each cut short: they came from outside."""
    few = ", ".join(repr(name[:40]) for name in names[:8])
    return few + (f" and {len(names) - 8} more" if len(names) > 8 else "")
