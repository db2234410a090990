"""A client, put together: joins, reads its data, trains its part, leaves."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import chance, checkpoint
from common.disk import until_written
from common.errors import ConfigError, SplitLearningError
from common.live import Gauge
from common.meter import Clock, Traffic, peak_bytes
from common.methods import build_method
from common.methods.base import ClientPart
from common.nets.cut import CutNet
from common.nets.named import is_own, versions
from common.parts import client_part
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from common.wire.codec import batch_spec
from dsl_client import data
from dsl_client.batches import Batches, Indices, limited, partition
from dsl_client.connection import Connection
from dsl_client.datasets import Pair, taken
from dsl_client.memory import Memory
from dsl_client.spool import told_of
from dsl_client.trainer import Scored, Step, Trainer


class Client:
    """`source`: where the data is, if not where the run says; or the data, (train, test). memory: what it
    remembers of the run, if it has been a member before. model: code of this side's own that the run may
    build its network with. alone: whether it has its process to itself; else its peak memory is not known."""

    def __init__(
        self,
        target: str,
        name: str,
        device: torch.device,
        source: str | Pair | None = None,
        credentials: Credentials | None = None,
        memory: Memory | None = None,
        model: str | None = None,
        alone: bool = True,
    ) -> None:
        self._memory = memory or Memory()
        self._name, self._device, self._source, self._model = name, device, source, model
        self.traffic, self._clock = Traffic(), Clock()
        self._connection = Connection(target, self.traffic, self._clock, credentials, self._memory)
        self.index = -1
        self._net: CutNet | None = None
        self._alone = alone

    def join(self, patience: float, takeover: bool = False) -> Run:
        """The run that this client is now a member of. Raises RefusedError or ClosedError."""
        self._goes_on = bool(self._memory.run_id)  # a process before this one has been in it
        welcome = self._connection.join(self._name, patience, takeover)
        self.run, self.index, self._network = Run.from_json(welcome.run), welcome.client, welcome.network
        return self.run

    def build(self) -> None:
        """The network, ahead of `train`: where clients share a process, all build before one trains. Raises
        ConfigError."""
        self._net = self._built()

    def train(
        self,
        out: Path | None,
        on_step: Callable[[Step], None] = lambda _: None,
        on_scored: Callable[[Scored], None] = lambda _: None,
        on_choice: Callable[[str], None] = lambda _: None,
    ) -> Path:
        """From the data to the goodbye; the folder with all that is left. Raises the reason of a failure."""
        run, method = self.run, build_method(self.run)
        if run.deterministic:
            torch.set_num_threads(1)
        chance.seed(run.seed + 1 + self.index)  # for dropout
        folder = RunFolder(out, run, f"client-{self.index}", self._goes_on)
        net = self._net or self._built()
        self.part = client_part(run, method, net, self._device)
        gauge = Gauge(self._device) if run.measure_memory else None
        method = gauge.around(method) if gauge else method
        for module in _forward_passes(self.part):
            self._clock.module("forward", module)
        spec = batch_spec(run, method, net)
        train, test = self._batches()

        def scored(score: Scored) -> None:
            until_written(lambda: folder.add_metrics(asdict(score)), told_of(folder.path, on_choice))
            on_scored(score)

        trainer = Trainer(run, self.index, method, self.part, self._connection, spec, self._clock, on_choice)
        trainer.train(train, test, on_step, scored)
        measured = measurements(self._clock, self._device, gauge, self._alone)
        self._connection.leave(measured)
        facts = {
            "run": asdict(run),
            "run_id": self._memory.run_id,
            "client": self.index,
            "data": self._source or run.data,
            "classes": self._classes,
        }
        checkpoint.save(folder.path / "checkpoint", self.part, facts)
        folder.write_summary(
            {
                "client": self.index,
                "samples": train.samples * run.epochs,
                "wire": self.traffic.by_kind(),
                "seconds": dict(measured.seconds),
                "peak_bytes": measured.peak_bytes,
                **({"memory": dict(measured.memory)} if gauge else {}),
                **({"batches": dict(trainer.pace.counts)} if trainer.pace else {}),
            }
        )
        return folder.path

    @property
    def waiting(self) -> int:
        """Batches that wait to be sent."""
        return self._connection.flow.waiting

    def phases(self) -> dict[str, float]:
        """This process's seconds: forward, backward, encode, wait."""
        return phases(self._clock)

    @property
    def can_return(self) -> bool:
        """Whether another process can go on where this one ends."""
        return self.index >= 0 and self.run.lasts and self._memory.lasting

    def close(self, failure: SplitLearningError | str = "") -> None:
        """Ends the membership; tells the server of a failure."""
        self._connection.close(str(failure))

    def _built(self) -> CutNet:
        """The network that the server has built. Raises ConfigError where it cannot be had here."""
        model = self.run.model
        if is_own(model) and model != self._model:
            raise ConfigError(
                f"the server's run is of --model {model}, and it is not for a server to say which code runs "
                f"here: if it may, start dsl-client with --model {model}"
            )
        net = chance.built(self.run)
        if self._network and self._network != net.fingerprint:
            raise ConfigError(
                f"this client builds another network than the server from --model {model} cut at "
                f"{self.run.place}: install what is installed there (here: {versions(model)})"
            )
        return net

    def _batches(self) -> tuple[Batches, Batches]:
        run, size = self.run, self.run.batch_size
        source, image, classes = self._source or run.data, run.image_shape, run.class_count
        train, test = (
            data.load(source, image, classes) if isinstance(source, str) else taken(source, image, classes)
        )
        self._classes = train.names
        train = limited(train, run.train_limit, run.seed)
        test = limited(test, run.test_limit, run.seed)
        mine = None
        if run.partition != "own":
            mine = partition(train.labels, run.partition, run.clients, run.seed)[self.index]
        theirs = self._test_share(len(test))
        return (
            Batches(
                train,
                mine,
                size,
                seed=run.seed,
                client=self.index,
                augment=run.augment,
                device=self._device,
            ),
            Batches(test, theirs, size, seed=run.seed, shuffle=False, device=self._device),
        )

    def _test_share(self, samples: int) -> Indices | None:
        """Clients with one and the same part and test set share the work of scoring it."""
        shares = self.run.sync == "average" and self.run.partition != "own"
        if not shares or samples < self.run.clients:
            return None
        return np.arange(self.index, samples, self.run.clients)


def _forward_passes(part: ClientPart) -> Iterator[nn.Module]:
    """What a step calls, none within another."""
    for stage in part.inner:
        yield from stage
    yield from filter(None, [part.outermost, part.head, part.tail])


def phases(clock: Clock) -> dict[str, float]:
    """Seconds: forward, backward, encode, wait. `backward` is what steps took beside the others."""
    seconds = clock.seconds("forward", "backward", "encode", "wait", "step")
    seconds["backward"] = max(0.0, seconds.pop("step") - seconds["forward"])
    return seconds


def measurements(
    clock: Clock, device: torch.device, gauge: Gauge | None = None, alone: bool = True
) -> pb.Measurements:
    """What this process measured: its phases, and in `train` the time from the first batch of an epoch to its
    last, and to the last receipt of all. alone: else its peak is not known, and told as 0.
    """
    seconds = phases(clock) | clock.seconds("train")
    memory = {"peak": gauge.peak, "held": gauge.held} if gauge else {}
    return pb.Measurements(seconds=seconds, peak_bytes=peak_bytes(device) if alone else 0, memory=memory)
