"""One operation on the simulated GPU, under several schedules, judged by the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tests.support import oracle, step_checks
from tests.support.tolerances import assert_near

from . import (
    WHOLE,
    Report,
    Scale,
    backward,
    backward_combine_apply,
    backward_reduce,
    combine_apply,
    forward,
    stats,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tests.support.oracle import Expected
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
            assert_near(result, expected[name], name, condition)
        except AssertionError as failure:
            wrong.append(str(failure))
        if name in ("y", "dx"):
            error = (result.double() - expected[name].value).abs()
            unit = torch.finfo(result.dtype).eps * expected[name].scale
            worst = float(error.max())
            worst_in_resolutions = float((error / unit).nan_to_num(0).max())
    return Verdict(report, differ, worst, worst_in_resolutions, wrong)


def verify_forward(
    tensors: Tensors,
    *,
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
        (y, mean, invstd), report = forward(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            batches,
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
        return {**results, "running_mean": running_mean, "running_var": running_var}, report

    if training:
        statistics = oracle.batch_statistics(x, EPS)
    else:
        given = (tensors.running_mean, tensors.running_var)
        statistics = oracle.given_statistics(x, *given, EPS)
    expected = {"y": oracle.output(x, weight, bias, statistics)}
    expected.update(oracle.saved_statistics(statistics))
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
