"""What benchmarks report was computed right, on tensors that the cache has forgotten."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbn

# Behind everything else, so that fastbn is the one under test.
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import __main__ as suite
from benchmarks import algorithms, providers
from benchmarks.cases import EPILOGUES, FORWARD, PASSES, BenchmarkCase, Epilogue, layouts
from benchmarks.gpu_timing import input_sets
from benchmarks.kernels import copy_of, measure_case
from benchmarks.memory import measure_memory
from benchmarks.overhead import measure_overhead
from benchmarks.providers import PROVIDERS, Provider, WithEpilogue
from benchmarks.rows import COPY, groups, read
from benchmarks.shapes import Shape, shape_sets
from benchmarks.timing import Timing
from tests.support.pairs import EXHAUSTIVE

MEBI = 1 << 20
BOTH = {name: PROVIDERS[name] for name in ("fastbn", "stock")}


@pytest.mark.parametrize("tensor", [1, 3, 12, 25, 60, 61, 400])
@pytest.mark.parametrize("cache", [4, 40, 60, 126])
def test_inputs_are_forgotten_before_they_come_back(tensor: int, cache: int) -> None:
    """All other sets, of which x and y pass at least, are four caches; and no set is too many."""
    sets = input_sets(tensor * MEBI, cache * MEBI)
    assert (sets - 1) * 2 * tensor >= 4 * cache
    assert sets == 2 or (sets - 2) * 2 * tensor < 4 * cache


SMALL = {
    "tall": Shape((60, 7)),
    "sequence": Shape((4, 7, 9)),
    "image": Shape((4, 16, 9, 7), 3),
    "volume": Shape((2, 5, 3, 4, 3)),
}


def small_cases(device: str = "cpu") -> list[BenchmarkCase]:
    return [
        BenchmarkCase(name, shape, dtype, layout, epilogue, device)
        for name, shape in SMALL.items()
        for dtype in (torch.float32, torch.bfloat16)
        for layout in layouts(shape)
        for epilogue in EPILOGUES
    ]


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_rows(case: BenchmarkCase, device: str) -> None:
    """All passes of all providers that take a case, beside a copy of as many bytes."""
    case = replace(case, device=device)
    rows, wrong = measure_case(
        case, {**BOTH, "stock channels_last": PROVIDERS["stock channels_last"]}, 0.001
    )
    assert wrong == []
    found = groups(row for row in rows if row.subject.cache == "warm")
    other_layout = (
        ["stock channels_last"] if case.layout == "contiguous" and len(case.shape.sizes) > 3 else []
    )
    moved = 1 if case.epilogue == "add+relu" else 0
    tensors = {"forward": 2 + moved, "backward": 3 + moved, "eval": 2 + moved}
    assert [group.subject.measured for group in found] == list(tensors)
    for group, measured in zip(found, PASSES, strict=True):
        assert list(group.rows) == ["fastbn", "stock", *other_layout, COPY]
        assert group.subject.bytes == tensors[measured.name] * case.tensor().nbytes
        assert group.subject.count == case.shape.count
        for row in group.rows.values():
            assert 0 < row.value.p20 <= row.value.median <= row.value.p80
        if case.on_gpu:
            plan = fastbn.plan(case.tensor(), op=measured.op)
            assert group.rows["fastbn"].detail.startswith(f"{plan.algorithm} {plan.mapping} ")
        else:
            assert group.rows["stock"].detail == "native"


@pytest.mark.parametrize("tensors", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_copy_moves_as_many_bytes_as_the_pass(tensors: int, layout: str) -> None:
    case = BenchmarkCase("image", Shape((4, 16, 9, 6)), torch.bfloat16, layout)
    inputs = case.inputs()
    parts: Any = copy_of(inputs, tensors)()
    assert 2 * sum(part.nbytes for part in parts) == tensors * case.tensor_bytes
    sources = [inputs.x, inputs.dy]
    for part, source in zip(parts, sources, strict=False):
        values = source.detach().as_strided((source.numel(),), (1,))
        assert torch.equal(part, values[: len(part)])
        assert part.data_ptr() != source.data_ptr()


class Spoiled(WithEpilogue):
    """A batch norm and what follows, with an error of a percent in one result."""

    def __init__(self, case: BenchmarkCase, result: str) -> None:
        super().__init__(fastbn.BatchNorm2d(case.channels), case.epilogue)
        self.result = result
        for name in ("weight", "bias"):
            if result == f"d{name}":
                getattr(self.norm, name).register_hook(lambda gradient: gradient * 1.01)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            residual = bent(residual, gradient=self.result == "dresidual")
        y = super().forward(x, residual)
        if self.result == "eval":
            return y if self.training else y * 1.01
        if self.training and self.result.startswith("running"):
            getattr(self.norm, self.result).mul_(1.01)
        if self.result == "dtype":
            return y.double()
        if self.result == "layout":
            return y.contiguous(memory_format=torch.channels_last)
        return bent(y, value=self.result == "y", gradient=self.result == "dx")


def bent(y: Tensor, *, value: bool = False, gradient: bool = False) -> Tensor:
    result: Tensor = Bent.apply(y, value, gradient)  # type: ignore[no-untyped-call]
    return result


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bend: bool, bend_gradient: bool) -> Tensor:
        ctx.bend = bend_gradient
        return y * 1.01 if bend else y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy * 1.01 if ctx.bend else dy, None, None


RESULTS = ["y", "dx", "dweight", "dbias", "running_mean", "running_var", "eval"]


def spoiled_in(result: str, epilogue: Epilogue, device: str) -> str:
    """The sentence about it, after seeing that the others were timed."""
    case = BenchmarkCase(
        "image", Shape((4, 3, 5, 5)), torch.float32, "contiguous", epilogue, device
    )
    spoiled = Provider(lambda case: Spoiled(case, result))
    rows, (sentence,) = measure_case(case, {**BOTH, "spoiled": spoiled}, 0.001)
    assert {row.provider for row in rows} == {"fastbn", "stock", COPY}
    beginning = f"spoiled, {case}: "
    assert sentence.startswith(beginning)
    return sentence.removeprefix(beginning)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("result", RESULTS)
def test_wrong_results_are_not_timed(result: str, epilogue: Epilogue, device: str) -> None:
    assert spoiled_in(result, epilogue, device) == f"{result} is off by 1e-02 of its size"


def test_wrong_gradients_of_residuals_are_not_timed(device: str) -> None:
    sentence = spoiled_in("dresidual", "add+relu", device)
    assert sentence == "dresidual is off by 1e-02 of its size"


def test_results_of_another_kind_are_not_timed(device: str) -> None:
    """They would move other bytes."""
    assert spoiled_in("dtype", "plain", device).startswith(
        "y is torch.float64 of size (4, 3, 5, 5)"
    )
    assert spoiled_in("layout", "plain", device).endswith("and strides (75, 1, 15, 3)")


def test_failing_providers_do_not_stop_the_others(device: str) -> None:
    def fail(case: BenchmarkCase) -> nn.Module:
        raise RuntimeError("no kernel")

    case = BenchmarkCase("image", Shape((4, 3, 5, 5)), torch.float32, "contiguous", device=device)
    rows, wrong = measure_case(case, {**BOTH, "other": Provider(fail)}, 0.001)
    assert wrong == ["other, 4x3x5x5 float32 contiguous: no kernel"]
    assert {row.provider for row in rows} == {"fastbn", "stock", COPY}


FUSED = BenchmarkCase("image", Shape((4, 8, 6, 6)), torch.float32, "channels_last", "add+relu")


def test_compiled_is_stock_compiled() -> None:
    module = PROVIDERS["compiled"].build(FUSED)
    assert isinstance(module, torch._dynamo.OptimizedModule)
    assert type(module.norm) is nn.BatchNorm2d


@EXHAUSTIVE  # compiling takes half a minute
def test_compiled_is_measured() -> None:
    case = FUSED
    rows, wrong = measure_case(case, {**BOTH, "compiled": PROVIDERS["compiled"]}, 0.001)
    assert wrong == []
    assert [row.provider for row in rows if row.subject.measured == "forward"] == [
        "fastbn",
        "stock",
        "compiled",
        COPY,
    ]


class InPlace(torch.autograd.Function):
    """Batch norm as inplace_abn has it: over its input, with the result saved for backward.

    That goes over the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        batch, dims = x.detach().clone(), [0, 2, 3]
        mean, variance = norm.running_mean, norm.running_var
        y = nn.functional.batch_norm(batch, mean, variance, weight, bias, norm.training)
        invstd = (batch.float().var(dims, unbiased=False, keepdim=True) + norm.eps).rsqrt()
        x.copy_(y)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, invstd, weight, bias)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, invstd, weight, bias = ctx.saved_tensors
        dims, shape = [0, 2, 3], (1, -1, 1, 1)
        normalized = (y.float() - bias.view(shape)) / weight.view(shape)
        gradient = dy.float()
        dbias, dweight = gradient.sum(dims), (gradient * normalized).sum(dims)
        count = dy.numel() // len(weight)
        centered = gradient - (dbias.view(shape) + normalized * dweight.view(shape)) / count
        dy.copy_(centered * invstd * weight.view(shape))
        return dy, None, dweight, dbias


