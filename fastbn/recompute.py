"""Memory for time: outputs that backward needs again are computed again instead of kept.

PyTorch lets hooks decide what a graph keeps of a tensor that an operation saves. Those of
:func:`recompute_activations` keep the recipe of a layer's output in the place of the output.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdRef

from .ops import operators

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(slots=True, eq=False)
class _Kept:
    """A tensor as it was saved, without its graph, which would hold the node that saves it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        return cls(tensor.detach(), tensor._version)

    def unpack(self) -> Tensor:
        """The tensor; refused in PyTorch's words, which checks no tensor that hooks have packed."""
        found = self.tensor._version
        if found != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {found}; expected version {self.version} instead. Hint: enable anomaly "
                "detection to find the operation that failed to compute its gradient, with "
                "torch.autograd.set_detect_anomaly(True, check_nan=False)."
            )
        return self.tensor


@dataclass(slots=True, eq=False)
class _Recipe:
    """How a layer's output is computed again.

    Attributes:
        inputs: x, residual, weight, bias, mean and invstd as batch_norm_act_apply takes them.
        training: of the forward that returned mean and invstd.
        activation: name and parameter.
        stream: that forward ran on; None on a CPU.
        y: the output, from when it is needed until the last who needs it lets go of the recipe.
    """

    inputs: tuple[_Kept | _View | None, ...]
    training: bool
    activation: tuple[str, float]
    stream: torch.cuda.Stream | None
    y: Tensor | None = field(default=None, init=False)

    def output(self) -> Tensor:
        """The output, ready on the current stream."""
        if self.y is None:
            self._follow()
        assert self.y is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.y.device)
            if current != self.stream:
                current.wait_stream(self.stream)
                self.y.record_stream(current)
        return self.y

    def _follow(self) -> None:
        """Computes the output, and before it those that it is computed from.

        Residuals of a network are a chain that may be longer than Python's stack.
        """
        pending = [self]
        while pending:
            recipe = pending[-1]
            sources = [given.recipe for given in recipe.inputs if isinstance(given, _View)]
            missing = [source for source in sources if source.y is None]
            if missing:
                pending += missing
                continue
            pending.pop()
            if recipe.y is not None:  # x and the residual were one tensor
                continue
            # Memory of inputs belongs to the stream of forward.
            with torch.no_grad(), torch.cuda.stream(recipe.stream):
                tensors = [None if given is None else given.unpack() for given in recipe.inputs]
                recipe.y = operators.batch_norm_act_apply(
                    *tensors, recipe.training, *recipe.activation
                )


