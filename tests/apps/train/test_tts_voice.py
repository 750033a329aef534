"""The embedded voice from its bank to its figures, with networks of a few thousand numbers and tones in place of
speech: language model and vocoder learn, the checkpoint speaks, and what is measured is measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from on_device import Device

from antiphon.apps.train import tts_card, tts_eval, tts_lm, tts_vocoder
from antiphon.apps.train.bank import BankWriter
from antiphon.apps.train.codec_losses import Judges as SoundJudges
from antiphon.apps.train.run import RUN
from antiphon.apps.train.tts_bank import SpeechBank, characters, written
from antiphon.apps.train.tts_sizes import ALPHABET, FLOW, LM, TEXT, TOKEN, VOICE_TOKENS, VOICES
from antiphon.codecs.hift import HiFTConfig
from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.stream import IGNORED
from antiphon.models.cosyvoice.tokenizer import TextTokenizer
from antiphon.pipelines import speech_checkpoint
from antiphon.pipelines.spoken import spoken
from antiphon.pipelines.synthesizer import Synthesizer

RATE = 24000
SPEECH = 20
SMALL_LM = replace(LM, speech=SPEECH, width=32, layers=1, heads=2, kv_heads=1, feedforward=48, extent=(0.3, 1.0))
SMALL_FLOW = replace(
    FLOW, vocabulary=SPEECH, mels=20, speaker=4, chunk=5, width=16, heads=2, feedforward=24, layers=1, up_layers=1,
    channels=16, unet_heads=1, unet_head_width=8, middle_stages=0, steps=2,
)  # fmt: skip
SMALL_VOCODER = HiFTConfig(
    mels=20, width=32, pitch_width=16, harmonics=2, block_kernels=(3,), source_kernels=(3, 3, 3), dilations=(1,)
)
LM_RECIPE = tts_lm.Recipe(room=256, widths=(64, 128), rate=1e-2, warmup=4, average=0.9, watch_every=5)
VOCODER_RECIPE = tts_vocoder.Recipe(rows=4, frames=8, edge=2, rate=2e-3, warmup=4, average=0.9, judge_from=0.5)
TEXTS = ("one, two.", "go on!", "what is it?", "so be it.", "yes.", "no more of that.", "hear, hear!", "it is me.")

pytestmark = pytest.mark.usefixtures("one_thread")


def tone(hertz: float, samples: int) -> np.ndarray:
    time = np.arange(samples) / RATE
    return sum(0.1 / n * np.sin(2 * np.pi * n * hertz * time) for n in (1, 2, 3)).astype(np.float32)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def spoken_bank(tmp_path_factory: pytest.TempPathFactory) -> SpeechBank:
    """Every voice says every text, a voice at a pitch of its own; a text's tokens are its letters'."""
    folder = tmp_path_factory.mktemp("spoken")
    writer, tokens = BankWriter(folder), []
    for number, voice in enumerate(VOICES):
        for text in TEXTS:
            letters = characters(written(text))
            own = [letter % SPEECH for letter in letters for _ in range(2)]
            writer.add(tone(120 + 60 * number, TOKEN * len(own)), "speech", text, voice)  # type: ignore[arg-type]
            tokens += own
    writer.close()
    np.save(folder / "tokens.npy", np.array(tokens, np.int16))
    return SpeechBank(folder)


def lm_training(bank: SpeechBank, out: Path, steps: int = 20, seed: int = 0) -> tts_lm.LMTraining:
    layouts = tts_lm.Layouts(SMALL_LM, bank.utterances, bank.tokens, torch.device("cpu"))
    return tts_lm.LMTraining(SMALL_LM, LM_RECIPE, layouts, layouts, out, steps, seed)


def vocoder_training(bank: SpeechBank, out: Path, steps: int = 8, seed: int = 0) -> tts_vocoder.VocoderTraining:
    pcm = torch.from_numpy(np.array(bank.pcm))
    crops = tts_vocoder.Crops(bank.utterances, pcm, tts_vocoder.contour(pcm), VOCODER_RECIPE, seed)
    training = tts_vocoder.VocoderTraining(SMALL_VOCODER, VOCODER_RECIPE, crops, out, steps, seed)
    assert isinstance(training.judges, SoundJudges)
    return training


@pytest.fixture(scope="module")
def checkpoint(spoken_bank: SpeechBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the card's command writes of three runs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    facts = {"command": ["train", "tts"], "recipe": {}, "seed": 0, "steps": 20, "measured": {}}
    lm = lm_training(spoken_bank, folder / "lm")
    lm.run()
    lm.save_model()
    voices = tts_lm.hours_of(spoken_bank.utterances)
    (lm.out / RUN).write_text(json.dumps(facts | lm.settings | {"voices": voices}))
    vocoder = vocoder_training(spoken_bank, folder / "vocoder")
    vocoder.run(until=2)
    vocoder.save_model()
    (vocoder.out / RUN).write_text(json.dumps(facts | vocoder.settings))
    torch.manual_seed(0)
    (folder / "flow").mkdir()
    flow = FlowMatching(SMALL_FLOW)
    safetensors.torch.save_file(flow.state_dict(), folder / "flow" / "flow.safetensors")
    vectors = {name: torch.randn(SMALL_FLOW.speaker) for name in VOICES}
    safetensors.torch.save_file(vectors, folder / "flow" / "voices.safetensors")
    (folder / "flow" / RUN).write_text(json.dumps(facts | {"config": asdict(SMALL_FLOW)}))
    tts_card.export(folder / "toy", {part: folder / part for part in tts_card.PARTS})
    return folder / "toy"


def test_the_tokenizer_reads_what_the_language_model_learned(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tts_lm.text_tokenizer())
    tokenizer = TextTokenizer(tmp_path)
    for text in (
        "Mr. Smith\u2019s  caf\u00e9 \u2013 open at 5:30 pm?",
        "It cost $3.50 -- \u201ctoo much\u201d\u2026",
        "Na\u00efve/odd_ ",
    ):
        assert tokenizer.encode(spoken(text)) == characters(written(text)), text
    assert tokenizer.encode("<heart>a") == [len(ALPHABET), 1]
    assert [tokenizer.encode(token) for token in VOICE_TOKENS] == [[len(ALPHABET) + n] for n in range(len(VOICES))]
    assert len(tokenizer) <= TEXT


def test_utterances_are_laid_out_in_both_ways(spoken_bank: SpeechBank) -> None:
    one = max(spoken_bank.utterances, key=lambda one: one.count)
    layouts = tts_lm.Layouts(SMALL_LM, [one], spoken_bank.tokens, torch.device("cpu"))
    text = [SMALL_LM.text_id(token) for token in tts_lm.text_of(one)]
    speech = spoken_bank.tokens[one.tokens].tolist()
    which = np.zeros(1, np.int64)
    read, drawn = layouts.batch(which, which, 128)
    length = 2 + len(text) + len(speech)
    assert read[0, :length].tolist() == [SMALL_LM.start, *text, SMALL_LM.task, *speech]
    assert drawn[0, length - 1 - len(speech) : length].tolist() == [*speech, SMALL_LM.end]
    assert (drawn[0, length:] == IGNORED).all()
    read, drawn = layouts.batch(which, which + 1, 128)
    some, much = SMALL_LM.mix
    assert read[0, : 1 + some + much].tolist() == [SMALL_LM.start, *text[:some], *speech[:much]]
    assert drawn[0, some + much].item() == SMALL_LM.fill
    assert sorted(read[0, :length].tolist()) == sorted([SMALL_LM.start, *text, SMALL_LM.task, *speech])


def test_hiding_touches_speech_alone_and_no_more_than_its_share() -> None:
    read = torch.cat((torch.arange(SMALL_LM.classes, SMALL_LM.vocabulary), torch.arange(SPEECH).repeat(200)))[None]
    torch.manual_seed(0)
    hidden = torch.cat([tts_lm.hidden(SMALL_LM, read, 0.4) for _ in range(20)])
    changed = hidden != read
    assert not changed[:, read[0] >= SPEECH].any()
    shares = changed[:, read[0] < SPEECH].float().mean(1)
    assert 0.1 < float(shares.mean()) < 0.3
    assert float(shares.max()) < 0.43
    lost = (hidden == SPEECH + 1).sum() / changed.sum()
    assert 0.45 < float(lost) < 0.6
    assert torch.equal(tts_lm.hidden(SMALL_LM, read, 0.0), read)


def test_the_language_model_learns_and_resumes_to_the_bit(spoken_bank: SpeechBank, tmp_path: Path) -> None:
    whole = lm_training(spoken_bank, tmp_path / "whole", 40)
    before = whole.measured(whole.layouts)
    whole.run()
    after = whole.measured(whole.layouts)
    for layout in tts_lm.LAYOUTS:
        assert after[layout]["speech"] < 0.85 * before[layout]["speech"], layout
        assert after[layout]["end"] < before[layout]["end"], layout
    lm_training(spoken_bank, tmp_path / "halves", 40).run(until=13)
    second = lm_training(spoken_bank, tmp_path / "halves", 40)
    assert second.resume()
    second.run()
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert whole.skipped() == 0


def test_the_contour_is_the_pitch_of_what_has_one() -> None:
    rng = np.random.default_rng(0)
    parts = [tone(95, RATE), 0.1 * rng.standard_normal(RATE), np.zeros(RATE), tone(330, RATE)]
    pcm = torch.from_numpy((np.concatenate(parts) * 32767).astype(np.int16))
    hertz = tts_vocoder.contour(pcm, block=77)
    assert hertz.shape == (200,)
    low, noise, silence, high = hertz.split(50)
    torch.testing.assert_close(low[3:-3], torch.full((44,), 95.0), rtol=0.01, atol=0)
    torch.testing.assert_close(high[3:-3], torch.full((44,), 330.0), rtol=0.01, atol=0)
    assert (noise[3:-3] > 0).float().mean() < 0.1
    assert not silence[3:-3].any()


def test_crops_belong_together(spoken_bank: SpeechBank, tmp_path: Path) -> None:
    run = vocoder_training(spoken_bank, tmp_path)
    mel, pcm, hertz = run.pairs(3)
    frames = VOCODER_RECIPE.frames + 2 * VOCODER_RECIPE.edge
    assert (mel.shape, pcm.shape, hertz.shape) == ((4, frames, 20), (4, frames * 480), (4, frames))
    again = run.mel(torch.from_numpy(np.array(spoken_bank.pcm)).float()[None] / 32768)[0]
    place = int((again - mel[0, frames // 2]).abs().sum(1).argmin())
    torch.testing.assert_close(again[place], mel[0, frames // 2])
    pitches = hertz[hertz > 0]
    assert len(pitches)
    assert all(min(abs(float(one) - other) for other in (120, 180, 240)) < 4 for one in pitches)


def test_the_vocoder_learns_and_resumes_to_the_bit(spoken_bank: SpeechBank, tmp_path: Path) -> None:
    whole = vocoder_training(spoken_bank, tmp_path / "whole", 16)
    losses = []
    for _ in range(16):
        losses.append({name: float(loss) for name, loss in whole.train_step().items()})
        whole.step += 1
    assert "tell" not in losses[7]
    assert "tell" in losses[8]
    assert np.mean([one["mel"] for one in losses[-3:]]) < 0.95 * np.mean([one["mel"] for one in losses[:3]])
    assert whole.skipped() == 0
    vocoder_training(spoken_bank, tmp_path / "halves", 16).run(until=9)
    second = vocoder_training(spoken_bank, tmp_path / "halves", 16)
    assert second.resume()
    second.run()
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert set(whole.measured(whole.crops, 1)) == {"mel", "hertz", "voicing"}


@pytest.mark.parametrize("judged", [False, True])
def test_steps_stay_on_the_device(spoken_bank: SpeechBank, tmp_path: Path, judged: bool) -> None:
    vocoder, lm = vocoder_training(spoken_bank, tmp_path / "vocoder"), lm_training(spoken_bank, tmp_path / "lm")
    pairs = vocoder.pairs(0)
    width, which = lm.batches(0)
    batch = lm.layouts.batch(which, which % 2, width)
    vocoder._step(judged, *pairs)  # the optimisers set themselves up
    lm._step(width, *batch)
    with Device() as device:
        vocoder._step(judged, *pairs)
        lm._step(width, *batch)
    assert not device.found, device.found[0]


def test_the_checkpoint_speaks(checkpoint: Path) -> None:
    loaded = speech_checkpoint.load(checkpoint)
    assert list(loaded.voices) == sorted(VOICES, key=lambda name: (name != next(iter(VOICES)), name))
    assert loaded.speech.reader.sampling == tts_card.SAMPLING
    assert loaded.speech.flow.limits.hops == (5, 10, 20)
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    with Synthesizer(loaded.speech) as models:
        for name, voice in loaded.voices.items():
            models.register(name, voice)
            assert models.speech.reader.voices[name].prompt_text == (len(ALPHABET) + list(VOICES).index(name),)
        for arriving in (False, True):
            sound = np.concatenate([piece.samples for piece in models.speak(TEXTS[0], "emma", arriving=arriving)])
            assert len(sound) > 0
            assert len(sound) % TOKEN == 0
    card = (checkpoint / "README.md").read_text()
    assert "| michael | 8 |" in card
    assert "Not measured yet" in card


def test_what_cannot_ship_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {part: checkpoint.parent / part for part in tts_card.PARTS}
    monkeypatch.setattr(tts_card, "LARGEST", 10_000)
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes; what ships has 10,000"):
        tts_card.export(tmp_path / "toy", runs)
    flow = safetensors.torch.load_file(runs["flow"] / "flow.safetensors")
    flow["speaker.weight"][0, 0] = 1e6
    (tmp_path / "flow").mkdir()
    safetensors.torch.save_file(flow, tmp_path / "flow" / "flow.safetensors")
    for name in (RUN, "voices.safetensors"):
        (tmp_path / "flow" / name).write_bytes((runs["flow"] / name).read_bytes())
    with pytest.raises(ValueError, match=r"weight flow\.speaker\.weight does not fit into float16"):
        tts_card.export(tmp_path / "toy", runs | {"flow": tmp_path / "flow"})


class Loudest:
    """In PLCMOS's place."""

    @staticmethod
    def run(sound: np.ndarray, sr: int) -> dict[str, float]:
        assert (sr, sound.dtype) == (16000, np.float32)
        return {"plcmos": float(np.abs(sound).max())}


