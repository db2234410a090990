"""Many clients in one process come to what as many processes come to, and none waits for ever for another."""

import json
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import dsl
from common.checkpoint import facts_of
from common.errors import ClosedError, ConfigError, StepError
from common.meter import Clock
from common.methods import settled
from common.methods.base import run_step as ordinary_step
from common.run import Run
from dsl_client import trainer
from dsl_client.client import Client
from dsl_client.commons import Commons, Once
from dsl_client.replicas import Replicas, check_files
from dsl_client.rest import Place
from dsl_client.turns import Workers, waiting
from dsl_client.watch import View, together
from dsl_lab.demo import Demo, demo
from dsl_lab.launch import Experiment
from dsl_server.server import Server
from tests.federation import CPU, serving, small_run
from tests.programs import Start, ends, programs, refuses, serve
from tests.threads import POLLED, in_thread, wait_for, waits

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings(POLLED)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A source of few, small pictures."""
    path, chance = tmp_path_factory.mktemp("data") / "images.npz", np.random.default_rng(0)
    sets = {}
    for split, count in (("train", 96), ("test", 16)):
        sets[f"{split}_images"] = chance.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        sets[f"{split}_labels"] = chance.integers(0, 4, count)
    np.savez(path, **sets)
    return f"npz:{path}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as run:
        yield run


def replicas_of(
    server: Server,
    count: int,
    workers: int,
    rest: Place = "memory",
    kind: Callable[..., Client] = Client,
    tell: Callable[[str], None] = lambda _: None,
) -> Replicas:
    address = f"127.0.0.1:{server.port}"

    def make(number: int, commons: Commons) -> Client:
        return kind(address, f"r-{number}", CPU, alone=False, commons=commons, rest=rest)

    return Replicas(count, workers, make, Commons(address), tell)


def trained(run: Run, folder: Path, workers: int, rest: Place = "memory") -> list[dict[str, Tensor]]:
    """What a run of replicas leaves: the parts of all clients, and the server's."""
    with serving(run, folder) as server:
        many = replicas_of(server, run.clients, workers, rest)
        many.join(10, takeover=False, on_joined=lambda _: None)
        try:
            many.train(folder, lambda: time.sleep(0.01))
            assert server.wait(timeout=10), "every client has left"
            assert many.ended_well == run.clients
        finally:
            many.stop("")
        server.finish()
    return parts_in(folder, run.clients)


def apart(run: Run, folder: Path) -> list[dict[str, Tensor]]:
    """The same of clients that have nothing in common but the process."""
    with serving(run, folder) as server, ThreadPoolExecutor(run.clients) as pool:
        clients = [
            Client(f"127.0.0.1:{server.port}", f"client-{index}", CPU, alone=False)
            for index in range(run.clients)
        ]
        for client in clients:
            client.join(patience=10)
            client.build()

        def train(client: Client) -> None:
            torch.set_num_threads(1)
            client.train(folder / f"client-{client.index}")

        for done in as_completed([pool.submit(train, client) for client in clients], 60):
            if error := done.exception():  # for which the others would wait for ever
                server.stop(ClosedError(f"a client of the test failed: {error}"))
                raise error
        assert server.wait(timeout=10)
        server.finish()
        for client in clients:
            client.close()
    return parts_in(folder, run.clients)


def parts_in(folder: Path, clients: int) -> list[dict[str, Tensor]]:
    folders = [folder / "server", *(folder / f"client-{index}" for index in range(clients))]
    return [load_file(path / "checkpoint/part.safetensors") for path in folders]


