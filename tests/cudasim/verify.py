"""One operation on the simulated GPU, under several schedules, judged by the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbn.ops import batch_norm_act_eval, batch_norm_act_training
from tests.support import oracle, step_checks
from tests.support.oracle import Expected
from tests.support.tolerances import ARITHMETIC, HELD, accumulate_dtype, assert_near

from . import (
    WHOLE,
    Epilogue,
    Report,
    Scale,
    act_backward,
    backward,
    backward_combine_apply,
    backward_reduce,
    combine_apply,
    forward,
    stats,
)

if TYPE_CHECKING:
    from tests.support.tables import Tensors

EPS = 1e-5
MOMENTUM = 0.1

# Of processes in a batch, for the steps apart.
SHARES = (1, 0, 5, 2)

Results = dict[str, "Tensor"]


@dataclass(frozen=True)
class Verdict:
    """What came of an operation.

    Attributes:
        report: of the first schedule.
        schedules_differ: number of schedules whose results are not bitwise those of the first.
        max_error: largest error of an activation against float64.
        max_error_in_resolutions: the same in units of the resolution of its dtype, of the size of
            the terms that the channel's values are put together from.
        wrong: of each result that errs by more than the table of tolerances allows, by how much.
    """

    report: Report
    schedules_differ: int
    max_error: float
    max_error_in_resolutions: float
    wrong: list[str]


def _bits(tensor: Tensor) -> Tensor:
    """What must not depend on the schedule, NaNs included."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


# The row of the table of tolerances for a result that has none of its own: like dx it is a product
# that was rounded to the dtype of activations.
QUANTITIES = {"dresidual": "dx"}

# PyTorch's function and the parameter it is tried with, by the names of operators.
FUNCTIONS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "identity": (0.0, torch.clone),
    "relu": (0.0, F.relu),
    "relu6": (0.0, F.relu6),
    "leaky_relu": (0.1, partial(F.leaky_relu, negative_slope=0.1)),
    "elu": (0.7, partial(F.elu, alpha=0.7)),
    "silu": (0.0, F.silu),
    "gelu": (0.0, F.gelu),
    "gelu_tanh": (0.0, partial(F.gelu, approximate="tanh")),
    "hardswish": (0.0, F.hardswish),
    "hardsigmoid": (0.0, F.hardsigmoid),
    "sigmoid": (0.0, F.sigmoid),
    "tanh": (0.0, F.tanh),
    "mish": (0.0, F.mish),
}
# In epsilons of the dtype of sums: a derivative is put together from terms of up to one, several
# of which are themselves differences.
DERIVATIVE = 8.0
# The steepest of them, hardswish, has slopes up to 1.5.
STEEPEST = 1.5


def epilogue_for(x: Tensor, activation: str, residual: bool) -> Epilogue:
    """With a random residual, contiguous whatever x is."""
    like_x = torch.randn(x.shape, dtype=torch.float64).to(x.dtype) if residual else None
    return Epilogue(activation, FUNCTIONS[activation][0], like_x)


