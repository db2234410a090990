"""What all figures share: panels side by side, colours, and names for lines and bars.

Knows axes, bars and legends, but not what the numbers are. Colours are safe for colour-blind readers
(Okabe-Ito), and lines of one colour have markers of their own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsl_lab.series import Group, Panel, Series, Stat, panels, splits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
GAP = 2.7  # from one series' pair of bars to the next, where a bar to its pair is 1
NAME = 0.9  # and so much more where a name stands above them
LONG = 24  # letters of a name that does
BAR = 0.23  # inches from one bar to its pair
METHOD_COLOURS = {"dsl": "#0072B2", "csl": "#D55E00"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
MARKS = 12  # on a line, at most
LEGEND = 0.19  # inches from one line of it to the next
INK = "#222222"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "split learning, measured",
    "font.size": 9,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Look:
    """How a series is shown in its panel."""

    series: Series
    name: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Plot:
    """A panel's axes, and who stands there.

    room: for a number after a bar, on the bars' scale. gap: from one pair of bars to the next.
    """

    axes: "Axes"
    looks: Sequence[Look]
    room: float = 0.0
    gap: float = GAP


def line_plots(figure: "Figure", group: Group, title: str, below: str, beside: str) -> list[Plot]:
    """Axes for lines, all of the same scales."""
    dealt = panels(group)
    columns = _columns(dealt, group)
    height = 3.2 if len(dealt) == 1 else 2.0
    plots = _plots(figure, dealt, columns, height, title, below, sharey=True)
    figure.supylabel(beside)
    for plot in plots:
        plot.axes.grid()
    return plots


def bar_plots(
    figure: "Figure",
    group: Group,
    title: str,
    below: str,
    sides: tuple[str, str],
    most: float,
    numbered: bool,
) -> list[Plot]:
    """Axes for pairs of bars, named on the left, the first series on top.

    most: how far anything goes. numbered: with room for a number beyond it.
    """
    dealt = panels(group)
    columns = _columns(dealt, group)
    above = max(len(name) for panel in dealt for name in panel.names) > LONG
    gap = GAP + (NAME if above else 0)
    height = BAR * gap * max(len(panel.series) for panel in dealt)
    room = 0.1 * columns * most if numbered else 0.0
    plots = _plots(figure, dealt, columns, height, title, below, False, room, gap)
    for place, plot in enumerate(plots):
        first = plots[place - place % columns]
        alike = plot is not first and [at.name for at in plot.looks] == [at.name for at in first.looks]
        _name_pairs(plot, sides, above, hidden=alike and not above)
        plot.axes.set_ylim(
            gap * len(plot.looks) - (0.9 + (NAME if above else 0)), -0.8 - (NAME if above else 0)
        )
        plot.axes.set_xlim(0, 1.04 * most + room or 1)
        plot.axes.locator_params(axis="x", nbins=(8, 6, 4)[columns - 1])
        plot.axes.xaxis.set_major_formatter("{x:,g}")
        plot.axes.tick_params(axis="y", length=0, pad=6)
        plot.axes.spines["left"].set_visible(False)
        plot.axes.grid(axis="x")
    return plots


def spots(plot: Plot) -> list[float]:
    """Two bars a series, each pair apart from the next."""
    return [plot.gap * place + at for place in range(len(plot.looks)) for at in (0, 1)]


def curve(plot: Plot, look: Look, xs: Sequence[float], ys: Sequence[Stat], line: str, name: str) -> None:
    """A line of means; a band of the spread where there are several runs."""
    means = [y.mean for y in ys]
    style: dict[str, Any] = {"marker": look.marker, "ms": 3.5, "lw": 1.4, "color": look.colour}
    plot.axes.plot(xs, means, line, label=name, markevery=-(-len(means) // MARKS), **style)
    if any(y.spread for y in ys):
        low, high = ([y.mean + way * y.spread for y in ys] for way in (-1, 1))
        plot.axes.fill_between(xs, low, high, color=look.colour, alpha=0.18, lw=0)


def stack(plot: Plot, stacks: Sequence[Sequence[float]], colours: Mapping[str, str]) -> None:
    """A bar for each stack, one colour for each of its parts; kinds that nobody has stay out."""
    for part, (name, colour) in enumerate(colours.items()):
        widths = [stack[part] for stack in stacks]
        if any(widths):
            before = [sum(stack[:part]) for stack in stacks]
            plot.axes.barh(spots(plot), widths, 0.82, before, color=colour, label=name)


def pairs(plot: Plot, values: Sequence[float]) -> None:
    """A bar for each value, in its series' colour."""
    colours = [look.colour for look in plot.looks for _ in (0, 1)]
    plot.axes.barh(spots(plot), values, 0.82, color=colours)


def within(plot: Plot, values: Sequence[float], name: str) -> None:
    """A hatched part of the first bar of each series; nothing where all have none of it."""
    if any(values):
        look: dict[str, Any] = {"edgecolor": "white", "hatch": "////", "lw": 0}
        plot.axes.barh(spots(plot)[::2], values, 0.82, color="none", **look)
        plot.axes.fill([], [], facecolor="#888888", label=name, **look)  # for the legend


