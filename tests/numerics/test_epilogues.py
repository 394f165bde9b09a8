"""Batch norm with an activation function and a residual, against float64 and against stock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn._backend import activation_functions
from fastbn.activations import NAMES, Activation
from fastbn.fused import dispatch_act
from tests.support import oracle
from tests.support.case_checks import EPS, MOMENTUM, statistics_of
from tests.support.epilogues import ACTIVATIONS, derivative, with_epilogue
from tests.support.pairs import pairs
from tests.support.tables import DTYPES, HALVES, LAYOUTS, SHAPES, SHARED, Case, lies, make
from tests.support.tolerances import arithmetic_error, assert_near, assert_no_worse

if TYPE_CHECKING:
    from torch import Tensor

    from tests.support.tables import Tensors

# As walks over memory go: rows and remainders of vectors, rows shorter than a vector, matrices,
# elements behind the last joined row, and channels that threads share.
NAMES_OF_SHAPES = (
    "matrix-three-channels",
    "matrix-many-channels",
    "line-49",
    "image-small",
    "image-odd",
    "image-wide-vectors",
    "image-short-segments",
    "few-channels",
)
EPILOGUES = [(activation, added) for activation in ACTIVATIONS.values() for added in (False, True)]


def residual_for(case: Case, tensors: Tensors, added: bool) -> Tensor | None:
    """One that lies as x does, or none."""
    if not added:
        return None
    values = torch.randn(case.shape).to(tensors.x.device, case.dtype)
    return LAYOUTS[case.layout](values).requires_grad_()


def apply(
    tensors: Tensors, residual: Tensor | None, activation: Activation, training: bool
) -> Tensor:
    """By the compiled operators."""
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    return dispatch_act(tensors.x, residual, *vectors, None, training, MOMENTUM, EPS, activation)


def test_names_are_those_of_the_compiled_functions() -> None:
    assert set(NAMES) == set(activation_functions) == set(ACTIVATIONS)


# Ways through memory do not know functions but for ReLU, which has loops of its own.
@pytest.mark.parametrize(
    ("name", "layout", "dtype", "epilogue", "training"),
    pairs(
        NAMES_OF_SHAPES,
        LAYOUTS,
        DTYPES,
        [(ACTIVATIONS["relu"], False), (ACTIVATIONS["silu"], True)],
        (True, False),
        where=lambda name, layout, *_: lies(name, layout),
    )
    + pairs(
        ("image-odd",), ("contiguous", "channels_last", "stepped"), DTYPES, EPILOGUES, (True, False)
    ),
    ids=str,
)
def test_every_result_is_right(
    name: str,
    layout: str,
    dtype: torch.dtype,
    epilogue: tuple[Activation, bool],
    training: bool,
    device: str,
) -> None:
    activation, added = epilogue
    case = Case(name, {**SHAPES, **SHARED}[name], layout, dtype)
    tensors = make(case, device).requiring_grad()
    residual = residual_for(case, tensors, added)
    statistics = statistics_of(tensors, training)
    running = (tensors.running_mean.clone(), tensors.running_var.clone())
    y = apply(tensors, residual, activation, training)
    exact = with_epilogue(tensors, residual, activation, statistics, training)
    y.backward(exact.dy)
    results = {
        "y": y,
        "dx": tensors.x.grad,
        "dweight": tensors.weight.grad,
        "dbias": tensors.bias.grad,
    }
    if residual is not None:
        results["dresidual"] = residual.grad
    for quantity, result in results.items():
        assert result is not None
        assert_near(result, exact.expected[quantity], quantity)
    if training:
        updated = oracle.running_statistics(statistics, *running, MOMENTUM)
        assert_near(tensors.running_mean, updated["running_mean"], "running_mean")
        assert_near(tensors.running_var, updated["running_var"], "running_var")


@pytest.mark.parametrize(
    ("dtype", "layout", "activation", "added", "training"),
    pairs(
        HALVES,
        ("contiguous", "channels_last"),
        [ACTIVATIONS["relu"], ACTIVATIONS["silu"], ACTIVATIONS["hardswish"]],
        (True, False),
        (True, False),
    ),
    ids=str,
)
def test_no_less_accurate_than_stock(
    dtype: torch.dtype,
    layout: str,
    activation: Activation,
    added: bool,
    training: bool,
    device: str,
) -> None:
    """Stock rounds twice more on the way: batch norm's result, and the sum."""
    case = Case("image-odd", SHAPES["image-odd"], layout, dtype)
    tensors = make(case, device).requiring_grad()
    residual = residual_for(case, tensors, added)
    exact = with_epilogue(tensors, residual, activation, statistics_of(tensors, training), training)
    z = F.batch_norm(
        tensors.x,
        tensors.running_mean.clone(),
        tensors.running_var.clone(),
        tensors.weight,
        tensors.bias,
        training,
        MOMENTUM,
        EPS,
    )
    theirs = activation(z if residual is None else z + residual)
    ours = apply(tensors, residual, activation, training)
    assert_no_worse(ours, theirs, exact.expected["y"], "y")
    wrt = {"dx": tensors.x, "dweight": tensors.weight, "dbias": tensors.bias}
    for quantity, leaf in wrt.items():
        (our_gradient,) = torch.autograd.grad(ours, leaf, exact.dy, retain_graph=True)
        (their_gradient,) = torch.autograd.grad(theirs, leaf, exact.dy, retain_graph=True)
        expected = exact.expected[quantity]
        error = (our_gradient.double() - expected.value).abs().max()
        theirs_error = (their_gradient.double() - expected.value).abs().max()
        # Those of parameters are float32, where either may be the lucky one.
        floor = arithmetic_error(leaf.dtype, expected, quantity, condition=1.0).max()
        assert error <= theirs_error + floor


