"""Prompts, plans, blocks and the batched Kokoro network (with random weights: nothing is downloaded)."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.apps.train import synthesise
from antiphon.apps.train.data import Shard
from antiphon.apps.train.prompts import Prompt, build_prompts, clean, shares
from antiphon.apps.train.voices import RATE, Line
from antiphon.apps.train.voices.signal import CLIP_RATE, PERTURBED, defect, resample


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("We spent $54 billion in 1980.", "We spent fifty four billion dollars in nineteen eighty."),
        ("It fell by 12% on the 3rd day", "It fell by twelve percent on the third day."),
        ("About 1,250 people paid $1 each.", "About one thousand two hundred and fifty people paid one dollar each."),
        ("\u201cYes,\u201d she said \u2014 \u201cwe\u2019ll go.\u201d", "Yes, she said, we'll go."),
        ("Mr. Smith (the elder) was here", "Mister Smith was here."),
        ("Meet me at 7:30 tonight please", None),
        ("It costs 3.50 a piece now", None),
        ("The U.S. Congress met again", None),
        ("too short", None),
        ("word " * 26, None),
        ("a dozen eggs, 50/50 odds now", None),
    ],
)
def test_a_prompt_reads_in_one_way_or_is_rejected(raw: str, said: str | None) -> None:
    assert clean(raw) == said


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    rng = random.Random(7)
    words = [a + b for a in ("ba", "do", "mi", "su", "te") for b in ("lan", "rik", "mos", "net")]
    paths = []
    for name, count in (("many", 900), ("few", 100)):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(count)))
        paths.append(path)
    return paths


def test_prompts_are_distinct_seeded_and_mix_their_sources(texts: list[Path]) -> None:
    prompts = build_prompts(texts, seed=1)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert prompts == build_prompts(texts, seed=1)
    assert prompts != build_prompts(texts, seed=2)
    # 9 times as many lines give about 3 times as many prompts at the start
    start = shares(prompts[:120])
    assert 2 < start["many"] / start["few"] < 4.5
    held_out = [prompts[0].text.upper().replace(" ", ", ")]
    assert prompts[0].text not in {prompt.text for prompt in build_prompts(texts, seed=1, exclude=held_out)}


def test_a_plan_follows_the_weights_and_grows_by_appending(texts: list[Path]) -> None:
    prompts = build_prompts(texts, seed=1)
    weights = {"hibari": 1.0, "kokoro": 3.0}
    short = synthesise.plan(prompts, weights, hours=0.5, size=20)
    long = synthesise.plan(prompts, weights, hours=1.5, size=20)
    assert {block.name: block for block in short}.items() <= {block.name: block for block in long}.items()
    seconds: Counter[str] = Counter()
    for block in long:
        seconds[block.teacher] += round(block.seconds)
    assert seconds["kokoro"] == pytest.approx(3 * seconds["hibari"], rel=0.15)
    assert sum(seconds.values()) == pytest.approx(1.5 * 3600, rel=0.05)
    assert len({block.prompts for block in long[: len(prompts) // 20]}) == len(prompts) // 20


def test_weights_name_the_unknown_voice() -> None:
    assert synthesise.parse_weights("hibari,kokoro:4") == {"hibari": 1.0, "kokoro": 4.0}
    with pytest.raises(ValueError, match="unknown voice 'kokorro'"):
        synthesise.parse_weights("kokorro")
    with pytest.raises(ValueError, match="needs --kokoro"):
        synthesise.load_teacher("kokoro", torch.device("cpu"), None)


class Beeper:
    """A teacher that says 0.08 s of tone a character; one line is silent and one is empty."""

    name, licence, source = "beeper", "CC0-1.0", "test"

    def draw(self, rng: random.Random) -> str:
        return rng.choice(["low", "high"])

    def speak(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        tones = []
        for number, line in enumerate(lines):
            time = torch.arange(round((0.5 + 0.08 * len(line.text)) * RATE)) / RATE
            tone = 0.3 * torch.sin(2 * math.pi * (200 if line.voice == "low" else 400) * time)
            tones.append((tone * 0 if number == 1 else tone)[: 0 if number == 2 else None])
        return tones


def test_a_block_becomes_a_shard_with_its_rejects_counted(texts: list[Path], tmp_path: Path) -> None:
    settings = synthesise.Settings(tmp_path / "out", None, seed=3, perturb=True)
    settings.out.mkdir()
    (block, *_) = synthesise.plan(build_prompts(texts, seed=1), {"hibari": 1.0}, hours=0.01, size=12)
    assert synthesise.finished(block, settings) is None
    result = synthesise.speak_block(block, Beeper(), settings)
    assert result.clips == 10
    assert result.rejected == {"almost silent": 1, "not a finite signal": 1}
    assert synthesise.finished(block, settings) == result
    assert [path.name for path in settings.out.iterdir()] == [block.name]
    shard = Shard(settings.out / block.name)
    assert sum(clip.seconds for clip in shard.clips) == pytest.approx(result.seconds)
    assert [clip.text for clip in shard.clips] == [p.text for i, p in enumerate(block.prompts) if i not in (1, 2)]
    assert len({clip.speaker for clip in shard.clips}) > 4
    pcm = np.array(shard.pcm)
    with pytest.raises(ValueError, match="other texts, seed or options"):
        synthesise.finished(block, replace(settings, seed=4))
    synthesise.speak_block(block, Beeper(), settings)
    assert np.array_equal(pcm, Shard(settings.out / block.name).pcm)


def test_a_stopped_run_goes_on_with_the_missing_blocks(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hibari")
    out = tmp_path / "out"
    arguments = ["--texts", *map(str, texts), "--out", str(out), "--hours", "0.01", "--block", "6"]
    synthesise.main(arguments)
    names = sorted(path.name for path in out.iterdir())
    assert names[0] == "hibari-00000"
    assert len(names) > 1
    for name in names[1:]:
        (out / name / synthesise.REPORT).unlink()
    stamp = (out / names[0] / "audio.pcm").stat().st_mtime_ns
    pcm = [np.array(Shard(out / name).pcm) for name in names]
    synthesise.main([*arguments, "--minutes", "0"])
    assert not (out / names[1] / synthesise.REPORT).exists()
    synthesise.main(arguments)
    assert (out / names[0] / "audio.pcm").stat().st_mtime_ns == stamp
    assert all(np.array_equal(old, Shard(out / name).pcm) for old, name in zip(pcm, names, strict=True))
    assert json.loads((out / names[1] / synthesise.REPORT).read_text())["clips"] > 0


@pytest.mark.parametrize("ratio", PERTURBED)
def test_resampling_keeps_a_tone_and_stops_what_would_alias(ratio: tuple[int, int]) -> None:
    up, down = ratio
    time = torch.arange(RATE) / RATE
    out = resample(torch.sin(2 * math.pi * 1000 * time), ratio)
    assert len(out) == -(-RATE * up // down)
    exact = torch.sin(2 * math.pi * 1000 * torch.arange(len(out)) * down / up / RATE)
    assert (out - exact)[200:-200].abs().max() < 2e-3
    beyond = resample(torch.sin(2 * math.pi * 0.56 * RATE * up / down * time), ratio)
    assert beyond[200:-200].abs().max() < 0.02


def test_unfit_clips_are_told_apart() -> None:
    tone = 0.3 * torch.sin(torch.arange(2 * CLIP_RATE) * 0.1)
    assert defect(tone, 20) is None
    assert defect(tone, 3) == defect(tone, 200) == "too short or too long for its text"
    assert defect(tone * 1e-3, 20) == "almost silent"
    assert defect((tone * 9).clamp(-1, 1), 20) == "clipped"
    assert defect(tone * math.nan, 20) == "not a finite signal"


@pytest.fixture(scope="module")
def kokoro() -> torch.nn.Module:
    """Float64, so that rounding does not carry the source's phases across their jump at half a turn."""
    from antiphon.apps.train.voices.kokoro import Kokoro

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Kokoro().eval().requires_grad_(False).double()
    # one or two frames a phoneme, and a pitch that is voiced in places, so that every part of the source is used
    model.duration_proj.bias.fill_(-3.4)
    model.pitch_proj.weight.mul_(2000)
    return model


