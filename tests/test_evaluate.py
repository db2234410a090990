"""`dsl evaluate`: numbers worked by hand, and by real processes the run's own; the commands of the page."""

import csv
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from common.errors import ConfigError
from common.tls import Credentials
from dsl_client import predict
from dsl_lab import __main__ as dsl
from dsl_lab.evaluate import Evaluate, evaluate, scores
from dsl_lab.export import Export
from dsl_lab.launch import LaunchError, program
from dsl_server import __main__ as server_program
from tests import certificates
from tests.ended import NAMES, RUNS, Runs, predicting, train

PAGE = Path(__file__).parent.parent / "docs/prediction.md"


def test_scores_are_those_worked_by_hand() -> None:
    """Of a: 2 of 3 are found. Of b: one, found; it is half of what was taken for b. Of c: none is there."""
    logits = {"a": [math.log(2), 0.0, math.log(0.5)], "b": [0.0, math.log(2), math.log(0.5)]}
    said = [("a", 0, "a"), ("a", 0, "a"), ("a", 0, "b"), ("b", 1, "b")]
    lines = [
        {
            "label": label,
            "labelled": index,
            "class": taken,
            "predicted": "ab".index(taken),
            "logits": logits[taken],
        }
        for label, index, taken in said
    ]
    found = scores(lines)
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert (found.samples, found.accuracy, list(found.names)) == (4, 0.75, ["a", "b", "2"])
    # Of the softmax of 2, 1 and 0.5 the right class has 4/7 three times, and 2/7 once.
    assert found.loss == pytest.approx((3 * math.log(7 / 4) + math.log(7 / 2)) / 4)
    assert found.rows[:2] == [("a", 3, 2 / 3, 1.0), ("b", 1, 1.0, 0.5)]
    assert found.rows[2][:2] == ("2", 0)
    assert all(map(math.isnan, found.rows[2][2:]))


@pytest.mark.timeout(240)  # three processes import torch
def test_real_processes_score_what_the_run_scored(trained: Runs, tmp_path: Path) -> None:
    """A server that serves, a client that predicts, and it alone: all as summary.json has it."""
    server, (client,) = trained("dsl")
    test = json.loads((server / "summary.json").read_text())["test"]
    evaluate(Evaluate(server, (client,), out=tmp_path), console := Console(record=True))
    totals = json.loads((tmp_path / "scores.json").read_text())
    assert totals["joined"]["accuracy"] == test["accuracy"]
    assert totals["joined"]["loss"] == pytest.approx(test["loss"], rel=1e-6)
    assert totals["alone"]["accuracy"] == test["client_only_accuracy"]
    assert f"joined: accuracy {test['accuracy']:.4f}" in console.export_text()
    for way in ("joined", "alone"):
        with (tmp_path / f"{way}-confusion.csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["is \\ taken for", *NAMES]
        counts = np.array([list(map(int, row[1:])) for row in rows])
        assert counts.sum(1).tolist() == [5, 5, 5, 5]
        assert counts.trace() / 20 == totals[way]["accuracy"]
        with (tmp_path / f"{way}-classes.csv").open(newline="") as file:
            classes = list(csv.DictReader(file))
        assert [row["class"] for row in classes] == list(NAMES)
        assert [float(row["recall"]) for row in classes] == (counts.diagonal() / 5).tolist()
    words = (tmp_path / "server.log").read_text().splitlines()
    assert words[-1] == "dsl-server: served 20 samples", "it was asked to end, and did in order"


def test_what_cannot_be_evaluated_is_said_in_one_line(trained: Runs, tmp_path: Path) -> None:
    server, (client,) = trained("dsl")
    other, _ = train(RUNS["dsl"](), tmp_path)
    console = Console()
    with pytest.raises(ConfigError, match="needs a client's folder, after the server's"):
        evaluate(Evaluate(server, (), out=tmp_path), console)
    with pytest.raises(ConfigError, match="are of two runs"):
        evaluate(Evaluate(other, (client,), out=tmp_path), console)


def test_the_last_words_of_a_process_that_fails_are_told(trained: Runs, tmp_path: Path) -> None:
    server, (client,) = trained("fedavg")  # which needs no server
    gone = Evaluate(server, (client,), data=f"npz:{tmp_path}/gone.npz", out=tmp_path / "out")
    with pytest.raises(LaunchError, match=r"dsl-client: error: npz:.*gone.npz cannot be read"):
        evaluate(gone, Console())


def test_help_tells_of_training_and_of_predicting() -> None:
    for flags, words in (([], "dsl-client predict --help tells more"), (["predict"], "--alone-if-away")):
        command = [program("dsl-client"), *flags, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert words in done.stdout


@pytest.fixture
def site(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The page's folders, and its server; the port."""
    server, (client,) = trained("dsl")
    shutil.copytree(server, tmp_path / "runs/ward-server")
    shutil.copytree(client, tmp_path / "runs/ward-client-0")
    shutil.copytree(client, tmp_path / "state/ward-7/out")
    certs = certificates.make(tmp_path / "certs", "ward-7")
    shutil.copytree(certs / "clients/ward-7", tmp_path / "ward-7")
    for folder in ("scans", *(f"labelled/{split}/{name}" for split in ("train", "test") for name in NAMES)):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    monkeypatch.chdir(tmp_path)
    with predicting(server, credentials=Credentials.read(certs, "server")) as serving:
        yield serving.port


def commands() -> list[list[str]]:
    """Those of the page."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_pages_commands_run(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with the server that is there. `dsl export` and `dsl evaluate`, which take their time,
    only as far as they are understood: other tests run just these."""
    done, asked = [], list[Export | Evaluate]()
    for command in commands():
        words = [word.replace("gpu-host:50051", f"localhost:{site}") for word in command]
        match words[:2]:
            case ["dsl-server", "--serve"]:
                options = server_program.cli.parse(
                    server_program.Options, words[1:], server_program.Options(), "dsl-server", ""
                )
                assert (options.serve, options.certs) == (Path("runs/ward-server"), Path("certs"))
            case ["dsl-client", "predict"]:
                assert predict.main(words[2:]) == 0
            case ["dsl", name]:
                monkeypatch.setattr(dsl, name, lambda options, _: asked.append(options))
                assert dsl._main(words[1:]) == 0
        done.append(" ".join(command[:2]))
    ward, client = Path("runs/ward-server"), Path("runs/ward-client-0")
    assert asked == [
        Export(ward, client, Path("model")),
        Export(ward, client, Path("alone"), ("pt2", "safetensors"), alone=True),
        Evaluate(ward, (client,)),
    ]
    assert done == ["dsl-server --serve", *3 * ["dsl-client predict"], *2 * ["dsl export"], "dsl evaluate"]
    assert len(Path("today.csv").read_text().splitlines()) == 2
    assert len(Path("labelled.jsonl").read_text().splitlines()) == 4
