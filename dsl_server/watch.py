"""What a server is doing, for whoever shows it: a terminal, a page, Prometheus.

Each number is taken where it is counted anyway; knows no way of showing any. A view is a value: it does not
change, and may be read for as long as one likes.
"""

import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from common.meter import Traffic
from common.methods.base import Method
from common.objective import ACCURACY
from common.run import Run
from dsl_server.inbox import Inbox
from dsl_server.kernel import Sockets
from dsl_server.ledger import Account
from dsl_server.record import Record
from dsl_server.rounds import Rounds
from dsl_server.tally import Learned, Passed

State = Literal["awaited", "training", "waiting", "away", "lost", "left"]
STALLED_S = 2.0  # a batch that lies here for longer while none of its client's is taken waits for others'


@dataclass(frozen=True)
class ClientView:
    """One place of the run.

    state: awaited (nobody has taken the place yet), training, waiting (for the other clients: their batches,
    their parts, its turn), away (it may come back), lost (the run goes on without it), left (it is through).
    """

    client: int
    name: str  # empty while it is awaited
    state: State
    epoch: int  # the latest that it has begun, from 0
    done: float  # the fraction of its epochs that is behind it
    samples: int  # that the server has trained on
    rate: float  # of these a second, over the last seconds
    queue: int  # its batches that wait at the server
    up: int  # serialized bytes
    down: int
    loss: float | None  # the server's on its batches, a running mean; else the client's own of its last epoch
    lag_s: float  # since its last batch came, or since it began an epoch; 0 while none is due
    reason: str = ""  # why it is lost


@dataclass(frozen=True)
class View:
    """The whole run at one moment."""

    name: str
    method: str
    model: str
    place: str  # where the network is cut
    clients_expected: int
    epoch: int  # the latest that a client has begun, from 0
    epochs: int
    done: float  # the fraction of the clients' epochs that is behind them
    seconds: float  # since the first client joined
    left_s: float | None  # until the end, if it goes on as until now; None while that is not to be told
    samples: int  # trained on
    rate: float  # of these a second, over the last seconds
    loss: float | None  # a running mean
    test: Mapping[str, Any]  # of the last evaluation, as in metrics.jsonl
    wire: Mapping[str, Mapping[str, int]]  # {"up" | "down": {kind: serialized bytes}}
    socket: Mapping[str, int] | None  # {"up" | "down": bytes}, as the kernel counts; None where it is mute
    finished: bool  # all clients have trained to the end
    reason: str | None  # why the run ended before that
    clients: tuple[ClientView, ...]  # by index, also those that are awaited
    lines: tuple[Mapping[str, Any], ...]  # of metrics.jsonl so far
    phases: Mapping[str, float]  # seconds of the server's: forward, backward, decode, idle; none ever falls
    replayed: int = 0  # samples learned from once more
    skipped: int = 0  # steps left out, since they came to what is not finite
    saved_s: float | None = None  # since a checkpoint was last on disk; None where there is none
    metric: str = ACCURACY  # what is scored: accuracy, or another

    @property
    def here(self) -> int:
        """Clients that have come, and are not lost or away."""
        return sum(client.state in ("training", "waiting", "left") for client in self.clients)

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON: every number in it is finite, or None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


