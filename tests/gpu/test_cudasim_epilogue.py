"""Kernels with an activation and a residual behind batch norm, on the simulated GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests import cudasim
from tests.cudasim import Epilogue, Scale
from tests.cudasim.__main__ import outcome_of
from tests.cudasim.verify import (
    FUNCTIONS,
    Verdict,
    epilogue_for,
    verify_act_backward,
    verify_forward,
)
from tests.gpu.test_cudasim import assert_right
from tests.support import tables
from tests.support.pairs import pairs

SMALL = Scale(multiprocessors=8, shared_bytes=48 << 10)
OPS = ("forward", "eval", "backward", "eval backward")
PERSISTENT = ("persistent_block", "persistent_cluster", "persistent_grid")


def run(
    op: str,
    case: tables.Case,
    activation: str,
    residual: bool,
    want: tuple[bool, bool, bool, bool] | None = None,
    **options: Any,
) -> Verdict:
    tensors = tables.make(case)
    epilogue = epilogue_for(tensors.x, activation, residual)
    options = {"training": not op.startswith("eval"), "seeds": range(2), **options}
    if op.endswith("backward"):
        return verify_act_backward(tensors, epilogue, want=want, **options)
    return verify_forward(tensors, epilogue=epilogue, **options)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("op", OPS)
def test_functions(op: str, activation: str) -> None:
    """Each of them, by its values and derivatives in float64."""
    case = tables.Case("functions", (3, 4, 5, 8), "contiguous", torch.float32)
    assert_right(run(op, case, activation, residual=activation == "identity"))


# By the mapping that they are for.
INPUTS = {
    "contiguous": ((6, 24, 8, 12), "contiguous"),
    "small channels": ((8, 64, 7, 7), "contiguous"),
    "channels last": ((6, 72, 9, 9), "channels_last"),
    "folded": ((4, 5, 16, 16), "channels_last"),
    "channels last, last tile narrow": ((4, 44, 7, 7), "channels_last"),
}
# Those that have masks.
MASKED = ("contiguous", "channels last", "channels last, last tile narrow")


def fits(op: str, algorithm: str, name: str, dtype: torch.dtype, _: str, residual: bool) -> bool:
    """Whether there is such a plan.

    With given statistics there is one pass, and no choice. Three tensors of narrow channel tiles
    are more than one block has room for.
    """
    if algorithm == "two_pass":
        return True
    narrow = dtype == torch.bfloat16 and name in ("folded", "channels last, last tile narrow")
    many = op == "backward" and residual and narrow and algorithm == "persistent_block"
    return not op.startswith("eval") and not many


@pytest.mark.parametrize(
    ("op", "algorithm", "name", "dtype", "activation", "residual"),
    pairs(
        OPS,
        ("two_pass", *PERSISTENT),
        INPUTS,
        (torch.float32, torch.bfloat16),
        ("relu", "silu"),
        (False, True),
        where=fits,
    ),
    ids=str,
)
def test_results(
    op: str, algorithm: str, name: str, dtype: torch.dtype, activation: str, residual: bool
) -> None:
    case = tables.Case("epilogue", *INPUTS[name], dtype)
    verdict = run(op, case, activation, residual, algorithm=algorithm, scale=SMALL)
    assert_right(verdict)
    assert op.startswith("eval") or verdict.report.algorithm == algorithm
    # Vectors of 16 bytes, by threads or by the copy engine; and what eval saves besides.
    saves_mask = op == "eval" and residual and activation == "relu" and name in MASKED
    assert set(verdict.report.activations["stores"]) <= {"16", *["1"] * saves_mask}


def has_mask(op: str, algorithm: str, name: str, dtype: torch.dtype, activation: str) -> bool:
    """Whether there are a mask and a plan, as two of these inputs are not for all dtypes."""
    narrow = name == "channels last, last tile narrow"
    return fits(op, algorithm, name, dtype, activation, False) and (
        not narrow or dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("op", "algorithm", "name", "dtype", "activation"),
    pairs(
        OPS,
        ("two_pass", *PERSISTENT),
        MASKED,
        (torch.float32, torch.bfloat16),
        ("relu", "relu6", "leaky_relu"),
        where=has_mask,
    ),
    ids=str,
)
def test_results_with_masks(
    op: str, algorithm: str, name: str, dtype: torch.dtype, activation: str
) -> None:
    """Whoever writes a vector writes a byte of its own."""
    case = tables.Case("masked", *INPUTS[name], dtype)
    verdict = run(op, case, activation, residual=True, mask=True, algorithm=algorithm, scale=SMALL)
    assert_right(verdict)
    assert op.startswith("eval") or verdict.report.algorithm == algorithm
    sizes = {"16"} if op.endswith("backward") else {"16", "1"}
    assert set(verdict.report.activations["stores"]) <= sizes
    moved_as_planned(verdict, read_besides=None if op == "forward" else 0)


@pytest.mark.parametrize("dtype", tables.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_bits_are_the_slopes_that_backward_computes(activation: str, dtype: torch.dtype) -> None:
    """And the residual's gradient is the same by either, to the bit."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 4, 4).to(dtype)
    residual = torch.randn_like(x)
    residual.view(-1)[::7] = torch.tensor(SPECIAL).to(dtype).repeat(10)[:147]
    epilogue = Epilogue(activation, FUNCTIONS[activation][0], residual)
    results, _ = cudasim.forward(x, epilogue=epilogue, want_mask=True, algorithm="two_pass")
    (plain, *_), _ = cudasim.forward(x, epilogue=epilogue, algorithm="two_pass")
    y, mean, invstd, mask = results
    torch.testing.assert_close(y, plain, rtol=0, atol=0, equal_nan=True)
    by_mask = replace(epilogue, residual=None, mask=mask)
    for dy in (torch.ones_like(x), torch.randn_like(x)):
        (_, expected, *_), _ = cudasim.act_backward(
            dy, x, None, None, mean, invstd, epilogue, algorithm="two_pass"
        )
        for algorithm in ("two_pass", "persistent_block"):
            (_, found, *_), _ = cudasim.act_backward(
                dy, x, None, None, mean, invstd, by_mask, algorithm=algorithm
            )
            assert torch.equal(found, expected)
        if bool((dy == 1).all()):
            together = 16 // x.element_size()
            bits = mask.unsqueeze(1) >> torch.arange(together) & 1
            assert torch.equal(bits.reshape(x.shape) == 1, expected == 1)


