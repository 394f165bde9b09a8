"""torch.func and forward-mode differentiation work on fastbn as they do on stock.

float64 throughout, against stock: what transforms compute is only as right as the composite formula
they go through, and in float64 nothing but a wrong formula shows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import fastbn
from tests.support.stock_versions import TAKES_EPS_ZERO
from tests.support.tolerances import AGAINST_STOCK, AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    BatchNorm = Callable[..., Tensor]
    Draw = Callable[..., Tensor]

training_and_eval = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def same_of_both(transform: Callable[[BatchNorm], Any]) -> None:
    """Applies a transform to fastbn's function and to stock's, from the same seed."""
    results = []
    for function in (fastbn.batch_norm, F.batch_norm):
        torch.manual_seed(1)
        results.append(transform(function))
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)


@pytest.fixture
def double(device: str) -> Draw:
    """Draws float64 tensors of a shape."""
    return partial(torch.randn, dtype=torch.float64, device=device)


def statistics(double: Draw, channels: int, training: bool) -> tuple[Tensor | None, Tensor | None]:
    """None in training: captured tensors must not be written to under transforms."""
    return (None, None) if training else (double(channels), double(channels).abs() + 0.5)


@training_and_eval
def test_jvp(training: bool, double: Draw) -> None:
    def transform(batch_norm: BatchNorm) -> Any:
        running = statistics(double, 3, training)
        primals = (double(4, 3, 5), double(3), double(3))
        tangents = (double(4, 3, 5), double(3), double(3))
        return jvp(lambda x, w, b: batch_norm(x, *running, w, b, training), primals, tangents)

    same_of_both(transform)


@training_and_eval
def test_forward_mode_dual_numbers(training: bool, double: Draw) -> None:
    """The same without torch.func; only some arguments have a tangent."""

    def transform(batch_norm: BatchNorm) -> Any:
        running = statistics(double, 3, training)
        x, weight, tangent = double(4, 3, 5), double(3), double(4, 3, 5)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            return tuple(forward_ad.unpack_dual(batch_norm(dual, *running, weight, None, training)))

    same_of_both(transform)


@training_and_eval
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (0, 0, 0), (None, 0, 0)])
def test_vmap(in_dims: tuple[int | None, ...], training: bool, double: Draw) -> None:
    """Over x, over parameters, and over one of them alone."""

    def transform(batch_norm: BatchNorm) -> Any:
        running = statistics(double, 3, training)
        shapes = [(4, 3, 5), (3,), (3,)]
        arguments = [double(*shape) for shape in shapes]
        for i, dim in enumerate(in_dims):
            if dim is not None:
                arguments[i] = double(6, *shapes[i]).movedim(0, dim)
        mapped = vmap(lambda x, w, b: batch_norm(x, *running, w, b, training), in_dims)
        return mapped(*arguments)

    same_of_both(transform)


def test_vmap_updates_statistics_that_are_batched_too(double: Draw) -> None:
    def transform(batch_norm: BatchNorm) -> Any:
        running = double(6, 3), double(6, 3).abs()
        y = vmap(lambda x, m, v: batch_norm(x, m, v, None, None, True, 0.3))(
            double(6, 4, 3, 5), *running
        )
        return y, *running

    same_of_both(transform)


@training_and_eval
def test_gradients_of_gradients(training: bool, double: Draw) -> None:
    def transform(batch_norm: BatchNorm) -> Any:
        running = statistics(double, 2, training)
        weight = double(2)

        def loss(x: Tensor) -> Tensor:
            return batch_norm(x, *running, weight, None, training).pow(3).sum()

        x = double(3, 2, 2)
        return grad(loss)(x), jacrev(grad(loss))(x), hessian(loss)(x)

    same_of_both(transform)


@training_and_eval
def test_gradients_per_sample_of_a_batch_of_batches(training: bool, double: Draw) -> None:
    def transform(batch_norm: BatchNorm) -> Any:
        running = statistics(double, 3, training)
        parameters = (double(3), double(3))

        def loss(parameters: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return batch_norm(x, *running, *parameters, training).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, double(6, 4, 3, 5))

    same_of_both(transform)


def test_gradient_of_a_function_that_captures_running_statistics(double: Draw) -> None:
    """Stock's function updates them, unlike its module, whose counter is in the way."""

    def transform(batch_norm: BatchNorm) -> Any:
        running = double(3), double(3).abs()
        dx = grad(lambda x: batch_norm(x, *running, None, None, True).pow(3).sum())(double(4, 3, 5))
        return dx, *running

    same_of_both(transform)


def network(namespace: Any, device: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), namespace.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    ).to(device, torch.float64)


def norm_of(model: nn.Sequential) -> nn.BatchNorm2d:
    assert isinstance(model[1], nn.BatchNorm2d)
    return model[1]


