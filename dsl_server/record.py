"""What the run has come to: counts, losses, scores; a line for each evaluation, a summary at the end."""

import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict, ParseDict

from common.live import Gauge
from common.meter import Clock, Traffic, peak_bytes
from common.nets.heads import Shape
from common.objective import ACCURACY
from common.run import Run
from common.rundir import RunFolder
from common.wire import split_learning_pb2 as pb
from dsl_server.kernel import Sockets
from dsl_server.tally import Tally

_CLIENT_PHASES = ("forward", "backward", "encode", "wait")
_INSTANTS = ("peak", "held")
TOLD_EVERY_S = 1.0  # sums, of ranks that are not the first


@dataclass(frozen=True)
class Evaluation:
    """One client's: the run's metric of the joined network, and of its own head, summed over its test samples
    (of accuracy: how many they got right)."""

    samples: int
    metric: float
    loss: float  # mean
    head_metric: float | None = None
    client_loss: float | None = None


class Record:
    def __init__(
        self,
        run: Run,
        cut_shape: Shape,
        folder: RunFolder,
        traffic: Traffic,
        sockets: Sockets,
        clock: Clock,
        device: torch.device,
        tally: Tally,
        gauge: Gauge | None = None,
        alone: bool = True,
    ) -> None:
        self.tally = tally
        self._run, self._cut_shape, self._folder, self._device = run, cut_shape, folder, device
        self._traffic, self._sockets, self._clock, self._gauge = traffic, sockets, clock, gauge
        self._alone = alone
        self._start: float | None = None
        self._end: float | None = None
        self._lock = threading.Lock()
        self._epochs: dict[int, dict[int, Evaluation]] = {}  # by epoch and client, until all have come
        self._written: set[int] = set()  # epochs that have their line
        self.lines: tuple[Mapping[str, Any], ...] = ()  # of metrics.jsonl
        self._lost: set[int] = set()
        self._measurements: dict[int, pb.Measurements] = {}  # by client
        self._loss_sum, self._loss_samples = 0.0, 0
        self._facts: list[Mapping[str, float]] = []  # since the last line
        self.samples_trained = self.samples_replayed = self.steps_skipped = 0
        self.epoch = 0  # the latest that a client has begun, from 0
        self.loss = float("nan")  # a running mean, for who watches
        self._elsewhere: dict[int, Mapping[str, Any]] = {}  # by rank: the sums that it told last
        self.test: dict[str, Any] = {"accuracy": None, "loss": None, "client_only_accuracy": None}

    @property
    def seconds(self) -> float:
        """From when the first client joined, until the summary."""
        return (self._end or time.perf_counter()) - self._start if self._start else 0.0

    def joined(self) -> None:
        """A client is in; with the first one time begins."""
        with self._lock:
            self._start = self._start or time.perf_counter()

    def began(self, client: int, epoch: int, batches: int, of: int) -> None:
        """The client has come to this epoch, of whose batches it has sent so many before."""
        self.tally.began(client, epoch, batches, of)
        with self._lock:
            self.epoch = max(self.epoch, epoch)

    def trained(
        self,
        samples: int,
        loss: float | None,
        facts: Mapping[str, float],
        replayed: int = 0,
        skipped: int = 0,
    ) -> None:
        """A step's samples, mean loss if the server knows one, and what the method noted of it.

        replayed: samples that had been counted when they came. skipped: steps left out, whose samples count.
        """
        with self._lock:
            self.samples_replayed += replayed
            self.steps_skipped += skipped
            if facts:
                self._facts.append(facts)
            self.samples_trained += samples
            if loss is not None:
                weight = max(1, samples, replayed)  # what a round's end trains on was counted when it came
                self.loss = loss if self._loss_samples == 0 else 0.95 * self.loss + 0.05 * loss
                self._loss_sum += weight * loss
                self._loss_samples += weight

    def averaged(self, epoch: int, samples: Mapping[int, int]) -> None:
        """Parts were averaged of a network that is whole at the clients: its samples are known only so."""
        for client, own in samples.items():
            self.began(client, epoch, 0, 1)  # and ended
            self.trained(own, None, {})
            self.tally.trained(client, own, None)

    def evaluated(self, client: int, epoch: int, evaluation: Evaluation) -> None:
        """Adds a client's evaluation; the last client's of an epoch makes its line in metrics.jsonl."""
        self.tally.told(client, evaluation.client_loss)
        with self._lock:
            if epoch not in self._written:  # else it is told again, and nothing comes of it
                self._epochs.setdefault(epoch, {})[client] = evaluation
            self._write_lines()

    def lost(self, client: int) -> None:
        """The run goes on without this client: epochs that waited for its evaluation get their lines."""
        with self._lock:
            self._lost.add(client)
            self._write_lines()

    def left(self, client: int, measurements: pb.Measurements) -> None:
        """Called while the client's connection is still there: later the kernel knows nothing of it."""
        self._sockets.read()
        with self._lock:
            self._measurements[client] = measurements  # told again, it counts once

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        with self._lock:
            return {
                "seconds": self.seconds,
                "epochs": [
                    [epoch, client, asdict(evaluation)]
                    for epoch, evaluations in self._epochs.items()
                    for client, evaluation in evaluations.items()
                ],
                "lines": len(self.lines),
                "written": sorted(self._written),
                "measurements": [
                    [client, MessageToDict(measured, preserving_proto_field_name=True)]
                    for client, measured in self._measurements.items()
                ],
                "loss": [self._loss_sum, self._loss_samples, self.loss],
                "facts": list(map(dict, self._facts)),
                "counts": [self.samples_trained, self.samples_replayed, self.steps_skipped],
                "epoch": self.epoch,
                "test": self.test,
                "wire": self.wire(),
                "clients": self.tally.state(),
            }

    def restore(self, state: Mapping[str, Any], lost: Collection[int]) -> None:
        """Goes on from what `state` gave. Lines of metrics that came later are removed: they come again."""
        self._start = time.perf_counter() - state["seconds"] if state["seconds"] else None
        for epoch, client, evaluation in state["epochs"]:
            self._epochs.setdefault(epoch, {})[client] = Evaluation(**evaluation)
        self._written, self._lost = set(state["written"]), set(lost)
        self.lines = tuple(self._folder.cut_metrics(state["lines"]))
        self._measurements = {
            client: ParseDict(known, pb.Measurements()) for client, known in state["measurements"]
        }
        self._loss_sum, self._loss_samples, self.loss = state["loss"]
        self._facts = list(state["facts"])
        self.samples_trained, self.samples_replayed, self.steps_skipped = state["counts"]
        self.epoch, self.test = state["epoch"], state["test"]
        self._traffic.add(state["wire"])
        self.tally.restore(state["clients"])

    def write_summary(self) -> dict[str, Any]:
        """Writes and returns summary.json: docs/architecture.md has its meaning line by line."""
        run, self._end = self._run, time.perf_counter()
        summary = {
            "method": run.method,
            "model": run.model,
            "split": run.place,
            "cut_shape": list(self._cut_shape),
            "clients": run.clients,
            "epochs": run.epochs,
            "seed": run.seed,
            "samples_trained": self.samples_trained,
            **({"samples_replayed": self.samples_replayed} if self.samples_replayed else {}),
            **({"steps_skipped": self.steps_skipped} if self.steps_skipped else {}),
            "test": self.test,
            "wire": {**self.wire(), "socket": self.socket()},
            "seconds": {"wall": self.seconds, "client": self._client_seconds(), "server": self.phases()},
            "peak_bytes": {
                "client": max((m.peak_bytes for m in self._measurements.values()), default=0),
                "server": max([self.peak(), *(told["peak"] for told in self._elsewhere.values())]),
            },
            **({"memory": self._memory(self._gauge)} if self._gauge else {}),
        }
        self._folder.write_summary(summary)
        return summary

    def _client_seconds(self) -> dict[str, float]:
        n = max(1, len(self._measurements))
        return {
            phase: sum(m.seconds[phase] for m in self._measurements.values()) / n for phase in _CLIENT_PHASES
        }

    def _memory(self, gauge: Gauge) -> dict[str, int]:
        """Live bytes: the largest client's peak, the server's, and the most that a client held while it
        waited for an answer."""
        theirs = {
            name: max((m.memory[name] for m in self._measurements.values()), default=0) for name in _INSTANTS
        }
        return {"client": theirs["peak"], "server": gauge.peak, "held": theirs["held"]}

    def phases(self) -> dict[str, float]:
        """The server's seconds: forward, backward, decode, idle; of several ranks their sums."""
        seconds = self._clock.seconds("forward", "step", "decode", "idle")
        backward = seconds.pop("step") - seconds["forward"]
        own = {"forward": seconds["forward"], "backward": backward, **seconds}
        told = [told["phases"] for told in self._elsewhere.values()]
        return {name: s + sum(phases[name] for phases in told) for name, s in own.items()}

    def wire(self) -> dict[str, dict[str, int]]:
        """As `Traffic.by_kind`, of all ranks."""
        told = [told["wire"] for told in self._elsewhere.values()]
        return {
            way: {kind: n + sum(wire[way][kind] for wire in told) for kind, n in kinds.items()}
            for way, kinds in self._traffic.by_kind().items()
        }

    def socket(self) -> dict[str, int] | None:
        """As the kernel counts; None where it is mute at any rank."""
        all_ = [self._sockets.counts(), *(told["socket"] for told in self._elsewhere.values())]
        if not all(all_):
            return None
        return {way: sum(counts[way] for counts in all_ if counts) for way in ("up", "down")}

    def peak(self) -> int:
        return peak_bytes(self._device) if self._alone else 0

    def hear(self, rank: int, told: Mapping[str, Any]) -> None:
        """What another rank's record has told of its clients (`RankRecord.news`)."""
        self._elsewhere[rank] = told
        self.tally.take_over({int(client): known for client, known in told["clients"].items()})
        if told["joined"]:
            self.joined()
        with self._lock:
            self.epoch = max(self.epoch, told["epoch"])
        for client, measured in told["left"]:
            with self._lock:
                self._measurements[client] = ParseDict(measured, pb.Measurements())
        for client, epoch, evaluation in told["evaluated"]:
            self.evaluated(client, epoch, Evaluation(**evaluation))

    def _write_lines(self) -> None:
        for epoch, evaluations in sorted(self._epochs.items()):
            if self._is_scored(evaluations):
                self._written.add(epoch)
                del self._epochs[epoch]
                self._write_line(epoch, list(evaluations.values()))

    def _is_scored(self, evaluations: Mapping[int, Evaluation]) -> bool:
        """Whether all have evaluated who are to: with relayed parts who has the part, or who remains."""
        if self._run.sync == "relay":
            return len(evaluations) > 0
        return all(client in evaluations or client in self._lost for client in range(self._run.clients))

    def _write_line(self, epoch: int, evaluations: list[Evaluation]) -> None:
        self.test = _joined(evaluations, self._run.metric)
        losses = [e.client_loss for e in evaluations if e.client_loss is not None]
        line = {
            "epoch": epoch + 1,
            "seconds": round(self.seconds, 3),
            "samples_trained": self.samples_trained,
            "train": {
                "loss": self._loss_sum / self._loss_samples if self._loss_samples else None,
                "client_loss": sum(losses) / len(losses) if losses else None,
                **_means(self._facts),
            },
            "test": self.test,
            "wire": {way: sum(kinds.values()) for way, kinds in self.wire().items()},
        }
        self._folder.add_metrics(line)
        self.lines = (*self.lines, line)
        self._loss_sum, self._loss_samples = 0.0, 0
        self._facts.clear()