@dataclass(slots=True, eq=False)
class _View:
    """A tensor that lies in a layer's output: the output itself, or a view of it."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, recipe: _Recipe) -> _View:
        return cls(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self) -> Tensor:
        """The tensor, in what is computed again."""
        return self.recipe.output().as_strided(self.size, self.stride, self.offset)


def _unpack(packed: _Kept | _View) -> Tensor:
    return packed.unpack()


def _storage_of(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Recorder:
    """Knows the outputs of layers that are alive, and has graphs keep their recipes instead."""

    def __init__(self) -> None:
        # By storage, since what is saved may be another tensor in it: the output, its version when
        # it was computed, and how it was.
        self._outputs: dict[int, tuple[WeakIdRef, int, _Recipe]] = {}
        # What the layer that is running has saved.
        self._saved: list[_Kept | _View] | None = None

    def batch_norm_act(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        activation: str,
        parameter: float,
    ) -> Tensor:
        """The operator of that name, whose output is known from then on."""
        statistics = (running_mean, running_var, num_batches_tracked)
        saved: list[_Kept | _View] = []
        self._saved = saved
        try:
            y: Tensor = operators.batch_norm_act(
                x,
                residual,
                weight,
                bias,
                *statistics,
                training,
                momentum,
                eps,
                activation,
                parameter,
            )
        finally:
            self._saved = None
        # Else there are no gradients, or what is saved goes to other hooks, as y will.
        if saved and type(y) is torch.Tensor:
            *_, mean, invstd = saved  # as autograd.cpp has them
            given = [None if t is None else self.pack(t) for t in (x, residual, weight, bias)]
            stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
            recipe = _Recipe((*given, mean, invstd), training, (activation, parameter), stream)
            self._remember(y, recipe)
        return y

    def _remember(self, y: Tensor, recipe: _Recipe) -> None:
        storage, outputs = _storage_of(y), self._outputs
        # The output goes before its storage does: no other is ever found at that address.
        reference = WeakIdRef(y, lambda _: outputs.pop(storage, None))
        outputs[storage] = (reference, y._version, recipe)

    def forget(self) -> None:
        """Lets go of all recipes but those that graphs keep."""
        self._outputs.clear()

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """What a graph keeps of a tensor that it saves."""
        recipe = self._recipe_of(tensor)
        packed = _Kept.of(tensor) if recipe is None else _View.of(tensor, recipe)
        if self._saved is not None:
            self._saved.append(packed)
        return packed

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        """That of the output whose memory the tensor has, unless that was written to since."""
        if not self._outputs or type(tensor) is not torch.Tensor:
            return None
        if tensor.layout is not torch.strided or tensor.is_nested:
            return None
        storage = _storage_of(tensor)
        reference, version, recipe = self._outputs.get(storage, (None, 0, None))
        if reference is None or tensor._version != version:
            return None
        y = reference()
        # It may have been given other memory, and the tensor may read the same as other numbers.
        if y is None or _storage_of(y) != storage or tensor.dtype != y.dtype or tensor.is_neg():
            return None
        return recipe


class _Active(threading.local):
    """The recorder of this thread: hooks are a thread's own, too."""

    recorder: _Recorder | None = None


active = _Active()


@contextmanager
def recompute_activations() -> Iterator[None]:
    """Keeps outputs of fused layers out of the graph; backward computes them again, bitwise.

    Forwards run inside; backward may run outside::

        with fastbn.recompute_activations():
            loss = criterion(model(images), labels)
        loss.backward()

    An operation that saves an output y of a fused layer, such as a convolution, keeps instead what
    y is computed from: x, which batch norm saves anyway, the residual, unless that is such an
    output itself, and values per channel. Fused layers are those of :func:`fastbn.batch_norm_act`:
    modules ``fastbn.BatchNormAct*``, those that :func:`fastbn.fuse` changed, and timm's that
    :func:`fastbn.convert` did. Each y is computed once in backward, which costs reading x and the
    residual and writing y; and lives until all that saved it have run backward.

    Contexts nest, go around checkpoints and ``DistributedDataParallel`` or inside them, and
    decorate functions. Kept as usual are

    - outputs of other layers, and of batch norm with neither an activation nor a residual;
    - what is made of y: a copy in autocast's dtype, if y has another, or y after a change in place;
    - all that is saved inside other hooks, such as those of a checkpoint or of
      ``torch.autograd.graph.save_on_cpu``: PyTorch uses the hooks entered last, and no others;
    - what code of ``torch.compile`` saves, which decides itself what to compute again.

    y may be changed in place after it was saved. Changes that PyTorch does not count, by ``y.data``
    or ``y.numpy()``, must not be made before: they are not seen. The transforms of ``torch.func``
    refuse to run inside any saved-tensor hooks, and so in here.

    Raises:
        RuntimeError: in backward, as PyTorch does, for a tensor that was modified by an in-place
            operation: one that was saved, or one that such a y is computed from (x, the residual,
            weight or bias).
    """
    if torch.compiler.is_compiling():
        yield
        return
    outer = active.recorder
    recorder = outer or _Recorder()
    active.recorder = recorder
    try:
        with saved_tensors_hooks(recorder.pack, _unpack):
            yield
    finally:
        active.recorder = outer
        if outer is None:
            recorder.forget()
