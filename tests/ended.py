"""What tests of finished runs share: real folders of both ends, left by real training on loopback."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.ended import Ended, server_end
from common.meter import Traffic
from common.methods.base import ClientPart
from common.run import Run
from dsl_client import samples
from dsl_client.client import Client
from dsl_client.predictor import Predicted, Predictor, Remote
from dsl_client.samples import Portion
from dsl_server import predictor
from tests.federation import CPU, serving, small_run
from tests.test_graph import any_run

NAMES = ("left", "right", "above", "below")
Left = tuple[Path, list[Path]]  # the folder of the server, and of each client
RUNS: dict[str, Callable[[], Run]] = {
    "dsl": lambda: small_run(epochs=1),
    "csl": lambda: small_run(epochs=1, method="csl", sync="average", clients=2),
    "ushape": lambda: small_run(epochs=1, method="ushape", codec=("activations=int4",)),
    "ushape, plain": lambda: small_run(epochs=1, method="ushape", method_arg=("learning=dsl",)),
    "fedavg": lambda: small_run(epochs=1, method="fedavg"),
    "relay": lambda: small_run(epochs=1, clients=2, sync="relay", keep_blocks=1, split="2"),
    "each its own": lambda: small_run(epochs=1, clients=2, sync="none", seed=3),
    "two tensors cross": lambda: any_run(model="tests.networks:skip_of_two_sizes", cut="second"),
    "resnet18": lambda: any_run(model="torchvision:resnet18", cut="layer2.0", image=(3, 32, 32)),
}


class Runs:
    """The folders of RUNS, each of which is trained when it is first asked for."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder, self._there = folder, dict[str, Left]()

    def __call__(self, name: str) -> Left:
        if name not in self._there:
            self._there[name] = train(RUNS[name](), self._folder())
        return self._there[name]


def portions_of(ended: Ended[ClientPart], size: int = 8) -> list[Portion]:
    return list(samples.of_run(ended, size, CPU).portions)


def asked(
    server: predictor.Predictor, ended: Ended[ClientPart], portions: Sequence[Portion], codec: str = ""
) -> list[Predicted]:
    torch.set_num_threads(1)
    remote = Remote(f"127.0.0.1:{server.port}", ended, Traffic(), 10, None, codec)
    try:
        return list(Predictor(ended, remote).predict(portions))
    finally:
        remote.close()


def data_file(folder: Path, image: tuple[int, int, int], train: int = 24, test: int = 20) -> Path:
    """Made-up images of four named classes, as an npz."""
    rng, arrays = np.random.default_rng(0), {}
    shape = (*image[1:], image[0])
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % len(NAMES)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.npz"
    np.savez(path, classes=np.array(NAMES), **arrays)
    return path


def train(run: Run, folder: Path) -> Left:
    """The folders of a run that has ended."""
    source = f"npz:{data_file(folder, run.image_shape)}"
    with serving(run, folder) as server, ThreadPoolExecutor(run.clients) as pool:
        clients = []
        for index in range(run.clients):  # their indices are those of their folders
            client = Client(f"127.0.0.1:{server.port}", f"client-{index}", CPU, source, allow=[run.model])
            client.join(patience=10)
            clients.append(client)
        outs = [folder / f"client-{index}" for index in range(run.clients)]
        for done in [pool.submit(_trained, *both) for both in zip(clients, outs, strict=True)]:
            done.result(timeout=60)
        assert server.wait(timeout=10)
        server.finish()
        for client in clients:
            client.close()
    return folder / "server", outs


def _trained(client: Client, out: Path) -> None:
    torch.set_num_threads(1)  # each thread has its own number
    client.train(out)


@contextlib.contextmanager
def predicting(folder: Path, **given: Any) -> Iterator[predictor.Predictor]:
    """A server of the finished run on a free port of loopback."""
    server = predictor.Predictor(server_end(folder, CPU), "127.0.0.1:0", CPU, **given)
    server.start()
    try:
        yield server
    finally:
        server.stop(0)
