"""Code of the user's own, by name: package.module:function.

It never travels: who runs it has it installed, or on PYTHONPATH. Knows nothing of what the code is for.
"""

import importlib
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from common.errors import ConfigError

REMEDY = "install it, or put its folder on PYTHONPATH, on both sides"


def is_function(name: str) -> bool:
    """Whether it has the form package.module:function."""
    return re.fullmatch(r"[A-Za-z_]\w*([.]\w+)*:[A-Za-z_]\w*", name) is not None


def function_of(flag: str, name: str, remedy: str = REMEDY) -> Callable[..., Any]:
    """The function of a name of that form. Raises ConfigError, naming the flag and what is missing."""
    source, _, attribute = name.partition(":")
    module = imported(flag, name, source, remedy)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = get_close_matches(attribute, vars(module), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{flag} {name}: {source} has no function {attribute!r}{hint}")
    return function  # type: ignore[no-any-return]


def imported(flag: str, name: str, module: str, remedy: str = REMEDY) -> Any:
    """The module. Raises ConfigError where it is not there, or its code fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{flag} {name}: no module named {error.name!r} here: {remedy}") from error
    except Exception as error:  # code of the module's own
        raise ConfigError(f"{flag} {name}: {module} cannot be imported: {first_words(error)}") from error


def first_words(error: Exception) -> str:
    """The beginning of an error's text, as part of one line."""
    first_line = next(filter(None, str(error).splitlines()), type(error).__name__)
    words = " ".join(first_line.split())
    return words if len(words) <= 160 else f"{words[:160].rstrip()} ..."