def _derivative(activation: str, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(FUNCTIONS[activation][1](z).sum(), z)
    return derivative


def _pre_activation(normalized: Expected, epilogue: Epilogue) -> Expected:
    if epilogue.residual is None:
        return normalized
    residual = epilogue.residual.double()
    return replace(
        normalized,
        value=normalized.value + residual,
        scale=normalized.scale + residual.abs(),
    )


def _activated(normalized: Expected, epilogue: Epilogue) -> Expected:
    """Y: the function moves by what the pre-activation is off by, times its slope."""
    z = _pre_activation(normalized, epilogue)
    value = FUNCTIONS[epilogue.activation][1](z.value)
    return Expected(value, STEEPEST * z.scale, STEEPEST * z.held)


def _mean_over_channel(values: Tensor) -> Tensor:
    return values.mean([0, *range(2, values.dim())], keepdim=True)


def _act_gradients(
    tensors: Tensors, epilogue: Epilogue, statistics: oracle.Statistics, training: bool
) -> dict[str, Expected]:
    """All gradients, by the derivative at the pre-activation as the dtype of x holds it.

    Where the pre-activation's error leads over a kink, or to the next number of that dtype, the
    gradient is off by as much as the derivative changes there. Where it passes through memory it
    is rounded to the dtype of x once more, as PyTorch's own operations have it.
    """
    x, dtype = tensors.x, accumulate_dtype(tensors.x.dtype)
    epsilon = torch.finfo(dtype).eps
    normalized = oracle.output(x, tensors.weight, tensors.bias, statistics)
    z = _pre_activation(normalized, epilogue)
    off = epsilon * (ARITHMETIC["y"] * z.scale + HELD[dtype] * z.held)
    derivatives = torch.stack(
        [
            _derivative(epilogue.activation, held.to(x.dtype).double())
            for held in (z.value, z.value - off, z.value + off)
        ]
    )
    dy = tensors.dy.double()
    g = dy * derivatives[0]
    off_derivative = derivatives.amax(0) - derivatives.amin(0) + DERIVATIVE * epsilon
    off_g = dy.abs() * off_derivative
    rounded = off_g + torch.finfo(x.dtype).eps / 2 * g.abs()
    expected = oracle.gradients(g, x, tensors.weight, statistics, training)
    invstd = statistics.invstd.reshape(1, -1, *[1] * (x.dim() - 2))
    x_hat = (statistics.deviations(x.double()) * invstd).abs()
    slope = invstd
    if tensors.weight is not None:
        slope = slope * tensors.weight.double().abs().reshape(invstd.shape)
    off_dx = rounded
    if training:
        across, along = _mean_over_channel(rounded), _mean_over_channel(rounded * x_hat)
        off_dx = off_dx + across + x_hat * along

    def with_slack(name: str, slack: Tensor) -> Expected:
        terms = slack / (epsilon * ARITHMETIC[name])
        return replace(expected[name], scale=expected[name].scale + terms)

    axes = [0, *range(2, x.dim())]
    return {
        "dx": with_slack("dx", slope * off_dx),
        "dweight": with_slack("dweight", (off_g * x_hat).sum(axes)),
        "dbias": with_slack("dbias", off_g.sum(axes)),
        "dresidual": Expected(g, off_g / (epsilon * ARITHMETIC["dx"]), torch.zeros_like(g)),
    }


def _judge(
    run: Callable[[int], tuple[Results, Report]],
    expected: dict[str, Expected],
    seeds: range,
    condition: float,
) -> Verdict:
    results, report = run(seeds[0])
    differ = 0
    for seed in seeds[1:]:
        other, _ = run(seed)
        differ += any(not torch.equal(_bits(results[n]), _bits(other[n])) for n in results)
    wrong = []
    worst = worst_in_resolutions = 0.0
    for name, result in results.items():
        if name not in expected:
            continue
        try:
            assert_near(result, expected[name], QUANTITIES.get(name, name), condition)
        except AssertionError as failure:
            wrong.append(str(failure))
        if name in ("y", "dx", "dresidual"):
            error = (result.double() - expected[name].value).abs()
            unit = torch.finfo(result.dtype).eps * expected[name].scale
            worst = max(worst, float(error.max()))
            in_resolutions = float((error / unit).nan_to_num(0).max())
            worst_in_resolutions = max(worst_in_resolutions, in_resolutions)
    return Verdict(report, differ, worst, worst_in_resolutions, wrong)


def verify_forward(
    tensors: Tensors,
    *,
    epilogue: Epilogue | None = None,
    mask: bool = False,
    training: bool = True,
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seeds: range = range(1),
    condition: float = 1.0,
) -> Verdict:
    """Y, the saved and the running statistics, and the count of batches.

    Args:
        tensors: the arguments; left as they are.
        epilogue: what follows batch norm.
        mask: whether a mask is written, which only schedules are compared by.
        training: whether to normalize by the batch's statistics.
        device: name of a known GPU.
        scale: how much of it there is.
        algorithm: ``auto``, or one to force.
        seeds: of the schedules.
        condition: see tolerances.CONDITION.
    """
    x, weight, bias = tensors.x, tensors.weight, tensors.bias

    def run(seed: int) -> tuple[Results, Report]:
        running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
        batches = torch.tensor(6)
        (y, mean, invstd, *masks), report = forward(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            batches,
            epilogue=epilogue,
            want_mask=mask,
            training=training,
            momentum=MOMENTUM,
            eps=EPS,
            device=device,
            scale=scale,
            algorithm=algorithm,
            seed=seed,
        )
        if int(batches) != (7 if training else 6):
            raise AssertionError(f"num_batches_tracked went from 6 to {int(batches)}")
        results = {"y": y, "mean": mean, "invstd": invstd}
        if mask:
            results["mask"] = masks[0]
        return {**results, "running_mean": running_mean, "running_var": running_var}, report

    if training:
        statistics = oracle.batch_statistics(x, EPS)
    else:
        given = (tensors.running_mean, tensors.running_var)
        statistics = oracle.given_statistics(x, *given, EPS)
    y = oracle.output(x, weight, bias, statistics)
    expected = {"y": y if epilogue is None else _activated(y, epilogue)}
    saved = oracle.saved_statistics(statistics)
    if epilogue is not None:
        # Saved in float64, and computed in the dtype of sums.
        wider = torch.finfo(accumulate_dtype(x.dtype)).eps / torch.finfo(torch.float64).eps
        saved = {
            n: replace(statistic, scale=wider * statistic.scale) for n, statistic in saved.items()
        }
    expected.update(saved)
    if training:
        before = (tensors.running_mean, tensors.running_var)
        expected.update(oracle.running_statistics(statistics, *before, MOMENTUM))
    return _judge(run, expected, seeds, condition)


def verify_backward(
    tensors: Tensors,
    *,
    training: bool = True,
    want: tuple[bool, bool, bool] = (True, True, True),
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seeds: range = range(1),
    condition: float = 1.0,
) -> Verdict:
    """The gradients that are wanted, with the statistics as forward saves them.

    Args:
        tensors: the arguments of forward and the gradient of its result.
        training: see verify_forward.
        want: which of dx, dweight and dbias to compute.
        device: see verify_forward.
        scale: see verify_forward.
        algorithm: see verify_forward.
        seeds: see verify_forward.
        condition: see verify_forward.
    """
    if training:
        statistics = oracle.batch_statistics(tensors.x, EPS)
    else:
        given = (tensors.running_mean, tensors.running_var)
        statistics = oracle.given_statistics(tensors.x, *given, EPS)
    saved = torch.float64 if tensors.x.dtype == torch.float64 else torch.float32
    mean, invstd = statistics.mean.to(saved), statistics.invstd.to(saved)

    def run(seed: int) -> tuple[Results, Report]:
        gradients, report = backward(
            tensors.dy,
            tensors.x,
            tensors.weight,
            mean,
            invstd,
            training=training,
            want=want,
            device=device,
            scale=scale,
            algorithm=algorithm,
            seed=seed,
        )
        names = ("dx", "dweight", "dbias")
        return {n: g for n, g, wanted in zip(names, gradients, want, strict=True) if wanted}, report

    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training)
    return _judge(run, expected, seeds, condition)


