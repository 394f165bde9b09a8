"""What stock refuses is refused: the same type of exception in the same words.

On a GPU the words are those that stock has there, or those that it has on the CPU: some of its
kernels for GPUs say less than the CPU's, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from tests.support.stock_versions import TAKES_EPS_ZERO

if TYPE_CHECKING:
    from collections.abc import Callable


def caught(call: Callable[[], object]) -> Exception:
    """The exception a call ends with."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@dataclass
class Call:
    """Arguments of F.batch_norm, by default good ones for 3 channels in training."""

    input: Any = field(default_factory=lambda: torch.randn(2, 3, 4, 4))
    running_mean: Any = field(default_factory=lambda: torch.zeros(3))
    running_var: Any = field(default_factory=lambda: torch.ones(3))
    weight: Any = None
    bias: Any = None
    training: bool = True
    momentum: Any = 0.1
    eps: Any = 1e-5

    def on(self, device: str) -> Call:
        """The same with all tensors of the CPU moved to a device."""
        return Call(**{name: moved(value, device) for name, value in vars(self).items()})

    def make(self, function: Callable[..., object]) -> object:
        return function(**vars(self))


def moved(value: Any, device: str) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def refusals(call: Callable[[str], object], device: str) -> list[tuple[type, str]]:
    """Type and first line of what stock raises on a device, and on the CPU if that is another.

    Args:
        call: calls stock with tensors of the device it is given.
        device: where fastbn is tried.
    """
    said = []
    for where in dict.fromkeys((device, "cpu")):
        try:
            error = caught(partial(call, where))
        except AssertionError:
            assert where != "cpu"  # there is always something to compare with
            continue
        said.append(described(error))
        if where != device:
            kind, words = said[-1]
            words = words.replace("(CPU)", "(CUDA)").replace("device cpu", f"device {device}:0")
            said.append((kind, words))
    return said


def described(error: Exception) -> tuple[type, str]:
    return type(error), (str(error).splitlines() or [""])[0]


def of_dtype(dtype: torch.dtype) -> Callable[[], Call]:
    return lambda: Call(torch.ones(2, 3, 4).to(dtype))


def requiring_grad(values: torch.Tensor) -> torch.Tensor:
    return values.requires_grad_()


