"""NaNs of any bits in vectors come out as NaN, and what overflows becomes infinite."""

from __future__ import annotations

import pytest
import torch

import fastbn

# Contiguous, channels last, and contiguous with segments shorter than a vector.
INPUTS = {
    "contiguous": (3, 4, 9, 11),
    "matrix": (300, 70),
    "short segments": (3, 4, 2, 2),
}
# A quiet NaN with all bits set: rounding one carelessly to bfloat16 carries into the sign.
FULL_NAN = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
each_input = pytest.mark.parametrize("shape", INPUTS.values(), ids=list(INPUTS))


def finite_channels(y: torch.Tensor) -> list[bool]:
    """Whether all elements of each channel are finite; none or all of a channel's are NaN."""
    channels = y.movedim(1, 0).flatten(1)
    nan = channels.isnan()
    assert torch.equal(nan.any(1), nan.all(1))
    return [not bool(value) for value in nan.any(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("where", "training"),
    # Running statistics are not read in training.
    [("weight", True), ("weight", False), ("bias", True), ("bias", False), ("running_mean", False)],
)
@each_input
def test_nan_of_any_bits_stays_nan(
    shape: tuple[int, ...], where: str, training: bool, dtype: torch.dtype, device: str
) -> None:
    """Diverged checkpoints carry such values; a finite result would hide that."""
    channels = shape[1]
    vectors = {
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "weight": torch.ones(channels),
        "bias": torch.zeros(channels),
    }
    vectors[where][1] = FULL_NAN[0]
    vectors = {name: vector.to(device) for name, vector in vectors.items()}
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    running = (vectors["running_mean"], vectors["running_var"])
    y = fastbn.batch_norm(x, *running, vectors["weight"], vectors["bias"], training)
    assert finite_channels(y) == [channel != 1 for channel in range(channels)]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert finite_channels(dx) == [where != "weight" or channel != 1 for channel in range(channels)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_beyond_the_range_of_16_bits_become_infinite(
    dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(3, 4, 9, 11).to(device, dtype)
    weight = torch.full((4,), torch.finfo(torch.float32).max / 8, device=device)
    y = fastbn.batch_norm(x, None, None, weight, training=True)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, weight.double(), training=True)
    beyond = exact.abs() > torch.finfo(dtype).max
    if dtype == torch.float16:
        assert beyond.float().mean() > 0.99
    assert torch.equal(y.isinf(), beyond)
    assert torch.equal(y[beyond].sign().double(), exact[beyond].sign())