# Pre-activations at and around what functions and 16-bit types have kinks at, and beyond numbers.
EDGES = (0.0, -0.0, 1e-8, -1e-8, 1e-30, -1e-30, 1e-42, 3.0, -3.0, 6.0, 88.5, -88.5, 1e4, -1e4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_edges_are_stocks(
    activation: Activation, layout: str, dtype: torch.dtype, device: str
) -> None:
    """Value and slope where 16 bits underflow, at kinks, NaN and infinities, element by element."""
    edges = [*EDGES, torch.nan, torch.inf, -torch.inf]
    z = torch.tensor(edges, dtype=torch.float64).to(device, dtype)
    # By weight 1, no bias, and statistics that leave x as it is.
    x = LAYOUTS[layout](z.expand(2, 16, len(edges)).contiguous()).requires_grad_()
    zeros, ones = torch.zeros(16, device=device).to(dtype), torch.ones(16, device=device).to(dtype)
    y = fastbn.batch_norm_act(
        x,
        zeros,
        ones,
        eps=0.0,
        activation=activation.name,
        activation_kwargs=_kwargs(activation),
    )
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    stock_z = z.clone().requires_grad_()
    # On some processors it is oneDNN's, which makes NaN of infinity in gelu.
    with torch.backends.mkldnn.flags(enabled=False):
        stock = activation(stock_z)
        (slope,) = torch.autograd.grad(stock, stock_z, torch.ones_like(stock))
    tolerance = 4 * torch.finfo(dtype).eps
    _assert_like_stock(y, stock, tolerance)
    exact = derivative(activation, z.double())
    finite = z.isfinite() & exact.isfinite()
    _assert_like_stock(dx[..., finite], exact[finite], tolerance)
    assert dx[..., z.isnan() & slope.isnan()].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish", "hardsigmoid"])
def test_no_gradient_gets_through_where_functions_are_flat(
    name: str, added: bool, layout: str, device: str
) -> None:
    """Not even an infinite one, such as that of a square root of what ReLU has made zero."""
    z = torch.linspace(-8, 8, 1600, dtype=torch.float64, device=device).reshape(1, 16, 100)
    dy = torch.full_like(z, torch.inf)
    dy[..., ::3] = torch.nan
    x = LAYOUTS[layout](z).requires_grad_()
    residual = LAYOUTS[layout](torch.zeros_like(z)).requires_grad_() if added else None
    zeros, ones = torch.zeros(16, device=device).double(), torch.ones(16, device=device).double()
    y = fastbn.batch_norm_act(x, zeros, ones, eps=0.0, residual=residual, activation=name)
    leaves = [leaf for leaf in (x, residual) if leaf is not None]
    stock = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[name](stock), stock, torch.ones_like(z))
    flat = slope == 0
    assert flat.any()
    for gradient in torch.autograd.grad(y, leaves, dy):
        assert torch.equal(gradient[flat], torch.zeros_like(gradient[flat]))
        assert not gradient[~flat].isfinite().any()


def _kwargs(activation: Activation) -> dict[str, object]:
    keywords = {"leaky_relu": "negative_slope", "elu": "alpha"}
    return {keywords[activation.name]: activation.parameter} if activation.name in keywords else {}


def _assert_like_stock(ours: Tensor, stock: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.double(),
        stock.double().expand_as(ours),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )
