"""The name by which a function can be imported: networks and losses are by name, and code never travels."""

import sys
from collections.abc import Callable
from typing import Any

from common.errors import ConfigError

Function = str | Callable[..., Any]


def name_of(what: str, function: Function) -> str:
    """`package.module:function`; a string is taken as it is. what: the argument that it was given as.

    Raises ConfigError where it has no such name.
    """
    if isinstance(function, str):
        return function
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    if module is None or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError(
            f"{what}={name}: has no name to import it by; define it with def at the top of a module or a "
            "notebook's cell"
        )
    return f"{module}:{name}"


def check_importable_elsewhere(what: str, function: str) -> None:
    """Raises ConfigError for what only this process has."""
    if function.startswith("__main__:"):
        name = function.partition(":")[2]
        raise ConfigError(
            f"{what}={name}: other processes cannot import what this script or notebook defines; put it into "
            f"a file, such as mine.py, and say {what}='mine:{name}', or leave out processes=True"
        )
