"""Text to sound over three models: the same sound however the text is cut and whoever shares the batch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from tiny_speech import CHUNK, LIMITS, LM, MELS, SPEECH, VOCODER, tiny_speech, voice, write

from antiphon.models.cosyvoice.flow_config import FlowLimits
from antiphon.models.cosyvoice.flow_context import Mask
from antiphon.models.cosyvoice.flow_hops import SCHEDULE
from antiphon.models.cosyvoice.sampling import Sampling
from antiphon.models.cosyvoice.voice import Voice
from antiphon.models.files import CheckpointError
from antiphon.pipelines.engine import AtCapacity
from antiphon.pipelines.speech import Part
from antiphon.pipelines.speech_checkpoint import load
from antiphon.pipelines.synthesis import FIRST, LONGEST_SENTENCE, Piece, Step, Synthesis, timings
from antiphon.pipelines.synthesizer import Places, Synthesizer

Samples = NDArray[np.float32]

TEXT = "It was the best of times. It was the worst of times, all 42 of them! We had everything before us."
SHORT = "And so on."
LONGER = "It was the age of wisdom, and we had nothing before us. So be it."
RATE = 24000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[Synthesizer]:
    torch.set_num_threads(1)
    with Synthesizer(tiny_speech(folder), sessions=4) as made:
        made.register("ada", voice(1))
        made.register("bob", voice(2, 18, ""))
        yield made


def sound(pieces: Sequence[Piece]) -> Samples:
    return np.concatenate([piece.samples for piece in pieces])


def synthesis(models: Synthesizer, text: str, seed: int = 0, name: str = "ada", arriving: bool = False) -> Synthesis:
    made = Synthesis(models.speech, name, seed, arriving=arriving)
    made.push(text)
    made.finish()
    return made


@pytest.mark.parametrize("arriving", [False, True], ids=["sentences", "arriving"])
def test_the_sound_does_not_depend_on_how_the_text_is_cut(models: Synthesizer, arriving: bool) -> None:
    whole = list(models.speak(TEXT, "ada", 3, arriving=arriving))
    expected = sound(whole)
    assert 0.01 < expected.std() < 0.9
    assert {piece.passage for piece in whole} == ({0} if arriving else {0, 1, 2})
    for size in (1, 7, 40):
        pieces = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
        assert np.array_equal(sound(list(models.speak(pieces, "ada", 3, arriving=arriving))), expected), size


def test_arriving_text_is_spoken_before_it_has_ended(models: Synthesizer) -> None:
    made = Synthesis(models.speech, "ada", arriving=True)
    made.push("It was the best of times, it was the worst of times, we had everything before ")
    steps = 0
    places = models.engine
    leases = {part: places.open_sync(f"speak.{part}") for part in ("lm", "flow", "vocoder")}
    pieces: list[Piece] = []
    while ready := [step for part in leases if (step := made.next(part)) is not None]:
        for step in ready:
            leases[step.part].use(step.variant)
            made.take(step, leases[step.part].step_sync(step.inputs))
            steps += 1
        pieces += made.pieces()
    for lease in leases.values():
        lease.close()
    assert len(sound(pieces)) > RATE
    assert not made.done


def test_arriving_text_is_read_as_it_is_said(models: Synthesizer) -> None:
    """In passages that end with a line's sentence, with a sentence late enough, or where there is room for no more."""

    def read(*pieces: str) -> list[tuple[str, str]]:
        """What each passage is called, and what the language model reads of it."""
        made = Synthesis(models.speech, "ada", arriving=True)
        for piece in pieces:
            made.push(piece)
        made.finish()
        tokenizer, first = models.speech.reader.tokenizer, LM.text_id(0)
        prompt = len(models.speech.reader.voice("ada").prompt_text)
        found = []
        for passage in made._passages:
            tokens = [token - first for token in passage.stream._text[prompt:]]
            said = tokenizer.decode(tokens)
            assert tokens == tokenizer.encode(said)
            found.append((passage.text, said))
        return found

    assert read("It costs $3", ".", "50 on March", " 3", ", it was") == [
        ("It costs $3.50 on March 3, it was", "It costs three dollars and fifty cents on March third, it was")
    ]
    assert read("So be it. \nAnd", " so on.\n\nYes") == [("So be it.",) * 2, ("And so on.",) * 2, ("Yes",) * 2]
    assert read("\u2026 ", "\u2014", " so \U0001f600 ") == [("so", "so")]
    assert read("\u4f60\u597d\uff0c\u4f60\u597d 3") == [("\u4f60\u597d\uff0c\u4f60\u597d 3",) * 2]
    sentence = "it was the best of times. "
    assert [len(text) for text, _ in read(sentence * 10)] == [181, 77]
    clauses = [text for text, _ in read("so, " * 100)]
    assert all(text.endswith(",") and len(text) < LONGEST_SENTENCE + 4 for text in clauses)
    tokens = [len(models.speech.reader.tokenizer.encode(said)) for _, said in read("qk " * 100)]
    assert len(tokens) > 2
    assert max(tokens) <= LM.passage
    assert sum(tokens) == 300 - len(tokens)  # no space before the first word


