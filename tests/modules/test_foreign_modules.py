"""Batch norms of timm, torchvision and detectron2 run on fastbn and stay what they are."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn

import fastbn
from tests.support.lookalikes import (
    DetectronFrozenBatchNorm2d,
    TimmBatchNormAct2d,
    TimmFrozenBatchNormAct2d,
    TimmSigmoid,
    TimmSyncBatchNormAct,
    TorchvisionFrozenBatchNorm2d,
)
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Whether drop and act are part of batch norm's operator.
FUSED: dict[str, dict[str, Any]] = {
    "relu": {},
    "leaky_relu": {"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}},
    "gelu tanh": {"act_layer": nn.GELU, "act_kwargs": {"approximate": "tanh"}},
    "timm's sigmoid": {"act_layer": TimmSigmoid},
    "identity": {"act_layer": nn.Identity},
}
CALLED: dict[str, dict[str, Any]] = {
    "selu": {"act_layer": nn.SELU},
    "prelu": {"act_layer": nn.PReLU},
    "drop": {"drop_layer": nn.Dropout2d},
}
FROZEN: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: TimmFrozenBatchNormAct2d(6, eps=1e-3),
    "timm, called": lambda: TimmFrozenBatchNormAct2d(6, act_layer=nn.SELU),
    "torchvision": lambda: TorchvisionFrozenBatchNorm2d(6, eps=1e-4),
    "detectron2": lambda: DetectronFrozenBatchNorm2d(6),
}
EVERY: dict[str, Callable[[], nn.Module]] = {
    **{
        f"timm {name}": lambda given=given: TimmBatchNormAct2d(6, **given)  # type: ignore[misc]
        for name, given in {**FUSED, **CALLED}.items()
    },
    **{f"frozen {name}": make for name, make in FROZEN.items()},
}
each = pytest.mark.parametrize("kind", EVERY)
each_frozen = pytest.mark.parametrize("kind", FROZEN)


def randomized(module: nn.Module) -> nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module


def run(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Result, gradients and buffers of a forward and backward, with dropout's same dice."""
    torch.manual_seed(2)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), device=x.device).reshape(y.shape))
    return [y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def assert_same_run(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for our, their in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_converted_module_computes_the_same(kind: str, training: bool, device: str) -> None:
    theirs = randomized(EVERY[kind]()).to(device).train(training)
    ours = fastbn.convert(copy.deepcopy(theirs))
    assert type(ours) is not type(theirs)
    assert_same_run(ours, theirs, torch.randn(4, 6, 5, 7, device=device))


@each
def test_only_the_class_changes_and_changes_back(kind: str) -> None:
    module = EVERY[kind]()
    cls, attributes = type(module), dict(module.__dict__)
    state, paths = list(module.state_dict()), [name for name, _ in module.named_modules()]
    fastbn.convert(module)
    assert isinstance(module, cls)
    assert type(module).__name__ == cls.__name__
    assert list(module.state_dict()) == state
    assert [name for name, _ in module.named_modules()] == paths
    assert fastbn.revert(module, dry_run=True).swapped == [""]
    fastbn.revert(module)
    assert type(module) is cls
    assert module.__dict__ == attributes


@each
def test_class_is_made_once(kind: str) -> None:
    assert type(fastbn.convert(EVERY[kind]())) is type(fastbn.convert(EVERY[kind]()))


@each
@pytest.mark.parametrize("how", ["pickle", "torch", "deepcopy"])
@pytest.mark.usefixtures("importable_lookalikes")
def test_copies_are_converted_and_can_be_reverted(kind: str, how: str) -> None:
    original = randomized(EVERY[kind]()).eval()
    cls = type(original)
    module = fastbn.convert(original)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif how == "torch":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(twin(x), module(x))
    assert type(fastbn.revert(twin)) is cls


def test_converted_class_has_no_constructor() -> None:
    module = fastbn.convert(TimmBatchNormAct2d(6))
    with pytest.raises(TypeError, match=r"make one of timm\.layers\.norm_act and have fastbn"):
        type(module)(6)


@pytest.mark.parametrize("name", FUSED)
def test_known_activation_is_not_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = randomized(TimmBatchNormAct2d(6, **FUSED[name]))
    ours = copy.deepcopy(theirs)
    assert fastbn.convert(ours, dry_run=True) == fastbn.SwapReport([""])
    fastbn.convert(ours)
    x = torch.randn(4, 6, 5, 5)
    expected = theirs(x)
    monkeypatch.setattr(type(theirs.act), "forward", None)
    torch.testing.assert_close(ours(x), expected, **AGAINST_STOCK)


@pytest.mark.parametrize("name", CALLED)
def test_other_activation_is_called_and_reported(name: str) -> None:
    report = fastbn.convert(TimmBatchNormAct2d(6, **CALLED[name]), dry_run=True)
    assert report.swapped == [""]
    assert "drop" in report.advice[""]
    assert "are called after batch norm" in report.advice[""]


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], object]] = {
    "forward": lambda act, hook: act.register_forward_hook(hook),
    "forward pre": lambda act, hook: act.register_forward_pre_hook(hook),
    "backward": lambda act, hook: act.register_full_backward_hook(hook),
    "backward pre": lambda act, hook: act.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("submodule", ["act", "drop"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [TimmBatchNormAct2d, TimmFrozenBatchNormAct2d])
def test_hooks_on_submodules_are_called(
    make: Callable[..., nn.Module], hook: str, submodule: str
) -> None:
    """Even those that come after the conversion."""
    theirs = make(6, act_layer=nn.SiLU, inplace=False)  # else no backward hooks
    ours = fastbn.convert(copy.deepcopy(theirs))
    seen: list[str] = []
    HOOKS[hook](ours.get_submodule(submodule), lambda *_: seen.append(hook))
    x = torch.randn(4, 6, 5, 5)
    assert_same_run(ours, theirs, x)
    assert seen == [hook]


def test_hooks_on_the_module_stay() -> None:
    module = TimmBatchNormAct2d(6)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, arguments, y: seen.append(y))
    y = fastbn.convert(module)(torch.randn(2, 6, 4, 4))
    assert seen[0] is y


def test_hooks_on_all_modules_are_called() -> None:
    module = fastbn.convert(TimmBatchNormAct2d(6))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, y: seen.append(type(module).__name__)
    )
    with handle:
        module(torch.randn(2, 6, 4, 4))
    assert seen == ["Identity", "ReLU", "BatchNormAct2d"]


