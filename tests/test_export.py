"""`dsl export`: its files give what the split system predicts; its card says what is so; what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.ended import client_end
from common.errors import ConfigError
from common.nets.cut import build
from common.nets.named import build_named, is_named
from common.nets.resnet import resnet
from common.run import Run
from dsl_client.predictor import Predictor
from dsl_lab import __main__ as dsl
from dsl_lab import export
from dsl_lab.joined import Joined, example_of_run
from tests.ended import NAMES, RUNS, Runs, asked, portions_of, predicting, train
from tests.federation import CPU
from tests.test_graph import any_run, quick  # noqa: F401  # a fixture

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("quick")]


def exported(server: Path, client: Path, out: Path, *flags: str) -> Path:
    assert dsl._main(["export", str(server), str(client), "--out", str(out), *flags]) == 0
    return out


def runs_as(out: Path) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The program and the ONNX file, as functions of pixels."""
    program = torch.export.load(out / "model.pt2").module()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"
    return [program, lambda pixels: torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])]


def whole_of(run: Run) -> nn.Module:
    """The network as it is where nobody has cut it, with other first weights."""
    if is_named(run.model):
        return build_named(run.model, run.class_count, run.image_shape[0], 7).eval()
    return resnet(8, run.class_count).eval()


@pytest.mark.parametrize("name", ["dsl", "ushape, plain", "two tensors cross", "resnet18"])
def test_what_is_exported_gives_what_the_split_system_answers(
    name: str, trained: Runs, tmp_path: Path
) -> None:
    """To 1e-5, in batches of 1, 3 and 8: the program, the ONNX file, and the whole network by its weights."""
    server, (client,) = trained(name)
    ended, out = client_end(client, CPU), exported(server, client, tmp_path / "model")
    whole = whole_of(ended.run)
    whole.load_state_dict(load_file(out / "model.safetensors"))
    networks = [*runs_as(out), lambda pixels: whole((pixels - 0.5) / 0.25)]
    with predicting(server) as serving, torch.no_grad():
        for size in (1, 3, 8):
            for predicted in asked(serving, ended, portions_of(ended, size)[:3]):
                pixels = predicted.portion.x * 0.25 + 0.5  # exact: spread and mean are powers of two
                for network in networks:
                    torch.testing.assert_close(network(pixels), predicted.logits, rtol=0, atol=1e-5)


def test_a_client_alone_is_exported_with_its_head(trained: Runs, tmp_path: Path) -> None:
    server, (client,) = trained("dsl")
    out, ended = exported(server, client, tmp_path / "model", "--alone"), client_end(client, CPU)
    for predicted in Predictor(ended, None).predict(portions_of(ended)):
        for network in runs_as(out):
            pixels = predicted.portion.x * 0.25 + 0.5
            torch.testing.assert_close(network(pixels), predicted.logits, rtol=0, atol=1e-5)
    names = set(load_file(out / "model.safetensors"))
    assert {name for name in names if name.startswith("head.")} == {"head.2.weight", "head.2.bias"}
    assert "auxiliary head" in (card := (out / "README.md").read_text())
    test = json.loads((server / "summary.json").read_text())["test"]
    assert f"| test accuracy | {test['client_only_accuracy']:.2%} |" in card


def test_the_whole_network_of_a_client_is_exported_too(trained: Runs, tmp_path: Path) -> None:
    server, (client,) = trained("fedavg")
    out, ended = exported(server, client, tmp_path / "model", "--format", "pt2"), client_end(client, CPU)
    network = torch.export.load(out / "model.pt2").module()
    for predicted in Predictor(ended, None).predict(portions_of(ended)):
        torch.testing.assert_close(network(predicted.portion.x * 0.25 + 0.5), predicted.logits)


def test_a_network_of_no_images_takes_what_it_took(tmp_path: Path) -> None:
    run = any_run(model="tests.networks:text", cut="words")
    net = build(run)
    whole = Joined({"bottom": net.bottom, "top": net.top}, images=False)
    program = export._program(whole, example_of_run(run))
    export._write_program(program, False, ["onnx"], tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(0, 50, (5, 12))
    with torch.no_grad():
        due = whole(tokens)
        assert torch.equal(due, net.top.eval()(net.bottom.eval()(tokens)))
        torch.testing.assert_close(program.module()(tokens), due, rtol=0, atol=1e-5)
    (logits,) = session.run(None, {"input": tokens.numpy()})
    np.testing.assert_allclose(logits, due.numpy(), rtol=0, atol=1e-5)


def test_the_card_says_what_is_so(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its examples run."""
    server, clients = trained("each its own")
    out = exported(server, clients[1], tmp_path / "model")
    card = (out / "README.md").read_text()
    summary = json.loads((server / "summary.json").read_text())
    _, front, text = card.split("---\n", 2)
    facts = {key: json.loads(value) for key, _, value in (li.partition(": ") for li in front.splitlines())}
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(summary["test"]["accuracy"], 4)}]
    for words in (
        *(f"| {index} | {name} |" for index, name in enumerate(NAMES)),
        f"| bytes that all clients sent in training | {sum(summary['wire']['up'].values()):,} |",
        "| clients | 2; these files have the part of client 1 |",
        "| clients' parts | their own, never averaged |",
        f"torch {torch.__version__.split('+')[0]}",
        "| method | dsl |",
        "| cut | 1, of 16x8x8 a sample |",
        "(the mean of all clients, each with its own part)",
        "## What it is not tested for",
        "## Privacy",
    ):
        assert words in text, words
    assert str(tmp_path) not in card, "where data lies is nobody's business"
    monkeypatch.chdir(out)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        names: dict[str, object] = {}
        exec(example, names)
        assert tuple(names["logits"].shape) == (1, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("csl", ["--alone"], "csl gives its clients no head of their own"),
        ("dsl", ["--out", "full"], "--out full holds a model already; choose another folder or remove it"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    name: str,
    flags: list[str],
    words: str,
    trained: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.pt2").touch()
    server, clients = trained(name)
    with pytest.raises(ConfigError, match=words) as refused:
        exported(server, clients[0], tmp_path / "model", *flags)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_parts_of_two_runs_are_not_joined(trained: Runs, tmp_path: Path) -> None:
    other, _ = train(RUNS["dsl"](), tmp_path)
    with pytest.raises(ConfigError, match="are of two runs: their parts do not fit together"):
        exported(other, trained("dsl")[1][0], tmp_path / "model")


def test_without_the_extra_it_is_named_and_the_rest_works(
    trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, (client,) = trained("dsl")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        ConfigError, match=r"pip install 'decoupled-split-learning\[export\]'; or say --format"
    ):
        exported(server, client, tmp_path / "model")
    out = exported(server, client, tmp_path / "model", "--format", "safetensors")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "README.md"}