class Watch:
    """Made by the server of its own parts. Any thread may ask for a view, as often as it likes.

    own: the clients that come here; of others other ranks tell (`own_clients`, `hear`).
    """

    def __init__(
        self,
        run: Run,
        method: Method,
        inbox: Inbox,
        rounds: Rounds,
        record: Record,
        traffic: Traffic,
        sockets: Sockets,
        own: Collection[int] | None = None,
    ) -> None:
        self._own = range(run.clients) if own is None else own
        self._elsewhere: dict[int, ClientView] = {}
        self._run, self._inbox, self._rounds, self._record = run, inbox, rounds, record
        self._traffic, self._sockets = traffic, sockets
        self._full = run.inbox if method.one_way else 1  # batches here with which a client goes on no more
        self._phases: dict[str, float] = {}
        self._lock = threading.Lock()
        self._saved_at: float | None = None

    def saved(self) -> None:
        """A checkpoint is on disk."""
        self._saved_at = time.monotonic()

    def view(self) -> View:
        """What is so now. Each number is exact; two that change at the same time may be a step apart."""
        run, record = self._run, self._record
        finished, reason = self._rounds.ended()
        clients = self._clients()
        remaining = [client.done for client in clients if client.state != "lost"]
        done, seconds = sum(remaining) / max(1, len(remaining)), record.seconds
        return View(
            name=run.name,
            method=run.method,
            model=run.model,
            place=run.place,
            clients_expected=run.clients,
            epoch=record.epoch,
            epochs=run.epochs,
            done=done,
            seconds=seconds,
            left_s=seconds * (1 - done) / done if done >= 0.01 and not finished and reason is None else None,
            samples=record.samples_trained,
            rate=sum(client.rate for client in clients),
            loss=_finite(record.loss),
            test=dict(record.test),
            metric=run.metric.rpartition(":")[2],
            wire=record.wire(),
            socket=record.socket(),
            finished=finished,
            reason=None if reason is None else str(reason),
            clients=tuple(clients),
            lines=record.lines,
            phases=self._never_falling(record.phases()),
            replayed=record.samples_replayed,
            skipped=record.steps_skipped,
            saved_s=None if self._saved_at is None else time.monotonic() - self._saved_at,
        )

    def own_clients(self) -> list[dict[str, Any]]:
        """The views of those that come here, in terms of JSON."""
        return [_plain(asdict(view)) for view in self._clients() if view.client in self._own]

    def hear(self, views: Sequence[Mapping[str, Any]]) -> None:
        """What another rank tells of its clients."""
        self._elsewhere |= {view["client"]: ClientView(**view) for view in views}

    def _clients(self) -> list[ClientView]:
        accounts = {account.client: account for account in self._rounds.members()}
        waiting, queues = self._rounds.meeting(), self._inbox.waiting()
        learned, passed = self._record.tally.learned, self._record.tally.passed()
        views = []
        for client in range(self._run.clients):
            if client in self._elsewhere:
                views.append(self._elsewhere[client])
                continue
            account, mine = accounts.get(client), learned[client]
            state = self._state(account, client in waiting, queues[client], mine)
            loss = mine.own_loss if mine.loss is None else mine.loss
            views.append(
                ClientView(
                    client=client,
                    name=account.name if account else "",
                    state=state,
                    epoch=max(0, mine.epoch),
                    done=1.0 if state == "left" else _done(mine, self._run.epochs),
                    samples=mine.samples,
                    rate=mine.rate.per_second() if state in ("training", "waiting", "away") else 0.0,
                    queue=queues[client],
                    up=passed[client].up,
                    down=passed[client].down,
                    loss=None if loss is None else _finite(loss),
                    lag_s=_lag(state, passed[client], mine),
                    reason=account.lost if account else "",
                )
            )
        return views

    def _state(self, account: Account | None, meets: bool, queue: int, learned: Learned) -> State:
        if account is None:
            return "awaited"
        if account.lost:
            return "lost"
        if account.left:
            return "left"
        if not account.present:
            return "away"
        stalled_s = time.monotonic() - max(learned.trained_at, learned.began_at)
        stalled = queue >= self._full and stalled_s > STALLED_S
        return "waiting" if meets or stalled else "training"

    def _never_falling(self, phases: dict[str, float]) -> dict[str, float]:
        """A phase's seconds are added when it is over, and may be put right while another is under way."""
        with self._lock:
            self._phases = {name: max(0.0, s, self._phases.get(name, 0.0)) for name, s in phases.items()}
            return dict(self._phases)


def _lag(state: State, passed: Passed, learned: Learned) -> float:
    since = max(passed.came_at, learned.began_at)
    return time.monotonic() - since if since and state in ("training", "waiting", "away") else 0.0


def _done(learned: Learned, epochs: int) -> float:
    return max(0.0, (learned.epoch + min(1.0, learned.batches / max(1, learned.of))) / epochs)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """The same in lists and tables, with None for what JSON has no number for."""
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
