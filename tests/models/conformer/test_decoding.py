"""Greedy decoding in batches and chunks gives what one slow pass gives."""

from __future__ import annotations

import random

import pytest
import torch


def decode(head, chunks, state, slots, **options):
    """Tokens with times from the start, by row; chunks are (frames, valid)."""
    found = [[] for _ in slots]
    offset = torch.zeros(len(slots), dtype=torch.int64)
    active = torch.ones(len(slots), dtype=torch.bool)
    for frames, valid in chunks:
        tokens, times, count = head.decode(frames, valid, state, slots, active, **options)
        for row, n in enumerate(count.tolist()):
            pairs = zip(tokens[row, :n].tolist(), times[row, :n].tolist(), strict=True)
            found[row] += [(token, time + int(offset[row])) for token, time in pairs]
        offset += valid.sum(1)
    return found


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_ragged_chunks_are_one_pass(kit, limit):
    model = kit.model(kit.config())
    chance = random.Random(0)
    lengths = [40, 33, 26, 1]
    frames = torch.randn(4, 40, 32, dtype=torch.float64)
    slots = torch.tensor([2, 0, 3, 1])
    chunks, position = [], [0] * 4
    while any(p < n for p, n in zip(position, lengths, strict=True)):
        size = chance.randint(1, 6)
        part = torch.randn(4, size, 32, dtype=torch.float64)  # noise where a row has no frames
        valid = torch.zeros(4, size, dtype=torch.bool)
        for row in range(4):
            n = min(chance.randint(0, size), lengths[row] - position[row])
            part[row, :n] = frames[row, position[row] : position[row] + n]
            valid[row, :n] = True
            position[row] += n
        chunks.append((part, valid))
    expected = [kit.greedy_rnnt(model.transducer, frames[row, :n], limit) for row, n in enumerate(lengths)]
    assert decode(model.transducer, chunks, model.slots(4), slots, max_symbols=limit) == expected
    assert max(len(tokens) for tokens in expected) > 15
    if limit == 3:  # some frame is cut short by the limit, or this would show nothing
        times = [time for tokens in expected for _, time in tokens]
        assert max(map(times.count, times)) >= limit
    expected = [kit.greedy_ctc(model.ctc, frames[row, :n]) for row, n in enumerate(lengths)]
    assert decode(model.ctc, chunks, model.slots(4), slots) == expected


def test_ctc_keeps_a_repeat_across_a_blank_only(kit):
    head = kit.model(kit.config()).ctc
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.weight[:, : head.blank + 1] = torch.eye(head.blank + 1)
        head.linear.bias.zero_()
    labels = torch.tensor([[4, 4, 4, head.blank, 4, 5]])
    frames = torch.nn.functional.one_hot(labels, 32).double()
    state = {name: spec.new(2) for name, spec in head.state_spec().items()}
    chunks = [(frames[:, :2], torch.ones(1, 2, dtype=torch.bool)), (frames[:, 2:], torch.ones(1, 4, dtype=torch.bool))]
    assert decode(head, chunks, state, torch.tensor([0])) == [[(4, 0), (4, 4), (5, 5)]]


def test_decode_needs_prepare(kit):
    model = kit.model(kit.config()).transducer
    model.start = None
    with pytest.raises(RuntimeError, match="prepare"):
        model.decode(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool), {}, torch.zeros(1), torch.ones(1))
