"""Runs of the same settings but for the seed, as one: a line, a bar, a row, with a mean and a spread.

Names series by what tells them apart, and deals many of them to panels. Knows nothing of tables and figures.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsl_lab.runs import IDENTITY, Evaluation, FinishedRun, Runs, at_least_one

ONE_PANEL = 4  # so many series stand in one panel, where apart they would be alone; more are dealt
PANELS = ("data", "model", "clients", "split", "cut")
_TELLING = (
    *IDENTITY,
    *("data", "head", "sync", "partition", "recipe", "codec", "client_modules", "server_modules"),
    *("train_limit", "epochs"),
)
_SHARED = (*IDENTITY, "data", "train_limit", "epochs", "head", "recipe")


@dataclass(frozen=True)
class Stat:
    """spread: the sample's standard deviation; 0 of one run."""

    mean: float
    spread: float = 0.0


@dataclass(frozen=True)
class Series:
    """At least one run. They differ in nothing but their seeds, if at all."""

    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    @property
    def method(self) -> str:
        return self.first.method

    def stat(self, of: Callable[[FinishedRun], float | None]) -> Stat | None:
        """None where a run has no such number."""
        return _stat([of(run) for run in self.runs])

    def by_epoch(self, of: Callable[[Evaluation], float | None]) -> dict[int, Stat]:
        """Of the epochs that every run has scored, those with such a number."""
        scored = [{line.epoch: of(line) for line in run.evaluations} for run in self.runs]
        epochs = [epoch for epoch in scored[0] if all(epoch in run for run in scored)]
        stats = {epoch: _stat([run[epoch] for run in scored]) for epoch in epochs}
        return {epoch: stat for epoch, stat in stats.items() if stat}


Group = Sequence[Series]


@dataclass(frozen=True)
class Panel:
    """Series that stand in one panel, each with its name there; a title where there are several panels."""

    title: str
    series: Group
    names: Sequence[str]


def grouped(runs: Runs) -> list[Series]:
    """In the order of each series' first run. Raises ConfigError when there is no run."""
    series: dict[str, list[FinishedRun]] = {}
    for run in at_least_one(runs):
        series.setdefault(_settings(run), []).append(run)
    return [Series(tuple(same)) for same in series.values()]


def labels(group: Group) -> list[str]:
    """One short name for each series: its method and what tells it from the others."""
    return _names(group, _told(group))


def shared(group: Group) -> str:
    """What all have in common, for example `resnet20 · m · 2 clients · sample · 3 epochs`."""
    facts = ({series.first.fact(key) for series in group} for key in _SHARED)
    return " · ".join(fact for same in facts if len(same) == 1 for fact in same if fact)


def panels(group: Group) -> list[Panel]:
    """One for each data set, network, number of clients and split, if each then has several series to
    compare, or one would have too many; else one for all."""
    told = _told(group)
    dealt = _dealt(group, [key for key in PANELS if key in told])
    if len(group) <= ONE_PANEL and min(map(len, dealt.values())) == 1:
        dealt = {"": list(group)}
    inside = [key for key in told if any(_differ(some, key) for some in dealt.values())]
    return [Panel(title, some, _names(some, inside)) for title, some in dealt.items()]


def _dealt(group: Group, apart: Sequence[str]) -> dict[str, list[Series]]:
    """By what they are in these settings."""
    dealt: dict[str, list[Series]] = {}
    for series in group:
        facts = {key: series.first.fact(key) for key in apart}
        words = [f"cut at {fact}" if key == "split" else fact for key, fact in facts.items()]
        dealt.setdefault(" · ".join(words), []).append(series)
    return dealt


def splits(group: Group) -> int:
    """How many cuts there are."""
    return len({(series.first.fact("split"), series.first.fact("cut")) for series in group})


def _stat(values: Sequence[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0)


def _settings(run: FinishedRun) -> str:
    """All but the seed and the name; and on what it ran: times and memory are that machine's."""
    settings = {key: value for key, value in run.about.run.items() if key not in ("name", "seed")}
    return json.dumps([settings, run.about.machine, run.about.versions], sort_keys=True)


def _told(group: Group) -> list[str]:
    known = [key for key in _TELLING if all(key in series.first.about.run for series in group)]
    return [key for key in known if _differ(group, key)]


def _differ(group: Group, key: str) -> bool:
    return len({series.first.fact(key) for series in group}) > 1


def _names(group: Group, told: Sequence[str]) -> list[str]:
    names = [" · ".join([s.method.upper(), *filter(None, map(s.first.fact, told))]) for s in group]
    if len(set(names)) < len(names):
        names = [f"{name} · {series.first.about.name}" for name, series in zip(names, group, strict=True)]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        names[place] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names