def masked(tensors: Tensors, epilogue: Epilogue, training: bool) -> Epilogue:
    """The epilogue as backward takes it, with a mask, which the CPU writes, and no residual."""
    given = (tensors.x, epilogue.residual, tensors.weight, tensors.bias)
    running = (tensors.running_mean.clone(), tensors.running_var.clone())
    name, parameter = epilogue.activation, epilogue.parameter
    if training:
        results = batch_norm_act_training(
            *given, *running, None, MOMENTUM, EPS, name, parameter, True
        )
    else:
        results = batch_norm_act_eval(*given, *running, EPS, True, name, parameter)
    return replace(epilogue, residual=None, mask=results[3])


def verify_act_backward(
    tensors: Tensors,
    epilogue: Epilogue,
    *,
    training: bool = True,
    want: tuple[bool, bool, bool, bool] | None = None,
    mask: bool = False,
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seeds: range = range(1),
    condition: float = 1.0,
) -> Verdict:
    """The gradients that are wanted where batch norm has an epilogue.

    Args:
        tensors: see verify_backward.
        epilogue: of forward.
        training: see verify_forward.
        want: which of dx, dresidual, dweight and dbias to compute; if not given, all there are.
        mask: whether they are by the mask of forward.
        device: see verify_forward.
        scale: see verify_forward.
        algorithm: see verify_forward.
        seeds: see verify_forward.
        condition: see verify_forward.
    """
    want = want or (True, epilogue.residual is not None, True, True)
    if training:
        statistics = oracle.batch_statistics(tensors.x, EPS)
    else:
        given = (tensors.running_mean, tensors.running_var)
        statistics = oracle.given_statistics(tensors.x, *given, EPS)
    given_back, bias = epilogue, tensors.bias
    if mask:
        given_back, bias = masked(tensors, epilogue, training), None

    def run(seed: int) -> tuple[Results, Report]:
        gradients, report = act_backward(
            tensors.dy,
            tensors.x,
            tensors.weight,
            bias,
            statistics.mean,
            statistics.invstd,
            given_back,
            training=training,
            want=want,
            device=device,
            scale=scale,
            algorithm=algorithm,
            seed=seed,
        )
        names = ("dx", "dresidual", "dweight", "dbias")
        return {n: g for n, g, wanted in zip(names, gradients, want, strict=True) if wanted}, report

    expected = _act_gradients(tensors, epilogue, statistics, training)
    return _judge(run, expected, seeds, condition)


