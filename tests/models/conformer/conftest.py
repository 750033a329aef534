"""Tiny random recognisers, and a driver that streams utterances through slots as an engine would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import sentencepiece
import tokenizers
import torch
from torch import Tensor, nn

from antiphon.models.conformer.config import ConformerConfig, TransducerConfig, encoder_frames
from antiphon.models.conformer.ctc import CTCHead
from antiphon.models.conformer.encoder import ConformerEncoder
from antiphon.models.conformer.tokenizer import Source, Tokenizer
from antiphon.models.conformer.transducer import Transducer

UNKNOWN = 2**40
VOCABULARY = 11


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights that matter everywhere: norms near one, everything else spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(centre + noise)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
        elif name.endswith("running_var"):
            buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))


def tiny_config(left: int = 8, lookaheads: tuple[int, ...] = (3, 1, 0), **changes: object) -> ConformerConfig:
    sizes = {"mels": 20, "width": 32, "layers": 3, "heads": 4, "feedforward": 48, "channels": 8}
    return ConformerConfig(**sizes | {"left": left, "lookaheads": lookaheads} | changes)  # type: ignore[arg-type]


class Recogniser(nn.Module):
    """Encoder and both heads, as a checkpoint has them."""

    def __init__(self, config: ConformerConfig, max_symbols: int = 3) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(config)
        self.transducer = Transducer(TransducerConfig(VOCABULARY, config.width, 24, 2, 16, max_symbols))
        self.ctc = CTCHead(config.width, VOCABULARY)

    def prepare(self) -> Recogniser:
        self.encoder.prepare()
        self.transducer.prepare()
        return self

    def slots(self, count: int) -> dict[str, Tensor]:
        parts = (self.encoder, self.transducer, self.ctc)
        return {name: spec.new(count + 1) for part in parts for name, spec in part.state_spec().items()}


@dataclass
class Utterance:
    """A session: its mel frames, how far it is, and what came out."""

    mel: Tensor
    slot: int = 0
    made: int = 0
    frames: list[Tensor] = field(default_factory=list)
    rnnt: list[tuple[int, int]] = field(default_factory=list)
    ctc: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return encoder_frames(len(self.mel))

    @property
    def done(self) -> bool:
        return self.made >= self.total

    def block(self, frames: int) -> tuple[Tensor, int]:
        """The next chunk's mel frames, NaN where there are none, and the end if it lies within."""
        start = 8 * self.made - 7
        end = start + 8 * frames
        block = torch.full((8 * frames, self.mel.shape[1]), torch.nan, dtype=self.mel.dtype)
        first, last = max(start, 0), min(end, len(self.mel))
        if last > first:
            block[first - start : last - start] = self.mel[first:last]
        return block, len(self.mel) if end >= len(self.mel) else UNKNOWN


def step(model: Recogniser, state: dict[str, Tensor], rows: Sequence[Utterance], lookahead: int, pad: int = 0) -> None:
    """One call for these sessions, in this order, with ``pad`` rows on the scratch slot."""
    frames = lookahead + 1
    scratch = len(state["encoder.seen"]) - 1
    blocks, ends = zip(*(row.block(frames) for row in rows), strict=True)
    mel = torch.stack([*blocks, *[torch.zeros_like(blocks[0])] * pad])
    end = torch.tensor([*ends, *[UNKNOWN] * pad])
    slots = torch.tensor([*(row.slot for row in rows), *[scratch] * pad])
    active = torch.tensor([True] * len(rows) + [False] * pad)
    out, valid = model.encoder.step(mel, end, state, slots, active)
    heads = [head.decode(out, valid, state, slots, active) for head in (model.transducer, model.ctc)]
    for index, row in enumerate(rows):
        row.frames.append(out[index][valid[index]])
        for kept, (tokens, times, count) in zip((row.rnnt, row.ctc), heads, strict=True):
            n = int(count[index])
            assert (tokens[index, n:] == -1).all()
            pairs = zip(tokens[index, :n].tolist(), times[index, :n].tolist(), strict=True)
            kept += [(token, time + row.made) for token, time in pairs]
        row.made += frames


