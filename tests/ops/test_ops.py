"""The operators under the function: what they return besides y, and that tracing may trust them."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbn
import fastbn.ops
from fastbn.ops import batch_norm_backward, batch_norm_eval, batch_norm_training
from tests.support import oracle
from tests.support.case_checks import EPS, MOMENTUM, statistics_of
from tests.support.stock_versions import TAKES_EPS_ZERO
from tests.support.tables import DTYPES, LAYOUTS, MATRIX_LAYOUTS, SHAPES, Case, Tensors, make
from tests.support.tolerances import accumulate_dtype, assert_near

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

LAYOUTS_TO_TRACE = ("contiguous", "channels_last", "channel_major", "stepped", "expanded")


def _train(tensors: Tensors, momentum: float | None = MOMENTUM) -> tuple[torch.Tensor, ...]:
    return batch_norm_training(
        tensors.x,
        tensors.weight,
        tensors.bias,
        tensors.running_mean,
        tensors.running_var,
        torch.zeros((), dtype=torch.int64, device=tensors.x.device),
        momentum,
        EPS,
    )


def _infer(tensors: Tensors, save: bool) -> tuple[torch.Tensor, ...]:
    return batch_norm_eval(
        tensors.x,
        tensors.weight,
        tensors.bias,
        tensors.running_mean,
        tensors.running_var,
        EPS,
        save,
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_statistics(dtype: torch.dtype, layout: str, training: bool, device: str) -> None:
    """They are those that y was normalized with, in the dtype of sums, and never the buffers."""
    tensors = make(Case("image-49", SHAPES["image-49"], layout, dtype), device)
    expected = oracle.saved_statistics(statistics_of(tensors, training))
    _, mean, invstd = _train(tensors) if training else _infer(tensors, save=True)
    for name, saved in (("mean", mean), ("invstd", invstd)):
        assert saved.dtype == accumulate_dtype(dtype)
        assert_near(saved, expected[name], name)
    buffers = {tensors.running_mean.data_ptr(), tensors.running_var.data_ptr()}
    assert {mean.data_ptr(), invstd.data_ptr()}.isdisjoint(buffers)


def test_inference_saves_only_on_demand(device: str) -> None:
    tensors = make(Case("image-49", SHAPES["image-49"], "contiguous", torch.float32), device)
    y, mean, invstd = _infer(tensors, save=False)
    assert (mean.numel(), invstd.numel()) == (0, 0)
    assert torch.equal(y, _infer(tensors, save=True)[0])


# All combinations, on each way through memory: a gradient that is not wanted is a null pointer.
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=3))[:-1], ids=str)
def test_backward_computes_what_is_wanted(
    wanted: tuple[bool, bool, bool], layout: str, training: bool, device: str
) -> None:
    tensors = make(Case("image-odd", SHAPES["image-odd"], layout, torch.float32), device)
    statistics = statistics_of(tensors, training)
    expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training)
    results = batch_norm_backward(
        tensors.dy,
        tensors.x,
        tensors.weight,
        statistics.mean.float().to(device),
        statistics.invstd.float().to(device),
        training,
        *wanted,
    )
    for name, wants, result in zip(expected, wanted, results, strict=True):
        if wants:
            assert_near(result, expected[name], name)
        else:
            assert result.numel() == 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_backward_of_nothing_returns_nothing(
    layout: str,
    training: bool,
    device: str,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """In a process of its own: null pointers all round would take this one along."""
    done = run_python(
        "-c",
        "import torch\n"
        "from fastbn.ops import batch_norm_backward\n"
        f"torch.set_default_device({device!r})\n"
        f"x = torch.randn(8, 3, 17, 19).contiguous(memory_format=torch.{layout})\n"
        "vectors = torch.ones(3), torch.zeros(3), torch.ones(3)\n"
        f"results = batch_norm_backward(x, x, *vectors, {training}, False, False, False)\n"
        "print([result.numel() for result in results])\n",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[0, 0, 0]"


def test_cumulative_momentum_counts_batches(device: str) -> None:
    """Without momentum, running statistics are the average over all batches."""
    case = Case("image-49", SHAPES["image-49"], "contiguous", torch.float64)
    tensors = make(case, device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    means = []
    for batch in range(1, 4):
        x = make(case, device).x
        means.append(x.mean((0, 2, 3)))
        batch_norm_training(
            x, None, None, tensors.running_mean, tensors.running_var, counter, None, EPS
        )
        assert counter == batch
        torch.testing.assert_close(tensors.running_mean, torch.stack(means).mean(0))


# The schema, the fake implementations and functionalization are checked by PyTorch itself against
# what the operators do. Layouts, because the fakes must foresee strides; a matrix, an empty batch
# and 16-bit inputs, because they take branches of their own.
SAMPLES = [
    *(Case("image-49", SHAPES["image-49"], layout, torch.float32) for layout in LAYOUTS_TO_TRACE),
    Case("matrix", SHAPES["matrix"], "contiguous", torch.float64),
    Case("volume", SHAPES["volume"], "channels_last", torch.bfloat16),
    Case("empty", (0, 3, 4, 4), "contiguous", torch.float32),
]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    tensors = make(case, device)
    channels = case.shape[1]
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    counter = torch.tensor(3, device=device)
    saved = torch.rand(2, channels, dtype=accumulate_dtype(case.dtype), device=device).unbind()
    train, evaluate, backward = (
        getattr(torch.ops.fastbn, f"batch_norm_{name}").default
        for name in ("training", "eval", "backward")
    )
    torch.library.opcheck(train, (tensors.x, *vectors, counter, MOMENTUM, EPS))
    torch.library.opcheck(train, (tensors.x, *[None] * 5, None, EPS))
    torch.library.opcheck(evaluate, (tensors.x, *vectors, EPS, True))
    torch.library.opcheck(evaluate, (tensors.x, *vectors, EPS, False))
    for training, wanted in ((True, (True, True, True)), (False, (True, False, True))):
        arguments = (tensors.dy, tensors.x, tensors.weight, *saved, training, *wanted)
        torch.library.opcheck(backward, arguments)


def _description(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


@pytest.mark.parametrize("traced", ["meta", "fake"])
@pytest.mark.parametrize("name", ["matrix", "line", "image-one-pixel", "image-49", "volume"])
def test_tracing_foresees_results(name: str, traced: str, device: str) -> None:
    """Shapes, strides and dtypes on tensors without data are those of real ones."""
    shape = SHAPES[name]
    for layout in MATRIX_LAYOUTS if len(shape) == 2 else LAYOUTS:
        real = make(Case(name, shape, layout, torch.float32), device)
        convert: Callable[[torch.Tensor], torch.Tensor]
        if traced == "meta":
            convert = lambda tensor: tensor.to("meta")  # noqa: E731
        else:
            convert = FakeTensorMode().from_tensor
        hollow = Tensors(*(convert(tensor) for tensor in vars(real).values()))
        if hollow.x.stride() != real.x.stride():
            continue  # .to("meta") packs tensors that are not dense
        if traced == "meta":
            counter = torch.zeros((), dtype=torch.int64, device="meta")
        else:
            counter = convert(torch.zeros((), dtype=torch.int64, device=device))
        vectors = (hollow.weight, hollow.bias, hollow.running_mean, hollow.running_var)
        results = batch_norm_training(hollow.x, *vectors, counter, MOMENTUM, EPS)
        foreseen = [_description(result) for result in results]
        assert foreseen == [_description(result) for result in _train(real)]


def _declared() -> dict[str, tuple[list[str], int]]:
    """Names of arguments, and how many results, as ops.py declares its operators."""
    tree = ast.parse(Path(fastbn.ops.__file__).read_text())
    results = {"Tensor": 1, "ThreeTensors": 3, "FourTensors": 4}
    return {
        node.name: (
            [argument.arg for argument in node.args.args],
            results[ast.unparse(node.returns)],
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.returns
    }


def test_operators_are_declared_as_they_are_compiled() -> None:
    """In Python, whose declarations callers and mypy see, by the same names in the same order."""
    declared = _declared()
    for name, (arguments, results) in declared.items():
        schema = getattr(torch.ops.fastbn, name).default._schema
        assert arguments == [argument.name for argument in schema.arguments], name
        assert results == len(schema.returns), name
    with_gradients = {"batch_norm", "batch_norm_act"}
    compiled = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastbn::")}
    of_composite = {name for name in compiled if name.endswith("_composite")}
    assert compiled - of_composite == {f"fastbn::{name}" for name in {*declared, *with_gradients}}


ON_META: dict[str, Any] = {"device": "meta"}
X_ON_META = torch.empty(4, 3, 5, 5, **ON_META)
# Arguments of the function that have no data but are wrong all the same.
MISUSES: dict[str, tuple[Any, ...]] = {
    "mean": (X_ON_META, torch.ones(4, **ON_META), torch.ones(4, **ON_META), None, None, True),
    "weight": (X_ON_META, None, None, torch.ones(4, **ON_META), None, True),
    "bias, eval": (X_ON_META, *torch.ones(2, 3, **ON_META), None, torch.ones(2, **ON_META)),
    "no statistics in eval": (X_ON_META, None, None),
    "one value": (X_ON_META[:1, :, :1, :1], None, None, None, None, True),
    "eps": (X_ON_META, None, None, None, None, True, 0.1, 0.0),
    "other device": (X_ON_META, None, None, torch.ones(3), None, True),
}
if not TAKES_EPS_ZERO:
    del MISUSES["eps"]


@pytest.mark.parametrize("name", MISUSES)
def test_tracing_refuses_what_stock_refuses(name: str) -> None:
    """A model that is built or traced without data fails there, not when it first gets some."""
    raised = []
    for function in (fastbn.batch_norm, F.batch_norm):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            function(*MISUSES[name])
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]
