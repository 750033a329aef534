"""What a session gets does not depend on its neighbours, its slot, its bucket or its history of moves: to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import WIDTH, Solver, Toy

from antiphon.pipelines.engine import Engine, Lease, Row, probe_exact_buckets
from antiphon.pipelines.engine.cuda import deterministic
from antiphon.pipelines.engine.runner import Rows, Staging

SESSIONS, CHUNKS = 8, 30
NOISE = np.random.default_rng(0).standard_normal((SESSIONS, CHUNKS, 3, WIDTH)).astype(np.float32)
Heard = dict[int, list[dict[str, torch.Tensor]]]


def engine(slots: int = SESSIONS, buckets: Sequence[int] | None = None) -> Engine:
    made = Engine(inline=True, inbox=64)
    made.add("toy", Toy(), slots=slots, buckets=buckets)
    return made


def chunk(session: int, index: int, frames: int = 1) -> dict[str, object]:
    return {"frames": NOISE[session, index, :frames], "gain": 0.5 + session}


def rounds(seed: int, sessions: Sequence[int]) -> Iterator[list[int]]:
    """Who has a chunk in each round, in which order, until all chunks are used; sessions start at different rounds."""
    rng = np.random.default_rng(seed)
    left = dict.fromkeys(range(SESSIONS), CHUNKS)
    number = 0
    while any(left.values()):
        number += 1
        ready = [session for session in left if left[session] and number > session and rng.random() < 0.5]
        rng.shuffle(ready)
        for session in ready:
            left[session] -= 1
        if chosen := [session for session in ready if session in sessions]:
            yield chosen


def play(
    made: Engine, sessions: Sequence[int] = range(SESSIONS), *, frames: int = 1, seed: int = 3, opened: str = "in order"
) -> Heard:
    """Every round's chunks in one batch."""
    order = list(sessions)
    if opened == "reversed":
        order.reverse()
    leases = {session: made.open_sync("toy", frames) for session in order}
    heard: Heard = {session: [] for session in sessions}
    for ready in rounds(seed, sessions):
        rows = made.run_sync([(leases[session], chunk(session, len(heard[session]), frames)) for session in ready])
        for session, row in zip(ready, rows, strict=True):
            heard[session].append({name: tensor.clone() for name, tensor in row.items()})
    return heard


def same(left: Heard, right: Heard) -> bool:
    """Bit-equal outputs, for the sessions of ``right``."""
    return all(
        torch.equal(a[name], b[name])
        for session in right
        for a, b in zip(left[session], right[session], strict=True)
        for name in b
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["1 frame", "3 frames"])
def together(request: pytest.FixtureRequest) -> tuple[int, Heard]:
    torch.set_num_threads(1)
    return request.param, play(engine(), frames=request.param)


def test_the_toy_remembers(together: tuple[int, Heard]) -> None:
    frames, heard = together
    assert heard[2][-1]["count"].tolist() == list(range(frames * CHUNKS - frames + 1, frames * CHUNKS + 1))
    fresh = engine()
    row = fresh.open_sync("toy", frames).step_sync(chunk(2, CHUNKS - 1, frames))
    assert not torch.equal(row["frames"], heard[2][-1]["frames"])


@pytest.mark.parametrize("session", [0, 3, 7])
def test_alone_equals_together(together: tuple[int, Heard], session: int) -> None:
    frames, heard = together
    assert same(heard, play(engine(), [session], frames=frames))


def test_other_slots_and_another_order_in_the_batch(together: tuple[int, Heard]) -> None:
    frames, heard = together
    assert same(heard, play(engine(), frames=frames, opened="reversed"))
    assert same(heard, play(engine(), frames=frames, seed=4))


@pytest.mark.parametrize("garbage", [1e3, float("nan")])
def test_free_slots_and_scratch_hold_garbage(together: tuple[int, Heard], garbage: float) -> None:
    frames, heard = together
    made = engine()
    lease = made.open_sync("toy")
    for tensor in lease.store.state.values():
        tensor.fill_(garbage if tensor.is_floating_point() else 7)
    lease.close()
    assert same(heard, play(made, frames=frames))


