"""Every command in the documents, run as it stands there but for what a test cannot have: a host of that
name, a port of that number, a large data set, many epochs.

Processes are forked from one that has imported everything once, or each would take seconds to begin.
"""

import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.documents import OURS, READ, commands
from tests.threads import wait_for

pytestmark = pytest.mark.timeout(120)

FEW = "--train-limit 60 --test-limit 20 --epochs 1 --batch-size 16"
SOME = {"cifar10": "sample", "resnet110": "resnet8"}
CLASSES = ("cat", "dog", "owl", "wolf")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dsl_server.server", "dsl_client.client", "dsl_lab.__main__", __name__])

DOCUMENTED = {shlex.join(words): words for page in READ for words in commands(page)}
# Those that are run by another test, or by none here.
ELSEWHERE = {
    **dict.fromkeys(["dsl bench paper --scale smoke", "dsl bench paper --out smoke"], "a step of CI"),
    "dsl-server --mlflow sqlite:///mlflow.db --clients 2 --data cifar10": "test_trackers.py",
    **{line: "test_ray.py" for line in DOCUMENTED if "--engine ray" in line},
    **{line: "docker/test.sh" for line in DOCUMENTED if "/docker/certs" in line},
    **{line: "test_text_example.py" for line in DOCUMENTED if "examples.text" in line},
    "dsl report runs --out report.html": "test_quickstart.py",
    "dsl report runs/paper-paper --out both.html": "of what takes hours",
    **{line: "takes hours" for line in DOCUMENTED if "--scale cpu" in line},
    **{line: "needs a GPU" for line in DOCUMENTED if "--scale paper" in line},
}
RUN_HERE: set[str] = set()
DONE: set[str] = set()  # tests of this file


def said(start: str) -> str:
    """The one documented command that begins so."""
    RUN_HERE.update(found := [line for line in DOCUMENTED if line.startswith(start)])
    (only,) = found
    return only


def exactly(line: str) -> str:
    """The documented command that is this one."""
    assert line in DOCUMENTED
    RUN_HERE.add(line)
    return line


# ---------------------------------------------------------------- processes


@dataclass
class Process:
    """A program that has begun, with its words in a file."""

    process: "multiprocessing.process.BaseProcess"
    words: Path

    def address(self) -> str:
        """The one in its greeting, here."""
        return "localhost:" + self.told("--server ").split()[0].rpartition(":")[2]

    def told(self, after: str) -> str:
        """What it says after these words, once it has said them."""

        def said() -> bool:
            assert self.process.exitcode is None or after in self.words.read_text(), self.words.read_text()
            return after in self.words.read_text()

        wait_for(said, 60)
        return self.words.read_text().partition(after)[2]

    def ends(self, code: int = 0) -> str:
        self.process.join(90)
        assert self.process.exitcode == code, f"{self.process.exitcode}: {self.words.read_text()}"
        return self.words.read_text()

    def stop(self, number: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)


@dataclass
class Desk:
    """A folder in which commands are typed. swaps: of words, or of parts of them."""

    folder: Path
    swaps: dict[str, str] = field(default_factory=dict)
    begun: list[Process] = field(default_factory=list)

    def start(self, line: str, also: str = "", **swaps: str) -> Process:
        """also: flags after those of the line. swaps: beside the desk's, where their names can be such."""
        every = {"0.0.0.0:50051": "127.0.0.1:0", **SOME, **self.swaps, **swaps}
        words = [_swapped(word, every) for word in DOCUMENTED[line]] + shlex.split(also)
        if words[0] == "dsl-server" and not {"--listen", "--resume", "--print-completion"} & {*words}:
            words += ["--listen", "127.0.0.1:0"]
        log = self.folder / f"{len(self.begun)}.log"
        log.touch()
        process = CONTEXT.Process(target=_become, args=(words, self.folder, log))
        process.start()
        self.begun.append(Process(process, log))
        return self.begun[-1]

    def run(self, line: str, also: str = "", **swaps: str) -> str:
        return self.start(line, also, **swaps).ends()

    def served(self, line: str, also: str = FEW, **swaps: str) -> Process:
        """A server; from now on it is the one that clients come to."""
        server = self.start(line, also, **swaps)
        address = server.address()
        self.swaps |= {"gpu-host:50051": address, "127.0.0.1:50051": address}
        return server


