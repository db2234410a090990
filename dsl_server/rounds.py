"""Who is in the run, what each has delivered, and where clients meet: averages and turns.

A pure matter of threads and numbers: knows no bytes, no sockets, no network.
"""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import ClosedError, FullError, RefusedError, SequenceError, TakenError, WireError
from common.parts import State, average
from common.run import Run

PATIENCE_S = 10.0  # how long a call waits for an earlier one of its client that has not begun


@dataclass
class Member:
    """A client of the run. `received`: the highest sequence number that has come, without gaps."""

    client: int
    name: str
    session: str = field(default_factory=lambda: secrets.token_hex(16))
    received: int = 0
    receiving: bool = False  # a segment is open
    left: bool = False
    lost: ClosedError | None = None  # why it is gone, where the run goes on without it

    @property
    def gone(self) -> bool:
        return self.left or self.lost is not None

    def __str__(self) -> str:
        return f"client {self.client} ({self.name})"


class Rounds:
    """on_lost: told of each member that the run goes on without, and why."""

    def __init__(
        self,
        run: Run,
        on_close: Callable[[ClosedError], None] = lambda _: None,
        on_lost: Callable[[int, ClosedError], None] = lambda *_: None,
    ) -> None:
        self._run = run
        self._on_close, self._on_lost = on_close, on_lost
        self._members: dict[str, Member] = {}
        self._parts: dict[int, tuple[State, int]] = {}  # of the average being made: client to part
        self._average: State = {}
        self._averages_made = 0
        self._turn = 0  # counts turns over the whole run
        self._relayed: State = {}
        self._closed: ClosedError | None = None
        self._changed = threading.Condition()

    def join(self, name: str, once: bool = False) -> Member:
        """The next free place. Raises FullError when all are taken, ClosedError when it is over.

        once: of this name there is but one. Raises TakenError when it has had a place.
        """
        with self._changed:
            self._check_open()
            if once and any(member.name == name for member in self._members.values()):
                raise TakenError(
                    f"{name!r} has a place in the run; each client needs a certificate of its own"
                )
            if len(self._members) == self._run.clients:
                names = ", ".join(str(m) for m in self._members.values())
                raise FullError(
                    f"{name!r} is one too many: the run has places for {self._run.clients} and they are "
                    f"taken by {names}; start the server with --clients {self._run.clients + 1}"
                )
            member = Member(len(self._members), name)
            self._members[member.session] = member
            self._changed.notify_all()
            return member

    def member(self, session: str) -> Member:
        """Raises RefusedError unless the session is that of a present member."""
        with self._changed:
            self._check_open()
            member = self._members.get(session)
            if member is None or member.gone:
                raise RefusedError("this call names no present member of the run; join first")
            return member

    def members(self) -> list[Member]:
        with self._changed:
            return list(self._members.values())

    def leave(self, member: Member) -> None:
        """The member has done all that it was to do."""
        with self._changed:
            member.left = True
            self._changed.notify_all()

    def lost(self, member: Member, how: str = "went away before the end of the run") -> ClosedError | None:
        """The member is gone. Unless it had left, or those that remain are a quorum, so is the run.

        Gives the reason, if this is news.
        """
        reason = ClosedError(f"{member} {how}")
        with self._changed:
            if member.gone or self._closed:
                return None
            lost = 1 + sum(m.lost is not None for m in self._members.values())
            goes_on = self._run.clients - lost >= self._run.least_clients
            if goes_on:
                member.lost = reason
                self._changed.notify_all()
        if goes_on:
            self._on_lost(member.client, reason)
        else:
            self.close(reason)
        return reason

    def close(self, reason: ClosedError) -> None:
        """Ends the run: everyone who waits here, or comes, is told the reason. The first one stands."""
        with self._changed:
            if self._closed or self._finished():
                return
            self._closed = reason
            self._changed.notify_all()
        self._on_close(reason)

    def wait_until_left(self, member: Member) -> None:
        """Raises the reason if the run ends before, or it is lost."""
        self._wait_for(lambda: member.left, member)

    def wait_until_finished(self, timeout: float | None = None) -> bool:
        """Whether every place was taken and all have gone. Raises the reason if the run ends before."""
        return self._wait_for(self._finished, timeout=timeout)

    def begin_segment(self, member: Member, first_sequence: int) -> None:
        """From now on the member's batches come by this call. Waits for the one before it.

        Raises SequenceError, with the number that is due, when this segment does not follow.
        """
        with self._changed:
            self._wait_until_received(member, first_sequence - 1)
            self._changed.wait_for(lambda: self._over(member) or not member.receiving)
            self._check_open(member)
            if member.left:
                raise RefusedError(f"{member} has left")
            self.expect(member, first_sequence)
            member.receiving = True

    def end_segment(self, member: Member) -> None:
        with self._changed:
            member.receiving = False
            self._changed.notify_all()

    def wait_until_received(self, member: Member, sequence: int) -> None:
        """Until the member's batches up to this number have come. Raises SequenceError if they do not."""
        with self._changed:
            self._wait_until_received(member, sequence)
            self.expect(member, sequence + 1)

    def expect(self, member: Member, sequence: int) -> None:
        """Raises SequenceError unless this batch of the member is due."""
        due = member.received + 1
        if sequence != due:
            raise SequenceError(f"{member}: batch {sequence} came, but batch {due} is due", due)

    def receive(self, member: Member, sequence: int) -> None:
        """Counts a batch as received: it lies in the member's lane."""
        with self._changed:
            member.received = sequence
            self._changed.notify_all()

    def average(self, member: Member, epoch: int, part: State, samples: int) -> State:
        """The mean of the clients' parts of this epoch, once all have come from those that remain.

        The part of a client that was lost after it gave it counts.
        """
        if samples < 1:
            raise WireError(f"{member}: a part trained on {samples} samples has no weight in an average")
        with self._changed:
            self._check_open(member)
            number, due = epoch // self._run.sync_every, self._averages_made  # of averages before this one
            if number != due or not self._run.averages(epoch) or member.client in self._parts:
                last = min((due + 1) * self._run.sync_every, self._run.epochs) - 1
                raise WireError(f"{member}: the average of epoch {last} is due, not {epoch}")
            self._parts[member.client] = (part, samples)
            self._changed.notify_all()
            self._wait_for(lambda: self._averages_made > number or self._all_given(), member)
            if self._averages_made == number:  # the first to wake makes it for all
                ordered = [self._parts[client] for client in sorted(self._parts)]
                self._average = average([p for p, _ in ordered], [n for _, n in ordered])
                self._parts.clear()
                self._averages_made += 1
                self._changed.notify_all()
            return self._average  # the next one cannot be made before this member has come back

    def take_turn(self, member: Member, epoch: int) -> State:
        """Waits for the member's turn; the part of the client before it, empty at the first turn."""
        turn = epoch * self._run.clients + member.client
        with self._changed:
            self._check_open(member)
            if epoch >= self._run.epochs or self._turn <= turn - self._run.clients:
                raise WireError(f"{member}: its turn of epoch {epoch} cannot come before the one that is due")
        self._wait_for(lambda: self._turn >= turn, member)
        if self._turn != turn:
            raise WireError(f"{member}: its turn of epoch {epoch} is over")
        return self._relayed

    def end_turn(self, member: Member, epoch: int, part: State) -> None:
        """Hands the part on to the next client."""
        with self._changed:
            self._check_open(member)
            if self._turn != epoch * self._run.clients + member.client:
                raise WireError(f"{member}: it is not its turn")
            self._relayed = part
            self._turn += 1
            self._changed.notify_all()

    def _wait_until_received(self, member: Member, sequence: int) -> None:
        """As long as an earlier segment is being received, however slowly; then for PATIENCE_S."""

        def moved() -> bool:
            return bool(self._over(member)) or member.receiving or member.received >= sequence

        while member.received < sequence:
            self._check_open(member)
            if member.receiving:
                self._changed.wait()
            elif not self._changed.wait_for(moved, PATIENCE_S):
                return
        self._check_open(member)

    def _all_given(self) -> bool:
        """Whether every client that remains, or is still to join, has given its part of this average."""
        gone = {member.client for member in self._members.values() if member.gone}
        return all(client in self._parts or client in gone for client in range(self._run.clients))

    def _finished(self) -> bool:
        places_taken = len(self._members) == self._run.clients
        return places_taken and all(member.gone for member in self._members.values())

    def _wait_for(
        self, condition: Callable[[], bool], member: Member | None = None, timeout: float | None = None
    ) -> bool:
        with self._changed:
            came = self._changed.wait_for(lambda: self._over(member) or condition(), timeout)
            if not condition():
                self._check_open(member)
            return bool(came)

    def _over(self, member: Member | None) -> ClosedError | None:
        """Why there is nothing left to do: for anyone, or for this member."""
        return self._closed or (member.lost if member else None)

    def _check_open(self, member: Member | None = None) -> None:
        if reason := self._over(member):
            raise reason
