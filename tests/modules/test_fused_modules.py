"""A module of batch norm, residual and activation is those of stock one after the other."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import fastbn
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CLASSES = {
    "1d": (fastbn.BatchNormAct1d, nn.BatchNorm1d, (6, 5, 7)),
    "2d": (fastbn.BatchNormAct2d, nn.BatchNorm2d, (4, 5, 6, 3)),
    "3d": (fastbn.BatchNormAct3d, nn.BatchNorm3d, (2, 5, 3, 4, 3)),
}
each_class = pytest.mark.parametrize("kind", CLASSES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])

# Constructors' arguments, and stock's module of the same function.
ACTIVATIONS: dict[str, tuple[dict[str, Any], nn.Module]] = {
    "relu": ({}, nn.ReLU()),
    "none": ({"activation": None}, nn.Identity()),
    "relu6": ({"activation": "relu6"}, nn.ReLU6()),
    "leaky_relu": (
        {"activation": "leaky_relu", "activation_kwargs": {"negative_slope": 0.2}},
        nn.LeakyReLU(0.2),
    ),
    "elu": ({"activation": "elu"}, nn.ELU()),
    "silu": ({"activation": "silu", "activation_kwargs": {"inplace": True}}, nn.SiLU()),
    "gelu_tanh": (
        {"activation": "gelu", "activation_kwargs": {"approximate": "tanh"}},
        nn.GELU("tanh"),
    ),
    "mish": ({"activation": "mish"}, nn.Mish()),
}


class Stock(nn.Module):
    """Stock's modules, one after the other."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        result: Tensor = self.act(y if residual is None else y + residual)
        return result


def pair(
    kind: str, device: str = "cpu", activation: str = "relu", **arguments: Any
) -> tuple[nn.Module, Stock, tuple[int, ...]]:
    """Fastbn's module and stock's with the same random state, and a shape they take."""
    ours, theirs, shape = CLASSES[kind]
    given, act = ACTIVATIONS[activation]
    norm = theirs(5, device=device, **arguments)
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    fast = ours(5, device=device, **arguments, **given)
    fast.load_state_dict(norm.state_dict())
    return fast, Stock(norm, act), shape


@each_class
@each_mode
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_computes_like_stock_s(
    activation: str, with_residual: bool, training: bool, kind: str, device: str
) -> None:
    ours, theirs, shape = pair(kind, device, activation)
    x, residual, dy = (torch.randn(shape, device=device) for _ in range(3))
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_()]
        if with_residual:
            leaves.append(residual.clone().requires_grad_())
        y = module.train(training)(*leaves)
        y.backward(dy)
        gradients = [tensor.grad for tensor in (*leaves, *module.parameters())]
        results.append([y.detach(), *gradients, *module.buffers()])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@each_class
def test_constructor_is_stock_s_and_the_activation(kind: str) -> None:
    ours, theirs, _ = CLASSES[kind]
    ours_takes, theirs_takes = (dict(inspect.signature(c).parameters) for c in (ours, theirs))
    added = {name: ours_takes.pop(name).default for name in ("activation", "activation_kwargs")}
    assert added == {"activation": "relu", "activation_kwargs": None}
    for name, parameter in theirs_takes.items():
        assert ours_takes[name].default == parameter.default
        assert ours_takes[name].kind == parameter.kind
    assert issubclass(ours, theirs)


@each_class
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_is_stock_s(kind: str, arguments: dict[str, Any]) -> None:
    ours, theirs, _ = pair(kind, **arguments)
    state, expected = ours.state_dict(), theirs.norm.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    theirs.norm.load_state_dict(state)


def test_representation_tells_the_activation() -> None:
    module, stock = fastbn.BatchNormAct2d(3, activation="elu"), nn.BatchNorm2d(3)
    assert repr(module) == f"BatchNormAct2d({stock.extra_repr()}, activation=elu, alpha=1.0)"
    assert (module.activation, module.activation_kwargs) == ("elu", {"alpha": 1.0})
    plain = fastbn.BatchNormAct2d(3, activation=None)
    assert (plain.activation, plain.activation_kwargs) == ("identity", {})


@each_class
def test_other_ranks_are_refused_in_stock_s_words(kind: str) -> None:
    ours, theirs, shape = pair(kind)
    x = torch.randn(*shape, 1, 1)
    errors = []
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="expected") as caught:
            module(x)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_unknown_activation_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ValueError, match="activation is 'step'; it may be one of"):
        fastbn.BatchNormAct2d(3, activation="step")
    with pytest.raises(TypeError, match="relu got slope"):
        fastbn.BatchNormAct2d(3, activation_kwargs={"slope": 1.0})


