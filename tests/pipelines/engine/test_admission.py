"""Who is let in, what is shed, and the numbers that the engine shows of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from toy_models import WIDTH, Null, Solver, Toy

from antiphon.pipelines.clock import VirtualClock, run_virtual
from antiphon.pipelines.engine import Admission, AtCapacity, Engine, Lane, Shedding
from antiphon.pipelines.engine.metrics import LaneMetrics, Window


def admission(lane: Lane, seconds: Callable[[int], float]) -> Admission:
    metrics = LaneMetrics(lane.buckets)
    for bucket in lane.buckets:
        metrics.steps[bucket].add(seconds(bucket))
    return Admission({lane: metrics})


def test_utilisation_is_step_time_over_the_longest_tick() -> None:
    lane = Lane("m", 1, 0.08, 0.08, (4, 8, 16, 32, 64))
    gate = admission(lane, lambda bucket: 0.001 * bucket)
    for sessions, share in [
        (0, 0.0),
        (1, 0.004 / 0.08),  # a step of its own every 80 ms
        (8, 0.004 / 0.04),  # four rows every 40 ms
        (10, 0.008 / 0.04),  # five rows need the bucket of eight
        (64, 0.032 / 0.04),
        (160, (0.064 + 0.016) / 0.04),  # eighty rows: a full batch and one of sixteen
    ]:
        gate.sessions[lane] = sessions
        assert gate.utilisation() == pytest.approx(share), sessions


@pytest.mark.parametrize(("apart", "share"), [(True, 0.5), (False, 0.6)])
def test_streams_that_do_not_run_at_once_add_up(apart: bool, share: float) -> None:
    lanes = [Lane(name, 1, 0.08, 0.08, (4,), stream=name) for name in ("slow", "quick")]
    metrics = {lane: LaneMetrics(lane.buckets) for lane in lanes}
    for lane, seconds in zip(lanes, (0.04, 0.008), strict=True):
        metrics[lane].steps[4].add(seconds)
    gate = Admission(metrics, apart=apart)
    for lane in lanes:
        gate.sessions[lane] = 1
    assert gate.utilisation() == pytest.approx(share)


def test_slices_count_with_their_number() -> None:
    lane = Lane("m", 1, 1.0, 0.25, (4, 8), slices=10)
    gate = admission(lane, lambda bucket: 0.002)
    gate.sessions[lane] = 8
    assert gate.utilisation() == pytest.approx(0.020 / 0.125)


def test_sessions_are_let_in_up_to_the_limit() -> None:
    lane = Lane("m", 1, 0.08, 0.08, (4, 8, 16, 32, 64))
    gate = admission(lane, lambda bucket: 0.001 * bucket)
    for admitted in range(32):  # 16 rows each 40 ms take 16 ms; 17 need the next bucket and 32 ms
        gate.check(lane, now=10.0)
        gate.enter(lane, admitted, now=float(admitted) / 10)
    with pytest.raises(AtCapacity) as refusal:
        gate.check(lane, now=10.0)
    assert refusal.value.utilisation == pytest.approx(0.8)
    assert gate.utilisation() <= gate.limit
    assert refusal.value.expected_wait == pytest.approx((10.0 - 1.55) / 32)
    gate.leave(lane, 0, now=20.0)
    assert gate.expected_wait(20.0) == pytest.approx(20.0 / 31)
    gate.check(lane, now=20.0)


def test_the_engine_refuses_what_its_measured_steps_cannot_carry() -> None:
    async def main() -> None:
        with Engine(clock=VirtualClock(), inline=True, cost=lambda model, variant, bucket: 0.002 * bucket) as engine:
            engine.add("null", Null(), slots=64)
            leases = [await engine.open("null") for _ in range(16)]
            with pytest.raises(AtCapacity, match=r"at capacity: 16 sessions leave no room .* choose a longer chunk"):
                await engine.open("null")
            await engine.open("null", paced=False)  # a file only needs a slot
            with pytest.raises(AtCapacity):
                await leases[0].fork()
            metrics = engine.metrics()
            assert metrics["utilisation"] == pytest.approx(0.016 / 0.04)
            assert metrics["counts"]["admitted"] == 17
            assert metrics["counts"]["refused"] == 2
            leases.pop().close()
            await leases[0].fork()

    run_virtual(main())


def test_a_live_estimate_moves_the_gate() -> None:
    seconds = 0.001

    async def main() -> None:
        nonlocal seconds
        with Engine(clock=VirtualClock(), inline=True, cost=lambda *_: seconds) as engine:
            engine.add("null", Null(), slots=8)
            lease = await engine.open("null")
            seconds = 0.2  # the device got slower
            for _ in range(40):
                await lease.step({"x": np.zeros(1, np.float32)})
            with pytest.raises(AtCapacity):
                await engine.open("null")

    run_virtual(main())


def test_no_slot_is_at_capacity_too() -> None:
    async def main() -> None:
        clock = VirtualClock()
        with Engine(clock=clock, inline=True) as engine:
            engine.add("null", Null(), slots=2)
            first = await engine.open("null")
            await engine.open("null")
            await clock.sleep(3.0)
            with pytest.raises(AtCapacity, match="all 2 slots of model 'null' are taken") as refusal:
                await engine.open("null")
            assert refusal.value.expected_wait == pytest.approx(1.5)
            first.close()
            await engine.open("null")

    run_virtual(main())


def test_a_session_that_uses_another_variant_stays_counted_where_it_was() -> None:
    async def main() -> None:
        with Engine(clock=VirtualClock(), inline=True) as engine:
            engine.add("toy", Toy(), slots=2)
            lease = await engine.open("toy", 1)
            for variant in (3, 1, 3):
                lease.use(variant)
                row = await lease.step({"frames": np.zeros((variant, WIDTH), np.float32), "gain": np.float32(1)})
                assert len(row["frames"]) == variant
            counted = {key: value["sessions"] for key, value in engine.metrics()["models"]["toy"]["variants"].items()}
            assert counted == {1: 1, 3: 0}
            with pytest.raises(ValueError, match="does not serve variant 7"):
                lease.use(7)
            await lease.switch(3)
            lease.use(1)
            lease.close()
            await asyncio.sleep(0)
            assert [one["sessions"] for one in engine.metrics()["models"]["toy"]["variants"].values()] == [0, 0]

    run_virtual(main())


def test_shedding_follows_its_order_and_counts() -> None:
    shedding = Shedding(("video_frames", "lookahead"), above=0.9, below=0.7, hold=1.0)
    assert not shedding.shed("video_frames")
    shedding.update(0.95, 0.0)
    assert shedding.shed("video_frames", 3)
    assert not shedding.shed("lookahead")
    shedding.update(0.95, 0.5)  # too soon
    assert not shedding.shed("lookahead")
    shedding.update(0.95, 1.0)
    assert shedding.shed("lookahead")
    shedding.update(0.8, 5.0)  # between the two: stays
    assert shedding.level == 2
    shedding.update(0.5, 6.0)
    assert not shedding.shed("lookahead")
    assert shedding.shed("video_frames")
    assert shedding.counts == {"video_frames": 4, "lookahead": 1}
    with pytest.raises(ValueError, match="'colour' is not a shedding measure"):
        shedding.shed("colour")


def test_an_overloaded_engine_sheds_and_recovers() -> None:
    async def main() -> None:
        clock = VirtualClock()
        with Engine(clock=clock, inline=True, cost=lambda *_: 0.02, limit=9) as engine:
            engine.add("null", Null(), slots=1, tick=0.0)
            lease = await engine.open("null", paced=False)
            while clock.now() < 4.0:
                await lease.step({"x": np.zeros(1, np.float32)})
            assert engine.shedding.level >= 2
            assert engine.shedding.shed("video_frames")
            assert engine.metrics()["load"] > 0.9
            for _ in range(8):
                await clock.sleep(1.0)
                await lease.step({"x": np.zeros(1, np.float32)})
            assert engine.shedding.level == 0
            assert engine.metrics()["shed"]["video_frames"] == 1

    run_virtual(main())


def test_metrics_of_a_known_load() -> None:
    async def main() -> None:
        clock = VirtualClock()
        with Engine(clock=clock, inline=True, cost=lambda model, *_: 0.01 if model == "null" else 0.002) as engine:
            engine.add("null", Null(), slots=8)
            engine.add("solver", Solver(), slots=1, budget=0.3)
            leases = [await engine.open("null") for _ in range(6)]
            solver = await engine.open("solver")
            for _ in range(10):
                start = clock.now()
                await asyncio.gather(*(lease.step({"x": np.zeros(1, np.float32)}) for lease in leases))
                await clock.sleep_until(start + 0.08)
            await solver.step({"x": np.zeros(1, np.float32)}, deadline=clock.now() + 0.001)
            metrics = engine.metrics()
            null, solved = (metrics["models"][name]["variants"]["only"] for name in ("null", "solver"))
            assert (null["rows"], null["batches"], null["depth"], null["sessions"]) == (60, 10, 0, 6)
            assert null["occupancy"] == pytest.approx(60 / 80)
            assert null["steps"][8] == pytest.approx({"median": 0.01, "p99": 0.01, "ewma": 0.01, "count": 11})
            assert null["lateness"]["p99"] == pytest.approx(0.01 - 0.08)
            assert null["lateness"]["late"] == 0
            assert solved["steps"][4]["median"] == pytest.approx(0.002)  # one of four slices
            assert solved["lateness"]["max"] == pytest.approx(0.007)
            assert solved["lateness"]["late"] == 1
            assert metrics["models"]["null"]["bytes"] == 9 * 8
            text = engine.metrics_text()
            assert 'antiphon_lane_rows_total{model="null",variant="only"} 60\n' in text
            assert 'antiphon_model_slots_used{model="solver"} 1\n' in text
            assert 'antiphon_step_seconds{model="null",variant="only",bucket="8",quantile="p99"} 0.01\n' in text
            names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
            assert len(names) == len(set(names))

    run_virtual(main())


def test_a_window_keeps_the_last_values() -> None:
    window = Window(4)
    assert window.quantile(0.5) == 0.0
    window.extend([1.0, 2.0, 3.0])
    window.add(4.0)
    window.extend([5.0, 6.0])
    assert window.quantile(0.0) == 3.0
    window.extend([float(value) for value in range(10, 21)])
    assert (window.quantile(0.0), window.quantile(1.0)) == (17.0, 20.0)
    window.extend([])
    assert (window.count, window.max) == (17, 20.0)


def test_metrics_may_be_read_while_the_engine_works() -> None:
    async def main() -> None:
        with Engine() as engine:
            engine.add("null", Null(), slots=4, tick=0.0)
            leases = [await engine.open("null") for _ in range(4)]
            for _ in range(100):
                futures = [lease.step({"x": np.zeros(1, np.float32)}) for lease in leases]
                assert "antiphon_lane_depth" in engine.metrics_text()
                await asyncio.gather(*futures)
            assert engine.metrics()["models"]["null"]["variants"]["only"]["rows"] == 400

    asyncio.run(main())


def test_a_session_is_let_into_all_of_its_models_or_none() -> None:
    async def main() -> None:
        with Engine(inline=True, cost=lambda *_: 0.001) as engine:
            for name, slots in (("many", 4), ("few", 2)):
                engine.add(name, Toy(), slots=slots, variants=(1,))
            held = [lease for _ in range(2) for lease in await engine.open_together(["many", "few"])]
            assert [lease.model for lease in held] == ["many", "few"] * 2
            for _ in range(3):  # refused, it leaves nothing behind
                with pytest.raises(AtCapacity, match="all 2 slots of model 'few' are taken"):
                    await engine.open_together(["many", "few"])
            counts = engine.metrics()["counts"]
            assert (counts["admitted"], counts["refused"]) == (4, 3)
            assert len(await engine.open_together(["many", "many"])) == 2

    run_virtual(main())
