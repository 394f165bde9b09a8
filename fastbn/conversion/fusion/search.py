"""Searches a model for batch norms that an activation follows, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ...modules.activation_modules import is_observed
from .matching import Site, Steps, is_norm, own_activation
from .report import Fusion, FusionReport
from .tracing import Trace, UntraceableError, trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx


class Block(NamedTuple):
    """A module whose forward is to be rewritten.

    Attributes:
        module: the module.
        trace: its steps, already fused; None for a sequence that needs none.
        kept: names, relative to it, of modules below it that have to stay as they are: whose steps
            are among these, whose classes tell what these are of, and identities that are left out.
    """

    module: nn.Module
    trace: Trace | None
    kept: set[str]


def _is_sequence(module: nn.Module) -> bool:
    """Whether it calls its children in turn and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_holder(module: nn.Module) -> bool:
    """Whether it has no forward: whoever has it calls its children."""
    return type(module).forward is nn.Module.forward


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


class Search:
    """Looks through a model, and changes nothing in it.

    Attributes:
        report: what was found.
        blocks: what has to be rewritten.
    """

    def __init__(self, model: nn.Module) -> None:
        self.report = FusionReport()
        self.blocks: list[Block] = []
        # Modules that end with a batch norm, and its name relative to them.
        self._ends: dict[nn.Module, str] = {}
        modules = dict(model.named_modules())
        self._norms = [name for name, module in modules.items() if is_norm(module)]
        for name, module in reversed(modules.items()):  # children before those who call them
            has_norm = any(norm.startswith(f"{name}." if name else "") for norm in self._norms)
            if has_norm and not is_norm(module) and not _is_holder(module):
                self._visit(name, module)
            elif not is_norm(module) and (own := own_activation(module)) is not None:
                self.report.fused[name] = Fusion(own.name, residual=False)
        fused, left = self.report.fused, self.report.left
        self.report.fused = {name: fused[name] for name in modules if name in fused}
        self.report.left = {
            name: left[name] for name in modules if name in left and name not in fused
        }

    def _visit(self, name: str, block: nn.Module) -> None:
        """Looks at what one module does with its children."""
        try:
            found, inlined = self._trace(block)
        except UntraceableError as error:
            self._leave_norms_of(name, block, f"the forward of {type(block).__name__} {error}")
            return
        end = self._end(block, found)
        if end is not None:
            self._ends[block] = end
        kept = {path for path, module in block.named_modules() if module in inlined}
        kept |= found.makers
        for condition, graph in list(found.graphs.items()):
            sites = self._fuse(name, self._steps(graph, block))
            kept.update(str(node.target) for site in sites for node in site.skipped)
            if not sites:
                del found.graphs[condition]
        if found.graphs:
            walked = _is_sequence(block) and not inlined
            self.blocks.append(Block(block, None if walked else found, kept))
        if found.refused:
            reason = f"the forward of {type(block).__name__} {found.refused[0]}"
            self._leave_norms_of(name, block, reason)

    def _leave_norms_of(self, name: str, block: nn.Module, reason: str) -> None:
        """Reports the batch norms that a block calls as left, where nothing else is known."""
        for child_name, child in block.named_children():
            path = _join(name, child_name)
            if is_norm(child):
                self.report.left.setdefault(path, reason)
            elif _is_holder(child):
                self._leave_norms_of(path, child, reason)

    def _trace(self, block: nn.Module) -> tuple[Trace, frozenset[nn.Module]]:
        """A block's steps, with those of modules that end with a batch norm to be fused."""
        inlined: frozenset[nn.Module] = frozenset()
        found = trace(block)
        while True:
            more = {
                block.get_submodule(str(site.start.target))
                for graph in found.graphs.values()
                for site in self._sites(self._steps(graph, block))
                if site.obstacle is None
            }
            more = {module for module in more if module in self._ends}
            if not more:
                return found, inlined
            try:
                found = trace(block, inlined | more)
            except UntraceableError:
                return found, inlined
            inlined |= more

    def _steps(self, graph: fx.Graph, block: nn.Module) -> Steps:
        return Steps(graph, block, self._ends)

    def _sites(self, steps: Steps) -> Iterator[Site]:
        """Where activations follow a batch norm, or a module that ends with one.

        Of two things that are added, one takes the other as its residual: a batch norm that the
        block calls itself before the end of another module, and then the later one.
        """
        starts = [*steps.calls(self._ends.__contains__), *steps.calls(is_norm)]
        sites = [site for site in map(steps.site, reversed(starts)) if site is not None]
        taken = set()
        for site in sorted(sites, key=lambda site: site.obstacle is not None):
            if site.activation not in taken:
                taken.add(site.activation)
                yield site

    def _end(self, block: nn.Module, found: Trace) -> str | None:
        """The name of the batch norm whose result the block returns, if that is certain."""
        if not found.is_certain() or is_observed(block):
            return None
        steps = self._steps(next(iter(found.graphs.values())), block)
        result = steps.result()
        module = None if result is None else steps.module(result)
        if result is None or module is None or not (is_norm(module) or module in self._ends):
            return None
        return _join(str(result.target), self._ends.get(module, ""))

    def _fuse(self, name: str, steps: Steps) -> list[Site]:
        """Fuses the steps of a block, and reports; returns what was fused."""
        fused = []
        for site in self._sites(steps):
            module = steps.module(site.start)
            norm = _join(name, str(site.start.target))
            if module in self._ends:
                reason = "it ends a module that cannot be traced together with what follows"
                norm = _join(norm, self._ends[module])
                self.report.left.setdefault(norm, site.obstacle or reason)
            elif site.obstacle is not None:
                self.report.left[norm] = site.obstacle
            else:
                self.report.fused[norm] = Fusion(site.function.name, site.addition is not None)
                steps.fuse(site)
                fused.append(site)
        return fused