def assert_same(one: Sequence[dict[str, Tensor]], other: Sequence[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def run_of(images: str, method: str, clients: int, **settings: Any) -> Run:
    usual = {"data": images, "deterministic": True, "head": "gap"}
    return settled(small_run(method=method, clients=clients, **{**usual, **settings}))


# ------------------------------------------------------------ the same results


@pytest.mark.parametrize(
    ("method", "settings", "rest"),
    [
        ("dsl", {}, "memory"),
        ("dsl", {"sync": "average"}, "disk"),
        ("csl", {}, "disk"),
        ("psl", {}, "memory"),
        ("splitfed-v1", {}, "disk"),
        ("csl", {"sync": "relay"}, "disk"),
        ("ushape", {}, "memory"),
        ("fsl-sage", {}, "disk"),
    ],
)
def test_replicas_come_to_what_clients_apart_come_to(
    method: str, settings: dict[str, Any], rest: Place, images: str, tmp_path: Path
) -> None:
    run = run_of(images, method, clients=3, **settings)
    assert_same(trained(run, tmp_path / "one", workers=1, rest=rest), apart(run, tmp_path / "many"))


@pytest.mark.slow
def test_one_process_of_replicas_comes_to_what_processes_come_to(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the programs, and divided over two processes as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = run_of(images, "dsl", clients=3, sync="average")
    dsl.train(run, out=tmp_path / "apart", processes=True, progress=False)
    with programs(tmp_path) as start:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _flags_of(run).items()]
        server, address = serve(start, *flags, "--image", 3, 8, 8, "--deterministic")
        one = start("dsl-client", "--server", address, "--replicas", 3, "--workers", 1, "--rest", "disk")
        code, words = ends(one, 60)
        assert code == 0, words
        assert "3 of 3 replicas ended well" in words
        assert ends(server, 20)[0] == 0
    (tmp_path / "dsl-client-1/server").symlink_to(tmp_path / "dsl-server-0")
    names = {facts_of(tmp_path / f"dsl-client-1/client-{i}/checkpoint")["client"] for i in range(3)}
    assert names == {0, 1, 2}
    assert not list(tmp_path.rglob("resting*")), "nothing rests when all is over"
    ours, theirs = parts_in(tmp_path / "dsl-client-1", 3), parts_in(tmp_path / "apart", 3)
    # Which process became which client depends on who was first: the parts are the same, in some order.
    assert_same([ours[0]], [theirs[0]])
    by_index = {facts_of(tmp_path / f"apart/client-{i}/checkpoint")["client"]: i for i in range(3)}
    assert_same(ours[1:], [theirs[1 + by_index[i]] for i in range(3)])
    told = json.loads((tmp_path / "dsl-client-1/replicas.json").read_text())
    assert (told["replicas"], told["ended_well"], told["failed"]) == (3, 3, {})


def _flags_of(run: Run) -> dict[str, Any]:
    names = ("method", "clients", "sync", "data", "head", "epochs", "split", "classes", "lr", "model")
    return {
        **{name: getattr(run, name) for name in names},
        "batch_size": run.batch_size,
        "train_limit": 0,
        "test_limit": 0,
    }


def test_an_experiment_divides_its_clients_over_processes(tmp_path: Path) -> None:
    experiment = Experiment(
        {"clients": 5}, tmp_path, processes=2, workers=4, also=[["--rest", "disk"], ["--rest", "memory"]]
    )
    _, first, second = experiment.commands(port=1, door=2)
    shared = [
        "dsl-client",
        "--server",
        "127.0.0.1:2",
        "--name",
        "clients-0",
        "--out",
        f"{tmp_path}/clients-0",
    ]
    assert first == [*shared, "--replicas", "3", "--workers", "3", "--rest", "disk"]
    assert second[-6:] == ["--replicas", "2", "--workers", "2", "--rest", "memory"]


def test_a_demo_has_no_more_processes_than_clients() -> None:
    with pytest.raises(ConfigError, match="--processes 3: choose from 0 to 2, as many as --clients"):
        demo(Demo(clients=2, processes=3), Console())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_federation_in_threads_may_have_as_few_workers(workers: int, images: str, tmp_path: Path) -> None:
    run = run_of(images, "psl", clients=3)
    dsl.train(run, out=tmp_path / "few", workers=workers, progress=False)
    if workers:
        assert_same(parts_in(tmp_path / "few", 3), apart(run, tmp_path / "apart"))


# ------------------------------------------------------------ who computes


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("psl", {}),
        ("splitfed-v1", {}),
        ("dsl", {"sync": "average"}),
        ("csl", {"sync": "relay"}),
        ("csl", {"fixed_order": True}),
        ("ushape", {"fixed_order": True}),
        ("csl", {"checkpoint_every": 0.2}),
        ("dsl", {"checkpoint_every": 0.2, "sync": "average"}),
    ],
)
def test_a_single_worker_does_not_hold_up_eight_replicas(
    method: str, settings: dict[str, Any], images: str, tmp_path: Path
) -> None:
    """Whose answers wait for one another's batches, parts, turns or checkpoints."""
    trained(run_of(images, method, clients=8, deterministic=False, **settings), tmp_path, workers=1)


