"""A client, put together: joins, reads its data, trains its part, leaves."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import chance, checkpoint
from common.disk import until_written
from common.errors import ClosedError, ConfigError, SplitLearningError
from common.live import Gauge
from common.meter import Clock, Traffic, peak_bytes
from common.methods import build_method
from common.methods.base import ClientPart
from common.nets import named
from common.nets.cut import CutNet
from common.nets.named import versions
from common.own import first_words, is_function
from common.parts import client_part, state_of
from common.run import Run
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from common.wire.codec import batch_spec
from dsl_client import data, sources
from dsl_client.batches import Batches, Indices, limited, partition
from dsl_client.commons import Commons
from dsl_client.connection import Connection
from dsl_client.data import Dataset
from dsl_client.datasets import Pair
from dsl_client.memory import Memory
from dsl_client.rest import Place, Rest
from dsl_client.spool import told_of
from dsl_client.trainer import Scored, Step, Trainer


class Client:
    """`source`: where the data is, if not where the run says; or two torch Datasets, to train and to test on.
    memory: what it remembers of the run, if it has been a member before. allow: functions of this side's own
    (package.module:function) that the run may call. alone: whether it has its process to itself; else its
    peak memory is not known. commons: what it shares with others of its process. rest: where its part is
    put while it waits; None: nowhere."""

    def __init__(
        self,
        target: str,
        name: str,
        device: torch.device,
        source: str | Pair | None = None,
        credentials: Credentials | None = None,
        memory: Memory | None = None,
        allow: Collection[str] = (),
        alone: bool = True,
        commons: Commons | None = None,
        rest: Place | None = None,
    ) -> None:
        self._memory = memory or Memory()
        self._commons, self._rest = commons or Commons(), rest
        self._name, self._device, self._source = name, device, source
        self._allowed = frozenset([allow] if isinstance(allow, str) else allow)
        self.traffic, self._clock = Traffic(), Clock()
        channel = self._commons.channel
        self._connection = Connection(target, self.traffic, self._clock, credentials, self._memory, channel)
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
        net, self._net = self._net or self._built(), None
        train, test = self._loaded(net)
        part = client_part(run, method, net, self._device)
        gauge = Gauge(self._device) if run.measure_memory else None
        method = gauge.around(method) if gauge else method
        for module in _forward_passes(part):
            self._clock.module("forward", module)
        spec = batch_spec(run, method, net)
        del net  # what of it is the server's
        mine, theirs = self._batches(train, test)

        def scored(score: Scored) -> None:
            until_written(lambda: folder.add_metrics(score.line()), told_of(folder.path, on_choice))
            on_scored(score)

        rest = self._rest and Rest(folder.path if self._rest == "disk" else None, on_choice)
        trainer = Trainer(run, self.index, method, part, self._connection, spec, self._clock, on_choice, rest)
        if train.names:
            with trainer.idle():
                self._connection.describe(train.names)
        try:
            trainer.train(mine, theirs, on_step, scored)
        except ClosedError as error:
            raise self._connection.why(error) from None
        measured = measurements(self._clock, self._device, gauge, self._alone)
        with trainer.idle():
            self._connection.leave(measured)
        facts = {
            "run": asdict(run),
            "run_id": self._memory.run_id,
            "client": self.index,
            "data": self._source if isinstance(self._source, str) else run.data,
            "classes": train.names,
        }
        checkpoint.save(folder.path / "checkpoint", state_of(part), facts)
        folder.write_summary(
            {
                "client": self.index,
                "samples": mine.samples * run.epochs,
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
        self._connection.close(failure if isinstance(failure, str) else failure.told)

    def _check_allowed(self) -> None:
        """Raises ConfigError where the run is of code of this side's own that nobody here has named."""
        run = self.run
        asked = {"--model": run.model, "--loss": run.loss, "--metric": run.metric}
        if self._source is None:
            asked["--data"] = run.data
        own = {flag: name for flag, name in asked.items() if _is_own(flag, name)}
        every = " ".join(dict.fromkeys(own.values()))
        for flag, name in own.items():
            if name not in self._allowed:
                raise ConfigError(
                    f"the server's run is of {flag} {name}, and it is not for a server to say which code "
                    f"runs here: if it may, start dsl-client with --allow {every}"
                )

    def _built(self) -> CutNet:
        """The network that the server has built. Raises ConfigError where it cannot be had here."""
        self._check_allowed()
        model = self.run.model
        net = self._commons.net(partial(chance.built, self.run))
        if self._network and self._network != net.fingerprint:
            raise ConfigError(
                f"this client builds another network than the server from --model {model} cut at "
                f"{self.run.place}: install what is installed there (here: {versions(model)})"
            )
        return net

    def _loaded(self, net: CutNet) -> tuple[Dataset, Dataset]:
        """The data, to train and to test on. Raises ConfigError where they are not the run's."""
        return self._commons.sets(partial(self._load, net))

    def _load(self, net: CutNet) -> tuple[Dataset, Dataset]:
        run, (dtype, shape) = self.run, net.takes
        source = self._source or run.data
        train, test = data.load(source, shape, run.class_count, dtype, run.numbers)
        _check_tokens(net, train, test)
        return limited(train, run.train_limit, run.seed), limited(test, run.test_limit, run.seed)

    def _batches(self, train: Dataset, test: Dataset) -> tuple[Batches, Batches]:
        run, size = self.run, self.run.batch_size
        mine = None
        if run.partition != "own":
            deal = partial(partition, train.labels, run.partition, run.clients, run.seed)
            mine = self._commons.shares(deal)[self.index]
        theirs = self._test_share(len(test))
        scored = partial(Batches, test, theirs, size, seed=run.seed, shuffle=False, device=self._device)
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
            self._commons.test(scored) if theirs is None else scored(),
        )

    def _test_share(self, samples: int) -> Indices | None:
        """Clients with one and the same part and test set share the work of scoring it."""
        shares = self.run.sync == "average" and self.run.partition != "own"
        if not shares or samples < self.run.clients:
            return None
        return np.arange(self.index, samples, self.run.clients)


def _is_own(flag: str, name: str) -> bool:
    """Whether it names a function of the user's own, of what the flag may be."""
    if flag == "--model":
        return named.is_own(name)
    return sources.is_own(name) if flag == "--data" else is_function(name)


def _check_tokens(net: CutNet, *sets: Dataset) -> None:
    """Raises ConfigError where the network has no such tokens as the smallest or the largest of the data: an
    embedding tells it only when it is asked, and a GPU not even then."""
    for tokens in (dataset.inputs for dataset in sets if dataset.inputs.dtype == torch.int64):
        rows = tokens.flatten(1)
        ends = tokens[[int(rows.amin(1).argmin()), int(rows.amax(1).argmax())]]
        net.bottom.eval()
        try:
            with torch.no_grad():
                net.bottom(ends)
        except Exception as error:  # the network's code may raise anything
            raise ConfigError(
                f"the network does not take whole numbers from {int(tokens.min())} to {int(tokens.max())}, "
                f"which the data have: {type(error).__name__}: {first_words(error)}"
            ) from error
        finally:
            net.bottom.train()


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
