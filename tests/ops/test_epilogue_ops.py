"""The operators with an epilogue: what they return and refuse, and that tracing may trust them."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch

from fastbn.ops import (
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_eval,
    batch_norm_act_training,
)
from tests.support.case_checks import EPS, MOMENTUM, statistics_of
from tests.support.epilogues import ACTIVATIONS, with_epilogue
from tests.support.pairs import EXHAUSTIVE, pairs
from tests.support.tables import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    SHARED,
    STREAMED,
    Case,
    lies,
    make,
    streamed_case,
)
from tests.support.tolerances import assert_near

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WANTED = [wanted for wanted in product([True, False], repeat=4) if any(wanted)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("function", ["relu", "silu"])
def test_backward_computes_what_is_wanted(
    function: str, layout: str, training: bool, device: str
) -> None:
    """Any of the four gradients, whatever others are: ReLU's and others' ways to them differ."""
    case = Case("image-49", SHAPES["image-49"], layout, torch.float64)
    tensors, activation = make(case, device), ACTIVATIONS[function]
    residual = LAYOUTS[layout](torch.randn(case.shape, dtype=torch.float64).to(device))
    statistics = statistics_of(tensors, training)
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    if training:
        saved = batch_norm_act_training(
            tensors.x, residual, *vectors, None, MOMENTUM, EPS, *activation, False
        )[1:3]
    else:
        saved = batch_norm_act_eval(tensors.x, residual, *vectors, EPS, True, *activation)[1:3]
    assert [statistic.dtype for statistic in saved] == [torch.float64] * 2
    exact = with_epilogue(tensors, residual, activation, statistics, training)
    for wanted in WANTED:
        results = batch_norm_act_backward(
            exact.dy,
            tensors.x,
            residual,
            None,
            tensors.weight,
            tensors.bias,
            *saved,
            training,
            *activation,
            *wanted,
        )
        names = ("dx", "dresidual", "dweight", "dbias")
        for name, result, want in zip(names, results, wanted, strict=True):
            if want:
                assert_near(result, exact.expected[name], name)
            else:
                assert result.numel() == 0


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Signs of zeros included, and where elements lie."""
    assert found.stride() == expected.stride()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.dtype.itemsize]
    assert torch.equal(found.view(integers), expected.view(integers))


def assert_applied(case: Case, function: str, added: bool, training: bool, device: str) -> None:
    """Forward's y, computed again from the statistics that forward returned."""
    tensors, activation = make(case, device), ACTIVATIONS[function]
    residual = tensors.dy if added else None
    parameters = (tensors.weight, tensors.bias)
    vectors = (*parameters, tensors.running_mean, tensors.running_var)
    if training:
        results = batch_norm_act_training(
            tensors.x, residual, *vectors, None, MOMENTUM, EPS, *activation, False
        )
    else:
        results = batch_norm_act_eval(tensors.x, residual, *vectors, EPS, True, *activation)
    y, mean, invstd, _ = results
    again = batch_norm_act_apply(
        tensors.x, residual, *parameters, mean, invstd, training, *activation
    )
    assert_same_bits(again, y)


# Means that the dtype of sums does not hold, where a batch has them.
FAR = {torch.float32: "far", torch.float16: "top"}


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "function", "added", "training"),
    pairs(
        {**SHAPES, **SHARED},
        LAYOUTS,
        DTYPES,
        ("relu", "silu"),
        (False, True),
        (False, True),
        where=lambda name, layout, *_: lies(name, layout),
    ),
    ids=str,
)
def test_apply_computes_the_same_bits(
    name: str,
    layout: str,
    dtype: torch.dtype,
    function: str,
    added: bool,
    training: bool,
    device: str,
) -> None:
    """Whatever the walk through memory, of which training has another."""
    case = Case(name, {**SHAPES, **SHARED}[name], layout, dtype, FAR.get(dtype, "normal"))
    assert_applied(case, function, added, training, device)


@pytest.mark.parametrize(
    ("function", "dtype", "layout", "added", "training"),
    pairs(ACTIVATIONS, DTYPES, ("contiguous", "channels_last"), (False, True), (False, True)),
    ids=str,
)
def test_apply_computes_the_same_bits_of_each_function(
    function: str, dtype: torch.dtype, layout: str, added: bool, training: bool, device: str
) -> None:
    case = Case("image-odd", SHAPES["image-odd"], layout, dtype)
    assert_applied(case, function, added, training, device)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=EXHAUSTIVE)])
