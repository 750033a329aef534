"""Graph replays against eager steps, and the engine's promises, on a CUDA device."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_models import WIDTH, Breaks, Chain, Solver, Toy

from antiphon.models.streaming import Specs, State, StreamingModel, TensorSpec
from antiphon.pipelines.engine import Engine, SlotStore, StepFailed
from antiphon.pipelines.engine.scheduler import MAIN

pytestmark = pytest.mark.gpu

CHUNKS = 20
NOISE = np.random.default_rng(0).standard_normal((8, CHUNKS, 3, WIDTH)).astype(np.float32)


def chunk(session: int, index: int, frames: int = 1) -> dict[str, object]:
    return {"frames": NOISE[session, index, :frames], "gain": 0.5 + session}


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("bucket", [4, 8])
def test_a_replayed_graph_equals_the_eager_step(frames: int, bucket: int) -> None:
    model = Toy().cuda().eval()
    with Engine("cuda") as engine:
        engine.add("toy", model, slots=8, buckets=(bucket,), variants=(frames,))
        leases = [engine.open_sync("toy") for _ in range(4)]
        store = SlotStore(model, 8, "cuda")
        slots = torch.tensor([lease.slot.row for lease in leases] + [8] * (bucket - 4), device="cuda")
        active = torch.tensor([True] * 4 + [False] * (bucket - 4), device="cuda")
        for index in range(CHUNKS):
            rows = engine.run_sync([(lease, chunk(number, index, frames)) for number, lease in enumerate(leases)])
            inputs = {
                "frames": torch.zeros(bucket, frames, WIDTH),
                "gain": torch.ones(bucket),
            }
            for number in range(4):
                inputs["frames"][number] = torch.from_numpy(NOISE[number, index, :frames])
                inputs["gain"][number] = 0.5 + number
            inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
            with torch.inference_mode():
                eager = model.step(inputs, store.state, slots, active)
            for number, row in enumerate(rows):
                assert row["frames"].device.type == "cpu"
                for name in row:
                    assert torch.equal(row[name], eager[name][number].cpu()), (name, number, index)
        for number, lease in enumerate(leases):
            snapshot = lease.snapshot_sync()
            for name in snapshot:
                assert torch.equal(snapshot[name], store.state[name][lease.slot.row].cpu()), (name, number)


def test_alone_equals_together_in_one_bucket() -> None:
    def play(sessions: list[int]) -> list[list[torch.Tensor]]:
        with Engine("cuda") as engine:
            engine.add("toy", Toy(), slots=8, buckets=(8,), variants=(1,))
            leases = [engine.open_sync("toy") for _ in sessions]
            heard: list[list[torch.Tensor]] = [[] for _ in sessions]
            for index in range(CHUNKS):
                chunks = [(lease, chunk(number, index)) for number, lease in zip(sessions, leases, strict=True)]
                for place, row in enumerate(engine.run_sync(chunks)):
                    heard[place].append(row["frames"])
            return heard

    together = play(list(range(8)))
    for session in (0, 5):
        alone = play([session])[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[session], strict=True))


def test_streams_have_the_priority_that_their_first_model_asks_for() -> None:
    with Engine("cuda") as engine:
        engine.add("toy", Toy(), slots=4, variants=(1,), stream="soon", priority=2)
        engine.add("other", Toy(), slots=4, variants=(1,))
        streams = engine._core._device_streams
        assert streams is not None
        assert streams.graphs("soon").stream.priority < streams.graphs(MAIN).stream.priority < 0


class Sounds(StreamingModel):
    """A vocoder's upsampling: torch's own choice of algorithm for it may add up in any order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose1d(256, 128, 16, 8)
        self.conv = nn.Conv1d(128, 128, 11)

    variants = (1,)

    def tick(self, variant: Hashable) -> float:
        return 0.08

    def state_spec(self) -> Specs:
        return {"sounds.seen": TensorSpec((), torch.int64)}

    def input_spec(self, variant: Hashable) -> Specs:
        return {"x": TensorSpec((256, 50))}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        return {"y": self.conv(self.up(inputs["x"])).mean(2)}


def test_convolutions_give_the_same_bits_every_time() -> None:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    x = np.random.default_rng(0).standard_normal((256, 50)).astype(np.float32)
    with Engine("cuda") as engine:
        engine.add("sounds", Sounds(), slots=8, buckets=(8,))
        lease = engine.open_sync("sounds")
        made = [lease.step_sync({"x": x})["y"] for _ in range(20)]
    assert all(torch.equal(one, made[0]) for one in made)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


