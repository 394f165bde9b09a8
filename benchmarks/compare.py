"""``python -m benchmarks compare BEFORE.json AFTER.json``: whether fastbn has become slower.

Other batch norms were measured in the same minutes, and no commit of this project changes them.
What they all have in common is the machine's doing and is taken off; by how much they still differ
among themselves is the noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tabulate import tabulate

from .rows import groups, is_ours, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .rows import Group, Results, Row, Subject

# Changes below these are not reported, however certain: of several rows together, of one row.
_MIN_CHANGE = log(1.05)
_MIN_OF_ROW = log(1.15)
# Growth of memory that is reported: sizes vary only by what an allocator rounds up.
_GROWTH = 1.001
# How many times the noise a change must be.
_CERTAIN = 4
# Standard deviation over the median of absolute deviations, and over the distance of the 20th
# percentile to the 80th; standard error of a median times the root of the number of values. All of
# a normal distribution.
_BY_MEDIAN_DEVIATION = 1.4826
_BY_PERCENTILES = 1 / 1.683
_OF_MEDIAN = 1.2533
# Seconds of a call below which the speed of the host decides, which differs from process to
# process. Where kernels are timed on a GPU, the host is left out.
_SHORT = 1e-4
# What makes two machines the same.
_MACHINE = ("cpu", "gpu", "threads", "torch")


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of most values, whatever a few do."""
    if not values:
        return 0.0
    middle = median(values)
    return _BY_MEDIAN_DEVIATION * median(abs(value - middle) for value in values)


def _error(row: Row) -> float:
    """Standard error of the logarithm of a median, by the spread of its calls."""
    spread = log(row.value.p80 / row.value.p20) * _BY_PERCENTILES
    return spread * _OF_MEDIAN / sqrt(row.value.rounds)


@dataclass(frozen=True)
class Change:
    """How a time of fastbn's changed on one subject, as logarithms of ratios.

    Attributes:
        provider: ``fastbn``, or that with torch.compile.
        short: whether calls take so little that the host decides.
        alone: by itself.
        own: less the median of the changes of all others.
        others: the change of each other, less the median of those of the rest.
        error: standard error of ``own`` by the spread of calls alone.
    """

    subject: Subject
    provider: str
    short: bool
    alone: float
    own: float
    others: tuple[float, ...]
    error: float

    @property
    def computed(self) -> tuple[str, ...]:
        """The key of changes that compute the same on other shapes."""
        subject = self.subject
        common = (subject.benchmark, self.provider, subject.measured, subject.epilogue)
        return (*common, subject.dtype, subject.layout, subject.cache)

    @property
    def shaped(self) -> tuple[str, ...]:
        """The key of changes on the same shapes, whatever the dtype, layout or epilogue."""
        subject = self.subject
        return (subject.benchmark, self.provider, subject.measured, subject.shapes, subject.cache)


def _change_of(name: str, before: Group, after: Group) -> float:
    return log(after.rows[name].value.median / before.rows[name].value.median)


def _error_of(name: str, before: Group, after: Group) -> float:
    return sqrt(sum(_error(group.rows[name]) ** 2 for group in (before, after)))


def _changes(before: Group, after: Group, *, on_gpu: bool) -> Iterator[Change]:
    """The changes of providers that have fastbn in them, from groups of the same subject."""
    on_host = not (on_gpu and before.subject.benchmark == "kernels")
    common = [name for name in before.rows if name in after.rows]
    # A copy knows no arithmetic, and a change of the machine is another one for it.
    others = {n: _change_of(n, before, after) for n in before.others if n in common}
    among = []
    for name, change in others.items():
        rest = [value for other, value in others.items() if other != name]
        if rest:
            among.append(change - median(rest))
    drift = median(others.values()) if others else 0.0
    # No more certain than one of them, though there are several.
    errors = [_error_of(name, before, after) for name in others]
    error = median(errors) if errors else 0.0
    for name in filter(is_ours, common):
        change = _change_of(name, before, after)
        yield Change(
            before.subject,
            name,
            on_host and before.rows[name].value.median < _SHORT,
            change,
            change - drift,
            tuple(among),
            sqrt(error**2 + _error_of(name, before, after) ** 2),
        )


