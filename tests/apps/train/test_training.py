"""The training loop on two tones: it learns, repeats itself, and continues exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.apps.train.asr import train_tokenizer
from antiphon.apps.train.batches import Augmentation, Batcher, Pool
from antiphon.apps.train.card import AVERAGED, RUN, export
from antiphon.apps.train.data import RATE, Shard, ShardWriter
from antiphon.apps.train.evaluate import total_errors, word_errors
from antiphon.apps.train.teacher import STEP, targets
from antiphon.apps.train.text import scored, spoken
from antiphon.apps.train.trainer import Recipe, Student, Trainer
from antiphon.codecs.mel import LogMel
from antiphon.models.conformer.checkpoint import load
from antiphon.models.conformer.config import ConformerConfig, TransducerConfig

RECIPE = Recipe(steps=20, batch_seconds=12, warmup=5, rate=3e-3, ctc_at=2, rnnt_at=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tones") as writer:
        for index in range(24):
            letters = random.integers(0, 2, 4)
            time = np.arange(RATE // 4) / RATE
            tones = [np.sin(2 * np.pi * (400 + 900 * letter) * time) for letter in letters]
            text = " ".join("ab"[letter] for letter in letters)
            record = {"id": index, "text": text, "speaker": str(index), "licence": "CC0-1.0", "source": "tones"}
            writer.add(0.3 * np.concatenate(tones), record)
    return Pool([Shard(tmp_path / "tones")], lambda text: [2 + "ab".index(letter) for letter in text.split()], "cpu")


def trainer(pool: Pool, out: Path, seed: int = 0) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    encoder = ConformerConfig(
        width=32, layers=2, heads=2, feedforward=64, channels=8, left=70, lookaheads=(6, 0, 1, 13), dropout=0.1
    )
    student = Student(
        encoder, TransducerConfig(4, encoder_width=32, width=16, joint_width=16), teacher_width=8, block=0
    )
    features = torch.randn(len(pool.pcm) // STEP + 2, 8, generator=torch.Generator().manual_seed(5))
    return Trainer(student, RECIPE, Batcher(pool, LogMel(), Augmentation(), None, seed), features, out, seed)


def test_twenty_steps_lower_every_loss(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path / "run")
    losses = [{name: float(loss) for name, loss in run.train_step().items()} for _ in range(20)]
    for name in ("ctc", "rnnt"):
        values = [loss[name] for loss in losses if name in loss]
        assert np.mean(values[-4:]) < 0.8 * np.mean(values[:4]), name
    assert int(run.skipped) == 0
    assert "ctc" not in losses[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(pool: Pool, tmp_path: Path) -> None:
    whole = trainer(pool, tmp_path / "whole")
    whole.run()
    trainer(pool, tmp_path / "halves").run(until=9)
    second = trainer(pool, tmp_path / "halves", seed=0)
    assert second.resume()
    assert second.step == 9
    second.run()
    assert torch.equal(second.flat, whole.flat)
    assert torch.equal(second.average, whole.average)
    other = trainer(pool, tmp_path / "other", seed=1)
    other.run()
    assert not torch.equal(other.flat, whole.flat)


def test_a_bad_gradient_changes_nothing_and_is_counted(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path / "run")
    run.train_step()
    before = run.flat.clone()
    run.features.fill_(float("nan"))
    run.train_step()
    assert torch.equal(run.flat, before)
    assert int(run.skipped) == 1


def test_a_run_that_goes_blind_goes_back_at_half_the_rate(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path / "run")
    run.run(until=8, log_every=2)
    real = run.train_step

    def step() -> dict[str, torch.Tensor]:
        losses = real()
        if len(calls) == 3:
            run.flat.fill_(9.0)
        calls.append({name: float(loss) for name, loss in losses.items()})
        return losses

    calls: list[dict[str, float]] = []
    run.train_step = step  # type: ignore[method-assign]
    run.run(log_every=2, save_every=1000)
    assert run.recipe.rate == RECIPE.rate / 2
    assert run.step == 20
    assert len(calls) == 12 + 6  # those of the steps 9 to 14 came to nothing
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"step": 8, "rate": RECIPE.rate / 2} in lines
    assert calls[6]["distil"] == calls[0]["distil"]
    again = trainer(pool, tmp_path / "run")
    assert again.resume()
    assert again.recipe.rate == RECIPE.rate / 2


def test_another_recipe_does_not_resume(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path / "run")
    run.run(until=1)
    run.recipe = Recipe(steps=20, batch_seconds=13)
    with pytest.raises(ValueError, match="another recipe"):
        run.resume()


def test_losses_join_in_order_and_the_rate_ends_at_zero() -> None:
    recipe = Recipe(steps=4000)
    assert recipe.weights(0) == {"distil": 4.0, "ctc": 0.0, "rnnt": 0.0}
    assert recipe.weights(900)["ctc"] == pytest.approx(0.4)
    assert recipe.weights(900)["rnnt"] == 0
    assert recipe.weights(3999) == pytest.approx({"distil": 1.0, "ctc": 0.4, "rnnt": 1.0})
    assert recipe.learning_rate(4000) == 0
    assert recipe.learning_rate(700) == recipe.rate


def test_targets_are_the_features_just_heard() -> None:
    features = torch.arange(50.0)[:, None]
    frames = targets(features, torch.tensor([10 * STEP]), torch.tensor([1.0], dtype=torch.float64), 4)
    assert frames[0, 1:].tolist() == [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]


def test_text_is_spoken_and_scored() -> None:
    assert spoken("Mr. O\u2019Neil paid $1,200 on the 3rd - 50% \u2026 caf\u00e9!") == (
        "mister o'neil paid one thousand two hundred dollars on the third fifty percent cafe"
    )
    assert scored("It's OKAY, twenty-one") == "its ok twenty one"


def test_word_errors_agree_with_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    random = np.random.default_rng(1)
    words = ["one", "two", "tree", "four"]
    pairs = [tuple(" ".join(random.choice(words, random.integers(1, 9))) for _ in "ab") for _ in range(40)]
    total = total_errors(pairs)
    assert total.rate == pytest.approx(100 * jiwer.wer([a for a, _ in pairs], [b for _, b in pairs]))
    assert word_errors("a b c", "a x c d").rate == pytest.approx(200 / 3)


def test_the_card_says_what_went_in(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path / "run")
    run.run(until=2)
    weights = {name: value.half() for name, value in run.averaged().state_dict().items()}
    torch.save(weights, tmp_path / "run" / AVERAGED)
    corpus = {"hours": 1.25, "clips": 2, "speakers": 3, "licences": ["CC0-1.0"], "sources": ["tones"]}
    facts = {"command": ["x"], "corpora": {"tones": corpus}, "held_out": ["s9"], "seed": 0, "steps": 2, "recipe": {}}
    (tmp_path / "run" / RUN).write_text(json.dumps(facts))
    train_tokenizer(["a b ab ba"] * 9, 4, tmp_path / "t.model")
    figures = {
        "clips": {"tones": 2},
        "wer": {"tones": {"6": {"rnnt": 12.5}}},
        "others": {"rival": {"tones": {"wer": 99.5}}},
    }
    export(tmp_path / "run", tmp_path / "t.model", tmp_path / "tiny", figures)
    card = (tmp_path / "tiny" / "README.md").read_text()
    for fact in ("CC0-1.0", "1.25", "s9", "| this, rnnt, lookahead 480 ms | 12.5 |", "| rival | 99.5 |"):
        assert fact in card
    asr = load(tmp_path / "tiny")
    assert asr.lookaheads == (6, 0, 1, 13)
    exported = asr.encoder.blocks[1].after.up.weight
    assert torch.equal(exported, weights["encoder.blocks.1.after.up.weight"].float())
