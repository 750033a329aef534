"""What the language model reads next: both layouts, fills drawn and due, lengths, the end of room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from antiphon.models.cosyvoice.lm_config import LMConfig
from antiphon.models.cosyvoice.sampling import NONE, Sampling
from antiphon.models.cosyvoice.stream import IGNORED, Feed, TextStream, lay_out

CONFIG = LMConfig(
    text=1000, speech=500, width=8, layers=1, heads=2, kv_heads=1, feedforward=8, capacity=400, prefill=(4, 16)
)
END, FILL, START, TASK = CONFIG.end, CONFIG.fill, CONFIG.start, CONFIG.task


def text(*tokens: int) -> list[int]:
    return [CONFIG.text_id(token) for token in tokens]


def tokens(feed: Feed) -> list[int]:
    count = int(feed.inputs["count"])
    assert 1 <= count <= feed.variant == len(feed.inputs["tokens"])
    assert feed.variant in CONFIG.lengths
    assert not feed.inputs["tokens"][count:].any()
    return list(map(int, feed.inputs["tokens"][:count]))


class Reader:
    """Stands in for the model: draws speech 100, 101, ... except where told otherwise (by number of the draw)."""

    def __init__(self, stream: TextStream, instead: dict[int, int] | None = None) -> None:
        self.stream, self.instead = stream, instead or {}
        self.read: list[int] = []
        self.specials: list[int] = []
        self.said: list[int] = []
        self.draws = 0

    def go(self, most: int = 1000) -> Reader:
        """Until more text is needed, the end, or ``most`` steps."""
        for _ in range(most):
            if (feed := self.stream.feed()) is None:
                break
            self.read += tokens(feed)
            special = int(feed.inputs["special"])
            partial = bool(self.stream._pending[len(tokens(feed)) :])
            token = END if partial else self.instead.get(self.draws, 100 + self.draws)
            if not partial:
                self.draws += 1
                self.specials.append(special)
                assert token < CONFIG.speech or token == special
            if (spoken := self.stream.take(token)) is not None:
                self.said.append(spoken)
        return self


def arrive(reader: Reader, arriving: Iterable[int]) -> Reader:
    for token in arriving:
        reader.stream.push([token])
        reader.go()
    reader.stream.finish()
    return reader.go()


def test_known_text_stands_before_the_speech() -> None:
    stream = TextStream(CONFIG, [1, 2, 3], prompt_text=[8, 9], prompt_speech=[7, 6, 5])
    reader = Reader(stream, {9: END}).go()
    assert reader.read == [START, *text(8, 9, 1, 2, 3), TASK, 7, 6, 5, *range(100, 109)]
    assert reader.said == stream.speech == list(range(100, 109))
    assert stream.end == "said"
    assert stream.rest == ()
    # The end may be drawn from twice as many tokens on as there is text.
    assert reader.specials == [NONE] * 6 + [END] * 4


def test_a_length_is_the_most() -> None:
    stream = TextStream(CONFIG, [1, 2, 3], lengths=(0.5, 3.5))
    reader = Reader(stream).go()
    assert len(reader.said) == 10
    assert stream.end == "length"
    assert reader.specials == [NONE] + [END] * 9
    assert Reader(TextStream(CONFIG, [], prompt_text=[1])).go().read == []


def test_arriving_text_is_read_in_blocks() -> None:
    stream = TextStream(CONFIG)
    reader = Reader(stream, {37: END})
    assert stream.feed() is None
    arrive(reader, range(12))
    speech = list(range(100, 137))
    assert reader.read == [
        START, *text(0, 1, 2, 3, 4), *speech[:15], *text(5, 6, 7, 8, 9), *speech[15:30],
        *text(10, 11), TASK, *speech[30:],
    ]  # fmt: skip
    assert reader.said == speech
    assert stream.end == "said"
    assert reader.specials == [FILL] * 30 + [END] * 8
    inputs, targets = lay_out(CONFIG, range(12), speech, CONFIG.mix)
    assert inputs == reader.read
    assert [target for target in targets if target != IGNORED] == [
        *speech[:15], FILL, *speech[15:30], FILL, *speech[30:], END,
    ]  # fmt: skip


def test_a_fill_that_is_drawn_ends_its_block_and_counts_the_next_one_from_there() -> None:
    stream = TextStream(CONFIG)
    reader = arrive(Reader(stream, {4: FILL, 30: END}), range(11))
    said = [*range(100, 104), *range(105, 130)]
    assert reader.read == [
        START, *text(0, 1, 2, 3, 4), *said[:4], *text(5, 6, 7, 8, 9), *said[4:19], *text(10), TASK, *said[19:],
    ]  # fmt: skip
    assert reader.said == said


def test_fills_count_among_what_was_drawn() -> None:
    stream = TextStream(CONFIG)
    reader = Reader(stream, {4: FILL})
    for token in range(10):
        stream.push([token])
        reader.go()
    stream.push(range(10, 15))
    feed = stream.feed()
    assert feed is not None
    assert tokens(feed) == [119, *text(10, 11, 12, 13, 14)]
    recent = feed.inputs["recent"].tolist()
    assert recent[-21:] == [*range(100, 104), FILL, *range(105, 120), FILL]
    assert set(recent[:-21]) == {NONE}


@pytest.mark.parametrize(("prompt", "due"), [(0, 15), (1, 14), (14, 1), (15, 15), (17, 13), (31, 14)])
def test_the_prompts_last_block_is_filled_up(prompt: int, due: int) -> None:
    stream = TextStream(CONFIG, prompt_text=range(20), prompt_speech=[3] * prompt)
    reader = Reader(stream).go(60)
    blocks = max(1, -(-prompt // 15))
    assert len(reader.said[:due]) == due
    laid = [
        token
        for block in range(blocks)
        for token in [*text(*range(5 * block, 5 * block + 5)), *[3] * min(15, prompt - 15 * block)]
    ]
    assert reader.read[: 1 + len(laid) + due] == [START, *laid, *reader.said[:due]]
    assert reader.read[1 + len(laid) + due] == text(5 * blocks)[0]


def test_a_prompt_is_read_before_there_is_text_for_its_last_block() -> None:
    stream = TextStream(CONFIG, prompt_text=range(6), prompt_speech=range(20))
    reader = Reader(stream).go()
    assert reader.read == [START, *text(0, 1, 2, 3, 4), *range(14)]
    assert reader.said == []
    stream.push([6, 7, 8])
    assert reader.go().said == []
    stream.push([9])
    reader.go()
    assert reader.read[20:] == [14, *text(5, 6, 7, 8, 9), *range(15, 20), *range(100, 109)]
    assert len(reader.said) == 10


def test_a_prompt_longer_than_all_text_stands_before_the_speech() -> None:
    stream = TextStream(CONFIG, prompt_text=range(6), prompt_speech=range(40))
    reader = arrive(Reader(stream, {3: END}), [50, 51])
    assert reader.read == [
        START,
        *text(0, 1, 2, 3, 4),
        *range(15),
        *text(5, 50, 51),
        TASK,
        *range(15, 40),
        100,
        101,
        102,
    ]


def test_arriving_text_that_is_short_is_read_like_known_text() -> None:
    arriving = arrive(Reader(TextStream(CONFIG, prompt_text=[4]), {8: END}), [1, 2])
    known = Reader(TextStream(CONFIG, [1, 2], prompt_text=[4]), {8: END}).go()
    assert arriving.read == known.read
    assert arriving.said == known.said


def test_a_full_session_ends_and_says_what_is_left() -> None:
    stream = TextStream(CONFIG)
    reader = Reader(stream)
    stream.push(range(200))
    reader.go()
    assert stream.end == "capacity"
    assert len(reader.read) <= CONFIG.capacity < len(reader.read) + 6
    spoken = [token - CONFIG.text_id(0) for token in reader.read if token >= CONFIG.text_id(0)]
    assert [*spoken, *stream.rest] == list(range(200))
    full = Reader(TextStream(CONFIG, range(5), prompt_speech=[1] * 380, lengths=(0, 100))).go()
    assert full.stream.end == "capacity"
    assert len(full.read) == CONFIG.capacity
    with pytest.raises(ValueError, match="prompt and text are 408 tokens, the sessions were made for 400"):
        TextStream(CONFIG, range(5), prompt_speech=[1] * 400)


def test_steps_and_draws_alternate() -> None:
    stream = TextStream(CONFIG, [1])
    with pytest.raises(RuntimeError, match="no step is under way"):
        stream.take(3)
    assert stream.feed() is not None
    with pytest.raises(RuntimeError, match="was not taken"):
        stream.feed()
    with pytest.raises(RuntimeError, match="start another stream"):
        stream.push([2])


def test_a_model_may_mix_and_extend_in_its_own_way() -> None:
    config = replace(CONFIG, mix=(4, 6), extent=(0.5, 2.0))
    stream = TextStream(config)
    reader = arrive(Reader(stream), range(10))
    assert reader.read[:22] == [
        START,
        *text(0, 1, 2, 3),
        *range(100, 106),
        *text(4, 5, 6, 7),
        *range(106, 112),
        *text(8),
    ]
    assert (stream.end, len(reader.said)) == ("length", 20)
    with pytest.raises(ValueError, match=r"got \(0, 15\)"):
        replace(CONFIG, mix=(0, 15))
    with pytest.raises(ValueError, match=r"a rising pair, got \(3, 2\)"):
        replace(CONFIG, extent=(3, 2))


def test_sampling_is_handed_on() -> None:
    feed = TextStream(CONFIG, [1], sampling=Sampling(top_p=0.5, window=3, tau=0.5, seed=9)).feed()
    assert feed is not None
    given = {name: feed.inputs[name].item() for name in ("top_p", "top_k", "window", "repeats", "temperature", "seed")}
    assert given == {"top_p": 0.5, "top_k": 25, "window": 3, "repeats": 2, "temperature": 1.0, "seed": 9}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TextStream(CONFIG, block=(0, 15)), "a block has text and speech"),
        (lambda: TextStream(CONFIG, lengths=(3, 2)), "a rising pair"),
        (lambda: TextStream(CONFIG, prompt_speech=[500]), "from 0 to 499"),
        (lambda: TextStream(CONFIG, [1000]), "text token 1000"),
        (lambda: lay_out(CONFIG, range(10), range(30), CONFIG.mix), "more than 30 speech tokens"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
