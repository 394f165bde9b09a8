"""Masks: what forward keeps of activation functions that have two slopes, for backward.

They spare backward the residual, and change nothing of what it computes from that.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from fastbn._backend import functions_with_two_slopes
from fastbn.ops import batch_norm_act_backward, batch_norm_act_eval, batch_norm_act_training
from tests.support.case_checks import EPS, MOMENTUM
from tests.support.epilogues import ACTIVATIONS
from tests.support.pairs import pairs
from tests.support.tables import DTYPES, LAYOUTS, Case, Tensors, make
from tests.support.tolerances import accumulate_dtype

# As walks over memory go: blocks of samples, long rows in parts, rows shorter than a vector, few
# channels, whose rows are joined and leave some, many, which are cut, and a matrix.
MASKED = {
    "image": ((3, 5, 8, 12), "contiguous"),
    "long rows": ((2, 2, 72, 72), "contiguous"),
    "short rows": ((4, 6, 2, 4), "contiguous"),
    "channels last": ((2, 72, 5, 5), "channels_last"),
    "joined rows": ((3, 8, 7, 7), "channels_last"),
    "few elements": ((3, 8, 3, 3), "channels_last"),
    "many channels": ((3, 4104), "contiguous"),
    "matrix": ((5, 16), "contiguous"),
}
# Written past the cache.
STREAMED = {
    "streamed rows": ((8, 32, 184, 182), "contiguous"),
    "streamed channels": ((10, 1024, 29, 29), "channels_last"),
}
TWO_SLOPES = ("relu", "relu6", "leaky_relu")
# Kinks, what becomes zero in few bits, and what is no number.
SPECIAL = (0.0, -0.0, 6.0, 1e-45, -1e-45, float("inf"), -float("inf"), float("nan"))


def tensors_for(name: str, dtype: torch.dtype, device: str) -> tuple[Tensors, torch.Tensor]:
    """And a residual with special values."""
    shape, layout = {**MASKED, **STREAMED}[name]
    torch.manual_seed(3)
    tensors = make(Case(name, shape, layout, dtype), device)
    residual = 3 * torch.randn(shape)
    strewn = residual.view(-1)[::10]
    strewn.copy_(torch.tensor(SPECIAL).repeat(strewn.numel())[: strewn.numel()])
    return tensors, LAYOUTS[layout](residual.to(device, dtype))


def forward(
    tensors: Tensors,
    residual: torch.Tensor | None,
    training: bool,
    function: str,
    *,
    wanted: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Y, the saved statistics and the mask."""
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    activation = ACTIVATIONS[function]
    if not training:
        return batch_norm_act_eval(tensors.x, residual, *vectors, EPS, wanted, *activation)
    return batch_norm_act_training(
        tensors.x, residual, *vectors, None, MOMENTUM, EPS, *activation, wanted
    )