def test_activation_may_change_later() -> None:
    theirs: Any = TimmBatchNormAct2d(6, act_layer=nn.ReLU)
    ours: Any = fastbn.convert(copy.deepcopy(theirs))
    for module in (ours, theirs):
        module.act = nn.LeakyReLU(0.1)
    assert_same_run(ours, theirs, torch.randn(4, 6, 5, 5))
    for module in (ours, theirs):
        module.act.negative_slope = 0.7
    assert_same_run(ours, theirs, torch.randn(4, 6, 5, 5))


@each_frozen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_frozen_module_promotes_as_before(kind: str, dtype: torch.dtype, device: str) -> None:
    """Of an input of another dtype than the buffers' the library's own forward takes care."""
    theirs = randomized(FROZEN[kind]()).to(device)
    ours = fastbn.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 5, 7).to(device, dtype)
    if kind == "detectron2" and dtype == torch.float64:
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match=r"dtype|Float"):
                module(x)
        return
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_frozen_module_takes_other_ranks_as_before() -> None:
    theirs = randomized(DetectronFrozenBatchNorm2d(6))
    ours = fastbn.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 5)
    assert torch.equal(ours(x), theirs(x))


@each
def test_compiles_without_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    eager = fastbn.convert(randomized(EVERY[kind]())).eval()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6, 5, 7)
    torch.testing.assert_close(compiled(x), eager(x), **AGAINST_STOCK)


@each
def test_exported_program_holds_no_operator_of_fastbn(kind: str) -> None:
    eager = fastbn.convert(randomized(EVERY[kind]())).eval()
    x = torch.randn(4, 6, 5, 7)
    program = torch.export.export(copy.deepcopy(eager), (x,))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fastbn" in call for call in calls)
    torch.testing.assert_close(program.module()(x), eager(x), **AGAINST_STOCK)


