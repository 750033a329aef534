"""The flow over whole utterances: its masks, its noise, its padding, its training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from antiphon.models.cosyvoice.flow import FlowMatching, noise_table, times
from antiphon.models.cosyvoice.flow_config import FlowConfig
from antiphon.models.cosyvoice.flow_context import Mask, Whole
from antiphon.models.cosyvoice.flow_encoder import Positions

TINY = FlowConfig(
    vocabulary=50, mels=8, speaker=6, chunk=5, width=32, heads=2, feedforward=48, layers=2, up_layers=1, channels=16,
    unet_heads=2, unet_head_width=8, stage_blocks=1, middle_stages=1, steps=3,
)  # fmt: skip


@pytest.fixture
def flow() -> FlowMatching:
    torch.manual_seed(0)
    made = FlowMatching(TINY).double().eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("rate", [1, 2])
@pytest.mark.parametrize("calls", [(), (3, 11, 13)], ids=str)
@pytest.mark.parametrize(("left", "shared"), [(None, 0), (4, 0), (4, 5), (14, 5)])
def test_masks_are_their_definition(rate: int, calls: tuple[int, ...], left: int | None, shared: int) -> None:
    tokens, chunk = 23, 5
    allowed = Mask(chunk, calls, shared, left).allowed(tokens * rate, rate, torch.device("cpu"))
    cuts = sorted({*range(0, tokens + chunk, chunk), *calls})
    for query in range(tokens * rate):
        first = max(cut for cut in cuts if cut * rate <= query) * rate
        end = min(cut for cut in cuts if cut * rate > query) * rate
        seen = {key for key in range(tokens * rate) if key < end}
        if left is not None:
            seen = {key for key in seen if key >= first - left * rate // 2 or key < shared * rate}
        assert set(allowed[query].nonzero().flatten().tolist()) == seen


def test_without_a_chunk_everything_is_seen() -> None:
    assert Mask().allowed(7, 1, torch.device("cpu")).all()


def test_what_lies_past_a_rows_end_does_not_matter(flow: FlowMatching) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (3, 21), generator=generator)
    lengths = torch.tensor([21, 13, 4])
    prompt = torch.randn(3, 6, TINY.mels, generator=generator).double()
    prompt[2, 2:] = 0
    embedding = torch.randn(3, TINY.speaker, generator=generator).double()
    for mask in (Mask(5), Mask(), Mask(5, (7,), 5, 4)):
        together = flow.generate(tokens, lengths, prompt, embedding, mask)
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            told = prompt[one, : 2 * length]
            alone = flow.generate(tokens[one, :length], lengths[one], told, embedding[one], mask)
            assert (together[row, : 2 * length] - alone[0]).abs().max() < 1e-12
            assert not together[row, 2 * length :].any()


def test_silence_follows_the_end(flow: FlowMatching) -> None:
    """What padding would be embedded as is not heard by the convolution that looks ahead."""
    tokens, lengths = torch.arange(1, 13)[None], torch.tensor([10])
    before = flow.encode(tokens, lengths, Mask(5))
    with torch.no_grad():
        flow.encoder.embedding.weight[[0, 11, 12]] += 1
    assert torch.equal(flow.encode(tokens, lengths, Mask(5))[:, :20], before[:, :20])
    with torch.no_grad():
        flow.encoder.embedding.weight[10] += 1
    assert not torch.equal(flow.encode(tokens, lengths, Mask(5))[:, :20], before[:, :20])


def test_every_sample_on_the_way(flow: FlowMatching) -> None:
    tokens, length = torch.arange(9)[None], torch.tensor([9])
    told = (torch.zeros(1, 0, TINY.mels), torch.ones(1, TINY.speaker))
    samples = flow.generate(tokens, length, *told, Mask(5), every=True)
    assert samples.shape == (3, 1, 18, TINY.mels)
    assert torch.equal(samples[-1], flow.generate(tokens, length, *told, Mask(5)))
    assert (samples[0] - samples[1]).abs().max() > 1e-3


def test_guidance_moves_away_from_what_has_no_condition(flow: FlowMatching) -> None:
    tokens, length = torch.arange(9)[None], torch.tensor([9])
    told = (torch.ones(1, 4, TINY.mels), torch.ones(1, TINY.speaker))
    samples = {}
    for guidance in (0.0, 0.7, 1.4):
        flow.config = FlowConfig(
            **{name: getattr(TINY, name) for name in TINY.__dataclass_fields__} | {"guidance": guidance}
        )
        samples[guidance] = flow.generate(tokens, length, *told, Mask(5), every=True)[0]
    assert torch.allclose(samples[1.4] - samples[0.7], samples[0.7] - samples[0.0], atol=1e-12)
    assert (samples[0.7] - samples[0.0]).abs().max() > 1e-4


def test_noise_belongs_to_a_frame(flow: FlowMatching) -> None:
    table = noise_table(80)
    assert table.shape == (15000, 80)
    torch.manual_seed(0)
    assert torch.equal(table.T[None], torch.randn(1, 80, 15000))
    frames = torch.tensor([[3, 14999], [15003, 29999]])
    noise = flow.noise_at(frames)
    assert torch.equal(noise[0], noise[1])
    assert noise.dtype == torch.float64


def test_times_are_dense_at_the_noise() -> None:
    steps = times(10)
    assert (steps[0], steps[-1]) == (0, pytest.approx(1))
    lengths = [end - start for start, end in itertools.pairwise(steps)]
    assert lengths == sorted(lengths)
    assert steps[5] == pytest.approx(1 - math.sqrt(0.5))


def test_scores_by_position_are_those_of_distances() -> None:
    width, length = 16, 12
    context = Whole(Mask(), torch.tensor([length]), length, 1, torch.float64)
    x = torch.randn(1, length, 2, width, dtype=torch.float64)
    scores = Positions(context, width, torch.float64).scores(x)
    rates = torch.exp(torch.arange(0, width, 2).double() * -(math.log(10000) / width))
    for query in range(length):
        for key in range(length):
            angles = (query - key) * rates
            embedding = torch.stack((angles.sin(), angles.cos()), 1).flatten()
            assert torch.allclose(scores[0, :, query, key], x[0, query] @ embedding, atol=1e-12)


@pytest.mark.parametrize("mask", [Mask(), Mask(5)], ids=["full", "chunks"])
def test_training_reaches_every_weight(flow: FlowMatching, mask: Mask) -> None:
    torch.manual_seed(1)
    lengths = torch.tensor([12, 7, 12, 9])
    mel = torch.randn(4, 24, TINY.mels).double()
    mu = flow.encode(torch.randint(50, (4, 12)), lengths, mask)
    loss = flow.loss(mu, lengths, mel, torch.randn(4, TINY.speaker).double(), mask)
    loss.backward()
    assert [name for name, parameter in flow.named_parameters() if parameter.grad is None] == []
    silent = [name for name, parameter in flow.named_parameters() if not parameter.grad.any()]
    assert silent == []


def test_the_loss_ignores_padding(flow: FlowMatching) -> None:
    tokens, embedding = torch.randint(50, (2, 12)), torch.randn(2, TINY.speaker).double()
    lengths = torch.tensor([12, 5])
    mel = torch.randn(2, 24, TINY.mels).double()
    other = mel.clone()
    other[1, 10:] += 100
    losses = []
    for target in (mel, other):
        torch.manual_seed(3)
        losses.append(flow.loss(flow.encode(tokens, lengths, Mask(5)), lengths, target, embedding, Mask(5)))
    assert torch.allclose(losses[0], losses[1], atol=1e-12)


def test_a_trained_flow_fits(flow: FlowMatching) -> None:
    """A few steps on one utterance bring its loss down."""
    torch.manual_seed(4)
    tokens, lengths = torch.arange(10)[None].expand(8, -1), torch.full((8,), 10)
    mel = torch.randn(1, 20, TINY.mels).double().expand(8, -1, -1)
    embedding = torch.randn(1, TINY.speaker).double().expand(8, -1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = flow.loss(flow.encode(tokens, lengths, Mask(5)), lengths, mel, embedding, Mask(5))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