def test_a_row_of_a_batch_sounds_as_it_does_alone(kokoro: torch.nn.Module) -> None:
    from antiphon.apps.train.voices.kokoro import FRAME

    lengths = torch.tensor([5, 9, 3])
    tokens = torch.randint(1, 170, (3, 9), generator=torch.Generator().manual_seed(1))
    style = torch.randn(3, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.3
    speed = torch.tensor([1.0, 0.8, 1.25], dtype=torch.float64)
    seeds = [11, 12, 13]
    plan = kokoro.prosody(tokens, lengths, style, speed)
    together = kokoro.voice(plan, style, seeds)
    assert together.shape == (3, FRAME * int(plan.frames.max()))
    for row, size in enumerate(lengths.tolist()):
        own = slice(row, row + 1)
        alone = kokoro.prosody(tokens[own, :size], lengths[own], style[own], speed[own])
        assert torch.equal(alone.durations, plan.durations[own, :size])
        assert int(plan.durations[row, size:].sum()) == 0
        samples = kokoro.voice(alone, style[own], [seeds[row]])[0]
        assert samples.std() > 1e-4
        torch.testing.assert_close(together[row, : len(samples)], samples, atol=1e-9, rtol=0)
        assert not together[row, len(samples) :].any()


def test_the_vocoder_windows_are_those_of_torch(kokoro: torch.nn.Module) -> None:
    from antiphon.apps.train.voices.kokoro import Span

    generator = kokoro.generator
    window = generator.window
    samples = torch.randn(2, 400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lengths = torch.tensor([400, 250])
    ours = generator.analyse(samples, lengths)
    for row, length in enumerate(lengths.tolist()):
        theirs = torch.stft(samples[row, :length], 20, 5, 20, window, return_complex=True)
        mine = torch.polar(ours[row, :11], ours[row, 11:])[:, : length // 5 + 1]
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    x = torch.randn(2, 22, 81, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    made = generator.synthesise(x, Span.of(lengths // 5 + 1, 81))
    for row, length in enumerate(lengths.tolist()):
        part = x[row, :, : length // 5 + 1]
        theirs = torch.istft(torch.polar(part[:11].exp(), part[11:].sin()), 20, 5, 20, window)
        torch.testing.assert_close(made[row, :length], theirs, atol=1e-6, rtol=1e-6)
        assert not made[row, length:].any()


def test_the_source_is_nine_harmonics_of_the_pitch(kokoro: torch.nn.Module) -> None:
    source = kokoro.generator.source
    pitch = torch.full((1, 40), 240.0, dtype=torch.float64)
    pitch[0, :10] = 0
    samples = source(pitch, torch.tensor([40]), None)[0]
    assert samples[:3000].std() < 1e-6
    # 240 Hz is a period of 100 samples: the phase stands still for half an interval after the onset's middle
    voiced = samples[3300:11700]
    torch.testing.assert_close(voiced[100:], voiced[:-100], atol=1e-9, rtol=0)
    again = source(pitch, torch.tensor([40]), [5])
    assert torch.equal(again, source(pitch, torch.tensor([40]), [5]))
    assert not torch.equal(again, source(pitch, torch.tensor([40]), [6]))


def test_published_names_map_to_ours() -> None:
    pytest.importorskip("onnx")
    from antiphon.apps.train.voices.pack import lstm_order, owner, rename

    assert owner("/encoder/text_encoder/cnn.0/cnn.0.0/Conv_quant") == "encoder.text_encoder.cnn.0.0"
    assert rename("encoder.text_encoder.cnn.0.0.bias") == "text_encoder.cnn.0.bias"
    assert rename("encoder.predictor.text_encoder.lstms.3.fc.bias") == "duration_norms.1.fc.bias"
    assert rename("decoder.decoder.generator.m_source.l_linear.bias") == "generator.source.linear.bias"
    assert lstm_order(np.array([0, 1, 2, 3]))[:, None].T.tolist() == [[0, 2, 3, 1]]  # i o f c -> i f c o


def test_packed_codes_come_back_as_numbers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from antiphon.apps.train.voices.packed import unpack

    with pytest.raises(FileNotFoundError, match=r"voices\.pack"):
        unpack(tmp_path)
    parts = {
        "a.weight": torch.tensor([[130, 128], [128, 0]], dtype=torch.uint8),
        "a.weight.scale": torch.tensor([[0.5], [0.25]]),
        "a.weight.zero": torch.tensor([[128], [128]], dtype=torch.uint8),
    }
    save_file(parts, tmp_path / "weights-0.safetensors")
    save_file({"a.bias": torch.tensor([3.0])}, tmp_path / "weights-1.safetensors")
    tensors = unpack(tmp_path)
    assert tensors["a.weight"].tolist() == [[1.0, 0.0], [0.0, -32.0]]
    assert tensors["a.bias"].tolist() == [3.0]


def test_a_plan_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"No such file.*absent\.txt"):
        synthesise.main(["--texts", str(tmp_path / "absent.txt"), "--out", str(tmp_path), "--hours", "1"])
    with pytest.raises(ValueError, match="no prompts"):
        synthesise.plan([], {"hibari": 1.0}, 1.0, 10)
    (block, *_) = synthesise.plan([Prompt("a b c.", "x")], {"hibari": 1.0}, 1e-4, 2)
    assert block.name == "hibari-00000"
