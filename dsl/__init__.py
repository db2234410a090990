"""Split learning from Python: the same servers and clients that the commands start, as objects.

    import dsl

    results = dsl.train(dsl.Run(method="dsl", model="resnet8", clients=2, epochs=3))

`docs/python.md` has every name. torch and grpc are imported when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from common import cli
from common.errors import (
    ClosedError,
    ConfigError,
    RefusedError,
    SplitLearningError,
    StepError,
    WireError,
)
from common.run import RECIPES, Run

if TYPE_CHECKING:
    from dsl.client import Client, Scored, Step
    from dsl.comparison import Comparison, compare
    from dsl.federation import train
    from dsl.places import Cuts, cuts
    from dsl.results import Evaluation, Results, read
    from dsl.server import Server
    from dsl_lab.launch import LaunchError

__all__ = [
    "RECIPES",
    "Client",
    "ClosedError",
    "Comparison",
    "ConfigError",
    "Cuts",
    "Evaluation",
    "LaunchError",
    "RefusedError",
    "Results",
    "Run",
    "Scored",
    "Server",
    "SplitLearningError",
    "Step",
    "StepError",
    "WireError",
    "compare",
    "cuts",
    "read",
    "train",
]

_MODULES = {
    "Client": "dsl.client",
    "Scored": "dsl.client",
    "Step": "dsl.client",
    "Comparison": "dsl.comparison",
    "compare": "dsl.comparison",
    "train": "dsl.federation",
    "Cuts": "dsl.places",
    "cuts": "dsl.places",
    "Evaluation": "dsl.results",
    "Results": "dsl.results",
    "read": "dsl.results",
    "Server": "dsl.server",
    "LaunchError": "dsl_lab.launch",
}

cli.prepare()  # grpc and torch read their environment once, when they are imported


def __getattr__(name: str) -> Any:
    """A name whose module is imported only now."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
