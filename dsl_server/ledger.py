"""Which batches have come, been trained on, and been saved: counted for each client, without a gap.

A pure state machine: no clock, no thread, no input or output. Each client numbers its batches 1, 2, 3, ...;
the ledger takes each number once, in its order, whatever is lost, sent again, or dies in between:

    received  >=  applied  >=  what a checkpoint has applied       (of one client, by its numbers)
       |             |
    it lies in    the part has
    its lane      learned of it

A server that dies forgets what it had received and applied beyond its last checkpoint; since the ledger is in
the checkpoint, with the weights, it then knows exactly what it has forgotten, and clients send that again.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.errors import (
    ConflictError,
    ForbiddenError,
    FullError,
    RefusedError,
    SequenceError,
    StaleError,
    TakenError,
)

_NAMED = 8  # clients in an answer, which has to fit into a few kilobytes
_NOTHING = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Mark:
    """How far a client's batches have come: what one more of them changes.

    samples: of all up to this one. chain: a hash over all of them in their order. epochs: that it has sent to
    the end.
    """

    sequence: int = 0
    samples: int = 0
    chain: str = _NOTHING
    epochs: int = 0

    def then(self, samples: int, digest: int, last: bool) -> "Mark":
        """After one more batch. digest: of its bytes. last: of its epoch."""
        sequence = self.sequence + 1
        link = f"{self.chain} {sequence} {samples} {digest}"
        return Mark(
            sequence,
            self.samples + samples,
            hashlib.sha256(link.encode()).hexdigest(),
            self.epochs + last,
        )


@dataclass
class Account:
    """What is known of one client.

    sessions: how often it has joined. session: the last one, which only it and the server know; who speaks
    for an earlier one is fenced off. present: that session is not over. fenced: hashes of the sessions of
    processes whose place another one has taken.
    """

    client: int
    name: str
    identity: str = ""  # a hash: the secret itself is kept by nobody but the client
    sessions: int = 0
    session: str = ""
    present: bool = False
    lineage: set[str] = field(default_factory=set)  # sessions of the process that is here, or was last
    fenced: set[str] = field(default_factory=set)
    received: Mark = field(default_factory=Mark)
    applied: Mark = field(default_factory=Mark)
    latest: int | None = None  # the digest of the batch received last
    laid: int = 0  # the number up to which all that was received lies in its lane
    left: bool = False
    heard: bool = True  # that it has left; else it may come and ask
    lost: str = ""  # why it is gone, where the run goes on without it

    @property
    def gone(self) -> bool:
        return self.left or bool(self.lost)

    def __str__(self) -> str:
        return f"client {self.client} ({self.name})"


@dataclass(frozen=True)
class Newcomer:
    """Who asks to join. identity: its secret, none if it will not come back. session: its last one, if this
    process has had any. durable: the number up to which it has thrown its batches away. single: of this name
    there is but one. place: that it has been given, where it is not the next that is free."""

    name: str
    identity: str = ""
    run_id: str = ""
    session: str = ""
    durable: int = 0
    takeover: bool = False
    single: bool = False
    place: int | None = None


class Ledger:
    """places: clients of the run, or those of them that come here. binding: a number stands for certain
    bytes, and never for others.

    Not thread-safe: whoever shares it holds a lock.
    """

    def __init__(self, places: int | Sequence[int], run_id: str = "", binding: bool = True) -> None:
        self.places, self._binding = range(places) if isinstance(places, int) else places, binding
        self.run_id = run_id or secrets.token_hex(8)
        self.accounts: list[Account] = []  # in the order of their clients
        self._at: dict[int, Account] = {}
        self.duplicates = 0  # batches that came again
        self._speaking: dict[str, Account] = {}  # by session: each account's last one

    # ------------------------------------------------------------ who is there

    def of(self, client: int) -> Account:
        return self._at[client]

    def join(self, who: Newcomer) -> Account:
        """A place for a newcomer, or the one that it had; its session is a new one in any case.

        Raises RefusedError where it comes back to what cannot be its run, FullError when all places are
        taken, TakenError while another has this identity, ForbiddenError where the identity is not that of
        the name.
        """
        known = self._of(who)
        if who.run_id and (known is None or who.run_id != self.run_id):
            raise RefusedError(
                f"{who.name!r} comes back to run {who.run_id[:16]!r}; this is run {self.run_id}, which does "
                "not know it: start the server with --resume of that run's folder, or the client with "
                "another --state"
            )
        if known is None:
            return self._added(who)
        if who.single and who.name != known.name:
            raise ForbiddenError(f"this --state folder is that of {known.name!r}, not of {who.name!r}")
        if known.left:
            known.heard = True
            raise RefusedError(f"{known} has left: it has trained to the end")
        if known.lost:
            raise RefusedError(f"the run goes on without it: {known.lost}")
        if known.applied.sequence < who.durable:
            raise RefusedError(
                f"{known} has thrown away its batches up to {who.durable}, and the server has them up to "
                f"{known.applied.sequence} only: this checkpoint is too old; resume from the newest one"
            )
        stranger = known.session and who.session not in known.lineage
        if who.session and (stranger or hashed(who.session) in known.fenced):
            raise _fenced_off(known)
        if known.present and not (who.session or who.takeover):
            raise TakenError(
                f"another process is {known} at present; stop that one, or say --takeover to end its "
                "membership"
            )
        known.sessions += 1
        self._speaking.pop(known.session, None)
        known.session, known.present = secrets.token_hex(16), True
        self._speaking[known.session] = known
        if who.session:  # it may not hear of this one, and come back with the one before
            known.lineage |= {who.session, known.session}
        else:
            known.fenced |= set(map(hashed, known.lineage))
            known.lineage = {known.session}
        return known

    def account(self, session: str) -> Account:
        """Whose session this is. Raises StaleError for one that is over, RefusedError where another process
        has taken the place of whose it was."""
        account = self._speaking.get(session)
        if account and account.present and not account.gone:
            return account
        secret = hashed(session)
        for account in self.accounts:
            if secret in account.fenced:
                raise _fenced_off(account)
        raise StaleError("this call names no present member of the run; join first")

    def client_of(self, session: str) -> int | None:
        """Whose last session this is, if it is anyone's."""
        account = self._speaking.get(session)
        return None if account is None else account.client

    def away(self, session: str) -> bool:
        """The connection of that session has gone; whether it was still the client's last one."""
        account = self._speaking.get(session)
        if account is None or not account.present:
            return False
        account.present = False
        return True

    # ------------------------------------------------------------ what has come

    def receive(
        self, account: Account, session: str, sequence: int, samples: int, digest: int, last: bool
    ) -> Mark | None:
        """Takes the batch of this number, and says how far that goes; None where it has been taken before.

        last: of its epoch. Raises StaleError for a session that is over, SequenceError when another number is
        due, ConflictError when the number has been given to other bytes.
        """
        if account.session != session or not account.present:
            raise StaleError(f"this call is of a membership of {account} that is over")
        due = account.received.sequence + 1
        repeats = sequence < due and account.identity  # who cannot come back repeats nothing
        if sequence != due and not repeats:
            raise SequenceError(f"{account}: batch {sequence} came, but batch {due} is due", due)
        if repeats:
            if self._binding and sequence == due - 1 and account.latest not in (None, digest):
                raise ConflictError(f"{account}: batch {sequence} came before, with other contents")
            self.duplicates += 1
            return None
        account.received = account.received.then(samples, digest, last)
        account.latest = digest
        return account.received

    def give_back(self, account: Account) -> None:
        """What was received and not applied is not to be applied any more: it is due again."""
        account.received, account.latest, account.laid = account.applied, None, account.applied.sequence

    def apply(self, account: Account, mark: Mark) -> None:
        """The server's part has learned of the batches up to this mark."""
        assert account.applied.sequence <= mark.sequence <= account.received.sequence, (account, mark)
        account.applied = mark

    # ------------------------------------------------------------ what lasts

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds of it, in terms of JSON: what is applied, and nobody's session."""
        return {
            "run_id": self.run_id,
            "accounts": [
                {
                    "client": account.client,
                    "name": account.name,
                    "identity": account.identity,
                    "sessions": account.sessions,
                    "fenced": sorted(account.fenced),
                    "applied": asdict(account.applied),
                    "left": account.left,
                    "heard": account.heard,
                    "lost": account.lost,
                }
                for account in self.accounts
            ],
        }

    @classmethod
    def restored(
        cls, places: int | Sequence[int], snapshot: Mapping[str, Any], binding: bool = True
    ) -> "Ledger":
        """As it was then, of those whose place is here; nobody is present, and what was received only is due
        again."""
        ledger = cls(places, snapshot["run_id"], binding)
        for known in snapshot["accounts"]:
            if known["client"] not in ledger.places:
                continue
            mark = Mark(**known["applied"])
            marks = {"received": mark, "applied": mark, "laid": mark.sequence}
            ledger._add(Account(**{**known, **marks, "fenced": set(known["fenced"])}))
        return ledger

    def _of(self, who: Newcomer) -> Account | None:
        identity = hashed(who.identity)
        return next((a for a in self.accounts if identity and a.identity == identity), None)

    def _added(self, who: Newcomer) -> Account:
        if who.single and any(account.name == who.name for account in self.accounts):
            raise has_a_place(who.name)
        if who.place in self._at:
            raise TakenError(
                f"{who.name!r} has had its place, and nobody comes back to a run without checkpoints; start "
                "the server with --checkpoint-every"
            )
        client = next((place for place in self.places if place not in self._at), None)
        if client is None:
            raise too_many(who.name, list(map(str, self.accounts)), len(self.places))
        session = secrets.token_hex(16)
        client = client if who.place is None else who.place
        account = Account(client, who.name, hashed(who.identity), 1, session, True, {session})
        self._add(account)
        return account

    def _add(self, account: Account) -> None:
        self._at[account.client] = account
        if account.session:
            self._speaking[account.session] = account
        self.accounts = [self._at[client] for client in sorted(self._at)]


def has_a_place(name: str) -> TakenError:
    """Where a name is a client's alone."""
    return TakenError(f"{name!r} has a place in the run; each client needs a certificate of its own")


def too_many(name: str, members: Sequence[str], places: int) -> FullError:
    """members: those who have the places."""
    few = ", ".join(members[:_NAMED])
    few += f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
    return FullError(
        f"{name!r} is one too many: the run has places for {places} and they are taken by {few}; start the "
        f"server with --clients {places + 1}"
    )


def hashed(secret: str) -> str:
    """What is kept of an identity."""
    return hashlib.sha256(secret.encode()).hexdigest() if secret else ""


def _fenced_off(account: Account) -> RefusedError:
    return RefusedError(f"another process has taken the place of {account}")
