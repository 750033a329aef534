"""The codec's training on tones: losses fall, a resumed run is the uninterrupted one, the result is a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import Device

from antiphon.apps.train.bank import Bank
from antiphon.apps.train.codec import TINY, CodecTraining, Crops, Learned, Recipe, Teacher, measured
from antiphon.apps.train.codec_losses import Judges, MelDistance
from antiphon.apps.train.codec_refine import Refining
from antiphon.codecs import mimi_checkpoint
from antiphon.codecs.mel import LogMel
from antiphon.codecs.mimi import Mimi, MimiConfig
from antiphon.codecs.mimi_quantizer import ResidualQuantizer
from antiphon.models.conformer.config import ConformerConfig
from antiphon.models.conformer.encoder import ConformerEncoder

CONFIG = MimiConfig(
    channels=4, width=32, layers=1, heads=2, feedforward=64, window=20, codebooks=3, bins=32, code_width=8, steps=(1,)
)
RECIPE = Recipe(rows=4, frames=8, warmup=4, rate=3e-3, judge_from=0.5, judged=4, average=0.9)

pytestmark = pytest.mark.usefixtures("one_thread")


def training(bank: Bank, out: Path, steps: int = 12, seed: int = 0) -> CodecTraining:
    torch.manual_seed(0)
    pcm = torch.from_numpy(np.array(bank.pcm))
    encoder = ConformerEncoder(ConformerConfig(width=16, layers=1, heads=2, feedforward=32, channels=4))
    teacher = Teacher(encoder, LogMel(), RECIPE.lag)
    return CodecTraining(CONFIG, RECIPE, Crops(bank, pcm, RECIPE, seed), teacher, out, steps, seed)


def test_losses_fall_and_the_judges_join(bank: Bank, tmp_path: Path) -> None:
    run = training(bank, tmp_path, 24)
    losses = []
    for _ in range(24):
        losses.append({name: float(loss) for name, loss in run.train_step().items()})
        run.step += 1
    for name in ("mel", "distil"):
        assert np.mean([one[name] for one in losses[-4:]]) < 0.9 * np.mean([one[name] for one in losses[:3]]), name
    assert "tell" not in losses[11]
    assert losses[-1]["tell"] < losses[12]["tell"]
    assert losses[-1]["used"] > 4
    assert run.skipped() == 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(bank: Bank, tmp_path: Path) -> None:
    whole = training(bank, tmp_path / "whole")
    whole.run()
    training(bank, tmp_path / "halves").run(until=7)
    second = training(bank, tmp_path / "halves")
    assert second.resume()
    assert second.step == 7
    second.run()
    assert torch.equal(second.weights.flat, whole.weights.flat)
    assert torch.equal(second.weights.average, whole.weights.average)  # type: ignore[arg-type]
    books = [one.student.mimi.quantizer.acoustic.codebooks.embedding for one in (second, whole)]
    assert torch.equal(*books)
    lines = [json.loads(line) for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 12]
    other = training(bank, tmp_path / "halves", seed=1)
    with pytest.raises(ValueError, match="another recipe"):
        other.resume()


@pytest.mark.parametrize("judged", [False, True])
def test_a_step_stays_on_the_device(bank: Bank, tmp_path: Path, judged: bool) -> None:
    run = training(bank, tmp_path)
    pcm = run.crops(0)
    features = run.teacher(pcm)
    run._step(judged, pcm, features)  # the optimisers set themselves up
    with Device() as device:
        run._step(judged, pcm, features)
    assert not device.found, device.found[0]


def test_what_is_saved_is_the_averaged_codec(bank: Bank, tmp_path: Path) -> None:
    run = training(bank, tmp_path, 4)
    run.run()
    codec = run.codec()
    mimi_checkpoint.save(tmp_path / "codec", codec)
    read = mimi_checkpoint.load(tmp_path / "codec", steps=(1,))
    assert read.config == CONFIG
    pcm = run.crops(99)
    assert (read.decode(codec.encode(pcm)) - codec.decode(codec.encode(pcm))).abs().max() < 1e-2
    assert set(measured(read, run.crops, 1)) == {"mel", "snr"}


def test_a_refined_decoder_says_the_same_codes_better(bank: Bank, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Mimi(CONFIG).eval()
    pcm = torch.from_numpy(np.array(bank.pcm))
    crops = Crops(bank, pcm, RECIPE, 0)
    codes, before = codec.encode(crops(99)), measured(codec, crops, 1)
    kept = {name: value.clone() for name, value in codec.state_dict().items()}
    run = Refining(codec, RECIPE, crops, tmp_path, 24)
    run.run()
    refined = run.codec()
    assert torch.equal(refined.encode(crops(99)), codes)
    assert measured(refined, crops, 1)["mel"] < 0.9 * before["mel"]
    changed = {name for name, value in refined.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed
    assert all(name.startswith("decoder.") or ".back." in name for name in changed)
    again = Refining(Mimi(CONFIG), RECIPE, crops, tmp_path, 24)
    assert again.resume()
    assert torch.equal(again.weights.flat, run.weights.flat)


def test_the_shipped_sizes() -> None:
    with torch.device("meta"):
        mimi = Mimi(TINY)
    assert (TINY.frame, TINY.frame_rate, TINY.codebooks, TINY.bins) == (1920, 12.5, 8, 512)
    assert sum(value.numel() for value in mimi.state_dict().values()) <= 6_000_000
    assert TINY.window <= 2 * Recipe().frames  # it is trained on all that it looks back on


def test_codebooks_learn_what_they_stand_for() -> None:
    """Four clusters and four entries: after a while each entry is the mean of a cluster, and none is dead."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(2, 1, 4, 2)
    torch.nn.init.eye_(quantizer.into.weight)
    torch.nn.init.eye_(quantizer.back.weight)
    learned = Learned(quantizer, 0.9, 0.1).train()
    centres = torch.tensor([[3.0, 3], [3, -3], [-3, 3], [-3, -3]])
    for _ in range(80):
        inputs = centres[torch.randint(4, (64,))] + 0.1 * torch.randn(64, 2)
        entries, commit, used = learned(inputs[None])
    assert float(used) > 3.5
    assert float(commit.detach()) < 0.05
    found = quantizer.codebooks.embedding[0]
    assert (torch.cdist(centres, found).amin(1) < 0.2).all()
    assert (entries[0] - inputs).norm(dim=1).max() < 1
    before = found.clone()
    learned.eval()(inputs[None])
    assert torch.equal(found, before)


