"""What trackers are told, read back, equals metrics.jsonl; what a tracker does never ends the run."""

import importlib.util
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.run import Run
from dsl_server import terminal, trackers
from dsl_server.metrics import metrics_of
from dsl_server.server import Server
from dsl_server.trackers import MLflow, TensorBoard, Tracker, Tracking, numbers_of, settings_of
from tests.federation import Batches, federation, small_run
from tests.programs import programs, refuses
from tests.views import line, view

pytestmark = pytest.mark.timeout(60)

Told = dict[int, dict[str, float]]  # by epoch: numbers by name


def read_back(folder: Path) -> Told:
    """What event files have, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    events.Reload()
    told: Told = {}
    for name in events.Tags()["tensors"]:
        if name.startswith("_hparams_/"):
            continue
        for event in events.Tensors(name):
            told.setdefault(event.step, {})[name] = float(make_ndarray(event.tensor_proto))
    return told


def settings_in(folder: Path) -> dict[str, str]:
    """The hyperparameters that event files have."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    known = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.string_value for name, value in known.items()}


def told_by(folder: Path) -> Told:
    lines = [json.loads(line) for line in (folder / "server/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    return {line["epoch"]: numbers_of(line) for line in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    folder = tmp_path_factory.mktemp("run")
    run = small_run(clients=2, epochs=3)
    server, *_ = federation(run, folder, [Batches(run, seed, 20) for seed in range(2)])
    return server, folder


def track(tracker: Tracker, server: Server) -> list[str]:
    """What it says of its troubles."""
    troubles: list[str] = []
    Tracking(tracker, "a name", server.run, server.watch.view, troubles.append).stop()
    return troubles


def test_event_files_equal_the_metrics(finished: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = finished
    assert track(TensorBoard(tmp_path / "tb", goes_on=False), server) == []
    assert settings_in(tmp_path / "tb") == settings_of(server.run)
    told = read_back(tmp_path / "tb")
    assert told == told_by(folder)
    assert told[3].keys() == {
        "seconds",
        "samples_trained",
        "train/loss",
        "train/client_loss",
        "test/accuracy",
        "test/loss",
        "test/client_only_accuracy",
        "wire/up",
        "wire/down",
    }


def test_a_process_that_goes_on_replaces_what_was_there(
    finished: tuple[Server, Path], tmp_path: Path
) -> None:
    """Lines that came after the checkpoint come again, and may be others."""
    server, folder = finished
    before = TensorBoard(tmp_path / "tb", goes_on=False)
    before.begin("a name", {})
    for epoch in range(1, 9):
        before.add(epoch, {"test/accuracy": 0.01 * epoch, "test/loss": 9.0})
    before.end(finished=False)
    assert track(TensorBoard(tmp_path / "tb", goes_on=True), server) == []
    assert read_back(tmp_path / "tb") == told_by(folder)


def test_a_folder_with_another_run_is_refused(finished: tuple[Server, Path], tmp_path: Path) -> None:
    track(TensorBoard(tmp_path / "tb", goes_on=False), finished[0])
    with pytest.raises(ConfigError, match="tb holds a run already; choose another folder"):
        TensorBoard(tmp_path / "tb", goes_on=False)


@pytest.mark.filterwarnings("ignore")  # of mlflow's own code
def test_mlflow_has_the_metrics_and_the_settings(finished: tuple[Server, Path], tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    from mlflow.tracking import MlflowClient

    server, folder = finished
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):  # the second finds the experiment
        assert track(MLflow(uri), server) == []
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("decoupled-split-learning")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    for run in runs:
        told: Told = {}
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                told.setdefault(metric.step, {})[name] = metric.value
        assert told == told_by(folder)
        assert run.data.params == settings_of(server.run)
        assert (run.info.run_name, run.info.status) == ("a name", "FINISHED")


class Failing:
    """Fails in its second line, then in every one."""

    flag = "--failing"

    def __init__(self) -> None:
        self.lines = 0

    def begin(self, name: str, settings: Mapping[str, str]) -> None: ...

    def add(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self.lines += 1
        if self.lines > 1:
            raise RuntimeError("no route\nto the tracker")

    def end(self, finished: bool) -> None:
        raise AssertionError("it has failed")


def test_a_tracker_that_fails_says_so_once_and_is_asked_no_more(finished: tuple[Server, Path]) -> None:
    failing = Failing()
    said = ["--failing: RuntimeError: no route to the tracker; the run goes on without it"]
    assert track(failing, finished[0]) == said
    assert failing.lines == 2


class Hanging(Failing):
    flag = "--hanging"

    def add(self, epoch: int, numbers: Mapping[str, float]) -> None:
        threading.Event().wait(30)


def test_a_tracker_that_hangs_is_left_behind(
    finished: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "LAST_S", 0.1)
    said = ["--hanging: took too long; it may not have everything"]
    assert track(Hanging(), finished[0]) == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--tensorboard", "tb"],
            "--tensorboard needs tensorboard: pip install 'decoupled-split-learning[tensorboard]'",
        ),
        (["--mlflow", "sqlite:///m.db"], "--mlflow needs mlflow: pip install mlflow-skinny (or mlflow)"),
    ],
)
def test_what_is_to_be_installed_is_told(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    from dsl_server.__main__ import _main

    with pytest.raises(ConfigError) as refused:
        _main([*flags, "--out", str(tmp_path / "out")])
    assert str(refused.value) == said
    assert not (tmp_path / "out").exists(), "nothing was begun"


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed here")
def test_the_program_says_it_in_a_line(tmp_path: Path) -> None:
    with programs(tmp_path) as start:
        said = refuses(start("dsl-server", "--mlflow", "sqlite:///m.db"))
    assert said == "dsl-server: error: --mlflow needs mlflow: pip install mlflow-skinny (or mlflow)\n"


def test_settings_are_told_as_one_would_say_them() -> None:
    told = settings_of(Run(method_arg=("alpha=1", "phi=2"), lr=0.5))
    assert (told["method_arg"], told["lr"], told["image"], told["augment"]) == (
        "alpha=1 phi=2",
        "0.5",
        "",
        "True",
    )


def test_a_lines_numbers_are_those_that_it_has() -> None:
    line = {
        "epoch": 2,
        "seconds": 1.5,
        "train": {"loss": None, "client_loss": float("nan")},
        "wire": {"up": 7},
    }
    assert numbers_of(line) == {"seconds": 1.5, "wire/up": 7}


def test_a_metric_of_the_runs_own_is_told_everywhere_by_its_name() -> None:
    told = {"name": "mypackage.goals:mae", "joined": 1.25, "client_only": 2.5}
    lines = (line(1, accuracy=None, metric=told),)
    now = view(lines=lines, metric="mae")
    assert numbers_of(lines[0])["test/metric/joined"] == 1.25
    families = {family.name: family for family in metrics_of(now, "dsl-server")}
    scores = {sample.labels["of"]: sample.value for sample in families["dsl_test_metric"].samples}
    assert scores == {"joined": 1.25, "client_only": 2.5}
    assert "dsl_test_accuracy" not in {
        sample.name for family in families.values() for sample in family.samples
    }
    assert "mae 1.250" in terminal.line_of(now)
