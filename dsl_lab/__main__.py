"""dsl: whole experiments on one machine, made of real server and client processes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from common import cli
from common.errors import ConfigError, SplitLearningError
from dsl_lab import certs
from dsl_lab.cuts import Cuts, cuts
from dsl_lab.demo import Demo, demo
from dsl_lab.doctor import Doctor, doctor
from dsl_lab.evaluate import Evaluate, evaluate
from dsl_lab.export import Export, export
from dsl_lab.paper import Paper, paper

PROGRAM = "dsl"
DESCRIPTION = """Whole experiments on one machine, made of real dsl-server and dsl-client processes; and tools
that both ends need. Completion for a shell: dsl --print-completion bash, zsh or fish."""


@dataclass(frozen=True)
class Report:
    """Turns finished runs into one HTML file; beside it the figures, and the table as Markdown and CSV."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Servers' run folders (with run.json, metrics.jsonl and summary.json), or folders that hold any number
    of these, such as that of a dsl bench."""
    out: Path = Path("report.html")
    """Where the report goes; all else goes beside it, by the same name."""


Benchmark = Annotated[Paper, tyro.conf.subcommand("paper")] | Annotated[None, tyro.conf.Suppress]


@dataclass(frozen=True)
class Methods:
    """Lists every method with its settings, what travels each way, and its source."""


@dataclass(frozen=True)
class Bench:
    """Sweeps of many runs that go on where they were broken off."""

    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Benchmark]]


@dataclass(frozen=True)
class Health:
    """Asks a server whether it takes clients; a line, and 0 or 1, for containers and their orchestrators."""

    server: str = "localhost:50051"
    """The server's host:port."""
    certs: Path | None = None
    """A client's folder of certificate and key, where the server has certificates."""
    alive: bool = False
    """Any answer will do, also that it takes no clients now: it need not be started again."""
    patience: float = 5.0
    """Seconds to wait for an answer."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Cuts, tyro.conf.subcommand("cuts")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[certs.Certs, tyro.conf.subcommand("certs")]
    | Annotated[Health, tyro.conf.subcommand("health")]
)


def main() -> None:
    cli.prepare()
    sys.exit(cli.run_to_the_end(PROGRAM, lambda: _main(sys.argv[1:])))


def _main(arguments: list[str]) -> int:
    console = Console()
    command = tyro.cli(Command, prog=PROGRAM, description=DESCRIPTION, args=cli.flags(arguments))
    if isinstance(command, Demo):
        demo(command, console)
        return 0
    if isinstance(command, Methods):
        from dsl_lab import methods  # imports torch

        methods.show(console)
        return 0
    if isinstance(command, Cuts):
        cuts(command, console)
        return 0
    if isinstance(command, Doctor):
        return 0 if doctor(command, console) else 1
    if isinstance(command, Export):
        export(command, console)
        return 0
    if isinstance(command, Evaluate):
        evaluate(command, console)
        return 0
    if isinstance(command, certs.Certs):
        certs.run(command.command)
        return 0
    if isinstance(command, Health):
        return _health(command)
    if isinstance(command, Bench):
        assert command.command is not None, "tyro asks for one"
        paper(command.command, console)
        return 0
    return _report(command, console)


def _health(options: Health) -> int:
    from dsl_lab.health import health  # imports grpc

    try:
        print(health(options.server, options.certs, options.patience, options.alive))
    except SplitLearningError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1  # whatever it was: to Docker 2 means nothing
    return 0


def _report(options: Report, console: Console) -> int:
    from dsl_lab import report, runs, table

    if not options.folders:
        raise ConfigError("dsl report needs at least one run folder, such as runs/*-server")
    finished = [run for folder in options.folders for run in runs.find(folder)]
    table.show(finished, console)
    path, *others = report.publish(finished, options.out)
    console.print(f"{path} and {len(others)} tables and figures beside it", soft_wrap=True)
    return 0


if __name__ == "__main__":
    main()
