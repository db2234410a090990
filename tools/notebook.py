"""Runs a notebook and writes its outputs into it: python tools/notebook.py examples/compare.ipynb

What would differ from one machine to the next for no reason (times of cells, their ids) is left out.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SECONDS = 600


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook, run from top to bottom in its folder. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    run = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, resources=run, record_timing=False).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", ()):
            output.get("transient", {}).clear()
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(executed(Path(name)), name)
        print(f"{name}: run, and written with its outputs")
