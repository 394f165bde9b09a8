"""Records what a module's forward does with its children, by symbolic tracing.

A trace goes through the forward of one module, a block, and takes each call of a child as one step.
It stands for the forward only where nothing else decides what forward does, so it is taken several
times, in all modes, and refused where anything but those of :data:`Condition` makes a difference.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import random
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...activations import IDENTITY
from ...modules.activation_modules import function_of_module, is_observed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# What every module has, and what forward may read without depending on it.
_BOOKKEEPING = frozenset(vars(nn.Module()))

# Functions of the module operator that change their first operand.
IN_PLACE_OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
    "setitem",
)


class Condition(NamedTuple):
    """What a forward may depend on, and has a trace for each value of.

    Attributes:
        training: the block's own mode.
        tensors: all of its arguments are tensors, where forward asks for their types.
    """

    training: bool
    tensors: bool


class UntraceableError(Exception):
    """A forward that no trace stands for; the text says why, in words that follow "forward"."""


@dataclass
class Trace:
    """What a block's forward does.

    Attributes:
        graphs: the steps under each condition that could be traced.
        arguments: how many positional arguments it takes that have no default.
        read: names of the block's attributes that decided what was traced.
        asked: whether forward asked for the type of an argument.
        makers: names of modules from whose classes it was told that a value is a tensor.
        refused: why there is no graph under the other conditions.
    """

    graphs: dict[Condition, fx.Graph]
    arguments: int
    read: frozenset[str]
    asked: bool
    makers: frozenset[str]
    refused: list[str]

    def is_certain(self) -> bool:
        """Whether each condition has a graph, and all graphs are the same."""
        sources = {source_of(graph) for graph in self.graphs.values()}
        return len(self.graphs) == (4 if self.asked else 2) and len(sources) == 1


def source_of(graph: fx.Graph) -> str:
    """The text of a forward that does what a graph says."""
    return graph.python_code("self").src


class _Value(fx.Proxy):
    """A value in a trace; unlike its base, it can be changed, and tells that from computing."""

    tracer: _Tracer


def _in_place(function: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    def method(self: _Value, *operands: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, *operands), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


def _answer(value: Any, kinds: Any) -> bool:
    """``isinstance`` for forwards, which takes a traced value for what it stands for."""
    if type(value) is not _Value:
        return builtins.isinstance(value, kinds)
    return issubclass(value.tracer.class_of(value.node), kinds)


@contextmanager
def _types_told(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Has ``isinstance`` answer for traced values, in the code of these modules' classes.

    In the namespaces of their files, and of functions that these import, and in torch.is_tensor.
    PyTorch has to be told the truth in all else, and keeps what it finds among builtins for good.
    """
    spaces = _own_spaces(modules)
    values = [value for space in spaces for value in space.values()]
    spaces += [value.__globals__ for value in values if isinstance(value, FunctionType)]
    spaces = [space for space in spaces if not is_of_torch(space)]
    spaces.append(torch.is_tensor.__globals__)
    told = [space for space in spaces if "isinstance" not in space]
    for space in told:
        space["isinstance"] = _answer
    try:
        yield
    finally:
        for space in told:
            space.pop("isinstance", None)


def _own_spaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Namespaces of the files of these modules' classes, without PyTorch's."""
    classes = {kind for module in modules for kind in type(module).__mro__}
    files = {kind.__module__ for kind in classes}
    spaces = [vars(sys.modules[file]) for file in files if file in sys.modules]
    return [space for space in spaces if not is_of_torch(space)]


def is_of_torch(space: dict[str, Any]) -> bool:
    """Whether a namespace is that of a file of PyTorch, or of builtins."""
    return str(space.get("__name__")).split(".")[0] in ("torch", "builtins")


def _surroundings() -> tuple[object, ...]:
    """What context managers change, of which a trace would know nothing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    devices = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, *autocast


def _makers_of_a_tensor(path: str, module: nn.Module) -> set[str]:
    """Names of modules by which a call certainly returns a tensor; none if that is not certain.

    It is where the module is an activation function, or a sequence that ends with one.
    """
    names = {path}
    while type(module) is nn.Sequential and not is_observed(module):
        path, module = next(
            (f"{path}.{key}", child) for key, child in reversed(module._modules.items())
        )
        names.add(path)
    certain = function_of_module(module) not in (None, IDENTITY) and not is_observed(module)
    return names if certain else set()


@contextmanager
def _functions_whole(modules: Iterable[nn.Module], tracer: _Tracer) -> Iterator[None]:
    """Has functions in the files of these modules' classes be single steps of a trace.

    Those that are annotated to return a tensor: of others None may be asked, which a trace cannot
    tell.
    """
    replaced: list[tuple[dict[str, Any], str, FunctionType]] = []
    for space in _own_spaces(modules):
        replaced += [(space, name, value) for name, value in space.items() if _gives_tensor(value)]
    for space, name, function in replaced:
        space[name] = tracer.step_of(function)
    try:
        yield
    finally:
        for space, name, function in replaced:
            space[name] = function


def _gives_tensor(value: object) -> TypeGuard[FunctionType]:
    if not isinstance(value, FunctionType) or is_of_torch(value.__globals__):
        return False
    return value.__annotations__.get("return") in (Tensor, "Tensor", "torch.Tensor")


