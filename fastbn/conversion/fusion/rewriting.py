"""Gives a module a class whose forward computes batch norm and activation as one.

The class is a subclass of the module's own, with another forward, and changes nothing else. It
goes with the module when that is copied or pickled. Called in a way that was not traced, it does
what its base does.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import logging
import re
from functools import cache
from types import ModuleType, new_class
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ...modules.activation_modules import is_observed
from .running import run_sequential
from .tracing import Condition

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from .tracing import Trace

_logger = logging.getLogger("fastbn")

_UNFUSED = "_fastbn_unfused_class"
_numbers = itertools.count()


class _ModuleName(NamedTuple):
    """A Python module among the names that a source uses: it pickles."""

    name: str


class _Source(NamedTuple):
    """The text of a function ``forward``, and what its global names stand for."""

    text: str
    names: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> _Source:
        code = graph.python_code("self")
        used = set(re.findall(r"\w+", code.src))
        names = {
            name: _ModuleName(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in code.globals.items()
            if name in used
        }
        return cls(code.src, tuple(names.items()))

    def function(self, owner: str) -> Callable[..., Any]:
        """The function, whose lines tracebacks can show."""
        file = f"<fused forward of {owner}, {next(_numbers)}>"
        lines = self.text.splitlines(keepends=True)
        linecache.cache[file] = (len(self.text), None, lines, file)
        namespace: dict[str, Any] = {
            name: importlib.import_module(value.name) if isinstance(value, _ModuleName) else value
            for name, value in self.names
        }
        exec(compile(self.text, file, "exec"), namespace)
        function: Callable[..., Any] = namespace["forward"]
        return function


class _Shape(NamedTuple):
    """What a traced module looked like.

    Attributes:
        path: from the block to the module.
        kind: its class.
        children: names of its children.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: tuple[str, ...]

    def is_still_that_of(self, block: nn.Module) -> bool:
        """Whether a trace of the module stands for what a call of it would do."""
        module: nn.Module | None = block
        for name in self.path:
            module = None if module is None else module._modules.get(name)
        return (
            module is not None
            and getattr(type(module), _UNFUSED, type(module)) is self.kind
            and tuple(module._modules) == self.children
            and not (self.path and is_observed(module))
        )


class _Recipe(NamedTuple):
    """All that a class is made from.

    Attributes:
        base: the module's own class.
        sources: the forward under each condition; none for a sequence, which needs no trace.
        arguments: how many arguments a call has that was traced.
        read: attributes whose change makes the traces wrong.
        asked: forward asks for the type of its arguments.
        shapes: what has to be as it was: modules whose steps are in the sources, and identities
            that are not called any more.
    """

    base: type[nn.Module]
    sources: tuple[tuple[Condition, _Source], ...] = ()
    arguments: int = 1
    read: frozenset[str] = frozenset()
    asked: bool = False
    shapes: tuple[_Shape, ...] = ()


def unfused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module had before; None for other modules."""
    kind: type[nn.Module] | None = vars(type(module)).get(_UNFUSED)
    return kind


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:  # noqa: A002
    return run_sequential(self._modules.values(), input)


def _traced_forward(recipe: _Recipe) -> Callable[..., Any]:
    base, _, arguments, _, asked, shapes = recipe
    functions = {}
    made: dict[_Source, Callable[..., Any]] = {}
    for condition, source in recipe.sources:
        if source not in made:
            made[source] = source.function(base.__qualname__)
        functions[condition] = made[source]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = not asked or all(isinstance(arg, Tensor) for arg in args)
        function = functions.get(Condition(self.training, tensors))
        if (
            function is None
            or kwargs
            or len(args) != arguments
            or not all(shape.is_still_that_of(self) for shape in shapes)
        ):
            return base.forward(self, *args, **kwargs)
        return function(self, *args)

    return forward


def _differ(old: object, new: object) -> bool:
    if old is new or (isinstance(old, nn.Module) and isinstance(new, nn.Module)):
        return False
    simple = (bool, int, float, str, tuple, type(None))
    return not (isinstance(old, simple) and isinstance(new, simple) and old == new)


@cache
def _class_of(recipe: _Recipe) -> type[nn.Module]:
    base, read = recipe.base, recipe.read

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = base.__reduce_ex__(self, protocol)
        function, arguments, *rest = reduced
        if arguments[:1] != (type(self),):
            return function, arguments, *rest  # it makes its class by itself
        return _restore, (recipe, *arguments[1:]), *rest

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name in read and _differ(getattr(self, name, None), value):
            _logger.info("fuse: undone in %s, whose forward depends on %s", base.__qualname__, name)
            self.__class__ = base
        base.__setattr__(self, name, value)

    forward = _traced_forward(recipe) if recipe.sources else _sequential_forward
    namespace = {
        _UNFUSED: base,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__reduce_ex__": reduce,
        "forward": forward,
    }
    if read:
        namespace["__setattr__"] = set_attribute

    def fill(body: dict[str, Any]) -> None:
        body.update(namespace)

    kind: type[nn.Module] = new_class(f"Fused{base.__name__}", (base,), exec_body=fill)
    return kind


def _restore(recipe: _Recipe, *arguments: Any) -> nn.Module:
    """A module that is being unpickled or copied, before it gets its state."""
    kind = _class_of(recipe)
    module: nn.Module = kind.__new__(kind, *arguments)
    return module


def rewrite_sequential(module: nn.Module) -> None:
    """Has an ``nn.Sequential`` call batch norms together with the activations after them."""
    module.__class__ = _class_of(_Recipe(type(module)))


def rewrite(module: nn.Module, trace: Trace, kept: set[str]) -> None:
    """Has a module's forward take the steps of a trace, whose graphs have been fused.

    What a sequence has, everybody may change, so its children have to be those of the trace.

    Args:
        module: the block that was traced.
        trace: its trace.
        kept: names of modules below it for which the trace stands as long as they stay as they are.
    """
    sources = tuple((condition, _Source.of(graph)) for condition, graph in trace.graphs.items())
    names = kept | {""} if isinstance(module, nn.Sequential) else kept
    shapes = tuple(_shape_of(module, name) for name in sorted(names))
    module.__class__ = _class_of(
        _Recipe(type(module), sources, trace.arguments, trace.read, trace.asked, shapes)
    )


def _shape_of(block: nn.Module, name: str) -> _Shape:
    module = block.get_submodule(name)
    kind = unfused_class(module) or type(module)
    return _Shape(tuple(name.split(".")) if name else (), kind, tuple(module._modules))


def unfuse(model: nn.Module) -> None:
    """Gives all modules of a model the classes that they had before they were fused."""
    for module in model.modules():
        kind = unfused_class(module)
        if kind is not None:
            module.__class__ = kind
