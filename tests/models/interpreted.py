"""Where tests of kernels run: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

INTERPRETED = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton's interpreter needs the package triton and a process without a GPU",
)
HERE = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