def test_the_seed_and_the_voice_change_the_sound(models: Synthesizer) -> None:
    sounds = [
        sound(list(models.speak(SHORT, name, seed))) for name, seed in (("ada", 0), ("ada", 1), ("bob", 0), (None, 0))
    ]
    assert np.array_equal(sounds[0], sounds[3])
    for left, right in itertools.combinations(sounds[:3], 2):
        assert left.shape != right.shape or not np.array_equal(left, right)


def test_three_in_a_row_and_twenty_at_once_sound_as_alone(models: Synthesizer) -> None:
    """And their first sound takes as many steps."""
    texts = [LONGER, SHORT, "So be it.", f"{SHORT} It was the worst of times."]
    alone = []
    for seed, text in enumerate(texts):
        alone.append(sound(list(models.speak(text, "ada" if seed % 2 else "bob", seed))))
    row = [list(models.speak(texts[0], "bob", 0)) for _ in range(3)]
    assert all(np.array_equal(sound(pieces), alone[0]) for pieces in row)
    assert len({len(pieces[0].samples) for pieces in row}) == 1
    crowd = [
        synthesis(models, texts[number % 4], number % 4, "ada" if number % 2 else "bob", False) for number in range(20)
    ]
    for number, made in enumerate(models.speak_many(crowd)):
        assert np.array_equal(made, alone[number % 4]), number


def test_drawing_several_tokens_a_step_changes_nothing(models: Synthesizer, folder: Path) -> None:
    texts = [LONGER, SHORT, TEXT]
    made = models.speak_many([synthesis(models, text, 7, arriving=text is TEXT) for text in texts])
    with Synthesizer(tiny_speech(folder, bursts=(9, 25)), sessions=2) as quick:
        quick.register("ada", voice(1))
        crowd = [synthesis(quick, text, 7, arriving=text is TEXT) for text in texts]
        assert all(map(np.array_equal, made, quick.speak_many(crowd)))


def test_steps_tell_how_much_speech_comes_before_what_they_are_for(models: Synthesizer) -> None:
    """Tokens for the second hop are no hurry while the first is drawn; the first hop's frames and sound are."""
    made = synthesis(models, LONGER, 5)
    places = Places.open_sync(models.engine)

    def take(step: Step) -> None:
        made.take(step, places.ready(step).step_sync(step.inputs))

    def following(part: Part) -> Step:
        step = made.next(part)
        assert step is not None
        return step

    while (flow := made.next("flow")) is None:
        step = following("lm")
        assert step.slack == 0
        take(step)
    hop = flow.detail
    seconds = (hop.frames - hop.skip) * 0.02
    assert flow.slack == 0 < seconds
    take(step := following("lm"))
    assert step.slack == pytest.approx(seconds)
    take(flow)
    vocoder = following("vocoder")
    assert vocoder.slack == 0
    take(step := following("lm"))
    assert step.slack == pytest.approx(seconds)
    # The first sound is due by when its text came, less what still follows; later ones by what is left to be played.
    assert flow.deadline(5.0, 5.05, 0.0) == pytest.approx(5.0 + FIRST - flow.lead)
    assert vocoder.deadline(5.0, 5.05, 0.0) == pytest.approx(5.0 + FIRST)
    assert step.deadline(5.0, 5.05, 0.0) == pytest.approx(5.05 + seconds - step.lead)
    assert step.deadline(5.0, 6.0, 0.25) == pytest.approx(6.25 + seconds - step.lead)
    assert step.lead > flow.lead > vocoder.lead == 0
    take(vocoder)
    take(step := following("lm"))
    assert step.slack == pytest.approx(seconds - vocoder.variant * 0.02)
    places.close()


def test_the_sound_is_that_of_the_networks_one_after_the_other(models: Synthesizer) -> None:
    """Tokens as the stream writes them, through the flow under its mask as a whole, through the vocoder as a whole."""
    made = synthesis(models, LONGER, 5)
    (heard,) = models.speak_many([made])
    speech, registered = models.speech, models.speech.reader.voice("ada")
    parts = []
    for passage in made._passages:
        tokens = [*registered.voice.prompt_tokens.tolist(), *passage.stream.speech]
        assert len(passage.stream.speech) > max(SCHEDULE) // 4
        with torch.inference_mode():
            mel = speech.flow.flow.generate(
                torch.tensor([tokens]), torch.tensor([len(tokens)]), registered.voice.prompt_mel[None],
                registered.voice.embedding[None], Mask(CHUNK),
            )  # fmt: skip
            spoken = mel[:, 2 * len(registered.voice.prompt_tokens) :]
            parts.append(speech.vocoder(spoken, seed=torch.tensor([passage.seed]))[0])
    whole = torch.cat(parts).numpy()
    assert heard.shape == whole.shape
    assert np.sqrt(np.mean(np.square(heard - whole))) < 1e-3 * whole.std()
    assert len(parts) == 2