@dataclass(frozen=True)
class Judgment:
    """What is made of the changes of one row or of several.

    Attributes:
        changes: one for each row.
        change: logarithm of the ratio of times, in the median.
        noise: its standard error.
        least: the smallest change to speak of.
    """

    changes: tuple[Change, ...]
    change: float
    noise: float
    least: float

    @property
    def words(self) -> str:
        """``slower``, ``faster`` or ``same``."""
        certain = max(self.least, _CERTAIN * self.noise)
        if self.change > certain:
            return "slower"
        return "faster" if self.change < -certain else "same"


class RunComparison:
    """What changed from one run to another.

    Attributes:
        computed: judgments of rows that compute the same on all shapes.
        shaped: judgments of all rows of a set of shapes.
        rows: judgments of single rows that stand out where none of these does. They are shown and
            no more: a tensor about as large as a cache is in it in one run and not in another.
        typical: standard deviation of what is not known to have changed, by benchmark.
        grown: subjects whose memory has grown, with bytes before and after.
        lost: subjects that fastbn has no row of any more, in benchmarks that it still has.
    """

    def __init__(self, before: Results, after: Results) -> None:
        """Compares two runs.

        Raises:
            ValueError: they have nothing in common.
        """
        first = {g.subject: g for g in groups(before.rows) if "fastbn" in g.rows}
        pairs = [
            (first[group.subject], group)
            for group in groups(after.rows)
            if group.subject in first and "fastbn" in group.rows
        ]
        if not pairs:
            raise ValueError("nothing to compare: the files have no row of fastbn in common")
        timed = [pair for pair in pairs if pair[0].subject.unit == "s"]
        on_gpu = "gpu" in before.environment
        changes = [change for pair in timed for change in _changes(*pair, on_gpu=on_gpu)]
        self._others: dict[str, list[float]] = {}
        for change in changes:
            self._others.setdefault(change.subject.benchmark, []).extend(change.others)
        self.typical = {name: _deviation(values) for name, values in self._others.items()}
        self.computed = self._together(changes, lambda change: change.computed)
        self.shaped = self._together(changes, lambda change: change.shaped)
        found = [v for v in (*self.computed, *self.shaped) if v.words != "same"]
        known = {
            change
            for verdict in found
            for change in verdict.changes
            if (change.own > 0) == (verdict.change > 0)
        }
        alone = [self._alone(change) for change in changes if change not in known]
        self.rows = [verdict for verdict in alone if verdict.words != "same"]
        sized = [pair for pair in pairs if pair[0].subject.unit == "bytes"]
        self.grown = [
            (old.subject, old.rows[name].value.median, new.rows[name].value.median)
            for old, new in sized
            for name in filter(is_ours, old.rows)
            if name in new.rows
            and new.rows[name].value.median > _GROWTH * old.rows[name].value.median
        ]
        last = {g.subject for g in groups(after.rows) if "fastbn" in g.rows}
        benchmarks = {subject.benchmark for subject in last}
        self.lost = [s for s in first if s.benchmark in benchmarks and s not in last]

    def _noise(self, change: Change) -> float:
        return max(self.typical[change.subject.benchmark], change.error)

    def _together(
        self, changes: Iterable[Change], key: Callable[[Change], tuple[str, ...]]
    ) -> list[Judgment]:
        members: dict[tuple[str, ...], list[Change]] = {}
        for change in changes:
            members.setdefault(key(change), []).append(change)
        return [self._judge(alike) for alike in members.values()]

    def _own(self, change: Change) -> float:
        if self._others[change.subject.benchmark] and not change.short:
            return change.own
        # Others may be what changed: then fastbn must have, too, in the same direction.
        nearest = min(change.own, change.alone, key=abs)
        return nearest if change.own * change.alone > 0 else 0.0

    def _judge(self, changes: Sequence[Change]) -> Judgment:
        own = [self._own(change) for change in changes]
        noise = max(_deviation(own), median(map(self._noise, changes)))
        if len(own) > 1:
            noise *= _OF_MEDIAN / sqrt(len(own))
        least = _MIN_CHANGE if len(own) > 1 else _MIN_OF_ROW
        return Judgment(tuple(changes), median(own), noise, least)

    def _alone(self, change: Change) -> Judgment:
        """A single row must stand out of all that happened to others, which have outliers, too."""
        largest = max(map(abs, self._others[change.subject.benchmark]), default=inf)
        least = max(_MIN_OF_ROW, largest)
        return Judgment((change,), self._own(change), self._noise(change), least)

    @property
    def _verdicts(self) -> list[Judgment]:
        return [*self.computed, *self.shaped]

    @property
    def worse(self) -> bool:
        """Whether anything has become slower or larger."""
        return bool(self.grown or self.lost) or any(v.words == "slower" for v in self._verdicts)

    def report(self) -> str:
        """Tables and a conclusion."""
        keys = ["benchmark", "of", "pass"]
        tables = (
            (self.computed, [*keys, "epilogue", "dtype", "layout", "cache"], "computed"),
            (self.shaped, [*keys, "shapes", "cache"], "shaped"),
        )
        parts = []
        for verdicts, headers, key in tables if self.computed else ():
            lines = [[*getattr(v.changes[0], key), len(v.changes), *_figures(v)] for v in verdicts]
            parts.append(_table([*headers, "rows", *_FIGURES], lines, words=len(headers)))
        if self.rows:
            lines = [[_name(v.changes[0].subject), *_figures(v)] for v in self.rows]
            parts.append(_table(["single rows, to measure again", *_FIGURES], lines, words=1))
        parts += [
            f"{_name(subject)}: memory grew from {old:.0f} to {new:.0f} bytes"
            for subject, old, new in self.grown
        ]
        parts += [f"{_name(subject)}: fastbn has no figure any more" for subject in self.lost]
        return "\n\n".join([*parts, self._sentence()])

    def _sentence(self) -> str:
        noise = ", ".join(f"{_percent(size)[1:]} in {name}" for name, size in self.typical.items())
        slower = sum(v.words == "slower" for v in self._verdicts)
        conclusion = "Nothing has become slower or larger."
        if self.worse:
            others = f"{len(self.grown)} larger, {len(self.lost)} lost"
            conclusion = f"WORSE: {slower} lines are slower, {others}."
        return (
            "Change: of fastbn's time, less what the times of others changed by in the same rows;\n"
            "noise: its standard error, by how much the others differ among themselves"
            f" ({noise or 'no others'}).\n{conclusion}"
        )