@pytest.mark.parametrize(
    ("method", "most"),
    [("csl", 2), ("dsl", 2), ("psl", 8)],
)
def test_no_more_steps_are_under_way_than_there_are_workers(
    method: str, most: int, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a step of the server needs a batch of every client."""
    lock, now, seen = threading.Lock(), [0], [0]

    def counted(step: Any, wire: Any) -> Any:
        with lock:
            now[0] += 1
            seen[0] = max(seen[0], now[0])
        try:
            return ordinary_step(step, wire)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(trainer, "run_step", counted)
    trained(run_of(images, method, clients=8, deterministic=False), tmp_path, workers=2)
    assert seen[0] <= most
    if method == "psl":
        assert seen[0] == most, "all are in the step at once"


def test_who_waits_lets_others_compute_and_the_first_to_wait_is_the_first_served() -> None:
    workers, clock, order = Workers(1), Clock(), list[str]()
    asked, answered = threading.Event(), threading.Event()

    def waiter() -> None:
        with workers.turn():
            order.append("a begins")
            with waiting(clock), waiting(clock):  # what waits within it is the same wait
                asked.set()
                answered.wait(10)
            order.append("a goes on")

    def other(name: str) -> Callable[[], None]:
        def body() -> None:
            with workers.turn():
                order.append(name)
                if name == "b":
                    answered.set()
                    wait_for(lambda: workers.waiting == 2)  # a is behind c

        return body

    first = in_thread(waiter)
    assert asked.wait(10)
    with workers.turn():
        second = in_thread(other("b"))
        wait_for(lambda: workers.waiting == 1)
        third = in_thread(other("c"))
        wait_for(lambda: workers.waiting == 2)
        assert waits(second)
    for done in (first, second, third):
        done.result(10)
    assert order == ["a begins", "b", "c", "a goes on"]
    assert clock.seconds("wait")["wait"] > 0, "for its permit"


def test_with_one_worker_each_thread_draws_what_it_would_draw_alone() -> None:
    def draws(workers: Workers, seed: int) -> list[float]:
        drawn = []
        with workers.turn():
            torch.manual_seed(seed)
            for _ in range(3):
                drawn.append(float(torch.rand(())))
                with waiting(Clock()):
                    time.sleep(0.01)
        return drawn

    before = torch.get_rng_state()
    alone = [draws(Workers(1), seed) for seed in range(3)]
    shared = Workers(1)
    together_ = [in_thread(draws, shared, seed) for seed in range(3)]
    assert [result.result(10) for result in together_] == alone
    torch.set_rng_state(before)


def test_what_is_common_is_made_once() -> None:
    made, once = list[int](), Once[int]()

    def make() -> int:
        time.sleep(0.05)
        made.append(1)
        return len(made)

    results = [in_thread(once, make) for _ in range(8)]
    assert [result.result(10) for result in results] == [1] * 8


# ------------------------------------------------------------ how they end


def failing(index: int) -> type[Client]:
    """Clients of whom that one does not get to train."""

    class Failing(Client):
        def train(self, *arguments: Any) -> Path:
            if self.index == index:
                raise StepError("its loss is not finite")
            return super().train(*arguments)

    return Failing


def test_the_others_go_on_without_a_replica_that_fails(images: str, tmp_path: Path) -> None:
    run, said = run_of(images, "dsl", clients=4, quorum=3), list[str]()
    with serving(run, tmp_path) as server:
        many = replicas_of(server, 4, 2, kind=failing(2), tell=said.append)
        many.join(10, takeover=False, on_joined=lambda _: None)
        with pytest.raises(StepError, match="its loss is not finite"):
            many.train(tmp_path, lambda: time.sleep(0.01))
        view = many.view()
        many.stop("")
        assert server.wait(timeout=10)
    assert (many.ended_well, view.replicas, view.ended) == (3, 4, 4)
    assert said == ["replica 2 (client 2) failed: its loss is not finite"]
    told = json.loads((tmp_path / "replicas.json").read_text())
    assert told["failed"] == {"replica 2 (client 2)": "its loss is not finite"}


def test_without_a_quorum_all_end_and_the_cause_is_told(images: str, tmp_path: Path) -> None:
    with serving(run_of(images, "psl", clients=8), tmp_path) as server:
        many = replicas_of(server, 8, 1, kind=failing(0))
        many.join(10, takeover=False, on_joined=lambda _: None)
        with pytest.raises(StepError, match="its loss is not finite"):
            many.train(tmp_path, lambda: time.sleep(0.01))
        many.stop("")
    assert many.ended_well == 0


def test_ctrl_c_ends_all_in_order(start: Start, tmp_path: Path) -> None:
    server, address = serve(start, "--clients", 6, "--epochs", 500, "--sync", "average")
    client = start("dsl-client", "--server", address, "--replicas", 6, "--workers", 2)
    assert client.stderr is None
    assert client.stdout is not None
    while "6 replicas, 2 at a time" not in (line := client.stdout.readline()):
        assert line, "it has ended"
    wait_for((tmp_path / "dsl-server-0/metrics.jsonl").exists, 60)  # they train
    client.send_signal(signal.SIGINT)
    code, words = ends(client, 30)
    assert code == 130, words
    assert "0 of 6 replicas ended well" in words
    code, words = ends(server, 20)
    assert code == 69
    assert "was stopped (Ctrl-C)" in words


def test_replicas_that_were_killed_come_back_and_each_batch_counts_once(start: Start, tmp_path: Path) -> None:
    flags = [
        "--clients",
        4,
        "--epochs",
        30,
        "--sync",
        "average",
        "--checkpoint-every",
        0.2,
        "--batch-size",
        10,
    ]
    server, address = serve(start, *flags, "--eval-every", 0)
    command = [
        "dsl-client",
        "--server",
        address,
        "--replicas",
        4,
        "--workers",
        2,
        "--state",
        tmp_path / "state",
    ]
    killed = start(*command)
    assert killed.stdout is not None
    while "4 replicas" not in (line := killed.stdout.readline()):
        assert line, "it has ended"
    wait_for(lambda: len({path.parts[-3] for path in tmp_path.glob("state/*/snapshots/0*")}) == 4)
    killed.kill()
    killed.wait(10)
    code, words = ends(start(*command, "--patience", 30), 80)
    assert code == 0, words
    assert "4 of 4 replicas ended well" in words
    code, words = ends(server, 20)
    assert code == 0, words
    summary = json.loads((tmp_path / "dsl-server-0/summary.json").read_text())
    assert summary["samples_trained"] == 30 * 200


# ------------------------------------------------------------ bounds


@pytest.mark.slow
def test_memory_is_bounded_by_the_workers(start: Start, tmp_path: Path) -> None:
    """Of each replica more there is less than 3 MiB (threads, calls, its part), where a step holds tens."""
    peaks = []
    for count in (8, 104):
        server, address = serve(
            start,
            "--clients",
            count,
            "--train-limit",
            count * 32,
            "--method",
            "csl",
            "--eval-every",
            0,
            "--test-limit",
            1,
        )
        code, words = ends(start("dsl-client", "--server", address, "--replicas", count, "--workers", 2), 80)
        assert code == 0, words
        assert ends(server, 20)[0] == 0
        (told,) = (tmp_path / f"dsl-client-{2 * len(peaks) + 1}").glob("replicas.json")
        peaks.append(json.loads(told.read_text())["peak_bytes"])
    assert (peaks[1] - peaks[0]) / 96 < 3 * 2**20


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", 0], "--replicas 0 is below 1"),
        (["--replicas", 4, "--workers", 0], "--workers 0: choose from 1 to 4, as many as --replicas"),
        (["--replicas", 4, "--workers", 5], "--workers 5: choose from 1 to 4, as many as --replicas"),
        (["--workers", 2], "--workers 2: choose from 1 to 1, as many as --replicas"),
        (["--replicas", 4, "--certs", "here"], "--replicas 4 with --certs: a certificate is of one client; "),
    ],
)
def test_what_replicas_cannot_have_is_told_in_a_line(flags: list[object], words: str, start: Start) -> None:
    assert words in refuses(start("dsl-client", *flags))


def test_more_replicas_than_places_are_told_so(images: str, tmp_path: Path) -> None:
    with serving(run_of(images, "dsl", clients=2), tmp_path) as server:
        many = replicas_of(server, 3, 1)
        with pytest.raises(ConfigError, match="--replicas 3: the run has places for 2 clients; start the"):
            many.join(10, takeover=False, on_joined=lambda _: None)
        many.stop("there were too many")


def test_too_few_open_files_are_told_before_anything_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, raised = (256, 400), list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: raised.append(to))
    check_files(100, each=1)
    assert raised == [(300, 400)], "as far as it is allowed to"
    with pytest.raises(ConfigError, match="need up to 1200 open files, and this process may have 400; raise"):
        check_files(1000, each=1)


def test_many_are_shown_as_one() -> None:
    def view(**settings: Any) -> View:
        usual: dict[str, Any] = {
            "client": 0,
            "clients": 9,
            "name": "n",
            "method": "dsl",
            "model": "m",
            "place": "1",
            "state": "between",
            "epoch": 1,
            "epochs": 4,
            "batch": 3,
            "batches": 3,
            "done": 0.5,
            "samples": 30,
            "rate": 2.0,
            "loss": 1.0,
            "metric": "accuracy",
            "score": 0.5,
            "alone": None,
            "queue": 1,
            "outbox": 2,
            "waits": 0.5,
            "seconds": 2.0,
            "left_s": 2.0,
            "wire": {"up": {"labels": 5}, "down": {"control": 1}},
            "phases": {"wait": 1.0},
        }
        return View(**{**usual, **settings})

    other = view(
        client=1,
        state="training",
        epoch=0,
        batch=1,
        done=0.25,
        samples=10,
        loss=2.0,
        score=None,
        alone=0.25,
        left_s=6.0,
        seconds=1.0,
    )
    assert together([view(), other], ended=1) == view(
        client=-1,
        state="training",
        epoch=0,
        batch=4,
        batches=6,
        done=0.375,
        samples=40,
        rate=4.0,
        loss=1.5,
        score=0.5,
        alone=0.25,
        queue=2,
        outbox=4,
        left_s=6.0,
        wire={"up": {"labels": 10}, "down": {"control": 2}},
        phases={"wait": 2.0},
        replicas=2,
        ended=1,
    )
