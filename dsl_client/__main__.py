"""dsl-client: holds private data and the bottom of the network; all else it is told by the server."""

import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, tls
from common.errors import SplitLearningError
from common.progress import Progress, megabytes

if TYPE_CHECKING:
    from common.run import Run
    from dsl_client.client import Client
    from dsl_client.trainer import Scored, Step

PROGRAM = "dsl-client"
DESCRIPTION = """Holds private data and the bottom of a network that is cut in two.
Joins the run of a dsl-server, which says what is trained and how."""


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
    patience: float = 60.0
    """Seconds to wait for a server that is not there yet, or not there any more in a run with checkpoints."""


def main() -> None:
    cli.prepare()
    cli.leave(cli.run_to_the_end(PROGRAM, lambda: _main(sys.argv[1:])))


def _main(arguments: list[str]) -> int:
    options = cli.parse(Options, arguments, Options(), PROGRAM, DESCRIPTION)
    tls.check_exposure("--server", options.server, options.certs, options.insecure)
    credentials = tls.Credentials.read(options.certs, "client") if options.certs else None
    tls.preflight(options.server, credentials)  # what can be said at once, before torch has come
    from dsl_client.client import Client  # imports torch
    from dsl_client.memory import Memory

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
            view = _View(client, run, progress)
            folder = client.train(out, view.step, view.scored, progress.log)
            progress.log(f"finished: everything in {folder}")
        except SplitLearningError as error:
            failure = error
            raise
        except cli.Stopped as stopped:
            failure = "" if client.can_return else f"it was stopped ({stopped})"
            raise
        finally:
            client.close(failure)
    return 0


def _joined(client: "Client", run: "Run", server: str) -> str:
    return (
        f"client {client.index} of {run.clients} at {server}: {run.method} on {run.model} cut at "
        f"{run.place}, {run.epochs} epoch{'s' if run.epochs > 1 else ''} of {run.data}"
    )


class _View:
    """The live line, and a line that stays for each evaluation."""

    def __init__(self, client: "Client", run: "Run", progress: Progress) -> None:
        self._client, self._run, self._progress = client, run, progress
        self._start, self._samples, self._due = time.monotonic(), 0, 0.0
        self._accuracy = f"{run.metric.rpartition(':')[2]} –"

    def step(self, step: "Step") -> None:
        self._samples += step.samples
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + 0.2
        self._progress.show(
            "  ".join(
                [
                    f"epoch {step.epoch + 1}/{self._run.epochs}",
                    f"batch {step.batch}/{step.batches}",
                    f"{self._samples / (now - self._start):,.0f} samples/s",
                    f"loss {float(step.loss):.3f}" if step.loss is not None else "loss –",
                    self._accuracy,
                    self._bytes(),
                ]
            )
        )

    def scored(self, score: "Scored") -> None:
        alone = f" (alone {score.alone:.3f})" if score.alone is not None else ""
        self._accuracy = f"{score.metric.rpartition(':')[2]} {score.value:.3f}{alone}"
        self._progress.log(f"epoch {score.epoch + 1}/{self._run.epochs}  {self._accuracy}  {self._bytes()}")

    def _bytes(self) -> str:
        traffic = self._client.traffic
        return f"up {megabytes(traffic.total('up'))}  down {megabytes(traffic.total('down'))}"


if __name__ == "__main__":
    main()
