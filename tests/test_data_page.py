"""The commands of docs/data.md, as they stand there, by real processes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.programs import SMALL, ends, programs

PAGE = Path(__file__).parent.parent / "docs/data.md"
CLASSES = ("cat", "dog", "owl", "wolf")
WARDS = """
import torch
from torch.utils.data import Dataset

class Ward(Dataset):
    classes = ["cat", "dog", "owl", "wolf"]
    def __len__(self): return 16
    def __getitem__(self, index):
        return torch.full((3, 32, 32), 60 * (index % 4), dtype=torch.uint8), index % 4

def ward_8(): return Ward(), Ward()
"""
GOALS = """
from torch.nn import functional as F

def focal(outputs, targets):
    each = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()

def sensitivity(outputs, targets): return outputs.argmax(1) == targets
"""

if not PAGE.exists():
    pytest.skip("docs are not in this distribution", allow_module_level=True)


def commands() -> list[list[str]]:
    """The page's, in words, without what is left open there."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"dsl-\w+ --", line)]
    return [shlex.split(line.replace(" --server gpu-host:50051", "").replace(" ...", "")) for line in lines]


@pytest.mark.timeout(110)
def test_the_pages_commands_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage/wards.py").write_text(WARDS)
    (tmp_path / "mypackage/goals.py").write_text(GOALS)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent.parent}:{tmp_path}")
    for index in range(16):
        pixels = np.full((32, 32, 3), 60 * (index % 4), np.uint8)
        for split in ("train", "test"):
            folder = tmp_path / "ward-7" / split / CLASSES[index % 4]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    told = commands()
    (_, *first), (_, *goals) = (words for words in told if words[0] == "dsl-server")
    (_, *seven), (_, *eight), (_, *allow) = (words for words in told if words[0] == "dsl-client")
    seven = [word.replace("/data/ward-7", str(tmp_path / "ward-7")) for word in seven]
    with programs(tmp_path) as start:
        server = start("dsl-server", *SMALL, *goals, *first, "--listen", "127.0.0.1:0")
        assert server.stdout is not None
        found = re.search(r"--server \S+:(\d+)", server.stdout.readline())
        assert found is not None
        at = ["--server", f"127.0.0.1:{found[1]}"]
        clients = [start("dsl-client", *at, *data, *allow) for data in (seven, eight)]
        for process in (*clients, server):
            code, words = ends(process, 90)
            assert code == 0, words
        assert re.search(r"finished: 32 samples in .*, sensitivity \d\.\d{4}; ", words)
    test = json.loads((tmp_path / "dsl-server-0/summary.json").read_text())["test"]
    assert (test["accuracy"], test["metric"]["name"]) == (None, "mypackage.goals:sensitivity")
    assert 0 <= test["metric"]["joined"] <= 1
