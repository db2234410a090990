"""A whole federation on this machine: a server and its clients, in threads of this process or as processes.

In threads they speak over loopback, by the code that any other server and client have. Knows who is started
and how all of it ends, but neither what a run is about nor how it is shown.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from common.errors import ClosedError, ConfigError
from common.progress import megabytes
from common.run import Run
from dsl import processes as programs
from dsl.borrowed import borrowed
from dsl.client import Client, Source
from dsl.lines import Lines
from dsl.naming import Function, name_of
from dsl.progress import Progress
from dsl.results import Evaluation, Results, read
from dsl.server import Server, said_of
from dsl_client.datasets import Pair
from dsl_client.turns import Workers
from dsl_lab.runs import SERVER

Sources = Source | list[str] | list[Pair]  # for all clients, or in a list one for each

_POLL_S = 0.1


def train(
    run: Run,
    *,
    model: Function | None = None,
    loss: Function | None = None,
    metric: Function | None = None,
    data: Sources | None = None,
    out: str | Path | None = None,
    processes: bool = False,
    device: str = "auto",
    threads: int = 1,
    workers: int = 0,
    progress: bool = True,
    on_line: Callable[[Evaluation], None] | None = None,
) -> Results:
    """Trains the run with a server and all its clients, on this machine, to its end.

    model: the function that builds the network, or its name; else the run says. loss, metric: likewise.
    data: for all clients, or in a list one for each (the run then has partition="own"); else the run says.
    out: where the folders server, client-0 and so on go; by default runs/<time>-<name>-<method>. processes:
    each a process of its own, in place of threads. threads: of the arithmetic of each. workers: how many of
    the clients' threads compute at a time; 0: all. progress: with a live line. on_line: called with each
    evaluation as it comes, by the thread that called `train`.

    Raises ConfigError for what cannot be, StepError and others for what fails on the way, in processes
    LaunchError; and whatever `on_line`, or a client's own data or network, raises. Then, and upon Ctrl-C,
    everything has ended.
    """
    run = replace(
        run,
        model=run.model if model is None else name_of("model", model),
        loss=run.loss if loss is None else name_of("loss", loss),
        metric=run.metric if metric is None else name_of("metric", metric),
    )
    run = replace(run, data=data) if isinstance(data, str) else run
    if workers < 0 or (workers and processes):
        raise ConfigError(
            f"workers={workers}: say how many of the clients' threads compute at a time; 0: all"
        )
    sources = _one_for_each(run, data)
    folder = Path(out) if out is not None else new_folder(f"{run.name}-{run.method}")
    watch = _Watch(folder / SERVER, run, progress, on_line)
    with watch.progress:
        if processes:
            programs.launch(run, sources, folder, device, threads, watch.look)
        else:
            _train(run, sources, folder, device, threads, workers, watch.look)
        watch.look()
        results = read(folder / SERVER)
        watch.progress.end(f"{_told(run)}  finished: {_scored(results.evaluations[-1])}")
    return results


def new_folder(name: str) -> Path:
    """In runs/, of a name that no other has."""
    stamped = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder, number = stamped, 1
    while folder.exists():
        number += 1
        folder = stamped.with_name(f"{stamped.name}-{number}")
    return folder


def _train(
    run: Run,
    sources: Sequence[Source | None],
    out: Path,
    device: str,
    threads: int,
    workers: int,
    look: Callable[[], None],
) -> None:
    """In threads. All have joined and built their networks, one after the other, before the first one trains:
    so their numbers are certain, and their first weights, which torch's one source of chance makes."""
    with ExitStack() as stack:
        stack.enter_context(borrowed())
        server = stack.enter_context(
            Server(run, "127.0.0.1:0", out=out / SERVER, device=device, threads=threads, alone=False)
        )
        clients = []
        for index, source in enumerate(sources):
            client = Client(
                server.address,
                name=f"client-{index}",
                data=source,
                allow=[run.model, run.loss, run.metric, run.data],
                device=device,
                out=out / f"client-{index}",
                threads=threads,
                alone=False,
            )
            clients.append(stack.enter_context(client))
            client.join()
            client.build()
        permits = Workers(workers) if workers else None
        _to_the_end(server, [_Training(client, permits) for client in clients], look)


class _Training(threading.Thread):
    """A client's training, in a thread of its own; with a permit, where these are counted. error: what ended
    it, if not its last batch."""

    def __init__(self, client: Client, permits: Workers | None) -> None:
        super().__init__(name=f"client-{client.index}", daemon=True)
        self._client, self._permits = client, permits
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._permits.turn() if self._permits else nullcontext():
                self._client.train()
        except BaseException as error:  # noqa: BLE001  # told to whom called `train`
            self.error = error

    def stop(self, reason: str) -> None:
        self._client.stop(reason)


def _to_the_end(server: Server, trainings: Sequence[_Training], look: Callable[[], None]) -> None:
    """Raises why a client failed first, else why the server did. Whatever happens, no thread is left."""
    try:
        for training in trainings:
            training.start()
        while not server.finished(_POLL_S):
            look()
        for training in trainings:
            training.join()
    except BaseException as error:
        reason = "the run was stopped" + said_of(error)
        server.stop(reason)
        for training in trainings:
            training.stop(reason)
        for training in trainings:
            if training.ident is not None:  # it was started
                training.join()
        if isinstance(error, ClosedError):
            raise _cause(trainings, error) from None
        raise
    if not server.run.quorum:  # else it has gone on without them
        for training in trainings:
            if training.error:
                raise training.error


def _cause(trainings: Sequence[_Training], closed: ClosedError) -> BaseException:
    """What a client met with of its own, rather than what others were told of it."""
    errors = [training.error for training in trainings if training.error]
    return next((error for error in errors if not isinstance(error, ClosedError)), closed)


def _one_for_each(run: Run, data: Sources | None) -> Sequence[Source | None]:
    """Raises ConfigError where they are not as many as the clients, or are to be dealt out once more."""
    if not isinstance(data, list):
        return [None if isinstance(data, str) else data] * run.clients
    if len(data) != run.clients:
        raise ConfigError(
            f"data: {len(data)} sources for {run.clients} clients; give a list with one for each, or one "
            "for all"
        )
    if run.partition != "own":
        raise ConfigError(
            f"data: one for each client, and the run deals out shares (partition={run.partition!r}); say "
            "partition='own', or give one for all"
        )
    return data


class _Watch:
    """What the run has come to so far: told line by line, and shown."""

    def __init__(
        self, folder: Path, run: Run, progress: bool, on_line: Callable[[Evaluation], None] | None
    ) -> None:
        self._lines, self._run, self._on_line = Lines(folder), run, on_line
        self._start, self._last = time.monotonic(), "starting"
        self.progress = Progress(progress)

    def look(self) -> None:
        for line in self._lines.new():
            self._last = f"epoch {line.epoch}/{self._run.epochs}  {_scored(line)}"
            if self._on_line:
                self._on_line(line)
        self.progress.show(f"{_told(self._run)}  {self._last}  {time.monotonic() - self._start:.0f} s")


def _told(run: Run) -> str:
    settings = " ".join([run.method, *run.method_arg, *run.codec])
    return f"{settings} on {run.model.removeprefix('__main__:')} cut at {run.place}"


def _scored(line: Evaluation) -> str:
    test = line.test
    scores = f"{test.name} {test.joined:.3f}" + (
        f" (alone {test.client_only:.3f})" if test.client_only is not None else ""
    )
    return f"{scores}  up {megabytes(line.wire.up)}  down {megabytes(line.wire.down)}"
