"""`dsl-client predict`: what a trained network says of images, into a table; and what it cost."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from common import cli, tls
from common.errors import ClosedError, ConfigError, RefusedError
from common.progress import Progress, megabytes

if TYPE_CHECKING:
    import torch

    from common.ended import Ended
    from common.meter import Traffic
    from common.methods.base import ClientPart
    from dsl_client.predictions import Predictions
    from dsl_client.predictor import Remote
    from dsl_client.samples import Samples

PROGRAM = "dsl-client predict"
DESCRIPTION = """Says what a trained network takes images for: this client's part makes activations of
them, and a server that serves the same run (dsl-server --serve) does the rest. Images stay here, and
nothing is learned."""


@dataclass(frozen=True)
class Options:
    run: Path
    """The folder that this client left when it trained: its --out, or its --state."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, folders of pictures, or .npz files with an array `images`. Without any, and without --data:
    the test set that the run was scored on."""
    server: str = "127.0.0.1:50051"
    """The host:port of a dsl-server --serve."""
    data: str | None = None
    """A data source with labels instead, such as folder:DIR or npz:FILE."""
    split: Literal["test", "train"] = "test"
    """With --data: which of its sets."""
    out: Path = Path("predictions.csv")
    """Where the table goes: .csv, or .jsonl, which has the logits, too."""
    alone: bool = False
    """Ask no server: predict by this client's own head."""
    alone_if_away: Annotated[bool, tyro.conf.arg(name="alone-if-away")] = False
    """Predict so what a server that is not there, or goes away, does not answer; the column `by` tells."""
    codec: str = ""
    """What activations travel as, such as int4+zstd; else as in the run."""
    batch_size: Annotated[int, tyro.conf.arg(name="batch-size")] = 0
    """Samples in a batch; 0: as in the run, which is the most."""
    certs: Path | None = None
    """This client's folder of certificate and key, made by dsl certs client."""
    insecure: bool = False
    """Connect to another machine without --certs: nothing is encrypted."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    patience: float = 10.0
    """Seconds to wait for a server that is not there yet."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Options, prog=PROGRAM, description=DESCRIPTION, args=arguments)
    _check(options)
    credentials = tls.Credentials.read(options.certs, "client") if options.certs else None
    if not options.alone:
        tls.check_exposure("--server", options.server, options.certs, options.insecure)
        tls.preflight(options.server, credentials)  # what can be said at once, before torch has come
    from common.ended import check_alone, client_end  # these import torch
    from common.meter import Traffic
    from dsl_client.predictions import Predictions
    from dsl_client.predictor import Predictor

    device, traffic = cli.device_of(options.device), Traffic()
    with Progress(PROGRAM) as progress:

        def away(error: ClosedError) -> None:
            progress.log(f"{error}; this client goes on alone")

        ended = client_end(options.run, device)
        if options.alone or options.alone_if_away:
            check_alone(ended)
        samples = _samples(options, ended, device)
        remote = None if options.alone else _remote(options, ended, traffic, credentials, away)
        predictor = Predictor(ended, remote, away if options.alone_if_away else None)
        table = Predictions(options.out, samples.classes or ended.names)
        start = time.perf_counter()
        try:
            with table.open() as file:
                for predicted in predictor.predict(samples.portions):
                    table.write(file, predicted)
                    up, down = (megabytes(traffic.total(way)) for way in ("up", "down"))
                    progress.show(f"{table.count:,} of {samples.count:,} images  up {up}  down {down}")
        finally:
            if remote is not None:
                remote.close()
        progress.log(f"finished: {_result(table, time.perf_counter() - start, traffic)}; in {options.out}")
    return 0


def _check(options: Options) -> None:
    """Raises ConfigError for flags that contradict each other, or can be seen to be wrong."""
    if options.images and options.data:
        raise ConfigError(f"--data {options.data}, and images beside it: leave one out")
    if options.alone and (options.alone_if_away or options.codec):
        flag = "--alone-if-away" if options.alone_if_away else f"--codec {options.codec}"
        raise ConfigError(f"--alone asks no server: leave {flag} out")
    if options.out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"--out {options.out}: say a file that ends in .csv or .jsonl")


def _samples(options: Options, ended: "Ended[ClientPart]", device: "torch.device") -> "Samples":
    from dsl_client import samples

    run, size = ended.run, options.batch_size or ended.run.batch_size
    if not 1 <= size <= run.batch_size:
        raise ConfigError(f"--batch-size {size}: choose 1 to {run.batch_size}, the run's")
    if options.images:
        return samples.of_pictures(options.images, ended, size, device)
    if options.data:
        return samples.of_source(options.data, options.split, ended, size, device)
    return samples.of_run(ended, size, device)


def _remote(
    options: Options,
    ended: "Ended[ClientPart]",
    traffic: "Traffic",
    credentials: tls.Credentials | None,
    away: Callable[[ClosedError], None],
) -> "Remote | None":
    """The server; none where it is away and the client goes on alone."""
    from dsl_client.predictor import Remote

    try:
        return Remote(options.server, ended, traffic, options.patience, credentials, options.codec)
    except ClosedError as error:
        if not options.alone_if_away or isinstance(error, RefusedError):
            raise
        away(error)
        return None


def _result(table: "Predictions", seconds: float, traffic: "Traffic") -> str:
    """One line: how many, how fast, at what cost, and how well, where that is known."""
    each = max(1, table.count)
    words = [
        f"{table.count:,} images in {seconds:.1f} s, {table.count / max(seconds, 1e-9):,.0f} images/s",
        f"{traffic.total('up') / each:,.0f} bytes up and {traffic.total('down') / each:,.0f} down an image",
    ]
    if 0 < table.alone < table.count:
        words.append(f"{table.alone:,} of them alone")
    if table.labelled:
        words.append(f"accuracy {table.right / table.labelled:.4f}")
    return "; ".join(words)
