"""The turn model's step around a stand-in for its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antiphon.codecs.whisper_mel import WhisperMel
from antiphon.pipelines import smart_turn
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.smart_turn import HEARD, SmartTurn


class Network:
    """Answers with the mean of the features."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        self.calls += 1
        assert inputs["input_features"].shape == (1, 80, 800)
        return [inputs["input_features"].mean((1, 2)).reshape(1, 1)]


def test_each_row_is_judged_alone_and_padding_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    monkeypatch.setattr(smart_turn, "open_session", lambda path, providers: network)
    sounds = np.random.default_rng(0).standard_normal((3, HEARD)).astype(np.float32) * [[0.1], [1], [1]]
    sounds[1, : HEARD // 2] = 0
    sounds = sounds.astype(np.float32)
    expected = [WhisperMel()(torch.from_numpy(pcm)[None]).mean().item() for pcm in sounds]
    with Engine(inline=True) as engine:
        engine.add("judge", SmartTurn("none.onnx"), slots=3)
        leases = [engine.open_sync("judge") for _ in sounds]
        before = network.calls
        rows = engine.run_sync([(lease, {"pcm": pcm}) for lease, pcm in zip(leases, sounds, strict=True)])
        assert network.calls == before + 3
        leases[0].restore(leases[0].pack(leases[1].snapshot_sync()))
    assert [row["finished"].item() for row in rows] == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected}) == 3


def test_loudness_and_an_offset_do_not_matter() -> None:
    pcm = torch.randn(1, HEARD, generator=torch.Generator().manual_seed(0)) * 0.1
    mel = WhisperMel()
    torch.testing.assert_close(mel(pcm * 3 + 0.2), mel(pcm), atol=1e-3, rtol=0)


def test_a_tone_is_in_its_band() -> None:
    seconds = torch.arange(HEARD) / 16000
    low, high = (WhisperMel()(torch.sin(2 * torch.pi * hertz * seconds)[None])[0, :, 400] for hertz in (300, 5000))
    assert low.argmax() < 15
    assert high.argmax() > 60


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.onnx"):
        SmartTurn(tmp_path / "missing.onnx")
