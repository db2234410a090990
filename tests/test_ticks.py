"""What a server of several ranks does not do is told at its start, in a line; and what its flags may be."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from torch.distributed.run import get_args_parser

from common.errors import ConfigError
from common.methods import METHODS, build_method, settled
from common.run import Run
from dsl_server import __main__ as program
from dsl_server import torchrun
from dsl_server.ticks import Pace, check
from tests.documents import SHELL, blocks


def torchruns(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, *SHELL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.startswith("torchrun "):
                yield shlex.split(line)


RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}


def refusal(pace: Pace | None = None, **settings: Any) -> str:
    run = settled(Run(clients=4, **settings))
    with pytest.raises(ConfigError) as refused:
        check(run, build_method(run), pace or Pace())
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_methods_with_one_part_that_steps_on_each_batch_are_had_and_no_others(method: str) -> None:
    if method in ("dsl", "csl", "cse-fsl"):
        run = settled(Run(clients=4, method=method))
        check(run, build_method(run), Pace())
    else:
        assert refusal(method=method) == (
            f"--method {method}: a server of several ranks needs one part that steps on each batch; choose "
            "dsl, csl or cse-fsl, or start one process"
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quorum": 3}, "--quorum 3: not for"),
        ({"sync": "relay"}, "--sync relay: not for"),
        ({"replay": "1GB"}, "--replay: not for"),
        ({"concatenate": 2}, "--concatenate 2: not for"),
        ({"round_timeout": 5.0}, "--round-timeout 5: not for"),
        ({"measure_memory": True}, "--measure-memory: not for"),
    ],
)
def test_settings_of_one_process_are_refused(settings: dict[str, Any], said: str) -> None:
    assert refusal(**settings).startswith(said)


def test_modules_that_learn_one_after_the_other_are_not_divided() -> None:
    assert refusal(Pace(fsdp=True), server_modules=2) == (
        "--server-modules 2: not with --fsdp; leave one of them out"
    )


def test_a_tick_in_fixed_order_is_one_batch_of_each() -> None:
    assert "leave it out" in refusal(Pace(batches=2), fixed_order=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, 20.0, "step"), "--tick-batches 0 is below 1"),
        ((1, 0.5, "step"), "--tick-ms 0.5: choose from 1 to 60000"),
        ((1, float("nan"), "step"), "--tick-ms nan"),
        ((1, 20.0, "every:0"), "--server-sync 'every:0': choose step, or every:H, such as every:8"),
        ((1, 20.0, "often"), "--server-sync 'often'"),
        ((1, 20.0, "every:8", True), "--fsdp: every step is a common one; leave --server-sync every:8 out"),
    ],
)
def test_a_pace_that_cannot_be_is_refused(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("'", ".")):
        Pace.of(*given)


def test_a_pace_is_as_flags_say_it() -> None:
    assert Pace.of(4, 50, "every:8") == Pace(4, 0.05, 8)
    assert Pace.of(1, 20, "step") == Pace()
    assert Pace.of(1, 20, "step", fsdp=True) == Pace(fsdp=True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--server-sync", "every:4"],
        ["--tick-batches", "2"],
        ["--tick-ms", "5.0"],
        ["--advertise", "a"],
        ["--fsdp"],
    ],
)
def test_flags_of_ranks_without_ranks_are_refused(flags: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=f"{' '.join(flags)}: is of a server of several ranks; start it by torchrun"
    ):
        program._main(flags)


def test_a_process_finds_its_place_in_torchrun_s_environment() -> None:
    here = torchrun.here(RANK)
    assert here == torchrun.Here(1, 1, 3)
    assert here.listen("0.0.0.0:50051") == "0.0.0.0:50052"
    assert here.listen("127.0.0.1:0") == "127.0.0.1:0"
    assert here.device("cpu") == "cpu"
    assert replace(here, local=0).listen("[::]:7") == "[::]:7"


COMMANDS = [words for words in torchruns(Path("docs/ranks.md"))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_are_understood_by_torchrun_and_by_the_server(words: list[str]) -> None:
    theirs = get_args_parser().parse_args(words[1:])
    assert theirs.module
    assert theirs.training_script == "dsl_server"
    tyro.cli(program.Options, args=theirs.training_script_args)


def test_the_commands_of_the_page_were_found() -> None:
    assert len(COMMANDS) == 5


def test_one_process_is_no_server_of_several() -> None:
    assert torchrun.here({}) is None
    assert torchrun.here({**RANK, "WORLD_SIZE": "1"}) is None
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        torchrun.here({"RANK": "0", "WORLD_SIZE": "2"})


def test_under_torchrun_resume_begins_a_run_where_there_is_none(tmp_path: Path) -> None:
    first = {**RANK, "RANK": "0"}
    assert torchrun.begins(tmp_path, first)
    assert not torchrun.begins(tmp_path, RANK), "only the first rank has the run's folder"
    assert not torchrun.begins(tmp_path, {}), "without torchrun it is a mistake"
    (tmp_path / "run.json").write_text("{}")
    assert not torchrun.begins(tmp_path, first)
