"""What the engine measures of itself: step times per bucket, occupancy, lateness, as numbers and as Prometheus text.

Windows are fixed numpy rings: bounded, cheap to write from the engine's thread and safe to read from another.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SMOOTHING = 0.1  # weight of the newest step in the moving average


class Window:
    """The last ``size`` values, how many there ever were, and the largest of all."""

    def __init__(self, size: int = 512) -> None:
        self._values = np.zeros(size)
        self.count = 0
        self.max = -math.inf

    def add(self, value: float) -> None:
        """Record one value."""
        self._values[self.count % len(self._values)] = value
        self.count += 1
        if value > self.max:
            self.max = value

    def extend(self, values: Sequence[float]) -> None:
        """Record several values; of more than fit, the last."""
        if not values:
            return
        size = len(self._values)
        kept = values[-size:]
        start = (self.count + len(values) - len(kept)) % size
        first = min(len(kept), size - start)
        self._values[start : start + first] = kept[:first]
        self._values[: len(kept) - first] = kept[first:]
        self.count += len(values)
        self.max = max(self.max, float(max(values)))

    def quantile(self, q: float) -> float:
        """The ``q`` quantile of the window; 0 when nothing was recorded."""
        filled = min(self.count, len(self._values))
        return float(np.quantile(self._values[:filled], q)) if filled else 0.0


class StepTimes:
    """Seconds of one bucket's steps (of one slice, where a model has slices)."""

    def __init__(self) -> None:
        self.window = Window()
        self.ewma = 0.0

    def add(self, seconds: float) -> None:
        """Record one step."""
        self.ewma = seconds if self.window.count == 0 else self.ewma + SMOOTHING * (seconds - self.ewma)
        self.window.add(seconds)

    def summary(self) -> dict[str, float]:
        """Median, p99, moving average (seconds) and count."""
        quantile = self.window.quantile
        return {"median": quantile(0.5), "p99": quantile(0.99), "ewma": self.ewma, "count": self.window.count}


class LaneMetrics:
    """Measurements of one model and variant."""

    def __init__(self, buckets: Sequence[int]) -> None:
        self.steps: dict[int, StepTimes] = {bucket: StepTimes() for bucket in buckets}
        self.lateness = Window(4096)  # seconds from deadline to result; negative is early
        self.batches = 0
        self.rows = 0
        self.padded_rows = 0
        self.late = 0

    def finished(self, rows: int, bucket: int, lateness: Sequence[float]) -> None:
        """A batch came out: its rows, its bucket, and the lateness of the rows that had a deadline."""
        self.batches += 1
        self.rows += rows
        self.padded_rows += bucket
        self.lateness.extend(lateness)
        self.late += int(np.count_nonzero(np.asarray(lateness) > 0))

    def summary(self) -> dict[str, Any]:
        """Plain numbers, seconds where they are times."""
        late = self.lateness
        return {
            "steps": {bucket: times.summary() for bucket, times in self.steps.items() if times.window.count},
            "batches": self.batches,
            "rows": self.rows,
            "occupancy": self.rows / self.padded_rows if self.padded_rows else 0.0,
            "lateness": {
                "p50": late.quantile(0.5),
                "p99": late.quantile(0.99),
                "max": late.max if late.count else 0.0,
                "late": self.late,
                "count": late.count,
            },
        }


def prometheus(metrics: Mapping[str, Any]) -> str:
    """``Engine.metrics()`` in the Prometheus text format."""
    lines: list[str] = []
    seen: set[str] = set()
    for name, kind, labels, value in _samples(metrics):
        if name not in seen:
            seen.add(name)
            lines.append(f"# TYPE antiphon_{name} {kind}")
        text = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
        lines.append(f"antiphon_{name}{{{text}}} {value:g}" if text else f"antiphon_{name} {value:g}")
    return "\n".join(lines) + "\n"


def _samples(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Hashable], float]]:
    """Name, type, labels and value, all samples of a name together."""
    for name in ("utilisation", "load"):
        yield f"engine_{name}", "gauge", {}, metrics[name]
    for event, count in metrics["counts"].items():
        yield "engine_events_total", "counter", {"event": event}, count
    for measure, count in metrics["shed"].items():
        yield "engine_shed_total", "counter", {"measure": measure}, count
    models = metrics["models"]
    for name, key in (("slots", "slots"), ("slots_used", "used"), ("state_bytes", "bytes")):
        for model, values in models.items():
            yield f"model_{name}", "gauge", {"model": model}, values[key]
    lanes = [
        ({"model": model, "variant": variant}, lane)
        for model, values in models.items()
        for variant, lane in values["variants"].items()
    ]
    for name, kind in (("sessions", "gauge"), ("depth", "gauge"), ("occupancy", "gauge"), ("rows", "counter")):
        for labels, lane in lanes:
            yield f"lane_{name}" + ("_total" if kind == "counter" else ""), kind, labels, lane[name]
    for labels, lane in lanes:
        for quantile in ("p50", "p99", "max"):
            yield "lane_lateness_seconds", "gauge", {**labels, "quantile": quantile}, lane["lateness"][quantile]
    for labels, lane in lanes:
        for bucket, times in lane["steps"].items():
            for quantile in ("median", "p99"):
                yield "step_seconds", "gauge", {**labels, "bucket": bucket, "quantile": quantile}, times[quantile]


def _escape(label: Hashable) -> str:
    return str(label).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
