"""The figures: finished runs drawn, each figure also told in words for readers who do not see it.

The first four are those of the paper (arXiv 2601.19261, figures 4 to 7): accuracy by epoch, traffic, memory
and time. Knows what each figure shows, but neither how panels are laid out, which is panels.py's, nor the
page that the figures stand on. The same runs always give the same bytes.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from common.errors import ConfigError
from dsl_lab import panels
from dsl_lab.panels import Look, Plot
from dsl_lab.reference import Reference, reference
from dsl_lab.runs import Down, FinishedRun, Runs, Up
from dsl_lab.series import Group, Series, Stat, grouped, labels
from dsl_lab.table import mebibytes, megabytes, percent, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tol's muted set, for what is neither a method nor a client.
KIND_COLOURS = {
    "activations": "#44AA99",
    "labels": "#999933",
    "evaluation": "#DDCC77",
    "gradients": "#882255",
    "weights": "#AA4499",
    "framing and control": "#888888",
}
PHASE_COLOURS = {
    "forward": "#88CCEE",
    "backward": "#332288",
    "encode / decode": "#DDCC77",
    "wait / idle": "#DDDDDD",
}
MANY_BYTES = 1e10  # from here on in gigabytes

Pair = Sequence[Sequence[float]]  # the parts of a run's two bars
Beside = Sequence[float | None]  # what somebody else has at the two
Parts = Callable[[FinishedRun], Pair]
Theirs = Callable[[Reference], Beside]


@dataclass(frozen=True)
class Drawing:
    name: str
    caption: str
    draw: "Callable[[Figure, Group], str]"
    """Draws the series; returns what the figure shows, in words."""
    scored: bool = False
    """It shows scores, which can be compared only where all are of one metric."""


def write(runs: Runs, folder: Path) -> list[Path]:
    """All figures as PNG files. Raises ConfigError when there is no run or no file can be written."""
    group = grouped(runs)
    images = {folder / f"{drawing.name}.png": render(drawing, group, "png")[0] for drawing in suiting(group)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            path.write_bytes(image)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; name another") from error
    return list(images)


def suiting(group: Group) -> list[Drawing]:
    """The figures that can be drawn of these."""
    comparable = len({series.first.summary.test.name for series in group}) == 1
    return [drawing for drawing in DRAWINGS if comparable or not drawing.scored]


def render(drawing: Drawing, group: Group, form: Literal["png", "svg"]) -> tuple[bytes, str]:
    """A figure as a file's bytes, and in words."""
    import matplotlib
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(layout="constrained")
        words = drawing.draw(figure, group)
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=200, metadata=nothing)
    return file.getvalue(), words


def _accuracy(figure: "Figure", group: Group) -> str:
    from matplotlib.ticker import MaxNLocator

    what = f"test {_metric(group)}"
    plots = panels.line_plots(figure, group, f"{what.capitalize()} by epoch", "epoch", what)
    for plot in plots:
        plot.axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        _percents(plot, group)
        for look in plot.looks:
            _curves(plot, look)
    panels.legend(figure, plots)
    return f"Lines, {what} by epoch. At the end: " + _listed(
        end for series, name in _named(group) for end in _ends(series, name)
    )


def _curves(plot: Plot, look: Look) -> None:
    joined = look.series.by_epoch(lambda line: line.test.joined)
    alone = look.series.by_epoch(lambda line: line.test.client_only)
    panels.curve(plot, look, list(joined), list(joined.values()), "-", look.name)
    if alone:
        panels.curve(plot, look, list(alone), list(alone.values()), "--", f"{look.name}, client alone")
    logged = reference(look.series.first).accuracy
    if logged is not None:
        plot.axes.axhline(logged, ls=":", lw=1.4, color=look.colour, label=f"{look.name}, authors' best")


def _ends(series: Series, name: str) -> list[str]:
    alone = series.by_epoch(lambda line: line.test.client_only)
    joined = series.by_epoch(lambda line: line.test.joined)
    ends = {name: joined, f"{name}, client alone": alone}
    text = _text(series)
    return [f"{what} {text(points[max(points)].mean)}" for what, points in ends.items() if points]


def _metric(group: Group) -> str:
    """That all of these are scored by."""
    return group[0].first.summary.test.name


def _text(series: Series) -> Callable[[float | None], str]:
    """How a score of it is written."""
    return percent if series.first.summary.test.metric is None else plain


def _percents(plot: Plot, group: Group) -> None:
    from matplotlib.ticker import PercentFormatter

    if _metric(group) == "accuracy":
        plot.axes.yaxis.set_major_formatter(PercentFormatter(1))


