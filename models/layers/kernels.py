"""When Triton kernels do the work of a streaming step; the environment variable ``ANTIPHON_KERNELS=0`` is never."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor

_plain = ContextVar("plain", default=False)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


def use_kernels(x: Tensor) -> bool:
    """Whether kernels without gradients serve for ``x``: on a GPU, in a dtype that they know, where Triton is.

    Not under autocast: torch then chooses the dtype of products, which a kernel's neighbours must share.
    """
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return x.dtype in _DTYPES and _there() and not _plain.get()


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether ``x [..., d]`` has so few rows that a kernel of their own multiplies them by weights like this one."""
    if x.dtype != weight.dtype or not x.numel() or not use_kernels(x):
        return False
    from . import triton_few, triton_thin

    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if x.dtype.itemsize == 2:
        return rows <= triton_thin.FEW
    return x.dtype == torch.float32 and rows <= triton_few.FEW and width <= triton_few.LONGEST


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Without them, for what counts torch's own operations."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@functools.cache
def _there() -> bool:
    return os.environ.get("ANTIPHON_KERNELS") != "0" and find_spec("triton") is not None