@pytest.mark.parametrize("how", ["pickle", "torch", "deepcopy"])
def test_copies_keep_the_activation(how: str, device: str) -> None:
    module, _, shape = pair("2d", device, "leaky_relu")
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif how == "torch":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(module)
    assert repr(twin) == repr(module)
    assert twin.activation_kwargs == {"negative_slope": 0.2}
    x = torch.randn(shape, device=device)
    assert torch.equal(twin(x), module(x))


def test_16_bit_module_keeps_wide_statistics(device: str) -> None:
    module = fastbn.BatchNormAct2d(3, device=device).bfloat16()
    assert module.get_parameter("weight").dtype == torch.bfloat16
    assert module.get_buffer("running_mean").dtype == torch.float32
    made = fastbn.BatchNormAct2d(3, device=device, dtype=torch.float16)
    assert made.get_buffer("running_var").dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "plain"])
def test_checkpointed_forward_counts_once(use_reentrant: bool, device: str) -> None:
    module, _, shape = pair("2d", device, "silu")
    plain = copy.deepcopy(module)
    x, residual = (torch.randn(shape, device=device) for _ in range(2))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    checkpoint(module, leaves[0], residual, use_reentrant=use_reentrant).square().sum().backward()
    plain(leaves[1], residual).square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    for one, other in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


class Block(nn.Module):
    """Ends with batch norm, the sum with its input, and an activation; begins with one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fastbn.BatchNormAct2d(4, activation="hardswish")
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.end = fastbn.BatchNormAct2d(4, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.end(self.conv(x), x)
        return y


def block(device: str = "cpu") -> tuple[Block, Tensor]:
    """In eval, with statistics that are not those of a fresh module; and an input."""
    model = Block().to(device)
    model(torch.randn(8, 4, 9, 9, device=device) * 3 + 1)
    return model.eval(), torch.randn(2, 4, 9, 9, device=device)


@each_mode
def test_symbolic_trace(training: bool, device: str) -> None:
    """The modules are leaves, as stock's are, that take the residual."""
    model, x = block(device)
    traced = fx.symbolic_trace(copy.deepcopy(model.train(training)))
    calls = {node.target: len(node.args) for node in traced.graph.nodes if node.op == "call_module"}
    assert calls == {"stem": 1, "conv": 1, "end": 2}
    assert torch.equal(traced(x), model(x))
    retraced = fx.symbolic_trace(traced)
    assert torch.equal(retraced(x), model(x))


@each_mode
def test_compiled_without_graph_break(training: bool, device: str) -> None:
    model, x = block(device)
    eager = copy.deepcopy(model.train(training))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for module, call in ((model, compiled), (eager, eager)):
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in module.parameters()), *module.buffers()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@each_mode
def test_export_holds_stock_s_operators(training: bool, device: str) -> None:
    model, x = block(device)
    eager = copy.deepcopy(model.train(training))
    program = torch.export.export(model, (x,))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.batch_norm.default", "aten.hardswish.default", "aten.relu.default"} <= calls
    assert not any("fastbn" in target for target in calls)
    torch.testing.assert_close(program.module()(x), eager(x), **AGAINST_STOCK)


@each_mode
def test_torchscript_trace_holds_stock_s_operators(training: bool, device: str) -> None:
    model, x = block(device)
    eager = copy.deepcopy(model.train(training))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
        assert "fastbn::" not in str(traced.inlined_graph)
    eager.load_state_dict(traced.state_dict())
    torch.testing.assert_close(traced(x), eager(x), **AGAINST_STOCK)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    model, x = block()
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own: one of them is deprecated
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, optimize=False)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Relu" in operators
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(y)), model(x), **AGAINST_STOCK)


def test_stock_s_converter_to_sync_batch_norm_is_refused() -> None:
    """It makes a SyncBatchNorm of every batch norm, and would drop the activation."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), fastbn.BatchNormAct2d(4, activation="silu"))
    with pytest.raises(RuntimeError, match="would drop the activation of BatchNormAct2d"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is fastbn.BatchNormAct2d
    model[1].qconfig = "anything"
    with pytest.raises(RuntimeError, match="would drop the activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_quantization_finds_its_attribute() -> None:
    module = fastbn.BatchNormAct2d(4)
    assert not hasattr(module, "qconfig")
    module.qconfig = "anything"
    assert copy.deepcopy(module).qconfig == "anything"
    del module.qconfig
    assert getattr(module, "qconfig", None) is None


def test_convert_leaves_it_alone() -> None:
    model = nn.Sequential(fastbn.BatchNormAct2d(4), nn.BatchNorm2d(4))
    fastbn.convert(model)
    assert [type(module) for module in model] == [fastbn.BatchNormAct2d, fastbn.BatchNorm2d]
