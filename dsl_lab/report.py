"""Finished runs as one self-contained web page: the table, the figures, and how they were made.

The page loads nothing: its style (page.css) and its figures are inside it, and the same runs always give
the same bytes. Knows HTML, but neither how a number is written, which is table.py's to say, nor how a
figure is drawn, which is figures.py's.
"""

import re
import shlex
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from common.errors import ConfigError
from dsl_lab import figures, table
from dsl_lab.runs import Runs, at_least_one

TITLE = "Split learning, measured"
INTRODUCTION = """
Split learning trains one neural network on two machines. The client keeps its data and the
network's first layers; the server has the layers above. For each batch the client sends up what
its last layer computed, the <em>activations</em>, with the labels. In <strong>conventional split
learning (CSL)</strong> the server then sends back the gradient at the cut, as large as the
activations, and the client waits for it before it can learn. In <strong>decoupled split learning
(DSL)</strong> nothing has to come back: the client learns at once from a small auxiliary head of
its own, and the server learns from the activations in its own time. Below is what each run
reached, and what it cost in traffic, time and memory."""


def write(runs: Runs, path: Path, commands: Sequence[str] = ()) -> Path:
    """The page. Raises ConfigError when there is no run to report or the file cannot be written."""
    page = _page(at_least_one(runs), commands)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another") from error
    return path


def _page(runs: Runs, commands: Sequence[str]) -> str:
    style = files("dsl_lab").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{TITLE}</h1>
<p class="facts">{escape(table.shared(runs))}</p>
<p>{INTRODUCTION}</p>
<h2>Results</h2>
{_table(runs)}
<p class="note">{escape(table.NOTES)}</p>
<h2>Figures</h2>
{"".join(_figure(drawing, runs) for drawing in figures.DRAWINGS)}
<h2>How it was made</h2>
{_origin(runs)}
{_commands(runs, commands)}
{_settings(runs)}
</main>
</body>
</html>
"""


def _table(runs: Runs) -> str:
    groups = [(group, len(list(heads))) for group, heads in groupby(table.HEADINGS, lambda h: h[0])]
    over = "".join(f'<th scope="colgroup" colspan="{n}">{escape(g)}</th>' for g, n in groups)
    under = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in table.HEADINGS)
    return _grid("results", f"<tr>{over}</tr><tr>{under}</tr>", table.rows(runs))


def _grid(kind: str, head: str, rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}">\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _heads(*names: str) -> str:
    return "<tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr>"


def _figure(drawing: figures.Drawing, runs: Runs) -> str:
    image, words = figures.render(drawing, runs, "svg")
    svg = image.decode()
    svg = svg[svg.index("<svg") :].strip()  # without the prologue, which has no place in HTML
    # Every figure counts its parts from one: an id must be one only in the whole page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)
    return (
        f'<figure><div class="wide">{svg}</div><figcaption>{escape(drawing.caption)}</figcaption></figure>\n'
    )


def _origin(runs: Runs) -> str:
    """Where, when and with which versions. Folders by name: their paths are nobody's business."""
    rows = [
        [
            name,
            run.folder.name,
            run.about.started.replace("T", " "),
            run.about.machine,
            ", ".join(f"{package} {version}" for package, version in run.about.versions.items()),
        ]
        for name, run in zip(table.labels(runs), runs, strict=True)
    ]
    return _grid("text origin", _heads("run", "folder", "started", "machine", "versions"), rows)


def _commands(runs: Runs, commands: Sequence[str]) -> str:
    """Those given, or else those that the runs remember."""
    own = [shlex.join(run.about.command) for run in runs if run.about.command]
    lines = "\n".join(map(escape, commands or own))
    return f"<h3>Commands</h3>\n<pre><code>{lines}</code></pre>" if lines else ""


def _settings(runs: Runs) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.about.run)
    rows = [[key, *(str(run.about.run.get(key, "–")) for run in runs)] for key in keys]
    grid = _grid("text", _heads("setting", *table.labels(runs)), rows)
    return f"<details><summary>All settings</summary>{grid}</details>"
