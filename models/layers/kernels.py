"""When Triton kernels do the work of a streaming step; the environment variable ``ANTIPHON_KERNELS=0`` is never."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(x: Tensor) -> bool:
    """Whether kernels without gradients serve for ``x``: on a GPU, in a dtype that they know, where Triton is."""
    return x.is_cuda and not torch.is_grad_enabled() and x.dtype in _DTYPES and _there()


@functools.cache
def _there() -> bool:
    return os.environ.get("ANTIPHON_KERNELS") != "0" and find_spec("triton") is not None
