"""What a step must at least take: its bytes, its operations and its launches at a device's measured rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .references import synchronize

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def floor_of(bytes_: float, flop: float, launches: int, launch: float, bandwidth: float, rate: float) -> dict[str, Any]:
    """Milliseconds of each part, and of the larger of bytes and operations. launch: seconds; bandwidth: bytes a second;
    rate: operations a second."""
    parts = {"bytes": bytes_ / bandwidth, "operations": flop / rate, "launches": launches * launch}
    return {
        "launches": launches,
        "launch_us": round(launch * 1e6, 3),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "gflop_s": round(rate / 1e9, 1),
        "ms": {name: round(value * 1e3, 3) for name, value in parts.items()},
        "floor_ms": round(max(parts["bytes"], parts["operations"]) * 1e3, 3),
    }


class Operations(TorchDispatchMode):
    """Counts operations that fill or change a tensor: no views, and no allocations, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, (tuple, list)) and made else made
        if _plain(first) and func.__name__.partition(".")[0] not in ALLOCATIONS:
            given = {one.untyped_storage().data_ptr() for one in args if _plain(one)}
            if func._schema.is_mutable or first.untyped_storage().data_ptr() not in given:
                self.counts[func.__name__] += 1
        return made


def _plain(value: Any) -> bool:
    """Whether it is a tensor with memory of its own layout: packed weights have none."""
    return isinstance(value, Tensor) and not value.is_mkldnn


def launch_seconds(device: torch.device, count: int = 1000) -> float:
    """Seconds of one small operation: in a captured graph on CUDA, called from Python elsewhere."""
    small = torch.zeros(16, device=device)

    def work() -> None:
        for _ in range(count):
            small.add_(1)

    if device.type == "cuda":
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        run: Callable[[], None] = graph.replay
    else:
        run = work
    seconds = []
    for _ in range(4):
        begin = synchronize(device)
        run()
        seconds.append(synchronize(device) - begin)
    return min(seconds) / count


def launches_of(step: Callable[[], object], device: torch.device) -> int:
    """Launches of a step: its kernels on CUDA, elsewhere its operations, each of which is at least one."""
    if device.type == "cuda":
        step()  # compiles and tunes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize(device)
        return int(sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0))
    with Operations() as operations:
        step()
    return sum(operations.counts.values())
