"""Every number fastbn returns is right: against float64, and for 16-bit types against stock too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastbn
from tests.support import oracle
from tests.support.case_checks import EPS, MOMENTUM, check, statistics_of
from tests.support.pairs import pairs
from tests.support.tables import (
    DTYPES,
    HALVES,
    LAYOUTS,
    SHAPES,
    SHARED,
    STREAMED,
    Case,
    hard_cases,
    make,
    small_cases,
    streamed_case,
)
from tests.support.tolerances import (
    AGAINST_STOCK,
    AGAINST_STOCK_FLOAT64,
    CONDITION,
    assert_near,
    assert_no_worse,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tests.support.tables import Tensors

training_and_eval = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


# A case decides how memory is walked; training, which steps are taken.
@training_and_eval
@pytest.mark.parametrize("case", [*small_cases(), *hard_cases()], ids=str)
def test_every_result_is_right(case: Case, training: bool, device: str) -> None:
    condition = CONDITION.get((case.data, case.dtype), 1.0)
    check(make(case, device), training, condition)


# Outputs that are written past the cache: each dtype, way through memory and set of steps.
@pytest.mark.parametrize(
    ("streamed", "dtype", "training"), pairs(STREAMED, DTYPES, (True, False)), ids=str
)
def test_results_written_past_the_cache_are_right(
    streamed: tuple[str, str], dtype: torch.dtype, training: bool, device: str
) -> None:
    check(make(streamed_case(*streamed, dtype), device), training)


# Vectors of each dtype, in the loops of each layout.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_constant_channel_gives_exactly_bias(layout: str, dtype: torch.dtype, device: str) -> None:
    """With x * alpha + beta it would not: the terms are large and cancel to something else."""
    case = Case("image-49", SHAPES["image-49"], layout, dtype, "constant")
    tensors = make(case, device)
    y = fastbn.batch_norm(tensors.x, None, None, tensors.weight, tensors.bias, True)
    bias = tensors.bias.to(case.dtype).reshape(1, -1, *[1] * (y.dim() - 2))
    assert torch.equal(y, bias.expand_as(y))


def _stock_results(tensors: Tensors, training: bool) -> dict[str, Tensor]:
    """Stock's results on the same tensors, or on contiguous ones where it takes no others."""
    y = F.batch_norm(
        tensors.x,
        tensors.running_mean.clone(),
        tensors.running_var.clone(),
        tensors.weight,
        tensors.bias,
        training,
        MOMENTUM,
        EPS,
    )
    wrt = (tensors.x, tensors.weight, tensors.bias)
    dx, dweight, dbias = torch.autograd.grad(y, wrt, tensors.dy)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


# Of the dtype of x, that of the parameters, and data: both kinds of 16-bit module, with parameters
# of the input's dtype, and with float32 parameters as mixed precision has them. Far data in float32
# is where stock itself errs most. Stock takes only these dtypes.
KINDS = [
    *((dtype, torch.float32, "normal") for dtype in HALVES),
    *((dtype, dtype, "normal") for dtype in HALVES),
    (torch.float16, torch.float32, "top"),
    (torch.float32, torch.float32, "far"),
]


@pytest.mark.parametrize(
    ("name", "layout", "kind", "training"),
    pairs(
        # Each is walked in another way, as is each layout.
        ("line", "image-odd", "image-49", "few-channels"),
        ("contiguous", "channels_last", "stepped", "batch_minor"),
        KINDS,
        (True, False),
    ),
    ids=str,
)
def test_no_less_accurate_than_stock(
    name: str,
    layout: str,
    kind: tuple[torch.dtype, torch.dtype, str],
    training: bool,
    device: str,
) -> None:
    dtype, parameters, data = kind
    shape = {**SHAPES, **SHARED}[name]
    case = Case(name, shape, layout, dtype, data)
    tensors = make(case, device, parameters=parameters, statistics=parameters).requiring_grad()
    statistics = statistics_of(tensors, training)
    expected = {
        "y": oracle.output(tensors.x, tensors.weight, tensors.bias, statistics),
        **oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training),
    }
    theirs = _stock_results(tensors, training)
    y = fastbn.batch_norm(
        tensors.x,
        tensors.running_mean,
        tensors.running_var,
        tensors.weight,
        tensors.bias,
        training,
        MOMENTUM,
        EPS,
    )
    gradients = torch.autograd.grad(y, (tensors.x, tensors.weight, tensors.bias), tensors.dy)
    ours = dict(zip(("y", "dx", "dweight", "dbias"), (y, *gradients), strict=True))
    for quantity, value in ours.items():
        assert_no_worse(value, theirs[quantity], expected[quantity], quantity)


# Each vector is read and written by code of its own. float64 goes with float64 alone.
NARROW = (torch.float32, *HALVES)


