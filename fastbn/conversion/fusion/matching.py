"""Finds batch norm, addition and activation in the steps of a forward, and makes them one."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...activations import IDENTITY, Activation
from ...modules.activation_modules import function_of_module, is_observed
from ...modules.batchnorm import FastBatchNorm
from ...modules.foreign import FastTimmBatchNormAct, fused_activation
from ...modules.fused import FastBatchNormAct
from ..adapters import adapter_of
from .functions import function_of_call
from .running import norm_act
from .tracing import IN_PLACE_OPERATORS, is_of_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator


# Functions and methods that add, and whether they do in place.
_ADDITIONS: dict[tuple[str, object], bool] = {
    ("call_function", operator.add): False,
    ("call_function", operator.iadd): True,
    ("call_function", torch.add): False,
    ("call_method", "add"): False,
    ("call_method", "add_"): True,
}


def _is_addition(node: fx.Node) -> bool:
    return (node.op, node.target) in _ADDITIONS


def _adds_in_place(node: fx.Node) -> bool:
    return _ADDITIONS[node.op, node.target]


def own_activation(module: nn.Module) -> Activation | None:
    """What a batch norm computes after normalizing, by itself, once it is converted.

    Returns:
        The identity for a batch norm like stock's; None for what is not converted to a batch norm
        of fastbn's, or does something else after it.
    """
    adapter = adapter_of(type(module))
    if adapter is not None and adapter.reason_to_stay(module) is not None:
        return None
    kind = type(module) if adapter is None else adapter.counterpart
    if not issubclass(kind, FastBatchNorm):
        return None
    if issubclass(kind, FastTimmBatchNormAct):
        return fused_activation(module)
    if isinstance(module, FastBatchNormAct):
        return module._activation
    return IDENTITY if kind.forward is FastBatchNorm.forward else None


def is_norm(module: nn.Module) -> bool:
    """Whether it is, or is converted to, a batch norm that something may be fused to."""
    return own_activation(module) == IDENTITY


@dataclass(frozen=True)
class Site:
    """Steps of a forward that may become one.

    Attributes:
        start: the call whose result goes into the addition or activation: of a batch norm, or of a
            module that ends with one.
        addition: the addition, if any.
        addend: that of the things it adds which comes from the start.
        activation: the call of the activation.
        function: what the activation computes.
        skipped: calls of ``nn.Identity`` in between.
        obstacle: why they cannot be one; None if they can.
    """

    start: fx.Node
    addition: fx.Node | None
    addend: fx.Node
    activation: fx.Node
    function: Activation
    skipped: tuple[fx.Node, ...]
    obstacle: str | None = None

    @property
    def residual(self) -> fx.Node | None:
        """What is added, if anything."""
        if self.addition is None:
            return None
        first, second = self.addition.args
        residual = second if first is self.addend else first
        assert isinstance(residual, fx.Node)
        return residual

    @property
    def steps(self) -> list[fx.Node]:
        """All of the steps, the first one first."""
        middle = [*self.skipped] if self.addition is None else [*self.skipped, self.addition]
        return [self.start, *sorted(middle), self.activation]


class Steps:
    """The steps of a block's forward, with the modules they call.

    Attributes:
        graph: the steps.
    """

    def __init__(
        self, graph: fx.Graph, block: nn.Module, ends: Container[nn.Module] = frozenset()
    ) -> None:
        """Of a block, with those of the modules it calls that end with a batch norm."""
        self.graph = graph
        self._block = block
        self._ends = ends

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a step calls with one value and nothing else; None for other steps."""
        values = node.all_input_nodes
        if node.op != "call_module" or len(values) != 1 or node.args != (values[0],) or node.kwargs:
            return None
        return self._block.get_submodule(str(node.target))

    def calls(self, wanted: Callable[[nn.Module], bool]) -> Iterator[fx.Node]:
        """The steps that call a module of some kind."""
        for node in self.graph.nodes:
            module = self.module(node)
            if module is not None and wanted(module):
                yield node

    def result(self) -> fx.Node | None:
        """The step whose value forward returns, through ``nn.Identity``; None for several."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        node = output.args[0]
        while isinstance(node, fx.Node) and self._is_identity(node):
            node = node.args[0]
        return node if isinstance(node, fx.Node) else None

    def _is_identity(self, node: fx.Node) -> bool:
        module = self.module(node)
        return type(module) is nn.Identity and not is_observed(module)

    def _activation(self, node: fx.Node) -> Activation | None:
        module = self.module(node)
        function = function_of_call(node) if module is None else function_of_module(module)
        return None if function == IDENTITY else function

    def site(self, start: fx.Node) -> Site | None:
        """The activation, or addition and activation, after a step; None if others follow."""
        skipped: list[fx.Node] = []
        addend = last = self._pass_identities(start, skipped)
        addition = None
        if not any(self._activation(user) for user in last.users):
            addition = next(filter(_is_addition, last.users), None)
            if addition is not None:
                last = self._pass_identities(addition, skipped)
        activation = next((user for user in last.users if self._activation(user)), None)
        function = None if activation is None else self._activation(activation)
        if activation is None or function is None:
            return None
        site = Site(start, addition, addend, activation, function, tuple(skipped))
        return replace(site, obstacle=self._obstacle(site))

    def _pass_identities(self, node: fx.Node, skipped: list[fx.Node]) -> fx.Node:
        while len(node.users) == 1 and self._is_identity(next(iter(node.users))):
            node = next(iter(node.users))
            skipped.append(node)
        return node

    def _obstacle(self, site: Site) -> str | None:
        """Why a site cannot be one step."""
        for node in site.steps[:-1]:
            if len(node.users) > 1:
                what = "the sum" if node is site.addition else "its output"
                return f"{what} is used {len(node.users)} times"
        norm, activation = self.module(site.start), self.module(site.activation)
        if norm is not None and is_observed(norm):
            return "hooks on it, or a forward of its own, would meet the activation's result"
        if activation is not None and is_observed(activation):
            return f"there are hooks on the activation {site.activation.target}"
        if site.addition is None:
            return None
        if not _adds_two_tensors(site.addition):
            return "what is added to its output is not a tensor, or is scaled"
        residual = site.residual
        assert residual is not None
        into_residual = _adds_in_place(site.addition) and site.addition.args[0] is residual
        if into_residual and not self._is_new(residual):
            return "it is added to another tensor in place, which may be in use elsewhere"
        # The one step comes where both its inputs are there: batch norm is called that much later,
        # and the addition that much earlier. What happens in between may not be seen. Backward
        # needs the residual, which it does not need of an addition.
        inputs = self._aliases(site.start.all_input_nodes)
        residuals = self._aliases([residual], without=site.steps)
        for node in self.graph.nodes:
            if node <= site.start or node in site.steps:
                continue
            touched = residuals if residual < node else inputs
            if not touched.isdisjoint(node.all_input_nodes) and self._may_change_its_inputs(node):
                when = "in between" if node < site.addition else "before backward"
                return f"{node} may change its input or the residual {when}"
            if node < site.addition and node.target == site.start.target:
                return "it is called again before the addition"
        return None

    def _aliases(self, nodes: Iterable[fx.Node], without: Container[fx.Node] = ()) -> set[fx.Node]:
        """All steps whose values may share memory with those of some, but for those left out."""
        found: set[fx.Node] = set()
        left = list(nodes)
        while left:
            node = left.pop()
            if node in found or node in without:
                continue
            found.add(node)
            if not self._makes_memory(node):
                left += node.all_input_nodes
            left += [user for user in node.users if not self._makes_memory(user)]
        return found

    def _makes_memory(self, node: fx.Node) -> bool:
        """Whether a step's value certainly shares no memory with what it takes."""
        if node.op == "call_module":
            module = self._block.get_submodule(str(node.target))
            known = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm))
            return known or module in self._ends
        return _is_addition(node) and not _adds_in_place(node)

    def _may_change_its_inputs(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            called = self._block.get_submodule(str(node.target))
            return any(getattr(module, "inplace", False) for module in called.modules())
        if isinstance(node.target, FunctionType) and not is_of_torch(node.target.__globals__):
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or name in IN_PLACE_OPERATORS
        return in_place or any(node.kwargs.get(key) for key in ("inplace", "out"))

    def _is_new(self, node: fx.Node) -> bool:
        """Whether a value is a tensor that was made for one user alone.

        What a module makes may be the tensor that it was given.
        """
        if len(node.users) > 1 or node.op == "placeholder":
            return False
        module = self.module(node)
        if module is None:
            return _is_addition(node)
        ends_with_norm = is_norm(module) or module in self._ends
        return ends_with_norm or self._is_new(node.all_input_nodes[0])

    def fuse(self, site: Site) -> None:
        """Makes one step of a site, whose start is the call of a batch norm."""
        residual = site.residual
        anchor = site.start if residual is None else max(site.start, residual)
        with self.graph.inserting_before(anchor.next):
            norm = self.graph.get_attr(str(site.start.target))
            activation: fx.Node | Activation = site.function
            if site.activation.op == "call_module":
                activation = self.graph.get_attr(str(site.activation.target))
            arguments = [norm, site.start.args[0], residual, activation]
            if site.addition is not None and _adds_in_place(site.addition):
                arguments.append(True)
            fused = self.graph.call_function(norm_act, tuple(arguments))
        site.activation.replace_all_uses_with(fused)
        for node in reversed(site.steps):
            self.graph.erase_node(node)


def _adds_two_tensors(addition: fx.Node) -> bool:
    both = len(addition.args) == 2 and all(isinstance(arg, fx.Node) for arg in addition.args)
    return both and not addition.kwargs and addition.args[0] is not addition.args[1]
