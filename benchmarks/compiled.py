"""Stock's batch norm as torch.compile makes it: a provider that takes long to prepare."""

from __future__ import annotations

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

# Every layer is compiled for itself, and its backward runs more than once.
torch._dynamo.config.recompile_limit = 1000
torch._dynamo.config.accumulated_recompile_limit = 1000
torch._functorch.config.donated_buffer = False

_batch_norm = torch.compile(F.batch_norm, dynamic=False)


class CompiledBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, which torch.compile leaves as it is, with its function compiled."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalises ``input`` (N, C, H, W)."""
        return _batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
