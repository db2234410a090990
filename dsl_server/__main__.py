"""dsl-server: holds the top of the network and learns from the activations that clients send."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from common import cli, tls
from common.errors import ClosedError, ConfigError, SplitLearningError, StaleError
from common.exporter import Exporter
from common.progress import Progress, megabytes
from common.run import Run, defaults_from
from dsl_server import torchrun
from dsl_server.dashboard.serve import Dashboard
from dsl_server.room import make_room_for_files
from dsl_server.trackers import MLflow, TensorBoard, Tracker, Tracking

if TYPE_CHECKING:
    from dsl_server.ranks import Ranks
    from dsl_server.server import Server
    from dsl_server.ticks import Pace

PROGRAM = "dsl-server"
DESCRIPTION = """Holds the top of a network that is cut in two, and the description of the run.
Clients (dsl-client) hold the bottom and the data; they receive all else from here.
Completion for a shell: dsl-server --print-completion bash, zsh or fish."""


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
    dashboard: int | None = None
    """Show the run as a page at this port, 0 for any: curves, traffic, clients. Needs the extra [ui]."""
    dashboard_host: str = "127.0.0.1"
    """The address of this machine that the page is at; any but loopback shows it, unencrypted, to others."""
    metrics_port: int | None = None
    """Tell Prometheus of the run at this port, 0 for any."""
    metrics_host: str = "127.0.0.1"
    """The address of this machine that --metrics-port is at; any but loopback tells others, unencrypted."""
    linger: float = 0.0
    """Seconds for which --dashboard and --metrics-port stay after the run, for a last look."""
    tensorboard: Path | None = None
    """A folder for TensorBoard's event files of this run. Needs the extra [tensorboard]."""
    mlflow: str | None = None
    """Where to tell MLflow of the run: a server, or a store such as sqlite:///mlflow.db. Needs mlflow."""
    serve: Path | None = None
    """Serve predictions of the finished run in this folder, until stopped. The run's settings are those that
    it has."""
    server_sync: str = "step"
    """Under torchrun: step, where the ranks make each step together; or every:H, where each steps on its own
    and their weights are averaged every H ticks (docs/ranks.md)."""
    fsdp: bool = False
    """Under torchrun: divide the top's weights over the ranks (PyTorch's FSDP2), where they are too many for
    one GPU."""
    tick_batches: int = 1
    """Under torchrun: batches with which a rank's share of a tick closes."""
    tick_ms: float = 20.0
    """Under torchrun: milliseconds after which it closes in any case."""
    rank_timeout: float = 60.0
    """Under torchrun: seconds for which the ranks wait for one of them; then it is lost."""
    advertise: str | None = None
    """Under torchrun: the address by which clients find this host, or host:port; else that of --listen, or
    this host's name."""
    print_config: bool = False
    """Print the run's settings as TOML, and end."""


WHY_S = 1.0  # for a rank that torchrun stops to learn which other one is lost
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
    return _predict(options, options.serve) if options.serve else _serve(options)


def _predict(options: Options, ended: Path) -> int:
    if options.resume or options.out or options.config:
        raise ConfigError(f"--serve {ended}: nothing is trained; leave --resume, --out and --config out")
    tls.check_exposure("--listen", options.listen, options.certs, options.insecure)
    credentials = tls.Credentials.read(options.certs, "server") if options.certs else None
    from common.ended import server_end  # these import torch
    from dsl_server.predictor import Predictor

    device, progress = cli.device_of(options.device), Progress(PROGRAM)
    run = server_end(ended, device)
    server = Predictor(run, options.listen, device, progress.log, credentials)
    tally, traffic = server.tally, server.traffic
    with progress:
        host, also = _address(options)
        progress.log(
            f"serving {ended}: {run.run.method} on {run.run.model} cut at {run.run.place}, {device}, "
            f"listening on {options.listen}: "
            f"dsl-client predict --server {host}:{server.port}{also} --run CLIENT-FOLDER"
        )
        server.start()
        try:
            while True:
                time.sleep(0.2)
                up, down = (megabytes(traffic.total(way)) for way in ("up", "down"))
                progress.show(f"{tally.samples:,} samples  calls {tally.calls}  up {up}  down {down}")
        except cli.Stopped as stopped:
            if stopped.number != signal.SIGTERM:
                raise
        finally:
            server.stop(DRAIN_S)
            progress.log(f"served {tally.samples:,} samples")
    return 0


def _serve(options: Options) -> int:
    tls.check_exposure("--listen", options.listen, options.certs, options.insecure)
    here = torchrun.here(os.environ)
    if options.resume and torchrun.begins(options.resume, os.environ):
        options = replace(options, out=options.resume, resume=None)
    if here is None:
        for flag in ("server_sync", "fsdp", "tick_batches", "tick_ms", "rank_timeout", "advertise"):
            if (value := getattr(options, flag)) != getattr(Options, flag):
                said = f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}")
                raise ConfigError(
                    f"{said}: is of a server of several ranks; start it by "
                    "torchrun --nproc-per-node 2 or more"
                )
        return _serve_run(options)
    options = replace(options, listen=here.listen(options.listen))
    from dsl_server.ranks import Ranks  # these import torch
    from dsl_server.ticks import Pace

    pace = Pace.of(options.tick_batches, options.tick_ms, options.server_sync, options.fsdp)
    ranks = Ranks.met(cli.device_of(here.device(options.device)), options.rank_timeout)
    try:
        return (_serve_run if ranks.first else _serve_beside)(options, ranks, pace)
    except SplitLearningError as error:
        ranks.fail(error)
        raise


