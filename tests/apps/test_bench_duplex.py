"""``antiphon bench duplex`` at a tiny shape, and what it rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from antiphon.apps.bench import duplex
from antiphon.apps.bench.load import bisect, schedule
from antiphon.pipelines.engine import Engine


@pytest.fixture(scope="module")
def random() -> duplex.Random:
    return duplex.Random(duplex.SHAPES["tiny"], torch.device("cpu"), torch.float32)


def test_every_part_runs_and_is_written(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    kinds = ["--kinds", "frame", "references", "capacity", "unbatched", "answers", "floor"]
    parts = [*kinds, "--batches", "1", "4", "--frames", "4", "--sessions", "2"]
    load = ["--unbatched-sessions", "1", "--seconds", "0.4", "--warm", "0.1", "--confirm", "0.5", "--device", "cpu"]
    duplex.main([*parts, *load, "--results", str(tmp_path)])
    torch.set_num_threads(threads)
    numbers = json.loads((tmp_path / "duplex_cpu.json").read_text())["numbers"]
    ours = [row for row in numbers["frame"] if row["name"] != "moshi"]
    stored = ["keys and values float32", "keys and values float8_e4m3fn"]
    assert [(row["name"], row["sessions"]) for row in ours] == [
        (f"antiphon {kind}", size) for kind in stored for size in (1, 4)
    ]
    assert all(0 < row["ms"] <= row["max_ms"] for row in numbers["frame"])
    assert len(numbers["frame"]) - len(ours) + len(numbers["failures"]) == 2  # the moshi package, or why not
    assert [row["name"] for row in numbers["capacity"]] == [*stored, f"{stored[0]}, unbatched"]
    for row in numbers["capacity"]:
        assert row["held"] == max((run["sessions"] for run in row["runs"] if run["held"]), default=0)
        assert all(4 <= run["chunks"] / run["sessions"] <= 5 for run in row["runs"] if run["seconds"] == 0.4)
    assert numbers["capacity"][1]["state_bytes"] < numbers["capacity"][0]["state_bytes"]
    for row, kind in zip(numbers["answers"], stored, strict=True):
        assert row == {
            "name": kind, "sessions": 4, "alone": 4, "frames": 4, "tokens": 4 * 4 * 9, "equal": 1.0, "first": None,
        }  # fmt: skip
    full, small = numbers["floors"][1], numbers["floors"][3]
    assert (full["sessions"], small["sessions"]) == (4, 4)
    assert full["state_bytes"] == 4 * small["state_bytes"] == 2 * 60 * 2 * 64 * 4
    assert full["launches"] > 300
    assert (tmp_path / "duplex_cpu.svg").stat().st_size > 1000


def test_sessions_are_as_old_as_the_window(random: duplex.Random) -> None:
    """What a session says then depends on all that its ring holds, the oldest entry included."""
    for kv in (None, torch.float8_e4m3fn):
        model = random.model(kv)
        heard = []
        for change in (False, True):
            with Engine(inline=True) as engine:
                engine.add("duplex", model, slots=1, buckets=(1,), variants=(1,), exact=False)
                lease = engine.open_sync("duplex")
                torch.manual_seed(1)
                duplex.age(lease)
                rings = lease.store.state["temporal.rings"][lease.slot.row]
                assert rings.float().isfinite().all()
                assert bool((rings.float().abs().sum((2, 3, 4)) > 0).all())
                seen = int(lease.store.state["temporal.seen"][lease.slot.row])
                capacity = rings.shape[1]
                assert seen >= capacity
                if change:  # the oldest that is in reach of the next position
                    oldest = rings[:, (seen + 1) % capacity]
                    oldest[:, 1] = (
                        -oldest[:, 1].float().to(rings.dtype) if kv is None else torch.ones_like(oldest[:, 1])
                    )
                logits: list[torch.Tensor] = []
                hook = model.lm.text_head.register_forward_hook(lambda _, __, made, kept=logits: kept.append(made))
                lease.step_sync(duplex.make_inputs(model)(0, 0))
                hook.remove()
                heard.append(logits[0])
        assert not torch.equal(*heard)


def test_answers_are_compared(random: duplex.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that have lived through the same answer the same in any batch; others do not."""
    same = duplex.bench_answers(random, None, 9, frames=6, advance=lambda _: None)
    assert (same["alone"], same["tokens"], same["equal"], same["first"]) == (8, 8 * 6 * 9, 1.0, None)
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    other = duplex.bench_answers(random, None, 9, frames=6, advance=lambda _: None)
    assert other["equal"] < 0.9
    assert other["first"] == 0


@pytest.mark.parametrize("held", [0, 1, 5, 31, 32])
def test_bisection_finds_the_largest(held: int) -> None:
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count <= held

    assert bisect(32, holds, lambda: True) == held
    assert len(tried) <= 7
    assert len(tried) == len(set(tried))
    assert bisect(32, holds, lambda: False) == 0


def test_frames_are_sent_when_they_are_due_or_a_little_later() -> None:
    plan = schedule(3, 50, 0.08, seed=1, jitter=0.01)
    assert [sent for sent, *_ in plan] == sorted(sent for sent, *_ in plan)
    assert all(0 <= sent - due <= 0.01 for sent, due, *_ in plan)
    for session in range(3):
        mine = [(due, number) for _, due, one, number in plan if one == session]
        assert [number for _, number in mine] == list(range(50))
        assert [due - mine[0][0] for due, _ in mine] == pytest.approx([0.08 * number for number in range(50)])
    assert plan == schedule(3, 50, 0.08, seed=1, jitter=0.01)
    assert plan != schedule(3, 50, 0.08, seed=2, jitter=0.01)
    assert [due for _, due, *_ in schedule(4, 1, 0.08, None, 0.0)] == pytest.approx([0.0, 0.02, 0.04, 0.06])


def test_only_numbers_that_were_run_are_shown() -> None:
    runs = [{"sessions": count, "held": held} for count, held in ((145, False), (108, True), (126, True), (126, False))]
    assert duplex._shown(runs) == 108
    assert duplex._shown(runs[:3]) == 126
    assert duplex._shown(runs[:1]) == duplex._shown([]) == 0