def test_gradients_go_past_the_codes() -> None:
    learned = Learned(ResidualQuantizer(3, 2, 5, 4), 0.9, 0.1)
    latents = torch.randn(1, 6, 3, requires_grad=True)
    learned(latents)[0].sum().backward()
    wanted = learned.quantizer.into.weight.sum(0).expand(1, 6, 3)
    assert latents.grad is not None
    assert torch.allclose(latents.grad, wanted)


def test_the_teacher_tells_of_the_sound_that_was_heard(bank: Bank) -> None:
    """A click in the codec's frame 5 shows most in the teacher's frame for it; with a lag, so much later."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(width=16, layers=1, heads=2, feedforward=32, channels=4, kernel=1))
    quiet = torch.zeros(1, 12 * 1920)
    click = quiet.clone()
    click[0, int(5.5 * 1920)] = 0.9
    loudest = []
    for lag in (0, 1, 3):
        teacher = Teacher(encoder, LogMel(), lag)
        changed = (teacher(click) - teacher(quiet)).abs().amax(2)[0]
        assert changed.shape == (12,)
        loudest.append(int(changed.argmax()))
    assert loudest == [5, 6, 8]


def test_distances_and_judges() -> None:
    random = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(2, 9600, generator=random)
    distance = MelDistance(24000)
    assert float(distance(sound, sound)) == 0
    assert float(distance(0.5 * sound, sound)) < float(distance(0.1 * sound, sound))
    judges = Judges(4, (256, 512))
    fool, alike = judges.to_fool(sound, sound)
    assert float(alike) == 0
    assert float(fool) > 0
    assert float(judges.to_tell(sound, sound)) > 0