@pytest.mark.parametrize("name", [*FUSED, *CALLED])
def test_symbolic_trace_has_the_module_as_a_leaf(name: str) -> None:
    given = {**FUSED, **CALLED}[name]
    model = nn.Sequential(fastbn.convert(TimmBatchNormAct2d(6, **given))).eval()
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
    x = torch.randn(4, 6, 5, 7)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", [*FUSED, *CALLED])
def test_stock_s_converter_to_sync_batch_norm_is_refused(name: str) -> None:
    given = {**FUSED, **CALLED}[name]
    module = fastbn.convert(TimmBatchNormAct2d(6, **given))
    with pytest.raises(
        RuntimeError, match=r"use fastbn\.convert_sync_batchnorm, or that of timm\.layers"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def test_synchronized_module_keeps_its_activation() -> None:
    """Of what timm's own converter to synchronized batch norms makes."""
    module, x = TimmSyncBatchNormAct(6), torch.randn(4, 6, 5, 7)
    reason = "it has no submodule drop and no submodule act"
    assert fastbn.convert(module, dry_run=True).left == {"": reason}
    module.drop, module.act = nn.Identity(), nn.SiLU()
    expected = module(x)
    torch.testing.assert_close(fastbn.convert(module)(x), expected)


def test_incomplete_modules_are_left_and_reported() -> None:
    no_eps, no_buffer = DetectronFrozenBatchNorm2d(6), TorchvisionFrozenBatchNorm2d(6)
    del no_eps.eps
    del no_buffer.running_var
    no_act = TimmBatchNormAct2d(6)
    del no_act.act
    model = nn.Sequential(no_eps, no_buffer, no_act)
    classes = [type(module) for module in model]
    report = fastbn.convert(model, dry_run=True)
    assert report.left == {
        "0": "it has no number eps",
        "1": "it has no buffer running_var",
        "2": "it has no submodule act",
    }
    fastbn.convert(model)
    assert [type(module) for module in model] == classes


class Mine(nn.BatchNorm2d):
    """A third party's: stock's times two."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class FastMine(fastbn.BatchNorm2d, Mine):
    """The same on fastbn."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * fastbn.BatchNorm2d.forward(self, input)


@pytest.fixture(scope="module")
def registered() -> None:
    fastbn.register(
        Mine,
        fastbn.Adapter(
            FastMine,
            reason_to_stay=lambda module: "not affine" if module.weight is None else None,
            advice=lambda module: "small" if module.get_buffer("running_var").numel() < 4 else None,
        ),
    )


@pytest.mark.usefixtures("registered")
def test_third_party_s_class_is_converted() -> None:
    model = nn.Sequential(Mine(6), Mine(6, affine=False), Mine(3))
    report = fastbn.convert(model, dry_run=True)
    assert report == fastbn.SwapReport(["0", "2"], {"1": "not affine"}, {"2": "small"})
    theirs = copy.deepcopy(model[0])
    fastbn.convert(model)
    assert [type(module) for module in model] == [FastMine, Mine, FastMine]
    assert_same_run(model[0], theirs, torch.randn(4, 6, 5, 5))
    twin = pickle.loads(pickle.dumps(model))
    fastbn.revert(twin)
    assert [type(module) for module in twin] == [Mine, Mine, Mine]


@pytest.mark.usefixtures("registered")
def test_registering_is_checked() -> None:
    class Another(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="FastMine is not a subclass of Another"):
        fastbn.register(Another, fastbn.Adapter(FastMine))
    with pytest.raises(TypeError, match="Another is not a subclass of Another"):
        fastbn.register(Another, fastbn.Adapter(Another))
    with pytest.raises(ValueError, match="Mine is registered already"):
        fastbn.register(Mine, fastbn.Adapter(type("FasterMine", (FastMine,), {})))
    with pytest.raises(ValueError, match="BatchNorm2d is registered already"):
        fastbn.register(nn.BatchNorm2d, fastbn.Adapter(Another))
