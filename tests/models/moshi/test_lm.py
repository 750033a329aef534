"""Moshi's step: equal to whole conversations beyond the window, to itself alone, and to a log of it read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from interpreted import INTERPRETED
from tiny_moshi import CARD, GREEDY, STREAMS, TEXT, WINDOW, Live, tiny_lm, user_codes
from torch import Tensor

from antiphon.models.layers import kernels, noise, rope, transformer
from antiphon.models.moshi import depth, sampling
from antiphon.models.moshi.config import HELD, UNSET, ZERO
from antiphon.models.moshi.lm import MoshiLM
from antiphon.models.moshi.sampling import Sampling
from antiphon.models.streaming import State
from antiphon.pipelines.engine import Engine, Lease

FRAMES = 3 * WINDOW
HOT = Sampling(0.9, 20, 1.1, 15, penalty=1.3, penalty_context=8, padding_bonus=-0.5, text_seed=3, audio_seed=4)


def converse(live: Live, codes: Tensor, sampling: Sampling = GREEDY) -> tuple[Tensor, Tensor]:
    """What was sampled at each step, ``[B, 9, T]``, and the text logits ``[B, T, V]``."""
    logits: list[Tensor] = []
    hook = live.lm.text_head.register_forward_hook(lambda module, given, made: logits.append(made.clone()))
    sampled = [live.step(codes[..., frame], sampling)["sampled"] for frame in range(codes.shape[2])]
    hook.remove()
    return torch.stack(sampled, 2), torch.stack(logits, 1)


def undelayed(lm: MoshiLM, sampled: Tensor, codes: Tensor) -> Tensor:
    """A conversation as training sees it: the user's frame that step ``t`` hears first stands at ``t - 1``."""
    whole = torch.full((len(codes), STREAMS, codes.shape[2]), ZERO)
    for stream, delay in enumerate(lm.config.delays[:9]):
        whole[:, stream, : codes.shape[2] - delay] = sampled[:, stream, delay:]
    whole[:, 9:, :-1] = codes[..., 1:]
    return whole


@pytest.mark.parametrize("sinks", [0, 3])
def test_steps_equal_the_whole_conversation_beyond_the_window(sinks: int) -> None:
    lm = tiny_lm(sinks=sinks, dtype=torch.float64)
    codes = user_codes(2, FRAMES)
    sampled, logits = converse(Live(lm, 2), codes)
    with torch.inference_mode():
        whole = lm(undelayed(lm, sampled, codes))
    assert (whole.text - logits).abs().max() < 1e-10
    # Greedy steps took what the whole conversation makes likeliest, wherever that is predicted.
    expected = undelayed(lm, sampled, codes)[:, 1:9]
    assert torch.equal(whole.mask, expected >= 0)
    assert torch.equal(whole.audio.argmax(3)[whole.mask], expected[whole.mask])
    assert torch.equal(whole.text.argmax(2), sampled[:, 0])


def test_an_output_frame_is_complete_one_step_late() -> None:
    lm, codes = tiny_lm(), user_codes(2, 20)
    live, steps = Live(lm, 2), []
    for frame in range(20):
        steps.append(live.step(codes[..., frame]))
        if frame == 0:
            assert not steps[0]["valid"].any()
            assert (steps[0]["codes"] == UNSET).all()
            continue
        made, before = steps[frame], steps[frame - 1]
        assert made["valid"].all()
        assert torch.equal(made["text"], before["sampled"][:, 0])
        assert torch.equal(made["codes"][:, 0], before["sampled"][:, 1])
        assert torch.equal(made["codes"][:, 1:], made["sampled"][:, 2:])


def test_the_first_user_frame_is_never_seen() -> None:
    lm, codes = tiny_lm(), user_codes(1, 10)
    other = codes.clone()
    other[..., 0] = (other[..., 0] + 1) % CARD
    assert torch.equal(converse(Live(lm, 1), codes)[1], converse(Live(lm, 1), other)[1])
    other[..., 1] = (other[..., 1] + 1) % CARD
    assert not torch.equal(converse(Live(lm, 1), codes)[1], converse(Live(lm, 1), other)[1])


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_forced_tokens_stand_for_sampled_ones(sampling: Sampling) -> None:
    lm, codes = tiny_lm(), user_codes(2, 20)
    sampled, logits = converse(Live(lm, 2), codes, sampling)
    live = Live(lm, 2)
    hook: list[Tensor] = []
    lm.text_head.register_forward_hook(lambda module, given, made: hook.append(made.clone()))
    for frame in range(20):
        made = live.step(codes[..., frame], force=sampled[..., frame])
        assert torch.equal(made["sampled"], sampled[..., frame])
    assert torch.equal(torch.stack(hook, 1), logits)