@pytest.mark.parametrize(("name", "layout"), STREAMED)
def test_apply_computes_the_same_bits_past_the_cache(
    name: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    assert_applied(streamed_case(name, layout, dtype), "silu", True, True, device)


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_apply_of_given_statistics_keeps_signs_and_infinities(weight: float, device: str) -> None:
    """A shift is the bias itself, whatever the scale is: negative, or infinite."""
    x = torch.tensor([[1.0, 2.0, 3.0]], device=device).repeat(4, 1)
    weights, biases, means, variances = (
        torch.full((3,), value, device=device) for value in (weight, -0.0, 2.0, 0.0)
    )
    for eps in (0.0, 1.0):
        y, mean, invstd, _ = batch_norm_act_eval(
            x, None, weights, biases, means, variances, eps, True, "identity", 0.0
        )
        again = batch_norm_act_apply(x, None, weights, biases, mean, invstd, False, "identity", 0.0)
        assert_same_bits(again, y)


SAMPLES = [
    *(
        Case("image-49", SHAPES["image-49"], layout, torch.float32)
        for layout in ("contiguous", "channels_last", "stepped")
    ),
    Case("matrix", SHAPES["matrix"], "contiguous", torch.float64),
    Case("masked", (2, 8, 4, 4), "contiguous", torch.bfloat16),
    Case("masked", (2, 8, 3, 3), "channels_last", torch.float32),
    Case("volume", SHAPES["volume"], "channels_last", torch.bfloat16),
    Case("empty", (0, 3, 4, 4), "contiguous", torch.float32),
]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    tensors = make(case, device)
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    counter = torch.tensor(3, device=device)
    saved = torch.rand(2, case.shape[1], dtype=torch.float64, device=device).unbind()
    train, evaluate, apply, backward = (
        getattr(torch.ops.fastbn, f"batch_norm_act_{name}").default
        for name in ("training", "eval", "apply", "backward")
    )
    parameters = (tensors.weight, tensors.bias)
    leaky = ("leaky_relu", 0.1)
    for residual, activation in ((tensors.dy, ("silu", 0.0)), (tensors.dy, leaky), (None, leaky)):
        given = (tensors.x, residual)
        behind = (*activation, True)
        torch.library.opcheck(train, (*given, *vectors, counter, MOMENTUM, EPS, *behind))
        torch.library.opcheck(train, (*given, *[None] * 5, None, EPS, *behind))
        for save in (True, False):
            torch.library.opcheck(evaluate, (*given, *vectors, EPS, save, *activation))
        for training in (True, False):
            torch.library.opcheck(apply, (*given, *parameters, *saved, training, *activation))
        for training, wanted in ((True, (True, True, True, True)), (False, (True, False) * 2)):
            rest = (*saved, training, *activation, *wanted)
            torch.library.opcheck(backward, (tensors.dy, *given, None, *parameters, *rest))
            mask = evaluate(*given, *vectors, EPS, True, *activation)[3]
            if mask.numel() > 0:
                torch.library.opcheck(
                    backward, (tensors.dy, tensors.x, None, mask, None, None, *rest)
                )


X = torch.zeros(2, 3, 4, 4)
REFUSED: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
    (
        lambda: X[:, :1],
        RuntimeError,
        "residual has shape [2, 1, 4, 4] and x has shape [2, 3, 4, 4]; they must be the same",
    ),
    (lambda: X.double(), RuntimeError, "residual is Double and x is Float; they must be the same"),
    (lambda: X.to("meta"), RuntimeError, "Tensor on device meta is not on the expected device"),
]


@pytest.mark.parametrize(
    ("residual", "error", "message"), REFUSED, ids=["shape", "dtype", "device"]
)
def test_residuals_that_are_not_like_x_are_refused(
    residual: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    rest = (None, None, None, None, None, MOMENTUM, EPS)
    with pytest.raises(error, match=r"residual|meta") as caught:
        torch.ops.fastbn.batch_norm_act_training.default(X, residual(), *rest, "relu", 0.0, False)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("rounded", ["mean", "invstd"])
def test_statistics_that_are_rounded_are_refused(rounded: str) -> None:
    """From others than forward returned nothing comes out the same."""
    mean, invstd = (
        torch.ones(3, dtype=torch.float32 if name == rounded else torch.float64)
        for name in ("mean", "invstd")
    )
    with pytest.raises(RuntimeError, match=f"^{rounded} must be float64, but got Float"):
        batch_norm_act_apply(X, None, None, None, mean, invstd, True, "relu", 0.0)


def test_unknown_functions_are_refused() -> None:
    for x in (X, X.to("meta")):
        with pytest.raises(ValueError, match=r"^no activation function is called 'swoosh'$"):
            batch_norm_act_training(
                x, None, None, None, None, None, None, MOMENTUM, EPS, "swoosh", 0.0, False
            )
