"""Autograd, beyond a plain backward: any subset of gradients, gradients of gradients, safety."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastbn
from tests.support import oracle
from tests.support.case_checks import PARAMETERS, forward, statistics_of
from tests.support.tables import DTYPES, HALVES, SHAPES, Case, make
from tests.support.tolerances import AGAINST_STOCK_FLOAT64, assert_near

if TYPE_CHECKING:
    from torch import Tensor

training_and_eval = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
IMAGE = Case("image-odd", SHAPES["image-odd"], "contiguous", torch.float32)


def grad_of(leaf: Tensor) -> Tensor:
    """What backward has left."""
    assert leaf.grad is not None
    return leaf.grad


# Numerical differentiation of everything PyTorch can ask for: backward, backward of a batch of
# gradients, forward mode, and backward of backward. Rank, layout and mode choose the code; missing
# vectors choose branches of the formulas.
@training_and_eval
@pytest.mark.parametrize("vectors", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 3), "contiguous"),
        ((3, 2, 4), "contiguous"),
        ((2, 3, 2, 3), "contiguous"),
        ((2, 3, 2, 3), "channels_last"),
    ],
    ids=["matrix", "line", "image", "image-channels-last"],
)
def test_numerical_differentiation(
    shape: tuple[int, ...], layout: str, vectors: str, training: bool, device: str
) -> None:
    tensors = make(Case("small", shape, layout, torch.float64), device).requiring_grad()
    weight = tensors.weight if "weight" in vectors else None
    bias = tensors.bias if "bias" in vectors else None
    inputs = tuple(t for t in (tensors.x, weight, bias) if t is not None)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = iter(parameters)
        return fastbn.batch_norm(
            x,
            None if training else tensors.running_mean,
            None if training else tensors.running_var,
            None if weight is None else next(given),
            None if bias is None else next(given),
            training,
        )

    with warnings.catch_warnings():
        # PyTorch's fallback for a batch of gradients computes them one by one, and says so.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


# All subsets; not wanted gradients must stay None and not cost the others their value.
@training_and_eval
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=3))[:-1], ids=str)
def test_any_subset_of_gradients(
    wanted: tuple[bool, bool, bool], training: bool, device: str
) -> None:
    tensors = make(IMAGE, device)
    for name, wants in zip(PARAMETERS, wanted, strict=True):
        getattr(tensors, name).requires_grad_(wants)
    statistics = statistics_of(tensors, training)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training)
    forward(tensors, training).backward(tensors.dy)
    for (name, quantity), wants in zip(PARAMETERS.items(), wanted, strict=True):
        gradient = getattr(tensors, name).grad
        if wants:
            assert_near(gradient, expected[quantity], quantity)
        else:
            assert gradient is None


@training_and_eval
def test_no_graph_where_none_is_wanted(training: bool, device: str) -> None:
    tensors = make(IMAGE, device)
    statistics = statistics_of(tensors, training)
    expected = oracle.output(tensors.x, tensors.weight, tensors.bias, statistics)
    before = tensors.running_mean.clone(), tensors.running_var.clone()
    plain = forward(tensors, training)
    leaves = replace(tensors, running_mean=before[0], running_var=before[1]).requiring_grad()
    with torch.no_grad():
        silent = forward(leaves, training)
    assert not plain.requires_grad
    assert not silent.requires_grad
    assert_near(plain, expected, "y")
    assert torch.equal(plain, silent)


@training_and_eval
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differentiable_backward_computes_the_same(
    dtype: torch.dtype, training: bool, device: str
) -> None:
    """With create_graph another formula computes the gradients, to the same tolerance."""
    tensors = make(replace(IMAGE, dtype=dtype), device).requiring_grad()
    statistics = statistics_of(tensors, training)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training)
    leaves = (tensors.x, tensors.weight, tensors.bias)
    gradients = torch.autograd.grad(
        forward(tensors, training), leaves, tensors.dy, create_graph=True
    )
    for leaf, quantity, gradient in zip(leaves, PARAMETERS.values(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, expected[quantity], quantity)


@training_and_eval
def test_gradient_penalty_is_that_of_stock(training: bool, device: str) -> None:
    """The usual reason for a second backward, through a network."""
    results = []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        torch.manual_seed(1)
        tensors = make(replace(IMAGE, dtype=torch.float64), device).requiring_grad()
        vectors = (tensors.running_mean, tensors.running_var, tensors.weight, tensors.bias)
        y = batch_norm(tensors.x, *vectors, training).relu().square().sum()
        (dx,) = torch.autograd.grad(y, tensors.x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        leaves = (tensors.x, tensors.weight, tensors.bias)
        results.append((penalty, *torch.autograd.grad(penalty, leaves)))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, **AGAINST_STOCK_FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_eval_gradient_survives_training_of_the_same_module(
    dtype: torch.dtype, device: str
) -> None:
    """It belongs to the statistics of its own forward, which a later step has overwritten."""
    module = fastbn.BatchNorm2d(3, device=device)
    evaluated = make(replace(IMAGE, dtype=dtype), device)
    x = evaluated.x.requires_grad_()
    assert module.running_mean is not None
    assert module.running_var is not None
    with torch.no_grad():
        module.running_mean.copy_(evaluated.running_mean)
        module.running_var.copy_(evaluated.running_var)
    statistics = oracle.given_statistics(x, module.running_mean, module.running_var, module.eps)
    expected = oracle.gradients(evaluated.dy, x, module.weight, statistics, training=False)

    y = module.eval()(x)
    module.train()(10 * make(replace(IMAGE, dtype=dtype), device).x + 5)
    assert not torch.equal(module.running_mean, evaluated.running_mean)
    y.backward(evaluated.dy)
    assert_near(grad_of(x), expected["dx"], "dx")
    assert_near(grad_of(module.weight), expected["dweight"], "dweight")


def test_two_forwards_before_a_backward(device: str) -> None:
    """As a discriminator has them: real, then generated, then one loss."""
    module = fastbn.BatchNorm2d(3, device=device)
    batches = [make(IMAGE, device) for _ in range(2)]
    outputs = [module(batch.x.requires_grad_()) for batch in batches]
    torch.autograd.backward(outputs, [batch.dy for batch in batches])
    dweight = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        statistics = oracle.batch_statistics(batch.x, module.eps)
        expected = oracle.gradients(batch.dy, batch.x, module.weight, statistics, True)
        assert_near(grad_of(batch.x), expected["dx"], "dx")
        dweight += expected["dweight"].value
    summed = grad_of(module.weight).cpu().double()
    torch.testing.assert_close(summed, dweight, rtol=1e-5, atol=1e-4)


@training_and_eval
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_are_not_saved(dtype: torch.dtype, training: bool, device: str) -> None:
    """Neither they nor views of them; so nothing may ever overwrite what backward reads."""
    tensors = make(replace(IMAGE, dtype=dtype), device).requiring_grad()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(tensors, training)
    buffers = (tensors.running_mean, tensors.running_var)
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert storages.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in saved)
    assert [tuple(tensor.shape) for tensor in saved] == [tensors.x.shape, (3,), (3,), (3,)]


def test_backward_of_a_kept_graph_gives_the_same_again(device: str) -> None:
    tensors = make(IMAGE, device).requiring_grad()
    y = forward(tensors, True)
    leaves = (tensors.x, tensors.weight, tensors.bias)
    first = torch.autograd.grad(y, leaves, tensors.dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, tensors.dy)
    statistics = oracle.batch_statistics(tensors.x, 1e-5)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, True)
    assert_near(first[0], expected["dx"], "dx")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_result_may_be_changed_in_place(device: str) -> None:
    """Y is not needed for its own gradient, so an in-place activation behind it is legal."""
    tensors = make(IMAGE, device).requiring_grad()
    statistics = oracle.batch_statistics(tensors.x, 1e-5)
    y = oracle.output(tensors.x, tensors.weight, tensors.bias, statistics).value
    dy = tensors.dy * (y > 0).to(device)
    expected = oracle.gradients(dy, tensors.x, tensors.weight, statistics, True)
    F.relu(forward(tensors, True), inplace=True).backward(tensors.dy)
    assert_near(grad_of(tensors.x), expected["dx"], "dx")
    assert_near(grad_of(tensors.bias), expected["dbias"], "dbias")


def test_input_changed_in_place_is_noticed(device: str) -> None:
    """As stock notices it: a wrong gradient must not come out silently."""
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        leaf = torch.randn(4, 3, 5, device=device, requires_grad=True)
        x = leaf * 1
        y = batch_norm(x, None, None, training=True)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_gradients_accumulate(device: str) -> None:
    tensors = make(IMAGE, device).requiring_grad()
    statistics = oracle.batch_statistics(tensors.x, 1e-5)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, True)
    forward(tensors, True).backward(tensors.dy)
    assert_near(grad_of(tensors.x), expected["dx"], "dx")
    once = grad_of(tensors.x).clone()
    forward(tensors, True).backward(tensors.dy)
    assert torch.equal(grad_of(tensors.x), 2 * once)


def test_saved_tensors_may_live_elsewhere(device: str) -> None:
    """Between the passes; here in tensors of their own on the host."""
    results = []
    for offload in (False, True):
        torch.manual_seed(1)
        tensors = make(IMAGE, device).requiring_grad()
        with torch.autograd.graph.save_on_cpu() if offload else torch.enable_grad():
            y = forward(tensors, True)
        y.backward(tensors.dy)
        leaves = (tensors.x, tensors.weight, tensors.bias)
        results.append([grad_of(leaf) for leaf in leaves])
    statistics = oracle.batch_statistics(tensors.x, 1e-5)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, True)
    assert_near(results[1][0], expected["dx"], "dx")
    for plain, offloaded in zip(*results, strict=True):
        assert torch.equal(plain, offloaded)


def test_function_applies_to_the_arguments_it_documents(device: str) -> None:
    """BatchNormFunction is public: with a counter it does what a module's training step does."""
    tensors = make(IMAGE, device).requiring_grad()
    module = nn.BatchNorm2d(3, momentum=None, device=device)
    counter = torch.tensor(1, device=device)
    assert module.num_batches_tracked is not None
    assert module.running_mean is not None
    assert module.running_var is not None
    module.num_batches_tracked.fill_(1)
    with torch.no_grad():
        module.weight.copy_(tensors.weight)
        module.bias.copy_(tensors.bias)
        module.running_mean.copy_(tensors.running_mean)
        module.running_var.copy_(tensors.running_var)
    y = fastbn.BatchNormFunction.apply(  # type: ignore[no-untyped-call]
        tensors.x,
        tensors.weight,
        tensors.bias,
        tensors.running_mean,
        tensors.running_var,
        counter,
        True,
        None,
        1e-5,
    )
    torch.testing.assert_close(y, module(tensors.x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensors.running_mean, module.running_mean)
    torch.testing.assert_close(tensors.running_var, module.running_var)
    assert counter.item() == module.num_batches_tracked.item() == 2