def test_figures_of_all_that_is_there(
    checkpoint: Path, spoken_bank: SpeechBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Teacher:
        def speak(self, lines: list[object]) -> list[torch.Tensor]:
            return [torch.from_numpy(tone(200, RATE)) for _ in lines]

    monkeypatch.setattr(tts_eval, "load_teacher", lambda name, device, kokoro: Teacher())
    monkeypatch.setattr(tts_eval, "REFERENCES", 2)
    monkeypatch.setattr(tts_eval.shutil, "which", lambda name: None)
    judges = tts_eval.Judges(None, None)
    judges._plcmos = Loudest
    texts = ["So it goes on.", "Yes, it is me."]
    found = tts_eval.everything(
        str(checkpoint), texts, judges, timed=1, threads=1, samples=tmp_path / "samples", each=1, work=tmp_path
    )
    assert set(found["left out"]) >= {"wer", "similarity", "espeak-ng"}
    assert "apt-get install" in found["left out"]["espeak-ng"]
    assert len(found["speakers"]) == 2 * len(VOICES)
    assert found["seams"]["joins"] > 0
    assert math.isfinite(found["seams"]["worst"])
    assert found["stream less whole"] == pytest.approx(0, abs=1e-3)
    assert found["speakers"]["its teacher, hibari's heart"]["plcmos"] == pytest.approx(0.144, abs=0.005)
    assert found["largest difference"] is not None
    assert found["largest difference"] < 1e-3
    assert found["speed"]["rtf"] > 0
    assert 0 < found["speed"]["first audio ms"]["median"] <= found["speed"]["first audio ms"]["worst"]
    assert len(list((tmp_path / "samples").glob("*.wav"))) == 2 * len(VOICES)
    again = json.loads(json.dumps(found))
    facts = tts_card.tables(again)
    assert any(line.startswith("| this, heart |") for line in facts)
    assert any("real-time factor" in line for line in facts)


def test_words_are_counted_as_they_are_said() -> None:
    judges = tts_eval.Judges(None, None)
    judges._hear = lambda pcm: "it is 12 o'clock"
    sound = np.zeros(100, np.float32)
    assert judges.wer([tts_eval.Utterance("It is 12 o'clock.", sound)]) == (0.0, ["it is 12 o'clock"])
    rate, _ = judges.wer([tts_eval.Utterance("It was noon.", sound)])
    assert rate == 100.0


def test_a_click_at_a_join_is_told() -> None:
    rng = np.random.default_rng(0)
    clean = (tone(150, RATE) + 0.001 * rng.standard_normal(RATE)).astype(np.float32)
    clicked = clean.copy()
    clicked[12000:] += 0.2
    found = tts_eval.seams([tts_eval.Utterance("", clicked, [6000, 12000], clean)])
    assert found["joins"] == 2
    assert found["worst"] > 5 > 2 > found["whole worst"]