class _Tracer(fx.Tracer):
    """Takes all modules for one step, but for those to look into."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: frozenset[nn.Module], arguments: list[str], tensors: bool) -> None:
        super().__init__()
        self.inlined = inlined
        self._arguments = arguments
        self._tensors = tensors
        self._surroundings = _surroundings()
        self.asked = False
        self.makers: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Arguments without defaults alone: the others have their defaults in a trace."""
        values = [self.create_proxy("placeholder", name, (), {}) for name in self._arguments]
        return root_fn, [self.root, *values]

    def step_of(self, function: FunctionType) -> Callable[..., Any]:
        """What to call instead of a function, to have a step where it is called with a value."""

        def step(*args: Any, **kwargs: Any) -> Any:
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(value, fx.Proxy) for value in given):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return step

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise UntraceableError(
                "switches gradients or autocast, or computes under checkpointing"
            )
        return super().create_node(*args, **kwargs)

    def class_of(self, node: fx.Node) -> type:
        """What forward is told of the type of a value."""
        if node.op == "call_module":
            path = str(node.target)
            makers = _makers_of_a_tensor(path, self.root.get_submodule(path))
            if makers:
                self.makers |= makers
                return Tensor
        if node.op != "placeholder":
            raise UntraceableError(f"asks for the type of {node}")
        self.asked = True
        return Tensor if self._tensors else _Value


def _required_arguments(block: nn.Module) -> list[str]:
    """Names of the arguments without which forward cannot be called."""
    parameters = inspect.signature(block.forward).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise UntraceableError("needs an argument by keyword")
    return [p.name for p in required]


def _watched(kind: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """A subclass that notes which attributes are read, and refuses to have any set."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name not in _BOOKKEEPING and not name.startswith("__"):
                read.add(name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            raise UntraceableError(f"sets the attribute {name}")

    Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
    Watched.__module__ = kind.__module__
    return Watched


class _Before:
    """What a forward may change while it is traced, as it was before."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._class = type(block)
        self._modes = {module: module.training for module in block.modules()}
        self._random = random.getstate()
        self._torch_random = torch.get_rng_state()
        self._lists = {
            name: (value, list(value))
            for name, value in vars(block).items()
            if isinstance(value, list)
        }

    def refuse_changes(self) -> None:
        """Raises an error for what a repeated call of the trace would not do again."""
        for name, (value, items) in self._lists.items():
            if list(map(id, value)) != list(map(id, items)):
                raise UntraceableError(f"changes the list {name}")
        drawn = not torch.equal(torch.get_rng_state(), self._torch_random)
        if drawn or random.getstate() != self._random:
            raise UntraceableError("draws random numbers")

    def restore(self) -> None:
        """Puts everything back."""
        object.__setattr__(self._block, "__class__", self._class)
        for module, mode in self._modes.items():
            module.__dict__["training"] = mode
        for value, items in self._lists.values():
            value[:] = items
        random.setstate(self._random)
        torch.set_rng_state(self._torch_random)


def _graph(
    tracer: _Tracer, block: nn.Module, read: set[str], mode: tuple[bool, bool], whole: bool
) -> fx.Graph:
    """One trace.

    Args:
        tracer: what traces.
        block: the module whose forward is traced.
        read: takes names of attributes.
        mode: ``training`` of the block, and of all modules below it.
        whole: take functions of the block's file for one step.

    Raises:
        UntraceableError: there is none.
    """
    before = _Before(block)
    try:
        for module in block.modules():
            module.__dict__["training"] = mode[module is not block]
        object.__setattr__(block, "__class__", _watched(type(block), read))
        modules = (block, *tracer.inlined)
        functions = _functions_whole(modules, tracer) if whole else nullcontext()
        with _types_told(modules), functions:
            graph = tracer.trace(block)
        before.refuse_changes()
    except UntraceableError:
        raise
    except Exception as error:
        sentence = str(error).strip().split("\n")[0] or type(error).__name__
        raise UntraceableError(f"cannot be traced: {sentence}") from error
    finally:
        before.restore()
    for node in graph.nodes:
        node.type = None
    return graph


def _graph_under(
    condition: Condition,
    block: nn.Module,
    inlined: frozenset[nn.Module],
    arguments: list[str],
    read: set[str],
    whole: bool,
) -> tuple[fx.Graph, _Tracer]:
    """The graph under a condition, and what traced it."""
    training, tensors = condition
    tracers = []
    graphs = []
    for enabled, below in ((True, training), (False, not training)):
        with torch.set_grad_enabled(enabled):
            tracers.append(_Tracer(inlined, arguments, tensors))
            graphs.append(_graph(tracers[-1], block, read, (training, below), whole))
    if source_of(graphs[0]) != source_of(graphs[1]):
        raise UntraceableError(
            "depends on the mode of its children, or on whether gradients are enabled"
        )
    return graphs[0], tracers[0]


def trace(block: nn.Module, inlined: frozenset[nn.Module] = frozenset()) -> Trace:
    """Traces the forward of a block, once for each condition it may depend on.

    Args:
        block: the module whose forward is traced; its children are single steps.
        inlined: those of the modules below it whose steps become the block's own.

    Raises:
        UntraceableError: no trace stands for it, under no condition.
    """
    if isinstance(block, torch.jit.ScriptModule):
        raise UntraceableError("is TorchScript's")
    if "forward" in vars(block):
        raise UntraceableError("was replaced on the instance")
    arguments = _required_arguments(block)
    graphs: dict[Condition, fx.Graph] = {}
    read: set[str] = set()
    makers: set[str] = set()
    asked = False
    refused: list[str] = []
    for tensors in (True, False):
        for training in (True, False):
            condition = Condition(training, tensors)
            errors = []
            for whole in (False, True):
                try:
                    graph, tracer = _graph_under(condition, block, inlined, arguments, read, whole)
                except UntraceableError as error:
                    errors.append(str(error))
                else:
                    graphs[condition] = graph
                    asked = asked or tracer.asked
                    makers |= tracer.makers
                    break
            else:
                refused.append(errors[0])
        if not asked:
            break
    if not graphs:
        raise UntraceableError(refused[0])
    return Trace(graphs, len(arguments), frozenset(read), asked, frozenset(makers), refused)