def test_other_buckets_and_a_larger_engine(together: tuple[int, Heard]) -> None:
    frames, heard = together
    assert same(heard, play(engine(buckets=(4,)), frames=frames))
    assert same(heard, play(engine(slots=40, buckets=(4, 32)), frames=frames))


def test_a_snapshot_continues_in_a_fresh_engine_in_another_slot(together: tuple[int, Heard]) -> None:
    frames, heard = together
    first = engine()
    lease = first.open_sync("toy", frames)
    for index in range(11):
        lease.step_sync(chunk(5, index, frames))
    data = lease.pack(lease.snapshot_sync())
    second = engine()
    others = [second.open_sync("toy", frames) for _ in range(4)]
    moved = second.open_sync("toy", frames)
    moved.restore(data)
    for index in range(11, CHUNKS):
        rows = second.run_sync(
            [(moved, chunk(5, index, frames)), *((other, chunk(1, index, frames)) for other in others)]
        )
        assert all(torch.equal(rows[0][name], heard[5][index][name]) for name in rows[0])


def test_a_fork_follows_its_own_inputs() -> None:
    async def main() -> None:
        with engine(slots=4) as made:
            lease = await made.open("toy", 1)
            for index in range(5):
                await lease.step(chunk(0, index))
            fork = await lease.fork()
            same_a, same_b = await asyncio.gather(lease.step(chunk(0, 5)), fork.step(chunk(0, 5)))
            assert torch.equal(same_a["frames"], same_b["frames"])
            ours, theirs = await asyncio.gather(lease.step(chunk(0, 6)), fork.step(chunk(1, 6)))
            assert not torch.equal(ours["frames"], theirs["frames"])
            # the source went on as if it had not been forked
            alone = play(engine(), [0])[0]
            assert torch.equal(ours["frames"], alone[6]["frames"])

    asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["step", "step", "leave", "move"]), st.sets(st.integers(0, 5), min_size=1)),
        max_size=20,
    )
)
def test_sessions_join_leave_and_move_at_any_time(events: list[tuple[str, set[int]]]) -> None:
    """Every session against a copy of it that is alone in its own engine."""
    made = engine(slots=12, buckets=(4, 8))
    crowd: dict[int, Lease] = {}
    alone: dict[int, Lease] = {}
    for number, (event, sessions) in enumerate(events):
        if event == "step":
            for session in sorted(sessions - crowd.keys()):
                crowd[session] = made.open_sync("toy", 1)
                alone[session] = engine(slots=1).open_sync("toy", 1)
            rows = made.run_sync([(crowd[session], chunk(session, number)) for session in sorted(sessions)])
            for session, row in zip(sorted(sessions), rows, strict=True):
                expected = alone[session].step_sync(chunk(session, number))
                assert all(torch.equal(row[name], expected[name]) for name in expected)
            continue
        for session in sessions & crowd.keys():
            left = crowd.pop(session)
            if event == "move":
                crowd[session] = made.open_sync("toy", 1)
                crowd[session].restore(left.snapshot_sync())
            else:
                del alone[session]
            left.close()


def test_threaded_sessions_equal_sessions_alone() -> None:
    """In the engine's own thread batches form by chance; the bits stay."""

    async def session(made: Engine, number: int) -> list[Row]:
        lease = await made.open("toy", 1)
        rows = []
        for index in range(CHUNKS):
            rows.append(await lease.step(chunk(number, index)))
            for _ in range(number * index % 5):
                await asyncio.sleep(0)
        lease.close()
        return rows

    async def main() -> list[list[Row]]:
        with Engine() as made:
            made.add("toy", Toy(), slots=SESSIONS, tick=0.0005)
            return await asyncio.gather(*(session(made, number) for number in range(SESSIONS)))

    heard = asyncio.run(main())
    expected = play(engine())
    for number, rows in enumerate(heard):
        for index, row in enumerate(rows):
            assert all(torch.equal(row[name], expected[number][index][name]) for name in row)