@pytest.mark.parametrize(
    ("input_", "dtype", "weight", "bias", "running", "training"),
    pairs(
        # Vectors are handled per way through memory.
        (("image-49", "contiguous"), ("image-odd", "channels_last")),
        NARROW,
        NARROW,
        NARROW,
        NARROW,
        (True, False),
    ),
    ids=str,
)
def test_dtypes_of_vectors_are_independent(
    input_: tuple[str, str],
    dtype: torch.dtype,
    weight: torch.dtype,
    bias: torch.dtype,
    running: torch.dtype,
    training: bool,
    device: str,
) -> None:
    name, layout = input_
    tensors = make(Case(name, SHAPES[name], layout, dtype), device, statistics=running)
    tensors = replace(tensors, weight=tensors.weight.to(weight), bias=tensors.bias.to(bias))
    check(tensors, training)


# A missing vector is a null pointer below: in loops of each dtype, on each way through memory.
@pytest.mark.parametrize(
    ("dtype", "layout", "has_weight", "has_bias", "training"),
    pairs(
        DTYPES,
        ("contiguous", "channels_last", "stepped"),
        (True, False),
        (True, False),
        (True, False),
    ),
    ids=str,
)
def test_weight_and_bias_are_optional(
    dtype: torch.dtype, layout: str, has_weight: bool, has_bias: bool, training: bool, device: str
) -> None:
    tensors = make(Case("image-49", SHAPES["image-49"], layout, dtype), device)
    if not has_weight:
        tensors = replace(tensors, weight=None)
    if not has_bias:
        tensors = replace(tensors, bias=None)
    check(tensors, training)


@training_and_eval
def test_vectors_of_any_stride(training: bool, device: str) -> None:
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", torch.float32), device)
    doubled = {
        name: torch.stack((vector, torch.full_like(vector, torch.nan)), 1)
        for name, vector in vars(tensors).items()
        if name not in ("x", "dy")
    }
    stepped = {name: vectors[:, 0] for name, vectors in doubled.items()}
    check(replace(tensors, **stepped), training)
    for name in ("running_mean", "running_var"):
        assert doubled[name][:, 1].isnan().all(), "wrote between the elements"


@training_and_eval
def test_vectors_of_any_shape(training: bool, device: str) -> None:
    """Forward looks at the number of elements only, as stock's does."""
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", torch.float32), device)
    vectors = (tensors.running_mean, tensors.running_var, tensors.weight, tensors.bias)
    mean, var, weight, bias = (vector.clone().reshape(-1, 1) for vector in vectors)
    y = fastbn.batch_norm(tensors.x, *vectors, training)
    assert torch.equal(fastbn.batch_norm(tensors.x, mean, var, weight, bias, training), y)
    assert torch.equal(mean.flatten(), tensors.running_mean)
    assert torch.equal(var.flatten(), tensors.running_var)


# Infinity minus infinity is NaN, in vectors of each dtype and loops of each layout; segments
# shorter than a vector are walked in another way.
@pytest.mark.parametrize(
    ("poison", "name", "layout", "dtype"),
    pairs(
        (torch.nan, torch.inf, -torch.inf),
        ("image-49", "image-short-segments"),
        ("contiguous", "channels_last", "stepped"),
        DTYPES,
    ),
    ids=str,
)
def test_nan_and_inf_spoil_their_channel_and_no_other(
    poison: float, name: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    shape = SHAPES[name]
    tensors = make(Case(name, shape, layout, dtype), device)
    tensors.x[1, 40, 1, 2] = poison
    others = [channel for channel in range(shape[1]) if channel != 40]
    expected = oracle.output(
        tensors.x[:, others],
        tensors.weight[others],
        tensors.bias[others],
        oracle.batch_statistics(tensors.x[:, others], EPS),
    )
    y = fastbn.batch_norm(
        tensors.x, tensors.running_mean, tensors.running_var, tensors.weight, tensors.bias, True
    )
    assert y[:, 40].isnan().all()
    assert_near(y[:, others], expected, "y")
    for running in (tensors.running_mean, tensors.running_var):
        assert not running[40].isfinite()
        assert running[others].isfinite().all()


# Each of the sizes may be the one that is zero; without channels there is no weight to pass, see
# the error tests.
@training_and_eval
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4, 4), (2, 3, 0, 5), (0, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: str
) -> None:
    """An empty y and dx, zeros for the other gradients, running statistics as they were."""
    tensors = make(Case("empty", shape, "contiguous", dtype), device).requiring_grad()
    before = tensors.running_mean.clone(), tensors.running_var.clone()
    y = fastbn.batch_norm(
        tensors.x,
        tensors.running_mean,
        tensors.running_var,
        tensors.weight,
        tensors.bias,
        training,
    )
    y.backward(tensors.dy)
    assert tensors.x.grad is not None
    assert (y.shape, y.dtype, tensors.x.grad.shape) == (shape, dtype, shape)
    assert torch.equal(tensors.weight.grad, torch.zeros_like(tensors.weight))
    assert torch.equal(tensors.bias.grad, torch.zeros_like(tensors.bias))
    assert torch.equal(tensors.running_mean, before[0])
    assert torch.equal(tensors.running_var, before[1])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_no_channels(shape: tuple[int, ...], device: str) -> None:
    """Nothing in, nothing out; stock does not even ask for a second dimension."""
    x = torch.randn(shape, device=device)
    assert fastbn.batch_norm(x, None, None, training=True).shape == shape
    assert F.batch_norm(x, None, None, training=True).shape == shape