def _swapped(word: str, swaps: Mapping[str, str]) -> str:
    for old, new in swaps.items():
        word = word.replace(old, new)
    return word


def _become(words: Sequence[str], folder: Path, log: Path) -> None:
    """The program of these words, in a process that is its own."""
    import dsl_client.__main__
    import dsl_lab.__main__
    import dsl_server.__main__

    programs = {"dsl": dsl_lab.__main__, "dsl-server": dsl_server.__main__, "dsl-client": dsl_client.__main__}
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = list(words)
    sys.orig_argv = [sys.executable, "-m", words[0].replace("-", "_"), *words[1:]]  # for who starts anew
    programs[words[0]].main()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for each in desk.begun:
        each.process.kill()
        each.process.join()


def pictures(folder: Path, side: int = 32, each: int = 8) -> None:
    """A folder of them: train/CLASS/N.png, test/CLASS/N.png."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


MODULE = """
from torch import nn
def build(num_classes):
    convolutions = [layer for c in (3, 8, 8) for layer in (nn.Conv2d(c, 8, 3, 2, 1), nn.ReLU())]
    net = nn.Module()
    return Net(nn.Sequential(*convolutions), nn.Linear(8, num_classes))
class Net(nn.Module):
    def __init__(self, features, classifier):
        super().__init__()
        self.features, self.classifier = features, classifier
    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))
"""
WARDS = """
import torch
from torch.utils.data import TensorDataset
def ward_8():
    x, y = torch.rand(60, 3, 32, 32), torch.arange(60) % 4
    return TensorDataset(x, y), TensorDataset(x[:20], y[:20])
"""
GOALS = """
from torch.nn import functional as F
def focal(outputs, targets):
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()
def sensitivity(outputs, targets):
    return (outputs.argmax(1) == targets).float()
"""


def mypackage(folder: Path) -> None:
    package = folder / "mypackage"
    package.mkdir()
    for name, text in (("__init__", ""), ("module", MODULE), ("wards", WARDS), ("goals", GOALS)):
        (package / f"{name}.py").write_text(text)


CERTIFIED = "dsl-client --server gpu-host:50051 --certs ward-7"


def certified(desk: Desk) -> None:
    """The certificates of the documents, each where its machine would have it."""
    desk.run(said("dsl certs init certs --host gpu-host"), "localhost")
    for ward in ("ward-7", "ward-8"):
        desk.run(said(f"dsl certs client certs {ward}"))
        shutil.copytree(desk.folder / "certs" / "clients" / ward, desk.folder / ward)


def both(desk: Desk, line: str, also: str = "") -> list[Process]:
    """The command of ward-7, there and as ward-8 would say it."""
    return [desk.start(line, also), desk.start(line, also, **{"ward-7": "ward-8"})]


def through(server: Process, clients: Sequence[Process]) -> str:
    """The server's words, once all have trained to the end."""
    for client in clients:
        assert "finished" in client.ends()
    words = server.ends()
    assert "finished" in words
    return words


# ---------------------------------------------------------------- the documents' stories


def test_two_machines_with_certificates(desk: Desk) -> None:
    certified(desk)
    server = desk.served(
        said("dsl-server --listen 0.0.0.0:50051 --certs certs --clients 2 --model resnet110")
    )
    assert "ok" in desk.run(said("dsl doctor --server gpu-host:50051 --certs ward-7")).lower()
    through(server, both(desk, exactly(CERTIFIED)))


def test_each_with_pictures_of_its_own(desk: Desk) -> None:
    certified(desk)
    for ward in ("ward-7", "ward-8"):
        pictures(desk.folder / "data" / ward)
    desk.swaps["/data/"] = f"{desk.folder}/data/"
    line = said("dsl-server --listen 0.0.0.0:50051 --certs certs --clients 2 --partition own")
    server = desk.served(line, "--model resnet8 --epochs 1 --batch-size 16")
    through(server, both(desk, said(f"{CERTIFIED} --data folder:/data/ward-7")))


def test_data_of_two_kinds(desk: Desk) -> None:
    mypackage(desk.folder)
    pictures(desk.folder / "data" / "ward-7")
    desk.swaps["/data/"] = f"{desk.folder}/data/"
    line = said("dsl-server --clients 2 --partition own --sync average --data folder:there")
    server = desk.served(line, "--model resnet8 --epochs 1 --batch-size 16")
    here = desk.start(said("dsl-client --data folder:/data/ward-7"), f"--server {server.address()}")
    through(server, [here, desk.start(said("dsl-client --data mypackage.wards:ward_8"))])


