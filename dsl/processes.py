"""A federation of local processes: the run as flags, and what its processes can import."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from common.errors import ConfigError
from common.methods import settled
from common.run import Run
from dsl.client import Source
from dsl.naming import check_importable_elsewhere
from dsl_lab import launch as local
from dsl_lab.launch import Experiment, Setting


def launch(
    run: Run,
    sources: Sequence[Source | None],
    out: Path,
    device: str,
    threads: int,
    on_wait: Callable[[], None],
) -> None:
    """To its end. Raises ConfigError for what other processes cannot have, LaunchError where one fails."""
    for what, function in (("model", run.model), ("loss", run.loss), ("metric", run.metric)):
        check_importable_elsewhere(what, function)
    settled(run)  # what is wrong with it is told here, and not by a process
    also = []
    for source in sources:
        if not isinstance(source, str | None):
            raise ConfigError(
                "data: other processes have not what this one holds; save it with numpy.savez and say "
                "npz:FILE, or leave out processes=True"
            )
        named = [run.model, run.loss, run.metric, source or run.data]
        also.append([*(["--data", source] if source else []), "--allow", *named])
    experiment = Experiment(
        _settings(run),
        out,
        threads=threads,
        environment={"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        device=device,
        also=also,
        in_order=len(set(sources)) > 1,
    )
    local.launch(experiment, on_wait)


def _settings(run: Run) -> dict[str, Setting]:
    """All that are set."""
    settings = {field.name: getattr(run, field.name) for field in fields(run)}
    return {
        name: tuple(map(str, value)) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value not in (None, "", ())
    }