def _serve_beside(options: Options, ranks: "Ranks", pace: "Pace") -> int:
    """As a rank that is not the first, which shows and writes what there is of the run."""
    credentials = tls.Credentials.read(options.certs, "server") if options.certs else None
    from common.rundir import RunFolder  # these import torch
    from dsl_server.server import Server

    told = json.loads(ranks.from_first(None))
    run, progress = Run.from_json(told["run"]), Progress(PROGRAM)
    folder = RunFolder(Path(told["folder"]), run, "server", owned=False)
    server = Server(
        run,
        options.listen,
        ranks.device,
        folder,
        credentials=credentials,
        ranks=ranks,
        pace=pace,
        advertise=options.advertise or "",
    )
    stopping = ClosedError("the run is over")
    progress.log(f"rank {ranks.rank} of {ranks.size}, {ranks.device}, listening on port {server.port}")
    server.start()
    try:
        while not server.wait(timeout=0.2):
            pass
        progress.log(
            f"rank {ranks.rank}: its clients have left: {', '.join(map(str, server.rounds.members()))}"
        )
    except cli.Stopped as stopped:
        stopping = _stopping(server, run, stopped)
    finally:
        server.stop(stopping)
    return 0


def _serve_run(options: Options, ranks: "Ranks | None" = None, pace: "Pace | None" = None) -> int:
    credentials = tls.Credentials.read(options.certs, "server") if options.certs else None
    page = None if options.dashboard is None else Dashboard(options.dashboard, options.dashboard_host)
    port, host = options.metrics_port, options.metrics_host
    exporter = None if port is None else Exporter(port, host)
    trackers = list(_trackers(options))
    from common.methods import settled  # these import torch
    from common.rundir import Held, RunFolder, run_of
    from dsl_server import metrics, terminal
    from dsl_server.server import Server

    run = run_of(options.resume) if options.resume else settled(options.run)
    make_room_for_files(run.clients)
    device = ranks.device if ranks else cli.device_of(options.device)
    folder = RunFolder(options.resume or options.out, run, "server", goes_on=options.resume is not None)
    held = Held(folder.path, "--resume" if options.resume else "--out")
    progress = Progress(PROGRAM)

    def lost(reason: ClosedError) -> None:
        progress.log(f"{reason}; the others go on")

    def trouble(text: str) -> None:
        progress.log(f"WARNING: {text}")

    if ranks:
        ranks.from_first(json.dumps({"run": run.to_json(), "folder": str(folder.path)}).encode())
    server = Server(
        run,
        options.listen,
        device,
        folder,
        lost,
        credentials,
        trouble,
        resume=options.resume is not None,
        ranks=ranks,
        pace=pace,
        advertise=options.advertise or "",
    )
    stopping = ClosedError("the run is over")
    with progress, ExitStack() as shown:
        progress.log(_greeting(options, run, server.port, str(device)))
        server.start()
        if page:
            page.start(server.watch.view)
            progress.log(page.greeting)
            shown.callback(page.stop)
        if exporter:
            exporter.start(lambda: metrics.metrics_of(server.watch.view(), PROGRAM))
            progress.log(exporter.greeting)
            shown.callback(exporter.stop)
        for tracker in trackers:
            shown.callback(Tracking(tracker, folder.path.name, run, server.watch.view, trouble).stop)
        try:
            while not server.wait(timeout=0.2):
                view = server.watch.view()
                progress.show(terminal.line_of(view), terminal.picture_of(view, PROGRAM))
            summary = server.finish()
        except cli.Stopped as stopped:
            progress.end()
            stopping = ClosedError(f"the server was stopped ({stopped})")  # if the next line raises
            stopping = _stopping(server, run, stopped)
            progress.log(f"drained: go on with --resume {folder.path}")
            return 0
        finally:
            if page:
                page.look()
            server.stop(stopping)
            held.release()
        progress.log(
            _result(summary, folder.path, [account for account in server.rounds.members() if account.lost])
        )
        if options.linger > 0 and (page or exporter):
            progress.log(f"shown for {options.linger:g} s more; Ctrl-C ends it")
            with suppress(cli.Stopped):
                time.sleep(min(options.linger, threading.TIMEOUT_MAX))
    return 0


def _stopping(server: "Server", run: Run, stopped: cli.Stopped) -> ClosedError:
    """What the clients are told, once the server is drained. Raises the reason if the run cannot be gone on
    with, or another rank's end is why this one is stopped."""
    if server.ranks and (failure := server.failed(WHY_S)):
        raise failure
    if not run.lasts or stopped.number != signal.SIGTERM:
        raise stopped
    draining = StaleError("the server is draining: it will be back")
    server.drain(draining, DRAIN_S)
    return draining


def _trackers(options: Options) -> Iterator[Tracker]:
    if options.tensorboard:
        yield TensorBoard(options.tensorboard, goes_on=options.resume is not None)
    if options.mlflow:
        yield MLflow(options.mlflow)


def _greeting(options: Options, run: Run, port: int, device: str) -> str:
    host, also = _address(options)
    return (
        f"{run.method} on {run.model} cut at {run.place}, {device}, listening on {options.listen}; "
        f"waiting for {run.clients} client{'s' if run.clients > 1 else ''}: "
        f"dsl-client --server {host}:{port}{also}"
    )


def _address(options: Options) -> tuple[str, str]:
    """How a client says where the server is, and the flag that it needs."""
    host = options.listen.rpartition(":")[0]
    host = "THIS-HOST" if host in ("0.0.0.0", "[::]") else host
    return host, " --certs FOLDER" if options.certs else " --insecure" if options.insecure else ""


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