_FIGURES = ("change", "noise", "")


def _name(subject: Subject) -> str:
    followed = "" if subject.epilogue == "plain" else f", then {subject.epilogue}"
    return f"{subject.measured} {subject.shape} {subject.dtype} {subject.layout}{followed}"


def _percent(change: float) -> str:
    return f"{exp(change) - 1:+.1%}".replace("+-", "-")


def _figures(verdict: Judgment) -> list[str]:
    return [_percent(verdict.change), _percent(verdict.noise).lstrip("+"), verdict.words]


def _table(headers: Sequence[str], lines: Iterable[Sequence[object]], words: int) -> str:
    align = ["left"] * words + ["right"] * (len(headers) - words - 1) + ["left"]
    text: str = tabulate(lines, headers, colalign=align, disable_numparse=True)
    return text


def _differences(before: Results, after: Results) -> list[str]:
    """A sentence for each way in which the machines differ."""
    return [
        f"WARNING: {name} was {before.environment.get(name)} before and is "
        f"{after.environment.get(name)} after; times of different machines do not compare."
        for name in _MACHINE
        if before.environment.get(name) != after.environment.get(name)
    ]


def main(arguments: list[str]) -> int:
    """Prints the comparison; returns 1 if anything has become slower or larger."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.before), read(options.after)
        comparison = RunComparison(before, after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for sentence in _differences(before, after):
        print(sentence)
    print(comparison.report())
    return int(comparison.worse)
