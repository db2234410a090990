"""What a rank and the others tell each other of their clients: news, and what a checkpoint has of each.

The first rank keeps the run's record and writes its checkpoints, which are those of a server that is one
process: any number of ranks goes on from them. Called by the trainer's thread, in step with the other ranks.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load, save

from common.checkpoint import Saved
from common.errors import ClosedError
from common.parts import State
from dsl_server.intake import Intake
from dsl_server.ranks import Ranks
from dsl_server.record import RankRecord, Record
from dsl_server.rounds import Rounds
from dsl_server.saver import Follower, Keeper
from dsl_server.watch import Watch

Captured = tuple[State, dict[str, Any]]


class Sharing:
    """clients: those of this rank."""

    def __init__(
        self,
        ranks: Ranks,
        clients: Sequence[int],
        record: Record,
        rounds: Rounds,
        watch: Watch,
        intake: Intake,
        saver: Keeper,
    ) -> None:
        self.saver = saver
        self.made = 0  # checkpoints, since the ranks began
        self._ranks, self._clients = ranks, clients
        self._record, self._rounds, self._watch, self._intake = record, rounds, watch, intake
        self._durable: dict[str, Any] | None = None  # of the first rank: what is on disk, still to be told
        self._lock = threading.Lock()

    def news(self) -> bytes:
        """What is to be told; of the first rank what is durable, of another what has befallen its clients."""
        if isinstance(self._record, RankRecord):
            told = self._record.news(self._clients)
            return _json(told | {"views": self._watch.own_clients()}) if told else b""
        with self._lock:
            durable, self._durable = self._durable, None
        return _json(durable) if durable else b""

    def hear(self, told: Sequence[bytes]) -> None:
        """The news of each rank."""
        for rank, words in enumerate(told):
            if not words or rank == self._ranks.rank:
                continue
            if self._ranks.first:
                news = json.loads(words)
                self._watch.hear(news["views"])
                self._heard(rank, news)
            elif rank == 0:
                self.durable(**json.loads(words))

    def _heard(self, rank: int, news: Mapping[str, Any]) -> None:
        try:
            self._record.hear(rank, news)
        except OSError as error:
            raise ClosedError(f"the server cannot write its metrics: {error.strerror}") from error

    def durable(self, number: int, floors: Mapping[str, int], places: Sequence[int]) -> None:
        """The checkpoint of this number, of those made since the ranks began, is on disk; of each client the
        number up to which all that are kept have its batches, and the clients of whom the newest knows."""
        known = {int(client): floor for client, floor in floors.items()}
        self._rounds.keep_from(known, places)
        if isinstance(self.saver, Follower):
            self.saver.written(number)

    def saved(self, number: int, floors: Mapping[int, int], places: Sequence[int]) -> None:
        """By the first rank, in any thread: as `durable`, to be told to the others."""
        told = {str(client): floor for client, floor in floors.items()}
        with self._lock:
            self._durable = {"number": number, "floors": told, "places": list(places)}

    # ------------------------------------------------------------ checkpoints

    def hand_over(self) -> None:
        """To the first rank: what its checkpoint is to have of this one."""
        assert isinstance(self._record, RankRecord), "the first rank has its own"
        with self._rounds.still():
            _, rounds = self._rounds.state()
            news = self._record.news(self._clients, now=True)
        answers, answered = self._intake.state()
        facts = {"accounts": rounds["ledger"]["accounts"], "answered": answered, "news": news}
        self._ranks.to_first(packed(answers, facts))

    def gathered(self) -> list[Captured]:
        """By the first rank: what each of the others hands over, its news heard."""
        self.made += 1
        captured = []
        for rank, content in list(enumerate(self._ranks.to_first(b"")))[1:]:
            tensors, facts = unpacked(content)
            self._heard(rank, facts["news"])
            captured.append((tensors, facts))
        return captured


def begin(ranks: Ranks, tensors: State, saved: Saved | None) -> Saved | None:
    """What all ranks begin with: the first one's checkpoint, or where it has none its weights, which take the
    place of these."""
    mine = None
    if ranks.first:
        known = {"facts": saved.facts, "number": saved.number} if saved else {}
        mine = packed(dict(saved.tensors) if saved else tensors, known)
    theirs, facts = unpacked(ranks.from_first(mine))
    if facts:
        return Saved(facts["number"], theirs, facts["facts"])
    tensors.update(theirs)
    return None


def packed(tensors: State, facts: Mapping[str, Any]) -> bytes:
    words = _json(facts)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return len(words).to_bytes(8, "big") + words + bytes(content)


def unpacked(content: bytes) -> tuple[State, dict[str, Any]]:
    end = 8 + int.from_bytes(content[:8], "big")
    return load(content[end:]), json.loads(content[8:end])


def _json(told: Any) -> bytes:
    return json.dumps(told).encode()
