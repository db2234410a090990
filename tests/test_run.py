"""The description of a run: from flags, TOML and JSON, every refusal by name; and its learning rate."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.optim import learning_rate, progress_of
from common.run import KNOWN_DATA, RECIPES, Run, checked, defaults_from
from dsl_client.batches import partition

ROOT = Path(__file__).parent.parent
OTHERWISE: dict[str, Any] = {
    "name": "a-run_1.0",
    "method": "csl",
    "model": "resnet110",
    "split": "12",
    "head": "conv",
    "clients": 3,
    "sync": "average",
    "data": "npz:/tmp/x.npz",
    "partition": "dirichlet:0.5",
    "image": (1, 28, 28),
    "classes": 47,
    "augment": False,
    "recipe": "paper",
    "epochs": 7,
    "batch_size": 33,
    "lr": 0.25,
    "momentum": 0.5,
    "weight_decay": 0.125,
    "schedule": "step",
    "warmup": 0.0625,
    "eval_every": 0,
    "seed": 11,
    "fixed_order": True,
    "outbox": 5,
    "inbox": 6,
    "quorum": 2,
    "round_timeout": 2.5,
    "on_nonfinite": "skip",
}


# ---------------------------------------------------------------- what is right


def test_a_run_comes_out_of_json_as_it_went_in() -> None:
    for run in (Run(), Run(**OTHERWISE), Run(image=(3, 8, 8)), Run(classes=2)):
        assert Run.from_json(run.to_json()) == run


def test_the_image_and_classes_are_the_data_sets_unless_said() -> None:
    assert (Run(data="cifar100").image_shape, Run(data="cifar100").class_count) == ((3, 32, 32), 100)
    assert (Run(data="npz:x").image_shape, Run(data="npz:x").class_count) == ((3, 32, 32), 10)
    run = Run(data="cifar100", image=(1, 8, 8), classes=5)
    assert (run.image_shape, run.class_count) == ((1, 8, 8), 5)
    assert set(KNOWN_DATA) == {"sample", "fashion-mnist", "cifar10", "cifar100"}


@pytest.mark.parametrize(
    ("every", "scored"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (3, [2, 4]), (9, [4]), (0, [4])]
)
def test_the_test_set_is_scored_every_so_often_and_at_the_end(every: int, scored: list[int]) -> None:
    run = Run(epochs=5, eval_every=every)
    assert [epoch for epoch in range(5) if run.evaluates(epoch)] == scored


def test_recipes_set_what_nobody_else_says(tmp_path: Path) -> None:
    assert defaults_from(None, None) == Run(**RECIPES["modern"], recipe="modern") == Run()
    assert defaults_from(None, "paper") == Run(**RECIPES["paper"], recipe="paper")
    file = tmp_path / "run.toml"
    file.write_text('recipe = "paper"\nlr = 0.5\nbatch-size = 7\nimage = [1, 28, 28]\n')
    run = defaults_from(file, None)
    assert (run.recipe, run.lr, run.batch_size, run.image) == ("paper", 0.5, 7, (1, 28, 28))
    assert run.epochs == RECIPES["paper"]["epochs"]
    assert defaults_from(file, "modern").epochs == RECIPES["modern"]["epochs"], "a flag beats the file"
    assert defaults_from(file, "modern").lr == 0.5, "the file beats a recipe"


def test_the_papers_recipe_is_the_papers() -> None:
    """arXiv 2601.19261, section IV."""
    run = defaults_from(None, "paper")
    assert (run.epochs, run.batch_size, run.lr, run.momentum) == (50, 128, 1e-3, 0.9)
    assert (run.schedule, run.warmup) == ("constant", 0.0)


# ---------------------------------------------------------------- flags and files


def config(*flags: str) -> tuple[int, str, str]:
    """What `dsl-server --print-config` prints."""
    command = [sys.executable, "-m", "dsl_server", *flags, "--print-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "mine"\nlr = 0.5\nepochs = 3\nimage = [3, 8, 8]\nclasses = 4\n')
    code, out, err = config("--config", str(file), "--recipe", "paper", "--lr", "0.25", "--no-augment")
    assert code == 0, err
    printed = tomllib.loads(out)
    assert printed["lr"] == 0.25, "the flag's"
    assert (printed["name"], printed["epochs"], printed["image"]) == ("mine", 3, [3, 8, 8])
    assert printed["momentum"] == 0.9
    assert printed["weight_decay"] == 1e-4, "the recipe's"
    assert printed["augment"] is False
    assert set(printed) == {field.name for field in dataclasses.fields(Run)}


@pytest.mark.parametrize("data", ["sample", "npz:/tmp/it's mine (2).npz", 'npz:a"b.npz', "folder:C:\\x"])
def test_what_is_printed_is_toml_and_gives_the_same_run_again(data: str, tmp_path: Path) -> None:
    _, first, _ = config("--data", data, "--clients", "3", "--lr", "1e-5")
    file = tmp_path / "run.toml"
    file.write_text(first)
    run = defaults_from(file, None)
    assert (run.data, run.clients, run.lr) == (data, 3, 1e-5)
    assert config("--config", str(file))[1] == first


def test_an_unknown_key_of_the_file_ends_the_program_with_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epoch = 3\n")
    code, _, err = config("--config", str(file))
    assert code == 2
    assert err.strip() == f"dsl-server: error: {file}: unknown key 'epoch'; did you mean 'epochs'?"


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("batchsize = 3", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("zzz = 3", "unknown key 'zzz'"),
        ("[run]\nepochs = 3", "unknown key 'run'"),
        ("epochs = 3.0", "epochs = 3.0 is of the wrong type"),
        ("epochs = true", "epochs = True is of the wrong type"),
        ('epochs = "3"', "epochs = '3' is of the wrong type"),
        ("lr = true", "lr = True is of the wrong type"),
        ('lr = "fast"', "lr = 'fast' is of the wrong type"),
        ("model = 20", "model = 20 is of the wrong type"),
        ("split = 3", "split = 3 is of the wrong type"),
        ("augment = 1", "augment = 1 is of the wrong type"),
        ("image = 32", "image = 32 is of the wrong type"),
        ("image = [3, 32]", "image = [3, 32] is of the wrong type"),
        ("image = [3, 32, 32.0]", "is of the wrong type"),
        ("classes = 2.5", "classes = 2.5 is of the wrong type"),
        ("lr = [0.1]", "is of the wrong type"),
        ("lr = ", "is not TOML"),
        ("epochs = 3\nepochs = 4", "is not TOML"),
        ('recipe = "old"', "--recipe 'old': choose from modern, paper"),
        ("lr = nan", "--lr nan is not a positive number"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        defaults_from(file, None)
    assert says in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*absent\.toml: No such file"):
        defaults_from(tmp_path / "absent.toml", None)
    with pytest.raises(ConfigError, match=r"--config .*: Is a directory"):
        defaults_from(tmp_path, None)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        defaults_from(tmp_path / "bytes.toml", None)


def test_a_recipe_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--recipe 'old': choose from modern, paper"):
        defaults_from(None, "old")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the run's description is not JSON"),
        ("{", "the run's description is not JSON"),
        ("null", "the run's description is not a table"),
        ("[1]", "the run's description is not a table"),
        ('"x"', "the run's description is not a table"),
        ('{"later": 1}', "the run's description: unknown key 'later'"),
        ('{"epochs": null}', "epochs = None is of the wrong type"),
        ('{"lr": NaN}', "--lr nan"),
        ('{"lr": Infinity}', "--lr inf"),
        ('{"epochs": 0}', "--epochs 0 is below 1"),
        ('{"image": [3, 0, 8]}', "--image 3 0 8 has an empty side"),
    ],
)
def test_a_wrong_description_is_refused_by_name(text: str, says: str) -> None:
    """What a server of another release, or a hostile one, may have told."""
    with pytest.raises(ConfigError) as caught:
        Run.from_json(text)
    assert says in str(caught.value)


def test_a_later_servers_settings_are_not_ignored() -> None:
    settings = json.loads(Run().to_json()) | {"compression": "zstd"}
    with pytest.raises(ConfigError, match="unknown key 'compression'"):
        checked(settings, "the run's description")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("clients", 0, "--clients 0 is below 1"),
        ("epochs", 0, "--epochs 0 is below 1"),
        ("batch_size", -1, "--batch-size -1 is below 1"),
        ("classes", 1, "--classes 1 is below 2"),
        ("train_limit", -1, "--train-limit -1 is below 0"),
        ("test_limit", -1, "--test-limit -1 is below 0"),
        ("eval_every", -1, "--eval-every -1 is below 0"),
        ("seed", -1, "--seed -1 is below 0"),
        ("outbox", 0, "--outbox 0 is below 1"),
        ("inbox", 0, "--inbox 0 is below 1"),
        ("quorum", -1, "--quorum -1 is below 0"),
        ("round_timeout", -1.0, "--round-timeout -1.0 is not a number of seconds from 0 on"),
        ("round_timeout", INF, "--round-timeout inf"),
        ("round_timeout", NAN, "--round-timeout nan"),
        ("sync", "often", "--sync 'often': choose from auto, none, average, relay"),
        ("schedule", "linear", "--schedule 'linear': choose from constant, cosine, step"),
        ("recipe", "old", "--recipe 'old': choose from modern, paper"),
        ("on_nonfinite", "shrug", "--on-nonfinite 'shrug': choose from halt, skip"),
        ("lr", 0.0, "--lr 0.0 is not a positive number"),
        ("lr", -0.1, "--lr -0.1 is not a positive number"),
        ("lr", INF, "--lr inf is not a positive number"),
        ("lr", NAN, "--lr nan is not a positive number"),
        ("warmup", -0.1, "--warmup -0.1 is not a fraction from 0 to 1"),
        ("warmup", 1.1, "--warmup 1.1 is not a fraction from 0 to 1"),
        ("warmup", NAN, "--warmup nan is not a fraction from 0 to 1"),
        ("momentum", 1.0, "--momentum 1.0 is not in [0, 1)"),
        ("momentum", -0.5, "--momentum -0.5 is not in [0, 1)"),
        ("momentum", NAN, "--momentum nan is not in [0, 1)"),
        ("weight_decay", -1e-4, "--weight-decay -0.0001"),
        ("weight_decay", NAN, "--weight-decay nan"),
        ("weight_decay", INF, "--weight-decay inf"),
        ("image", (3, 0, 8), "--image 3 0 8 has an empty side"),
        ("image", (-3, 8, 8), "--image -3 8 8 has an empty side"),
        ("name", "", "--name ''"),
        ("name", "../x", "--name '../x': use letters, digits, '.', '_' and '-'"),
        ("name", "a b", "--name 'a b'"),
        ("name", "é", "--name 'é'"),
        ("partition", "", "--partition ''"),
        ("partition", "even", "--partition 'even': choose iid, own, or dirichlet:ALPHA"),
        ("partition", "dirichlet", "--partition 'dirichlet'"),
        ("partition", "dirichlet:", "--partition 'dirichlet:'"),
        ("partition", "dirichlet:0", "--partition 'dirichlet:0'"),
        ("partition", "dirichlet:-1", "--partition 'dirichlet:-1'"),
        ("partition", "dirichlet:nan", "--partition 'dirichlet:nan'"),
        ("partition", "dirichlet:inf", "--partition 'dirichlet:inf'"),
        ("partition", "dirichlet:x", "--partition 'dirichlet:x'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Run(**{setting: value})
    assert says in str(caught.value)


def test_a_file_may_leave_the_clients_of_its_quorum_to_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("quorum = 2")
    assert replace(defaults_from(file, None), clients=3).least_clients == 2


@pytest.mark.parametrize("scheme", ["dirichlet:0.1", "dirichlet:1e6", "dirichlet:1e7", "dirichlet:1e300"])
def test_the_server_accepts_just_the_partitions_that_clients_can_deal(scheme: str) -> None:
    def accepts(judge: Any) -> bool:
        try:
            judge()
        except ConfigError:
            return False
        return True

    ours = accepts(lambda: Run(partition=scheme))
    theirs = accepts(lambda: partition(torch.arange(100) % 10, scheme, 2, 0))
    assert ours == theirs


# ---------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    ("settings", "progress", "rate"),
    [
        ({"schedule": "constant", "warmup": 0.0}, 0.0, 0.1),
        ({"schedule": "constant", "warmup": 0.0}, 0.99, 0.1),
        ({"schedule": "constant", "warmup": 0.2}, 0.0, 0.001),  # lr / 100
        ({"schedule": "constant", "warmup": 0.2}, 0.1, 0.0505),  # half way from 0.001 to 0.1
        ({"schedule": "constant", "warmup": 0.2}, 0.2, 0.1),
        ({"schedule": "cosine", "warmup": 0.2}, 0.05, 0.02575),  # a quarter of the way
        ({"schedule": "cosine", "warmup": 0.2}, 0.2, 0.1),
        ({"schedule": "cosine", "warmup": 0.2}, 0.6, 0.05),  # half of the rest
        ({"schedule": "cosine", "warmup": 0.2}, 0.2 + 0.8 / 3, 0.075),  # cos 60° = 1/2
        ({"schedule": "cosine", "warmup": 0.0}, 0.0, 0.1),
        ({"schedule": "cosine", "warmup": 0.0}, 0.5, 0.05),
        ({"schedule": "cosine", "warmup": 0.0}, 1.0, 0.0),
        ({"schedule": "cosine", "warmup": 1.0}, 0.5, 0.0505),
        ({"schedule": "step", "warmup": 0.0}, 0.0, 0.1),
        ({"schedule": "step", "warmup": 0.0}, 0.49, 0.1),
        ({"schedule": "step", "warmup": 0.0}, 0.5, 0.01),
        ({"schedule": "step", "warmup": 0.0}, 0.74, 0.01),
        ({"schedule": "step", "warmup": 0.0}, 0.75, 0.001),
        ({"schedule": "step", "warmup": 0.6}, 0.3, 0.0505),
    ],
)
def test_the_learning_rate_at_points_worked_by_hand(
    settings: dict[str, Any], progress: float, rate: float
) -> None:
    assert learning_rate(Run(lr=0.1, **settings), progress) == pytest.approx(rate, abs=1e-12)


def test_progress_counts_batches_before_this_one() -> None:
    run = Run(epochs=4)
    assert progress_of(run, 0, 0, 5) == 0
    assert progress_of(run, 1, 0, 5) == 0.25
    assert progress_of(run, 2, 3, 6) == 0.625
    assert progress_of(run, 3, 4, 5) == pytest.approx(0.95)
    assert progress_of(run, 3, 10**9 - 1, 10**9) < 1
