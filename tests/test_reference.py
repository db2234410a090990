"""The paper's numbers stand beside runs like the paper's, and beside no others. The runs are made up."""

from pathlib import Path

import pytest

from dsl_lab.reference import Reference, reference
from dsl_lab.runs import read
from tests.finished import make, the_papers


def test_the_papers_traffic_is_its_arithmetic(tmp_path: Path) -> None:
    """50,000 samples of 16 x 32 x 32 in fp32 are 6.5536 GB both ways, half of it at d (32 x 16 x 16)."""
    csl = reference(the_papers(tmp_path / "csl", "csl", split="s"))
    assert csl.up == csl.down == 50 * 50_000 * 16 * 32 * 32 * 4
    dsl = reference(the_papers(tmp_path / "dsl", "dsl", split="d"))
    assert (dsl.up, dsl.down) == (50 * 50_000 * 32 * 16 * 16 * 4, 0)


def test_the_authors_log_is_of_the_deep_cut(tmp_path: Path) -> None:
    one = reference(the_papers(tmp_path / "one", "dsl"))
    assert (one.accuracy, one.wall, one.peak) == (0.8512, pytest.approx(1380), 761_000_000)
    ten = reference(the_papers(tmp_path / "ten", "csl", data="cifar100", clients=10, sync="relay"))
    assert (ten.accuracy, ten.wall, ten.peak) == (0.5637, None, None)
    assert reference(the_papers(tmp_path / "s", "dsl", split="s")).accuracy is None
    assert reference(the_papers(tmp_path / "three", "csl", clients=3, sync="relay")).accuracy is None


@pytest.mark.parametrize(
    "other",
    [
        {"model": "resnet20"},
        {"data": "npz:cifar10.npz"},
        {"epochs": 20},
        {"lr": 0.1},
        {"schedule": "cosine"},
        {"batch_size": 64},
        {"train_limit": 1000},
        {"test_limit": 5000},
        {"augment": False},
        {"codec": ["activations=int8"]},
        {"send_every": 2},
        {"server_modules": 3},
        {"head": "strided"},
        {"split": "26"},
        {"method": "psl"},
        {"clients": 5, "sync": "none"},
        {"partition": "dirichlet:0.3"},
    ],
    ids=str,
)
def test_other_runs_have_none(tmp_path: Path, other: dict[str, object]) -> None:
    assert reference(the_papers(tmp_path / "run", **{"method": "dsl", **other})) == Reference()  # type: ignore[arg-type]


def test_a_run_of_few_known_settings_has_none(tmp_path: Path) -> None:
    assert reference(read(make(tmp_path / "run", "dsl"))) == Reference()