RAGGED = {
    "segments of no whole vectors": ((2, 3, 7, 9), "contiguous"),
    "unaligned": ((3, 5, 4, 8), "offset"),
    "rows of no whole vectors": ((5, 7), "contiguous"),
    "unaligned rows": ((4, 16, 3, 5), "channels_last_offset"),
    "strides": ((4, 6, 5, 3), "batch_minor"),
    "steps": ((3, 4, 5, 6), "stepped"),
}


@pytest.mark.parametrize(
    ("op", "name", "dtype", "activation", "residual"),
    pairs(OPS, RAGGED, tables.DTYPES, ("relu", "silu"), (False, True)),
    ids=str,
)
def test_ragged_shapes_and_strides(
    op: str, name: str, dtype: torch.dtype, activation: str, residual: bool
) -> None:
    case = tables.Case("ragged", *RAGGED[name], dtype)
    assert_right(run(op, case, activation, residual, algorithm="two_pass"))


def test_a_channel_far_from_zero_does_not_reach_its_neighbor() -> None:
    """Elements of other channels in a vector count as nothing, even if they have no derivative."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7, 9).half()
    x[:, 1] += 100
    epilogue = Epilogue("silu")
    weight = torch.tensor([1.0, 2000.0, 1.0])
    (_, mean, invstd), _ = cudasim.forward(x, weight, epilogue=epilogue)
    dy = torch.ones_like(x)
    gradients, _ = cudasim.act_backward(
        dy, x, weight, None, mean, invstd, epilogue, want=(True, False, True, True)
    )
    assert bool(gradients[2].isfinite().all())
    assert bool(gradients[3].isfinite().all())


# --- What is wanted, and what it costs ------------------------------------------------------------


def moved_as_planned(verdict: Verdict, read_besides: int | None = 0) -> tuple[int, int]:
    """Bytes of activations that were read and written, by the plan's count and the simulator's.

    Args:
        verdict: right.
        read_besides: bytes that the plan does not count; None for the first element of each
            channel and block, to count means from.
    """
    assert_right(verdict)
    moved, planned = verdict.report.activations, verdict.report.planned
    besides = moved["read_bytes"] - planned["read_bytes"]
    assert besides == read_besides if read_besides is not None else besides >= 0
    assert moved["written_bytes"] == planned["written_bytes"]
    return planned["read_bytes"], planned["written_bytes"]


def expected_traffic(
    op: str, residual: bool, want: tuple[bool, ...], mask: float = 0
) -> tuple[float, float]:
    """Passes over activations that are read and written, where none stays on chip.

    A mask is a share of an activation, and backward takes it instead of the residual.
    """
    if op == "eval":
        return 1 + residual, 1 + mask
    if op == "forward":
        return 2 + residual, 1 + mask
    if not any(want):
        return 0, 0
    inputs = 2 + (mask if mask > 0 else residual)
    dx, dresidual, *_ = want
    again = (2 if dresidual else inputs) if dx and not op.startswith("eval") else 0
    return inputs + again, dx + dresidual


@pytest.mark.parametrize("op", ["backward", "eval backward"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_wanted(op: str, activation: str, residual: bool) -> None:
    """With a mask where there can be one."""
    case = tables.Case("wanted", (4, 8, 6, 8), "contiguous", torch.float32)
    size = torch.Size(case.shape).numel() * case.dtype.itemsize
    for dx, dresidual, dweight, dbias in product((False, True), repeat=4):
        if dresidual and not residual:
            continue
        want = (dx, dresidual, dweight, dbias)
        options: dict[str, Any] = {"mask": residual and activation == "relu", "seeds": range(1)}
        verdict = run(op, case, activation, residual, want, algorithm="two_pass", **options)
        reads, writes = expected_traffic(op, residual, want, options["mask"] / 16)
        assert moved_as_planned(verdict) == (reads * size, writes * size), want


def test_gradient_of_a_residual_alone_needs_no_residual() -> None:
    """Without an activation it is dy, whatever was added."""
    case = tables.Case("sum", (4, 8, 6, 8), "contiguous", torch.bfloat16)
    verdict = run("backward", case, "identity", residual=True, algorithm="two_pass")
    size = torch.Size(case.shape).numel() * case.dtype.itemsize
    assert moved_as_planned(verdict) == (4 * size, 2 * size)


FITTING = [
    ("persistent_block", "contiguous", "8,64,28,28"),
    ("persistent_block", "channels_last", "4,256,14,14"),
    ("persistent_cluster", "contiguous", "8,32,56,56"),
    ("persistent_cluster", "channels_last", "16,128,14,14"),
    ("persistent_grid", "contiguous", "8,32,56,56"),
    ("persistent_grid", "channels_last", "16,64,28,28"),
    ("two_pass", "contiguous", "8,32,28,28"),
    ("two_pass", "channels_last", "8,32,28,28"),
]


@pytest.mark.parametrize(
    ("op", "input_", "activation", "residual"),
    pairs(("forward", "eval", "backward"), FITTING, ("relu", "silu"), (False, True)),
    ids=str,
)
def test_traffic(op: str, input_: tuple[str, str, str], activation: str, residual: bool) -> None:
    """Exactly what is read and written once each where tensors stay on chip.

    ReLU of a sum has a mask, which is a bit of each element.
    """
    algorithm, layout, shape = input_
    itemsize = 2
    mask = 1 / 8 / itemsize if residual and activation == "relu" else 0
    options = ["--op", op, "--shape", shape, "--layout", layout, "--seeds", "1"]
    options += ["--activation", activation, *(["--residual"] if residual else [])]
    options += ["--mask"] if mask else []
    if algorithm == "persistent_grid":
        options += ["--multiprocessors", "16"]
    outcome = outcome_of([*options, "--algorithm", algorithm])
    assert not outcome["failures"]
    reads, writes = expected_traffic(op, residual, (True, residual, True, True), mask)
    if outcome["algorithm"].startswith("persistent"):
        reads = {"forward": 1 + residual, "backward": 2 + (mask or residual)}[op]
    if op != "eval":
        assert outcome["algorithm"] == algorithm
    assert outcome["activation_write_bytes_per_element"] == writes * itemsize
    # Each channel's first element is read once more per block, to count means from.
    read = outcome["activation_read_bytes_per_element"]
    assert reads * itemsize <= read <= 1.01 * reads * itemsize
    if op == "backward" or algorithm != "two_pass":
        assert read == reads * itemsize


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("added", ["alone", "residual", "mask"])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_what_does_not_fit_is_read_twice(op: str, added: str, layout: str) -> None:
    """X alone in forward, and x and the gradient of the pre-activation in backward.

    The latter waits in the place of dx where it is not written anyway. Masks are read once.
    """
    residual, mask = added != "alone", 1 / 16 if added == "mask" else 0
    shape = (48, 8, 64, 64) if layout == "contiguous" else (12, 64, 32, 32)
    case = tables.Case("large", shape, layout, torch.bfloat16)
    scale = Scale(multiprocessors=8, shared_bytes=80 << 10)
    options: dict[str, Any] = {"algorithm": "persistent_grid", "scale": scale}
    function = "relu" if mask else "silu"
    verdict = run(op, case, function, residual, mask=mask > 0, seeds=range(1), **options)
    read, written = moved_as_planned(verdict)
    size = torch.Size(shape).numel() * case.dtype.itemsize
    inputs, again = (1 + residual, 1) if op == "forward" else (2 + (mask or residual), 2)
    beyond = (read - inputs * size) / again
    assert 0 < beyond < size
    writes = 1 + residual if op == "backward" else 1 + mask
    waiting = beyond if op == "backward" and not residual else 0
    assert written == writes * size + waiting


def test_one_block_has_none() -> None:
    """And says so where it is forced."""
    x = torch.randn(4, 8, 6, 6)
    with pytest.raises(ValueError, match="with nothing behind it; choose auto or two_pass"):
        cudasim.forward(x, epilogue=Epilogue("relu"), algorithm="one_block")


# --- The pre-activation ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["two_pass", *PERSISTENT])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_finds_the_pre_activation_of_forward(algorithm: str, layout: str) -> None:
    """What ReLU let through has a gradient, and nothing else, to the last element.

    The mean is far from zero, and what float32 cannot hold of it moves many over the kink.
    """
    torch.manual_seed(0)
    x = tables.LAYOUTS[layout](torch.randn(6, 32, 8, 8) + 3e4)
    weight, bias = torch.randn(32), torch.randn(32) / 100
    residual = torch.randn(x.shape) / 100
    epilogue = Epilogue("relu", residual=residual)
    options: dict[str, Any] = {"algorithm": algorithm, "scale": SMALL}
    (y, mean, invstd), _ = cudasim.forward(x, weight, bias, epilogue=epilogue, **options)
    assert mean.dtype == invstd.dtype == torch.float64
    dy = torch.ones(x.shape)
    gradients, _ = cudasim.act_backward(dy, x, weight, bias, mean, invstd, epilogue, **options)
    assert torch.equal(gradients[1], (y > 0).float())


@pytest.mark.parametrize(
    ("op", "algorithm", "name", "dtype", "activation", "residual"),
    pairs(
        ("forward", "eval"),
        ("two_pass", *PERSISTENT),
        INPUTS,
        (torch.float32, torch.bfloat16),
        FUNCTIONS,
        (False, True),
        where=fits,
    ),
    ids=str,
)
def test_apply_computes_the_same_bits(
    op: str, algorithm: str, name: str, dtype: torch.dtype, activation: str, residual: bool
) -> None:
    """Whichever algorithm computed them first."""
    tensors = tables.make(tables.Case("apply", *INPUTS[name], dtype))
    epilogue = epilogue_for(tensors.x, activation, residual)
    training = op == "forward"
    parameters = (tensors.weight, tensors.bias)
    (y, mean, invstd), _ = cudasim.forward(
        tensors.x,
        *parameters,
        tensors.running_mean,
        tensors.running_var,
        epilogue=epilogue,
        training=training,
        algorithm=algorithm,
        scale=SMALL,
    )
    again, report = cudasim.act_apply(
        tensors.x, *parameters, mean, invstd, epilogue, training=training, scale=SMALL
    )
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(again.view(bits), y.view(bits))
    assert len(report.launches) == 1
    size = y.nbytes
    assert report.activations["read_bytes"] == (1 + residual) * size
    assert report.activations["written_bytes"] == size


# Of float16: zeros, what becomes zero when it is scaled, kinks, and what is no number.
SPECIAL = [0.0, -0.0, 6e-8, -6e-8, 6e-5, -6e-5, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0]
SPECIAL += [float("inf"), -float("inf"), float("nan"), 65504.0]
# What they differ from zero or one by is exact.
PIECEWISE = ("identity", "relu", "relu6")


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_derivatives_at_special_values(activation: str, scale: float) -> None:
    """Those of PyTorch's own backward at the pre-activation in its dtype."""
    x = torch.tensor(SPECIAL, dtype=torch.float16).reshape(1, 1, 4, 4)
    mean, invstd = torch.zeros(1, dtype=torch.float64), torch.full((1,), scale).double()
    parameter, function = FUNCTIONS[activation]
    residual = torch.full_like(x, -0.0)
    gradients, _ = cudasim.act_backward(
        torch.ones_like(x),
        x,
        None,
        None,
        mean,
        invstd,
        Epilogue(activation, parameter, residual),
        training=False,
        want=(False, True, False, False),
        algorithm="two_pass",
    )
    held = (x.float() * torch.tensor(scale)).half()
    z = held.float().requires_grad_()
    (derivative,) = torch.autograd.grad(function(z).sum(), z)
    # At infinities and NaN several paths of PyTorch's differ among each other.
    finite = held.isfinite()
    found = gradients[1].float()
    tolerance = 0.0 if activation in PIECEWISE else 2 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(
        found[finite], derivative[finite], rtol=tolerance, atol=tolerance / 8
    )