class RankRecord(Record):
    """Of a rank that is not the first: what befalls its clients is told to the first, and written there."""

    _told_at = -math.inf  # monotonic seconds
    _events: tuple[list[Any], list[Any]] | None = None  # evaluations, and who left

    def evaluated(self, client: int, epoch: int, evaluation: Evaluation) -> None:
        self.tally.told(client, evaluation.client_loss)
        with self._lock:
            self._due()[0].append([client, epoch, asdict(evaluation)])

    def left(self, client: int, measurements: pb.Measurements) -> None:
        self._sockets.read()
        with self._lock:
            measured = MessageToDict(measurements, preserving_proto_field_name=True)
            self._due()[1].append([client, measured])

    def news(self, clients: Sequence[int], now: bool = False) -> dict[str, Any] | None:
        """What the first rank has not been told yet: events, once each, and sums, of these clients; in terms
        of JSON. None where there is nothing of importance, unless `now`."""
        with self._lock:
            if not (now or self._events or time.monotonic() - self._told_at > TOLD_EVERY_S):
                return None
            (evaluated, left), self._events = self._due(), None
            self._told_at = time.monotonic()
            all_ = self.tally.state()
            return {
                "evaluated": evaluated,
                "left": left,
                "joined": self._start is not None,
                "epoch": self.epoch,
                "clients": {client: all_[client] for client in clients},
                "wire": self.wire(),
                "socket": self.socket(),
                "phases": self.phases(),
                "peak": self.peak(),
            }

    def _due(self) -> tuple[list[Any], list[Any]]:
        self._events = self._events or ([], [])
        return self._events

    def restore(self, state: Mapping[str, Any], lost: Collection[int]) -> None:
        """Of what the first rank goes on from only its own clients' counts."""
        self.tally.restore(state["clients"])
        self.epoch = state["epoch"]


def _means(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what a method noted at each step; a method notes the same at every one."""
    names = facts[0] if facts else {}
    return {name: sum(noted[name] for noted in facts) / len(facts) for name in names}


def _joined(evaluations: list[Evaluation], metric: str) -> dict[str, Any]:
    """Over all the images scored: shares of one test set, or each client's own of it."""
    samples = sum(e.samples for e in evaluations)
    heads = [e.head_metric for e in evaluations if e.head_metric is not None]
    joined = sum(e.metric for e in evaluations) / samples
    alone = sum(heads) / samples if heads else None
    loss = sum(e.loss * e.samples for e in evaluations) / samples
    if metric == ACCURACY:
        return {"accuracy": joined, "loss": loss, "client_only_accuracy": alone}
    told = {"name": metric, "joined": joined, "client_only": alone}
    return {"accuracy": None, "loss": loss, "client_only_accuracy": None, "metric": told}