def test_variants_may_change_between_chunks() -> None:
    async def main() -> None:
        with engine(slots=2) as made:
            lease = await made.open("toy", 1)
            for index in range(3):
                row = await lease.step({"frames": NOISE[0, 0, index : index + 1], "gain": 1.0})
            await lease.switch(3)
            row = await lease.step({"frames": NOISE[0, 1], "gain": 1.0})
            assert row["count"].tolist() == [4, 5, 6]
            assert lease.variant == 3

    asyncio.run(main())


def test_slices_equal_one_step() -> None:
    made = Engine(inline=True)
    made.add("solver", Solver(), slots=4)
    lease, other = made.open_sync("solver"), made.open_sync("solver")
    for index in range(3):
        row, quiet = made.run_sync([(lease, {"x": np.float32([index + 1])}), (other, {"x": np.float32([0])})])
    assert row["sum"].tolist() == [4.0 * (1 + 2 + 3)]
    assert quiet["sum"].tolist() == [0.0]


def test_the_probe_finds_buckets_that_round_differently() -> None:
    class Rounds(Toy):
        """Adds a bit where the batch has 16 rows."""

        def step(self, inputs, state, slots, active):
            outputs = super().step(inputs, state, slots, active)
            if len(slots) == 16:
                outputs["frames"] = outputs["frames"] * (1 + 2**-22)
            return outputs

    assert probe_exact_buckets(Rounds(), 1, (4, 8, 16, 32)) == (4, 8, 32)
    made = Engine(inline=True)
    made.add("rounds", Rounds(), slots=32, variants=(1,))
    assert made.metrics()["models"]["rounds"]["variants"][1]["buckets"] == [4, 8, 32]
    made = Engine(inline=True)
    made.add("rounds", Rounds(), slots=32, variants=(1,), exact=False)
    assert made.metrics()["models"]["rounds"]["variants"][1]["buckets"] == [1, 2, 4, 8, 16, 32]


def test_smaller_batches_serve_where_they_round_as_four_rows_do() -> None:
    class Doubles(Toy):
        """Exact in any batch but one of a single row."""

        def step(self, inputs, state, slots, active):
            rows = len(slots)
            outputs = {"double": inputs["frames"] * 2.0 + (rows == 1)}
            state["level"][slots] = torch.where(active, state["level"][slots] + 1, state["level"][slots])
            return outputs

    assert probe_exact_buckets(Doubles(), 1, (1, 2, 4, 8)) == (2, 4, 8)
    assert probe_exact_buckets(Doubles(), 1, (1, 2)) == (2,)


def test_the_probe_sees_a_difference_that_only_the_state_shows() -> None:
    class Hides(Toy):
        def step(self, inputs, state, slots, active):
            outputs = super().step(inputs, state, slots, active)
            if len(slots) == 8:
                state["level"][slots[-1]] += 1e-6
            return {"count": outputs["count"]}

    assert probe_exact_buckets(Hides(), 1, (4, 8, 16)) == (4, 16)


def test_staging_pads_with_reset_values() -> None:
    staging = Staging(Toy().input_spec(3), 8, scratch=5)
    rows = [{"frames": np.full((3, WIDTH), float(index), np.float32), "gain": np.float32(index)} for index in range(7)]
    staging.fill(Rows(rows, list(range(7))), 8)
    staging.fill(Rows(rows[:2], [3, 1]), 4)
    inputs, slots, active = staging.views(4)
    assert slots.tolist() == [3, 1, 5, 5]
    assert active.tolist() == [True, True, False, False]
    assert inputs["gain"].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert inputs["frames"][:, 0, 0].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_what_is_chosen_while_a_model_is_made_ready_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    with deterministic():
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