def test_buckets_agree_closely_and_snapshots_move() -> None:
    with Engine("cuda") as engine, Engine("cuda") as other:
        engine.add("toy", Toy(), slots=8, buckets=(4, 8), variants=(1,))
        other.add("toy", Toy(), slots=3, buckets=(4,), variants=(1,))
        lease = engine.open_sync("toy")
        for index in range(10):
            lease.step_sync(chunk(3, index))
        other.open_sync("toy")
        moved = other.open_sync("toy")
        moved.restore(lease.pack(lease.snapshot_sync()))
        crowd = [engine.open_sync("toy") for _ in range(7)]
        for index in range(10, CHUNKS):
            ours = engine.run_sync([(lease, chunk(3, index)), *((one, chunk(1, index)) for one in crowd)])[0]
            theirs = moved.step_sync(chunk(3, index))
            assert torch.equal(ours["count"], theirs["count"])
            torch.testing.assert_close(ours["frames"], theirs["frames"], rtol=1e-4, atol=1e-5)


def test_slices_and_two_batches_in_flight() -> None:
    async def main() -> None:
        with Engine("cuda") as engine:
            engine.add("solver", Solver(), slots=4, tick=0.0)
            engine.add("toy", Toy(), slots=8, variants=(1, 3), tick=0.0)

            async def solve(number: int) -> None:
                lease = await engine.open("solver")
                total = 0
                for index in range(50):
                    total += 4 * (index + number)
                    row = await lease.step({"x": np.float32([index + number])})
                    assert row["sum"].item() == total

            async def listen(number: int, frames: int) -> None:
                lease = await engine.open("toy", frames)
                for index in range(50):
                    row = await lease.step(chunk(number, index % CHUNKS, frames))
                    assert row["count"][-1].item() == frames * (index + 1)

            await asyncio.gather(*map(solve, range(4)), *(listen(number, 1 + 2 * (number % 2)) for number in range(8)))
            metrics = engine.metrics()
            assert metrics["counts"]["failed"] == 0
            assert all(times["median"] > 0 for times in metrics["models"]["toy"]["variants"][1]["steps"].values())

    asyncio.run(main())


class Tabled(Toy):
    """Adds a table that it makes when it is made ready, and that others made ready with the same part make again."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def prepare(self) -> None:
        self.part.table = (torch.full((WIDTH,), 0.5, device="cuda"),)

    def step(self, inputs, state, slots, active):
        outputs = super().step(inputs, state, slots, active)
        return {**outputs, "table": self.part.table[0].expand(len(slots), -1).clone()}


def test_what_a_graph_reads_outlives_another_model_made_ready() -> None:
    part = nn.Module()
    with Engine("cuda", inline=True) as engine:
        for name in ("first", "second"):
            engine.add(name, Tabled(part), slots=1, variants=(1,))
        taken = [torch.zeros(WIDTH, device="cuda") for _ in range(100)]
        row = engine.open_sync("first").step_sync(chunk(0, 0))
        assert (row["table"] == 0.5).all()
        assert not any(one.any() for one in taken)


def test_a_step_that_syncs_cannot_be_captured_and_says_so() -> None:
    with Engine("cuda") as engine:
        with pytest.raises(RuntimeError):
            engine.add("breaks", Breaks(), slots=1)
        engine.add("toy", Toy(), slots=1, variants=(1,))
        assert engine.open_sync("toy").step_sync(chunk(0, 0))["count"].tolist() == [1]


def test_an_eager_error_reaches_its_batch() -> None:
    class Bad(Toy):
        def step(self, inputs, state, slots, active):
            raise ValueError("no")

    with Engine("cuda") as engine, pytest.raises(ValueError, match="no"):
        engine.add("bad", Bad(), slots=1)
    assert issubclass(StepFailed, RuntimeError)


def test_turns_and_streams_beside_each_other_mix_nothing_up() -> None:
    async def solve(engine: Engine, session: int) -> None:
        lease = await engine.open("solver", paced=False)
        total = 0
        for number in range(60):
            total += 4 * (number + session)
            row = await lease.step({"x": np.float32([number + session])})
            assert row["sum"].item() == total

    async def chain(engine: Engine, session: int) -> None:
        lease = await engine.open("chain", paced=False)
        taken = 0
        for number in range(120):
            wanted, x = 1 + (7 * session + number) % 6, session + number + 1
            taken += wanted
            row = await lease.step({"x": np.float32([x]), "wanted": np.array(wanted)})
            assert row["total"].item() == x * (2**wanted - 1)
            assert int(row["turns"]) == taken
            if number % 17 == 3:
                lease.reset()
                taken = 0

    async def main() -> None:
        with Engine("cuda") as engine:
            engine.add("solver", Solver(), slots=4, tick=0.0, stream="one")
            engine.add("chain", Chain(), slots=8, tick=0.0, stream="two")
            solving = (solve(engine, session) for session in range(4))
            await asyncio.gather(*solving, *(chain(engine, session) for session in range(8)))
            metrics = engine.metrics()["models"]["chain"]["variants"]["only"]
            assert metrics["rows"] > metrics["batches"]

    asyncio.run(main())
