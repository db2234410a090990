"""Writes docs/settings.md: every flag of the three programs, read from the classes that they are made of."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
TOP = """# Settings

Written by `python tools/settings.py` from the programs themselves; `--help` of each says the same. A flag of
yes or no has a `--no-` form. Settings of the run can stand in a file, by the same names: `dsl-server --config
run.toml`; flags win, and `dsl-server --print-config` writes one.
"""
# Heading, what is said first, and the classes whose fields are the flags.
SECTIONS = (
    (
        "dsl-server: the run",
        "The server owns the run; clients are told of it when they join.",
        "common.run:Run",
    ),
    ("dsl-server: the process", "", "dsl_server.__main__:Options"),
    ("dsl-client", "", "dsl_client.__main__:Options"),
    ("dsl demo", "", "dsl_lab.demo:Demo"),
    ("dsl bench paper", "", "dsl_lab.paper:Paper"),
    ("dsl bench paper: where the clients run", "", "dsl_lab.engines:Where"),
    ("dsl report", "", "dsl_lab.__main__:Report"),
    ("dsl methods", "", "dsl_lab.__main__:Methods"),
    ("dsl cuts", "", "dsl_lab.cuts:Cuts"),
    ("dsl doctor", "", "dsl_lab.doctor:Doctor"),
    ("dsl certs init", "", "dsl_lab.certs:Init"),
    ("dsl certs client", "", "dsl_lab.certs:Client"),
    ("dsl certs list", "", "dsl_lab.certs:List"),
    ("dsl certs revoke", "", "dsl_lab.certs:Revoke"),
)
COMPLETION = """
## Completion

Each program prints a script by which a shell completes its flags, their choices and its commands:

```
source <(dsl-server --print-completion bash)                                    # in ~/.bashrc
dsl-server --print-completion zsh > ~/.zfunc/_dsl-server                        # a folder of fpath
dsl-server --print-completion fish > ~/.config/fish/completions/dsl-server.fish
```

`dsl-client` and `dsl` likewise.
"""


def page() -> str:
    """The whole page."""
    return TOP + "".join(_section(*section) for section in SECTIONS) + COMPLETION


def _section(heading: str, first: str, where: str) -> str:
    module, _, name = where.partition(":")
    kind = getattr(importlib.import_module(module), name)
    said = first or " ".join((kind.__doc__ or "").split())
    said = "" if said.startswith(f"{name}(") else f"{said}\n\n"  # dataclass's own
    rows = "".join(f"| {flag} | {default} | {doc} |\n" for flag, default, doc in _flags(kind))
    table = f"| flag | default | |\n|---|---|---|\n{rows}" if rows else ""
    return f"\n## {heading}\n\n{said}{table}".rstrip() + "\n"


def _flags(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """A flag as it is typed, its default, and what is said of it; each fit for a table."""
    docs, hints = _docs(kind), typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if field.name in ("run", "where"):
            continue  # its fields are flags, in a section of their own
        doc = " ".join(docs[field.name].split()).replace("|", "\\|").replace("<", "&lt;")
        doc = re.sub(r"docs/(\w+[.]md)", r"[\g<0>](\1)", doc)
        flag = f"`--{field.name.replace('_', '-')}`"
        if "Positional" in str(hints[field.name]):
            flag = f"`{field.name.upper()}`"
        choices = _choices(hints[field.name])
        flag += f" {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""
        yield flag, _default(field), doc


def _choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "must be said"
    value = field.default
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in ("", None) else "none"


def _docs(kind: type[Any]) -> dict[str, str]:
    """The string under each field."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: str(after.value.value)
        for field, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/settings.md"
    out.write_text(page())