def offline(model: Recogniser, mel: Tensor, lookahead: int) -> Utterance:
    """The masked pass over a whole utterance, decoded by the slow reference below."""
    with torch.no_grad():
        frames, length = model.encoder(mel[None], torch.tensor([len(mel)]), lookahead)
        result = Utterance(mel, made=int(length))
        result.frames = [frames[0, : int(length)]]
        result.rnnt, result.ctc = greedy_rnnt(model.transducer, frames[0]), greedy_ctc(model.ctc, frames[0])
    return result


@torch.no_grad()
def greedy_rnnt(model: Transducer, frames: Tensor, limit: int | None = None) -> list[tuple[int, int]]:
    """Frame by frame, label by label, the prediction network run from the start for every label."""
    labels: list[int] = []
    times: list[int] = []
    predicted = model.predict(torch.tensor([labels], dtype=torch.int64))[:, -1:]
    for time, frame in enumerate(frames):
        for _ in range(limit or model.config.max_symbols):
            label = int(model.joint(frame[None, None], predicted).argmax())
            if label == model.blank:
                break
            labels.append(label)
            times.append(time)
            predicted = model.predict(torch.tensor([labels]))[:, -1:]
    return list(zip(labels, times, strict=True))


@torch.no_grad()
def greedy_ctc(model: CTCHead, frames: Tensor) -> list[tuple[int, int]]:
    labels = [model.blank, *model(frames).argmax(-1).tolist()]
    return [
        (label, time)
        for time, (before, label) in enumerate(itertools.pairwise(labels))
        if label not in (before, model.blank)
    ]


def agrees(streamed: Utterance, whole: Utterance, tolerance: float) -> float:
    """Assert the same frames and exactly the same tokens; returns the largest difference between frames."""
    assert [len(frames) for frames in whole.frames] == [whole.total]
    got, expected = torch.cat(streamed.frames), torch.cat(whole.frames)
    assert got.shape == expected.shape
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance
    assert streamed.rnnt == whole.rnnt
    assert streamed.ctc == whole.ctc
    return difference


class Kit:
    """What the tests of this folder share."""

    config = staticmethod(tiny_config)
    utterance = Utterance
    step = staticmethod(step)
    offline = staticmethod(offline)
    agrees = staticmethod(agrees)
    greedy_rnnt = staticmethod(greedy_rnnt)
    greedy_ctc = staticmethod(greedy_ctc)

    @staticmethod
    def model(config: ConformerConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Recogniser:
        model = Recogniser(config).double()
        randomise(model, seed)
        balance(model)
        return model.to(dtype).prepare()

    @staticmethod
    def mel(frames: int, config: ConformerConfig, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(frames, config.mels, dtype=dtype)


@torch.no_grad()
def balance(model: Recogniser) -> None:
    """Heads that see what changes from frame to frame and so emit now and then, of many labels."""
    model.eval()
    frames, _ = model.encoder(torch.randn(1, 800, model.encoder.config.mels).double(), torch.tensor([800]), 0)
    mean, spread = frames[0].mean(0), frames[0].std(0)
    for linear in (model.transducer.from_encoder, model.ctc.linear):
        linear.weight.div_(spread).mul_(3)
        linear.bias.copy_(-(linear.weight @ mean))
    for linear, blank in ((model.transducer.head, 1.5), (model.ctc.linear, 2.0)):
        linear.bias[-1] += blank


SPECIAL = ("<EOU>", "<EOB>", "<en-US>")
PIECES = ("▁the", "▁s", "e", "a")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of a few pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tiny"
    lines = ["the sea the sea", "she saw the sea", "the tea at sea"] * 9
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(path),
        vocab_size=24,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        user_defined_symbols=list(SPECIAL),
        minloglevel=2,
    )
    return Tokenizer(Source("tokenizer.model", path.with_suffix(".model").read_bytes()))


@pytest.fixture(scope="session")
def json_tokenizer() -> Tokenizer:
    """The same kind of pieces as transformers keeps them, with the blank last."""
    pieces = ["<unk>", *SPECIAL, *PIECES, "▁"]
    model = tokenizers.models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], unk_token="<unk>")
    whole = tokenizers.Tokenizer(model)
    whole.decoder = tokenizers.decoders.Metaspace()
    whole.add_special_tokens(["<blank>"])
    return Tokenizer(Source("tokenizer.json", whole.to_str().encode()))


@pytest.fixture
def kit() -> Kit:
    torch.manual_seed(0)
    return Kit()
