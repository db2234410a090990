"""examples/text: a Hugging Face network, cut at two places; and its README's commands, at a small scale."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from common.nets.cut import build
from common.nets.named import build_named
from tests.federation import small_run
from tests.programs import ends, programs

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/text"

if not EXAMPLE.exists():
    pytest.skip("examples are not in this distribution", allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed here", allow_module_level=True)

SETTINGS = {"model": "examples.text.network:build", "split": "m", "classes": 6}


def commands() -> dict[str, list[str]]:
    """The README's, by program, in words."""
    blocks = re.findall(r"```\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return {words[0]: words[1:] for line in lines if (words := shlex.split(line))[0].startswith("dsl")}


@pytest.mark.timeout(100)
@pytest.mark.parametrize("cut", ["blocks.embeddings", "blocks.transformer.layer.0"])
def test_cut_in_two_and_joined_it_is_the_whole_bit_for_bit(cut: str) -> None:
    from examples.text.data import LENGTH, WORDS

    run = small_run(**SETTINGS, cut=cut)
    net, whole = build(run), build_named(run.model, 6, 3, run.seed)
    assert net.cut_shape == (LENGTH, 64)
    assert net.takes == (torch.int64, (LENGTH,))
    tokens = torch.randint(WORDS, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        for module in (net.bottom, net.top, whole):
            module.train(training)
        torch.manual_seed(0)
        joined = net.top(net.bottom(tokens))
        torch.manual_seed(0)
        assert torch.equal(joined, whole(tokens))


def test_the_texts_are_of_every_topic_and_none_is_in_both_sets() -> None:
    from examples.text.data import LENGTH, TOPICS, encoded, sets

    train, test = sets()
    assert len(train) > 2000
    assert (
        {topic for _, topic in train._texts} == {topic for _, topic in test._texts} == set(range(len(TOPICS)))
    )
    assert not {text for text, _ in train._texts} & {text for text, _ in test._texts}
    tokens = encoded("Open the file.")
    assert tokens.shape == (LENGTH,)
    assert (tokens != 0).tolist() == [True] * 4 + [False] * (LENGTH - 4)
    assert torch.equal(encoded("the FILE")[:2], tokens[1:3])


@pytest.mark.timeout(280)
@pytest.mark.parametrize("method", ["dsl", pytest.param("csl", marks=pytest.mark.slow)])
def test_the_readmes_commands_train(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = ["--method", method, "--clients", 1, "--train-limit", 128, "--test-limit", 64, "--epochs", 1]
    told = commands()
    with programs(tmp_path) as start:
        server = start("dsl-server", *told["dsl-server"], *small, "--listen", "127.0.0.1:0")
        assert server.stdout is not None
        address = re.search(r"--server \S+:(\d+)", server.stdout.readline())
        assert address is not None
        at = ["--server", f"127.0.0.1:{address[1]}"]
        client = start("dsl-client", *told["dsl-client"], *at)
        for process in (client, server):
            code, words = ends(process, 200)
            assert code == 0, words
    summary = json.loads((tmp_path / "dsl-server-0/summary.json").read_text())
    assert summary["samples_trained"] == 128
    assert 0 < summary["test"]["accuracy"] < 1
    assert summary["wire"]["up"]["activations"] == 128 * 48 * 64 * 4


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_readmes_table_of_cuts_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from common import cli
    from dsl_lab.cuts import Cuts, cuts

    given = cli.parse(Cuts, commands()["dsl"][1:], Cuts(model=""), "dsl cuts", "")
    cuts(given, Console())
    assert "blocks.transformer.layer.0" in capsys.readouterr().out
