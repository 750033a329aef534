"""The dialogue model's training on tones: losses fall, it resumes exactly, and what it writes is loaded and streams the
tokens that it was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_device import Device

from antiphon.apps.train import duplex_card
from antiphon.apps.train.bank import Bank
from antiphon.apps.train.codec import TINY, Student
from antiphon.apps.train.codec import Recipe as CodecRecipe
from antiphon.apps.train.dialogues import FRAME, PAD, Batch, Composer, Dialogues, Encode, Style
from antiphon.apps.train.domain import answers
from antiphon.apps.train.duplex import DuplexTraining, Recipe, codes_of, settings, speaking, train_tokenizer
from antiphon.apps.train.duplex_card import LARGEST, export, write_card
from antiphon.apps.train.duplex_eval import Call, Cast, Model, converse
from antiphon.apps.train.run import RUN
from antiphon.codecs import mimi_checkpoint
from antiphon.codecs.mimi import Mimi, MimiConfig
from antiphon.models.moshi import checkpoint
from antiphon.models.moshi.config import UNSET, read_config
from antiphon.models.moshi.lm import MoshiLM
from antiphon.pipelines import duplex
from antiphon.pipelines.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = MimiConfig(
    channels=2, width=16, layers=1, heads=2, feedforward=32, window=20, codebooks=4, bins=32, code_width=8, steps=(1,)
)
SMALL: dict[str, Any] = {
    "dim": 32,
    "num_heads": 2,
    "num_layers": 1,
    "context": 30,
    "depformer_dim": 16,
    "depformer_dim_feedforward": 48,
    "depformer_num_heads": 1,
    "depformer_num_layers": 1,
}
RECIPE = Recipe(rows=2, frames=48, reuse=2, pool=3, warmup=3, rate=5e-3, average=0.9)
STYLE = Style(start=(0.1, 0.3), gap=(0.2, 0.5), rest=0)


@pytest.fixture(scope="module")
def tokenizer(bank: Bank) -> bytes:
    return train_tokenizer([one.text for one in bank.of("answer")])


@pytest.fixture(scope="module")
def codec() -> Mimi:
    torch.manual_seed(0)
    mimi = Student(CONFIG, 1, CodecRecipe()).mimi.eval()
    with torch.no_grad():
        for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
            branch.codebooks.embedding.normal_(std=0.5)
    return mimi


def training(bank: Bank, tokenizer: bytes, codec: Mimi, out: Path, steps: int = 12, seed: int = 0) -> DuplexTraining:
    encode = Encode(tokenizer)
    pcm = torch.from_numpy(np.array(bank.pcm))
    dialogues = Dialogues(Composer(bank, encode, RECIPE.frames, STYLE), pcm, RECIPE.rows, seed)
    return DuplexTraining(settings(encode.size, codec, **SMALL), RECIPE, dialogues, codec, out, steps, seed)


def test_losses_fall(bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path) -> None:
    run = training(bank, tokenizer, codec, tmp_path, 60)
    losses = []
    for _ in range(60):
        losses.append({name: float(loss) for name, loss in run.train_step().items()})
        run.step += 1
    for name in ("text", "words", "semantic", "acoustic"):
        assert np.mean([one[name] for one in losses[-6:]]) < 0.92 * np.mean([one[name] for one in losses[:4]]), name
    assert run.skipped() == 0
    measured = run.measured(run.dialogues, 1)
    assert set(measured) == {"text", "words", "right", "semantic", "acoustic"}


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path
) -> None:
    whole = training(bank, tokenizer, codec, tmp_path / "whole")
    whole.run()
    training(bank, tokenizer, codec, tmp_path / "halves").run(until=5)
    second = training(bank, tokenizer, codec, tmp_path / "halves")
    assert second.resume()
    second.run()
    assert second.step == 12
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert torch.equal(second.weights.average, whole.weights.average)  # type: ignore[arg-type]
    other = training(bank, tokenizer, codec, tmp_path / "halves", seed=1)
    with pytest.raises(ValueError, match="another recipe"):
        other.resume()


def test_what_is_heard_is_spoilt_a_little(bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    config = run.lm.config
    codes = torch.arange(2).view(2, 1, 1).expand(2, 1 + config.spoken + config.heard, 400).contiguous()
    spoilt = run._spoilt(codes, 3)
    assert torch.equal(spoilt, run._spoilt(codes, 3))
    assert not torch.equal(spoilt, run._spoilt(codes, 4))
    assert torch.equal(spoilt[:, : 1 + config.spoken], codes[:, : 1 + config.spoken])
    assert 0.03 < (spoilt != codes)[:, 1 + config.spoken :].float().mean() < 0.07


def test_dialogues_are_drawn_a_few_times_and_then_make_room(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path
) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    batches = [codes_of(run.dialogues(number), codec, run.lm.config.heard) for number in range(7)]
    places = {row.numpy().tobytes(): number for number, batch in enumerate(batches) for row in batch}
    assert len(places) == 14
    drawn = []
    for step in range(8):
        codes, active = run.drawn(step)
        assert active.shape == codes.shape[::2]
        drawn.append([places[row.numpy().tobytes()] for row in codes])
        assert all(step // 2 <= number <= step // 2 + 2 for number in drawn[-1])
    assert len({number for numbers in drawn for number in numbers}) >= 4
    again = training(bank, tokenizer, codec, tmp_path / "again").drawn(7)[0]
    assert torch.equal(again, run.drawn(7)[0])


def test_a_step_stays_on_the_device(bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    batch = run.dialogues(0)
    codes, active = codes_of(batch, codec, run.lm.config.heard), speaking(batch)
    run._step("step", codes, active)  # the optimiser sets itself up
    with Device() as device:
        run._step("step", codes, active)
    assert not device.found, device.found[0]


def test_a_bad_gradient_changes_nothing_and_is_counted(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path
) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    run.train_step()
    run.recipe = replace(RECIPE, text=float("nan"))
    before = run.weights.flat.clone()
    run.train_step()
    assert torch.equal(run.weights.flat, before)
    assert run.skipped() == 1


def test_what_is_written_is_loaded_and_hears_what_it_was_trained_on(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path
) -> None:
    """A live session of an exported model hears, and where its tokens are forced says, what a batch of training holds:
    the codes of the user's frame i, which is a session's frame i + 1, and its own sound of frame i after that."""
    run = training(bank, tokenizer, codec, tmp_path, 2)
    run.run()
    facts = {**run.settings, "command": ["x"], "steps": 2, "measured": {}, "bank": bank.summary()}
    lm_settings = settings(Encode(tokenizer).size, codec, **SMALL)
    lm = run.weights.averaged(run.lm)
    export(tmp_path / "model", lm, codec, tokenizer, lm_settings, facts)
    model = duplex.load(tmp_path / "model")
    assert (model.lm.config.padding, model.frame, model.rate) == (PAD, FRAME, 24000)
    assert (model.lm.embedding.weight - lm.embedding.weight).abs().max() < 1e-3

    composed = run.dialogues(7)
    noise = 0.1 * torch.randn(composed.user.shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise, composed.model, composed.text)
    codes = codes_of(batch, codec, model.lm.config.heard)[0]
    spoken = model.lm.config.spoken
    made = Engine(inline=True)
    made.add("talk", model, slots=1)
    lease = made.open_sync("talk")
    inputs = model.inputs(model.lm.config.sampling)
    rows = []
    for step in range(20):
        # Position p makes text and the first codebook of frame p, and the others of frame p - 1.
        force = [int(codes[0, step]), int(codes[1, step])]
        force += [int(code) if step else UNSET for code in codes[2 : 1 + spoken, step - 1]]
        user = batch.user[0, (step - 1) * FRAME : step * FRAME] if step else torch.zeros(FRAME)
        rows.append(lease.step_sync({**inputs, "force": np.array(force), "pcm": user}))
    heard = torch.stack([row["heard"] for row in rows[1:]], 1)
    # Half precision moves a few codes; a shift by a frame would move most.
    assert (heard == codes[1 + spoken :, :19]).float().mean() > 0.9
    assert (heard[:, 1:] == codes[1 + spoken :, :18]).float().mean() < 0.7
    said = torch.cat([row["pcm"] for row in rows[1:]])
    wanted = codec.decode(codes[None, 1 : 1 + spoken, :19])[0].detach()
    assert (said - wanted).abs().max() < 0.05 * wanted.abs().max() + 1e-3
    assert [int(row["text"]) for row in rows[1:]] == codes[0, :19].tolist()


def test_an_untrained_model_can_be_called(bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    facts = {**run.settings, "command": ["x"], "steps": 0, "measured": {}, "bank": {}}
    lm_settings = settings(Encode(tokenizer).size, codec, **SMALL)
    export(tmp_path / "model", run.lm, codec, tokenizer, lm_settings, facts)
    calls = [Call("silence", 1), Call("talk", 2)]
    partner = Model(duplex.load(tmp_path / "model"), 2, "cpu")
    converse(partner, calls, Cast(bank, "train", held_out=False))
    partner.close()
    for call in calls:
        assert len(call.user) == len(call.model) > 50
        assert (call.model[0] == 0).all()
        assert (call.model[1] == 0).all()  # a session's first step has no sound
        assert np.isfinite(call.sound()).all()


def test_speaking_frames_are_those_with_sound() -> None:
    model = torch.zeros(1, 4 * FRAME)
    model[0, FRAME + 5] = 0.1
    assert speaking(Batch(model, model, torch.zeros(1, 4))).tolist() == [[False, True, False, False]]


def test_what_ships_is_small_enough() -> None:
    vocabulary = Encode(train_tokenizer(answers())).size
    with torch.device("meta"):
        mimi = Mimi(TINY)
        lm = MoshiLM(read_config(settings(vocabulary, mimi)))
    counts = [sum(value.numel() for value in part.state_dict().values()) for part in (lm, mimi)]
    assert counts[0] <= 8_000_000
    assert 2 * sum(counts) + 100_000 < LARGEST
    assert lm.config.temporal.window < Recipe().frames


def test_the_card_tells_what_went_in_and_how_it_behaves(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    facts = {**run.settings, "command": ["x", "--minutes", "3"], "steps": 7, "measured": {"right": 0.25}}
    facts["bank"] = bank.summary()
    facts["codec"] = {"command": ["x"], "recipe": {}, "measured": {"mel": 1.5}, "seed": 0, "steps": 9}
    (tmp_path / RUN).write_text(json.dumps(facts))
    lm_settings = settings(Encode(tokenizer).size, codec, **SMALL)
    export(tmp_path / "model", run.lm, codec, tokenizer, lm_settings, facts)
    figures = {"numbers": {"sets": {"known": {"answers within 2 s": {"value": 3, "of": 8}}}, "calls": 8, "seed": 0}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    duplex_card.main(tmp_path, tmp_path / "shipped", tmp_path / "figures.json")
    card = (tmp_path / "shipped" / "README.md").read_text()
    for fact in (
        "# shipped",
        "| answers within 2 s | 3/8 |",
        "--minutes 3",
        "7 steps",
        '"right": 0.25',
        "| talk | 2 |",
        '"mel": 1.5',
    ):
        assert fact in card
    talkers = {"utterances": 1, "hours": 1, "voices": 1, "sources": ["librispeech_train"], "licences": ["CC-BY-4.0"]}
    assert "V. Panayotov" not in card
    assert "V. Panayotov" in write_card("x", 1, {**facts, "bank": {"talk": talkers}})
    assert "Not measured yet" in write_card("x", 1, facts)
    monkeypatch.setattr(checkpoint, "EMBEDDED", tmp_path)
    assert duplex.default() == "model"
    assert duplex.load().lm.config == read_config(lm_settings)
    monkeypatch.setattr(duplex_card, "LARGEST", 1000)
    with pytest.raises(ValueError, match="1,000 at most"):
        export(tmp_path / "large", run.lm, codec, tokenizer, lm_settings, facts)


def test_a_refined_decoder_ships_if_its_codes_are_the_same(
    bank: Bank, tokenizer: bytes, codec: Mimi, tmp_path: Path
) -> None:
    run = training(bank, tokenizer, codec, tmp_path)
    facts = {**run.settings, "command": ["x"], "steps": 7, "measured": {}, "bank": bank.summary()}
    (tmp_path / RUN).write_text(json.dumps(facts))
    export(tmp_path / "model", run.lm, codec, tokenizer, settings(Encode(tokenizer).size, codec, **SMALL), facts)
    refined = mimi_checkpoint.load(tmp_path / "model" / "mimi")
    with torch.no_grad():
        refined.decoder.seanet.last.weight.mul_(0.5)
    mimi_checkpoint.save(tmp_path / "refined" / "codec", refined)
    more = {"command": ["x"], "recipe": {}, "measured": {"mel": 0.5}, "seed": 0, "steps": 11}
    (tmp_path / "refined" / RUN).write_text(json.dumps(more))
    duplex_card.main(tmp_path, tmp_path / "shipped", refined=tmp_path / "refined")
    assert "codec_refine" in (tmp_path / "shipped" / "README.md").read_text()
    shipped = mimi_checkpoint.load(tmp_path / "shipped" / "mimi").decoder.seanet.last.weight
    assert torch.equal(shipped, refined.decoder.seanet.last.weight)
    with torch.no_grad():
        refined.encoder.seanet.first.weight.mul_(2)
    mimi_checkpoint.save(tmp_path / "refined" / "codec", refined)
    with pytest.raises(ValueError, match="makes other codes"):
        duplex_card.main(tmp_path, tmp_path / "again", refined=tmp_path / "refined")
