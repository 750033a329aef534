"""OpenAI's Agents SDK for JavaScript in Node, unmodified, talks with the real server over its websocket transport."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from .speech import SECONDS, WORDS, speech

HERE = Path(__file__).parent
RATE = 24000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node() -> str:
    path = shutil.which("node")
    if path is None or not (HERE / "node_modules").is_dir():
        pytest.skip("needs Node.js and its packages: npm ci --prefix tests/clients")
    return path


def test_a_realtime_session_converses_and_interrupts(node: str, server: str, tmp_path: Path) -> None:
    sound = tmp_path / "speech.pcm"
    speech(RATE).tofile(sound)
    url = f"{server.replace('http', 'ws')}/v1/realtime"
    ran = subprocess.run([node, "agents.mjs", url, sound], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    report: dict[str, Any] = json.loads(ran.stdout)

    assert report["errors"] == []
    assert set(report["types"]) == set(report["understood"])  # every message fits the client's schema of its type
    turn = ["history_added", "agent_start", "history_added", "audio_start", "audio_stopped", "agent_end"]
    assert report["events"] == [*turn, "audio_interrupted"] * 2
    seconds = np.array(report["audioBytes"]) / 2 / RATE
    assert seconds == pytest.approx([SECONDS] * 2, abs=1.0)
    assert 500 <= report["interrupted"] < 1000
    assert 0 < report["spokenOver"] < 3000

    said = [(item["role"], item["status"], item["content"][0]["transcript"]) for item in report["history"]]
    assert [(role, status) for role, status, _ in said] == [("user", "completed"), ("assistant", "completed")] * 2
    heard = [transcript for role, _, transcript in said if role == "user"]
    assert jiwer.wer([WORDS] * 2, heard) < 0.5
    assert report["deltas"] == "".join(heard)
