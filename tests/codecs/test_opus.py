"""Opus, by each library that may do it: round trips, loss, FEC, DTX, and packets that are none."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import antiphon
from antiphon.codecs import opus
from antiphon.codecs.audio_file import read
from antiphon.codecs.opus import AvDecoder, AvEncoder, LibopusDecoder, LibopusEncoder, OpusError

CLIP = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
SETTINGS = {"bitrate": 24000, "complexity": 5, "fec": True, "loss": 10, "dtx": False}


def load(paths: list[str]) -> ctypes.CDLL | None:
    for path in paths:
        try:
            return opus.load_libopus(path)
        except (OSError, AttributeError):
            continue
    return None


LIBRARIES = {"bundled": load(opus.bundled_libraries()), "system": load(opus.system_libraries())}
NAMES = [name for name, library in LIBRARIES.items() if library is not None]
libraries = pytest.mark.parametrize("library", [LIBRARIES[name] for name in NAMES], ids=NAMES)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read(CLIP, 24000)[: 24000 * 6]


def frames(samples: np.ndarray, size: int = 480) -> list[np.ndarray]:
    return [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]


def encoded(speech: np.ndarray, **settings: int) -> list[bytes]:
    encoder = LibopusEncoder(24000, opus.find_libopus(), **{**SETTINGS, **settings})
    return [encoder.encode(frame) for frame in frames(speech)]


def delay(reference: np.ndarray, heard: np.ndarray) -> int:
    """Samples by which ``heard`` follows, by the peak of the cross-correlation."""
    size = 1 << (len(reference) + len(heard)).bit_length()
    product = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(reference, size)))
    return int(np.argmax(product[: size // 2]))


def spectral_distance(reference: np.ndarray, heard: np.ndarray) -> float:
    """Decibels between log spectra, root mean square."""
    size = min(len(reference), len(heard)) // 320 * 320
    spectra = [np.abs(np.fft.rfft(x[:size].reshape(-1, 320) * np.hanning(320))) for x in (reference, heard)]
    decibels = [20 * np.log10(spectrum + 1e-3) for spectrum in spectra]
    return float(np.sqrt(np.mean((decibels[0] - decibels[1]) ** 2)))


def test_the_copy_in_pyav_is_found_first() -> None:
    assert LIBRARIES["bundled"] is not None, "PyAV's wheel holds no libopus any more: where is it now?"
    assert opus.find_libopus()._name == opus.bundled_libraries()[0]
    assert isinstance(opus.decoder(), LibopusDecoder)
    assert isinstance(opus.encoder(), LibopusEncoder)


def test_without_libopus_pyav_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opus, "bundled_libraries", lambda: ["libnothing.so"])
    monkeypatch.setattr(opus, "system_libraries", lambda: ["libm.so.6"])  # loads, and is no libopus
    opus.find_libopus.cache_clear()
    try:
        assert isinstance(opus.decoder(), AvDecoder)
        assert isinstance(opus.encoder(), AvEncoder)
    finally:
        opus.find_libopus.cache_clear()


@libraries
@pytest.mark.parametrize("rate", [16000, 24000])
def test_speech_comes_back_with_the_delay_that_the_encoder_states(
    library: ctypes.CDLL, rate: int, speech: np.ndarray
) -> None:
    encoder, decoder = LibopusEncoder(24000, library, **SETTINGS), LibopusDecoder(rate, library)
    heard = np.concatenate([decoder.decode(encoder.encode(frame)) for frame in frames(speech)])
    assert len(heard) == len(speech) * rate // 24000
    assert abs(delay(speech[:: 24000 // 8000], heard[:: rate // 8000]) * 3 - encoder.lookahead) <= 12


def test_pyav_encodes_and_decodes_what_libopus_does(speech: np.ndarray) -> None:
    packets = encoded(speech)
    ours, theirs = opus.decoder(16000), AvDecoder(16000)
    expected = np.concatenate([ours.decode(packet) for packet in packets])
    heard = np.concatenate([theirs.decode(packet) for packet in packets])
    assert len(heard) == len(expected)
    later = delay(expected, heard)
    assert later == 32  # two milliseconds, for its resampler
    assert np.corrcoef(expected[:-later], heard[later:])[0, 1] > 0.97

    encoder, decoder = AvEncoder(24000, **SETTINGS), opus.decoder(24000)
    packets = [encoder.encode(frame) for frame in frames(speech)]
    assert all(opus.samples_48k(packet) == 960 for packet in packets)
    assert sum(map(opus.carries_fec, packets)) > len(packets) // 3
    heard = np.concatenate([decoder.decode(packet) for packet in packets])
    assert abs(delay(speech, heard) - encoder.lookahead) <= 3


@libraries
def test_concealment_beats_silence_and_fec_beats_concealment(library: ctypes.CDLL, speech: np.ndarray) -> None:
    packets = encoded(speech)
    clean = LibopusDecoder(16000, library)
    reference = np.concatenate([clean.decode(packet) for packet in packets])
    lost = set(np.random.default_rng(1).choice(len(packets) - 1, len(packets) // 10, replace=False).tolist())

    def heard(how: str) -> np.ndarray:
        decoder = LibopusDecoder(16000, library)
        pieces = []
        for i, packet in enumerate(packets):
            if i not in lost:
                pieces.append(decoder.decode(packet))
            elif how == "silence":
                pieces.append(np.zeros(320, np.float32))
            elif how == "fec" and i + 1 not in lost:
                pieces.append(decoder.recover(packets[i + 1], 320))
            else:
                pieces.append(decoder.conceal(320))
        return np.concatenate(pieces)

    silence, concealed, recovered = (spectral_distance(reference, heard(how)) for how in ("silence", "plc", "fec"))
    assert concealed < 0.8 * silence
    assert recovered < 0.9 * concealed


def test_which_packets_carry_fec_is_what_libopus_says(speech: np.ndarray) -> None:
    library = opus.find_libopus()
    rng = np.random.default_rng(2)
    seen = set()
    for size in (240, 480, 960, 1440):
        encoder = LibopusEncoder(24000, library, **SETTINGS)
        for frame in frames(speech, size):
            packet = encoder.encode(frame)
            seen.add(opus.carries_fec(packet))
            assert opus.carries_fec(packet) == bool(library.opus_packet_has_lbrr(packet, len(packet)))
    assert seen == {True, False}
    checked = 0
    for _ in range(20000):
        packet = bytes(rng.integers(0, 256, rng.integers(1, 40), np.uint8))
        theirs = library.opus_packet_has_lbrr(packet, len(packet))
        if theirs >= 0 and library.opus_packet_get_nb_channels(packet) == 1:
            checked += 1
            assert opus.carries_fec(packet) == bool(theirs), packet.hex()
    assert checked > 1000


@given(st.binary(max_size=64))
def test_durations_are_what_libopus_says(packet: bytes) -> None:
    theirs = opus.find_libopus().opus_packet_get_nb_samples(packet, len(packet), 48000) if packet else -1
    if theirs <= 0:
        with pytest.raises(OpusError):
            opus.samples_48k(packet)
    else:
        assert opus.samples_48k(packet) == theirs


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_no_bytes_break_a_decoder(packets: list[bytes]) -> None:
    for decoder in (opus.decoder(16000), AvDecoder(16000)):
        for packet in packets:
            try:
                count = opus.samples_48k(packet) // 3
                samples = decoder.decode(packet)
            except OpusError:
                continue
            assert len(samples) == count
        assert len(decoder.conceal(320)) == 320
        good = opus.encoder(24000).encode(np.zeros(480, np.float32))
        assert len(decoder.decode(good)) == 320


@pytest.mark.parametrize("kind", ["libopus", "PyAV"])
def test_a_reset_decoder_is_a_new_one(kind: str, speech: np.ndarray) -> None:
    packets = encoded(speech)[:40]
    used, fresh = (
        (opus.decoder(16000), opus.decoder(16000)) if kind == "libopus" else (AvDecoder(16000), AvDecoder(16000))
    )
    for packet in packets:
        used.decode(packet)
    used.reset()
    for packet in packets[20:]:
        assert np.array_equal(used.decode(packet), fresh.decode(packet))


def test_nobody_speaking_costs_next_to_nothing(speech: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    noise = (1e-5 * rng.standard_normal(24000 * 3)).astype(np.float32)
    small = [len(packet) <= 2 for packet in encoded(np.concatenate([speech[:48000], noise]), dtx=True)]
    assert sum(small[-100:]) > 80
    assert sum(small[:80]) < 40
    assert not any(len(packet) <= 2 for packet in encoded(noise))


def test_settings_reach_the_encoder(speech: np.ndarray) -> None:
    low, high = (sum(map(len, encoded(speech, bitrate=bitrate, fec=False))) for bitrate in (12000, 32000))
    assert low * 2 < high
    assert not any(map(opus.carries_fec, encoded(speech, fec=False)))
    encoder = LibopusEncoder(24000, opus.find_libopus(), **{**SETTINGS, "loss": 0})
    assert not any(opus.carries_fec(encoder.encode(frame)) for frame in frames(speech))
    encoder.set_loss(20)
    assert any(opus.carries_fec(encoder.encode(frame)) for frame in frames(speech))


@pytest.mark.parametrize("make", [opus.decoder, opus.encoder, AvDecoder])
def test_a_rate_that_opus_lacks_is_named(make: type) -> None:
    with pytest.raises(OpusError, match="44100"):
        make(44100)


def test_wrong_lengths_and_settings_are_named() -> None:
    with pytest.raises(OpusError, match="got 100"):
        opus.encoder(24000).encode(np.zeros(100, np.float32))
    for count in (0, 100, 16000):
        with pytest.raises(OpusError, match=f"got {count} samples"):
            opus.decoder(16000).conceal(count)
    with pytest.raises(OpusError, match="101"):
        opus.encoder(24000, loss=101)
    for decoder in (opus.decoder(), AvDecoder(16000)):
        with pytest.raises(OpusError, match="at least one byte"):
            decoder.decode(b"")
