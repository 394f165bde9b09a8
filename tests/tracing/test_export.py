"""What leaves PyTorch holds stock's operators only, and computes the same."""

from __future__ import annotations

import copy
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn

import fastbn
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def network(device: str = "cpu") -> nn.Sequential:
    """In eval, with statistics that are not those of a fresh module."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model(torch.randn(8, 3, 9, 9) * 3 + 1)
    return fastbn.convert(model).eval().to(device)


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export(training: bool, device: str) -> None:
    model = network(device).train(training)
    eager = copy.deepcopy(model)
    x = torch.randn(2, 3, 9, 9, device=device)
    program = torch.export.export(model, (x,))
    assert "aten.batch_norm.default" in targets(program)
    assert not any("fastbn" in target for target in targets(program))
    exported = program.module()
    torch.testing.assert_close(exported(x), eager(x), **AGAINST_STOCK)
    for ours, expected in zip(exported.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **AGAINST_STOCK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_export_of_a_16_bit_module(dtype: torch.dtype, device: str) -> None:
    """Its running statistics are float32, a mix that stock's operator does not take as it is."""
    model = network(device).to(dtype)
    assert model[1].get_buffer("running_mean").dtype == torch.float32
    x = torch.randn(2, 3, 9, 9).to(device, dtype)
    exported = torch.export.export(model, (x,)).module()
    # Two layers, each rounding once to the dtype.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(exported(x), model(x), rtol=tolerance, atol=tolerance)


def run_onnx(model: str | bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(y))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    """Both of PyTorch's exporters, and a runtime that knows nothing of fastbn."""
    model = network()
    x = torch.randn(2, 3, 9, 9)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own: one of them is deprecated
        # Without optimisation, or batch norm is folded into the convolution in front of it.
        torch.onnx.export(
            model,
            (x,),
            path,
            dynamo=dynamo,
            verbose=False,
            optimize=False,
            do_constant_folding=False,
        )
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" in operators
    torch.testing.assert_close(run_onnx(path, x), model(x), **AGAINST_STOCK)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_torchscript_trace(training: bool, device: str) -> None:
    model = network(device).train(training)
    x = torch.randn(2, 3, 9, 9, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert "fastbn::" not in str(loaded.inlined_graph)
    eager = copy.deepcopy(model)
    torch.testing.assert_close(loaded(x), eager(x), **AGAINST_STOCK)


class TwoForms(nn.Module):
    """A module and a call of the function."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = fastbn.BatchNorm1d(3)
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return fastbn.batch_norm(self.norm(x), self.mean, self.var, eps=0.1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_symbolic_trace(training: bool, device: str) -> None:
    """The module is a leaf and the function a call, as stock's are."""
    model = TwoForms().train(training).to(device)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    calls = [(node.op, node.target) for node in traced.graph.nodes]
    assert ("call_module", "norm") in calls
    assert ("call_function", fastbn.batch_norm) in calls
    x = torch.randn(4, 3, 5, device=device)
    assert torch.equal(traced(x), model(x))
    mean, expected = (m.get_buffer("norm.running_mean") for m in (traced, model))
    assert torch.equal(mean, expected)
    counters = [m.get_buffer("norm.num_batches_tracked") for m in (traced, model)]
    assert counters[0] == counters[1] == int(training)


def test_symbolic_trace_of_a_nested_model_retraces() -> None:
    model = nn.Sequential(network(), nn.Sequential(fastbn.BatchNorm2d(4))).eval()
    traced = fx.symbolic_trace(fx.symbolic_trace(model))
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(traced(x), model(x))


def test_proxies_are_seen_inside_a_module_with_hooks() -> None:
    """Calling through nn.Module, hooks included, does not end the trace."""
    model = nn.Sequential(fastbn.BatchNorm1d(3)).eval()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(output)))
    x = torch.randn(4, 3)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    assert torch.Tensor in seen