def step_operators(reports: list[Report], **options: Any) -> step_checks.StepOperators:
    """The steps apart by the signatures of ``fastbn.ops``; reports are kept."""

    def kept(operator: Callable[..., tuple[Any, Report]]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            results, report = operator(*arguments, **options)
            reports.append(report)
            return results

        return call

    return step_checks.StepOperators(
        kept(stats), kept(combine_apply), kept(backward_reduce), kept(backward_combine_apply)
    )


def verify_steps(
    tensors: Tensors, *, device: str = "h200", scale: Scale = WHOLE, seeds: range = range(1)
) -> Verdict:
    """Forward in two steps of several processes, which must end with the same bits.

    Args:
        tensors: see verify_forward.
        device: see verify_forward.
        scale: see verify_forward.
        seeds: see verify_forward.

    Returns:
        The verdict, with the report of the last launch.
    """
    parts = tensors.x.split(step_checks.parts_of(tensors.x.shape[0], SHARES))

    def run(seed: int) -> tuple[Results, Report]:
        reports: list[Report] = []
        operators = step_operators(reports, device=device, scale=scale, seed=seed)
        found = step_checks.forward(operators, tensors, parts, momentum=MOMENTUM)
        results = {"y": torch.cat(found.ys), "mean": found.mean, "invstd": found.invstd}
        running = {"running_mean": found.running_mean, "running_var": found.running_var}
        return {**results, **running}, reports[-1]

    statistics = oracle.batch_statistics(tensors.x, EPS)
    expected = {"y": oracle.output(tensors.x, tensors.weight, tensors.bias, statistics)}
    expected.update(oracle.saved_statistics(statistics))
    before = (tensors.running_mean, tensors.running_var)
    expected.update(oracle.running_statistics(statistics, *before, MOMENTUM))
    return _judge(run, expected, seeds, condition=1.0)
