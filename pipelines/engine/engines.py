"""Several engines as one: models of the GPU, and those that step on the CPU, behind the interface that sessions use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

from ...models.streaming import StreamingModel
from .engine import Engine
from .lease import Lease
from .metrics import prometheus


class Engines:
    """Engines side by side; a model is found by its name, in the first engine that has it.

        engine = Engines(gpu := Engine("cuda"), cpu := Engine("cpu"))
        gpu.add("asr", ...)
        cpu.add("vad", ...)

    Closing it closes all of them.
    """

    def __init__(self, *engines: Engine) -> None:
        if not engines:
            raise ValueError("Engines() needs at least one engine")
        self.engines = engines

    def model(self, name: str) -> StreamingModel:
        """The model added under this name. Raises ValueError."""
        return self._having(name).model(name)

    async def open(self, name: str, variant: Hashable = None, *, paced: bool = True) -> Lease:
        """See ``Engine.open``."""
        return await self._having(name).open(name, variant, paced=paced)

    async def open_together(self, names: Sequence[str], *, paced: bool = True) -> list[Lease]:
        """See ``Engine``; of models that one engine has."""
        return await self._having(names[0]).open_together(names, paced=paced)

    def open_sync(self, name: str, variant: Hashable = None, *, paced: bool = False) -> Lease:
        """See ``Engine.open_sync``."""
        return self._having(name).open_sync(name, variant, paced=paced)

    def metrics(self) -> dict[str, Any]:
        """As ``Engine.metrics``: the models of all, their counts added up, utilisation and load of the fullest."""
        each = [engine.metrics() for engine in self.engines]
        counts: Counter[str] = Counter()
        shed: Counter[str] = Counter()
        for one in each:
            counts.update(one["counts"])
            shed.update(one["shed"])
        return {
            "utilisation": max(one["utilisation"] for one in each),
            "load": max(one["load"] for one in each),
            "counts": dict(counts),
            "shed": dict(shed),
            "models": {name: model for one in reversed(each) for name, model in one["models"].items()},
        }

    def metrics_text(self) -> str:
        """``metrics`` in the Prometheus text format."""
        return prometheus(self.metrics())

    def close(self) -> None:
        """Stop all. May be called twice."""
        for engine in self.engines:
            engine.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _having(self, name: str) -> Engine:
        for engine in self.engines:
            with suppress(ValueError):
                engine.model(name)
                return engine
        known = sorted({name for engine in self.engines for name in engine.metrics()["models"]})
        raise ValueError(f"no model named {name!r} was added; there are {known}")
