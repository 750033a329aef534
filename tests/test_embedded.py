"""The embedded model on real speech that it was not trained on, as a newcomer runs it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch

import antiphon
from antiphon.codecs.audio_file import read, write
from antiphon.codecs.mel import UNKNOWN, LogMel, MelConfig
from antiphon.models.conformer.beam import BeamSearch
from antiphon.models.conformer.checkpoint import load
from antiphon.models.conformer.hub import EMBEDDED, embedded
from antiphon.pipelines.recognizer import Blocks, Recognizer
from antiphon.pipelines.transcription import Transcriber

ROOT = Path(antiphon.__file__).parent
CLIP = ROOT / "apps" / "samples" / "two_cities.flac"
WORST = {0: 0.25, 80: 0.25, 480: 0.22, 1040: 0.21}


def transcript() -> str:
    quoted = [line[2:] for line in (CLIP.parent / "README.md").read_text().splitlines() if line.startswith("> ")]
    return re.sub("[^a-z ]", "", " ".join(quoted).lower())


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer(load(), "rnnt")


@pytest.mark.parametrize("lookahead", WORST)
def test_it_hears_most_words_of_a_stranger(lookahead: int) -> None:
    said = " ".join(c.text for c in antiphon.transcribe(CLIP, lookahead=lookahead) if isinstance(c, antiphon.Final))
    assert jiwer.wer(transcript(), said) <= WORST[lookahead]


def test_words_lie_where_they_are_said() -> None:
    finals = [c for c in antiphon.transcribe(CLIP) if isinstance(c, antiphon.Final)]
    words = [word for final in finals for word in final.words]
    assert all(word.start < word.end <= 24.7 for word in words)
    assert all(before.start <= after.start for before, after in pairwise(words))
    # "It was the best of times" is spoken in the first three seconds.
    best = [word.text for word in words].index("best")
    first = words[best - 3 : best + 3]
    assert [word.text for word in first] == ["it", "was", "the", "best", "of", "times"]
    assert 0.2 < first[0].start < 1.5
    assert first[5].end < 3.5


def test_the_search_hears_better_than_the_greedy_decoder() -> None:
    """The reading is a novel's, but none of those that the language model has read."""
    rates = []
    for decoder in ("beam", "rnnt"):
        with Transcriber(lookahead=0, decoder=decoder) as transcriber:
            said = " ".join(c.text for c in transcriber.transcribe(CLIP) if isinstance(c, antiphon.Final))
        rates.append(jiwer.wer(transcript(), said))
    assert rates[0] < rates[1]


def test_greedy_partials_grow_and_finals_keep_what_they_said() -> None:
    shown = ""
    with Transcriber(decoder="rnnt") as transcriber:
        captions = list(transcriber.transcribe(CLIP))
    for caption in captions:
        if isinstance(caption, antiphon.Final):
            assert caption.text.startswith(" ".join(shown.split()[:-1]))
            shown = ""
        else:
            assert caption.text.startswith(" ".join(shown.split()[:-1]))
            shown = caption.text


@pytest.mark.parametrize("samples", [np.zeros(48_000, np.float32), np.zeros(0, np.float32)], ids=["silence", "empty"])
def test_silence_says_nothing(tmp_path: Path, samples: np.ndarray) -> None:
    if len(samples):
        write(tmp_path / "a.wav", samples, 16_000)
        assert list(antiphon.transcribe(tmp_path / "a.wav")) == []
    else:
        assert Blocks(6).finish()[0].end == 0


@pytest.mark.parametrize("lookahead", [0, 1, 6, 13])
def test_streaming_real_speech_equals_the_offline_pass(recognizer: Recognizer, lookahead: int) -> None:
    pcm = read(CLIP)[: 16_000 * 8]
    blocks = Blocks(lookahead)
    state = {name: spec.new(5) for name, spec in recognizer.state_spec().items()}
    slots, active = torch.tensor([0, 4, 4, 4]), torch.tensor([True, False, False, False])
    heard: list[int] = []
    with torch.inference_mode():
        for block in [*blocks.push(pcm), *blocks.finish()]:
            rows = torch.zeros(4, len(block.pcm))
            rows[0] = torch.from_numpy(block.pcm)
            end = torch.tensor([block.end, UNKNOWN, UNKNOWN, UNKNOWN])
            out = recognizer.step({"pcm": rows, "end": end}, state, slots, active)
            heard += out["tokens"][0, : out["count"][0]].tolist()
        mel, length = recognizer.mel(torch.from_numpy(pcm)[None], torch.tensor([len(pcm)]))
        frames, count = recognizer.asr.encoder(mel, length, lookahead)
        fresh = {name: spec.new(2) for name, spec in recognizer.head.state_spec().items()}
        valid = torch.arange(frames.shape[1])[None] < count[:, None]
        tokens, _, number = recognizer.head.decode(frames, valid, fresh, torch.tensor([0]), torch.tensor([True]))
    assert heard == tokens[0, : number[0]].tolist()
    assert len(heard) > 20


def test_streamed_frame_by_frame_the_search_hears_what_it_hears_in_longer_chunks() -> None:
    asr = load()
    assert asr.transducer is not None
    search = BeamSearch(asr.transducer, asr.config.beam, asr.language_model, 14).prepare()
    mel = LogMel(MelConfig.from_nemo(asr.mel))
    pcm = read(CLIP)[: 16_000 * 8]
    heard = []
    with torch.inference_mode():
        features, length = mel(torch.from_numpy(pcm)[None], torch.tensor([len(pcm)]))
        frames, _ = asr.encoder(features, length, 6)
        for size in (1, 7, 14):
            state = {name: spec.new(2) for name, spec in search.state_spec().items()}
            tokens: list[int] = []
            parts = frames.split(size, 1)
            for number, part in enumerate(parts):
                valid, last = torch.ones(part.shape[:2], dtype=torch.bool), torch.tensor([number == len(parts) - 1])
                out = search.decode(part, valid, last, state, torch.tensor([0]), torch.tensor([True]))
                tokens += out["tokens"][0, : out["count"][0]].tolist()
            heard.append(tokens)
    assert len(heard[0]) > 20
    assert heard[0] == heard[1] == heard[2]


def test_what_ships_is_small_and_has_a_card() -> None:
    assert len(embedded()) == 1
    folder = EMBEDDED / embedded()[0]
    assert (folder / "model.safetensors").stat().st_size < 40e6
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlanguage: en\n---\n")
    for part in ("## Training data", "## Recipe", "## Word error rates", "lookahead 480 ms", "pocketsphinx"):
        assert part in card
    assert "/tmp" not in card
