"""One utterance on its way from text to sound, without the models that do it.

Text comes in, whole or word by word; ``Synthesis.next`` says what each of the three models is to do, ``take`` takes
what it did; whoever steps the models decides when. The stage (``stages/speak.py``) drives it live, ``Synthesizer`` for
files.

An utterance is spoken in passages, a sentence each, or for text that is spoken as it arrives, a few sentences. Every
passage starts all three models afresh, with hops and noise of its own: what is heard follows from the voice, the text
and the seed alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.hift import UNKNOWN
from ..codecs.resample import Samples
from ..models.cosyvoice.flow_config import FRAME_SECONDS, TOKEN_SECONDS
from ..models.cosyvoice.flow_config import RATE as FRAMES
from ..models.cosyvoice.flow_hops import Hop, Hops
from ..models.cosyvoice.sampling import Sampling
from ..models.cosyvoice.stream import TextStream
from .arriving import Arrived, Arriving
from .chunk import Word
from .sentences import Sentences
from .speech import PARTS, Part, Speech
from .spoken import spoken

LEAD = 250  # speech tokens that may be written before frames of them are drawn
FIRST = 0.1  # seconds from an utterance's text to its first sound, aimed at
LEADS = {"read": 0.09, "lm": 0.06, "flow": 0.01, "vocoder": 0.0}  # seconds of the steps between one and its sound
LONGEST_SENTENCE = 240  # characters
ENOUGH = 160  # characters of arriving text after which a sentence's end ends the passage; a line's ends it at once
CLAUSES = (",", ";", ":", "\u2014", "\uff0c", "\u3001", "\uff1a", "\uff1b")
SECONDS_A_CHARACTER = 0.065  # of speech, where its length is not known yet

_SEEDS = 2**62


@dataclass(frozen=True, eq=False)
class Step:
    """What a part is to do next. fresh: on a state that was reset.

    slack: seconds of speech that lie between this part and the sound, and come before what this step is for.
    lead: seconds that the steps between this one and its sound take, about.
    """

    part: Part
    variant: Hashable
    inputs: Mapping[str, Any]
    fresh: bool
    passage: _Passage
    slack: float
    lead: float
    detail: Any = None

    def deadline(self, asked: float, now: float, spare: float) -> float:
        """When it should be done, for an utterance whose text came at ``asked`` and that has ``spare`` seconds of sound
        which was not played yet."""
        return max(asked + FIRST, now + spare + self.slack) - self.lead


@dataclass(frozen=True, eq=False)
class Piece:
    """Sound as it comes. passage: its number in the utterance, and its ``text``.

    seconds: of the whole passage, as far as it is known; an estimate until its tokens are written. final: the last of
    the passage.
    """

    samples: Samples
    passage: int
    text: str
    seconds: float
    final: bool


@dataclass(eq=False)
class _Passage:
    """A passage on its way through the models."""

    number: int
    text: str
    stream: TextStream
    hops: Hops
    seed: int
    read: int = 0  # tokens of arriving text
    spaced: bool = False  # it ends with a space
    tokens: int = 0  # written
    waiting: deque[Hop] = field(default_factory=deque)  # for the flow
    frames: list[Tensor] = field(default_factory=list)  # not yet cut into blocks
    drawn: int = 0  # frames
    blocks: deque[_Block] = field(default_factory=deque)  # for the vocoder
    written: bool = False
    begun: set[Part] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Of speech."""
        known = self.tokens * TOKEN_SECONDS
        return known if self.written else max(known, len(self.text) * SECONDS_A_CHARACTER)


@dataclass(frozen=True, eq=False)
class _Block:
    """A step of the vocoder. end: frames of the passage, where they are known."""

    mel: NDArray[np.float32]
    end: int
    final: bool


