"""The graph's own cost, beside plain queues in the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antiphon.apps.bench import common, runtime


@pytest.mark.slow
def test_six_stages_at_200_sessions_cost_little_more_than_plain_queues() -> None:
    numbers = runtime.run(sessions=200, seconds=1.0, repeats=3, write=False)
    ours = min(one["cpu_us_per_chunk"] for one in numbers["antiphon"]["runs"])
    plain = min(one["cpu_us_per_chunk"] for one in numbers["asyncio_queue"]["runs"])
    # 50 us on a machine of its own; on a shared one both kinds slow down alike.
    assert ours <= 50 or ours <= 2 * plain


def test_a_result_says_where_when_and_how(tmp_path: Path) -> None:
    path = common.write_result("trial", "antiphon bench trial", {"answer": 42}, tmp_path)
    result = json.loads(path.read_text())
    assert result["numbers"] == {"answer": 42}
    assert result["command"] == "antiphon bench trial"
    assert {"cpu", "cores", "python", "numpy", "system"} <= result["machine"].keys()
    assert result["date"].endswith("+00:00")