def test_a_forced_text_token_changes_what_is_said() -> None:
    lm, codes = tiny_lm(), user_codes(1, 6)
    free, _ = converse(Live(lm, 1), codes)
    live, word = Live(lm, 1), (int(free[0, 0, 2]) + 1) % TEXT
    for frame in range(6):
        force = torch.full((1, 9), UNSET)
        if frame == 2:
            force[0, 0] = word
        made = live.step(codes[..., frame], force=force)["sampled"]
        if frame < 2:
            assert torch.equal(made, free[..., frame])
        if frame == 2:
            assert made[0, 0] == word
            assert not torch.equal(made[:, 1:], free[:, 1:, 2])


@pytest.mark.parametrize("chunk", [2, 3, 7])
def test_a_log_read_back_is_a_life_lived(chunk: int) -> None:
    """Recent tokens are read into a fresh slot, and the session goes on as if it had begun there."""
    frames, more = FRAMES, 10
    lm = tiny_lm(prefill=chunk, dtype=torch.float64)
    codes = user_codes(2, frames + more)
    live = Live(lm, 2)
    log = []
    for frame in range(frames):
        made = live.step(codes[..., frame], HOT)["sampled"]
        log.append(torch.cat((made, codes[..., frame]), 1))
    read = Live(lm, 2)
    for first in range(0, frames, chunk):
        part = log[first : first + chunk]
        filled = torch.full((2, chunk, STREAMS), UNSET)
        filled[:, : len(part)] = torch.stack(part, 1)
        seen = read.read(filled, len(part))["seen"]
    assert seen.tolist() == [frames, frames]
    for name in ("lm.tokens", "lm.history", "temporal.seen"):
        assert torch.equal(read.state[name][:2], live.state[name][:2]), name
    for frame in range(frames, frames + more):
        after, before = read.step(codes[..., frame], HOT), live.step(codes[..., frame], HOT)
        assert all(torch.equal(after[name], before[name]) for name in before)
    # The tail alone is what a fresh model makes of the tail alone.
    tail, fresh, short = log[-9:], Live(lm, 2), Live(lm, 2)
    for tokens in tail:
        fresh.step(tokens[:, 9:], HOT, tokens[:, :9])
    for first in range(0, len(tail), chunk):
        part = tail[first : first + chunk]
        short.read(torch.stack(part + [part[-1]] * (chunk - len(part)), 1), len(part))
    for frame in range(frames, frames + more):
        after, before = short.step(codes[..., frame], HOT), fresh.step(codes[..., frame], HOT)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_that_only_writes_has_no_depth() -> None:
    lm = tiny_lm(n_q=8, dep_q=0, delays=[0] * 9, extra_heads_num_heads=4, extra_heads_dim=6)
    codes = user_codes(2, 5)
    live = Live(lm, 2)
    for frame in range(5):
        made = live.step(codes[..., frame])
        assert made["valid"].all()
        assert made["codes"].shape == (2, 0)
        assert torch.equal(made["text"], made["sampled"][:, 0])
        assert made["heads"].shape == (2, 4, 6)
        assert torch.allclose(made["heads"].sum(2), torch.ones(2, 4))


# ---------------------------------------------------------------- on the engine

CALLS = {
    name: HOT if index % 2 else dataclasses.replace(HOT, text_seed=index, audio_seed=9)
    for index, name in enumerate("abcdef")
}


def engine() -> Engine:
    made = Engine(inline=True)
    made.add("moshi", tiny_lm(prefill=4), slots=8, variants=(1,))
    return made