def test_goals_of_ones_own(desk: Desk) -> None:
    mypackage(desk.folder)
    server = desk.served(
        said("dsl-server --loss mypackage.goals:focal"), f"--model resnet8 --data sample {FEW}"
    )
    words = through(server, [desk.start(said("dsl-client --allow mypackage.goals:focal"))])
    assert "sensitivity" in words


def test_a_network_of_ones_own(desk: Desk) -> None:
    mypackage(desk.folder)
    server = desk.served(said("dsl-server --model mypackage.module:build"), f"--data sample {FEW}")
    through(server, [desk.start(said("dsl-client --allow mypackage.module:build"))])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_a_network_by_name(desk: Desk, model: str) -> None:
    pictures(desk.folder / "images", side=224, each=2)
    also = "--epochs 1 --batch-size 4" + (" --classes 4" if model != "resnet18" else "")
    server = desk.served(SERVED_BY_NAME[model], also)
    through(server, [desk.start(exactly("dsl-client"), f"--server {server.address()}")])


SERVED_BY_NAME = {
    name: said(f"dsl-server --model torchvision:{name} --cut") for name in ("resnet18", "mobilenet_v3_small")
}
CUTS = [
    said("dsl cuts --model torchvision:resnet18 --input 3x224x224 --link"),
    said("dsl cuts --model torchvision:resnet18 --input 3x224x224 --batch-size"),
    said("dsl cuts --model resnet110"),
    said("dsl cuts --model torchvision:mobilenet_v3_small"),
]


@pytest.mark.slow
@pytest.mark.parametrize("line", CUTS)
def test_cuts(desk: Desk, line: str) -> None:
    assert "MB" in desk.run(line, resnet110="resnet110")


def test_a_tunnel_s_end_is_an_address_like_any_other(desk: Desk) -> None:
    server = desk.served(said("dsl-server --clients 2 --model resnet8 --train-limit 500"))
    through(server, [desk.start(said("dsl-client --server 127.0.0.1:50051")) for _ in range(2)])


def test_memory_measured_beside_what_the_cuts_foretell(desk: Desk) -> None:
    server = desk.served(said("dsl-server --model resnet20 --split d --train-limit 640"), FEW)
    through(server, [desk.start(exactly("dsl-client"), f"--server {server.address()}")])


def test_a_slow_link(desk: Desk) -> None:
    certified(desk)
    line = said("dsl-server --listen 0.0.0.0:50051 --certs certs --clients 2 --data cifar10 --link auto")
    through(desk.served(line, f"--model resnet8 {FEW}"), both(desk, exactly(CERTIFIED)))


def test_a_run_that_lasts_and_then_serves(desk: Desk) -> None:
    """It is killed and resumed, ends, predicts, is exported and evaluated: the documents' longest story."""
    certified(desk)
    pictures(desk.folder / "labelled")
    (desk.folder / "scans").mkdir()
    for number in range(3):
        picture = desk.folder / "labelled" / "test" / "cat" / f"{number}.png"
        shutil.copy(picture, desk.folder / "scans" / f"{number}.png")

    also = "--model resnet8 --classes 4 --partition own --epochs 6 --checkpoint-every 0.1"
    first = desk.served(said("dsl-server --checkpoint-every 30 --out runs/ward --listen"), also)
    address = desk.swaps["gpu-host:50051"]
    joining = said(f"{CERTIFIED} --state state/ward-7")
    clients = both(desk, joining, f"--data folder:{desk.folder}/labelled")
    wait_for(lambda: list((desk.folder / "runs/ward/checkpoints").glob("[0-9]*")), 60)
    first.stop(signal.SIGKILL)
    first.process.join()
    port = address.rpartition(":")[2]
    second = desk.start(said("dsl-server --resume runs/ward"), f"--listen 127.0.0.1:{port} --certs certs")
    through(second, clients)

    shutil.move(desk.folder / "runs" / "ward", desk.folder / "runs" / "ward-server")
    shutil.copytree(desk.folder / "state" / "ward-7" / "out", desk.folder / "runs" / "ward-client-0")
    serving = desk.start(said("dsl-server --serve runs/ward-server"))
    desk.swaps["gpu-host:50051"] = serving.address()
    predict = "dsl-client predict --server gpu-host:50051 --certs ward-7 --run state/ward-7"
    desk.run(said(f"{predict} scans/"))
    assert len((desk.folder / "today.csv").read_text().splitlines()) == 4
    desk.run(said(f"{predict} --data folder:labelled"))
    assert (desk.folder / "labelled.jsonl").read_text()
    serving.stop(signal.SIGTERM)
    serving.ends()
    (desk.folder / "today.csv").unlink()
    desk.run(said("dsl-client predict --run state/ward-7 --alone scans/"))
    assert len((desk.folder / "today.csv").read_text().splitlines()) == 4

    parts = "runs/ward-server runs/ward-client-0"
    desk.run(said(f"dsl export {parts} --out model"))
    desk.run(said(f"dsl export {parts} --out alone"))
    kinds = {path.suffix for path in (desk.folder / "model").iterdir()}
    assert kinds >= {".pt2", ".onnx", ".safetensors", ".md"}
    desk.run(said(f"dsl evaluate {parts}"), f"--data folder:{desk.folder}/labelled")
    assert list((desk.folder / "evaluation").iterdir())


