"""The playout buffer on virtual time: seeded loss, jitter, bursts, wraps and everything else a network does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import antiphon
from antiphon.codecs import opus
from antiphon.codecs.audio_file import read
from antiphon.transport.webrtc.jitter import Transits
from antiphon.transport.webrtc.playout import CAPACITY, MOST_PACKETS, Kind, Played, PlayoutBuffer

CLIP = Path(antiphon.__file__).parent / "apps" / "samples" / "two_cities.flac"
RATE, FRAME = 16000, 320
TRANSIT = 0.03  # seconds that a packet takes at least

Arrival = tuple[float, int, int, bytes]  # seconds, sequence number, timestamp, payload


@pytest.fixture(scope="module")
def packets() -> list[bytes]:
    samples = read(CLIP, 24000)[: 24000 * 12]
    encoder = opus.encoder(24000, loss=10)
    return [encoder.encode(samples[i : i + 480]) for i in range(0, len(samples) - 479, 480)]


def sent(
    packets: Sequence[bytes],
    *,
    loss: float = 0.0,
    jitter: float = 0.0,
    seed: int = 0,
    sequence: int = 7,
    timestamp: int = 777,
    drift: float = 1.0,
) -> list[Arrival]:
    """The packets, one every 20 ms, after a network."""
    rng = random.Random(seed)
    arrivals = []
    for i, payload in enumerate(packets):
        at = drift * i * 0.02 + TRANSIT + jitter * rng.random()
        if rng.random() >= loss:
            arrivals.append((at, (sequence + i) & 0xFFFF, (timestamp + 960 * i) & 0xFFFFFFFF, payload))
    return sorted(arrivals)


class Run:
    """A buffer pulled every 20 ms while packets arrive; what came out, and when."""

    def __init__(self, arrivals: Iterable[Arrival], seconds: float, decoder: opus.Decoder | None = None) -> None:
        self.buffer = PlayoutBuffer(decoder or opus.decoder(RATE), FRAME)
        self.frames: list[Played] = []
        self.delays: list[float] = []  # milliseconds behind the fastest packet
        self.most_waiting = 0
        arrivals, at = list(arrivals), 0
        for k in range(round(seconds * 50)):
            now = 0.0371 + 0.02 * k
            while at < len(arrivals) and arrivals[at][0] <= now:
                arrival, sequence, timestamp, payload = arrivals[at]
                self.buffer.push(sequence, timestamp, payload, arrival)
                at += 1
                self.most_waiting = max(self.most_waiting, self.buffer.waiting)
            self.frames.append(self.buffer.pull(now))
            self.delays.append(self.buffer.stats.delay_ms)
        self.stats = self.buffer.stats
        self.kinds = Counter(frame.kind for frame in self.frames)
        self.samples = np.concatenate([frame.samples for frame in self.frames])

    def check(self) -> Run:
        """What holds whatever the network did."""
        stats, count = self.stats, len(self.samples)
        assert [frame.position for frame in self.frames] == list(range(0, count, FRAME))
        assert all(frame.samples.shape == (FRAME,) and frame.samples.dtype == np.float32 for frame in self.frames)
        assert np.isfinite(self.samples).all()
        made = stats.decoded + stats.fec + stats.concealed + stats.silence + stats.inserted - stats.removed
        assert made == count + self.buffer.ready
        assert self.buffer.ready <= 120 * RATE // 1000 + FRAME
        return self


def delay_at(run: Run, second: float) -> float:
    return run.delays[round(second * 50)]


def test_a_clean_stream_is_what_the_decoder_makes(packets: list[bytes]) -> None:
    run = Run(sent(packets), 11.9).check()
    decoder = opus.decoder(RATE)
    plain = np.concatenate([decoder.decode(packet) for packet in packets])
    began = next(i for i, frame in enumerate(run.frames) if frame.kind is not Kind.SILENCE)
    assert began <= 4
    tail = run.samples[6 * RATE :]
    shift = 6 * RATE - began * FRAME + run.stats.removed - run.stats.inserted
    assert np.array_equal(tail, plain[shift : shift + len(tail)])
    assert run.kinds[Kind.CONCEALED] == run.kinds[Kind.FEC] == 0
    assert 0 < delay_at(run, 5) <= 30
    assert run.stats.received == len(packets[: round(11.9 * 50)]) or run.stats.lost == 0


def test_it_begins_careful_and_comes_nearer_by_stretching(packets: list[bytes]) -> None:
    run = Run(sent(packets), 11.9).check()
    assert delay_at(run, 0.3) > 45
    assert delay_at(run, 4) < 30
    assert run.stats.removed == pytest.approx((delay_at(run, 0.3) - delay_at(run, 4)) * 16, abs=1)
    stretched = [i for i, frame in enumerate(run.frames) if frame.kind is Kind.STRETCHED]
    near = [i for i in stretched if run.delays[i - 1] < 55]
    assert len(near) > 1
    assert all(later - earlier > 2 for earlier, later in pairwise(near))


@pytest.mark.parametrize("jitter", [0.0, 0.06])
@pytest.mark.parametrize("loss", [0.01, 0.05, 0.1])
def test_losses_leave_hardly_a_hole(packets: list[bytes], loss: float, jitter: float) -> None:
    clean = Run(sent(packets, jitter=jitter), 11.9).check()
    run = Run(sent(packets, loss=loss, jitter=jitter), 11.9).check()
    began = next(i for i, frame in enumerate(run.frames) if frame.kind is not Kind.SILENCE)
    silent = sum(frame.kind is Kind.SILENCE for frame in run.frames[began:])
    assert silent == 0
    assert run.stats.fec > 0.4 * (run.stats.fec + run.stats.concealed) or loss < 0.05
    assert run.stats.fec + run.stats.concealed < 1.5 * FRAME * (run.stats.lost + run.stats.late)
    assert np.median(run.delays) <= np.median(clean.delays) + 30
    assert run.stats.lost == pytest.approx(loss * len(packets), rel=0.5)


def test_late_is_not_lost(packets: list[bytes]) -> None:
    run = Run(sent(packets, jitter=0.06), 11.9).check()
    assert run.stats.lost == 0
    assert run.stats.late == 0
    assert np.median(run.delays) < 90
    assert run.kinds[Kind.CONCEALED] < 12


def test_speech_under_loss_stays_near_the_speech_that_was_sent(packets: list[bytes]) -> None:
    clean, lossy = (Run(sent(packets, loss=loss), 11.9) for loss in (0.0, 0.05))
    energies = [np.sqrt(np.square(run.samples[:179200].reshape(-1, 3200)).mean(axis=1)) for run in (clean, lossy)]
    assert np.corrcoef(*energies)[0, 1] > 0.95


def test_after_a_burst_of_losses_the_delay_is_as_before(packets: list[bytes]) -> None:
    arrivals = [arrival for arrival in sent(packets) if not 5.0 <= arrival[0] < 5.3]
    run = Run(arrivals, 11.9).check()
    assert run.stats.lost == 15
    assert abs(delay_at(run, 7.3) - delay_at(run, 4.9)) < 20
    assert abs(delay_at(run, 5.4) - delay_at(run, 4.9)) < 20
    assert Kind.SILENCE in {frame.kind for frame in run.frames[250:270]}  # it does not go on making things up


def test_after_a_stall_nothing_is_lost_and_the_delay_comes_down(packets: list[bytes]) -> None:
    arrivals = sorted((5.3 if 5.0 <= arrival[0] < 5.3 else arrival[0], *arrival[1:]) for arrival in sent(packets))
    run = Run(arrivals, 11.9).check()
    assert run.stats.lost == run.stats.late == 0
    assert delay_at(run, 5.4) > 200
    assert abs(delay_at(run, 7.4) - delay_at(run, 4.9)) < 20


def test_numbers_wrap_around(packets: list[bytes]) -> None:
    plain = Run(sent(packets, loss=0.05, jitter=0.03), 11.9)
    wrapping = Run(sent(packets, loss=0.05, jitter=0.03, sequence=65500, timestamp=2**32 - 96000), 11.9).check()
    assert wrapping.stats.restarts == wrapping.stats.strays == 0
    assert wrapping.stats.lost == plain.stats.lost
    assert np.array_equal(wrapping.samples, plain.samples)


def test_duplicates_change_nothing(packets: list[bytes]) -> None:
    arrivals = sent(packets, loss=0.02)
    again = [(at + 0.001, *rest) for at, *rest in arrivals] + [(at + 0.5, *rest) for at, *rest in arrivals]
    once, thrice = Run(arrivals, 11.3), Run(sorted([*arrivals, *again]), 11.3).check()
    assert thrice.stats.duplicate >= 2 * once.stats.received - 60
    assert thrice.stats.lost == once.stats.lost
    assert thrice.stats.decoded == pytest.approx(once.stats.decoded, abs=5 * FRAME)


def test_a_packet_that_comes_after_its_place_was_filled_is_late(packets: list[bytes]) -> None:
    arrivals = sent(packets)
    arrivals[300] = (arrivals[300][0] + 0.1, *arrivals[300][1:])
    run = Run(sorted(arrivals), 11.9).check()
    assert (run.stats.late, run.stats.lost, run.stats.duplicate) == (1, 0, 0)
    assert run.stats.fec + run.stats.concealed == FRAME


def test_pauses_of_the_sender_are_silence_and_no_loss(packets: list[bytes]) -> None:
    dtx = b"\x08"
    arrivals = [
        (at, sequence - 100 if at > 6 else sequence, timestamp, dtx if 3.97 < at < 4.0 else payload)
        for at, sequence, timestamp, payload in sent(packets)
        if not 4.0 <= at < 6.0
    ]
    run = Run(arrivals, 11.9).check()
    assert run.stats.lost == 0
    assert run.kinds[Kind.CONCEALED] == 0
    assert run.stats.silence == pytest.approx(2.0 * RATE, abs=0.15 * RATE)
    assert abs(delay_at(run, 7) - delay_at(run, 3.9)) < 15


def test_a_pause_shorter_than_the_delay_is_silence_too(packets: list[bytes]) -> None:
    arrivals = [
        (at + 0.06 * (number >= 300), sequence, timestamp + 2880 * (number >= 300), payload)
        for number, (at, sequence, timestamp, payload) in enumerate(sent(packets))
    ]
    rng = random.Random(1)
    run = Run(sorted((at + 0.15 * rng.random(), *rest) for at, *rest in arrivals), 11.9).check()
    assert delay_at(run, 6) > 120
    assert run.stats.lost == 0
    assert Kind.SILENCE in {frame.kind for frame in run.frames[300:325]}
    assert not {frame.kind for frame in run.frames[300:325]} & {Kind.CONCEALED, Kind.FEC}


def test_a_long_loss_that_is_known_early_is_silence_too(packets: list[bytes]) -> None:
    arrivals = [arrival for arrival in sent(packets, jitter=0.38) if not 300 <= arrival[1] - 7 < 316]
    run = Run(arrivals, 11.9).check()
    assert delay_at(run, 6) > 320
    around = run.frames[310:350]
    assert sum(frame.kind is Kind.SILENCE for frame in around) >= 5
    assert sum(frame.kind is Kind.CONCEALED for frame in around) <= 9


def test_the_delay_has_a_limit(packets: list[bytes]) -> None:
    run = Run(sent(packets, jitter=0.9), 11.9).check()
    assert run.buffer.stats.target_ms <= 400
    assert np.median(run.delays[150:]) < 480


def buzz(hertz: float, seconds: float = 5) -> list[bytes]:
    """A vowel-like tone, encoded."""
    at = np.arange(round(24000 * seconds)) / 24000
    samples = sum(0.1 * np.sin(2 * np.pi * hertz * k * at) / k for k in range(1, 5)).astype(np.float32)
    encoder = opus.encoder(24000)
    return [encoder.encode(samples[i : i + 480]) for i in range(0, len(samples) - 479, 480)]


@pytest.mark.parametrize("hertz", [100, 170])
def test_a_late_packet_is_joined_in_step(hertz: float) -> None:
    arrivals = sent(buzz(hertz))
    late = arrivals[200][0]
    run = Run([(max(at, late + 0.025) if at >= late else at, *rest) for at, *rest in arrivals], 4.9).check()
    at = next(i for i in range(150, 240) if run.frames[i].kind is Kind.CONCEALED)
    near, usual = (run.samples[i * FRAME : (i + 6) * FRAME] for i in (at - 2, at - 12))
    assert np.abs(np.diff(near, 2)).max() < 1.5 * np.abs(np.diff(usual, 2)).max()
    levels = [np.sqrt(np.square(x.reshape(-1, 160)).mean(axis=1)) for x in (near, usual)]
    assert levels[0].min() > 0.6 * levels[1].min()  # concealment fades


def test_concealment_clicks_no_more_than_libopus_does() -> None:
    packets, lost = buzz(170), (150, 180, 210)
    run = Run([arrival for i, arrival in enumerate(sent(packets)) if i not in lost], 4.9).check()
    assert run.stats.lost == 3
    decoder = opus.decoder(RATE)
    plain = [decoder.conceal(FRAME) if i in lost else decoder.decode(packet) for i, packet in enumerate(packets)]
    ours, theirs = (np.abs(np.diff(x[100 * FRAME :], 2)).max() for x in (run.samples, np.concatenate(plain)))
    assert ours < 1.5 * theirs


def test_sound_that_does_not_repeat_is_left_alone_until_it_pauses() -> None:
    rng = np.random.default_rng(0)
    loud = (0.1 * rng.standard_normal(24000 * 5)).astype(np.float32)
    encoder = opus.encoder(24000, bitrate=64000)
    noise = np.concatenate([loud, 0.03 * loud])
    packets = [encoder.encode(noise[i : i + 480]) for i in range(0, len(noise) - 479, 480)]
    run = Run(sent(packets), 9.9).check()
    assert delay_at(run, 4.8) > 40
    assert delay_at(run, 9) < 35


def test_a_muted_sender_is_concealed_briefly_then_silent(packets: list[bytes]) -> None:
    run = Run([arrival for arrival in sent(packets) if arrival[0] < 4.0], 11.9).check()
    assert run.frames[210].kind is Kind.SILENCE
    assert run.stats.concealed <= 0.16 * RATE
    assert np.abs(run.samples[-RATE:]).max() < 0.01


@pytest.mark.parametrize(("sequence", "timestamp"), [(40000, 777 + 300 * 960), (307, 2**31 + 5), (9, 9)])
def test_a_jump_is_another_stream(packets: list[bytes], sequence: int, timestamp: int) -> None:
    first, second = sent(packets[:300]), sent(packets[300:], sequence=sequence, timestamp=timestamp)
    run = Run([*first, *((at + 6.0, *rest) for at, *rest in second)], 11.9).check()
    assert run.stats.restarts == run.stats.strays == 1
    assert run.stats.lost <= 1
    assert delay_at(run, 11) < 30
    assert run.stats.silence < 0.3 * RATE


def test_one_packet_out_of_step_is_left_out(packets: list[bytes]) -> None:
    arrivals = sent(packets)
    arrivals[200] = (arrivals[200][0], 30000, 10**9, arrivals[200][3])
    run = Run(arrivals, 11.9).check()
    assert (run.stats.strays, run.stats.restarts, run.stats.lost) == (1, 0, 1)


def test_empty_and_malformed_packets_are_counted_and_filled_in(packets: list[bytes]) -> None:
    arrivals = sent(packets)
    for i, payload in ((100, b""), (200, b"\xff"), (300, b"\x03\x00")):
        arrivals[i] = (*arrivals[i][:3], payload)
    arrivals[400] = (*arrivals[400][:3], b"\x4b\x41\xff\xff")  # 20 ms by its head, more padding than packet
    run = Run(arrivals, 11.9).check()
    assert run.stats.empty == 1
    assert run.stats.malformed == 3
    assert run.stats.lost == 3
    assert run.frames[-1].kind is Kind.DECODED


def test_a_drifting_clock_is_followed(packets: list[bytes]) -> None:
    for drift in (0.999, 1.001):
        run = Run(sent(packets * 3, drift=drift), 33).check()
        assert run.stats.concealed <= 2 * FRAME
        assert run.delays[-1] < 40
        net = run.stats.removed - run.stats.inserted
        assert net / RATE == pytest.approx((1 - drift) * 33 + 0.04, abs=0.03)


def test_nothing_grows_while_nobody_reads(packets: list[bytes]) -> None:
    buffer = PlayoutBuffer(opus.decoder(RATE), FRAME)
    for at, *rest in sent(packets):
        buffer.push(*rest, at)
    most = round(CAPACITY * 50)
    assert buffer.waiting <= most
    assert buffer.stats.overflowed == len(packets) - buffer.waiting
    frames = [buffer.pull(12.1 + 0.02 * k) for k in range(200)]
    assert frames[5].kind is not Kind.SILENCE
    assert buffer.stats.decoded == buffer.stats.decoded // FRAME * FRAME > 0.9 * RATE
    for sequence in range(5000):
        buffer.push(sequence, 120 * sequence, b"\x80\x01\x02", 20 + sequence * 0.0025)
    assert buffer.waiting <= round(CAPACITY * 400)
    for sequence in range(5000, 9000):  # timestamps that say less than the packets hold
        buffer.push(sequence, 600000 + 3 * (sequence - 5000), b"\x80\x01\x02", 32.5 + sequence * 6e-5)
    assert buffer.waiting == MOST_PACKETS


def test_a_reader_that_paused_goes_on_with_the_newest_second(packets: list[bytes]) -> None:
    buffer = PlayoutBuffer(opus.decoder(RATE), FRAME)
    arrivals = iter(sent(packets))
    for k in range(550):
        now = 0.0371 + 0.02 * k
        for at, *rest in arrivals:
            buffer.push(*rest, at)
            if at > now:
                break
        if not 200 <= k < 350:
            buffer.pull(now)
    assert 80 <= buffer.stats.overflowed <= 110
    assert buffer.stats.delay_ms < 45


@pytest.mark.parametrize("milliseconds", [10, 40, 60])
def test_packets_of_other_lengths(milliseconds: int) -> None:
    samples = read(CLIP, 24000)[: 24000 * 8]
    size = 24 * milliseconds
    encoder = opus.encoder(24000, loss=10)
    packets = [encoder.encode(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]
    rng = random.Random(4)
    arrivals = [
        (TRANSIT + milliseconds / 1000 * i, i, 48 * milliseconds * i, payload)
        for i, payload in enumerate(packets)
        if rng.random() > 0.05
    ]
    run = Run(arrivals, 7.9).check()
    assert run.stats.fec > 0
    assert run.stats.lost == pytest.approx(len(packets) - len(arrivals), abs=1)
    assert run.kinds[Kind.DECODED] + run.kinds[Kind.STRETCHED] > 0.8 * len(run.frames)


@pytest.mark.parametrize("frame", [160, 480])
def test_frames_of_other_lengths(packets: list[bytes], frame: int) -> None:
    buffer = PlayoutBuffer(opus.decoder(RATE), frame)
    arrivals = iter(sent(packets, loss=0.05, jitter=0.02))
    held = next(arrivals)
    for k in range(8 * RATE // frame):
        now = 0.0371 + k * frame / RATE
        while held[0] <= now:
            buffer.push(*held[1:], held[0])
            held = next(arrivals)
        assert len(buffer.pull(now).samples) == frame
    assert buffer.stats.concealed < 0.06 * 8 * RATE
    assert buffer.stats.delay_ms < 90


def test_without_libopus_it_still_plays(packets: list[bytes]) -> None:
    run = Run(sent(packets, loss=0.05), 11.9, opus.AvDecoder(RATE)).check()
    assert run.stats.decoded > 0.9 * len(run.samples)
    assert delay_at(run, 5) < 50


def taken_at_once(arrivals: list[Arrival], seconds: float) -> tuple[PlayoutBuffer, list[tuple[float, float, Played]]]:
    """As a reader without a loudspeaker takes it: when a frame was handed out, when it was due, and the frame."""
    buffer, frames, due, last = PlayoutBuffer(opus.decoder(RATE), FRAME), [], None, 0.0
    for now, *rest in [*arrivals, (seconds, 0, 0, b"")]:
        while due is not None and (due <= now or buffer.complete(due)):
            at = max(last, frames[-1][0] if frames else 0.0) if buffer.complete(due) else due
            frames.append((at, due, buffer.pull(due, whole=True)))
            due += len(frames[-1][2].samples) / RATE
        if rest[2]:
            buffer.push(*rest, now)
        last, due = now, buffer.begins() if due is None else due
    return buffer, frames


@pytest.mark.parametrize(("loss", "jitter"), [(0.0, 0.0), (0.0, 0.06), (0.05, 0.0), (0.05, 0.06)])
def test_a_reader_without_a_loudspeaker_gets_the_same_sooner(packets: list[bytes], loss: float, jitter: float) -> None:
    arrivals = sent(packets, loss=loss, jitter=jitter)
    paced = Run(arrivals, 11.9).check()
    buffer, frames = taken_at_once(arrivals, 11.9)
    stats, count = buffer.stats, sum(len(played.samples) for _, _, played in frames)
    assert [played.position for _, _, played in frames] == list(
        np.cumsum([0, *(len(played.samples) for _, _, played in frames[:-1])])
    )
    assert stats.decoded + stats.fec + stats.concealed + stats.silence + stats.inserted - stats.removed == (
        count + buffer.ready
    )
    assert np.mean([due - at for at, due, _ in frames]) > 0.012
    assert stats.lost <= paced.stats.lost + 1
    assert stats.late <= paced.stats.late
    assert stats.concealed + stats.fec <= paced.stats.concealed + paced.stats.fec + 10 * FRAME
    assert stats.silence <= paced.stats.silence


def test_on_a_clean_network_a_frame_is_handed_out_when_its_packet_comes(packets: list[bytes]) -> None:
    arrivals = sent(packets)
    _, frames = taken_at_once(arrivals, 11.9)
    came = {round(at, 6) for at, *_ in arrivals}
    assert all(round(at, 6) in came for at, _, _ in frames)
    assert frames[0][0] == pytest.approx(TRANSIT)
    assert len(frames) > 550  # nearly one for each packet: two together only where a period was cut out


_PAYLOADS = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"", b"\x08", b"\x78\x00\x01", bytes([0x48]) + bytes(range(40)), b"\xff\xfe", b"\x0b\x83\x01"]),
)
_STEPS = st.lists(
    st.tuples(
        st.integers(-3, 6),  # sequence number, from the last
        st.sampled_from([960, 960, 960, 480, 1, 0, -960, 19200, 123457, 2**31, 2**32 - 5]),  # timestamp likewise
        _PAYLOADS,
        st.floats(-0.01, 0.3),  # seconds until it arrives
        st.integers(0, 4),  # frames pulled
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(_STEPS, st.integers(0, 65535), st.integers(0, 2**32 - 1))
def test_whatever_is_sent_frames_keep_coming_and_add_up(steps: list, sequence: int, timestamp: int) -> None:
    buffer = PlayoutBuffer(opus.decoder(RATE), FRAME)
    now, position = 100.0, 0
    for step, ticks, payload, wait, pulls in steps:
        sequence, timestamp, now = (sequence + step) & 0xFFFF, (timestamp + ticks) & 0xFFFFFFFF, now + wait
        buffer.push(sequence, timestamp, payload, now)
        for _ in range(pulls):
            now += 0.02
            frame = buffer.pull(now)
            assert frame.position == position
            assert frame.samples.shape == (FRAME,)
            assert np.isfinite(frame.samples).all()
            position += FRAME
        assert buffer.waiting <= MOST_PACKETS
    stats = buffer.stats
    made = stats.decoded + stats.fec + stats.concealed + stats.silence + stats.inserted - stats.removed
    assert made == position + buffer.ready
    assert stats.lost >= 0
    assert stats.received == len(steps)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300), st.integers(1, 100))
def test_transits_are_those_of_the_last_packets(values: list[float], window: int) -> None:
    transits = Transits(window)
    for value in values:
        transits.add(value)
    last = sorted(values[-window:])
    assert len(transits) == len(last)
    assert (transits.fastest, transits.median) == (last[0], last[len(last) // 2])
    assert last[0] <= transits.punctual <= last[-1]
    assert sum(value <= transits.punctual for value in last) >= 0.96 * len(last) - 1
    transits.clear()
    assert len(transits) == 0
