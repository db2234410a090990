"""dsl-client: holds private data and the bottom of the network; all else it is told by the server."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common import cli, tls
from common.errors import ConfigError, SplitLearningError
from common.exporter import Exporter
from common.progress import Progress
from dsl_client import predict

if TYPE_CHECKING:
    from common.run import Run
    from dsl_client.client import Client
    from dsl_client.trainer import Scored
    from dsl_client.watch import View, Watch

PROGRAM = "dsl-client"
SHOWN_EVERY_S = 0.2
LOOK_S = 0.002  # for each of many replicas, from one look at them to the next: looking takes time, too
DESCRIPTION = """Holds private data and the bottom of a network that is cut in two.
Joins the run of a dsl-server, which says what is trained and how.

dsl-client predict: what a network so trained says of images; dsl-client predict --help tells more.
Completion for a shell: dsl-client --print-completion bash, zsh or fish."""


@dataclass(frozen=True)
class Options:
    server: str = "127.0.0.1:50051"
    """The server's host:port."""
    name: str | None = None
    """What this client is called in the server's log; else its certificate's name, or this host's."""
    certs: Path | None = None
    """This client's folder of certificate and key, made by dsl certs client."""
    insecure: bool = False
    """Connect to another machine without --certs: nothing is encrypted."""
    data: str | None = None
    """Where the data is here, if not where the run says: sample, fashion-mnist, cifar10, cifar100,
    npz:FILE, folder:DIR, or package.module:function, which gives two torch Datasets (docs/data.md)."""
    allow: tuple[str, ...] = ()
    """Code of yours that the run may call: package.module:function, as the server's --model, --loss, --metric
    or --data say. No server can have this machine import a module that is not named here."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Where run.json, metrics.jsonl, checkpoint/ and summary.json go; else runs/<time>-<name>-client-N."""
    state: Path | None = None
    """Where to keep what it needs to go on after this process, in a run with checkpoints: start it again with
    the same folder. Its outputs go there too, unless --out says otherwise."""
    takeover: bool = False
    """With --state: end the membership that another process has with it."""
    metrics_port: int | None = None
    """Tell Prometheus of this client at this port, 0 for any."""
    metrics_host: str = "127.0.0.1"
    """The address of this machine that --metrics-port is at; any but loopback tells others, unencrypted."""
    replicas: int = 1
    """How many clients of the run this process is, each with its own share, part, identity and folder
    client-N in --out (docs/replicas.md)."""
    workers: int | None = None
    """With --replicas: how many of them compute at a time, each on one core; else as many as there are."""
    rest: Literal["memory", "disk"] = "memory"
    """With --replicas: where the parts of those are that do not compute: this machine's memory, or --out."""
    patience: float = 60.0
    """Seconds to wait for a server that is not there yet, or not there any more in a run with checkpoints."""


def main() -> None:
    cli.prepare()
    cli.leave(cli.run_to_the_end(PROGRAM, lambda: _main(sys.argv[1:])))


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["predict"]:
        return predict.main(arguments[1:])
    options = cli.parse(Options, arguments, Options(), PROGRAM, DESCRIPTION)
    tls.check_exposure("--server", options.server, options.certs, options.insecure)
    if options.replicas != 1 or options.workers is not None or options.rest != "memory":
        return _many(options)
    cli.keep_freed_memory()
    credentials = tls.Credentials.read(options.certs, "client") if options.certs else None
    tls.preflight(options.server, credentials)  # what can be said at once, before torch has come
    exporter = _exporter(options)
    from dsl_client import metrics
    from dsl_client.client import Client  # imports torch
    from dsl_client.memory import Memory
    from dsl_client.watch import Watch

    name = options.name or (credentials and credentials.name) or socket.gethostname()[:64]
    failure: SplitLearningError | str = ""
    out = options.out or (options.state and options.state / "out")
    with Progress(PROGRAM) as progress:
        memory = Memory(options.state, on_trouble=progress.log)
        client = Client(
            options.server,
            name,
            cli.device_of(options.device),
            options.data,
            credentials,
            memory,
            options.allow,
        )
        try:
            progress.show(f"waiting for the server at {options.server}")
            run = client.join(options.patience, options.takeover)
            progress.log(_joined(client, run, options.server))
            if options.state and not run.lasts:
                progress.log("the run makes no checkpoints (--checkpoint-every), so --state is of no use")
            watch = Watch(client)
            if exporter:
                exporter.start(lambda: metrics.metrics_of(watch.view(), PROGRAM))
                progress.log(exporter.greeting)
            with _shown(watch.view, progress):
                folder = client.train(out, watch.step, partial(_scored, watch, progress), progress.log)
            progress.log(f"finished: everything in {folder}")
        except SplitLearningError as error:
            failure = error
            raise
        except cli.Stopped as stopped:
            progress.end()
            failure = "" if client.can_return else f"it was stopped ({stopped})"
            raise
        finally:
            client.close(failure)
    return 0


