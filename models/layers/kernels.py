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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(x: Tensor) -> bool:
    """Whether kernels without gradients serve for ``x``: on a GPU, in a dtype that they know, where Triton is.

    Not under autocast: torch then chooses the dtype of products, which a kernel's neighbours must share.
    """
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return x.dtype in _DTYPES and _there() and not _plain.get()


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