class Synthesis:
    """One utterance.

    voice: a registered one's name; None for the first. seed: of all that is drawn. arriving: speak text as it arrives,
    a few words behind it (see ``Arriving``), instead of sentence by sentence. schedule: of the hops, see ``Hops``; by
    default as the flow's limits say. sampling: how speech tokens are drawn, by default as
    the model asks for; its seed is not used. Raises ValueError.
    """

    def __init__(
        self,
        speech: Speech,
        voice: str | None = None,
        seed: int = 0,
        *,
        arriving: bool = False,
        schedule: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"a seed goes from 0 to {_SEEDS - 1}, got {seed}")
        self.speech, self.voice = speech, speech.reader.voice(voice)
        self.seed, self.arriving = seed, arriving
        limits = speech.flow.limits
        self._schedule = tuple(schedule or limits.schedule or sorted(limits.hops))
        self._sampling = sampling or speech.reader.sampling
        self.cut = 0  # passages that ended because the models could hold no more of them
        self._sentences = Sentences(longest=LONGEST_SENTENCE)
        self._arriving = Arriving(speech.reader.language)
        self._open: _Passage | None = None  # takes arriving text
        self._passages: list[_Passage] = []
        self._at: dict[Part, int] = dict.fromkeys(PARTS, 0)  # the passage each part is at
        self._flying: set[Part] = set()
        self._lead = 0  # tokens written, not drawn
        self._hopped = self._drawn = 0  # frames of hops that are not drawn, and drawn ones that do not sound yet
        self._pieces: deque[Piece] = deque()
        self._finished = False
        hop = speech.flow.config.lookahead
        self._room = None if limits.rolling else limits.left // FRAMES - len(self.voice.flow.rest)
        if self._room is not None and self._room <= hop:
            raise ValueError(f"the flow keeps {limits.left} frames: too few for this voice; allow more on the left")

    # ---------------------------------------------------------------- text

    def push(self, text: str) -> None:
        """More text. Raises RuntimeError after ``finish``."""
        if self._finished:
            raise RuntimeError("this utterance was finished: begin another")
        if not self.arriving:
            for sentence in self._sentences.push(text):
                self._say(sentence)
            return
        for words in self._arriving.push(text):
            self._arrive(words)

    def finish(self) -> None:
        """There is no more text."""
        self._finished = True
        for sentence in self._sentences.finish():
            self._say(sentence)
        for words in self._arriving.finish():
            self._arrive(words)
        self._close()

    @property
    def waiting(self) -> int:
        """Passages that no sound was written for yet."""
        return len(self._passages) - self._at["lm"]

    def _say(self, sentence: str) -> None:
        """A sentence, in parts where it has too many tokens."""
        words = spoken(sentence, self.speech.reader.language)
        tokens = self.speech.reader.tokenizer.encode(words)
        most = self.speech.reader.lm.config.passage
        if len(tokens) > most and len(sentence) > 1:
            parts = Sentences(longest=max(1, len(sentence) * most // len(tokens)))
            for part in (*parts.push(sentence), *parts.finish()):
                if part == sentence:
                    break
                self._say(part)
            else:
                return
        if any(character.isalnum() for character in words):
            self._add(sentence, tokens)

    def _arrive(self, words: Arrived) -> None:
        """Words for the open passage, or for one that they begin."""
        if not words.said:
            return
        encode, passage = self.speech.reader.tokenizer.encode, self._open
        space = " " if passage is not None and passage.spaced else ""
        tokens = encode(space + words.said)
        if passage is not None and passage.read + len(tokens) > self.speech.reader.lm.config.passage:
            self._close()
            passage, space, tokens = None, "", encode(words.said)
        if passage is None:
            if not any(character.isalnum() for character in words.said):
                return
            self._open = passage = self._add("", None)
        passage.stream.push(tokens)
        passage.read += len(tokens)
        written = " ".join(words.written.split())
        passage.text, passage.spaced = passage.text + space + written, words.written[-1:].isspace()
        length = len(passage.text)
        clause = written.endswith(CLAUSES)
        if (words.ends and (words.line or length >= ENOUGH)) or (clause and length >= LONGEST_SENTENCE):
            self._close()

    def _close(self) -> None:
        """No more text for the passage that takes arriving text."""
        if self._open is not None:
            self._open.stream.finish()
            self._open = None

    def _add(self, text: str, known: Sequence[int] | None) -> _Passage:
        number = len(self._passages)
        seed = (self.seed + 0x9E3779B97F4A7C15 * number) % _SEEDS
        stream = TextStream(
            self.speech.reader.lm.config,
            known,
            prompt_text=self.voice.prompt_text,
            prompt_speech=self.voice.prompt_speech,
            sampling=replace(self._sampling, seed=seed),
        )
        flow = self.speech.flow
        hops = Hops(self.voice.flow, flow.config, flow.limits, self._schedule)
        self._passages.append(_Passage(number, text, stream, hops, seed))
        return self._passages[-1]

    # ---------------------------------------------------------------- steps

    def next(self, part: Part) -> Step | None:
        """What this part is to do next; None while its last step is under way, or there is nothing to do."""
        if part in self._flying:
            return None
        slack = {"lm": self._hopped + self._drawn, "flow": self._drawn, "vocoder": 0}[part] * FRAME_SECONDS
        passage, made = {"lm": self._write, "flow": self._draw, "vocoder": self._sound}[part]()
        if made is None or passage is None:
            return None
        variant, inputs, detail = made
        reads = part == "lm" and isinstance(variant, int) and variant > 1
        lead = LEADS["read" if reads else part]
        step = Step(part, variant, inputs, part not in passage.begun, passage, slack, lead, detail)
        passage.begun.add(part)
        self._flying.add(part)
        return step

    def take(self, step: Step, outputs: Mapping[str, Tensor]) -> None:
        """What a step has made."""
        self._flying.discard(step.part)
        passage = step.passage
        if step.part == "lm":
            stream = passage.stream
            drawn = outputs["drawn"].tolist() if "drawn" in outputs else [int(outputs["token"])]
            tokens = stream.take_all(drawn)
            if self._room is not None:
                tokens = tokens[: self._room - passage.tokens]
            passage.tokens += len(tokens)
            self._lead += len(tokens)
            self._hop(passage, passage.hops.push(tokens))
            if passage.tokens == self._room:
                self.cut += 1
                self._written(passage)
        elif step.part == "flow":
            hop: Hop = step.detail
            self._lead -= (hop.frames - hop.skip) // FRAMES
            self._hopped -= hop.frames - hop.skip
            self._drawn += hop.frames - hop.skip
            passage.frames.append(outputs["mel"][hop.skip : hop.frames].float())
            self._block(passage, final=passage.written and not passage.waiting)
        else:
            block: _Block = step.detail
            self._drawn = max(0, self._drawn - len(block.mel))
            sound = self.speech.vocoder.sound(outputs["pcm"], int(outputs["first"]), block.end)
            samples = sound.float().numpy().copy()
            self._pieces.append(Piece(samples, passage.number, passage.text, passage.seconds, block.final))
            self._at["vocoder"] += block.final

    def pieces(self) -> Iterator[Piece]:
        """The sound made since the last call."""
        while self._pieces:
            yield self._pieces.popleft()

    @property
    def done(self) -> bool:
        """Whether all has been said: the text was finished, and no step is left to do."""
        return self._finished and self._at["vocoder"] == len(self._passages) and not self._pieces

    def _passage(self, part: Part) -> _Passage | None:
        return self._passages[self._at[part]] if self._at[part] < len(self._passages) else None

    def _write(self) -> tuple[_Passage | None, tuple[Hashable, Mapping[str, Any], None] | None]:
        while (passage := self._passage("lm")) is not None and self._lead < LEAD:
            feed = passage.stream.feed(max(1, passage.hops.wanted))
            if feed is not None:
                return passage, (feed.variant, feed.inputs, None)
            if passage.stream.end is None:
                break
            self.cut += passage.stream.end == "capacity"
            self._written(passage)
        return passage, None

    def _written(self, passage: _Passage) -> None:
        """No more tokens will come of a passage."""
        passage.written = True
        self._hop(passage, passage.hops.finish())
        if passage is self._open:
            self._open = None
        self._at["lm"] += 1

    def _hop(self, passage: _Passage, hops: Sequence[Hop]) -> None:
        """More for the flow."""
        passage.waiting += hops
        self._hopped += sum(hop.frames - hop.skip for hop in hops)

    def _draw(self) -> tuple[_Passage | None, tuple[Hashable, Mapping[str, Any], Hop] | None]:
        while (passage := self._passage("flow")) is not None:
            if passage.waiting:
                hop = passage.waiting.popleft()
                return passage, (hop.variant, hop.inputs, hop)
            if not passage.written:
                break
            self._at["flow"] += 1
        return passage, None

    def _block(self, passage: _Passage, *, final: bool) -> None:
        """Cut the frames that are there into steps of the vocoder, whatever the pace of the models."""
        vocoder = self.speech.vocoder
        mel = torch.cat(passage.frames)
        passage.drawn += len(passage.frames[-1])
        if final:
            mel = torch.cat((mel, mel.new_zeros(vocoder.flush, mel.shape[1])))
        end = passage.drawn if final else UNKNOWN
        while size := _size(vocoder.variants, len(mel), final):
            block = np.zeros((size, mel.shape[1]), np.float32)
            block[: len(mel)] = mel[:size].numpy()
            mel = mel[size:]
            passage.blocks.append(_Block(block, end, final and not len(mel)))
        passage.frames = [mel]

    def _sound(self) -> tuple[_Passage | None, tuple[Hashable, Mapping[str, Any], _Block] | None]:
        while (passage := self._passage("vocoder")) is not None:
            if passage.blocks:
                block = passage.blocks.popleft()
                inputs = {"mel": block.mel, "end": np.array(block.end), "seed": np.array(passage.seed)}
                return passage, (len(block.mel), inputs, block)
            if not passage.written or passage.tokens:
                break
            self._pieces.append(Piece(np.zeros(0, np.float32), passage.number, passage.text, 0.0, True))
            self._at["vocoder"] += 1
        return passage, None


def _size(sizes: Sequence[int], frames: int, final: bool) -> int:
    """Of the vocoder's next step: the most that so many frames fill; at the end of a passage one that holds them all,
    where half of it is filled or nothing fits. 0 for no step."""
    fits = max((size for size in sizes if size <= frames), default=0)
    holds = min((size for size in sizes if size >= frames), default=0)
    return holds if final and frames and holds and (holds < 2 * frames or not fits) else fits


def timings(text: str, start: float, seconds: float) -> tuple[Word, ...]:
    """The words of a passage of ``seconds`` that begins at ``start``, each as long as its share of the letters,
    to the millisecond.

    The models do not tell when a word is said: this is an approximation, off by a few tenths of a second.
    """
    words = text.split()
    weights = np.cumsum([0, *(len(word) + 1 for word in words)])
    edges = np.round(start + seconds * weights / max(1, weights[-1]), 3).tolist()
    return tuple(Word(word, edges[index], edges[index + 1]) for index, word in enumerate(words))