def _traffic(figure: "Figure", group: Group) -> str:
    most = max(max(run.serialized_up, run.serialized_down) for series in group for run in series.runs)
    unit, size = _unit(most)

    def parts(run: FinishedRun) -> Pair:
        return [
            [_kinds(way).get(kind, 0) / size for kind in KIND_COLOURS]
            for way in (run.summary.wire.up, run.summary.wire.down)
        ]

    def theirs(said: Reference) -> Beside:
        return [None if way is None else way / size for way in (said.up, said.down)]

    plots = _bars(figure, group, "Traffic up and down in the whole run", unit, ("up", "down"), parts, theirs)
    for plot in plots:
        panels.stack(plot, _means(plot, parts), KIND_COLOURS)
        panels.whiskers(plot, _totals(plot, parts))
        panels.beside(plot, _others(plot, theirs), "the paper")
        texts = [_short(sum(stack)) for stack in _means(plot, parts)]
        panels.name_ends(plot, _ends_of(plot, parts), _others(plot, theirs), texts)
    panels.legend(figure, plots)
    return "Bars, traffic in all messages: " + _listed(
        f"{name} {side} {megabytes(_total(series, at, parts).mean * size)} MB"
        for series, name in _named(group)
        for at, side in enumerate(("up", "down"))
    )


def _memory(figure: "Figure", group: Group) -> str:
    live = all(run.summary.memory for series in group for run in series.runs)

    def parts(run: FinishedRun) -> Pair:
        peak = run.summary.memory if live and run.summary.memory else run.summary.peak_bytes
        return [[peak.client / 2**20], [peak.server / 2**20]]

    def theirs(said: Reference) -> Beside:
        return [None if said.peak is None else said.peak / 2**20, None]

    def held(run: FinishedRun) -> float:
        return (run.held or 0) / 2**20

    def one(run: FinishedRun) -> float:
        return (run.one_process or 0) / 2**20

    sides = ("client", "server")
    title = "Peak memory of tensors" if live else "Peak memory"
    joint = live and all(run.one_process for series in group for run in series.runs)
    most = one if joint else None
    plots = _bars(figure, group, title, "MiB (2²⁰ bytes)", sides, parts, theirs, most, numbered=True)
    for plot in plots:
        means = _means(plot, parts)
        panels.pairs(plot, [mean for (mean,) in means])
        if live:
            panels.within(plot, [_stat(look.series, held).mean for look in plot.looks], "held while waiting")
        if joint:
            panels.across(plot, [_stat(look.series, one) for look in plot.looks], "one process for both")
        panels.whiskers(plot, _totals(plot, parts))
        panels.beside(plot, _others(plot, theirs), "authors, both ends in one process")
        texts = [f"{mean:,.0f}" for (mean,) in means]
        lines = [_stat(look.series, one).mean if joint else None for look in plot.looks for _ in sides]
        marks = [mark or line for mark, line in zip(_others(plot, theirs), lines, strict=True)]
        panels.name_ends(plot, _ends_of(plot, parts), marks, texts)
    panels.legend(figure, plots)
    words = "Bars, peak memory: " + _listed(
        f"{name} {side} {mebibytes(_total(series, at, parts).mean * 2**20)} MiB"
        for series, name in _named(group)
        for at, side in enumerate(sides)
    )
    if joint:
        words += " Held while waiting, and one process for both: " + _listed(
            f"{name} {_stat(series, held).mean:,.1f} and {_stat(series, one).mean:,.1f} MiB"
            for series, name in _named(group)
        )
    return words


def _time(figure: "Figure", group: Group) -> str:
    def parts(run: FinishedRun) -> Pair:
        return [list(astuple(side)) for side in (run.summary.seconds.client, run.summary.seconds.server)]

    def theirs(said: Reference) -> Beside:
        return [said.wall, None]

    sides = ("client", "server")
    plots = _bars(figure, group, "Time by phase", "seconds", sides, parts, theirs, _wall)
    for plot in plots:
        panels.stack(plot, _means(plot, parts), PHASE_COLOURS)
        walls = [_stat(look.series, _wall) for look in plot.looks]
        panels.across(plot, walls, "wall clock")
        panels.beside(plot, _others(plot, theirs), "authors' wall clock, both ends in one process")
    panels.legend(figure, plots)
    return "Bars, seconds of each phase: " + _listed(
        f"{name} {side} " + " ".join(f"{n} {s:,.1f}" for n, s in zip(PHASE_COLOURS, stack, strict=True))
        for series, name in _named(group)
        for side, stack in zip(sides, _mean_parts(series, parts), strict=True)
    )


def _cost(figure: "Figure", group: Group) -> str:
    unit, size = _unit(max(_moved(series)[-1] for series in group))
    what = f"test {_metric(group)}"
    title = f"{what.capitalize()} against traffic"
    plots = panels.line_plots(figure, group, title, f"moved so far, {unit}", what)
    for plot in plots:
        _percents(plot, group)
        plot.axes.xaxis.set_major_formatter("{x:,g}")
        for look in plot.looks:
            moved = [count / size for count in _moved(look.series)]
            scores = look.series.by_epoch(lambda line: line.test.joined)
            panels.curve(plot, look, moved, list(scores.values()), "-", look.name)
        plot.axes.set_xlim(left=0)
    panels.legend(figure, plots)
    return f"Lines, {what} of the joined network against traffic: " + _listed(
        f"{name} {_text(series)(_last(series))} after {megabytes(_moved(series)[-1])} MB"
        for series, name in _named(group)
    )


