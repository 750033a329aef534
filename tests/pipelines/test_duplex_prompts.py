"""Who a dialogue model is and what it is made to say: voices before a conversation, and words in the middle of one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from conversing import RATE, converse, engine, noise, persona, sounds
from tiny_duplex import tiny_duplex
from tiny_moshi import Live

from antiphon.codecs import audio_file
from antiphon.codecs.loudness import loudness
from antiphon.models.files import CheckpointError
from antiphon.models.moshi.persona import SILENCE, TONE
from antiphon.models.moshi.sampling import Sampling
from antiphon.pipelines import voice_prompts
from antiphon.pipelines.chunk import Chunk, Event, Text
from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.duplex import Duplex, TokenLog, restart
from antiphon.pipelines.engine import Lease

SEEDS = Sampling(text_seed=1, audio_seed=2)


def clip(seconds: float = 1.5, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def voiced() -> Duplex:
    model = persona(context=64)  # far enough back for its voice
    for seed, name in enumerate(("NATF2", "hal")):
        model.add_voice(name, clip(1.5, seed))
    return model


# ---------------------------------------------------------------- voices


def test_a_voice_is_what_the_model_has_said() -> None:
    """The clip's codes, as loud as upstream makes it, whole frames; then silence, text and silence."""
    model, pcm = voiced(), clip()
    codes = model.voices["NATF2"]
    assert codes.shape == (8, 19)  # 18.75 frames
    louder = np.pad(pcm * np.float32(10 ** ((-24 - loudness(pcm, RATE)) / 20)), (0, 480))
    mimi, state = model.encoder, {name: spec.new(2) for name, spec in model.encoder.state_spec().items()}
    slot, active = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    with torch.inference_mode():
        for frame, part in enumerate(torch.from_numpy(louder).split(model.frame)):
            made = mimi.step({"pcm": part[None]}, state, slot, active)["codes"][0, :, 0]
            assert codes[:, frame].tolist() == made.tolist()
    model.add_voice("loud", pcm * 3)
    assert np.array_equal(model.voices["loud"], codes)
    rows = model.prompt("so it goes", "NATF2.pt")
    text = model.prompt("so it goes")
    assert len(rows) == 19 + len(text)
    assert rows[:18, 1].tolist() == codes[0, 1:].tolist()  # sampled a frame ahead
    assert np.array_equal(rows[:19, 2:9], codes[1:].T)
    assert (rows[:, 9:] == TONE).all()
    assert (rows[:20, 0] == 3).all()
    assert np.array_equal(rows[20:], text[1:])
    assert (model.prompt("", "hal")[19:, 1:9] == SILENCE).all()


def steps(model: Duplex, names: list[str], together: bool) -> list[list[Tensor]]:
    """Sound that sessions with these voices hear, together in batches or one after the other."""

    async def opened(made: Any, name: str) -> Lease:
        lease: Lease = await made.open("converse")
        if name:
            await restart(model, lease, TokenLog(1, model.prompt("yes", name)))
        return lease

    async def main(names: list[str]) -> list[list[Tensor]]:
        with engine(model, clock=VirtualClock()) as made:
            leases = [await opened(made, name) for name in names]
            said: list[list[Tensor]] = [[] for _ in names]
            for pcm in noise(8):
                futures = [lease.step({**model.inputs(SEEDS), "pcm": pcm}) for lease in leases]
                for one, future in zip(said, futures, strict=True):
                    row = await future
                    one += [row["sampled"].clone(), row["pcm"].clone()]
        return said

    if together:
        return run_virtual(main(names))
    return [run_virtual(main([name]))[0] for name in names]


