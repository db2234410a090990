"""`dsl doctor`: why a client cannot reach its server, or is slow; and what to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError

if TYPE_CHECKING:
    from dsl_lab.checks import Finding

_WIDEST = len("certificate")
_MARKS = {"ok": ("✓", "green"), "failed": ("✗", "bold red"), "skipped": ("–", "dim")}


@dataclass(frozen=True)
class Doctor:
    """Looks at what lies between a client and its server: says what is wrong, and what to do."""

    server: str = "127.0.0.1:50051"
    """The server's host:port."""
    certs: Path | None = None
    """This client's folder of certificate and key, made by dsl certs client."""
    insecure: bool = False
    """Another machine without --certs: nothing is encrypted."""


def doctor(options: Doctor, console: Console) -> bool:
    """Prints each check as it is made. Whether none failed. Raises ConfigError."""
    if options.certs and options.insecure:
        raise ConfigError("--certs and --insecure exclude each other: leave one out")
    from dsl_lab.checks import Patient, examine  # imports grpc

    findings: list[Finding] = []
    with console.status(Text(f"looking at {options.server}")):
        for finding in examine(Patient(options.server, options.certs, options.insecure)):
            findings.append(finding)
            _print(finding, console)
    failed = [finding for finding in findings if finding.state == "failed"]
    console.print(Text(_verdict(options.server, failed, findings), style="bold"), soft_wrap=True)
    return not failed


def _print(finding: "Finding", console: Console) -> None:
    """As columns on a terminal, as lines elsewhere."""
    mark, style = _MARKS[finding.state]
    found, remedy = _plain(finding.found), _plain(finding.remedy)
    if not console.is_terminal:
        lines = [f"{finding.state}\t{finding.check}\t{found}"]
        lines += [f"\t\t-> {remedy}"] if remedy else []
        console.print("\n".join(lines).expandtabs(12), soft_wrap=True, markup=False, highlight=False)
        return
    row = Table.grid(padding=(0, 1))
    row.add_column(width=9, no_wrap=True)
    row.add_column(width=_WIDEST, no_wrap=True)
    row.add_column(overflow="fold")
    quiet = "dim" if finding.state == "skipped" else ""
    row.add_row(
        Text(f"{mark} {finding.state}", style=style),
        Text(finding.check, style=quiet or "bold"),
        Text(found, style=quiet),
    )
    if remedy:
        row.add_row("", "", Text(f"→ {remedy}", style="yellow" if finding.state == "failed" else ""))
    console.print(row, highlight=False)


def _plain(text: str) -> str:
    """Some of it is what a server says, which may be anything."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _verdict(server: str, failed: "list[Finding]", findings: "list[Finding]") -> str:
    if failed:
        return f"{server}: {failed[0].check} is what is wrong{' first' if len(failed) > 1 else ''}"
    left = [finding.check for finding in findings if finding.state == "skipped"]
    if "version" in left:
        return f"{server}: nothing is wrong that can be seen; skipped: {', '.join(left)}"
    return f"{server}: all is well"
