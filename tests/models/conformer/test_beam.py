"""Beam search over slots finds what a plain search over dictionaries finds, in any batch and any chunks."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from antiphon.models.conformer.beam import BeamSearch
from antiphon.models.conformer.config import ASRConfig, BeamConfig, LanguageModelConfig, TransducerConfig
from antiphon.models.conformer.language_model import LanguageModel

VOCABULARY = 11
SETTINGS = {
    "one": BeamConfig(width=1),
    "plain": BeamConfig(),
    "wide": BeamConfig(width=8, symbols=3, settle=4, prune=20.0),
    "fused": BeamConfig(width=4, language_model=0.6, internal=0.3, bonus=0.4),
    "cool": BeamConfig(width=4, language_model=0.4, internal=0.3, bonus=0.4, temperature=2.0),
    "hasty": BeamConfig(width=4, settle=1, language_model=0.6, bonus=0.8),
}


@pytest.fixture(autouse=True)
def _exact():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(kit):
    def make(config, dtype=torch.float64):
        transducer = kit.model(kit.config()).transducer
        transducer.head.weight.mul_(0.5)  # closer calls than greedy decoding's tests want
        lm = LanguageModel(LanguageModelConfig(12, 16), VOCABULARY).double()
        for parameter in lm.parameters():
            parameter.copy_(torch.randn_like(parameter))
        return BeamSearch(transducer.to(dtype), config, lm.to(dtype) if config.language_model else None, 6).prepare()

    return make


def reference(search, frames):
    """One utterance: (label, frame) pairs, from dictionaries of transcripts; networks run from the start each time."""
    transducer, lm, config = search.transducer, search.language_model, search.config
    blank = transducer.blank

    @functools.cache
    def predicted(labels):
        return transducer.predict(torch.tensor([labels], dtype=torch.int64))[0, -1]

    @functools.cache
    def ahead(labels):
        total = torch.full((blank,), config.bonus, dtype=frames.dtype)
        if lm is not None:
            total += config.language_model * lm(torch.tensor([[lm.start, *labels]]))[0, -1].log_softmax(-1)
        if config.internal:
            alone = transducer.head(torch.relu(transducer.from_encoder.bias + predicted(labels)))
            total -= config.internal * (alone[:blank] / config.temperature).log_softmax(-1)
        return total

    now = {(): (0.0, ())}  # labels -> log probability, times
    final = []  # labels and their times when they became so
    for at, frame in enumerate(transducer.from_encoder(frames)):
        active, done = now, {}
        for symbol in range(config.symbols + 1):
            chances = {
                labels: (transducer.head(torch.relu(frame + predicted(labels))) / config.temperature).log_softmax(-1)
                for labels in active
            }
            for labels, (score, times) in active.items():
                score += chances[labels][blank].item()
                if labels in done:
                    score = torch.tensor([score, done[labels][0]]).logsumexp(0).item()
                    times = done[labels][1]
                done[labels] = (score, times)
            done = dict(sorted(done.items(), key=lambda one: -one[1][0])[: config.width])
            if symbol == config.symbols:
                break
            best = max(score for score, _ in done.values())
            grown = [
                (score + value, (*labels, label), (*times, at))
                for labels, (score, times) in active.items()
                for label, value in enumerate((chances[labels][:blank] + ahead(labels)).tolist())
            ]
            grown = sorted(grown, reverse=True)[: config.width]
            active = {labels: (score, times) for score, labels, times in grown if score > best - config.prune}
        labels, (_, times) = max(done.items(), key=lambda one: one[1][0])
        while len(final) < len(labels) and times[len(final)] <= at - config.settle:
            final.append((labels[len(final)], times[len(final)]))
        prefix = labels[: len(final)]
        now = {labels: value for labels, value in done.items() if labels[: len(final)] == prefix}
    labels, (_, times) = max(now.items(), key=lambda one: one[1][0])
    return final + list(zip(labels, times, strict=True))[len(final) :]


class Driver:
    """Sessions in slots, fed frames a few at a time."""

    def __init__(self, search, slots, total=8):
        self.search, self.slots = search, torch.tensor(slots)
        self.state = {name: spec.new(total + 1) for name, spec in search.state_spec().items()}
        self.found = [[] for _ in slots]
        self.open = [[] for _ in slots]
        self.heard = [0] * len(slots)

    def step(self, frames, counts, ended, active=None):
        valid = torch.arange(frames.shape[1]) < torch.tensor(counts)[:, None]
        active = torch.tensor(active or [True] * len(counts))
        out = self.search.decode(frames, valid, torch.tensor(ended), self.state, self.slots, active)
        for row, heard in enumerate(self.heard):
            if active[row]:
                self.found[row] += pairs(out, "", row, heard)
                self.open[row] = pairs(out, "open_", row, heard)
                self.heard[row] += counts[row]


def pairs(out, kind, row, heard):
    count = int(out[kind + "count"][row])
    times = [time + heard for time in out[kind + "times"][row, :count].tolist()]
    return list(zip(out[kind + "tokens"][row, :count].tolist(), times, strict=True))


def alone(search, frames, chunks):
    driver = Driver(search, [3])
    for part in frames[None].split(chunks, 1):
        ended = driver.heard[0] + part.shape[1] == len(frames)
        driver.step(part, [part.shape[1]], [ended])
    return driver.found[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_it_finds_what_the_plain_search_finds(make, name):
    search = make(SETTINGS[name])
    frames = torch.randn(30, 32, dtype=torch.float64)
    expected = reference(search, frames)
    assert len(expected) > 3
    assert alone(search, frames, 1) == expected
    assert alone(search, frames, 6) == expected


def test_the_settings_matter(make):
    """Otherwise the test above would show little."""
    frames = torch.randn(30, 32, dtype=torch.float64)
    found = {name: tuple(alone(make(config), frames, 5)) for name, config in SETTINGS.items()}
    assert len(set(found.values())) == len(found)


def test_ragged_chunks_of_a_batch(make):
    search = make(SETTINGS["fused"])
    chance = random.Random(0)
    lengths = [30, 21, 26, 1]
    frames = torch.randn(4, 30, 32, dtype=torch.float64)
    driver = Driver(search, [2, 0, 3, 1])
    while driver.heard != lengths:
        size = chance.randint(1, 6)
        counts = [
            min(chance.randint(0, size), length - heard) for length, heard in zip(lengths, driver.heard, strict=True)
        ]
        part = torch.randn(4, size, 32, dtype=torch.float64)  # noise where a row has no frames
        for row, (heard, count) in enumerate(zip(driver.heard, counts, strict=True)):
            part[row, :count] = frames[row, heard : heard + count]
        ended = [
            0 < count == length - heard for length, heard, count in zip(lengths, driver.heard, counts, strict=True)
        ]
        driver.step(part, counts, ended)
    assert driver.found == [reference(search, frames[row, :length]) for row, length in enumerate(lengths)]
    assert driver.open == [[]] * 4


def test_what_is_open_becomes_final_or_changes_and_what_is_final_stays(make):
    search = make(SETTINGS["fused"])
    frames = torch.randn(60, 32, dtype=torch.float64)
    driver, changed = Driver(search, [0]), 0
    for at, frame in enumerate(frames):
        before = driver.found[0] + driver.open[0]
        driver.step(frame[None, None], [1], [at == 59])
        now = driver.found[0] + driver.open[0]
        changed += now[: len(before)] != before
        assert all(time > at - search.config.settle for _, time in driver.open[0])
        assert all(at == 59 or time <= at - search.config.settle for _, time in driver.found[0])
    assert changed > 3


def test_batched_equals_alone(make):
    search = make(SETTINGS["fused"], torch.float32)
    frames = torch.randn(4, 24, 32)
    expected = []
    for row in range(4):
        driver = Driver(search, [row, 8, 8, 8])
        for at in range(0, 24, 2):
            batch = torch.full((4, 2, 32), 3.0)
            batch[0] = frames[row, at : at + 2]
            driver.step(batch, [2] * 4, [False] * 4, [True, False, False, False])
        expected.append(({name: tensor[row].clone() for name, tensor in driver.state.items()}, driver.found[0]))
    driver = Driver(search, [6, 1, 4, 3])
    for at in range(0, 36, 2):
        starts = [at - 4 * row for row in range(4)]
        active = [0 <= start < 24 for start in starts]
        batch = torch.stack([frames[row, max(0, min(22, start)) :][:2] for row, start in enumerate(starts)])
        driver.step(batch, [2] * 4, [False] * 4, active)
    for row, (state, found) in enumerate(expected):
        assert driver.found[row] == found
        for name, tensor in state.items():
            assert torch.equal(driver.state[name][driver.slots[row]], tensor), name


def test_calls_that_cannot_be(make):
    search = make(SETTINGS["plain"])
    frames = torch.zeros(1, 7, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="7 frames in one call"):
        Driver(search, [0]).step(frames, [7], [False])
    search.start = None
    with pytest.raises(RuntimeError, match="prepare"):
        Driver(search, [0]).step(frames[:, :1], [1], [False])


def test_settings_that_cannot_be(kit):
    with pytest.raises(ValueError, match="width of a beam search"):
        BeamConfig(width=0)
    with pytest.raises(ValueError, match="prune of a beam search"):
        BeamConfig(prune=-1.0)
    with pytest.raises(ValueError, match="temperature of a beam search"):
        BeamConfig(temperature=0.0)
    with pytest.raises(ValueError, match="needs a transducer"):
        ASRConfig(kit.config(), VOCABULARY, ctc=True, beam=BeamConfig())
    with pytest.raises(ValueError, match="by beam search alone"):
        ASRConfig(
            kit.config(),
            VOCABULARY,
            TransducerConfig(VOCABULARY, encoder_width=32),
            language_model=LanguageModelConfig(),
        )