def backward(
    tensors: Tensors,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """By a mask without bias, which it does not need."""
    bias = tensors.bias if mask is None else None
    return batch_norm_act_backward(
        tensors.dy, tensors.x, residual, mask, tensors.weight, bias, *saved, *rest
    )


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """To the number; zero has no sign."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_which_functions_have_two_slopes() -> None:
    assert set(functions_with_two_slopes) == set(TWO_SLOPES)


@pytest.mark.parametrize(
    ("name", "dtype", "function", "training"),
    pairs(MASKED, DTYPES, TWO_SLOPES, (True, False))
    + [(name, torch.bfloat16, "relu6", False) for name in STREAMED],
    ids=str,
)
def test_gradients_are_those_of_the_residual(
    name: str, dtype: torch.dtype, function: str, training: bool
) -> None:
    """On a CPU: a GPU may sum up in another order where less is read."""
    tensors, residual = tensors_for(name, dtype, "cpu")
    y, mean, invstd, mask = forward(tensors, residual, training, function)
    assert mask.dtype == torch.uint8
    assert mask.numel() == tensors.x.numel() * tensors.x.element_size() // 16
    assert_same((y,), forward(tensors, residual, training, function, wanted=False)[:1])
    for wanted in product([True, False], repeat=2):
        rest = (training, *ACTIVATIONS[function], *wanted, True, True)
        dx, *others = backward(tensors, None, mask, (mean, invstd), *rest)
        expected, *expected_others = backward(tensors, residual, None, (mean, invstd), *rest)
        assert_same(tuple(others), tuple(expected_others))
        if training and function == "relu" and wanted == (True, False):
            # Without a mask, its second pass does not find dz in memory, and adds in another order.
            rounding = 16 * torch.finfo(accumulate_dtype(dtype)).eps
            rtol = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(dx, expected, rtol=rtol, atol=rounding, equal_nan=True)
        else:
            assert_same((dx,), (expected,))


@pytest.mark.parametrize("function", TWO_SLOPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_slopes_of_the_rounded_sum(dtype: torch.dtype, function: str, device: str) -> None:
    """As PyTorch's own backward has them, bit by bit in the order of memory."""
    tensors, residual = tensors_for("channels last", dtype, device)
    for vector, value in ((tensors.running_mean, 0), (tensors.running_var, 1)):
        vector.fill_(value)
    tensors.weight.fill_(0)
    tensors.bias.fill_(0)
    *_, mask = forward(tensors, residual, False, function)
    z = residual.detach().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[function](z), z, torch.ones_like(z))
    together = 16 // dtype.itemsize
    bits = mask.unsqueeze(1) >> torch.arange(together, device=device) & 1
    assert int(mask.max()) < 1 << together
    in_memory = (slope == 1).permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(bits.bool().reshape(-1), in_memory)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_memory_that_no_vector_begins_with(training: bool, device: str) -> None:
    """Of any of the tensors, which are copied."""
    tensors, residual = tensors_for("image", torch.bfloat16, device)
    elsewhere = LAYOUTS["offset"]
    moved = replace(tensors, x=elsewhere(tensors.x), dy=elsewhere(tensors.dy))
    results = []
    for given, added in ((tensors, residual), (moved, elsewhere(residual))):
        y, mean, invstd, mask = forward(given, added, training, "relu")
        rest = (training, *ACTIVATIONS["relu"], True, True, True, True)
        results.append((y, *backward(given, None, mask, (mean, invstd), *rest)))
    assert_same(*results)


WITHOUT = [
    ("no whole vectors in a row", (2, 3, 7, 7), "contiguous", "relu"),
    ("no whole vectors of channels", (2, 12, 4, 4), "channels_last", "relu"),
    ("any strides", (2, 8, 4, 4), "batch_minor", "relu"),
    ("more than two slopes", (2, 8, 4, 4), "contiguous", "silu"),
    ("one slope", (2, 8, 4, 4), "contiguous", "identity"),
    ("no elements", (0, 8, 4, 4), "contiguous", "relu"),
]


@pytest.mark.parametrize(
    ("shape", "layout", "function"), [w[1:] for w in WITHOUT], ids=[w[0] for w in WITHOUT]
)
def test_where_there_is_none(
    shape: tuple[int, ...], layout: str, function: str, device: str
) -> None:
    tensors = make(Case("none", shape, layout, torch.bfloat16), device)
    residual = LAYOUTS[layout](torch.zeros(shape, device=device, dtype=torch.bfloat16))
    for training in (True, False):
        assert forward(tensors, residual, training, function)[3].numel() == 0


def test_none_unless_wanted_or_without_a_residual(device: str) -> None:
    tensors, residual = tensors_for("image", torch.float32, device)
    for training in (True, False):
        assert forward(tensors, residual, training, "relu", wanted=False)[3].numel() == 0
        assert forward(tensors, None, training, "relu")[3].numel() == 0


@pytest.mark.parametrize("wrong", ["length", "dtype", "both", "function"])
def test_masks_that_forward_did_not_return_are_refused(wrong: str, device: str) -> None:
    tensors, residual = tensors_for("image", torch.float32, device)
    _, mean, invstd, mask = forward(tensors, residual, True, "relu")
    given = {"length": mask[1:], "dtype": mask.char()}.get(wrong, mask)
    function = "silu" if wrong == "function" else "relu"
    rest = (True, *ACTIVATIONS[function], True, True, True, True)
    with pytest.raises(RuntimeError, match="mask must be what forward returned"):
        backward(tensors, residual if wrong == "both" else None, given, (mean, invstd), *rest)
