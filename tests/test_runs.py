"""Run folders read: what a run counted, and what is refused. The folders are made up."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from dsl_lab.runs import find, read
from tests.finished import dsl_and_csl, make


def test_bytes_of_a_run(tmp_path: Path) -> None:
    dsl, csl = dsl_and_csl(tmp_path)
    assert (dsl.payload_up, dsl.payload_down) == (48_016_000, 0)
    assert (dsl.serialized_up, dsl.serialized_down) == (60_046_400, 9_000)
    assert (csl.payload_down, csl.serialized_down) == (48_000_000, 48_009_000)
    assert [e.wire.up for e in dsl.evaluations] == [30_000_000, 60_000_000]
    assert (dsl.socket_up, csl.socket_up) == (60_250_000, None)


def test_a_sweeps_folder_gives_its_finished_runs_in_order(tmp_path: Path) -> None:
    for seed, split, method in ((0, "d", "dsl"), (1, "s", "csl"), (0, "s", "csl"), (0, "s", "dsl")):
        make(tmp_path / f"{split}-{method}-{seed}" / "server", method, split=split, seed=seed)
    client = make(tmp_path / "s-dsl-0" / "client-0", "dsl")
    about = json.loads((client / "run.json").read_text())
    (client / "run.json").write_text(json.dumps({**about, "role": "client"}))
    half = make(tmp_path / "half" / "server", "dsl")
    (half / "summary.json").unlink()
    assert [run.title for run in find(tmp_path)] == ["s-csl-0", "s-csl-1", "s-dsl-0", "d-dsl-0"]
    assert [run.folder for run in find(client)] == [client], "what is named itself is read, whatever it is"
    with pytest.raises(ConfigError, match="holds no finished run"):
        find(half.parent)


@pytest.mark.parametrize("name", ["summary.json", "run.json", "metrics.jsonl"])
def test_an_unfinished_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "half", "dsl")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"half holds no finished run \(no {name}\): give the server's"):
        read(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no finished run"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("summary.json", "{", "Expecting property name"),
        ("summary.json", "[]", r"summary.json is \[\]"),
        ("summary.json", '{"test": {"accuracy": "high"}}', "summary.json: test: accuracy is 'high'"),
        ("run.json", '{"name": "x"}', "run.json: run is missing"),
        ("metrics.jsonl", "", "holds no evaluation"),
        ("metrics.jsonl", '{"epoch": 1, "te', "Unterminated string"),
        ("metrics.jsonl", '{"epoch": true}', "metrics.jsonl: epoch is True"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    folder = make(tmp_path / "broken", "dsl")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"broken.*{complaint}.*give the server's folder"):
        read(folder)
