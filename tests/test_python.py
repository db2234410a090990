"""What `import dsl` has: a federation in threads as in processes, a server, a client; and nothing is left."""

import gc
import inspect
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsl
from dsl_client.batches import normalise
from dsl_client.data import load
from tests import networks
from tests.federation import small_run
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(200)  # three of these start processes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python.md"


def skip_run(**settings: Any) -> dsl.Run:
    """A network by name, six batches an epoch at each of two clients, in fixed order."""
    small = {"model": "tests.networks:skip", "split": "m", "cut": "second", "clients": 2, "fixed_order": True}
    return small_run(**{**small, "partition": "own", **settings})


def arrays(seed: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3), np.uint8), rng.integers(0, 4, count)


class Records(torch.utils.data.Dataset[Any]):
    """A hospital's own: images (C, H, W) and labels."""

    def __init__(self, seed: int, count: int, broken: bool = False) -> None:
        self._images, self._labels = arrays(seed, count)
        self._broken = broken

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._broken:
            raise LookupError("record 17 is not in the archive")
        return torch.from_numpy(self._images[index]).permute(2, 0, 1), int(self._labels[index])


def pair(client: int) -> tuple[Records, Records]:
    return Records(client, 44), Records(9, 20)


def npz(folder: Path, client: int) -> str:
    """The same, as a file."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    file = folder / f"{client}.npz"
    values = [*arrays(client, 44), *arrays(9, 20)]
    np.savez(file, **dict(zip(names, values, strict=True)))
    return f"npz:{file}"


def quiet(run: dsl.Run, out: Path, **also: Any) -> dsl.Results:
    return dsl.train(run, data=[pair(0), pair(1)], out=out, progress=False, **also)


def same_weights(one: dsl.Results, other: dsl.Results, within: float = 0.0) -> bool:
    ours, theirs = one.state_dict(1), other.state_dict(1)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=0.0, atol=within) for name in ours
    )


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No thread that was not there before, and no process."""
    before = set(threading.enumerate())
    yield
    wait_for(lambda: set(threading.enumerate()) <= before)  # gRPC's end a moment later
    assert children() == []


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# ---------------------------------------------------------------- what there is