def test_sessions_of_several_voices_and_of_none_side_by_side() -> None:
    model, names = voiced(), ["NATF2", "", "hal", "NATF2"]
    together, alone = steps(model, names, True), steps(model, names, False)
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    said = [torch.cat([row.flatten() for row in one]) for one in together]
    assert torch.equal(said[0], said[3])
    assert not any(torch.equal(said[a], said[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_conversation_goes_on_from_its_voice() -> None:
    model = voiced()
    rows = model.prompt("yes", "hal")

    async def state() -> dict[str, Tensor]:
        with engine(model, clock=VirtualClock()) as made:
            lease = await made.open("converse")
            await restart(model, lease, TokenLog(1, rows))
            return dict(await lease.snapshot())

    read, lived = run_virtual(state()), Live(model.lm, 4)
    for row in torch.from_numpy(rows):
        lived.step(row[9:].expand(4, -1), SEEDS, row[:9].expand(4, -1))
    for name in ("temporal.seen", "lm.tokens", "lm.history"):
        assert torch.equal(read[name], lived.state[name][0]), name
    assert (read["temporal.rings"] - lived.state["temporal.rings"][0]).abs().max() < 1e-5
    sound = list(noise(10))
    first = sounds(converse(sound, model=voiced(), voice="hal", prompt="yes"))
    assert not np.array_equal(first, sounds(converse(sound, model=voiced(), voice="NATF2", prompt="yes")))
    again = sounds(converse(sound * 2, {10: "restart"}, model=voiced(), voice="hal", prompt="yes"))
    assert np.array_equal(again, np.concatenate((first, first)))


def test_voices_there_are_not() -> None:
    with pytest.raises(Exception, match=r"no voice 'NATF1\.pt'; did you mean 'NATF2'\? \(known: NATF2, hal\)"):
        converse(list(noise(1)), model=voiced(), voice="NATF1.pt")
    with pytest.raises(ValueError, match="known: none"):
        persona().prompt("", "hal")
    for model, told in ((tiny_duplex(), "takes no prompts"), (tiny_duplex(prefill=4), "not made for prompts")):
        with pytest.raises(ValueError, match=told):
            model.add_voice("hal", clip())
    click = np.zeros(RATE, np.float32)
    click[100] = 0.004
    for pcm, told in ((clip(0.5), "record more"), (clip() * 0, "the clip is silent"), (click, "but for a moment")):
        with pytest.raises(ValueError, match=told):
            persona().add_voice("hal", pcm)


def write(path: Path, seed: int = 0) -> Path:
    audio_file.write(path, clip(1.5, seed), RATE)
    return path


def test_voices_from_files(tmp_path: Path) -> None:
    model = persona()
    write(tmp_path / "hal.wav")
    write(tmp_path / "NATF2.flac", 1)
    (tmp_path / "NATF2.pt").write_bytes(b"not read: there is a clip")
    (tmp_path / "LICENSE").write_text("")
    assert voice_prompts.add(model, tmp_path) == ["NATF2", "hal"]
    assert [codes.shape for codes in model.voices.values()] == [(8, 19), (8, 19)]
    assert voice_prompts.add(model, write(tmp_path / "one.wav", 2)) == ["one"]
    (tmp_path / "VARM0.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"VARM0\.pt: holds more than weights, or is damaged"):
        voice_prompts.add(model, tmp_path)
    write(tmp_path / "hal.flac")
    with pytest.raises(ValueError, match="several clips are called hal"):
        voice_prompts.add(model, tmp_path)
    with pytest.raises(ValueError, match=r"LICENSE: no voice; it takes a clip \(\.wav"):
        voice_prompts.add(model, tmp_path / "LICENSE")
    with pytest.raises(ValueError, match="no file or folder"):
        voice_prompts.add(model, tmp_path / "nowhere")


# ---------------------------------------------------------------- words


def say(text: Any) -> Event:
    return Event(name="say", data={"text": text}, rate=RATE)


def words(chunks: list[Chunk]) -> str:
    return " ".join("".join(chunk.text for chunk in chunks if isinstance(chunk, Text) and chunk.final).split())


def test_words_in_the_middle_of_a_conversation() -> None:
    sound = list(noise(40))
    free, told = converse(sound), converse(sound, {10: say("so it goes yes"), 12: say("no")})
    assert "so it goes yes no" in words(told)
    assert "so it goes" not in words(free)
    # The sound goes on, is the same before, and other after.
    assert len(sounds(told)) == len(sounds(free))
    assert np.array_equal(sounds(told)[: 9 * 1920], sounds(free)[: 9 * 1920])
    assert not np.array_equal(sounds(told)[9 * 1920 :], sounds(free)[9 * 1920 :])
    # Half of it is said before an interruption, the rest never.
    counters: Counter[str] = Counter()
    cut = words(converse(sound, {10: say("so it goes yes"), 14: "cancel"}, counters=counters))
    assert "goes yes" not in cut
    assert counters["converse.tokens_unsaid"] > 0
    assert "so it goes" in words(converse(sound, {10: "cancel", 12: say("so it goes")}))
    counters.clear()
    converse(sound, {10: say("so it goes yes"), 12: "restart"}, counters=counters)
    assert counters["converse.tokens_unsaid"] > 0


def test_what_cannot_be_said_is_counted() -> None:
    sound, counters = list(noise(8)), Counter[str]()
    events = {1: say(""), 2: say(None), 3: say(["a"]), 4: say("yes " * 1000), 5: Event(name="say", rate=RATE)}
    refused = converse(sound, events, counters=counters)
    assert counters["converse.says_refused"] == len(events)
    assert np.array_equal(sounds(refused), sounds(converse(sound)))


def test_what_one_is_made_to_say_is_nothing_to_the_others() -> None:
    model = tiny_duplex()

    def play(forces: list[int]) -> list[list[Tensor]]:
        made = engine(model)
        leases = [made.open_sync("converse") for _ in forces]
        said: list[list[Tensor]] = [[] for _ in forces]
        for number, pcm in enumerate(noise(12)):
            chunks = []
            for lease, force in zip(leases, forces, strict=True):
                inputs = model.inputs(SEEDS) | {"pcm": pcm}
                if number % 3:
                    inputs["force"] = np.array([force, *inputs["force"][1:]])
                chunks.append((lease, inputs))
            for one, row in zip(said, made.run_sync(chunks), strict=True):
                one += [row["sampled"].clone(), row["pcm"].clone()]
        return said

    forces = [-2, 7, -3, 0]
    together = play(forces)
    for one, force in zip(together, forces, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, play([force])[0], strict=True))
    assert not torch.equal(torch.cat(together[0][::2]), torch.cat(together[2][::2]))
