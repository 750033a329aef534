"""Shards, joined clips and batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.apps.train.batches import LONGEST, Augmentation, Batcher, Pool, join, read
from antiphon.apps.train.data import FRAME, RATE, Shard, ShardWriter
from antiphon.codecs.mel import LogMel

RECORD = {"text": "ab ba", "licence": "CC0-1.0", "source": "made up"}


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "noises") as writer:
        for index in range(8):
            samples = random.integers(-9000, 9000, int(random.uniform(0.5, 1.5) * RATE)).astype(np.int16)
            writer.add(samples, {**RECORD, "id": index, "speaker": f"s{index // 3}"})
    return Shard(tmp_path / "noises")


def pool(shard: Shard) -> Pool:
    return Pool([shard], lambda text: [ord(letter) % 7 for letter in text], "cpu")


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    samples = np.array([0.5, -1.5, 1.0, 0.0])
    with ShardWriter(tmp_path / "s") as writer:
        writer.add(samples, {**RECORD, "id": "a", "speaker": "x"})
        writer.add(np.arange(2000, dtype=np.int16), {**RECORD, "id": "b", "speaker": "x"})
    shard = Shard(tmp_path / "s")
    assert shard.audio(0).tolist() == [16384, -32768, 32767, 0]
    assert shard.audio(1).tolist() == list(range(2000))
    assert [clip.offset % FRAME for clip in shard.clips] == [0, 0]
    assert shard.clips[1].corpus == "s"


def test_an_unfinished_or_cut_shard_is_refused(tmp_path: Path, shard: Shard) -> None:
    ShardWriter(tmp_path / "open").add(np.zeros(10, np.int16), {**RECORD, "id": 0, "speaker": "x"})
    with pytest.raises(FileNotFoundError, match=r"manifest\.jsonl"):
        Shard(tmp_path / "open")
    path = shard.folder / "audio.pcm"
    path.write_bytes(path.read_bytes()[: -4 * FRAME])
    with pytest.raises(ValueError, match="pack it again"):
        Shard(shard.folder)


def test_neighbours_of_one_speaker_are_joined_up_to_the_limit(shard: Shard) -> None:
    joined = join(shard.clips)
    assert [clip.text.count("ab") for clip in joined] == [3, 3, 2]
    first = joined[0]
    assert (first.offset, first.offset + first.samples) == (0, shard.clips[2].offset + shard.clips[2].samples)
    long = [replace(clip, samples=int(LONGEST * RATE / 2)) for clip in shard.clips]
    assert join(long) == []  # they would not lie back to back


def test_a_batch_follows_from_seed_step_and_rank(shard: Shard) -> None:
    batcher = Batcher(pool(shard), LogMel(), Augmentation(noisy=0.5, echoing=0.5), None, seed=1)
    first, again = batcher(4, 10.0), batcher(4, 10.0)
    assert torch.equal(first.mel, again.mel)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.mel, batcher(5, 10.0).mel[:, : first.mel.shape[1]])
    assert not torch.equal(first.begin, batcher(4, 10.0, rank=1).begin[: len(first.begin)])


def test_padding_is_masked_and_masks_stay_inside(shard: Shard) -> None:
    batch = Batcher(pool(shard), LogMel(), Augmentation(), None, seed=0)(0, 12.0)
    past = torch.arange(batch.mel.shape[1]) >= batch.frames[:, None]
    assert not batch.mel[past].any()
    assert batch.mel.isfinite().all()
    plain = Batcher(pool(shard), LogMel(), None, None, seed=0)(0, 12.0)
    masked = batch.mel[0, : batch.frames[0]]
    constant = (masked == masked.flatten().mode().values).float().mean()
    assert 0.02 < constant < 0.7  # SpecAugment fills with one value
    assert plain.rate.eq(1).all()


def test_reading_at_a_rate_interpolates() -> None:
    pcm = torch.arange(0, 3000, 10, dtype=torch.int16)
    heard = read(pcm, torch.tensor([5, 20]), torch.tensor([1.0, 1.5], dtype=torch.float64), 4)
    expected = torch.tensor([[50.0, 60.0, 70.0, 80.0], [200.0, 215.0, 230.0, 245.0]]) / 32768
    torch.testing.assert_close(heard, expected)


def test_nothing_to_train_on_is_said(shard: Shard) -> None:
    with pytest.raises(ValueError, match="no clip to train on"):
        Pool([shard], lambda text: [0], "cpu", keep=lambda clip: False)
