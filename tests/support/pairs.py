"""Parameters that a test is tried with: all pairs of values, or the full product.

Most faults show with two values that meet, such as a layout and a dtype. So a test with many axes
runs with a few combinations that hold every pair of values of any two axes; ``pytest --all`` runs
the full product.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from allpairspy import AllPairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Row = tuple[Any, ...]

# What is in the full product alone has this mark.
EXHAUSTIVE = pytest.mark.exhaustive

_full = False


def use_full_products(wanted: bool) -> None:
    """Said by conftest.py, before any file of tests is imported."""
    global _full
    _full = wanted


def full_products() -> bool:
    """What was said."""
    return _full


def _cover(axes: list[list[Any]], is_possible: Callable[..., bool]) -> list[Row]:
    """Few rows in which every possible pair of values of two axes meets."""
    if len(axes) < 2:
        return list(product(*axes))
    # By number: values need not be hashable.
    numbered = [list(range(len(axis))) for axis in axes]

    def may_go_on(numbers: list[int]) -> bool:
        if len(numbers) < len(axes):
            return any(
                is_possible(*(axis[n] for axis, n in zip(axes, [*numbers, *rest], strict=True)))
                for rest in product(*numbered[len(numbers) :])
            )
        return is_possible(*(axis[n] for axis, n in zip(axes, numbers, strict=True)))

    rows = AllPairs(numbered, filter_func=may_go_on)
    return [tuple(axis[n] for axis, n in zip(axes, row, strict=True)) for row in rows]


def pairs(
    *axes: Iterable[Any],
    where: Callable[..., bool] = lambda *_: True,
    of: Callable[..., Any] | None = None,
) -> list[Any]:
    """Rows of parameters, for ``pytest.mark.parametrize``.

    Args:
        axes: the values of each parameter.
        where: whether a combination is possible; it is given a value of each axis.
        of: makes one parameter of a row.

    Returns:
        Rows that hold all possible pairs; with ``--all`` behind them the rest of the product.
    """
    listed = [list(axis) for axis in axes]
    chosen = _cover(listed, where)
    left = [row for row in product(*listed) if where(*row) and row not in chosen] if _full else []
    if of is None:
        return [*chosen, *(pytest.param(*row, marks=EXHAUSTIVE) for row in left)]
    made = [of(*row) for row in chosen]
    return [*made, *(pytest.param(of(*row), marks=EXHAUSTIVE) for row in left)]


def unmarked(parameters: Iterable[Any]) -> list[Any]:
    """What ``pairs(..., of=...)`` has made, for a loop."""
    return [p.values[0] if hasattr(p, "marks") else p for p in parameters]
