"""dsl-server: holds the top of the network and learns from the activations that clients send."""

import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro

from common import cli, tls
from common.errors import ClosedError, ConfigError, StaleError
from common.progress import Progress, megabytes
from common.run import Run, defaults_from

PROGRAM = "dsl-server"
DESCRIPTION = """Holds the top of a network that is cut in two, and the description of the run.
Clients (dsl-client) hold the bottom and the data; they receive all else from here."""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.OmitArgPrefixes[Run] = field(default_factory=Run)
    config: Path | None = None
    """A TOML file with any of the run's settings by their names; flags win."""
    listen: str = "127.0.0.1:50051"
    """Address and port to listen on; 0.0.0.0:50051 for clients on other machines, port 0 for any."""
    certs: Path | None = None
    """The folder made by dsl certs init: the server's certificate and key. Clients need theirs."""
    insecure: bool = False
    """Listen for other machines without --certs: nothing is encrypted, and anyone may join."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Where run.json, metrics.jsonl, checkpoint/ and summary.json go; else runs/<time>-<name>-server."""
    resume: Path | None = None
    """Go on with the run in this folder (the --out of a run with --checkpoint-every), from its newest
    checkpoint. The run's settings are those that it has."""
    print_config: bool = False
    """Print the run's settings as TOML, and end."""


DRAIN_S = 20.0  # for what has come to be learned from and saved, when the process is asked to end


def main() -> None:
    cli.prepare()
    cli.leave(cli.run_to_the_end(PROGRAM, lambda: _main(sys.argv[1:])))


def _main(arguments: list[str]) -> int:
    early = {flag: _value_of(flag, arguments) for flag in ("--config", "--recipe")}
    file = Path(early["--config"]) if early["--config"] else None
    default = Options(run=defaults_from(file, early["--recipe"]), config=file)
    options = cli.parse(Options, arguments, default, PROGRAM, DESCRIPTION)
    if options.print_config:
        print(_toml(options.run), end="")
        return 0
    return _serve(options)


def _serve(options: Options) -> int:
    tls.check_exposure("--listen", options.listen, options.certs, options.insecure)
    credentials = tls.Credentials.read(options.certs, "server") if options.certs else None
    from common.methods import settled  # these import torch
    from common.rundir import Held, RunFolder, run_of
    from dsl_server.server import Server

    run = run_of(options.resume) if options.resume else settled(options.run)
    device = cli.device_of(options.device)
    folder = RunFolder(options.resume or options.out, run, "server", goes_on=options.resume is not None)
    held = Held(folder.path, "--resume" if options.resume else "--out")
    progress = Progress(PROGRAM)

    def lost(reason: ClosedError) -> None:
        progress.log(f"{reason}; the others go on")

    def trouble(text: str) -> None:
        progress.log(f"WARNING: {text}")

    resume = options.resume is not None
    server = Server(run, options.listen, device, folder, lost, credentials, trouble, resume)
    stopping = ClosedError("the run is over")
    with progress:
        progress.log(_greeting(options, run, server.port, str(device)))
        server.start()
        try:
            while not server.wait(timeout=0.2):
                progress.show(_line(server))
            summary = server.finish()
        except cli.Stopped as stopped:
            stopping = ClosedError(f"the server was stopped ({stopped})")
            if not run.lasts or stopped.number != signal.SIGTERM:
                raise
            stopping = StaleError("the server is draining: it will be back")
            server.drain(stopping, DRAIN_S)
            progress.log(f"drained: go on with --resume {folder.path}")
            return 0
        finally:
            server.stop(stopping)
            held.release()
        progress.log(
            _result(summary, folder.path, [account for account in server.rounds.members() if account.lost])
        )
    return 0


def _greeting(options: Options, run: Run, port: int, device: str) -> str:
    host = options.listen.rpartition(":")[0]
    host = "THIS-HOST" if host in ("0.0.0.0", "[::]") else host
    also = " --certs FOLDER" if options.certs else " --insecure" if options.insecure else ""
    return (
        f"{run.method} on {run.model} cut at {run.place}, {device}, listening on {options.listen}; "
        f"waiting for {run.clients} client{'s' if run.clients > 1 else ''}: "
        f"dsl-client --server {host}:{port}{also}"
    )


def _line(server: Any) -> str:
    record, run = server.record, server.run
    here = sum(account.present or account.left for account in server.rounds.members())
    return "  ".join(
        [
            f"clients {here}/{run.clients}",
            f"epoch {record.epoch + 1}/{run.epochs}",
            f"{record.samples_trained:,} samples",
            f"{record.samples_trained / max(record.seconds, 1e-9):,.0f}/s",
            "loss –" if math.isnan(record.loss) else f"loss {record.loss:.3f}",
            _scored(record.test, 3) or f"{run.metric.rpartition(':')[2]} –",
            f"up {megabytes(server.traffic.total('up'))}",
            f"down {megabytes(server.traffic.total('down'))}",
        ]
    )


def _result(summary: dict[str, Any], folder: Path, lost: Sequence[object]) -> str:
    scored = _scored(summary["test"], 4) or "not scored"
    without = f" without {', '.join(map(str, lost))}" if lost else ""
    return (
        f"finished{without}: {summary['samples_trained']:,} samples in {summary['seconds']['wall']:.1f} s, "
        f"{scored}; everything in {folder}"
    )


def _scored(test: Mapping[str, Any], digits: int) -> str:
    """The run's metric, by the last part of its name; nothing where none is known yet."""
    metric = test.get("metric") or {"name": "accuracy", "joined": test["accuracy"]}
    if metric["joined"] is None:
        return ""
    return f"{metric['name'].rpartition(':')[2]} {metric['joined']:.{digits}f}"


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """A flag's value, read before the others, for it sets their defaults."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            if equals:
                return value
            if index + 1 < len(arguments):
                return arguments[index + 1]
            raise ConfigError(f"{flag} needs a value")
    return None


def _toml(run: Run) -> str:
    """The settings that are set. JSON's strings, numbers and lists are TOML's too."""
    settings = {field.name: getattr(run, field.name) for field in fields(run)}
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in settings.items()
        if value is not None
    )


if __name__ == "__main__":
    main()