class InPlaceABN(nn.BatchNorm2d):
    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        assert activation == "identity"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y: Tensor = InPlace.apply(  # type: ignore[no-untyped-call]
            input, self, self.weight, self.bias
        )
        return y


class BatchNorm2dNHWC(nn.BatchNorm2d):
    """As apex's: channels in the last dimension, add and ReLU inside."""

    def __init__(self, channels: int, fuse_relu: bool) -> None:
        super().__init__(channels)
        self.fuse_relu = fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous()
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if z is not None:
            assert self.fuse_relu
            y = y + z
        return y.relu() if self.fuse_relu else y


@pytest.fixture
def others_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the interfaces of the packages, which are hard to install."""
    packages: dict[str, dict[str, Any]] = {
        "apex": {},
        "apex.contrib": {},
        "apex.contrib.groupbn": {"BatchNorm2d_NHWC": BatchNorm2dNHWC},
        "inplace_abn": {"InPlaceABN": InPlaceABN},
    }
    for name, attributes in packages.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("others_installed")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_other_packages(epilogue: Epilogue, layout: str) -> None:
    """They take part where they are there, each in its own layout and memory."""
    found = providers.available(PROVIDERS)
    assert {"apex", "inplace_abn"} <= found.keys()
    case = BenchmarkCase("image", Shape((4, 8, 6, 6)), torch.float16, layout, epilogue)
    # The stand-in does without a GPU.
    chosen = {**BOTH, "apex": replace(found["apex"], takes=lambda case: True)}
    chosen["inplace_abn"] = found["inplace_abn"]
    rows, wrong = measure_case(case, chosen, 0.001)
    assert wrong == []
    expected = {"fastbn", "stock", "apex", COPY} | (
        {"inplace_abn"} if epilogue == "plain" else set()
    )
    assert {row.provider for row in rows} == expected


@pytest.mark.usefixtures("others_installed")
def test_overhead_and_memory_with_a_package_that_overwrites(device: str) -> None:
    """What it saves is what it wrote over x: no tensor beyond that, and none for dx."""
    some = {**BOTH, "inplace_abn": PROVIDERS["inplace_abn"]}
    assert {row.provider for row in measure_overhead(some, 0.01)[0]} == set(BOTH)
    case = BenchmarkCase(
        "image", Shape((32, 16, 20, 20)), torch.float32, "contiguous", device=device
    )
    found = {g.subject.measured: g for g in groups(measure_memory([case], some)[0])}
    saved = found["saved"].rows["inplace_abn"].value.median / case.tensor_bytes
    assert 1 <= saved < 1.1


def test_missing_packages_are_left_out() -> None:
    assert list(providers.available(["fastbn", "inplace_abn", "stock"])) == ["fastbn", "stock"]


def test_apex_is_only_given_what_it_takes() -> None:
    takes = PROVIDERS["apex"].takes
    case = BenchmarkCase(
        "image", Shape((4, 8, 6, 6)), torch.float16, "channels_last", device="cuda"
    )
    assert takes(case)
    assert not takes(replace(case, dtype=torch.bfloat16))
    assert not takes(replace(case, device="cpu"))
    assert not takes(replace(case, shape=Shape((4, 8, 6, 6, 6))))


def test_overhead_has_the_passes(device: str) -> None:
    rows, wrong = measure_overhead(BOTH, 0.01, device)
    assert wrong == []
    assert [(row.subject.measured, row.provider) for row in rows] == [
        (call, provider)
        for call in ("forward", "forward and backward", "eval")
        for provider in BOTH
    ]
    by_call = {group.subject.measured: group for group in groups(rows)}
    for provider in BOTH:
        both, one = (by_call[name].rows[provider] for name in ("forward and backward", "forward"))
        assert both.value.median > one.value.p20 > 1e-7


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_memory_is_what_tensors_take(epilogue: Epilogue, device: str) -> None:
    """Kept is x, and a bit of each sum; y, dx and the gradient of the residual are made."""
    case = BenchmarkCase(
        "image", Shape((32, 16, 20, 20)), torch.float32, "contiguous", epilogue, device
    )
    found = {g.subject.measured: g for g in groups(measure_memory([case], BOTH)[0])}
    tensors = {"plain": (1, 2), "relu": (1, 2), "add+relu": (1, 3)}[epilogue]
    for measured, count in zip(("saved", "peak"), tensors, strict=True):
        # Parameters and statistics come on top of it.
        size = found[measured].rows["fastbn"].value.median / case.tensor_bytes
        assert count <= size < count + 0.1
        assert found[measured].subject.bytes == case.tensor_bytes


def test_suite_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two benchmarks as from the command line, on the smallest shapes."""
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv")}
    options = ["--quick", "--batch", "1", "--threads", str(torch.get_num_threads())]
    where = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(tmp_path)]
    small = ["--shapes", "tiny", "--dtypes", "float32"]
    assert suite.main(["kernels", *small, *options, *where]) == 0
    text = capsys.readouterr().out
    assert "8x64x7x7" in text
    written = read(files["json"])
    assert {row.subject.shapes for row in written.rows} == {"tiny"}
    assert written.environment["torch"] == torch.__version__
    assert (tmp_path / "roofline-float32.png").read_bytes().startswith(b"\x89PNG")
    assert len(files["csv"].read_text().splitlines()) == 1 + len(written.rows)
    assert suite.main(["overhead", *options]) == 0
    assert "forward and backward" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "status"), [("fastbn", 1), ("stock channels_last", 0)])