def test_all_is_what_there_is() -> None:
    there: dict[str, Any] = {}
    exec("from dsl import *", there)
    assert set(there) - {"__builtins__"} == set(dsl.__all__)
    assert sorted(dsl.__all__) == sorted(set(dsl.__all__))
    mechanics = {"Any", "TYPE_CHECKING", "import_module", "cli"}
    own = {
        name for name, value in vars(dsl).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert own - mechanics <= set(dsl.__all__)


def test_every_name_is_in_the_page_and_no_other() -> None:
    text = PAGE.read_text()
    headed = set(re.findall(r"^#+ `dsl\.(\w+)", text, re.M)) | set(
        re.findall(r"^\| `dsl\.(\w+)`", text, re.M)
    )
    assert headed == set(dsl.__all__)
    assert set(re.findall(r"\bdsl\.([A-Za-z]\w*)", text)) <= set(dsl.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'dsl' has no attribute 'Serve'"):
        _ = dsl.Serve  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Server", "Client", "train", "compare", "cuts"])
def test_every_argument_is_in_the_page(name: str) -> None:
    """By its name and with its default."""
    text = PAGE.read_text()
    for parameter in inspect.signature(getattr(dsl, name)).parameters.values():
        default = parameter.default
        said = parameter.name if default is inspect.Parameter.empty else f"{parameter.name}={default!r}"
        assert said.replace("'", '"') in text, said


# ---------------------------------------------------------------- a federation


@pytest.mark.usefixtures("nothing_left")
def test_threads_come_to_what_processes_come_to_bit_for_bit(tmp_path: Path) -> None:
    run = skip_run(sync="average")
    sources = [npz(tmp_path, client) for client in (0, 1)]
    threads = dsl.train(run, data=sources, out=tmp_path / "threads", progress=False)
    lines: list[dsl.Evaluation] = []
    processes = dsl.train(
        run, data=sources, out=tmp_path / "p", processes=True, progress=False, on_line=lines.append
    )
    objects = quiet(run, tmp_path / "objects")
    for other in (processes, objects):
        assert [line.test for line in other.evaluations] == [line.test for line in threads.evaluations]
        assert [line.train for line in other.evaluations] == [line.train for line in threads.evaluations]
        assert same_weights(threads, other)
        assert (other.bytes_up, other.bytes_down) == (threads.bytes_up, threads.bytes_down)
    assert tuple(lines) == processes.evaluations
    assert processes.summary.peak_bytes.client > 0
    assert threads.summary.peak_bytes.client == 0  # of nobody alone
    assert dsl.read(tmp_path / "threads") == dsl.read(tmp_path / "threads" / "server") == threads


@pytest.mark.usefixtures("nothing_left")
def test_results_are_those_of_the_joined_network(tmp_path: Path) -> None:
    """Its weights put into the network as its function builds it, and that scored by hand."""
    run = skip_run(sync="average", partition="iid")
    source = npz(tmp_path, 3)
    lines: list[dsl.Evaluation] = []
    results = dsl.train(run, data=source, out=tmp_path / "out", on_line=lines.append, progress=False)
    assert tuple(lines) == results.evaluations
    assert [line.epoch for line in lines] == [1, 2]
    network = networks.skip()
    network.load_state_dict(results.state_dict())
    _, test = load(source, run.image_shape, run.class_count)
    with torch.no_grad():
        right = (network.eval()(normalise(test.inputs)).argmax(1) == test.labels).sum()
    assert results.accuracy == int(right) / 20
    assert results.run == replace(run, data=source)
    assert results.bytes_up == 2 * 44 * (2 * 4 * 8 * 8 * 4 + 1)  # epochs, images; maps of floats, a label
    assert results.bytes_down == 0
    assert f"{results.accuracy:.2%}" in results._repr_html_()
    with pytest.raises(dsl.ConfigError, match=r"client-2.*is not there: a client's part is where"):
        results.state_dict(2)


def test_a_function_is_a_network(tmp_path: Path) -> None:
    by_function = quiet(skip_run(model="resnet20"), tmp_path / "function", model=networks.skip)
    assert by_function.run.model == "tests.networks:skip"
    assert same_weights(by_function, quiet(skip_run(), tmp_path / "name"))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("settings", [{}, {"model": "resnet8", "cut": ""}], ids=["by name", "resnet"])
def test_one_after_the_other_and_two_at_once_come_to_the_same(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """To the last bit only if neither is of a network by name: while torch.export follows such a one, it has
    all threads of the process compute without oneDNN."""
    runs = [skip_run(seed=seed, **settings) for seed in (0, 1)]
    alone = [quiet(run, tmp_path / f"alone-{run.seed}") for run in runs]
    both = [in_thread(quiet, run, tmp_path / f"both-{run.seed}") for run in runs]
    for one, other in zip(alone, both, strict=True):
        assert same_weights(one, other.result(timeout=60), within=0.0 if settings else 1e-6)
    assert not same_weights(*alone, within=1e-3)


def test_nothing_is_left_and_what_was_borrowed_is_back(tmp_path: Path) -> None:
    quiet(skip_run(epochs=1), tmp_path / "first")  # what is made once a process: gRPC's own
    torch.manual_seed(5)
    expected = torch.rand(1)
    threads, files = set(threading.enumerate()), descriptors()
    torch.manual_seed(5)
    for number in range(2):
        quiet(skip_run(epochs=1, method="csl"), tmp_path / f"next-{number}")
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == 1
    assert set(threading.enumerate()) <= threads
    wait_for(lambda: descriptors() <= files)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_or_not(progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dsl.train(skip_run(epochs=1), data=[pair(0), pair(1)], out=tmp_path / "out", progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    words = re.compile(
        r"dsl: dsl on tests.networks:skip cut at second  finished: accuracy 0\.\d+ \(alone .*\n"
    )
    assert bool(words.search(shown.err)) == progress
    assert progress or shown.err == ""


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        (
            {},
            {"model": lambda: nn.Linear(1, 1)},
            "model=.*lambda.*: has no name to import it by; define it with",
        ),
        ({}, {"model": nn.Linear(1, 1)}, "model=Linear: has no name to import it by"),
        ({}, {"data": ["sample"]}, "data: 1 sources for 2 clients; give a list with one for each"),
        ({"partition": "iid"}, {"data": ["sample"] * 2}, "say partition='own', or give one for all"),
        ({}, {"data": "smple"}, "unknown data source 'smple'; did you mean sample"),
        (
            {},
            {"data": (Records(0, 5), Records(0, 5)), "processes": True},
            "data: other processes have not what",
        ),
        (
            {"model": "__main__:mine"},
            {"processes": True},
            "model=mine: other processes cannot import what this",
        ),
        ({"cut": "secnd"}, {}, "--cut 'secnd': .* near it are second"),
        (
            {"classes": 2, "model": "resnet8", "cut": "", "split": "1"},
            {},
            "the data given has 4 classes but the run has 2",
        ),
        (
            {"image": (3, 4, 4), "model": "resnet8", "cut": "", "split": "1"},
            {},
            "the images are 3x8x8 but the run",
        ),
        ({"method": "dls"}, {}, "--method 'dls': choose from dsl"),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_what_cannot_be_is_refused_in_one_line(
    settings: dict[str, Any], arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {"data": [pair(0), pair(1)], "out": tmp_path / "out", "progress": False, **arguments}
    with pytest.raises(dsl.ConfigError, match=words) as refused:
        dsl.train(skip_run(**settings), **given)
    assert len(str(refused.value).splitlines()) == 1


def test_a_run_that_could_not_begin_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(dsl.ConfigError, match="--cut 'secnd'"):
        quiet(skip_run(cut="secnd"), tmp_path / "out")
    quiet(skip_run(epochs=1), tmp_path / "out")
    with pytest.raises(dsl.ConfigError, match="holds a run already; choose another folder"):
        quiet(skip_run(epochs=1), tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_an_error_of_a_clients_data_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(dsl.ConfigError, match="LookupError: record 17 is not in the archive"):
        dsl.train(
            skip_run(),
            data=[pair(0), (Records(0, 44, broken=True), Records(9, 20))],
            out=tmp_path,
            progress=False,
        )
    audit = (tmp_path / "server" / "audit.jsonl").read_text()
    assert "LookupError" in audit  # the server is told what it is called
    assert "record 17" not in audit  # and not its words, which may be about the data


@pytest.mark.parametrize(
    ("method", "who"), [("dsl", "server's step|client's loss|what the client"), ("csl", "step")]
)
@pytest.mark.usefixtures("nothing_left")
def test_a_step_that_fails_is_a_step_error(method: str, who: str, tmp_path: Path) -> None:
    with pytest.raises(dsl.StepError, match=who):
        quiet(skip_run(method=method, lr=1e30, warmup=0.0, epochs=4), tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_a_run_in_processes_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(dsl.LaunchError, match=r"error: .*unknown data source 'smple'.*\(logs in "):
        dsl.train(skip_run(clients=1), data="smple", out=tmp_path, processes=True, progress=False)


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_ends_all_of_it(processes: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = skip_run(epochs=500, clients=1)
    # Else a shell that began the tests in the background has said that it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        dsl.train(
            run,
            data=npz(tmp_path, 0),
            out=tmp_path / "out",
            processes=processes,
            progress=False,
            on_line=lambda _: signal.raise_signal(signal.SIGINT),
        )
    assert (tmp_path / "out" / "server" / "metrics.jsonl").read_text().count("\n") < 500


def test_an_error_of_the_callers_own_ends_it_too(tmp_path: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def early(line: dsl.Evaluation) -> None:
        raise Enough(line.epoch)

    with pytest.raises(Enough, match="1"):
        quiet(skip_run(epochs=500), tmp_path / "out", on_line=early)


# ---------------------------------------------------------------- a server, a client


@pytest.mark.usefixtures("nothing_left")
def test_a_server_and_a_client_by_themselves(tmp_path: Path) -> None:
    steps: list[dsl.Step] = []
    scores: list[dsl.Scored] = []
    with dsl.Server(skip_run(clients=1), "127.0.0.1:0", out=tmp_path / "server") as server:
        with pytest.raises(TimeoutError, match=r"not finished after 0\.1 s"):
            server.wait(timeout=0.1)
        with dsl.Client(
            server.address, data=pair(0), allow=networks.skip, out=tmp_path / "client-0"
        ) as client:
            assert client.index == -1
            assert client.join() == server.run
            assert client.train(steps.append, scores.append) == tmp_path / "client-0"
            assert client.index == 0
        with pytest.raises(dsl.ClosedError, match="this client has left its run; make another"):
            client.train()
        results = server.wait()
        assert list(server.lines()) == list(results.evaluations)
    assert [(step.epoch, step.batch, step.batches) for step in steps] == [
        (e, b, 6) for e in (0, 1) for b in range(1, 7)
    ]
    assert [score.accuracy for score in scores] == [line.test.accuracy for line in results.evaluations]
    assert set(results.state_dict()) == set(networks.skip().state_dict())


@pytest.mark.usefixtures("nothing_left")
def test_a_client_may_be_stopped_from_another_thread(tmp_path: Path) -> None:
    begun = threading.Event()
    with dsl.Server(skip_run(epochs=500, clients=1), "127.0.0.1:0", out=tmp_path / "server") as server:
        client = dsl.Client(server.address, data=pair(0), allow=networks.skip, out=tmp_path / "client")
        training = in_thread(client.train, lambda _: begun.set())
        assert begun.wait(30)
        client.stop("the night's hours are over")
        with pytest.raises(dsl.ClosedError, match=r"^the night's hours are over$"):
            training.result(timeout=30)
        with pytest.raises(dsl.ClosedError, match=r"client 0 .*the night's hours are over"):
            server.wait(timeout=30)


@pytest.mark.usefixtures("nothing_left")
def test_a_server_that_stops_tells_why(tmp_path: Path) -> None:
    begun = threading.Event()

    def serve() -> None:
        with dsl.Server(skip_run(epochs=500), "127.0.0.1:0", out=tmp_path / "server") as server:
            ports.append(server.port)
            assert begun.wait(30)
            raise KeyboardInterrupt

    ports: list[int] = []
    serving = in_thread(serve)
    wait_for(lambda: bool(ports))
    client = dsl.Client(f"127.0.0.1:{ports[0]}", data=pair(0), allow=networks.skip, out=tmp_path / "client")
    training = in_thread(client.train, lambda _: begun.set())
    with pytest.raises(KeyboardInterrupt):
        serving.result(timeout=60)
    with pytest.raises(dsl.ClosedError, match=r"the server was stopped \(Ctrl-C\)"):
        training.result(timeout=30)


@pytest.mark.usefixtures("nothing_left")
def test_a_port_in_use_and_a_model_that_was_not_said(tmp_path: Path) -> None:
    with dsl.Server(skip_run(), "127.0.0.1:0", out=tmp_path / "one") as server:
        with pytest.raises(dsl.ConfigError, match=f"--listen 127.0.0.1:{server.port}: cannot be bound"):
            dsl.Server(skip_run(), server.address, out=tmp_path / "two")
        assert not (tmp_path / "two").exists()
        with pytest.raises(dsl.ConfigError, match="it is not for a server to say which code runs here"):
            dsl.Client(server.address, data=pair(0), out=tmp_path / "client").train()
    with pytest.raises(dsl.ConfigError, match=r"resume=.*one: that run's settings are those that it has"):
        dsl.Server(skip_run(), resume=tmp_path / "one")
    with pytest.raises(dsl.ClosedError, match=r"no server at 127.0.0.1:.* within 0\.2 s"):
        dsl.Client(server.address, patience=0.2).join()
    with pytest.raises(dsl.ConfigError, match=r"--listen 0\.0\.0\.0:0.*--insecure"):
        dsl.Server(skip_run(), "0.0.0.0:0", out=tmp_path / "open")


@pytest.mark.usefixtures("nothing_left")
def test_a_run_with_checkpoints_is_drained_and_resumed(tmp_path: Path) -> None:
    run = skip_run(clients=1, epochs=40, checkpoint_every=0.2, deterministic=True)
    first = dsl.Server(run, "127.0.0.1:0", out=tmp_path / "server")
    first.start()
    begun = threading.Event()
    client = dsl.Client(
        first.address, data=pair(0), allow=networks.skip, out=tmp_path / "client-0", patience=60, alone=False
    )
    training = in_thread(client.train, lambda step: begun.set() if step.epoch else None)
    assert begun.wait(30)
    first.drain()
    with dsl.Server(resume=tmp_path / "server", listen=first.address, alone=False) as second:
        assert second.run == first.run
        results = second.wait(timeout=60)
        training.result(timeout=30)
    assert results.evaluations[-1].epoch == 40
    assert results.accuracy == quiet_one(run, tmp_path / "whole").accuracy


def quiet_one(run: dsl.Run, out: Path) -> dsl.Results:
    return dsl.train(replace(run, checkpoint_every=0.0), data=[pair(0)], out=out, progress=False)


# ---------------------------------------------------------------- side by side


def test_runs_are_compared(tmp_path: Path) -> None:
    first = quiet(skip_run(), tmp_path / "first")
    runs = [first, skip_run(seed=1), skip_run(method="csl")]
    comparison = dsl.compare(runs, data=[pair(0), pair(1)], out=tmp_path / "all", progress=False)
    assert [results.run.method for results in comparison] == ["dsl", "dsl", "csl"]
    assert comparison[0] is first
    assert [results.folder for results in comparison[1:]] == [
        tmp_path / "all/02-dsl/server",
        tmp_path / "all/03-csl/server",
    ]
    shown = comparison._repr_html_()
    assert shown.count("<tr>") == 4  # two of heads, one of both seeds, one of CSL
    assert "±" in shown
    assert "peak" not in shown
    assert "skip · cut after second" in shown
    assert "CSL" in str(comparison)
    assert "| CSL |" in comparison.markdown()
    assert comparison.csv().count("\n") == 4
    figure = comparison.figure()
    assert figure.save(tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "CSL" in figure.words
    assert comparison.report(tmp_path / "report.html")[0].exists()
    with pytest.raises(dsl.ConfigError, match="figure 'speed': choose from accuracy, traffic"):
        comparison.figure("speed")
    with pytest.raises(dsl.ConfigError, match="compare: name at least one run"):
        dsl.compare([])


def test_cuts_are_those_of_the_command() -> None:
    cuts = dsl.cuts(networks.skip, (3, 8, 8), classes=4, batch_size=8, link="10Mbit")
    layers = [cut.layer for cut in cuts]
    assert "second" in layers
    assert cuts.best in list(cuts)
    assert str(cuts).count("\n") == len(cuts)
    assert cuts._repr_html_().count("<tr>") == len(cuts) + 1
    with pytest.raises(dsl.ConfigError, match="--link '10 miles': say a rate"):
        dsl.cuts(networks.skip, (3, 8, 8), link="10 miles")
