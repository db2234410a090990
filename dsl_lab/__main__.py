"""dsl: whole experiments on one machine, made of real server and client processes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from common import cli
from common.errors import ConfigError
from dsl_lab import certs
from dsl_lab.cuts import Cuts, cuts
from dsl_lab.demo import Demo, demo

PROGRAM = "dsl"
DESCRIPTION = "Whole experiments on one machine, made of real dsl-server and dsl-client processes."


@dataclass(frozen=True)
class Report:
    """Turns finished runs into one HTML file with a table and figures."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """The servers' run folders (with run.json, metrics.jsonl and summary.json)."""
    out: Path = Path("report.html")
    """Where the report goes; the figures go beside it as PNG files."""


@dataclass(frozen=True)
class Methods:
    """Lists every method with its settings, what travels each way, and its source."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Cuts, tyro.conf.subcommand("cuts")]
    | Annotated[certs.Certs, tyro.conf.subcommand("certs")]
)


def main() -> None:
    cli.prepare()
    sys.exit(cli.run_to_the_end(PROGRAM, lambda: _main(sys.argv[1:])))


def _main(arguments: list[str]) -> int:
    console = Console()
    command = tyro.cli(Command, prog=PROGRAM, description=DESCRIPTION, args=arguments)
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
    if isinstance(command, certs.Certs):
        certs.run(command.command)
        return 0
    from dsl_lab import figures, report, runs, table

    if not command.folders:
        raise ConfigError("dsl report needs at least one run folder, such as runs/*-server")
    finished = [runs.read(folder) for folder in command.folders]
    table.show(finished, console)
    images = figures.write(finished, command.out.parent / f"{command.out.stem}-figures")
    console.print(f"{report.write(finished, command.out)} and {len(images)} figures", soft_wrap=True)
    return 0


if __name__ == "__main__":
    main()
