"""PersonaPlex's prompts against its own code, with the same random weights: voices as codes and as it saves them.

Its package is called ``moshi`` as Kyutai's is, so it wants an environment of its own:
``pip install --no-deps "git+https://github.com/NVIDIA/personaplex#subdirectory=moshi"``, and einops.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from antiphon.models.moshi import checkpoint, persona, saved_voice
from antiphon.models.moshi.config import UNSET
from antiphon.models.moshi.lm import MoshiLM

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "moshi"))
from tiny_moshi import SETTINGS, Live, randomise

pytestmark = pytest.mark.parity
SIZES: dict[str, Any] = {"card": 2048, "dim": 256, "context": 100}
TEXT = [7, 8, 9, 10, 11]
DRAWN = np.random.default_rng(0)
VOICE, USER = DRAWN.integers(0, 2048, (8, 11)), torch.from_numpy(DRAWN.integers(0, 2048, (30, 8)))


@pytest.fixture(scope="module")
def upstream() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("sphn") is None:  # it reads clips, of which there are none here
            patch.setitem(sys.modules, "sphn", ModuleType("sphn"))
        yield importlib.import_module("moshi.models.lm")


def play(upstream: ModuleType, lm: Any, folder: Path, voice: Path | None = None) -> Tensor:
    """Greedy frames ``[T, 9]`` after a voice, a text and their silences. voice: a saved one, else it is saved."""

    class Gen(upstream.LMGen):  # type: ignore[misc, name-defined]
        def _encode_voice_prompt_frames(self, mimi: None) -> Iterator[Tensor]:
            yield from torch.from_numpy(VOICE.T.copy())[:, None, :, None]

    gen = Gen(
        lm,
        device="cpu",
        use_sampling=False,
        audio_silence_frame_cnt=persona.PAUSE,
        text_prompt_tokens=TEXT,
        save_voice_prompt_embeddings=voice is None,
        sample_rate=24000,
        frame_rate=12.5,
    )
    with torch.no_grad(), gen.streaming(1):
        if voice is None:
            gen.voice_prompt, gen.voice_prompt_audio = str(folder / "voice.wav"), torch.zeros(1)
        else:
            gen.load_voice_prompt_embeddings(str(voice))
        gen.step_system_prompts(None)
        return torch.stack([gen.step(codes.view(1, 8, 1))[0, :9, 0] for codes in USER])


def ours(lm: MoshiLM, voice: NDArray[np.int64]) -> Tensor:
    """As ``play``. Our prompt decides on the first token of each kind after it, which upstream draws: so draw it."""
    *rows, last = torch.from_numpy(persona.prompt(TEXT, lm.config, voice))
    live = Live(lm, 1)
    for row in rows:
        live.read(torch.stack([row, *[torch.full_like(row, UNSET)] * 3])[None], 1)
    force = last[None, :9].clone()
    force[:, :2] = UNSET
    frames = [live.step(last[None, 9:], force=force), *(live.step(codes[None]) for codes in USER[:-1])]
    return torch.stack([torch.cat((frame["text"], frame["codes"][0])) for frame in frames])


def test_what_is_said_after_a_voice_and_a_text(upstream: ModuleType, tmp_path: Path) -> None:
    reference = upstream.LMModel(device="cpu", dtype=torch.float32, **(SETTINGS | SIZES | {"dep_q": 16})).eval()
    randomise(reference)
    weights = {name: value.contiguous() for name, value in reference.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | SIZES))
    lm = checkpoint.load(tmp_path, prefill=4)
    expected = play(upstream, reference, tmp_path)
    assert torch.equal(ours(lm, VOICE), expected)
    assert not torch.equal(ours(lm, VOICE[:, ::-1].copy()), expected)
    file = tmp_path / "voice.pt"
    assert torch.equal(play(upstream, reference, tmp_path, file), expected)
    read = saved_voice.read(file, lm)
    assert np.array_equal(read[:, 1:], VOICE[:, 1:])
    assert torch.equal(ours(lm, read), expected)