def test_a_run_without_certificates_lasts_too(desk: Desk) -> None:
    line = said("dsl-server --checkpoint-every 30 --clients 2 --out runs/ward --data cifar10")
    server = desk.served(line, f"--model resnet8 {FEW}")
    at = f"--server {server.address()}"
    through(server, [desk.start(exactly("dsl-client"), f"{at} --state {who}") for who in "ab"])


def test_a_dashboard_numbers_for_prometheus_and_tensorboard(desk: Desk) -> None:
    line = said("dsl-server --dashboard 8080 --metrics-port 9464 --tensorboard tb/first")
    server = watched(desk, line)
    assert "<html" in fetched(server.told("http://").split()[0]).lower()
    finish(desk, server)
    assert list((desk.folder / "tb" / "first").rglob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        said("dsl-server --metrics-port 9464 --clients 2"),
        said("dsl-server --tensorboard tb/first --clients 2"),
        said("dsl-server --dashboard 8080 --clients 2"),
    ],
)
def test_each_way_of_watching(desk: Desk, line: str) -> None:
    finish(desk, watched(desk, line))


def watched(desk: Desk, line: str) -> Process:
    return desk.served(line, f"--model resnet8 {FEW}", **{"8080": "0", "9464": "0"})


def finish(desk: Desk, server: Process) -> None:
    line = said("dsl-client --metrics-port 9465")
    through(server, [desk.start(line, **{"9465": "0"}) for _ in range(2)])


def fetched(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}", timeout=10) as page:
        return str(page.read().decode())


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            exactly("dsl-server --clients 100 --data cifar10 --sync average"), marks=pytest.mark.slow
        ),
        exactly("dsl-server --clients 100 --data cifar10 --sync average --sample-fraction 0.1"),
    ],
)
def test_a_hundred_clients_in_one_process(desk: Desk, line: str) -> None:
    also = "--model resnet8 --train-limit 100 --test-limit 100 --epochs 1"
    server = desk.served(line, also)
    client = desk.start(said("dsl-client --replicas 100"), f"--server {server.address()}")
    client.ends()
    assert "finished" in server.ends()


def test_completion(desk: Desk) -> None:
    assert "dsl-server" in desk.run(said("dsl-server --print-completion fish"))


@pytest.fixture(autouse=True)
def done(request: pytest.FixtureRequest) -> None:
    DONE.add(request.function.__name__)


def test_no_command_is_left_out() -> None:
    """Of those in the documents: each is run above, or it is said where, or why it cannot be."""
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    slow = {
        name for name, test in tests.items() if "slow" in [m.name for m in getattr(test, "pytestmark", [])]
    }
    if set(tests) - slow - DONE:
        pytest.skip("only some of this file's tests were run")
    assert {line.split()[0] for line in DOCUMENTED} == set(OURS)
    assert not set(DOCUMENTED) - RUN_HERE - set(ELSEWHERE), "these commands of the documents are run nowhere"
    assert not set(ELSEWHERE) - set(DOCUMENTED), "these are in no document any more"
