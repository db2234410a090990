"""Finished runs as one self-contained web page: the table, the figures, and how they were made.

The page loads nothing: its style (page.css) and its figures are inside it, and the same runs always give
the same bytes. Knows HTML, but neither how a number is written, which is table.py's to say, nor how a
figure is drawn, which is figures.py's. `publish` puts all forms of a report side by side.
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
from dsl_lab.runs import Runs
from dsl_lab.series import Group, grouped, labels, shared

TITLE = "Split learning, measured"
FEW = 6  # so many runs' origins are shown; more are folded away
INTRODUCTION = """
Split learning trains one neural network on two machines. The client keeps its data and the
network's first layers; the server has the layers above. For each batch the client sends up what
its last layer computed, the <em>activations</em>, with the labels. In <strong>conventional split
learning (CSL)</strong> the server then sends back the gradient at the cut, as large as the
activations, and the client waits for it before it can learn. In <strong>decoupled split learning
(DSL)</strong> nothing has to come back: the client learns at once from a small auxiliary head of
its own, and the server learns from the activations in its own time. Below is what each run
reached, and what it cost in traffic, time and memory."""


def publish(runs: Runs, path: Path) -> list[Path]:
    """The page, beside it the table as Markdown and CSV, and the figures as PNG files.

    Raises ConfigError when there is no run to report or a file cannot be written.
    """
    tables = {".md": table.markdown(runs), ".csv": table.comma_separated(runs)}
    written = [_written(path.with_suffix(ending), text) for ending, text in tables.items()]
    return [write(runs, path), *written, *figures.write(runs, path.parent / f"{path.stem}-figures")]


def write(runs: Runs, path: Path, commands: Sequence[str] = ()) -> Path:
    """The page. Raises ConfigError when there is no run to report or the file cannot be written."""
    return _written(path, _page(runs, commands))


def _written(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another") from error
    return path


def _page(runs: Runs, commands: Sequence[str]) -> str:
    style = files("dsl_lab").joinpath("page.css").read_text(encoding="utf-8")
    group = grouped(runs)
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
<p class="facts">{escape(shared(group))}</p>
<p>{INTRODUCTION}</p>
<h2>Results</h2>
{_table(group)}
<p class="note">{escape(table.notes(group))}</p>
<h2>Figures</h2>
{"".join(_figure(drawing, group) for drawing in figures.suiting(group))}
<h2>How it was made</h2>
{_origin(runs)}
{_commands(runs, commands)}
{_settings(group)}
</main>
</body>
</html>
"""


def _table(group: Group) -> str:
    heads = table.headings(group)
    groups = [(over, len(list(some))) for over, some in groupby(heads, lambda head: head[0])]
    above = "".join(f'<th scope="colgroup" colspan="{n}">{escape(g)}</th>' for g, n in groups)
    under = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in heads)
    return _grid("results", f"<tr>{above}</tr><tr>{under}</tr>", table.rows(group))


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


def _folded(summary: str, content: str, shown: bool = False) -> str:
    opened = " open" if shown else ""
    return f"<details{opened}><summary>{summary}</summary>{content}</details>"


def _figure(drawing: figures.Drawing, group: Group) -> str:
    image, words = figures.render(drawing, group, "svg")
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
            run.title,
            run.about.started.replace("T", " "),
            run.about.machine,
            ", ".join(f"{package} {version}" for package, version in run.about.versions.items()),
        ]
        for run in runs
    ]
    grid = _grid("text origin", _heads("run", "started", "machine", "versions"), rows)
    return _folded("Runs", grid, len(runs) <= FEW)


def _commands(runs: Runs, commands: Sequence[str]) -> str:
    """Those given, or else those that the runs remember."""
    lines = commands or [shlex.join(run.about.command) for run in runs if run.about.command]
    text = "\n".join(map(escape, lines))
    return _folded("Commands", f"<pre><code>{text}</code></pre>", len(lines) <= FEW) if lines else ""


def _settings(group: Group) -> str:
    """What all have, then what not all have."""
    told = {key: [str(series.first.about.run.get(key, "–")) for series in group] for key in _keys(group)}
    same = [[key, values[0]] for key, values in told.items() if len(set(values)) == 1]
    other = [[key, *values] for key, values in told.items() if len(set(values)) > 1]
    grids = [_grid("text", _heads("setting", *labels(group)), other)] if other else []
    grids.append(_grid("text", _heads("setting", "in all runs"), same))
    return _folded("All settings", "".join(grids))


def _keys(group: Group) -> list[str]:
    keys = dict.fromkeys(key for series in group for key in series.first.about.run)
    return [key for key in keys if key not in ("name", "seed")]
