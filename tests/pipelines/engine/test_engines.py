"""Several engines behind one interface."""

from __future__ import annotations

import asyncio

import pytest
from toy_models import Null

from antiphon.pipelines.engine import Closed, Engine
from antiphon.pipelines.engine.engines import Engines


def test_models_are_found_by_name_and_closing_closes_all() -> None:
    async def main() -> None:
        first, second = Engine(), Engine()
        model, other = Null(), Null()
        first.add("a", model, slots=2)
        second.add("b", other, slots=3)
        second.add("a", Null(), slots=1)
        with Engines(first, second) as engines:
            assert engines.model("a") is model
            assert engines.model("b") is other
            lease = await engines.open("b")
            sync = engines.open_sync("a")
            assert (lease.store.slots, sync.store.slots) == (3, 2)
            metrics = engines.metrics()
            assert {name: (one["slots"], one["used"]) for name, one in metrics["models"].items()} == {
                "a": (2, 1), "b": (3, 1)
            }  # fmt: skip
            assert metrics["counts"]["admitted"] == 2
            assert metrics["utilisation"] == max(first.metrics()["utilisation"], second.metrics()["utilisation"])
            assert 'antiphon_model_slots{model="b"} 3' in engines.metrics_text()
            with pytest.raises(ValueError, match=r"no model named 'c' was added; there are \['a', 'b'\]"):
                engines.model("c")
        for engine in (first, second):
            with pytest.raises(Closed):
                await engine.open("a")

    asyncio.run(main())
    with pytest.raises(ValueError, match="at least one"):
        Engines()
