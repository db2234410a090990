"""The examples, and every block of docs/python.md, run as a user would run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

if not EXAMPLES.exists():
    pytest.skip("examples are not in this distribution", allow_module_level=True)

# What is imported here is imported there; what warns there fails.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def outputs(notebook: Any) -> list[list[str]]:
    """Of each cell of code, the forms of what it shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[form for out in cell.outputs for form in out.get("data", {"text": ""})] for cell in cells]


@pytest.mark.timeout(300)
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = nbformat.read(EXAMPLES / "compare.ipynb", as_version=4)
    shutil.copy(EXAMPLES / "compare.ipynb", tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "notebook.py"), str(tmp_path / "compare.ipynb")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = nbformat.read(tmp_path / "compare.ipynb", as_version=4)
    assert [cell.source for cell in run.cells] == [cell.source for cell in stored.cells]
    assert outputs(run) == outputs(stored)
    assert "image/png" in str(outputs(run))
    assert str(ROOT) not in (EXAMPLES / "compare.ipynb").read_text()


@pytest.mark.timeout(240)
def test_the_two_programs_train_together(tmp_path: Path) -> None:
    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        programs.append(
            subprocess.Popen(
                [sys.executable, str(EXAMPLES / "two_programs" / program), *arguments],
                cwd=tmp_path,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return programs[-1]

    programs: list[subprocess.Popen[str]] = []
    try:
        greeting = start("server.py", "127.0.0.1:0").stdout
        assert greeting is not None
        found = re.search(r"waiting for 2 clients at (127\.0\.0\.1:\d+)", greeting.readline())
        assert found
        start("client.py", "0", found[1])
        start("client.py", "1", found[1])
        said = [program.communicate(timeout=200)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0, 0, 0], said
    assert re.search(r"epoch 2: accuracy 0\.\d+, \d+\.\d MB up\n<dsl: accuracy", said[0]), said
    for words in said[1:]:
        assert re.search(
            r"client [01] of 2: dsl, 2 epochs\n  accuracy .*\n  accuracy .*\nthe bottom's", words
        ), said


@pytest.mark.timeout(200)
def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    """One after the other, in one program."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)
    assert len(blocks) > 6
    assert f"```python\n{blocks[0]}```" in (ROOT / "README.md").read_text()
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--model 'resnet9': choose resnetN" in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
