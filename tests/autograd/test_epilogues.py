"""Autograd, transforms and tracing of batch norm with an activation function and a residual."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jvp, vmap

import fastbn
from tests.support.epilogues import ACTIVATIONS
from tests.support.tolerances import AGAINST_STOCK, AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

training_and_eval = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
with_and_without_residual = pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
KEYWORDS = {"leaky_relu": "negative_slope", "elu": "alpha"}


def ours(name: str, training: bool, x: Tensor, residual: Tensor | None, *vectors: Tensor) -> Tensor:
    activation = ACTIVATIONS[name]
    keyword = KEYWORDS.get(name)
    mean, var = (None, None) if training else vectors[:2]
    weight, bias = vectors[2:4] if len(vectors) == 4 else (None, None)
    return fastbn.batch_norm_act(
        x,
        mean,
        var,
        weight,
        bias,
        training,
        residual=residual,
        activation=name,
        activation_kwargs={keyword: activation.parameter} if keyword else None,
    )


def stocks(
    name: str, training: bool, x: Tensor, residual: Tensor | None, *vectors: Tensor
) -> Tensor:
    mean, var = (None, None) if training else vectors[:2]
    weight, bias = vectors[2:4] if len(vectors) == 4 else (None, None)
    z = F.batch_norm(x, mean, var, weight, bias, training)
    return ACTIVATIONS[name](z if residual is None else z + residual)


@pytest.fixture
def arguments(device: str) -> Callable[[bool], list[Any]]:
    """X, the residual, running statistics, weight and bias, float64."""

    def draw(added: bool) -> list[Any]:
        double = partial(torch.randn, dtype=torch.float64, device=device)
        return [
            double(4, 3, 2, 3),
            double(4, 3, 2, 3) if added else None,
            double(3),
            double(3).abs() + 0.5,
            double(3),
            double(3),
        ]

    return draw


@training_and_eval
@with_and_without_residual
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_numerical_differentiation(
    name: str, added: bool, training: bool, arguments: Callable[[bool], list[Any]]
) -> None:
    """First and second derivatives, forward mode, and backward of a batch of gradients."""
    x, residual, mean, var, weight, bias = arguments(added)
    inputs = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]

    def function(*given: Tensor) -> Tensor:
        rest = list(given)
        x, residual = rest.pop(0), rest.pop(0) if added else None
        return ours(name, training, x, residual, mean, var, *rest)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@training_and_eval
@with_and_without_residual
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_are_stocks(
    name: str, added: bool, training: bool, arguments: Callable[[bool], list[Any]]
) -> None:
    torch.manual_seed(2)
    given = arguments(added)
    results = []
    for function in (ours, stocks):
        x, residual, mean, var, weight, bias = given
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
        rest = list(leaves)
        x, residual = rest.pop(0), rest.pop(0) if added else None
        y = function(name, training, x, residual, mean, var, *rest)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        size = torch.stack([gradient.square().sum() for gradient in first]).sum()
        results.append(torch.autograd.grad(size, leaves))
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)


@training_and_eval
@with_and_without_residual
def test_transforms_are_stocks(
    added: bool, training: bool, arguments: Callable[[bool], list[Any]]
) -> None:
    x, residual, *vectors = arguments(added)
    results = []
    for function in (ours, stocks):

        def call(x: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function("silu", training, x, residual, *vectors)

        def size(x: Tensor, call: Callable[[Tensor], Tensor] = call) -> Tensor:
            return call(x).square().sum()

        batch = torch.stack([x, 2 * x, x + 1])
        results.append([vmap(call)(batch), grad(size)(x), jvp(call, (x,), (x.cos(),))[1]])
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 1, 1), torch.float32), ((4, 3, 2, 3), torch.float64)],
    ids=["broadcast", "wider"],
)
def test_residuals_that_are_not_like_x_are_added_as_stock_adds_them(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(4, 3, 2, 3, device=device).requires_grad_()
    residual = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    results = []
    for function in (ours, stocks):
        y = function("relu", True, x, residual)
        assert y.dtype == dtype
        dy = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, (x, residual), dy)])
    torch.testing.assert_close(*results, **AGAINST_STOCK)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "identity", "silu"])
@with_and_without_residual
def test_saves_no_activation_but_x_and_a_residual_that_it_needs(
    name: str, added: bool, device: str
) -> None:
    """Stock keeps the result of batch norm, or the function's, besides."""
    x = torch.randn(2, 3, 4, 4, device=device).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if added else None
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            saved.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(name, True, x, residual)
    needed = (x, residual if name == "silu" else None)
    assert saved == [t.data_ptr() for t in needed if t is not None]


@training_and_eval
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "identity"])
def test_residual_and_bias_may_change_before_backward(
    name: str, training: bool, device: str
) -> None:
    """As stock's may, where the derivative needs no more than a bit of each element."""
    results = []
    for function in (ours, stocks):
        generator = torch.Generator().manual_seed(5)
        x, residual = torch.randn(2, 4, 4, 4, 8, generator=generator).to(device)
        mean, var, weight, bias = torch.rand(4, 4, generator=generator).to(device).unbind()
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        x, residual, weight, bias = leaves
        added = residual.clone()
        y = function(name, training, x, added, mean, var, weight, bias)
        with torch.no_grad():
            added.zero_()
            bias.add_(5)
        results.append(
            [
                y,
                *torch.autograd.grad(
                    y, leaves, torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)
                ),
            ]
        )
    torch.testing.assert_close(*results, **AGAINST_STOCK)


@training_and_eval
@with_and_without_residual
@pytest.mark.parametrize(
    ("name", "dynamic"), [("hardswish", False), ("relu", False), ("relu", True)]
)
def test_compiles_to_what_eager_mode_computes(
    name: str, dynamic: bool, added: bool, training: bool, device: str
) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3, 4, 5, device=device)
    residual = torch.randn_like(x) if added else None
    vectors = (torch.zeros(3, device=device), torch.ones(3, device=device))

    def step(x: Tensor, residual: Tensor | None) -> Tensor:
        return ours(name, training, x, residual, *vectors)

    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
        y = call(leaves[0], leaves[1] if added else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results, **AGAINST_STOCK)


def test_unknown_names_and_arguments_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(
        ValueError, match=r"^activation is 'swoosh'; it may be one of identity, relu"
    ):
        fastbn.batch_norm_act(x, None, None, training=True, activation="swoosh")
    with pytest.raises(TypeError, match=r"^relu got slope; of keyword arguments it takes inplace$"):
        fastbn.batch_norm_act(x, None, None, training=True, activation_kwargs={"slope": 1})
    with pytest.raises(RuntimeError, match=r"^approximate argument must be either none or tanh\.$"):
        fastbn.batch_norm_act(
            x, None, None, training=True, activation="gelu", activation_kwargs={"approximate": "no"}
        )
    momentum: Any = None
    with pytest.raises(TypeError, match=r"argument 'momentum' \(position 7\) must be float"):
        fastbn.batch_norm_act(x, None, None, training=True, momentum=momentum)
