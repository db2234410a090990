"""Many experiments one after another, each made of real processes; what has finished is not repeated.

Knows when a run has finished, how far the one under way is and how long the rest may take, but not what
the runs are about.
"""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.cli import Stopped
from common.errors import ConfigError
from common.rundir import Held
from dsl_lab.launch import LOCAL, Engine, Experiment, LaunchError, launch
from dsl_lab.runs import FinishedRun, read
from dsl_lab.table import percent


def sweep(experiments: Sequence[Experiment], folder: Path, console: Console, engine: Engine = LOCAL) -> None:
    """Runs those that have not finished; one that was broken off is made anew.

    folder: has them all, and is this process's as long as it runs. engine: where the clients run.

    Raises LaunchError where a run failed: at once if it is the first, else when the others have run;
    ConfigError where a run in the folder has other settings, or the engine has no room for the clients.
    """
    held = Held(folder, "--out")
    try:
        done = [experiment for experiment in experiments if finished(experiment)]
        todo = [experiment for experiment in experiments if experiment not in done]
        console.print(f"{folder}: {len(experiments)} runs, {len(done)} of them finished", soft_wrap=True)
        taken = [read(experiment.server_folder).summary.seconds.wall for experiment in done]
        with _Line(console, len(experiments), taken) as line:
            failed = [experiment.out.name for experiment in todo if not _run(experiment, line, engine)]
    except Stopped:
        console.print("What has finished is kept: the same command goes on.")
        raise
    finally:
        held.release()
    if failed:
        raise LaunchError(f"{len(failed)} of {len(todo)} runs failed ({', '.join(failed)}): call it again")


def finished(experiment: Experiment) -> bool:
    """Whether all of its processes came to their end. Raises ConfigError where it was another run."""
    clients = [experiment.out / f"client-{index}" for index in range(experiment.clients)]
    if not all((path / "summary.json").exists() for path in (experiment.server_folder, *clients)):
        return False
    has = read(experiment.server_folder).about.run
    for key, wanted in json.loads(json.dumps(experiment.settings)).items():
        if wanted not in ("auto", has.get(key)):  # the run has what `auto` has become
            flag = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{experiment.out} holds a run with {flag} {has.get(key)}, not {wanted}: choose another --out"
            )
    return True


def time_left(taken: Sequence[float], so_far: float, part: float, others: int) -> float | None:
    """Seconds until all is done; None while nothing is known.

    taken: the seconds of finished runs. so_far, part: of the one under way, its seconds and how much of it
    is done (0 to 1). others: how many come after it.
    """
    if not taken and not part:
        return None
    each = statistics.fmean(taken) if taken else so_far / part
    return max(0.0, each - so_far) + each * others


def in_words(seconds: float | None) -> str:
    """For example `40 s`, `12 min`, `3 h 20 min`."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Line:
    """A live line of how far the sweep is, and above it one that stays for each run."""

    def __init__(self, console: Console, count: int, taken: Sequence[float]) -> None:
        self.taken = list(taken)
        self._console, self._count, self._ended = console, count, len(taken)
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left  {task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=count, completed=self._ended, left="–")

    def __enter__(self) -> "_Line":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, experiment: Experiment, seconds: float) -> None:
        epochs, of = _epochs(experiment)
        left = time_left(self.taken, seconds, epochs / of, self._count - self._ended - 1)
        where = f"{experiment.out.name}, epoch {epochs}/{of}"
        self._bar.update(self._task, description=where, left=in_words(left))

    def ended(self, experiment: Experiment, seconds: float, result: str) -> None:
        self._ended += 1
        left = time_left(self.taken, 0.0, 0.0, self._count - self._ended - 1)
        self._bar.update(self._task, completed=self._ended)
        also = f", about {in_words(left)} left" if left and self._ended < self._count else ""
        place = f"{self._ended}/{self._count}"
        self._console.print(
            f"{place}  {experiment.out.name}: {result}, {in_words(seconds)}{also}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _run(experiment: Experiment, line: _Line, engine: Engine) -> bool:
    """Whether it came to its end. Raises LaunchError where the first one does not."""
    _remove(experiment)
    start = time.monotonic()
    try:
        launch(experiment, lambda: line.show(experiment, time.monotonic() - start), engine)
    except LaunchError as error:
        if not line.taken:
            raise
        line.ended(experiment, time.monotonic() - start, f"failed: {error}")
        return False
    seconds = time.monotonic() - start
    line.taken.append(seconds)
    line.ended(experiment, seconds, _result(read(experiment.server_folder)))
    return True


def _result(run: FinishedRun) -> str:
    up, down = run.payload_up / 1e6, run.payload_down / 1e6
    return f"accuracy {percent(run.summary.test.accuracy)}, {up:,.0f} MB up, {down:,.0f} MB down"


def _epochs(experiment: Experiment) -> tuple[int, int]:
    """How many are done, and of how many."""
    metrics, of = experiment.server_folder / "metrics.jsonl", experiment.settings["epochs"]
    assert isinstance(of, int), "a whole number, like --epochs"
    return metrics.read_text().count("\n") if metrics.exists() else 0, of


def _remove(experiment: Experiment) -> None:
    """What was broken off. Raises ConfigError where something else lies there."""
    if not experiment.out.exists():
        return
    strange = [
        path.name for path in experiment.out.iterdir() if not path.name.startswith(("server", "client-"))
    ]
    if strange:
        raise ConfigError(f"{experiment.out} holds {strange[0]}, which is of no run: choose another --out")
    shutil.rmtree(experiment.out)
