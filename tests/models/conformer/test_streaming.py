"""Streaming gives what the masked offline pass gives, whoever shares the batch."""

from __future__ import annotations

import random

import pytest
import torch

from antiphon.models.conformer.config import encoder_frames

TOLERANCE = 1e-12
CONTEXTS = [
    (left, lookahead, lookaheads)
    for left, lookaheads in ((70, (13, 6, 1, 0)), (56, (3, 0, 6, 13)), (8, (3, 1, 0)), (10, (3, 0)))
    for lookahead in lookaheads
]
VARIANTS = {
    "plain": {},
    "scaled": {"scale_input": True},
    "no bias": {"bias": False, "conv_bias": False},
    "batch norm": {"conv_norm": "batch_norm"},
}


@pytest.mark.parametrize(("left", "lookahead", "lookaheads"), CONTEXTS)
def test_streaming_is_offline(kit, left, lookahead, lookaheads):
    config = kit.config(left, lookaheads)
    model = kit.model(config)
    utterance = kit.utterance(kit.mel(8 * (left + 45) + 3, config))
    state = model.slots(1)
    while not utterance.done:
        kit.step(model, state, [utterance], lookahead)
    whole = kit.offline(model, utterance.mel, lookahead)
    kit.agrees(utterance, whole, TOLERANCE)
    assert len(whole.rnnt) > 10
    assert len(whole.ctc) > 10


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 15, 16, 17, 64, 65, 200])
def test_tails_of_every_length(kit, changes, length):
    config = kit.config(**changes)
    model = kit.model(config)
    for lookahead in config.lookaheads:
        utterance = kit.utterance(kit.mel(length, config))
        state = model.slots(1)
        while not utterance.done:
            kit.step(model, state, [utterance], lookahead)
        kit.agrees(utterance, kit.offline(model, utterance.mel, lookahead), TOLERANCE)


def test_fifty_sessions_join_and_leave(kit):
    config = kit.config()
    model = kit.model(config)
    chance = random.Random(1)
    state = model.slots(9)
    fresh = model.slots(1)
    waiting = [(kit.mel(chance.randint(0, 350), config), chance.choice(config.lookaheads)) for _ in range(50)]
    live, finished, together = {}, 0, 0
    while waiting or live:
        for slot in range(9):
            if slot not in live and waiting and chance.random() < 0.3:
                mel, lookahead = waiting.pop()
                live[slot] = (kit.utterance(mel, slot), lookahead)
                for name, tensor in state.items():
                    tensor[slot] = fresh[name][0]
        for lookahead in config.lookaheads:
            rows = [row for row, chosen in live.values() if chosen == lookahead and chance.random() < 0.8]
            if rows:
                chance.shuffle(rows)
                together = max(together, len(rows))
                kit.step(model, state, rows, lookahead, pad=chance.randint(0, 3))
        for slot in [slot for slot, (row, _) in live.items() if row.done]:
            row, lookahead = live.pop(slot)
            kit.agrees(row, kit.offline(model, row.mel, lookahead), TOLERANCE)
            finished += 1
    assert finished == 50
    assert together > 3


def test_lookahead_may_change_at_every_chunk(kit):
    config = kit.config(12, (3, 1, 0))
    model = kit.model(config)
    chance = random.Random(2)
    mel = kit.mel(8 * 60, config)
    utterance = kit.utterance(mel)
    state = model.slots(1)
    mask = torch.zeros(encoder_frames(len(mel)) + 4, encoder_frames(len(mel)) + 4, dtype=torch.bool)
    while not utterance.done:
        lookahead = chance.choice(config.lookaheads)
        start = utterance.made
        mask[start : start + lookahead + 1, max(0, start - config.window(lookahead)) : start + lookahead + 1] = True
        kit.step(model, state, [utterance], lookahead)
    total = utterance.total
    with torch.no_grad():
        x, lengths = model.encoder.subsampling(mel[None], torch.tensor([len(mel)]))
        whole = model.encoder.encode(x, lengths, mask[:total, :total])[0]
    assert (torch.cat(utterance.frames) - whole).abs().max() < TOLERANCE
    assert utterance.rnnt == kit.greedy_rnnt(model.transducer, whole)