def play(
    made: Engine, names: Sequence[str], moves: Sequence[int] = (), order: int = 1
) -> dict[str, list[dict[str, Tensor]]]:
    """Sessions of different ages and pauses; after each round in ``moves`` all of them move to a fresh engine."""
    leases: dict[str, Lease] = {name: made.open_sync("moshi") for name in list(names)[::order]}
    heard: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    codes = {name: user_codes(1, FRAMES, ord(name))[0] for name in "abcdef"}
    for round_ in range(FRAMES):
        ready = [
            name for index, name in enumerate("abcdef") if name in names and round_ >= index and (round_ + index) % 5
        ]
        chunks = []
        for name in ready[::order]:
            frame = {"codes": codes[name][:, len(heard[name])], "force": torch.full((9,), UNSET)}
            chunks.append((leases[name], frame | CALLS[name].inputs()))
        for name, row in zip(ready[::order], made.run_sync(chunks), strict=True):
            heard[name].append({key: value.clone() for key, value in row.items()})
        if round_ in moves:
            fresh = engine()
            moved = {name: fresh.open_sync("moshi") for name in names}
            for name, lease in leases.items():
                moved[name].restore(lease.pack(lease.snapshot_sync()))
            made, leases = fresh, moved
    return heard


def same(left: dict[str, list[dict[str, Tensor]]], right: dict[str, list[dict[str, Tensor]]]) -> bool:
    return all(
        torch.equal(a[key], b[key]) for name in right for a, b in zip(left[name], right[name], strict=True) for key in b
    )


@pytest.fixture(scope="module")
def together() -> dict[str, list[dict[str, Tensor]]]:
    torch.set_num_threads(1)
    return play(engine(), "abcdef")


def test_neighbours_change_nothing(together: dict[str, list[dict[str, Tensor]]]) -> None:
    assert max(len(calls) for calls in together.values()) > 2 * WINDOW
    for name in "abcdef":
        assert same(together, play(engine(), name)), name
    assert len({tuple(int(made["text"]) for made in calls[-8:]) for calls in together.values()}) > 3


def test_slots_and_order_change_nothing(together: dict[str, list[dict[str, Tensor]]]) -> None:
    assert same(together, play(engine(), "abcdef", order=-1))


def test_a_move_in_the_middle_of_a_call_changes_nothing(together: dict[str, list[dict[str, Tensor]]]) -> None:
    assert same(together, play(engine(), "abcdef", moves=(4, 20)))


@INTERPRETED
@pytest.mark.usefixtures("interpreter")
def test_kernels_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 16 bits and rows so few that kernels do all they can."""
    from antiphon.models.layers import triton_thin

    small = {"num_layers": 1, "num_heads": 2, "depformer_dim": 32, "depformer_num_layers": 1}
    lm, codes = tiny_lm(dtype=torch.float16, **small), user_codes(2, 1)
    hot = dataclasses.replace(HOT, text_top_k=0, audio_top_k=0)  # which is last of equal candidates is chance
    plain = converse(Live(lm, 2), codes, hot)
    for module in (kernels, transformer, noise, rope, depth, sampling):
        monkeypatch.setattr(module, "use_kernels", lambda x: True)
    monkeypatch.setattr(triton_thin, "PROGRAMS", 1)
    sampled, logits = converse(Live(lm, 2), codes, hot)
    assert torch.equal(sampled, plain[0])
    assert 0 < (logits - plain[1]).abs().max() < 1e-2


def test_held_text_begins_no_word() -> None:
    """What would be a word ends the padding instead, padding stays, and the sound goes with that."""
    lm = tiny_lm()
    codes, held, live = user_codes(4, 30), torch.full((4, 9), UNSET), Live(lm)
    held[::2, 0] = HELD
    hot = Sampling(text_temperature=3.0, audio_temperature=0.0)
    seen: set[int] = set()
    for frame in range(30):
        before = live.state

        def step(force: Tensor | None, heard: Tensor = codes[..., frame], state: State = before) -> Tensor:
            live.state = {name: value.clone() for name, value in state.items()}
            return live.step(heard, hot, force)["sampled"]

        drawn, forced = step(None), held.clone()
        forced[::2, 0] = torch.where(drawn[::2, 0] == lm.config.padding, lm.config.padding, lm.config.end_padding)
        expected = step(forced)
        assert torch.equal(step(held), expected)
        assert torch.equal(expected[1::2], drawn[1::2])
        seen |= {*drawn[::2, 0].tolist()}
    assert lm.config.padding in seen
    assert len(seen) > 3
