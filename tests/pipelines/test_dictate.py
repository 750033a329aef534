"""A model that writes what it hears: words at the time of the sound they tell of."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_duplex import tiny_duplex

from antiphon.pipelines.chunk import Audio, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.duplex import Duplex
from antiphon.pipelines.engine import Engine
from antiphon.pipelines.marks import MOST, Marks
from antiphon.pipelines.stage import Inlet
from antiphon.pipelines.stages.converse import Converse
from antiphon.pipelines.stages.dictate import Dictate

RATE, FRAME = 24000, 1920
SPEECH_TO_TEXT: dict[str, Any] = {
    "n_q": 8,
    "dep_q": 0,
    "delays": [0] * 9,
    "extra_heads_num_heads": 4,
    "stt_config": {"audio_delay_seconds": 0.4, "audio_silence_prefix_seconds": 0.2},
    "lm_gen_config": {"temp_text": 0.0},
}


class Scripted(Duplex):
    """Writes a script in place of what it hears: token ``i`` at step ``i``."""

    script: tuple[int, ...] = ()

    def step(self, inputs: Any, state: Any, slots: Any, active: Any) -> Any:
        step = state["temporal.seen"].index_select(0, slots)
        made = super().step(inputs, state, slots, active)
        tokens = torch.tensor([*self.script, *[3] * 200])
        return made | {"text": tokens[step.clamp(max=199)]}


def dictate(model: Duplex, seconds: float, rate: int = RATE, **options: Any) -> list[Text]:
    async def main() -> list[Text]:
        made: list[Text] = []
        with Engine(inline=True, clock=VirtualClock()) as models:
            models.add("dictate", model, slots=4)
            graph = Inlet().named("audio") >> Dictate(**options)
            async with graph.session(engine=models) as session:

                async def read() -> None:
                    async for chunk in session.outputs():
                        made.append(chunk)  # type: ignore[arg-type]

                reading = asyncio.create_task(read())
                for start in range(0, round(seconds * rate), rate // 10):
                    pcm = 0.1 * np.random.default_rng(start).standard_normal(rate // 10)
                    await session.send(Audio(samples=pcm.astype(np.float32), rate=rate, start=start), "audio")
                    await session.clock.sleep(0.1)
                session.finish()
                await reading
        return made

    return run_virtual(main())


def piece(model: Duplex, text: str) -> int:
    return model.tokenizer.pieces.index(text)


def test_words_stand_where_they_were_said() -> None:
    model = tiny_duplex(**SPEECH_TO_TEXT)
    start, letters = piece(model, "▁"), [index for index, text in enumerate(model.tokenizer.pieces) if len(text) == 1]
    one, two, *_ = [index for index in letters if index != start]
    # 3 frames of lead (0.2 s) and 5 of lag (0.4 s): what stands at step 10 was said from frame 2 on.
    model.__class__, model.script = Scripted, (*[3] * 10, start, one, two, 3, start, two, *[3] * 8, start, one)
    told = dictate(model, 2.0, endpoint=0.4)
    finals = [text for text in told if text.final]
    names = [model.tokenizer.pieces[index] for index in (one, two)]
    assert [text.text for text in finals] == [f"{names[0]}{names[1]} {names[1]}", names[0]]
    assert [(word.text, round(word.start, 3), round(word.end, 3)) for word in finals[0].words] == [
        (names[0] + names[1], 0.16, 0.4),
        (names[1], 0.48, 0.64),
    ]
    assert finals[0].start_seconds == pytest.approx(0.16)
    assert finals[1].words[0].start == pytest.approx((24 - 8) * 0.08)
    for before, after in zip(told, told[1:], strict=False):  # noqa: RUF007
        assert before.final or after.text.startswith(before.text)


@pytest.mark.parametrize("rate", [24000, 16000])
def test_a_random_model_writes_to_the_end(rate: int) -> None:
    told = dictate(tiny_duplex(**SPEECH_TO_TEXT), 1.5, rate)
    assert told
    assert told[-1].final
    assert all(text.words[-1].end <= 1.5 + 0.5 + 0.16 for text in told)


def test_each_stage_has_its_kind_of_model() -> None:
    with pytest.raises(Exception, match="only writes"):
        dictate(tiny_duplex(), 0.1)
    writer = tiny_duplex(**SPEECH_TO_TEXT)
    assert writer.decoder is None
    assert "heads" in writer.step(
        {name: spec.new(2) for name, spec in writer.input_spec(1).items()},
        {name: spec.new(3) for name, spec in writer.state_spec().items()},
        torch.arange(2),
        torch.ones(2, dtype=torch.bool),
    )

    async def main() -> None:
        with Engine(inline=True, clock=VirtualClock()) as models:
            models.add("converse", writer, slots=4)
            graph = Inlet().named("audio") >> Converse()
            async with graph.session(engine=models) as session:
                session.finish()
                async for _ in session.outputs():
                    pass

    with pytest.raises(Exception, match="use the stage dictate"):
        run_virtual(main())
    with pytest.raises(ValueError, match="endpoint=0"):
        Dictate(endpoint=0)


class Pausing(Scripted):
    """Besides, its third classifier holds it likely that nothing will be said, except at the steps given."""

    talking: tuple[int, ...] = ()

    def step(self, inputs: Any, state: Any, slots: Any, active: Any) -> Any:
        step = state["temporal.seen"].index_select(0, slots)
        made = super().step(inputs, state, slots, active)
        heads = torch.tensor([0.8, 0.04, 0.04, 0.04, 0.04, 0.04]).repeat(len(step), 4, 1)
        heads[torch.isin(step, torch.tensor(self.talking)), 2, 0] = 0.3
        return made | {"heads": heads}


def test_a_pause_is_told_once_after_words_and_every_frame_where_asked() -> None:
    model = tiny_duplex(**SPEECH_TO_TEXT)
    letters = [index for index, text in enumerate(model.tokenizer.pieces) if len(text) == 1 and text != "▁"]
    # The text of a word that goes on after padding is a word of its own.
    model.__class__, model.script = Pausing, (*[3] * 10, *letters[:2], 3, letters[2], *[3] * 9, letters[3])
    model.talking = (10, 11, 12, 13, 14)  # type: ignore[attr-defined]
    told: list[Any] = list(dictate(model, 2.0, endpoint=0.4, steps=True))
    steps = [event for event in told if isinstance(event, Event) and event.name == "step"]
    assert [event.data["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert [event.start for event in steps[:25]] == [FRAME * number for number in range(1, 26)]
    assert steps[7].data["pauses"] == pytest.approx([0.8, 0.8, 0.3, 0.8])  # 3 frames of lead come before
    pauses = [event for event in told if isinstance(event, Event) and event.name == "pause"]
    texts = [text for text in told if isinstance(text, Text)]
    names = [model.tokenizer.pieces[index] for index in letters[:4]]
    assert [text.text for text in texts if text.final] == [f"{names[0]}{names[1]} {names[2]}", names[3]]
    assert [event.start_seconds for event in pauses] == [
        pytest.approx(text.words[-1].end) for text in texts if text.final
    ]
    assert pauses[0].data["pauses"] == pytest.approx([0.8] * 4)
    assert told[told.index(pauses[0]) + 1] == steps[12]  # its frame
    # A word is settled as soon as padding follows.
    first = next(text for text in texts if text.settled == 1)
    assert [word.text for word in first.settled_words] == [names[0] + names[1]]
    assert told[told.index(first) + 1] == steps[9]


@pytest.mark.parametrize("seconds", [0.04, 0.5, 1.0])
def test_a_mark_comes_out_when_all_before_it_is_written(seconds: float) -> None:
    model = tiny_duplex(**SPEECH_TO_TEXT)

    async def main() -> list[Any]:
        with Engine(inline=True, clock=VirtualClock()) as models:
            models.add("dictate", model, slots=4)
            dictate = Dictate(steps=True)
            graph = (Inlet().named("audio") >> dictate) | (Inlet().named("control") >> dictate["control"])
            async with graph.session(engine=models) as session:
                for at in (seconds, 20 * 0.08):
                    start = round(at * 16000)
                    await session.send(Event(name="mark", data={"at": at}, rate=16000, start=start), "control")
                await session.clock.sleep(0.1)
                silence = np.zeros(FRAME, np.float32)
                for start in range(0, 20 * FRAME, FRAME):
                    await session.send(Audio(samples=silence, rate=RATE, start=start), "audio")
                await session.clock.sleep(0.5)
                session.finish()
                return [chunk async for chunk in session.outputs() if isinstance(chunk, Event)]

    told = run_virtual(main())
    marks = [index for index, event in enumerate(told) if event.name == "mark"]
    assert [told[index].data["at"] for index in marks] == [seconds, 20 * 0.08]
    first = told[marks[0] - 1]
    assert first.start_seconds >= seconds + 0.4
    assert first.start_seconds < seconds + 0.4 + 0.08
    assert told[marks[1] - 1].start_seconds == 1.6  # the end of the sound brings it out


def test_a_commit_ends_what_is_said_and_the_model_begins_afresh() -> None:
    model = tiny_duplex(**SPEECH_TO_TEXT)
    letter, *_ = [index for index, text in enumerate(model.tokenizer.pieces) if len(text) == 1 and text != "▁"]
    # Written 12 frames in: said at 0.32 s, as 3 frames of lead and 5 of lag come before.
    model.__class__, model.script = Scripted, (*[3] * 12, letter)

    async def main() -> list[Text]:
        with Engine(inline=True, clock=VirtualClock()) as models:
            models.add("dictate", model, slots=4)
            dictate = Dictate(endpoint=5.0)
            graph = (Inlet().named("audio") >> dictate) | (Inlet().named("control") >> dictate["control"])
            async with graph.session(engine=models) as session:
                for frame in range(20):
                    for name, at in (("commit", 6), ("mark", 6), ("commit", 6), ("clear", 16)):
                        if frame == at:
                            event = Event(name=name, rate=16000, start=at * 1280)
                            await session.send(event, "control")
                    silence = np.zeros(FRAME, np.float32)
                    await session.send(Audio(samples=silence, rate=RATE, start=frame * FRAME), "audio")
                    await session.clock.sleep(0.08)
                session.finish()
                return [chunk async for chunk in session.outputs()]  # type: ignore[misc]

    told: list[Any] = list(run_virtual(main()))
    kinds = ["final" if isinstance(chunk, Text) and chunk.final else type(chunk).__name__ for chunk in told]
    finals = [chunk for chunk in told if isinstance(chunk, Text) and chunk.final]
    name = model.tokenizer.pieces[letter]
    assert [text.text for text in finals] == [name, "", name, name]
    assert [text.end_seconds for text in finals] == pytest.approx([0.48, 0.48, 1.28, 1.28 + 0.4])
    assert [text.words[0].start for text in finals if text.words] == pytest.approx([0.32, 0.8, 1.6])
    assert kinds[kinds.index("final") : kinds.index("Event") + 1] == ["final", "Event"]  # the mark was before it


def test_marks_are_bounded() -> None:
    marks = Marks()
    for _ in range(MOST):
        marks.add(Event(name="mark", rate=16000))
    with pytest.raises(ValueError, match="marks wait for sound"):
        marks.add(Event(name="mark", rate=16000))
    marks.add(Event(name="commit", rate=16000))
    assert len(list(marks.passed(0.0))) == MOST
