"""Log-mel features: definition, streaming against offline, independence of neighbours, guarded state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from antiphon.codecs.mel import UNKNOWN, LogMel, MelConfig, slaney_filters

LOOKAHEADS = (0, 1, 6, 13)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 0.1


def fresh(mel: LogMel, sessions: int) -> dict[str, Tensor]:
    return {name: spec.new(sessions + 1) for name, spec in mel.state_spec().items()}


def stream(mel: LogMel, audio: Tensor, lookaheads: Iterable[int], reveal: str = "last") -> Tensor:
    """One session alone, blocks of the given lookaheads (the last repeats), until every frame is out."""
    state, slot, end = fresh(mel, 1), torch.tensor([0]), audio.shape[0]
    lookaheads, position, frames = list(lookaheads), -mel.config.lead_samples, []
    produced = -mel.config.lead_frames
    while produced < end // mel.config.hop:
        size = mel.config.block(lookaheads.pop(0) if len(lookaheads) > 1 else lookaheads[0])
        block = torch.full((1, size), math.nan, dtype=audio.dtype)
        low, high = max(position, 0), min(position + size, end)
        if high > low:
            block[0, low - position : high - position] = audio[low:high]
        known = reveal == "first" or position + size > end
        frames.append(mel.step(block, torch.tensor([end if known else UNKNOWN]), state, slot, torch.tensor([True]))[0])
        position += size
        produced += size // mel.config.hop
    return torch.cat(frames, 1)[0, mel.config.lead_frames :][: end // mel.config.hop]


def reference(audio: np.ndarray, config: MelConfig) -> np.ndarray:
    """Frame by frame from the definition, in float64, with a plain discrete Fourier sum."""
    emphasised = np.append(audio[:1], audio[1:] - config.preemphasis * audio[:-1])
    padded = np.pad(emphasised, config.n_fft // 2)
    window = np.pad(np.hanning(config.window), (config.n_fft - config.window) // 2)
    phase = np.exp(-2j * np.pi * np.outer(np.arange(config.n_fft // 2 + 1), np.arange(config.n_fft)) / config.n_fft)
    filters = slaney_filters(config).numpy()
    rows = [
        np.log(np.abs(phase @ (padded[t * config.hop :][: config.n_fft] * window)) ** 2 @ filters + config.guard)
        for t in range(len(audio) // config.hop)
    ]
    return np.array(rows)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_offline_is_the_definition(n_mels: int) -> None:
    config = MelConfig(n_mels=n_mels)
    audio = noise(5000, dtype=torch.float64)
    mel, lengths = LogMel(config).double()(audio[None], torch.tensor([5000]))
    assert lengths.tolist() == [31]
    np.testing.assert_allclose(mel[0].numpy(), reference(audio.numpy(), config), atol=1e-10)


def test_filters_peak_at_the_published_frequencies() -> None:
    """Inner values of librosa's documented ``mel_frequencies(n_mels=40)``, of which the ends are 0 and 11025 Hz."""
    published = {
        0: 85.317,
        1: 170.635,
        10: 938.49,
        11: 1024.856,
        12: 1119.114,
        20: 2262.393,
        30: 5453.621,
        37: 10096.408,
    }
    peaks = slaney_filters(MelConfig(sample_rate=22050, n_mels=38, n_fft=2**16)).argmax(0) * (22050 / 2**16)
    for index, hertz in published.items():
        assert peaks[index].item() == pytest.approx(hertz, abs=0.2)


