"""What the versions of stock that fastbn runs beside do not have in common."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.nn import functional as F


def _takes_eps_zero() -> bool:
    try:
        F.batch_norm(torch.ones(2, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError:
        return False
    return True


# The constructors can leave out the bias alone.
TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters
# Eval may have no eps; where it must have, whatever is wrong with eps has other words, too.
TAKES_EPS_ZERO = _takes_eps_zero()
