"""Times fastbn's module, stock's and a memory copy on layer shapes, after checking results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

import fastbn

from .gpu_timing import input_sets, measure_on_gpu
from .timing import Timing, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from fastbn.planning import Op, Plan

    from .shapes import Layer


PROVIDERS: dict[str, type[nn.BatchNorm2d]] = {
    "stock": nn.BatchNorm2d,
    "fastbn": fastbn.BatchNorm2d,
}
LAYOUTS = {"ncs": torch.contiguous_format, "nsc": torch.channels_last}

# Largest error against float64 that counts as right, relative to the largest value of a result.
# Stock's float32 sums over channels last lose four digits on the largest layers: hence 1e-3.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-3,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


class WrongResultError(ArithmeticError):
    """A provider's result is too far from float64's to be worth timing."""


@dataclass(frozen=True)
class Pass:
    """One of the passes to time.

    Attributes:
        name: what tables call it.
        op: what the planner calls it.
        traffic: tensors of the input's size that it has to read or write.
        prepare: makes the call to time from a module, its input x and the gradient dy.
    """

    name: str
    op: Op
    traffic: int
    prepare: Callable[[nn.BatchNorm2d, Tensor, Tensor], Callable[[], object]]


def _forward(module: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> Callable[[], object]:
    return partial(module.train(), x)


def _backward(module: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> Callable[[], object]:
    y = module.train()(x)
    return partial(torch.autograd.grad, y, (x, module.weight, module.bias), dy, retain_graph=True)


def _evaluation(module: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> Callable[[], object]:
    return torch.no_grad()(partial(module.eval(), x))


FORWARD = Pass("forward", "forward", 2, _forward)
BACKWARD = Pass("backward", "backward", 3, _backward)
EVALUATION = Pass("evaluation", "eval", 2, _evaluation)


@dataclass(frozen=True)
class Case:
    """An input to time the passes on: float32 or wider parameters, as autocast keeps them."""

    layer: Layer
    batch: int
    dtype: torch.dtype
    layout: str
    device: str = "cpu"

    def __str__(self) -> str:
        """Shape (N, C, H, W), dtype and layout in words."""
        return f"{self.batch}x{self.layer} {self.dtype_name} {self.layout}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def on_gpu(self) -> bool:
        """Whether to measure there."""
        return self.device != "cpu"

    def tensor(self) -> Tensor:
        """A random tensor (N, C, H, W) of mean 1 and standard deviation 2."""
        layer = self.layer
        shape = (self.batch, layer.channels, layer.height, layer.width)
        values = torch.randn(shape, device=self.device)
        return values.mul_(2).add_(1).to(self.dtype, memory_format=LAYOUTS[self.layout])


@dataclass(frozen=True)
class Row:
    """What was measured of one pass on one case.

    Attributes:
        timings: of ``stock``, ``fastbn`` and ``copy`` (of the input to a second tensor).
        tensor_bytes: size of the input.
        plan: on a GPU, what fastbn does there.
        stock_backend: on a GPU, whose kernels stock takes: ``native`` or ``cudnn``.
    """

    case: Case
    measured: Pass
    timings: dict[str, Timing]
    tensor_bytes: int
    plan: Plan | None = None
    stock_backend: str | None = None

    @property
    def ratio(self) -> float:
        """Stock's time over fastbn's."""
        return self.timings["stock"].median / self.timings["fastbn"].median

    def gb_per_second(self, name: str) -> float:
        """Bytes that have to move, in GB, per second of ``stock``, ``fastbn`` or ``copy``."""
        traffic = 2 if name == "copy" else self.measured.traffic
        return traffic * self.tensor_bytes / self.timings[name].median / 1e9

    @property
    def share(self) -> float:
        """Throughput of fastbn over that of the copy, which reads and writes each byte once."""
        return self.gb_per_second("fastbn") / self.gb_per_second("copy")


def _results(module: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """All that the passes compute: a training step and then an evaluation."""
    y = module.train()(x)
    dx, dweight, dbias = torch.autograd.grad(y, (x, module.weight, module.bias), dy)
    with torch.no_grad():
        evaluated = module.eval()(x)
    statistics = {name: buffer for name, buffer in module.named_buffers() if buffer.dim()}
    return {
        "y": y.detach(),
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "evaluation": evaluated,
        **statistics,
    }


def _check(provider: str, case: Case, results: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, truth in exact.items():
        error = float((results[name].double() - truth).abs().max() / truth.abs().max())
        # Written so that NaN fails too.
        if not error <= TOLERANCES[case.dtype]:
            raise WrongResultError(f"{provider}, {case}: {name} is off by {error:.0e} of its size")


def _modules(
    case: Case, x: Tensor, dy: Tensor, providers: Mapping[str, type[nn.BatchNorm2d]]
) -> dict[str, nn.BatchNorm2d]:
    """A module of each provider, all with the same parameters, whose results are right."""
    channels = case.layer.channels
    reference = nn.BatchNorm2d(channels, device=case.device, dtype=torch.float64)
    nn.init.uniform_(reference.weight, 0.5, 1.5)
    nn.init.uniform_(reference.bias, -1, 1)
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    exact = _results(reference, x.detach().double().requires_grad_(), dy.double())
    modules = {}
    dtype = torch.promote_types(case.dtype, torch.float32)
    for name, provider in providers.items():
        module = provider(channels, device=case.device, dtype=dtype)
        module.load_state_dict(start)
        if case.on_gpu:
            # Kernels are compared, and counting batches costs stock one of its own.
            module.num_batches_tracked = None
        _check(name, case, _results(module, x, dy), exact)
        modules[name] = module
    return modules


def _sets(case: Case, tensor_bytes: int) -> int:
    """On a GPU as many as its cache forgets; a CPU has its caches in use as a network does."""
    if not case.on_gpu:
        return 1
    return input_sets(tensor_bytes, torch.cuda.get_device_properties(case.device).L2_cache_size)


def _stock_backend(module: nn.BatchNorm2d, x: Tensor) -> str:
    """Whose kernels stock takes in the mode that a module is in."""
    vectors = (module.weight, module.bias, module.running_mean, module.running_var)
    select = torch._C._select_batch_norm_backend
    return str(select(x, *vectors, module.training, module.eps).name).lower()


def measure_case(
    case: Case,
    passes: Iterable[Pass],
    budget: float,
    providers: Mapping[str, type[nn.BatchNorm2d]] = PROVIDERS,
) -> list[Row]:
    """Times all providers and the copy on one case.

    Args:
        case: the input.
        passes: what to time on it.
        budget: seconds for each pass.
        providers: classes of modules, stock's and fastbn's among them.

    Raises:
        WrongResultError: a result is off, and nothing was timed.
    """
    if not case.on_gpu:
        return _measure_case(case, passes, budget, providers)
    # Graphs are not captured on the default stream, and backward goes where forward went.
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = _measure_case(case, passes, budget, providers)
    torch.cuda.empty_cache()  # a graph's memory is of no use to the next one
    return rows


def _measure_case(
    case: Case,
    passes: Iterable[Pass],
    budget: float,
    providers: Mapping[str, type[nn.BatchNorm2d]],
) -> list[Row]:
    torch.manual_seed(0)
    x, dy = case.tensor().requires_grad_(), case.tensor()
    modules = _modules(case, x, dy, providers)
    inputs = [(x, dy)]
    for _ in range(_sets(case, x.nbytes) - 1):
        inputs.append((case.tensor().requires_grad_(), case.tensor()))
    copies = [
        partial(torch.empty_like(source, requires_grad=False).copy_, source.detach())
        for source, _ in inputs
    ]
    rows = []
    for measured in passes:
        calls = {
            name: [measured.prepare(module, *tensors) for tensors in inputs]
            for name, module in modules.items()
        }
        calls["copy"] = copies
        if not case.on_gpu:
            timings = measure({name: only for name, (only,) in calls.items()}, budget)
            rows.append(Row(case, measured, timings, x.nbytes))
            continue
        timings = measure_on_gpu(calls, budget)
        plan = fastbn.plan(x, op=measured.op)
        backend = _stock_backend(modules["stock"], x)
        rows.append(Row(case, measured, timings, x.nbytes, plan, backend))
    return rows


def measure_cases(
    cases: Sequence[Case],
    passes: Iterable[Pass],
    budget: float,
    providers: Mapping[str, type[nn.BatchNorm2d]] = PROVIDERS,
) -> tuple[list[Row], list[str]]:
    """Times all cases under a progress bar on stderr; see :func:`measure_case`.

    Returns:
        The rows, and a sentence for each case that was not timed because a result was wrong.
    """
    rows, wrong = [], []
    progress = tqdm(cases, desc="layers", unit="case")
    for case in progress:
        progress.set_postfix_str(str(case))
        try:
            rows += measure_case(case, passes, budget, providers)
        except WrongResultError as error:
            wrong.append(str(error))
    return rows, wrong
