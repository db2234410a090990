"""The run told to experiment trackers: TensorBoard, MLflow. They are told the lines of metrics.jsonl as they
were written, so they cannot disagree with it.

A tracker has a thread of its own, for it may be slow; and may fail, which ends nothing but itself.
"""

import importlib.util
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import ConfigError
from common.run import Run

if TYPE_CHECKING:
    from dsl_server.watch import View

LAST_S = 20.0  # for a tracker to take what is left when the run is over
_POLL_S = 0.5
_EXPERIMENT = "decoupled-split-learning"


class Tracker(Protocol):
    """flag: as the user said it. Each call may raise whatever the tracker's own code raises."""

    flag: str

    def begin(self, name: str, settings: Mapping[str, str]) -> None: ...

    def add(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """What one line says; epoch: from 1."""
        ...

    def end(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files in a folder. Raises ConfigError where tensorboard is missing, or the folder has a run.

    goes_on: what an earlier process wrote there of the same run is replaced.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.flag = f"--tensorboard {folder}"
        _check_installed("--tensorboard", "tensorboard", "'decoupled-split-learning[tensorboard]'")
        if not goes_on and any(folder.glob("events.out.tfevents.*")):
            raise ConfigError(f"{self.flag} holds a run already; choose another folder")
        self._folder = folder

    def begin(self, name: str, settings: Mapping[str, str]) -> None:
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=0)
        described = dict.fromkeys(("test/accuracy", "train/loss", "wire/up"), 0.0)
        about, start, self._over = hparams(dict(settings), described)
        self._file: FileWriter = self._writer._get_file_writer()
        self._file.add_summary(about)
        self._file.add_summary(start)

    def add(self, epoch: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch, new_style=True, double_precision=True)
        self._writer.flush()

    def end(self, finished: bool) -> None:
        if finished:
            self._file.add_summary(self._over)
        self._writer.close()


class MLflow:
    """A run of an MLflow server, or of a local store such as sqlite:///mlflow.db. Raises ConfigError where
    mlflow is missing.

    A process that goes on with a run begins another one there, with all its lines.
    """

    def __init__(self, uri: str) -> None:
        self.flag = f"--mlflow {uri}"
        _check_installed("--mlflow", "mlflow", "mlflow-skinny (or mlflow)")
        self._uri = uri

    def begin(self, name: str, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        known = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(_EXPERIMENT)
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_batch(self._run, params=[Param(name, value) for name, value in settings.items()])

    def add(self, epoch: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, epoch) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


class Tracking:
    """Keeps a tracker up to date by a thread. name: of the run there. look: at the run, now. on_trouble: told
    once, if it fails."""

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        run: Run,
        look: Callable[[], "View"],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._tracker, self._name, self._run = tracker, name, run
        self._look, self._on_trouble = look, on_trouble
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._track, name="tracker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tells it how the run has ended. A tracker that takes too long is left behind."""
        self._over.set()
        self._thread.join(LAST_S)
        if self._thread.is_alive():
            self._on_trouble(f"{self._tracker.flag}: took too long; it may not have everything")

    def _track(self) -> None:
        try:
            self._tracker.begin(self._name, settings_of(self._run))
            told, over = 0, False
            while not over:
                over = self._over.wait(_POLL_S)
                view = self._look()
                for line in view.lines[told:]:
                    self._tracker.add(line["epoch"], numbers_of(line))
                told = len(view.lines)
            self._tracker.end(view.finished)
        except Exception as error:  # noqa: BLE001  # whatever the tracker's own code raises
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self._on_trouble(f"{self._tracker.flag}: {what[:300]}; the run goes on without it")


def settings_of(run: Run) -> dict[str, str]:
    """Each setting by its name, as one would say it."""
    values = vars(run)
    return {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
        for name, value in values.items()
    }


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's numbers by their path, such as test/accuracy; without those it does not have."""
    return dict(_numbers({name: value for name, value in line.items() if name != "epoch"}, ""))


def _numbers(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):  # a metric has a name, too
            yield f"{above}{name}", value


def _check_installed(flag: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{flag} needs {module}: pip install {package}")
