"""Where a client has its place, in a server of several ranks: client i at rank i modulo their number.

The first rank deals places out; every rank takes those whose place it has, and sends the others on. What has
been dealt stands on the ranks' board, by a hash of the client's identity. Knows no wire."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from common.errors import RefusedError
from dsl_server.ledger import Account, has_a_place, hashed, too_many

UNCLAIMED_S = 30.0  # for a client to come to the place that it was sent to; then another may have it


class Board(Protocol):
    def note(self, name: str, text: str) -> None: ...

    def noted(self, name: str) -> str | None: ...

    def note_first(self, name: str, text: str) -> str: ...


class Places:
    """clients: of the run. single: of each name there is but one.

    Any thread may ask, once it is open.
    """

    def __init__(self, clients: int, rank: int, ranks: int, board: Board, single: bool = False) -> None:
        self._clients, self._rank, self._ranks = clients, rank, ranks
        self._addresses: Sequence[str] = ()
        self._board, self._single = board, single
        # By client: the hash of its identity, its name, and when its place was dealt.
        self._dealt = dict[int, tuple[str, str, float]]()
        self._lock = threading.Lock()

    @property
    def own(self) -> range:
        """The clients whose place is at this rank."""
        return range(self._clients)[self._rank :: self._ranks]

    def open(self, addresses: Sequence[str]) -> None:
        """addresses: of the ranks, where clients find them."""
        self._addresses = addresses

    def restore(self, accounts: Sequence[Account]) -> None:
        """Of a run that goes on: all that had a place, told to every rank."""
        for account in accounts:
            self._dealt[account.client] = (account.identity, account.name, 0.0)
            self._board.note_first(_claim(account.client), account.identity)
            self._board.note(_place(account.identity), str(account.client))

    def find(self, name: str, identity: str) -> tuple[int | None, str]:
        """The place that it has, if that is at this rank; else the address of the rank where it is, or where
        places are dealt out.

        Raises RefusedError for a client without an identity, FullError and TakenError as the ledger does.
        """
        if not identity:
            raise RefusedError(
                f"{name!r} has no identity: a server of several ranks needs one of each client"
            )
        mine = hashed(identity)
        known = self._board.noted(_place(mine))
        if self._rank == 0 and not self._stands(mine, known):
            known = str(self._deal(name, mine))
        if known is None:
            return None, self._addresses[0]
        client = int(known)
        if client not in self.own:
            return None, self._addresses[client % self._ranks]
        holder = self._board.note_first(_claim(client), mine)
        return (client, "") if holder == mine else (None, self._addresses[0])

    def _stands(self, identity: str, known: str | None) -> bool:
        if known is None:
            return False
        with self._lock:
            dealt = self._dealt.get(int(known))
        return dealt is not None and dealt[0] == identity

    def _deal(self, name: str, identity: str) -> int:
        with self._lock:
            if self._single and any(name == taken for _, taken, _ in self._dealt.values()):
                raise has_a_place(name)
            free = [client for client in range(self._clients) if client not in self._dealt]
            client = free[0] if free else self._unclaimed(name)
            self._dealt[client] = (identity, name, time.monotonic())
            self._board.note(_place(identity), str(client))
            return client

    def _unclaimed(self, name: str) -> int:
        for client, (_, _, dealt_at) in sorted(self._dealt.items()):
            late = time.monotonic() - dealt_at > UNCLAIMED_S
            if late and self._board.noted(_claim(client)) is None:
                return client
        members = [f"client {client} ({who})" for client, (_, who, _) in sorted(self._dealt.items())]
        raise too_many(name, members, self._clients)


class Everywhere:
    """Of a server that is one process: every place is there."""

    def __init__(self, clients: int) -> None:
        self.own = range(clients)

    def restore(self, accounts: Sequence[Account]) -> None: ...

    def open(self, addresses: Sequence[str]) -> None: ...

    def find(self, name: str, identity: str) -> tuple[int | None, str]:
        return None, ""


def agreed_names(board: Board, names: tuple[str, ...], by: str) -> tuple[tuple[str, ...], str]:
    """What the classes are called, and who said so first, at whichever rank."""
    told = json.loads(board.note_first("class names", json.dumps([names, by])))
    return tuple(told[0]), str(told[1])


def _place(identity: str) -> str:
    return f"place/{identity}"


def _claim(client: int) -> str:
    return f"claim/{client}"