DRAWINGS = (
    Drawing(
        "accuracy",
        "Test accuracy after each epoch. Solid: the client's part joined with the server's. "
        "Dashed: the client alone with its auxiliary head, which conventional split learning "
        "does not have.",
        _accuracy,
        scored=True,
    ),
    Drawing(
        "traffic",
        "All serialized messages of the run, before HTTP/2, by what they carried; of all clients "
        "together. A decoupled method sends no gradients down; small answers are left, and weights "
        "where parts are averaged or handed on.",
        _traffic,
    ),
    Drawing(
        "memory",
        "Most memory that each side held at once; of the clients, the one that held most. Of tensors, "
        "where all runs counted them or were on a GPU; otherwise of the whole process, with Python and "
        "its libraries. Where tensors were counted, what a client holds while it waits is hatched, and a "
        "line is at what one process with both ends would need at least.",
        _memory,
    ),
    Drawing(
        "time",
        "Seconds of each phase; the client's are the mean of all clients. A client waits for "
        "gradients, for room to send or for its turn, a server idles until a batch comes. The rest, up "
        "to the wall clock, went to what is not counted here, such as reading the data and scoring.",
        _time,
    ),
    Drawing(
        "accuracy-by-traffic",
        "Test accuracy of the joined network against all that had crossed the wire by then. "
        "Further left is cheaper, higher is better.",
        _cost,
        scored=True,
    ),
)


def _bars(
    figure: "Figure",
    group: Group,
    title: str,
    unit: str,
    sides: tuple[str, str],
    parts: Parts,
    theirs: Theirs,
    also: Callable[[FinishedRun], float] | None = None,
    numbered: bool = False,
) -> list[Plot]:
    """Axes for stacks of these parts, with room for all that will stand in them.

    also: another number that goes in, in place of those after the bars unless these are numbered as well.
    """
    totals = [_total(series, at, parts) for series in group for at in (0, 1)]
    ends = [stat.mean + stat.spread for stat in totals]
    if also:
        ends += [stat.mean + stat.spread for stat in (_stat(series, also) for series in group)]
    ends += [value for series in group for value in theirs(reference(series.first)) if value]
    return panels.bar_plots(figure, group, title, unit, sides, max(ends), numbered or also is None)


def _totals(plot: Plot, parts: Parts) -> list[Stat]:
    return [_total(look.series, at, parts) for look in plot.looks for at in (0, 1)]


def _means(plot: Plot, parts: Parts) -> list[list[float]]:
    """Each bar's parts, the mean of its runs."""
    return [stack for look in plot.looks for stack in _mean_parts(look.series, parts)]


def _mean_parts(series: Series, parts: Parts) -> list[list[float]]:
    stacks = [parts(run) for run in series.runs]
    return [[fmean(values) for values in zip(*(pair[at] for pair in stacks), strict=True)] for at in (0, 1)]


def _total(series: Series, at: int, parts: Parts) -> Stat:
    return _stat(series, lambda run: sum(parts(run)[at]))


def _stat(series: Series, of: Callable[[FinishedRun], float]) -> Stat:
    stat = series.stat(of)
    assert stat, "every run has this number"
    return stat


def _ends_of(plot: Plot, parts: Parts) -> list[float]:
    return [total.mean + total.spread for total in _totals(plot, parts)]


def _others(plot: Plot, theirs: Theirs) -> list[float | None]:
    return [value for look in plot.looks for value in theirs(reference(look.series.first))]


def _wall(run: FinishedRun) -> float:
    return run.summary.seconds.wall


def _moved(series: Series) -> list[float]:
    """Bytes by the end of each epoch that was scored."""
    both = series.by_epoch(lambda line: line.wire.up + line.wire.down)
    return [stat.mean for stat in both.values()]


def _unit(most: float) -> tuple[str, float]:
    """In words, and in bytes."""
    return ("GB (10⁹ bytes)", 1e9) if most >= MANY_BYTES else ("MB (10⁶ bytes)", 1e6)


def _last(series: Series) -> float:
    scores = series.by_epoch(lambda line: line.test.joined)
    return scores[max(scores)].mean


def _kinds(way: Up | Down) -> dict[str, int]:
    counts: dict[str, int] = asdict(way)
    counts["framing and control"] = counts.pop("framing") + counts.pop("control")
    return counts


def _short(amount: float) -> str:
    """Three digits, and no more than there are: `164`, `6.55`; `<0.01` is a little."""
    if 0 < amount < 0.005:
        return "<0.01"
    return f"{amount:,.0f}" if amount >= 100 or not amount else f"{amount:,.{1 if amount >= 10 else 2}f}"


def _named(group: Group) -> Iterable[tuple[Series, str]]:
    return zip(group, labels(group), strict=True)


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(texts) + "."
