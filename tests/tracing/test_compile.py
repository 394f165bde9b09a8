"""torch.compile takes fastbn without a graph break and computes what eager mode computes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastbn
from tests.support.stock_versions import TAKES_BIAS
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# Tracing forward and backward without generating code takes a tenth of the time that code takes,
# and all that can break is in the tracing; one test goes all the way.
TRACING = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(device: str, **options: Any) -> nn.Sequential:
    return fastbn.convert(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4, **options),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5, **options),
        )
    ).to(device)


def steps(
    model: nn.Module, call: Callable[[Tensor], Tensor], batches: int = 3, size: int = 6
) -> list[Tensor]:
    """Outputs, gradients and all buffers after some training steps."""
    torch.manual_seed(1)
    device = next(model.parameters()).device
    outputs = []
    for _ in range(batches):
        y = call(torch.randn(size, 3, 9, 9, device=device))
        y.square().mean().backward()
        outputs.append(y.detach())
    for parameter in model.parameters():
        assert parameter.grad is not None
        outputs.append(parameter.grad)
    return [*outputs, *model.buffers()]


def assert_compiles(model: nn.Module, backend: str) -> None:
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ours, expected in zip(steps(model, compiled), steps(eager, eager), strict=True):
        torch.testing.assert_close(ours, expected, **AGAINST_STOCK)


# What decides the traced code: the flags of the module and its mode.
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"affine": False},
        *([{"bias": False}] if TAKES_BIAS else []),
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_full_graph(options: dict[str, Any], training: bool, device: str) -> None:
    assert_compiles(network(device, **options).train(training), TRACING)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_generated_code(training: bool, device: str) -> None:
    assert_compiles(network(device, momentum=None).train(training), "inductor")


def test_cumulative_average_is_compiled_once(device: str) -> None:
    """The counter stays a tensor: were it read into a number, every step would compile anew."""
    model = network(device, momentum=None)
    counter = CompileCounterWithBackend(TRACING)
    steps(model, torch.compile(model, fullgraph=True, backend=counter), batches=5)
    assert counter.frame_count == 1
    assert model[1].get_buffer("num_batches_tracked") == 5


def test_batch_of_any_size(device: str) -> None:
    """With dynamic shapes what the first batch compiled serves all others."""
    model = network(device)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(TRACING)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = set()
    for size in (6, 4, 9):
        results = steps(model, compiled, 1, size), steps(eager, eager, 1, size)
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, **AGAINST_STOCK)
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize("layout", ["channels_last", "stepped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_function_on_other_strides(dtype: torch.dtype, layout: str, device: str) -> None:
    """The compiler plans memory by the strides that the fake implementations promise."""
    x = torch.randn(4, 6, 8, 10).to(device, dtype)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x[..., ::2]
    results = []
    for compiling in (True, False):
        running = torch.zeros(6, device=device), torch.ones(6, device=device)
        leaf = x.detach().requires_grad_()

        def step(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return fastbn.batch_norm(x, mean, var, training=True) * 2

        call = torch.compile(step, fullgraph=True, backend=TRACING) if compiling else step
        y = call(leaf, *running)
        y.float().square().sum().backward()
        assert y.stride() == torch.empty_like(y).stride()
        results.append((y, leaf.grad, *running))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_bare_module(device: str) -> None:
    """Stock's own modules cannot be compiled alone without a graph break; ours can."""
    module = fastbn.BatchNorm2d(3, device=device)
    eager = copy.deepcopy(module)
    module.compile(fullgraph=True, backend=TRACING)
    x = torch.randn(4, 3, 5, 5, device=device)
    assert torch.equal(module(x), eager(x))
    assert torch.equal(module.get_buffer("running_var"), eager.get_buffer("running_var"))


def test_gradients_compiled_into_the_graph(device: str) -> None:
    """A training step that is one function: torch.func.grad inside of what is compiled."""

    def step(x: Tensor, weight: Tensor) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return fastbn.batch_norm(x, None, None, weight, None, True).pow(3).sum()

        gradient: Tensor = torch.func.grad(loss)(weight)
        return gradient

    x, weight = torch.randn(4, 3, 5, device=device), torch.randn(3, device=device)
    compiled = torch.compile(step, fullgraph=True, backend=TRACING)
    torch.testing.assert_close(compiled(x, weight), step(x, weight), **AGAINST_STOCK)


@pytest.mark.parametrize("place", ["inside", "around"])
def test_recomputing_is_left_to_the_compiler(place: str, device: str) -> None:
    """In compiled code the context is nothing, and around it no reason to compile again."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), fastbn.BatchNormAct2d(4, activation="silu"), nn.Conv2d(4, 5, 3)
    ).to(device)
    eager = copy.deepcopy(model)

    def inside(x: Tensor) -> Tensor:
        with fastbn.recompute_activations():
            y: Tensor = model(x)
        return y

    counter = CompileCounterWithBackend(TRACING)
    compiled = torch.compile(
        inside if place == "inside" else model, fullgraph=True, backend=counter
    )
    around = fastbn.recompute_activations()(compiled) if place == "around" else compiled
    for call in (around, compiled):
        for ours, expected in zip(steps(model, call), steps(eager, eager), strict=True):
            torch.testing.assert_close(ours, expected, **AGAINST_STOCK)
    assert counter.frame_count == 1
