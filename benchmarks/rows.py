"""Measured rows, as files keep them and as tables and pictures are made of them."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import nan
from typing import TYPE_CHECKING, Any, TypeAlias

from .timing import Timing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

Environment: TypeAlias = "Mapping[str, str | int | float]"
COPY = "copy"


def is_ours(provider: str) -> bool:
    """Whether a provider has fastbn in it: ``fastbn``, or ``fastbn compiled``."""
    return provider.startswith("fastbn")


@dataclass(frozen=True)
class Subject:
    """What was measured, of every provider.

    Attributes:
        benchmark: ``kernels``, ``overhead``, ``model`` or ``memory``.
        shapes: name of the set of shapes, or of the network.
        shape: sizes of the input (N, C, ...), joined by ``x``.
        dtype: of the input.
        layout: ``contiguous`` or ``channels_last``.
        measured: a pass, or what else the figure says.
        epilogue: what follows the batch norm: ``plain``, ``relu`` or ``add+relu``.
        count: how often the network has it.
        cache: whether the inputs were in the cache: ``cold`` or ``warm``.
        unit: ``s``, ``bytes`` or ``share``.
        bytes: where times are measured, those that have to move; else the size of the input.
    """

    benchmark: str
    shapes: str
    shape: str
    dtype: str
    layout: str
    measured: str
    epilogue: str = "plain"
    count: int = 1
    cache: str = "warm"
    unit: str = "s"
    bytes: int = 0


@dataclass(frozen=True)
class Row:
    """A figure of one provider.

    Attributes:
        provider: whose batch norm it is.
        detail: which kernels it took, where that is known.
        value: in the subject's unit: median, 20th and 80th percentile, and of how many calls.
    """

    subject: Subject
    provider: str
    value: Timing
    detail: str = ""

    @property
    def gb_per_second(self) -> float:
        """Throughput on the bytes that have to move."""
        return self.subject.bytes / self.value.median / 1e9

    def record(self) -> dict[str, Any]:
        """The row as a flat dictionary."""
        return {
            **asdict(self.subject),
            "provider": self.provider,
            **asdict(self.value),
            "detail": self.detail,
        }

    @staticmethod
    def of(record: Mapping[str, Any]) -> Row:
        """The row of a flat dictionary."""
        subject, value = (
            {field.name: record[field.name] for field in fields(kind)} for kind in (Subject, Timing)
        )
        return Row(Subject(**subject), record["provider"], Timing(**value), record["detail"])


@dataclass(frozen=True)
class Group:
    """The rows of one subject, by provider."""

    subject: Subject
    rows: dict[str, Row]

    @cached_property
    def others(self) -> dict[str, Row]:
        """The rows of providers that have no fastbn in them, without the copy."""
        return {n: row for n, row in self.rows.items() if n != COPY and not is_ours(n)}

    @property
    def best_other(self) -> str:
        """The provider without fastbn whose figure is the smallest."""
        return min(self.others, key=lambda name: self.others[name].value.median)

    def ratio(self, name: str) -> float:
        """Someone's time over fastbn's."""
        return self.rows[name].value.median / self.rows["fastbn"].value.median

    def share(self, name: str) -> float:
        """Someone's throughput over that of a copy of as many bytes; NaN where that failed."""
        if COPY not in self.rows:
            return nan
        return self.rows[COPY].value.median / self.rows[name].value.median


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by subject, in the order of their first ones."""
    found: dict[Subject, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.subject, {})[row.provider] = row
    return [Group(subject, by_provider) for subject, by_provider in found.items()]


def coldest(groups: Iterable[Group]) -> list[Group]:
    """Leaves out groups in a warm cache that are there in a cold one, too."""
    groups = list(groups)
    cold = {_but_for_cache(group) for group in groups if group.subject.cache == "cold"}
    return [g for g in groups if g.subject.cache == "cold" or _but_for_cache(g) not in cold]


def warm_twins(groups: Iterable[Group]) -> dict[Subject, Group]:
    """Groups in a warm cache, by the subjects of the same groups in a cold one."""
    groups = list(groups)
    cold = {_but_for_cache(g): g.subject for g in groups if g.subject.cache == "cold"}
    warm = (group for group in groups if group.subject.cache == "warm")
    return {cold[_but_for_cache(g)]: g for g in warm if _but_for_cache(g) in cold}


def _but_for_cache(group: Group) -> Subject:
    return replace(group.subject, cache="")


@dataclass(frozen=True)
class Results:
    """All rows of one run, and where they were measured."""

    environment: Environment
    rows: list[Row]

    def select(self, benchmark: str) -> list[Group]:
        """The groups of one benchmark."""
        return groups(row for row in self.rows if row.subject.benchmark == benchmark)

    def write_json(self, path: Path) -> None:
        """Writes the environment once, and a line for each row."""
        environment = json.dumps(self.environment, indent=1)
        lines = ",\n".join(json.dumps(row.record()) for row in self.rows)
        path.write_text(f'{{"environment": {environment},\n"rows": [\n{lines}\n]}}\n')

    def write_csv(self, path: Path) -> None:
        """Writes a line for each row, with throughputs and the environment in it."""
        with path.open("w", newline="") as file:
            writer = None
            for group in groups(self.rows):
                for name, row in group.rows.items():
                    line = {**row.record(), **_derived(group, name), **self.environment}
                    if writer is None:
                        writer = csv.DictWriter(file, line)
                        writer.writeheader()
                    writer.writerow(line)


def _derived(group: Group, name: str) -> dict[str, float | str]:
    moves = group.subject.unit == "s" and group.subject.bytes > 0
    return {
        "gb_per_second": group.rows[name].gb_per_second if moves else "",
        "share_of_copy": group.share(name) if moves else "",
        "times_fastbn": group.ratio(name) if moves and "fastbn" in group.rows else "",
    }


def read(path: Path) -> Results:
    """What :meth:`Results.write_json` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        content = json.loads(path.read_text())
        return Results(content["environment"], [Row.of(record) for record in content["rows"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was not written by this version of python -m benchmarks --json ({error!r}); "
            "measure again"
        ) from error


def exact(value: float) -> Timing:
    """A figure that does not vary."""
    return Timing(value, value, value, 1)