def test_filters_closed_form() -> None:
    """The scale is linear below 1 kHz, so there the triangles are equal, and every filter has an area of about one."""
    filters = slaney_filters(MelConfig(n_fft=8192))
    area = filters.sum(0) * (16000 / 8192)
    torch.testing.assert_close(area, torch.ones(80, dtype=torch.float64), atol=2e-2, rtol=0)
    peaks = filters.argmax(0) * (16000 / 8192)
    linear = peaks[peaks < 900].double()
    assert (linear.diff() - linear.diff().mean()).abs().max() < 16000 / 8192
    assert (peaks.diff() > 0).all()


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 161, 480, 1279, 1280])
def test_short_recordings(samples: int) -> None:
    audio = noise(samples)
    mel, lengths = LogMel()(audio[None], torch.tensor([samples]))
    assert mel.shape == (1, samples // 160, 80)
    assert lengths.tolist() == [samples // 160]
    assert torch.equal(stream(LogMel(), audio, [0]), mel[0])


def test_batch_padding_does_not_matter() -> None:
    mel = LogMel()
    lengths = torch.tensor([16000, 4001, 0, 7999])
    audio = torch.full((4, 16000), math.nan)
    for row, n in enumerate(lengths.tolist()):
        audio[row, :n] = noise(n, seed=row)
    batch, frames = mel(audio, lengths)
    assert frames.tolist() == [100, 25, 0, 49]
    for row, (n, t) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        assert torch.equal(batch[row, :t], mel(audio[row : row + 1, :n], lengths[row : row + 1])[0][0])
        assert not batch[row, t:].any()


def test_silence_is_finite() -> None:
    mel, _ = LogMel()(torch.zeros(1, 1600), torch.tensor([1600]))
    assert torch.equal(mel, torch.full_like(mel, math.log(2**-24)))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("reveal", ["first", "last"])
@pytest.mark.parametrize("samples", [16000, 37113])
def test_streaming_is_offline_to_the_bit(lookahead: int, reveal: str, samples: int) -> None:
    mel, audio = LogMel(), noise(samples)
    offline = mel(audio[None], torch.tensor([samples]))[0][0]
    assert torch.equal(stream(mel, audio, [lookahead], reveal), offline)
    wide = LogMel().double()
    offline = wide(audio[None].double(), torch.tensor([samples]))[0][0]
    torch.testing.assert_close(stream(wide, audio.double(), [lookahead], reveal), offline, atol=1e-12, rtol=0)


def test_lookahead_may_change_in_mid_stream() -> None:
    mel, audio = LogMel(), noise(64000)
    assert torch.equal(stream(mel, audio, [13, 0, 0, 6, 1, 3, 0]), mel(audio[None], torch.tensor([64000]))[0][0])


@pytest.mark.parametrize("bucket", [4, 8, 16])
def test_sessions_joining_and_leaving_do_not_disturb_each_other(bucket: int) -> None:
    """Ten sessions of ragged lengths share a batch by chance; each hears exactly what it hears alone."""
    mel, rng = LogMel(), np.random.default_rng(bucket)
    block = mel.config.block(1)
    lengths = [int(n) for n in rng.integers(500, 20000, 10)]
    audio = [noise(n, seed=i) for i, n in enumerate(lengths)]
    state, heard = fresh(mel, 10), [[] for _ in range(10)]
    position = [-mel.config.lead_samples] * 10
    while waiting := [i for i in range(10) if len(heard[i]) * 16 - 7 < lengths[i] // 160]:
        rows = rng.permutation(waiting)[: rng.integers(1, bucket + 1)].tolist()
        pcm, ends = torch.full((bucket, block), math.nan), torch.zeros(bucket, dtype=torch.int64)
        slots, active = torch.full((bucket,), 10), torch.zeros(bucket, dtype=torch.bool)
        for row, i in enumerate(rows):
            low, high = max(position[i], 0), min(position[i] + block, lengths[i])
            pcm[row, low - position[i] : max(high, low) - position[i]] = audio[i][low : max(high, low)]
            ends[row] = lengths[i] if position[i] + block > lengths[i] else UNKNOWN
            slots[row], active[row], position[i] = i, True, position[i] + block
        out, _ = mel.step(pcm, ends, state, slots, active)
        for row, i in enumerate(rows):
            heard[i].append(out[row])
    for i in range(10):
        assert torch.equal(torch.cat(heard[i])[7:][: lengths[i] // 160], stream(mel, audio[i], [1]))


def test_inactive_rows_leave_their_slot() -> None:
    mel, state = LogMel(), fresh(LogMel(), 3)
    slots, unknown = torch.tensor([2, 0, 3, 3]), torch.full((4,), UNKNOWN)
    mel.step(noise(4, 1280), unknown, state, slots, torch.tensor([True, True, False, False]))
    before = {name: t.clone() for name, t in state.items()}
    mel.step(noise(4, 1280, seed=1), unknown, state, slots, torch.tensor([True, False, False, False]))
    assert all(torch.equal(state[name][:2], before[name][:2]) for name in state)
    assert state["mel.position"].tolist()[:3] == [200, -1080, 1480]


def test_half_precision_models_keep_full_precision_features() -> None:
    audio, lengths = noise(1, 3200), torch.tensor([3200])
    expected = LogMel()(audio, lengths)[0]
    assert torch.equal(LogMel().bfloat16()(audio, lengths)[0], expected)
    assert torch.equal(LogMel().half().float()(audio, lengths)[0], expected)
    assert LogMel().double().filters.equal(slaney_filters(MelConfig()))
    assert not LogMel().state_dict()


def test_errors_name_the_value() -> None:
    mel = LogMel()
    with pytest.raises(ValueError, match="multiple of 1280 samples, got 1000"):
        mel.step(noise(1, 1000), torch.tensor([UNKNOWN]), fresh(mel, 1), torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="hop 500"):
        MelConfig(hop=500)


def test_config_from_nemo() -> None:
    section = {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000,
        "normalize": "NA",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 128,
        "n_fft": 512,
        "frame_splicing": 1,
        "dither": 1e-05,
        "pad_to": 0,
    }
    assert MelConfig.from_nemo(section) == MelConfig(n_mels=128)
    with pytest.raises(ValueError, match=r"preprocessor\.normalize = 'per_feature' is not supported"):
        MelConfig.from_nemo({**section, "normalize": "per_feature"})
    assert MelConfig.from_nemo({**section, "log_zero_guard_value": "eps"}).guard == 2**-23
    with pytest.raises(ValueError, match="log_zero_guard_value = 'small' is neither"):
        MelConfig.from_nemo({**section, "log_zero_guard_value": "small"})