@training_and_eval
def test_functional_call(training: bool, double: Draw, device: str) -> None:
    """Parameters and buffers from outside; those are updated, the module's own are not."""
    results = []
    for namespace in (fastbn, nn):
        torch.manual_seed(1)
        model = network(namespace, device).train(training)
        own = {name: value.clone() for name, value in model.state_dict().items()}
        given = {name: value.clone() + 1 for name, value in own.items()}
        y = functional_call(model, given, (double(6, 3, 5, 5),))
        for name, value in model.state_dict().items():
            assert torch.equal(value, own[name])
        results.append((y, given))
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ensemble_in_training(momentum: float | None, double: Draw, device: str) -> None:
    """Stacked modules under vmap: each with statistics, counter and gradients of its own."""
    results = []
    for namespace in (fastbn, nn):
        torch.manual_seed(1)
        models = [network(namespace, device) for _ in range(3)]
        for model in models:
            norm_of(model).momentum = momentum
        parameters, buffers = stack_module_state(models)
        base = models[0].to("meta")

        def loss(
            parameters: dict[str, Tensor],
            buffers: dict[str, Tensor],
            x: Tensor,
            base: nn.Module = base,
        ) -> Tensor:
            y: Tensor = functional_call(base, (parameters, buffers), (x,))
            return y.square().mean()

        if namespace is nn and momentum is None:
            # Stock's counter would have to become a number; run its models one by one.
            torch.manual_seed(1)
            models = [network(nn, device) for _ in range(3)]
            x = double(3, 6, 3, 5, 5)
            for model, batch in zip(models, x, strict=True):
                norm_of(model).momentum = None
                model(batch).square().mean().backward()
            gradients = {}
            for name in parameters:
                stack = [model.get_parameter(name).grad for model in models]
                gradients[name] = torch.stack([own for own in stack if own is not None])
            buffers = stack_module_state(models)[1]
        else:
            gradients = vmap(grad(loss))(parameters, buffers, double(3, 6, 3, 5, 5))
        results.append((gradients, buffers))
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)
    assert results[0][1]["1.num_batches_tracked"].tolist() == [1, 1, 1]


def test_16_bit_under_transforms_is_computed_in_float32(device: str) -> None:
    """As outside of them: the composite formula widens what it sums."""
    x = (torch.randn(64, 3, 9, 9) * 100 + 200).to(device, torch.float16)
    weight = torch.randn(3, device=device)
    plain = fastbn.batch_norm(x, None, None, weight, None, True)
    transformed = vjp(lambda x: fastbn.batch_norm(x, None, None, weight, None, True), x)[0]
    assert transformed.dtype == torch.float16
    # One rounding to float16 may go either way.
    torch.testing.assert_close(transformed, plain, rtol=2**-10, atol=1e-6)


def test_replacing_batch_norm_modules_for_transforms(double: Draw, device: str) -> None:
    """torch.func's own helper recognizes fastbn's modules: it drops their running statistics."""
    model = network(fastbn, device)
    torch.func.replace_all_batch_norm_modules_(model)
    assert type(model[1]) is fastbn.BatchNorm2d
    assert norm_of(model).running_mean is None
    x = double(6, 3, 5, 5)
    parameters = dict(model.named_parameters())
    gradients = grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, **AGAINST_STOCK_FLOAT64)


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
ZEROS, ONES = torch.zeros(3), torch.ones(3)
# Arguments behind x that are wrong: the composite formula refuses what the operators refuse.
MISUSES: dict[str, tuple[Tensor, tuple[Any, ...]]] = {
    "running_mean": (X, (torch.zeros(4), torch.ones(4), None, None, True)),
    "running_var": (X, (ZEROS, torch.ones(4), None, None, True)),
    "weight": (X, (None, None, torch.ones(4), None, True)),
    "bias": (X, (None, None, ONES, torch.ones(2), True)),
    "eval without statistics": (X, (None, None)),
    "eval without variance": (X, (ZEROS, None)),
    "training with one statistic": (X, (ZEROS, None, None, None, True)),
    "one value": (X[:1, :, :1, :1], (None, None, None, None, True)),
    "eps zero": (X, (None, None, None, None, True, 0.1, 0.0)),
    "eps negative": (X, (ZEROS, ONES, None, None, False, 0.1, -1.0)),
    "momentum": (X, (ZEROS, ONES, None, None, True, "much")),
    "one dimension": (X[0, :, 0, 0], (ZEROS, ONES)),
    "float64 weight": (X, (None, None, ONES.double(), None, True)),
    "float64 input": (X.double(), (ZEROS, ONES, None, None, False)),
}
if not TAKES_EPS_ZERO:
    MISUSES = {name: misuse for name, misuse in MISUSES.items() if not name.startswith("eps")}


@pytest.mark.parametrize("name", MISUSES)
def test_transforms_refuse_what_stock_refuses(name: str) -> None:
    x, arguments = MISUSES[name]
    raised = []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            vjp(lambda x, batch_norm=batch_norm: batch_norm(x, *arguments), x)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_tangents_of_running_statistics_are_refused() -> None:
    raised = []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        with forward_ad.dual_level(), pytest.raises(RuntimeError) as caught:
            batch_norm(forward_ad.make_dual(X, X), forward_ad.make_dual(ZEROS, ONES), ONES)
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


def test_batched_input_wants_batched_running_statistics() -> None:
    """Stock's words go on with links to its documentation; ours stop before them."""
    raised = []
    for batch_norm in (fastbn.batch_norm, F.batch_norm):
        running = torch.zeros(3), torch.ones(3)
        with pytest.raises(RuntimeError, match="got a batched tensor as input") as caught:
            vmap(
                lambda x, batch_norm=batch_norm, running=running: batch_norm(
                    x, *running, training=True
                )
            )(X[None])
        raised.append(str(caught.value))
        assert torch.equal(running[0], ZEROS)
    assert raised[1].startswith(raised[0])


def test_float32_agrees_with_stock_under_vmap(device: str) -> None:
    """The one thing float64 does not show: the dtype of results."""
    x = torch.randn(6, 4, 3, 5, device=device)
    ours, stock = (
        vmap(lambda x, function=function: function(x, None, None, training=True))(x)
        for function in (fastbn.batch_norm, F.batch_norm)
    )
    torch.testing.assert_close(ours, stock, **AGAINST_STOCK)
