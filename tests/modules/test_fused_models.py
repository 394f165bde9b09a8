"""Fused models are copied, pickled, changed, hooked, compiled and exported like others."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import fastbn
from fastbn.modules.batchnorm import FastBatchNorm
from tests.support.blocks import BLOCKS, CHANNELS, Basic, ConvNormAct, DenseLayer, Transform
from tests.support.tolerances import AGAINST_STOCK, AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path


def network() -> nn.Sequential:
    """Blocks in a row, without the one that has two outputs.

    Nor with those that are fused in no way of their own, as each block magnifies rounding.
    """
    torch.manual_seed(1)
    others = ("Auxiliary", "Features", "Summed")
    return nn.Sequential(*(make() for name, (make, _) in BLOCKS.items() if name not in others))


@pytest.fixture
def pair(device: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A fused model in float64, and the same converted only."""
    plain = fastbn.convert(network().to(device, torch.float64))
    return fastbn.fuse(copy.deepcopy(plain)), plain


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[FastBatchNorm]:
    """Takes the module of each fused call."""
    calls: list[FastBatchNorm] = []
    original = FastBatchNorm._forward

    def noted(self: FastBatchNorm, x: Tensor, *epilogue: Any) -> Tensor:
        if epilogue:
            calls.append(self)
        return original(self, x, *epilogue)

    monkeypatch.setattr(FastBatchNorm, "_forward", noted)
    return calls


def example(model: nn.Module) -> Tensor:
    parameter = next(model.parameters())
    x = torch.randn(2, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(2))
    return x.to(parameter.device, parameter.dtype)


def assert_same_step(ours: nn.Module, plain: nn.Module) -> None:
    """The same output, gradients and buffers."""
    results = []
    for model in (ours, plain):
        model.zero_grad()
        y = model(example(model))
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).to(y.device).reshape(y.shape))
        results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*results, **AGAINST_STOCK_FLOAT64)


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_are_fused(
    copied: Callable[[nn.Module], nn.Module],
    pair: tuple[nn.Sequential, nn.Sequential],
    fused_calls: list[FastBatchNorm],
) -> None:
    model, plain = pair
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    mine = {*model.parameters(), *model.buffers()}
    assert not mine & {*other.parameters(), *other.buffers()}
    assert_same_step(other, plain)
    assert fused_calls
    assert set(fused_calls) < set(other.modules())
    fastbn.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in network().modules()]


def test_models_of_another_process(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    pair: tuple[nn.Sequential, nn.Sequential],
) -> None:
    """Where the classes of fused blocks have not been made yet."""
    model, plain = pair
    x = example(plain)
    (tmp_path / "model").write_bytes(pickle.dumps((model.eval(), x, plain.eval()(x).detach())))
    script = """
import pathlib, pickle, torch
model, x, expected = pickle.loads(pathlib.Path("model").read_bytes())
torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
print(type(model[1]).__name__)
"""
    result = run_python("-c", script)
    assert (result.stdout, result.returncode) == ("FusedBasic\n", 0), result.stderr


