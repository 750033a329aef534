"""Train the speech tokenizer of the embedded voice, and write the tokens of its bank.

    antiphon train tts tokens --bank speech-bank --out tokens-run --minutes 3 --fit --device cuda

Its six digits are rounded to three levels with the gradient passed straight through (FSQ, arXiv 2309.15505). From the
tokens and the speaker alone, light networks regress the embedded recogniser's features, which tell what is said, spell
the text (CTC), and draw the mel frames. Stop and start again at will. ``OUT/tokens.safetensors`` is the tokenizer, with
averaged weights; ``tokens.npy`` and ``mel.npy`` in the bank are what it and ``PromptMel`` make of the bank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs.prompt_mel import PromptMel
from ...codecs.speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from ...codecs.whisper_mel import WhisperMel
from .codec import Teacher
from .loop import Loop, Losses, Weights, placed, plain, schedule
from .run import Device, Fit, Minutes, Rate, Run, SaveEvery, Seed, Steps, Until, record_of
from .tts_bank import MEL, TOKENS, Batches, SpeechBank, Spoken, characters, gathered
from .tts_sizes import ALPHABET, FRAME, TOKEN, TOKENIZER, VOICES
from .voices.signal import PLAIN, resample

TOKENIZER_FILE = "tokens.safetensors"
WIDTHS = (48, 72, 100, 128, 160, 200, 250, 300)  # speech tokens of a batch's rows
HEARD, DRAWN = 4, TOKEN // FRAME  # frames of the tokenizer's features and of the flow's mel in a token
TAUGHT = 2  # tokens in a frame of the recogniser
BLANK = len(ALPHABET)
ROOM = 12000  # tokens that features are made of at a time


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data, sizes and seed. room: tokens in a batch.

    mel, distil, ctc: weights of the losses. ctc_from: share of the steps after which CTC begins to count.
    """

    room: int = 8000
    rate: float = 1e-3
    warmup: int = 300
    level_until: float = 0.4
    decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999
    mel: float = 1.0
    distil: float = 1.0
    ctc: float = 0.3
    ctc_from: float = 0.15


@dataclass(frozen=True, eq=False)
class Features:
    """Of a bank, in the order of its samples. heard: ``[4 N, mels]`` that the tokenizer hears, of N tokens. mel:
    ``[2 N, 80]``. taught: ``[N / 2, width]``, the recogniser's, standardised; nothing without a teacher."""

    heard: Tensor
    mel: Tensor
    taught: Tensor


