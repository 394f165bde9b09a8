"""Which layer a batch norm follows, and whether the two could be one."""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from .fusion.rewriting import unfused_class

if TYPE_CHECKING:
    from collections.abc import Callable


class Before(NamedTuple):
    """What stands in front of a module.

    Attributes:
        layer: name of the module that every call of this one gets a result of, where no result of
            that goes anywhere else; None if there is none.
        reason: why there is none.
    """

    layer: str | None
    reason: str = ""


def layers_before(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> dict[str, Before]:
    """What stands in front of each chosen module of a model, by name.

    The chosen are leaves of the trace: what they do inside is not looked at.
    """
    names = [name for name, module in model.named_modules() if chosen(module)]
    try:
        graphs = _traces(model, chosen)
    except Exception as error:  # of any kind, as forwards run on what is no tensor
        first_line = next(iter(str(error).splitlines()), "")
        fallback = _in_sequences(model)
        untraced = Before(
            None,
            "it follows nothing in an nn.Sequential, and the model does not trace "
            f"({type(error).__name__}: {first_line})",
        )
        return {name: fallback.get(name, untraced) for name in names}
    return {name: _in_all([_in_graph(name, graph) for graph in graphs]) for name in names}


class _Tracer(fx.Tracer):
    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """The chosen ones, and those of PyTorch."""
        return self._leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _traces(model: nn.Module, leaf: Callable[[nn.Module], bool]) -> list[fx.Graph]:
    """Forward with all arguments and, where some may be left out, without these.

    A trace takes what it is given for not None, so code that asks for that has two ways.
    """
    # Forwards may leave what is no tensor in the model. The copy has the same parameters.
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    model = copy.deepcopy(model, shared)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    graphs = [_Tracer(leaf).trace(model)]
    if defaults:
        graphs.append(_Tracer(leaf).trace(model, concrete_args=defaults))
    return graphs


def _in_graph(name: str, graph: fx.Graph) -> Before:
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    read = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target].append(node)
        elif node.op == "get_attr":
            read.add(node.target.rpartition(".")[0])
    if not calls[name]:
        return Before(None, "forward does not call it")
    inputs = [_first_input(node) for node in calls[name]]
    layers = {node.target if node and node.op == "call_module" else None for node in inputs}
    layer = layers.pop()
    if layer is None or layers:
        return Before(None, "it does not follow one module alone")
    if set(calls[layer]) != set(inputs) or any(len(node.users) != 1 for node in calls[layer]):
        return Before(None, f"it is not the only one that gets results of {layer}")
    if {name, layer} & read:
        return Before(None, f"parameters of it or of {layer} are read by others")
    return Before(str(layer))


def _first_input(call: fx.Node) -> fx.Node | None:
    """What a module is called with; None where that is no node or something else beside."""
    first, *others = (*call.args, *call.kwargs.values()) or (None,)
    return first if isinstance(first, fx.Node) and first not in others and call.args else None


def _in_all(found: list[Before]) -> Before:
    first, *others = found
    if any(other.layer != first.layer for other in others):
        return Before(None, "what it follows depends on which arguments forward gets")
    return first


def _in_sequences(model: nn.Module) -> dict[str, Before]:
    """Of children of sequences, whose forward is known, that are nowhere else in the model."""
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    found = {}
    for path, parent in model.named_modules():
        kind = unfused_class(parent) or type(parent)
        if kind.forward is not nn.Sequential.forward:
            continue
        prefix = f"{path}." if path else ""
        for (name, child), (next_name, next_child) in pairwise(parent._modules.items()):
            if places[id(child)] == places[id(next_child)] == 1:
                found[prefix + next_name] = Before(prefix + name)
    return found