def test_checkpoints_go_both_ways(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    model, plain = pair
    fresh = network().to(example(plain))
    fresh.load_state_dict(model.state_dict())
    fresh.load_state_dict(plain.state_dict())
    fastbn.fuse(fresh).load_state_dict(plain.state_dict())
    assert_same_step(fresh, plain)


def test_hooks_added_later_see_what_they_would_have(
    pair: tuple[nn.Sequential, nn.Sequential], fused_calls: list[FastBatchNorm]
) -> None:
    model, plain = pair
    paths = ["0.1", "0.3", "1.bn2", "2.relu", "3.f", "3.f.1"]
    seen: list[list[Tensor]] = [[], []]
    handles = []
    for one, into in zip(pair, seen, strict=True):
        for path in paths:
            handles.append(
                one.get_submodule(path).register_forward_hook(
                    lambda _, x, y, into=into: into.append(y.detach().clone())
                )
            )
    assert_same_step(model, plain)
    assert len(seen[0]) == len(paths) + 1  # 2.relu is called twice
    torch.testing.assert_close(*seen, **AGAINST_STOCK_FLOAT64)
    few = len(fused_calls)
    for handle in handles:
        handle.remove()
    fused_calls.clear()
    assert_same_step(model, plain)
    assert len(fused_calls) == few + 5  # 0.1, 1.bn2, 2.bn1, 2.bn2, 3.f.1.1


def test_global_hooks_see_all_modules(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    called: list[list[type[nn.Module]]] = []
    with torch.no_grad():
        for model in pair:
            called.append([])
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, x, y: called[-1].append(type(module))
            )
            model[:3](example(model))
            handle.remove()
    # A batch norm whose result is added to what is computed after it comes after that, too.
    names = [sorted(kind.__name__.removeprefix("Fused") for kind in kinds) for kinds in called]
    assert names[0] == names[1]


def test_changes_of_what_forward_reads_undo_its_fusion(device: str) -> None:
    for name in ("slope", "downsample"):
        make = BLOCKS["Functional" if name == "slope" else "Basic"][0]
        model = make().to(device, torch.float64)
        plain = fastbn.convert(copy.deepcopy(model))
        fastbn.fuse(model)
        setattr(model, name, getattr(model, name))
        assert type(model) is not type(plain)
        new = 0.4 if name == "slope" else ConvNormAct().to(device, torch.float64)
        for one in (model, plain):
            setattr(one, name, copy.deepcopy(new))
        assert type(model) is type(plain)
        assert_same_step(model, plain)


def test_modules_may_be_replaced(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    """By others of any class, in blocks and in sequences, and sequences may grow and shrink."""
    model, plain = pair
    sequence = str(list(BLOCKS).index("Separable"))
    new = {
        "0.3": nn.Softplus(),
        "1.relu": nn.PReLU(),
        "2.bn2": nn.GroupNorm(2, CHANNELS),
        "3.f.1.1": nn.Identity(),
        "3.drop_path": nn.Tanh(),
        "4.norms.0": nn.InstanceNorm2d(CHANNELS),
        f"{sequence}.0": nn.Sequential(ConvNormAct(), nn.Sigmoid()),
    }
    for one in pair:
        for path, module in new.items():
            one.set_submodule(path, copy.deepcopy(module).to(example(plain)))
        one.append(ConvNormAct(nn.Tanh()).to(example(plain)))
        one[-1].load_state_dict(plain[0].state_dict())
        one[5] = one.get_submodule(sequence + ".0")
    assert_same_step(model, plain)
    ours, expected = (one.get_submodule(sequence) for one in pair)
    assert isinstance(ours, nn.Sequential)
    assert isinstance(expected, nn.Sequential)
    assert_same_step(ours[:2], expected[:2])
    assert_same_step(model[:2], plain[:2])


def test_called_in_other_ways(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    """By keyword, and alone what only the block was seen to call."""
    model, plain = pair
    model.eval(), plain.eval()
    x = example(plain)
    for path, arguments in (("1", {"x": x}), ("3.f", {"input": x}), ("3.f.1.1", {"input": x})):
        ours, expected = (one.get_submodule(path)(**arguments) for one in pair)
        torch.testing.assert_close(ours, expected, **AGAINST_STOCK_FLOAT64)


class Listed(nn.Module):
    """Makes a list where a tensor is expected."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x]


def test_types_are_those_of_the_modules_that_are_there(device: str) -> None:
    model = BLOCKS["ManyResolutions"][0]().to(device, torch.float64)
    plain = copy.deepcopy(model)
    fastbn.fuse(model)
    for one in (model, plain):
        one.set_submodule("final.2", Listed())
    assert_same_step(model, plain)


class Switched(nn.Module):
    """An argument with a default decides what follows the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        return torch.relu(y) if other is None else torch.tanh(y + other)


def test_other_arguments_than_those_traced(device: str, fused_calls: list[FastBatchNorm]) -> None:
    model = Switched().to(device, torch.float64).eval()
    plain = copy.deepcopy(model)
    fastbn.fuse(model)
    x = example(model)
    for arguments in ((x,), (x, x), (x, None)):
        torch.testing.assert_close(model(*arguments), plain(*arguments), **AGAINST_STOCK_FLOAT64)
    assert len(fused_calls) == 1


def test_lists_and_tensors_have_traces_of_their_own(
    device: str, fused_calls: list[FastBatchNorm]
) -> None:
    model = DenseLayer(2).to(device, torch.float64)
    plain = copy.deepcopy(model)
    fastbn.fuse(model)
    x = example(model)
    torch.testing.assert_close(model([x, x]), plain([x, x]), **AGAINST_STOCK_FLOAT64)
    both = torch.cat([x, x], 1)
    torch.testing.assert_close(model(both), plain(both), **AGAINST_STOCK_FLOAT64)
    assert len(fused_calls) == 2


def test_residual_of_another_dtype_or_shape(device: str) -> None:
    """An addition in place keeps the dtype, another widens it; both broadcast."""
    for make in (Basic, Transform):
        model = make().to(device)
        plain = fastbn.convert(copy.deepcopy(model))
        fastbn.fuse(model)
        x = example(model).bfloat16()
        with torch.autocast(device, torch.bfloat16):
            ours, expected = model(x), plain(x)
        assert ours.dtype == expected.dtype
        # Rounded once less than one after the other, in each of two batch norms.
        torch.testing.assert_close(ours, expected, rtol=2**-5, atol=2**-5)


def test_moves_and_dtypes(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    """Block by block: all in a row, they magnify what rounding does."""
    model, plain = (one.float() for one in pair)
    x = example(plain)
    for ours, expected in zip(model, plain, strict=True):
        torch.testing.assert_close(ours(x), expected(x), **AGAINST_STOCK)


def test_frozen_statistics(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    model, plain = (fastbn.freeze(one).train() for one in pair)
    before = [buffer.clone() for buffer in model.buffers()]
    assert_same_step(model, plain)
    torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [-2, None], ids=["traced", "not"])
def test_folded_batch_norms(blocks: int | None, pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    """What is left in their places is called by fused forwards, too.

    Where the model does not trace, for its last two blocks, those in sequences are folded.
    """
    model, plain = (one[:blocks].eval() for one in pair)
    folded = fastbn.fold(copy.deepcopy(model), dry_run=True).folded
    assert folded == fastbn.fold(copy.deepcopy(plain), dry_run=True).folded
    assert len(folded) > 10
    x = example(plain)
    torch.testing.assert_close(fastbn.fold(model)(x), plain(x), **AGAINST_STOCK_FLOAT64)


def test_parametrized_children(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    model, plain = pair

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    for one in pair:
        parametrize.register_parametrization(one.get_submodule("1.conv1"), "weight", Double())
    assert_same_step(model, plain)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile_without_graph_breaks(
    training: bool, pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    model, plain = (one.train(training) for one in pair)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_step(compiled, plain)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_exports_hold_stock_operators(
    training: bool, pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    model, plain = (one.train(training) for one in pair)
    x = example(plain)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.batch_norm.default" in targets
    assert not any("fastbn" in target for target in targets)
    expected = copy.deepcopy(plain)(x)
    for exported in (
        program.module(),
        torch.jit.trace(copy.deepcopy(model), (x,), check_trace=False),
    ):
        torch.testing.assert_close(exported(x), expected, **AGAINST_STOCK_FLOAT64)


def test_symbolic_traces_hold_modules(device: str) -> None:
    model = nn.Sequential(ConvNormAct(nn.ReLU()), Basic(downsample=True)).to(device, torch.float64)
    plain = fastbn.convert(copy.deepcopy(model))
    traced = fx.symbolic_trace(fastbn.fuse(model))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {"0.1", "0.3", "1.bn1", "1.bn2", "1.relu", "1.downsample.1"} <= set(calls)
    x = example(plain)
    torch.testing.assert_close(traced(x), plain(x), **AGAINST_STOCK_FLOAT64)
