"""Every method by its name. Each has a file of its own that holds both halves and its citation."""

from collections.abc import Callable, Mapping

from common.errors import ConfigError
from common.methods.base import Method
from common.methods.csl import csl
from common.methods.dsl import dsl

METHODS: Mapping[str, Callable[[], Method]] = {"dsl": dsl, "csl": csl}


def build_method(name: str) -> Method:
    """Raises ConfigError when there is no method of that name."""
    if name not in METHODS:
        raise ConfigError(f"--method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]()
