"""The name by which a function can be imported: networks are built by name, and code never travels."""

import sys
from collections.abc import Callable
from typing import Any

from common.errors import ConfigError

Model = str | Callable[..., Any]


def name_of(model: Model) -> str:
    """`package.module:function`; a string is taken as it is. Raises ConfigError where it has no such name."""
    if isinstance(model, str):
        return model
    module = getattr(model, "__module__", None)
    name = getattr(model, "__qualname__", type(model).__name__)
    if module is None or getattr(sys.modules.get(module), name, None) is not model:
        raise ConfigError(
            f"model={name}: has no name to import it by; define it with def at the top of a module or a "
            "notebook's cell"
        )
    return f"{module}:{name}"


def check_importable_elsewhere(model: str) -> None:
    """Raises ConfigError for what only this process has."""
    if model.startswith("__main__:"):
        name = model.partition(":")[2]
        raise ConfigError(
            f"model={name}: other processes cannot import what this script or notebook defines; put it into "
            f"a file, such as mymodel.py, and say model='mymodel:{name}', or leave out processes=True"
        )