def by_length(utterances: Sequence[Spoken], room: int) -> Iterator[tuple[int, list[Spoken]]]:
    """Batches of similar length, padded at most ``room`` tokens, each with its width, an even number."""
    ordered = sorted(utterances, key=lambda one: -one.count)
    while ordered:
        width = ordered[0].count + ordered[0].count % TAUGHT
        rows = max(1, room // width)
        yield width, ordered[:rows]
        ordered = ordered[rows:]


@torch.no_grad()
def features(bank: SpeechBank, mels: int, teacher: Teacher | None, device: torch.device) -> Features:
    """Made on the device, a pass over the bank."""
    count = len(bank.pcm) // TOKEN
    whisper, prompt_mel = WhisperMel(mels, normalize=False).to(device), PromptMel().to(device)
    half = {"dtype": torch.float16, "device": device}
    heard = torch.zeros(count * HEARD, mels, **half)  # type: ignore[call-overload]
    mel = torch.zeros(count * DRAWN, prompt_mel.filters.shape[1], **half)  # type: ignore[call-overload]
    taught = torch.zeros(count // TAUGHT, teacher.width if teacher else 0, **half)  # type: ignore[call-overload]
    for width, some in by_length(bank.utterances, ROOM):
        pcm = np.zeros((len(some), width * TOKEN), np.int16)
        for row, one in zip(pcm, some, strict=True):
            row[: one.count * TOKEN] = bank.pcm[one.samples]
        sound = placed(pcm, device).float() / 32768
        # Rows lie back to back: the filter mixes the millisecond where they meet.
        clip = resample(sound.reshape(-1), PLAIN).view(len(some), -1)
        begin, size = _places(some, device)
        _put(heard, whisper(clip).transpose(1, 2), begin * HEARD, size * HEARD)
        _put(mel, prompt_mel(sound), begin * DRAWN, size * DRAWN)
        if teacher:
            _put(taught, teacher(sound), begin // TAUGHT, size // TAUGHT)
    if teacher:
        spread, mean = torch.std_mean(taught.float(), 0)
        taught = ((taught - mean) / spread.clamp(min=1e-3)).half()
    return Features(heard, mel, taught)


def _places(some: Sequence[Spoken], device: torch.device) -> Tensor:
    return placed(np.array([[one.begin for one in some], [one.count for one in some]]), device)


def _put(table: Tensor, rows: Tensor, begin: Tensor, count: Tensor) -> None:
    """Into ``[N, d]`` the first ``count [B]`` of ``rows [B, n, d]``, from ``begin [B]`` on."""
    index = torch.arange(rows.shape[1], device=table.device)
    real = index < count[:, None]
    table[(begin[:, None] + index)[real]] = rows[real].to(table.dtype)


class Student(nn.Module):
    """A tokenizer in training with the networks that judge its tokens."""

    def __init__(self, config: SpeechTokenizerConfig, mels: int, taught: int) -> None:
        super().__init__()
        width = config.width
        self.tokenizer = SpeechTokenizer(config)
        self.up = nn.Linear(config.digits, width)
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.voices = nn.Embedding(len(VOICES), width)
        self.draw = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1), nn.GELU(), nn.Conv1d(width, DRAWN * mels, 3, padding=1)
        )
        self.teach = nn.Linear(TAUGHT * width, taught)
        self.spell = nn.Linear(width, len(ALPHABET) + 1)
        self.mels = mels

    @torch.no_grad()
    def start(self, heard: Tensor, count: Tensor) -> None:
        """Let the digits begin as what varies most in the encoder's frames, each on its own and on all levels. As torch
        starts them, all would be rounded to 0."""
        down = self.tokenizer.project_down
        x, _ = self.tokenizer.encoder(heard, count * HEARD)
        x = x[_real(count, x.shape[1])].double()
        mean = x.mean(0)
        spread, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        digits = down.out_features
        weight = (directions[:, -digits:] / spread[-digits:].clamp(min=1e-9).sqrt()).T
        down.weight.copy_(weight)
        down.bias.copy_(-weight @ mean)

    def forward(self, heard: Tensor, count: Tensor, voice: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """heard ``[B, mels, 4 n]`` of ``count [B]`` tokens, voice ``[B]`` -> the guessed mel ``[B, 2 n, mels]``,
        features ``[B, n / 2, taught]`` and letters ``[B, n, letters]``, and the tokens ``[B, n]``."""
        x, _ = self.tokenizer.encoder(heard, count * HEARD)
        between = self.tokenizer.bounded(x)
        rounded = between.round()
        x = self.up(between + (rounded - between).detach()) * _real(count, x.shape[1])[..., None]
        x = x.transpose(1, 2)
        for layer in self.mix:
            x = x + F.gelu(layer(x))
        drawn = self.draw(x + self.voices(voice)[..., None]).transpose(1, 2).unflatten(2, (DRAWN, self.mels))
        x = x.transpose(1, 2)
        guess = self.teach(x.unflatten(1, (-1, TAUGHT)).flatten(2))
        return drawn.flatten(1, 2), guess, self.spell(x), self.tokenizer.number(rounded)


def _real(count: Tensor, width: int) -> Tensor:
    """``[B, width]`` bool: the first ``count [B]``."""
    return torch.arange(width, device=count.device) < count[:, None]


class TokensTraining(Loop):
    """The tokenizer and its judges."""

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        recipe: Recipe,
        utterances: Sequence[Spoken],
        made: Features,
        out: Path,
        steps: int,
        seed: int = 0,
    ) -> None:
        super().__init__(out, steps, plain({"config": asdict(config), "recipe": asdict(recipe), "seed": seed}))
        torch.manual_seed(seed)
        self.recipe, self.made, self.utterances, self.seed = recipe, made, list(utterances), seed
        self.batches = Batches([one.count for one in utterances], recipe.room, WIDTHS, seed)
        self.letters = [np.array(characters(one.text), np.int64) for one in utterances]
        device = made.mel.device
        some = made.mel[:: max(1, len(made.mel) // 100_000)].float()
        self.spread, self.mean = torch.std_mean(some, 0)
        self.student = Student(config, made.mel.shape[1], made.taught.shape[1]).to(device).train()
        heard, count, _ = self._batch(*self.batches(2**31))
        self.student.start(heard, count)
        self.weights = Weights(
            self.student, betas=(0.9, 0.98), decay=recipe.decay, clip=recipe.clip, average=recipe.average
        )  # fmt: skip

    def _batch(self, width: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, list[Spoken]]:
        """``[B, mels, 4 width]`` that the tokenizer hears, how many tokens each has, and whose they are."""
        some = [self.utterances[index] for index in chosen]
        begin, count = _places(some, self.made.mel.device)
        heard = gathered(self.made.heard, begin * HEARD, count * HEARD, width * HEARD)
        return heard.float().transpose(1, 2), count, some

    def losses(self, student: Student, width: int, chosen: NDArray[np.int64]) -> Losses:
        """``mel`` and ``distil``, ``ctc`` in nats a letter, and how many tokens are in use (perplexity)."""
        heard, count, some = self._batch(width, chosen)
        device = heard.device
        begin, _ = _places(some, device)
        voice = placed(np.array([one.voice for one in some]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=heard.is_cuda):
            drawn, guess, letters, tokens = student(heard, count, voice)
        mel = gathered(self.made.mel, begin * DRAWN, count * DRAWN, width * DRAWN).float()
        taught = gathered(self.made.taught, begin // TAUGHT, count // TAUGHT, width // TAUGHT).float()
        at_frames, at_pairs = _real(count * DRAWN, mel.shape[1]), _real(count // TAUGHT, taught.shape[1])
        wrong = (drawn.float() - (mel - self.mean) / self.spread).abs().mean(2)
        alike = F.cosine_similarity(guess.float(), taught, dim=-1)
        share = torch.zeros(student.tokenizer.config.vocabulary, device=device)
        share = share.index_add_(0, tokens.flatten(), _real(count, width).flatten().float()) / count.sum()
        return {
            "mel": (wrong * at_frames).sum() / at_frames.sum(),
            "distil": 1 - (alike * at_pairs).sum() / at_pairs.sum(),
            "ctc": self._ctc(letters, some, [self.letters[index] for index in chosen]),
            "used": (-(share * share.clamp(min=1e-9).log()).sum()).exp().detach(),
        }

    def _ctc(self, logits: Tensor, some: Sequence[Spoken], texts: Sequence[NDArray[np.int64]]) -> Tensor:
        sizes = torch.tensor([len(text) for text in texts])
        target = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
        for row, text in zip(target, texts, strict=True):
            row[: len(text)] = text
        found = logits.float().log_softmax(2).transpose(0, 1)
        lengths = torch.tensor([one.count for one in some])
        total = F.ctc_loss(
            found, placed(target, logits.device), lengths, sizes, BLANK, reduction="sum", zero_infinity=True
        )
        return total / int(sizes.sum())

    def train_step(self) -> Losses:
        recipe = self.recipe
        self.weights.rate.fill_(recipe.rate * schedule(self.step, self.steps, recipe.warmup, recipe.level_until))
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        losses = self.losses(self.student, *self.batches(self.step))
        spelt = recipe.ctc if self.step >= recipe.ctc_from * self.steps else 0.0
        total = recipe.mel * losses["mel"] + recipe.distil * losses["distil"] + spelt * losses["ctc"]
        self.weights.clear()
        total.backward()
        self.weights.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def skipped(self) -> int:
        return int(self.weights.skipped)

    def state(self) -> dict[str, Any]:
        return {"student": self.weights.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights.load(state["student"])

    def tokenizer(self) -> SpeechTokenizer:
        """With averaged weights."""
        return self.weights.averaged(self.student).tokenizer

    @torch.no_grad()
    def measured(self, other: TokensTraining, batches: int = 4) -> dict[str, float]:
        """The averaged student's losses on the utterances of another training."""
        student, sums = self.weights.averaged(self.student), Counter[str]()
        for number in range(batches):
            losses = other.losses(student, *other.batches(2**31 + 1 + number))
            sums.update({name: float(value) / batches for name, value in losses.items()})
        return {name: round(value, 4) for name, value in sums.items()}


def load_tokenizer(run: Path, device: torch.device) -> SpeechTokenizer:
    """The tokenizer of a training's folder."""
    settings = record_of(run)["config"]
    tokenizer = SpeechTokenizer(SpeechTokenizerConfig(**settings))
    tokenizer.load_state_dict(safetensors.torch.load_file(run / TOKENIZER_FILE))
    return tokenizer.to(device).eval()


@torch.no_grad()
def encoded(tokenizer: SpeechTokenizer, bank: SpeechBank, heard: Tensor) -> NDArray[np.int16]:
    """The speech tokens of a bank, as its samples lie."""
    device = heard.device
    tokens = torch.zeros(len(bank.pcm) // TOKEN, 1, dtype=torch.int16, device=device)
    for width, some in by_length(bank.utterances, ROOM):
        begin, count = _places(some, device)
        mel = gathered(heard, begin * HEARD, count * HEARD, width * HEARD).float().transpose(1, 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=mel.is_cuda):
            found, _ = tokenizer(mel, count * HEARD)
        _put(tokens, found[..., None], begin, count)
    return tokens[:, 0].cpu().numpy()


def _write(bank: SpeechBank, name: str, array: NDArray[Any]) -> None:
    """Beside the bank, in one rename."""
    partial = bank.folder / f"partial-{name}"
    np.save(partial, array)
    partial.replace(bank.folder / name)


def encode(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train tts bank' made.")],
    tokens: Annotated[Path, typer.Option(help="What 'antiphon train tts tokens' made.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write the speech tokens and mel frames of a bank beside it."""
    place = torch.device(device)
    spoken, tokenizer = SpeechBank(bank), load_tokenizer(tokens, place)
    made = features(spoken, tokenizer.mels, None, place)
    _write(spoken, MEL, made.mel.cpu().numpy())
    _write(spoken, TOKENS, encoded(tokenizer, spoken, made.heard))


def train(
    bank: Annotated[Path, typer.Option(help="What 'antiphon train tts bank' made.")],
    out: Annotated[Path, typer.Option(help="Where checkpoint, log and tokenizer go.")],
    steps: Steps = 10000,
    until: Until = None,
    minutes: Minutes = None,
    fit: Fit = False,
    save_every: SaveEvery = 2000,
    room: Annotated[int, typer.Option(help="Speech tokens in a batch.")] = Recipe.room,
    rate: Rate = Recipe.rate,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train the speech tokenizer, and write the bank's tokens and mel frames."""
    run = Run(device, until, minutes, fit, save_every)
    spoken = SpeechBank(bank)
    made = features(spoken, TOKENIZER.mels, Teacher.embedded(0, run.device), run.device)
    _write(spoken, MEL, made.mel.cpu().numpy())
    recipe = Recipe(room=room, rate=rate)
    training = TokensTraining(TOKENIZER, recipe, spoken.train, made, out, steps, seed)
    count = sum(value.numel() for value in training.student.tokenizer.state_dict().values())
    run.train(training, f"{count / 1e6:.2f} M numbers, {len(spoken.train):,} utterances")
    found = {"train": training.measured(training)}
    if spoken.test:
        other = TokensTraining(TOKENIZER, recipe, spoken.test, made, out, steps, seed)
        found["held-out sentences"] = training.measured(other)
    run.record(training, found)
    tokenizer = training.tokenizer()
    safetensors.torch.save_file(tokenizer.state_dict(), out / TOKENIZER_FILE)
    _write(spoken, TOKENS, encoded(tokenizer, spoken, made.heard))