def test_a_passage_that_outgrows_the_flow_is_cut_and_counted(folder: Path) -> None:
    with Synthesizer(tiny_speech(folder, replace(LIMITS, left=60)), sessions=1) as models:
        models.register("ada", voice(1))
        made = synthesis(models, TEXT)
        (heard,) = models.speak_many([made])
        room = 30 - len(models.speech.reader.voice("ada").flow.rest)
        lengths = [passage.tokens for passage in made._passages]
        assert max(lengths) == room
        assert made.cut == lengths.count(room)
        assert len(heard) == sum(lengths) * 960


def test_pieces_tell_where_they_belong(models: Synthesizer) -> None:
    pieces = list(models.speak(TEXT, "ada", 3))
    for number, passage in itertools.groupby(pieces, lambda piece: piece.passage):
        mine = list(passage)
        assert [piece.final for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].seconds == pytest.approx(len(sound(mine)) / RATE)
        assert TEXT.split(". ")[0] in mine[0].text or number
    assert list(models.speak(" ... \u2014 !", "ada")) == []
    assert list(models.speak("", "ada")) == []


def test_words_share_the_time_of_their_passage() -> None:
    words = timings("It was so", 2.0, 5.0)
    assert [word.text for word in words] == ["It", "was", "so"]
    assert [(word.start, word.end) for word in words] == [(2.0, 3.5), (3.5, 5.5), (5.5, 7.0)]
    assert timings("", 1.0, 0.0) == ()


def test_long_sentences_are_said_in_parts(models: Synthesizer) -> None:
    made = Synthesis(models.speech, "ada")
    made.push("wxyz" * 20 + " " + "qk, " * 100 + ".")
    made.finish()
    counts = [passage.stream._pushed for passage in made._passages]
    assert len(counts) > 3
    assert max(counts) <= 110


def test_what_cannot_be(models: Synthesizer, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no voice 'adda'.*did you mean 'ada'"):
        next(models.speak(SHORT, "adda"))
    with pytest.raises(ValueError, match="there is a voice 'ada' already"):
        models.register("ada", voice(1))
    with pytest.raises(ValueError, match="a seed goes from 0"):
        Synthesis(models.speech, "ada", -1)
    made = synthesis(models, SHORT)
    with pytest.raises(RuntimeError, match="was finished"):
        made.push("more")
    with Synthesizer(tiny_speech(folder), sessions=1) as one:
        one.register("ada", voice(1))
        first = one.speak(SHORT)
        next(first)
        with pytest.raises(AtCapacity):
            next(one.speak(SHORT))
        first.close()
        assert list(one.speak(SHORT))


def test_a_folder_comes_back(tmp_path: Path, models: Synthesizer) -> None:
    write(tmp_path / "tiny")
    loaded = load(tmp_path / "tiny", limits=FlowLimits(left=600, voices=8, prompt=40))
    assert list(loaded.voices) == ["bob", "ada"]
    assert loaded.speech.reader.lm.config == LM
    with Synthesizer(loaded.speech, sessions=2) as read:
        for name, one in loaded.voices.items():
            read.register(name, one)
        assert np.array_equal(sound(list(read.speak(SHORT, "ada", 7))), sound(list(models.speak(SHORT, "ada", 7))))
    with pytest.raises(CheckpointError, match="make voices of clips with FunAudioLLM"):
        loaded.voice_of(np.zeros(RATE, np.float32))
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load(tmp_path / "tiny")


def test_a_model_speaks_in_its_own_way_unless_asked_otherwise(tmp_path: Path) -> None:
    manner = {"sampling": {"temperature": 0.0, "top_k": 3}, "hops": [5, 10]}
    write(tmp_path / "tiny", manner)
    speech = load(tmp_path / "tiny", limits=FlowLimits(left=600, voices=8, prompt=40)).speech
    assert speech.reader.sampling == Sampling(temperature=0.0, top_k=3)
    assert (speech.flow.limits.hops, speech.flow.limits.left) == ((5, 10), 600)
    alone = Voice(torch.zeros(0, dtype=torch.int64), torch.zeros(0, MELS), voice(1).embedding, "it")
    with Synthesizer(speech) as read:
        read.register("alone", alone)
        first = Synthesis(speech)
        first.push(SHORT)
        first.finish()
        (spoken,) = read.speak_many([first])
        passage = first._passages[0]
        assert len(spoken) == len(passage.stream.speech) * 2 * VOCODER.frame > 0
        asked = Synthesis(speech, seed=1, schedule=(25,), sampling=Sampling())
        asked.push(SHORT)
        asked.finish()
        (other,) = read.speak_many([asked])
        assert not np.array_equal(other, spoken)


def test_models_that_do_not_fit_are_told(models: Synthesizer) -> None:
    speech = models.speech
    assert speech.reader.lm.config.speech == SPEECH
    with pytest.raises(ValueError, match="no voice was registered"):
        type(speech.reader)(speech.reader.lm, speech.reader.tokenizer).voice(None)
