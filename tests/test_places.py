"""Where clients have their places in a server of several ranks: dealt once, whoever asks, and claimed
once."""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.errors import FullError, RefusedError, TakenError
from dsl_server import places as module
from dsl_server.ledger import Account, hashed
from dsl_server.places import Places, agreed_names


class Board:
    """In memory, as torch's store is."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()

    def note(self, name: str, text: str) -> None:
        self._notes[name] = text

    def noted(self, name: str) -> str | None:
        return self._notes.get(name)

    def note_first(self, name: str, text: str) -> str:
        with self._lock:
            return self._notes.setdefault(name, text)


ADDRESSES = ["first:1", "second:2", "third:3"]


def ranks(clients: int, board: Board | None = None, single: bool = False) -> list[Places]:
    board = board or Board()
    dealt = [Places(clients, rank, len(ADDRESSES), board, single) for rank in range(len(ADDRESSES))]
    for places in dealt:
        places.open(ADDRESSES)
    return dealt


def joins(dealt: Sequence[Places], name: str, identity: str, at: int = 0) -> tuple[int | None, list[int]]:
    """The place that a client comes to, and the ranks on its way."""
    way = [at]
    while len(way) < 6:
        client, address = dealt[way[-1]].find(name, identity)
        if not address:
            return client, way
        way.append(ADDRESSES.index(address))
    raise AssertionError(way)


def test_ranks_have_equal_numbers_of_clients_in_the_order_in_which_they_come() -> None:
    dealt = ranks(7)
    came = [joins(dealt, f"client-{index}", f"{index:032x}") for index in range(7)]
    assert came == [(index, [0] if index % 3 == 0 else [0, index % 3]) for index in range(7)]
    assert [list(places.own) for places in dealt] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_client_may_know_any_rank_and_comes_to_its_place_again() -> None:
    dealt = ranks(3)
    joins(dealt, "a", "aa")
    assert joins(dealt, "b", "bb", at=2) == (1, [2, 0, 1])
    assert joins(dealt, "b", "bb", at=2) == (1, [2, 1]), "by now every rank knows"
    assert joins(dealt, "b", "bb", at=1) == (1, [1])
    assert joins(dealt, "b", "bb", at=0) == (1, [0, 1])


def test_who_is_one_too_many_is_told_who_has_the_places() -> None:
    dealt = ranks(2)
    joins(dealt, "a", "aa"), joins(dealt, "b", "bb")
    with pytest.raises(FullError, match=r"'c' .* client 0 \(a\), client 1 \(b\); .*--clients 3"):
        joins(dealt, "c", "cc", at=1)


def test_a_name_that_a_certificate_tells_has_one_place() -> None:
    dealt = ranks(2, single=True)
    joins(dealt, "ward-7", "aa")
    with pytest.raises(TakenError, match="a certificate of its own"):
        joins(dealt, "ward-7", "bb")


def test_a_client_without_an_identity_is_refused() -> None:
    with pytest.raises(RefusedError, match="no identity"):
        ranks(2)[0].find("a", "")


def test_a_place_that_nobody_comes_to_goes_to_the_next_and_to_one_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dealt = ranks(2)
    joins(dealt, "a", "aa")
    assert dealt[0].find("b", "bb") == (None, ADDRESSES[1])  # and it is never seen there
    with pytest.raises(FullError):
        dealt[0].find("c", "cc")
    monkeypatch.setattr(module, "UNCLAIMED_S", -1.0)
    assert joins(dealt, "c", "cc") == (1, [0, 1])
    monkeypatch.undo()
    with pytest.raises(FullError):
        joins(dealt, "b", "bb", at=1)
    assert joins(dealt, "c", "cc") == (1, [0, 1])


def test_many_come_at_once_and_no_two_have_one_place() -> None:
    dealt = ranks(60)
    with ThreadPoolExecutor(12) as pool:
        came = list(pool.map(lambda i: joins(dealt, f"c{i}", f"{i:032x}", at=i % 3)[0], range(60)))
    assert sorted(came, key=lambda client: -1 if client is None else client) == list(range(60))


def test_after_a_checkpoint_everyone_has_the_place_that_it_had() -> None:
    dealt = ranks(4)
    accounts = [Account(client, f"c{client}", hashed(f"{client}")) for client in (0, 2)]
    for places in dealt:
        places.restore(accounts)
    assert joins(dealt, "c2", "2") == (2, [0, 2])
    assert joins(dealt, "new", "n") == (1, [0, 1]), "the place that was free"
    assert joins(dealt, "c0", "0", at=1) == (0, [1, 0])


def test_the_first_to_tell_what_classes_are_called_tells_it_for_all_ranks() -> None:
    board = Board()
    told = [
        agreed_names(board, names, by) for names, by in [(("cat", "dog"), "client 1"), (("x",), "client 2")]
    ]
    assert told == [(("cat", "dog"), "client 1")] * 2
    assert len(set(itertools.chain(told))) == 1
