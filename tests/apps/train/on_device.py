"""What a training step may not do where it is captured as a CUDA graph."""

from __future__ import annotations

import traceback
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Device(TorchDispatchMode):
    """Notes the operations that a captured CUDA graph may not hold: they copy from the host, or wait for the device."""

    BAD = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.BAD:
            self.found.append(func.overloadpacket.__name__ + "".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))
