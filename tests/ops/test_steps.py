"""The steps of batch norm apart: processes that exchange rows normalize as with one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastbn import ops
from tests.support.pairs import pairs
from tests.support.step_checks import (
    COUNTED,
    EPS,
    StepOperators,
    check,
    exchange,
    forward,
    parts_of,
)
from tests.support.tables import DTYPES, Case, make
from tests.support.tolerances import AGAINST_STOCK_FLOAT64, accumulate_dtype

if TYPE_CHECKING:
    from torch import Tensor

OPERATORS = StepOperators(
    ops.batch_norm_stats,
    ops.batch_norm_combine_apply,
    ops.batch_norm_backward_reduce,
    ops.batch_norm_backward_combine_apply,
)

# A matrix, which takes the path of channels last; sizes that leave remainders of vectors; and many
# elements, which threads share.
SHAPES = {"matrix": (300, 35), "image": (9, 6, 7, 11), "large image": (9, 3, 60, 61)}
# Each way through memory, and one that begins off a vector.
LAYOUTS = ("contiguous", "channels_last", "batch_minor", "offset")
# In tenths of the batch. Rows of empty parts are zero; the first row is where merging starts.
CUTS = {
    "whole": (10,),
    "even": (5, 5),
    "uneven": (1, 7, 2),
    "empty first": (0, 4, 6),
    "empty": (3, 0, 7, 0),
}
MOMENTA = (0.1, None, 1.0)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "cut", "additive", "momentum"),
    pairs(
        SHAPES,
        LAYOUTS,
        DTYPES,
        CUTS,
        (False, True),
        MOMENTA,
        where=lambda shape, layout, *_: shape != "matrix" or layout != "channels_last",
    ),
    ids=str,
)
def test_parts_make_one_batch(
    shape: str,
    layout: str,
    dtype: torch.dtype,
    cut: str,
    additive: bool,
    momentum: float | None,
    device: str,
) -> None:
    tensors = make(Case(shape, SHAPES[shape], layout, dtype), device)
    parts = parts_of(SHAPES[shape][0], CUTS[cut])
    check(OPERATORS, tensors, parts, additive=additive, momentum=momentum)


# Additive rows hold sums of squares, and what these cancel.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_that_are_not_added_up_keep_far_data_exact(
    dtype: torch.dtype, layout: str, device: str
) -> None:
    tensors = make(Case("far", (9, 6, 17, 11), layout, dtype, "far"), device)
    x = tensors.x.double()
    found = forward(OPERATORS, tensors, tensors.x.split([2, 3, 4]))
    exact = 1 / (x.var((0, 2, 3), correction=0) + EPS).sqrt()
    torch.testing.assert_close(found.invstd.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 6, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_part_is_what_training_computes(
    shape: tuple[int, ...], momentum: float | None, device: str
) -> None:
    tensors = make(Case("one", shape, "contiguous", torch.float64), device)
    found = forward(OPERATORS, tensors, [tensors.x], momentum=momentum)
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    counter = torch.tensor(COUNTED, device=device)
    y, mean, invstd = ops.batch_norm_training(
        tensors.x, tensors.weight, tensors.bias, running_mean, running_var, counter, momentum, EPS
    )
    assert found.batches == int(counter)
    for ours, theirs in (
        (found.ys[0], y),
        (found.mean, mean),
        (found.invstd, invstd),
        (found.running_mean, running_mean),
        (found.running_var, running_var),
    ):
        torch.testing.assert_close(ours, theirs, **AGAINST_STOCK_FLOAT64)
    row, dweight, dbias = ops.batch_norm_backward_reduce(
        tensors.dy, tensors.x, tensors.weight, mean, invstd, True, True
    )
    dx = ops.batch_norm_backward_combine_apply(
        tensors.dy, tensors.x, tensors.weight, mean, invstd, row[None], found.count
    )
    whole = ops.batch_norm_backward(
        tensors.dy, tensors.x, tensors.weight, mean, invstd, True, True, True, True
    )
    for ours, theirs in zip((dx, dweight, dbias), whole, strict=True):
        torch.testing.assert_close(ours, theirs, **AGAINST_STOCK_FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_rows_hold_what_is_documented(additive: bool, dtype: torch.dtype, device: str) -> None:
    """Count, means and squares about them, or count, sums and sums of squares; in float64."""
    tensors = make(Case("row", (5, 4, 3, 7), "contiguous", dtype), device)
    x, dy = tensors.x.double(), tensors.dy.double()
    row = ops.batch_norm_stats(tensors.x, additive)
    mean, axes = x.mean((0, 2, 3)), (0, 2, 3)
    if additive:
        numbers = [x.sum(axes), x.square().sum(axes)]
    else:
        numbers = [mean, (x - mean.reshape(1, -1, 1, 1)).square().sum(axes)]
    assert (row.shape, row.dtype) == ((9,), torch.float64)
    assert row[0] == 105
    # Sums of float32 were taken in it.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else AGAINST_STOCK_FLOAT64
    torch.testing.assert_close(row[1:], torch.cat(numbers), **close)
    saved = mean.to(accumulate_dtype(dtype))
    row, _, _ = ops.batch_norm_backward_reduce(
        tensors.dy, tensors.x, None, saved, torch.ones_like(saved), False, False
    )
    deviations = x - saved.double().reshape(1, -1, 1, 1)
    assert (row.shape, row.dtype) == ((8,), torch.float64)
    expected = torch.cat([dy.sum(axes), (dy * deviations).sum(axes)])
    torch.testing.assert_close(row, expected, rtol=close["rtol"], atol=30 * close["atol"])


# --- Few values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch", [0, 1])
def test_fewer_than_two_values_leave_running_statistics_alone(
    batch: int, momentum: float | None, additive: bool, device: str
) -> None:
    """A variance of one value is none; the batch counts all the same."""
    tensors = make(Case("few", (2, 5), "contiguous", torch.float32), device)
    parts = tensors.x[:batch].split([batch, 0])
    found = forward(OPERATORS, tensors, parts, additive=additive, momentum=momentum)
    assert float(found.count) == batch
    assert found.batches == COUNTED + 1
    assert torch.equal(found.running_mean, tensors.running_mean)
    assert torch.equal(found.running_var, tensors.running_var)
    if batch == 1:
        assert torch.equal(found.ys[0], tensors.bias.expand(1, 5))
    assert [y.shape for y in found.ys] == [(batch, 5), (0, 5)]


def test_an_empty_part_has_a_row_of_zeros(device: str) -> None:
    x = torch.empty(0, 4, 3, 3, device=device)
    vector = torch.ones(4, device=device)
    for additive in (False, True):
        assert ops.batch_norm_stats(x, additive).tolist() == [0] * 9
    row, dweight, dbias = ops.batch_norm_backward_reduce(x, x, vector, vector, vector, True, True)
    assert row.tolist() == [0] * 8
    assert dweight.tolist() == dbias.tolist() == [0] * 4


def test_gradients_that_nobody_wants_are_not_computed(device: str) -> None:
    tensors = make(Case("want", (4, 3, 5, 5), "contiguous", torch.float32), device)
    mean, invstd = torch.zeros(3, device=device), torch.ones(3, device=device)
    given = (tensors.dy, tensors.x, tensors.weight, mean, invstd)
    rows = []
    for want_dweight, want_dbias in ((True, True), (True, False), (False, True), (False, False)):
        row, dweight, dbias = ops.batch_norm_backward_reduce(*given, want_dweight, want_dbias)
        rows.append(row)
        assert dweight.numel() == 3 * want_dweight
        assert dbias.numel() == 3 * want_dbias
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_missing_vectors(device: str) -> None:
    """Neither parameters nor running statistics have to be there."""
    tensors = make(Case("bare", (6, 3, 5, 5), "contiguous", torch.float32), device)
    x = tensors.x
    rows = exchange([ops.batch_norm_stats(part, False) for part in x.split(3)], additive=False)
    y, _, _, _ = ops.batch_norm_combine_apply(
        x, rows, False, None, None, None, None, None, 0.1, EPS
    )
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
    check(OPERATORS, replace(tensors, weight=None, bias=None), [2, 4])


# --- Errors ---------------------------------------------------------------------------------------


def good() -> dict[str, dict[str, Any]]:
    """Arguments for three channels that each operator takes."""
    x, vector = torch.randn(2, 3, 4), torch.ones(3)
    backward = {"dy": x, "x": x, "weight": vector, "mean": vector, "invstd": vector}
    return {
        "stats": {"x": x, "additive": False},
        "combine_apply": {
            "x": x,
            "rows": torch.ones(2, 7).double(),
            "additive": False,
            "weight": vector,
            "bias": vector,
            "running_mean": vector.clone(),
            "running_var": vector.clone(),
            "num_batches_tracked": torch.tensor(0),
            "momentum": 0.1,
            "eps": EPS,
        },
        "backward_reduce": {**backward, "want_dweight": True, "want_dbias": True},
        "backward_combine_apply": {
            **backward,
            "rows": torch.ones(2, 6).double(),
            "count": torch.ones(1).double(),
        },
    }


# The operator, what is wrong, the exception and its words.
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("stats", {"x": torch.ones(3)}, IndexError, r"input of shape \(N, C, ...\), but got 1D"),
    ("stats", {"x": torch.ones(2, 3).long()}, NotImplementedError, "not implemented for 'Long'"),
    ("combine_apply", {"eps": 0.0}, ValueError, "eps must be positive"),
    ("combine_apply", {"rows": torch.ones(7).double()}, RuntimeError, r"must have shape \(R, 7\)"),
    (
        "combine_apply",
        {"rows": torch.ones(2, 6).double()},
        RuntimeError,
        r"must have shape \(R, 7\)",
    ),
    (
        "combine_apply",
        {"rows": torch.ones(0, 7).double()},
        RuntimeError,
        r"must have shape \(R, 7\)",
    ),
    (
        "combine_apply",
        {"rows": torch.ones(2, 7)},
        RuntimeError,
        "rows must be float64, but got Float",
    ),
    (
        "combine_apply",
        {"weight": torch.ones(4)},
        RuntimeError,
        "weight should contain 3 elements not 4",
    ),
    (
        "combine_apply",
        {"running_var": None},
        ValueError,
        "must either both be None or neither be None",
    ),
    (
        "combine_apply",
        {"num_batches_tracked": torch.ones(1)},
        RuntimeError,
        "must be a single int64",
    ),
    ("backward_reduce", {"dy": torch.ones(2, 3, 5)}, RuntimeError, "dy has shape"),
    ("backward_reduce", {"mean": torch.ones(2)}, RuntimeError, "mean should contain 3 elements"),
    (
        "backward_combine_apply",
        {"rows": torch.ones(2, 7).double()},
        RuntimeError,
        r"shape \(R, 6\)",
    ),
    ("backward_combine_apply", {"rows": torch.ones(2, 6)}, RuntimeError, "rows must be float64"),
    ("backward_combine_apply", {"count": torch.ones(2).double()}, RuntimeError, "a single float64"),
    ("backward_combine_apply", {"count": torch.ones(1)}, RuntimeError, "count must be float64"),
    ("backward_combine_apply", {"invstd": torch.ones(3).double()}, RuntimeError, "mixed dtype"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "words"), WRONG, ids=[f"{w[0]}-{'-'.join(w[1])}" for w in WRONG]
)
def test_wrong_arguments_are_refused(
    name: str, change: dict[str, Any], error: type[Exception], words: str, device: str
) -> None:
    """They can be called by anyone, so a wrong shape must not become a wrong access."""
    arguments = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in {**good()[name], **change}.items()
    }
    with pytest.raises(error, match=words):
        getattr(torch.ops.fastbn, f"batch_norm_{name}")(**arguments)


# --- Tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((4, 6, 7, 5), "contiguous", torch.float32),
        ((4, 6, 7, 5), "channels_last", torch.bfloat16),
        ((4, 6, 7, 5), "stepped", torch.float64),
        ((8, 6), "contiguous", torch.float16),
    ],
    ids=str,
)
def test_opcheck(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> None:
    """Schemas, fake implementations and functionalization, by PyTorch's own checks."""
    tensors = make(Case("traced", shape, layout, dtype), device)
    x, dy, channels = tensors.x, tensors.dy, shape[1]
    saved = torch.rand(2, channels, dtype=accumulate_dtype(dtype), device=device).unbind()
    counter = torch.tensor(COUNTED, device=device)
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var, counter)
    rows = exchange([ops.batch_norm_stats(x, False)] * 2, additive=False)
    sums: Tensor = torch.rand(2, 2 * channels, dtype=torch.float64, device=device)
    count = torch.full((1,), 9.0, dtype=torch.float64, device=device)
    given = (dy, x, tensors.weight, *saved)
    stats, combine_apply, backward_reduce, backward_combine_apply = (
        getattr(torch.ops.fastbn, f"batch_norm_{name}").default
        for name in ("stats", "combine_apply", "backward_reduce", "backward_combine_apply")
    )
    for additive in (False, True):
        torch.library.opcheck(stats, (x, additive))
    for momentum in (0.1, None):
        torch.library.opcheck(combine_apply, (x, rows, False, *vectors, momentum, EPS))
    torch.library.opcheck(combine_apply, (x, rows, False, *[None] * 5, 0.1, EPS))
    torch.library.opcheck(backward_reduce, (*given, True, False))
    torch.library.opcheck(backward_combine_apply, (*given, sums, count))