def run(kit, model, mels, lookahead, order, pad=0, batch=None):
    """Stream utterances in groups of ``batch``, rows in ``order``; what came out, by utterance."""
    rows = [kit.utterance(mel, slot) for slot, mel in enumerate(mels)]
    state = model.slots(len(rows))
    while not all(row.done for row in rows):
        for first in range(0, len(order), batch or len(order)):
            group = [rows[index] for index in order[first : first + (batch or len(order))]]
            kit.step(model, state, group, lookahead, pad)
    return rows, state


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize(("width", "mels"), [(32, 20), (128, 80)])
def test_a_row_does_not_depend_on_the_others(kit, lookahead, width, mels):
    config = kit.config(width=width, mels=mels, feedforward=4 * width, channels=width // 2)
    model = kit.model(config, torch.float32)
    utterances = [kit.mel(150, config, torch.float32) for _ in range(16)]
    together, state = run(kit, model, utterances, lookahead, range(16))
    shuffled = random.Random(3).sample(range(16), 16)
    for others in (
        run(kit, model, utterances, lookahead, shuffled),
        run(kit, model, utterances, lookahead, shuffled, batch=8),
        run(kit, model, utterances, lookahead, range(16), batch=4),
        run(kit, model, utterances, lookahead, range(16), batch=1, pad=3),
    ):
        for row, other in zip(together, others[0], strict=True):
            assert torch.equal(torch.cat(row.frames), torch.cat(other.frames))
            assert row.rnnt == other.rnnt
            assert row.ctc == other.ctc
        for name, tensor in state.items():
            assert torch.equal(tensor[:16], others[1][name][:16]), name


def test_a_snapshot_continues_exactly(kit):
    config = kit.config()
    model = kit.model(config, torch.float32)
    mel = kit.mel(300, config, torch.float32)
    straight, moved = kit.utterance(mel, 0), kit.utterance(mel, 1)
    state, other = model.slots(6), model.slots(4)
    while not straight.done:
        kit.step(model, state, [straight], 1, pad=3)
        if moved.made == 10:
            for name, tensor in other.items():
                tensor[3] = state[name][1]
            moved.slot, state = 3, state
        kit.step(model, other if moved.made >= 10 else state, [moved], 1, pad=3)
    assert torch.equal(torch.cat(straight.frames), torch.cat(moved.frames))
    assert straight.rnnt == moved.rnnt


def test_inactive_rows_leave_their_slot_alone(kit):
    config = kit.config()
    model = kit.model(config)
    rows = [kit.utterance(kit.mel(300, config), slot) for slot in range(3)]
    state = model.slots(3)
    for _ in range(4):
        kit.step(model, state, rows, 1)
    before = {name: tensor.clone() for name, tensor in state.items()}
    slots, active = torch.arange(3), torch.tensor([True, False, True])
    end = torch.full((3,), 2**40)
    frames, valid = model.encoder.step(torch.randn(3, 16, config.mels).double(), end, state, slots, active)
    model.transducer.decode(frames, valid, state, slots, active)
    model.ctc.decode(frames, valid, state, slots, active)
    for name, tensor in state.items():
        assert torch.equal(tensor[1], before[name][1]), name
    assert not torch.equal(state["encoder.rings"][0], before["encoder.rings"][0])
    assert torch.equal(state["encoder.seen"][:3], before["encoder.seen"][:3] + torch.tensor([2, 0, 2]))


def test_what_lies_past_an_utterance_does_not_matter_offline(kit):
    config = kit.config()
    model = kit.model(config)
    long, short = kit.mel(400, config), kit.mel(111, config)
    batch = torch.full((2, 400, config.mels), torch.nan, dtype=torch.float64)
    batch[0], batch[1, :111] = long, short
    with torch.no_grad():
        frames, lengths = model.encoder(batch, torch.tensor([400, 111]), 1)
        alone, _ = model.encoder(short[None], torch.tensor([111]), 1)
    assert lengths.tolist() == [encoder_frames(400), encoder_frames(111)]
    assert (frames[1, : lengths[1]] - alone[0]).abs().max() < TOLERANCE


def test_training_reaches_every_weight(kit):
    config = kit.config()
    model = kit.model(config)
    encoder = model.encoder.train()
    frames, lengths = encoder(torch.randn(2, 120, config.mels).double(), torch.tensor([120, 77]), 1)
    labels = torch.tensor([[1, 2, 3]])
    loss = frames.sum() + model.transducer.joint(frames[:1], model.transducer.predict(labels)).square().sum()
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("ctc")]
    assert unreached == []
    assert lengths.tolist() == [encoder_frames(120), encoder_frames(77)]


def test_misuse_is_told(kit):
    config = kit.config()
    model = kit.model(config)
    state = model.slots(1)
    one = torch.zeros(1, dtype=torch.int64), state, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    for frames in (0, 7, 12, 40):
        with pytest.raises(ValueError, match=f"not {frames}"):
            model.encoder.step(torch.zeros(1, frames, config.mels, dtype=torch.float64), *one)
    unready = type(model.encoder)(config)
    with pytest.raises(RuntimeError, match="prepare"):
        unready.step(torch.zeros(1, 8, config.mels), *one)
    for wrong, match in (
        ({"left": 3}, "shorter than a chunk"),
        ({"heads": 5}, "multiple"),
        ({"lookaheads": (1, 1)}, "distinct"),
        ({"conv_norm": "group_norm"}, "group_norm"),
        ({"layers": 0}, "layers"),
    ):
        with pytest.raises(ValueError, match=match):
            kit.config(**wrong)