def test_only_mistakes_of_its_own_fail_the_suite(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others may be wrong, which is said, and is not this project's failure."""
    spoiled = replace(PROVIDERS[name], build=lambda case: Spoiled(case, "y"))
    monkeypatch.setitem(PROVIDERS, name, spoiled)
    options = ["--shapes", "tiny", "--dtypes", "float32", "--quick", "--device", "cpu"]
    monkeypatch.setattr(suite, "EPILOGUES", ("plain",))
    assert suite.main(["kernels", *options]) == status
    assert (
        f"not timed: {name}, 8x64x7x7 float32 contiguous: y is off by 1e-02"
        in capsys.readouterr().out
    )


def test_shapes_have_the_layers_of_resnet50() -> None:
    sets = shape_sets(32)
    assert sum(shape.count for shape in sets["resnet50"].shapes) == 53
    assert sets["resnet50"].shapes[0].sizes == (32, 64, 112, 112)
    for one in sets.values():
        assert set(one.quick) <= set(one.shapes)


def made_up_comparison(
    copy: float, chosen: str, **seconds: float
) -> algorithms.AlgorithmComparison:
    """As if a GPU had taken so long, and the planner had chosen that."""
    case = BenchmarkCase(
        "resnet50", Shape((256, 64, 56, 56), 6), torch.bfloat16, "contiguous", device="cuda"
    )
    question: dict[str, Any] = {"dtype": torch.bfloat16, "device": "h200"}
    shape = (256, 64, 56, 56)
    names: list[Any] = list(seconds)
    plans = {name: fastbn.plan(shape, algorithm=name, **question) for name in names}
    timings = {name: Timing(s, s, s, 1) for name, s in {**seconds, "copy": copy}.items()}
    return algorithms.AlgorithmComparison(case, FORWARD, plans, timings, chosen)


def test_algorithms_are_compared(tmp_path: Path) -> None:
    """The choice against the fastest, predictions against times, bytes against those of a copy."""
    comparison = made_up_comparison(
        50e-6, "persistent_grid", two_pass=80e-6, persistent_cluster=50e-6, persistent_grid=60e-6
    )
    assert (comparison.chosen, comparison.fastest) == ("persistent_grid", "persistent_cluster")
    assert comparison.loss == pytest.approx(0.2)
    # It moves what a copy moves, in the same time; two passes half as much again.
    assert comparison.share("persistent_cluster") == pytest.approx(1)
    assert comparison.share("two_pass") == pytest.approx(1.5 * 50 / 80)
    predicted = comparison.plans["two_pass"].microseconds
    assert comparison.error("two_pass") == pytest.approx(predicted / 80 - 1)
    lines = algorithms.table([comparison]).splitlines()[2:]
    assert [line.split()[4] for line in lines] == [
        "persistent_cluster",
        "persistent_grid",
        "two_pass",
    ]
    assert [" < " in line for line in lines] == [False, True, False]
    assert "fastest in 0 of 1 cases and lost most, 20.0%" in algorithms.verdict([comparison])
    path = tmp_path / "rows.json"
    algorithms.write_json(path, {"gpu": "made up"}, [comparison])
    rows = json.loads(path.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == [
        "two_pass",
        "persistent_cluster",
        "persistent_grid",
    ]
    assert [row["predicted_seconds"] for row in rows] == [
        plan.microseconds / 1e6 for plan in comparison.plans.values()
    ]
