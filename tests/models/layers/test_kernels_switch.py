"""Where kernels serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from antiphon.models.layers import kernels


def test_kernels_serve_on_a_gpu_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_there", lambda: True)
    known = cast(Tensor, SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
    with torch.no_grad():
        assert kernels.use_kernels(known)
        assert not kernels.use_kernels(torch.zeros(1))
        assert not kernels.use_kernels(cast(Tensor, SimpleNamespace(is_cuda=True, dtype=torch.float64)))
        with kernels.plain():
            assert not kernels.use_kernels(known)
        assert kernels.use_kernels(known)
    with torch.enable_grad():
        assert not kernels.use_kernels(known)