def of_ones(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Running statistics, weight and bias."""
    ones = torch.ones(channels)
    return ones, ones, ones, ones


# Fresh arguments for each of the two functions; in the order of stock's own checks.
SAME_WORDS: dict[str, Callable[[], Call]] = {
    "one value per channel": lambda: Call(torch.randn(1, 3, 1, 1)),
    "one value, matrix": lambda: Call(torch.randn(1, 3)),
    "one value, no elements": lambda: Call(torch.randn(1, 0), None, None),
    "one value, one dimension": lambda: Call(torch.randn(1), None, None),
    "eps zero": lambda: Call(eps=0.0),
    "eps negative": lambda: Call(eps=-1.0),
    "eps tiny negative": lambda: Call(eps=-1e-05),
    "eps negative, eval": lambda: Call(training=False, eps=-1.0),
    "one value before eps": lambda: Call(torch.randn(1, 3), eps=0.0),
    "no channels": lambda: Call(torch.ones(2, 0, 4), *of_ones(0)),
    "running_mean, wrong channels": lambda: Call(running_mean=torch.zeros(4)),
    "running_var, wrong channels": lambda: Call(running_var=torch.zeros(4)),
    "both statistics, wrong channels": lambda: Call(torch.randn(2, 4, 3)),
    "weight, wrong channels": lambda: Call(weight=torch.zeros(4)),
    "bias, wrong channels": lambda: Call(bias=torch.zeros(2)),
    "weight before bias": lambda: Call(weight=torch.zeros(4), bias=torch.zeros(2)),
    "eval, no statistics": lambda: Call(running_mean=None, running_var=None, training=False),
    "eval, no variance": lambda: Call(running_var=None, training=False),
    "eval, no mean": lambda: Call(running_mean=None, training=False),
    "training, no variance": lambda: Call(running_var=None),
    "training, no mean": lambda: Call(running_mean=None),
    "int64": of_dtype(torch.int64),
    "int32": of_dtype(torch.int32),
    "uint8": of_dtype(torch.uint8),
    "bool": of_dtype(torch.bool),
    "complex64": of_dtype(torch.complex64),
    "float8": of_dtype(torch.float8_e4m3fn),
    "channels before dtype": lambda: Call(torch.ones(2, 4, 3).long()),
    "float64 with float32 parameters": lambda: Call(torch.randn(2, 3, 4).double(), *of_ones(3)),
    "float32 with float64 statistics": lambda: Call(
        running_mean=torch.zeros(3).double(), running_var=torch.ones(3).double()
    ),
    "float32 with float64 weight": lambda: Call(weight=torch.ones(3).double()),
    "float32 with integer weight": lambda: Call(weight=torch.ones(3).long()),
    "running_mean requires grad": lambda: Call(running_mean=requiring_grad(torch.zeros(3))),
    "running_var requires grad": lambda: Call(running_var=requiring_grad(torch.ones(3))),
    "statistics require grad, eval": lambda: Call(
        running_mean=requiring_grad(torch.zeros(3)), training=False
    ),
    "statistics on another device": lambda: Call(running_mean=torch.zeros(3, device="meta")),
    "input on another device": lambda: Call(torch.randn(2, 3, 4, device="meta")),
    "momentum is text": lambda: Call(momentum="much"),
    "momentum is None": lambda: Call(momentum=None),
    "one dimension, with statistics": lambda: Call(torch.randn(5)),
}
if not TAKES_EPS_ZERO:
    SAME_WORDS = {name: make for name, make in SAME_WORDS.items() if not name.startswith("eps")}


@pytest.mark.parametrize("name", SAME_WORDS)
def test_refused_in_stock_words(name: str, device: str) -> None:
    make = SAME_WORDS[name]
    stock = refusals(lambda where: make().on(where).make(F.batch_norm), device)
    ours = caught(lambda: make().on(device).make(fastbn.batch_norm))
    assert described(ours) in stock


SAME_TYPE: dict[str, Callable[[], Call]] = {
    # Stock's words here come out of Python's and torch's internals.
    "eps is text": lambda: Call(eps="little"),
    "one dimension": lambda: Call(torch.randn(5), None, None),
    "sparse": lambda: Call(torch.ones(2, 3, 4).to_sparse()),
}


@pytest.mark.parametrize("name", SAME_TYPE)
def test_refused_with_stock_exception(name: str, device: str) -> None:
    make = SAME_TYPE[name]
    stock = refusals(lambda where: make().on(where).make(F.batch_norm), device)
    ours = caught(lambda: make().on(device).make(fastbn.batch_norm))
    assert type(ours) in [kind for kind, _ in stock]


@pytest.mark.skipif(not TAKES_EPS_ZERO, reason="not in this version of stock")
def test_eval_with_eps_zero_is_legal(device: str) -> None:
    call = Call(training=False, eps=0.0).on(device)
    torch.testing.assert_close(call.make(fastbn.batch_norm), call.make(F.batch_norm))


def test_statistics_may_require_grad_where_gradients_are_off(device: str) -> None:
    call = Call(running_mean=requiring_grad(torch.zeros(3))).on(device)
    other = Call(call.input, running_mean=requiring_grad(torch.zeros(3))).on(device)
    with torch.no_grad():
        torch.testing.assert_close(call.make(fastbn.batch_norm), other.make(F.batch_norm))
    torch.testing.assert_close(call.running_mean, other.running_mean)


def test_nothing_is_touched_by_a_refused_call(device: str) -> None:
    call = Call(weight=torch.ones(4)).on(device)
    caught(lambda: call.make(fastbn.batch_norm))
    assert call.running_mean.tolist() == [0, 0, 0]
    assert call.running_var.tolist() == [1, 1, 1]


DIMENSIONS = [
    ("BatchNorm1d", (4,)),
    ("BatchNorm1d", (2, 4, 3, 3)),
    ("BatchNorm2d", (2, 4, 3)),
    ("BatchNorm2d", (2, 4, 3, 3, 3)),
    ("BatchNorm3d", (2, 4, 3, 3)),
    ("BatchNorm3d", (2, 4)),
]


@pytest.mark.parametrize(("name", "shape"), DIMENSIONS)
@pytest.mark.parametrize("training", [True, False])
def test_module_refuses_other_ranks(
    name: str, shape: tuple[int, ...], training: bool, device: str
) -> None:
    x = torch.randn(shape, device=device)
    stock = caught(lambda: getattr(nn, name)(4, device=device).train(training)(x))
    ours = caught(lambda: getattr(fastbn, name)(4, device=device).train(training)(x))
    assert type(ours) is type(stock) is ValueError
    assert str(ours) == str(stock)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_refused_batches_are_counted_as_stock_counts_them(
    momentum: float | None, device: str
) -> None:
    """Before anything but the rank is looked at."""
    classes = (nn.BatchNorm2d, fastbn.BatchNorm2d)
    modules = [cls(3, momentum=momentum, device=device) for cls in classes]
    refused = [
        (torch.randn(1, 3, 1, 1), ValueError),
        (torch.randn(2, 4, 3, 3), RuntimeError),
        (torch.randn(2, 3, 3), ValueError),
    ]
    for module in modules:
        for x, exception in refused:
            with pytest.raises(exception):
                module(x.to(device))
        module.eps = 0.0
        with pytest.raises(ValueError, match="eps must be positive"):
            module(torch.randn(2, 3, 3, 3, device=device))
    assert [module.get_buffer("num_batches_tracked").item() for module in modules] == [3, 3]


def test_eval_without_statistics_wants_two_values(device: str) -> None:
    x = torch.randn(1, 3, 1, 1, device=device)
    classes = (nn.BatchNorm2d, fastbn.BatchNorm2d)
    modules = [cls(3, track_running_stats=False, device=device).eval() for cls in classes]
    stock, ours = (caught(partial(module, x)) for module in modules)
    assert type(ours) is type(stock)
    assert str(ours) == str(stock)


def test_module_refuses_momentum_that_is_no_number(device: str) -> None:
    x = torch.randn(2, 3, 3, 3, device=device)
    momentum: Any = "much"
    stock = caught(lambda: nn.BatchNorm2d(3, momentum=momentum, device=device)(x))
    ours = caught(lambda: fastbn.BatchNorm2d(3, momentum=momentum, device=device)(x))
    assert described(ours) == described(stock)


BACKWARD_ARGUMENTS = {
    "shape of dy": ({"dy": torch.ones(2, 3, 5)}, "dy has shape"),
    "dtype of dy": ({"dy": torch.ones(2, 3, 4).double()}, "dy is"),
    "device of dy": ({"dy": torch.ones(2, 3, 4, device="meta")}, "not on the expected device"),
    "channels of mean": ({"mean": torch.ones(4)}, "mean should contain 3 elements not 4"),
    "channels of weight": ({"weight": torch.ones(2)}, "weight should contain 3 elements not 2"),
    "dtype of invstd": ({"invstd": torch.ones(3).double()}, "mixed dtype"),
}


@pytest.mark.parametrize("name", BACKWARD_ARGUMENTS)
def test_backward_operator_checks_its_arguments(name: str, device: str) -> None:
    """It can be called by anyone, so a wrong shape must not become a wrong access."""
    change, words = BACKWARD_ARGUMENTS[name]
    good = {
        "dy": torch.ones(2, 3, 4),
        "x": torch.ones(2, 3, 4),
        "weight": torch.ones(3),
        "mean": torch.zeros(3),
        "invstd": torch.ones(3),
    }
    arguments = {key: moved(value, device) for key, value in {**good, **change}.items()}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastbn.batch_norm_backward(
            **arguments,
            training=True,
            want_dx=True,
            want_dweight=True,
            want_dbias=True,
        )


def test_counter_of_another_dtype_is_refused(device: str) -> None:
    x, counter = torch.randn(2, 3, device=device), torch.tensor(0.0, device=device)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        torch.ops.fastbn.batch_norm_training(x, None, None, None, None, counter, 0.1, 1e-5)