@pytest.mark.parametrize(
    ("dtype", "layout", "dy_layout", "training"),
    pairs(
        (torch.float32, torch.bfloat16),
        ("contiguous", "channels_last", "batch_minor", "stepped"),
        # Strides a gradient may come with: as sum() sends it, or a layer of another memory format.
        LAYOUTS,
        (True, False),
    ),
    ids=str,
)
def test_gradient_in_another_layout(
    dtype: torch.dtype, layout: str, dy_layout: str, training: bool, device: str
) -> None:
    tensors = make(Case("image-odd", SHAPES["image-odd"], layout, dtype), device)
    check(replace(tensors, dy=LAYOUTS[dy_layout](tensors.dy)), training)


def _meaningful_strides(tensor: Tensor) -> list[int]:
    """Without those of dimensions of size one, which never take a step."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


# Stock decides by the strides of x alone. On GPUs stock's kernels differ from each other in layouts
# that are neither contiguous nor channels last; its rule on the CPU is ours.
@pytest.mark.parametrize(
    ("name", "layout", "dy_layout", "training"),
    pairs(
        # Rank 3 has no channels-last format, 4 and 5 have.
        ("line", "image-49", "image-one-pixel", "volume"),
        LAYOUTS,
        ("contiguous", "channels_last"),
        (True, False),
    ),
    ids=str,
)
def test_strides_of_results_are_those_of_stock(
    name: str, layout: str, dy_layout: str, training: bool, device: str
) -> None:
    strides = []
    for batch_norm, where in ((fastbn.batch_norm, device), (F.batch_norm, "cpu")):
        tensors = make(Case(name, SHAPES[name], layout, torch.float32), where).requiring_grad()
        y = batch_norm(
            tensors.x,
            tensors.running_mean,
            tensors.running_var,
            tensors.weight,
            tensors.bias,
            training,
        )
        (dx,) = torch.autograd.grad(y, tensors.x, LAYOUTS[dy_layout](tensors.dy))
        strides.append([_meaningful_strides(y), _meaningful_strides(dx)])
    assert strides[0] == strides[1]


# float32 and float64 are held against stock as well: no misreading of the formulas could be shared
# by fastbn and the oracle. The numbers are all that the function has.
@pytest.mark.parametrize(
    ("dtype", "eps", "momentum", "training"),
    pairs(
        (torch.float64, torch.float32),
        (1e-5, 1e-3, 2.0),
        (0.0, 0.1, 1.0, 2.0, -1.2),
        (True, False),
    ),
    ids=str,
)
def test_agrees_with_stock(
    dtype: torch.dtype, eps: float, momentum: float, training: bool, device: str
) -> None:
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", dtype), device)
    tensors = tensors.requiring_grad()
    results = []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
        y = batch_norm(
            tensors.x,
            running_mean,
            running_var,
            tensors.weight,
            tensors.bias,
            training,
            momentum,
            eps,
        )
        leaves = (tensors.x, tensors.weight, tensors.bias)
        gradients = torch.autograd.grad(y, leaves, tensors.dy)
        results.append((y, *gradients, running_mean, running_var))
    tolerance = AGAINST_STOCK_FLOAT64 if dtype == torch.float64 else AGAINST_STOCK
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("argument", ["momentum", "eps"])
@pytest.mark.parametrize(
    "number",
    [1, True, np.float64(0.1), np.float32(0.1), torch.tensor(0.1)],
    ids=["int", "bool", "float64", "float32", "tensor"],
)
def test_a_number_is_what_stock_takes_for_one(number: Any, argument: str, device: str) -> None:
    x, results = torch.randn(4, 3, 5, device=device), []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        running_mean, running_var = torch.zeros(3, device=device), torch.ones(3, device=device)
        y = batch_norm(x, running_mean, running_var, training=True, **{argument: number})
        results.append((y, running_mean, running_var))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **AGAINST_STOCK)


def test_eval_with_eps_zero(device: str) -> None:
    """Legal in eval, where the variance is given and positive."""
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", torch.float32), device)
    y = fastbn.batch_norm(tensors.x, tensors.running_mean, tensors.running_var, eps=0.0)
    statistics = oracle.given_statistics(tensors.x, tensors.running_mean, tensors.running_var, 0.0)
    assert_near(y, oracle.output(tensors.x, None, None, statistics), "y")


@training_and_eval
def test_results_do_not_alias_the_input(training: bool, device: str) -> None:
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", torch.float32), device)
    before = tensors.x.clone()
    y = fastbn.batch_norm(tensors.x, tensors.running_mean, tensors.running_var, training=training)
    y.zero_()
    assert torch.equal(tensors.x, before)