def across(plot: Plot, stats: Sequence[Stat], name: str) -> None:
    """A mark through both bars of each series."""
    for place, stat in enumerate(stats):
        ends = [plot.gap * place - 0.5, plot.gap * place + 1.5]
        plot.axes.plot([stat.mean] * 2, ends, color=INK, lw=1.5, label=name if place == 0 else None)
        _whisker(plot, stat, plot.gap * place + 0.5)


def whiskers(plot: Plot, stats: Sequence[Stat]) -> None:
    """The spread at each bar's end, where there are several runs."""
    for spot, stat in zip(spots(plot), stats, strict=True):
        _whisker(plot, stat, spot)


def _whisker(plot: Plot, stat: Stat, spot: float) -> None:
    if stat.spread:
        plot.axes.errorbar(stat.mean, spot, xerr=stat.spread, color=INK, lw=1, capsize=2.5, zorder=3)


def beside(plot: Plot, values: Sequence[float | None], name: str) -> None:
    """The number that somebody else has: a diamond at each bar that has one."""
    points = [(x, spot) for x, spot in zip(values, spots(plot), strict=True) if x is not None]
    if points:
        look: dict[str, Any] = {
            "ms": 5,
            "mfc": "white",
            "mec": INK,
            "mew": 1.2,
            "zorder": 4,
            "clip_on": False,
        }
        plot.axes.plot(*zip(*points, strict=True), "D", label=name, **look)


def name_ends(
    plot: Plot, ends: Sequence[float], others: Sequence[float | None], texts: Sequence[str]
) -> None:
    """A number after each bar; after the other's diamond where that stands in its place."""
    under = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # the grid stays off the text
    look: dict[str, Any] = {"va": "center_baseline", "fontsize": 8, "bbox": under}
    for spot, end, other, text in zip(spots(plot), ends, others, texts, strict=True):
        place = other if other is not None and end <= other <= end + 0.6 * plot.room else end
        plot.axes.annotate(text, (place, spot), (6, 0), textcoords="offset points", **look)


def legend(figure: "Figure", plots: Sequence[Plot]) -> None:
    """One for all panels, each name once, below them."""
    named: dict[str, Any] = {}
    for plot in plots:
        for handle, name in zip(*plot.axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    longest = max(map(len, named), default=1)
    columns = max(1, min(6, len(named), int(112 / (longest + 7))))
    deep = -(-len(named) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND * (deep - 1))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def looks(group: Group, dealt: Sequence[Panel]) -> list[list[Look]]:
    """Those of each panel. Names of one method: one hue, ever lighter; a name is the same in all panels."""
    others = sorted({series.method for series in group} - METHOD_COLOURS.keys())
    hues = METHOD_COLOURS | {m: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, m in enumerate(others)}
    seen: Counter[str] = Counter()
    known: dict[str, tuple[str, str]] = {}
    for panel in dealt:
        for series, name in zip(panel.series, panel.names, strict=True):
            if name not in known:
                nth = seen[series.method]
                known[name] = (_lighter(hues[series.method], 0.25 * (nth % 4)), MARKERS[nth % len(MARKERS)])
                seen[series.method] += 1
    return [
        [Look(series, name, *known[name]) for series, name in zip(panel.series, panel.names, strict=True)]
        for panel in dealt
    ]


def _name_pairs(plot: Plot, sides: tuple[str, str], above: bool, hidden: bool) -> None:
    """Beside the upper bar of each pair, or above it; hidden: as in the first panel of the row."""
    names = [
        side if above or at else f"{look.name}   {side}"
        for look in plot.looks
        for at, side in enumerate(sides)
    ]
    plot.axes.set_yticks(spots(plot), [""] * len(names) if hidden else names)
    for look, spot in zip(plot.looks if above else (), spots(plot)[::2], strict=False):
        plot.axes.annotate(look.name, (0, spot - 0.55), va="bottom", ha="left", fontweight="bold", fontsize=8)


def _plots(
    figure: "Figure",
    dealt: Sequence[Panel],
    columns: int,
    height: float,
    title: str,
    below: str,
    sharey: bool,
    room: float = 0.0,
    gap: float = GAP,
) -> list[Plot]:
    deep = -(-len(dealt) // columns)
    figure.set_size_inches(WIDTH, 1.25 + (height + (0.25 if len(dealt) > 1 else 0)) * deep)
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.subplots(deep, columns, sharex=True, sharey=sharey, squeeze=False)
    every = list(grid.flat)
    for axes in every[len(dealt) :]:
        axes.set_axis_off()
    for axes in every[max(0, len(dealt) - columns) : len(dealt)]:  # the lowest of each column
        axes.set_xlabel(below)
        axes.tick_params(labelbottom=True)
    group = [series for panel in dealt for series in panel.series]
    plots = []
    for axes, panel, inside in zip(every, dealt, looks(group, dealt), strict=False):
        axes.set_title(panel.title)
        plots.append(Plot(axes, inside, room, gap))
    return plots


def _columns(dealt: Sequence[Panel], group: Group) -> int:
    """One for each split where they fill the rows; fewer where names are long."""
    cuts = splits(group)
    wanted = cuts if len(dealt) % cuts == 0 else len(dealt)
    longest = max(len(name) for panel in dealt for name in panel.names)
    return max(1, min(wanted, 3, 48 // longest))


def _lighter(colour: str, part: float) -> str:
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * part):02x}" for c in parts)