def _many(options: Options) -> int:
    """Replicas: see dsl_client/replicas.py."""
    count, workers = options.replicas, _workers(options)
    tls.preflight(options.server, None)
    cli.start_for_many_threads()
    exporter = _exporter(options)
    from dsl_client import metrics
    from dsl_client.client import Client  # imports torch
    from dsl_client.commons import Commons
    from dsl_client.memory import Memory
    from dsl_client.replicas import Replicas, check_files

    check_files(count, each=4 if options.state else 1)
    device, name = cli.device_of(options.device), options.name or socket.gethostname()
    with Progress(PROGRAM) as progress:

        def make(number: int, commons: Commons) -> Client:
            state = options.state and options.state / f"replica-{number}"
            return Client(
                options.server,
                f"{name[: 63 - len(str(number))]}-{number}",
                device,
                options.data,
                memory=Memory(state, on_trouble=progress.log),
                allow=options.allow,
                alone=False,
                commons=commons,
                rest=options.rest,
            )

        def joined(so_far: int) -> None:
            progress.show(f"{so_far} of {count} replicas have joined")

        replicas = Replicas(count, workers, make, Commons(options.server), progress.log)
        failure: BaseException | None = None
        try:
            progress.show(f"waiting for the server at {options.server}")
            run = replicas.join(options.patience, options.takeover, joined)
            if run:
                progress.log(f"{count} replicas, {workers} at a time, at {options.server}: {_about(run)}")
                if exporter:
                    exporter.start(lambda: metrics.metrics_of(replicas.view(), PROGRAM))
                    progress.log(exporter.greeting)
                out = options.out or (options.state and options.state / "out") or _new_folder(run)
                with _shown(replicas.view, progress, max(SHOWN_EVERY_S, count * LOOK_S)):
                    replicas.train(out, lambda: time.sleep(0.1))
        except SplitLearningError as error:
            failure = error
            raise
        except cli.Stopped as stopped:
            progress.end()
            failure = stopped
            raise
        finally:
            replicas.stop("" if failure is None else f"it was stopped ({failure})")
            progress.log(f"{replicas.ended_well} of {count} replicas ended well")
    return 0


def _workers(options: Options) -> int:
    """Raises ConfigError for what replicas cannot have."""
    count = options.replicas
    if count < 1:
        raise ConfigError(f"--replicas {count} is below 1")
    if options.certs:
        raise ConfigError(
            f"--replicas {count} with --certs: a certificate is of one client; start a dsl-client for each, "
            "or leave --certs out (--insecure, where the server is another machine)"
        )
    if options.workers is None:
        return min(count, len(os.sched_getaffinity(0)))
    if not 1 <= options.workers <= count:
        raise ConfigError(f"--workers {options.workers}: choose from 1 to {count}, as many as --replicas")
    return options.workers


def _exporter(options: Options) -> Exporter | None:
    port, host = options.metrics_port, options.metrics_host
    return None if port is None else Exporter(port, host)


def _new_folder(run: "Run") -> Path:
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{run.name}-replicas"


def _joined(client: "Client", run: "Run", server: str) -> str:
    return f"client {client.index} of {run.clients} at {server}: {_about(run)}"


def _about(run: "Run") -> str:
    return (
        f"{run.method} on {run.model} cut at {run.place}, {run.epochs} epoch{'s' if run.epochs > 1 else ''} "
        f"of {run.data}"
    )


@contextmanager
def _shown(look: Callable[[], "View"], progress: Progress, every_s: float = SHOWN_EVERY_S) -> Iterator[None]:
    """The live view, by a thread of its own: also while the client waits, or is scored."""
    from dsl_client import terminal  # imports torch

    over = threading.Event()

    def show() -> None:
        while not over.wait(every_s):
            view = look()
            progress.show(terminal.line_of(view), terminal.picture_of(view, PROGRAM))

    thread = threading.Thread(target=show, name="view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _scored(watch: "Watch", progress: Progress, score: "Scored") -> None:
    """A line that stays for each evaluation."""
    from dsl_client import terminal

    watch.scored(score)
    view = watch.view()
    scored = terminal.score_of(view.metric, view.score, view.alone)
    progress.log(f"epoch {score.epoch + 1}/{view.epochs}  {scored}  {terminal.bytes_of(view)}")


if __name__ == "__main__":
    main()
