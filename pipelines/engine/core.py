"""The engine's device side: everything that happens in the one thread that owns the models."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Container, Hashable, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...models.streaming import StreamingModel
from .admission import Admission, Shedding
from .answers import STEP_ERRORS, Command, running_loop, settle
from .errors import AtCapacity, Closed, Stale, StepFailed
from .lease import Lease
from .metrics import LaneMetrics
from .runner import CpuRunner, Flight, InputCheck, Row, Rows, Runner, probe_exact_buckets, slice_count, turn_count
from .scheduler import Barrier, Batch, Lane, Policy, Scheduler, Work
from .slots import SlotStore

if TYPE_CHECKING:
    from .cuda import Streams
    from .engine import Engine

Cost = Callable[[str, Hashable, int], float]

WARM_STEPS = 3


@dataclass(eq=False, slots=True)
class Hosted:
    """A model and what runs it."""

    model: StreamingModel
    store: SlotStore
    runner: Runner
    lanes: dict[Hashable, Lane]
    checks: dict[Hashable, InputCheck]

    def lane(self, variant: Hashable) -> Lane:
        """The lane of a variant; None is the first."""
        if variant is None:
            return next(iter(self.lanes.values()))
        if variant not in self.lanes:
            raise ValueError(f"model {self.store.name!r} does not serve variant {variant!r}; it serves {[*self.lanes]}")
        return self.lanes[variant]


class Core:
    """Scheduler, models, admission and counts of one device. Driven by a ``Driver``, in one thread at a time."""

    def __init__(
        self,
        device: torch.device,
        now: Callable[[], float],
        *,
        cost: Cost | None,
        slowdown: float,
        policy: Policy,
        limit: float,
        inbox: int,
        shedding: Shedding,
    ) -> None:
        self.device = device
        self.now = now
        self.depth = 1
        self.shedding = shedding
        self.scheduler = Scheduler(policy, inbox=inbox)
        self.hosted: dict[str, Hosted] = {}
        self.measured: dict[Lane, LaneMetrics] = {}
        self.admission = Admission(self.measured, limit, apart=device.type != "cpu" or cost is not None)
        names = ("admitted", "refused", "fenced", "discarded", "abandoned", "failed", "undelivered", "unanswered")
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._cost = cost
        self._slowdown = slowdown
        self._threads = torch.get_num_threads()
        self._device_streams: Streams | None = None

    # ---------------------------------------------------------------- for the driver

    def setup(self) -> None:
        torch.set_num_threads(self._threads)
        if self.device.type == "cuda":
            from .cuda import Streams

            self._device_streams = Streams(self.device)

    def take(self, item: Work | Barrier | Command[Any]) -> None:
        """Queue work or a barrier; carry out a command."""
        if isinstance(item, Command):
            with self._joined() if item.joined else nullcontext():
                item()
        else:
            self.scheduler.submit(item)
        self._run_due()

    @property
    def streams(self) -> Set[str]:
        """Those that models were added on."""
        return self.scheduler.streams

    def decide(self, now: float, streams: Container[str] | None = None) -> Batch | float | None:
        return self.scheduler.next(now, streams)

    def launch(self, batch: Batch) -> Flight | None:
        lane = batch.lane
        works = batch.works
        rows = Rows([work.payload for work in works], [work.lease.slot.row for work in works], batch.turns)
        try:
            runner = self.hosted[lane.model].runner
            return runner.launch(lane.variant, batch.bucket, batch.first, batch.last, rows)
        except STEP_ERRORS as error:
            self._failed(batch, error)
            return None

    def land(self, batch: Batch, flight: Flight) -> None:
        try:
            outputs, seconds = flight.wait()
        except STEP_ERRORS as error:
            self._failed(batch, error)
            return
        now = self.now()
        if self._cost is not None:
            seconds = self.cost(batch)
        measured = self.measured[batch.lane]
        measured.steps[batch.bucket].add(seconds / (batch.last - batch.first))
        rows = self.scheduler.done(batch, now, seconds)
        works = [batch.works[row] for row in rows]
        if works or batch.turns:
            lateness = [now - work.deadline for work in works if work.deadline < math.inf]
            measured.finished(len(batch.works), batch.bucket, lateness)
        self._answer(works, [Row(outputs, row) for row in rows])
        self.shedding.update(self.scheduler.load(now), now)
        self._run_due()

    def cost(self, batch: Batch, *, beside: bool = False) -> float:
        """Seconds of virtual time of the batch's slices; 0 without a cost function. beside: other streams are busy."""
        if self._cost is None:
            return 0.0
        seconds = self._cost(batch.lane.model, batch.lane.variant, batch.bucket) * (batch.last - batch.first)
        return seconds * self._slowdown if beside else seconds

    def abandon(self, items: Sequence[Work | Barrier | Command[Any]], cause: BaseException | None) -> None:
        """Answer these, and all that is queued, with Closed."""
        reason = "was closed" if cause is None else f"stopped ({type(cause).__name__}: {cause})"
        works: list[Work] = []
        for item in [*self.scheduler.drain(), *items]:
            if isinstance(item, Work):
                works.append(item)
            else:
                (item.call if isinstance(item, Barrier) else item).fail(Closed(f"the engine {reason}"))
        self.counts["unanswered"] += len(works)
        self._answer(works, [Closed(f"the engine {reason} before this chunk was done") for _ in works])

    def find(self, name: str) -> Hosted:
        """The model of this name. Raises ValueError. May be called from any thread."""
        if name not in self.hosted:
            raise ValueError(f"no model named {name!r} was added; there are {[*self.hosted]}")
        return self.hosted[name]

    # ---------------------------------------------------------------- commands

    def add(
        self,
        name: str,
        model: StreamingModel,
        slots: int,
        variants: Sequence[Hashable],
        buckets: Sequence[int],
        *,
        budget: float | None,
        tick: float | None,
        exact: bool,
        measure: bool,
        stream: str,
        priority: int,
        patient: bool,
    ) -> None:
        """Allocate, prepare and measure a model."""
        store, runner = self._host(name, model, slots, stream, priority)
        hosted = Hosted(model, store, runner, {}, {})
        measured: dict[Lane, LaneMetrics] = {}
        for variant in variants:
            sizes = probe_exact_buckets(model, variant, buckets) if exact and len(buckets) > 1 else tuple(buckets)
            period = model.tick(variant)
            slices, turns = slice_count(model, variant), turn_count(model, variant)
            lane = Lane(
                name, variant, period, budget or period, sizes, slices, turns=turns, stream=stream, patient=patient
            )
            if tick is not None:
                lane.tick = tick
            hosted.lanes[variant] = lane
            hosted.checks[variant] = InputCheck(model.input_spec(variant))
            runner.prepare(variant, sizes)
            measured[lane] = self._measure(hosted, lane) if measure else LaneMetrics(sizes)
        store.reset_scratch()
        for lane in measured:
            self.scheduler.add(lane)
        self.measured.update(measured)
        self.hosted[name] = hosted
        self.depth = max(self.depth, runner.depth)

    def open(self, engine: Engine, name: str, variant: Hashable, paced: bool) -> Lease:
        """Admit a session and take a slot."""
        hosted = self.find(name)
        return self._admit(engine, hosted, hosted.lane(variant), paced, None)

    def open_together(self, engine: Engine, names: Sequence[str], paced: bool) -> list[Lease]:
        """Admit a session to several models, or to none."""
        leases: list[Lease] = []
        try:
            for name in names:
                leases.append(self.open(engine, name, None, paced))
        except AtCapacity:
            for lease in leases:
                self.release(lease)
            self.counts["admitted"] -= len(leases)
            raise
        return leases

    def fork(self, engine: Engine, source: Lease) -> Lease:
        """Admit a second session with a copy of the state."""
        return self._admit(engine, self.hosted[source.model], source.counted, source.paced, source)

    def switch(self, lease: Lease, variant: Hashable) -> tuple[Lane, InputCheck]:
        """Count the lease under another variant."""
        hosted = self.hosted[lease.model]
        lane = hosted.lane(variant)
        if lease.paced:
            self.admission.move(lease.counted, lane, self.now())
        return lane, hosted.checks[variant]

    def fence(self, lease: Lease, epoch: float) -> None:
        """Drop the lease's waiting chunks of earlier epochs."""
        dropped = self.scheduler.fence(lease, epoch)
        self.counts["fenced"] += len(dropped)
        waiting = [work for work in dropped if not work.waiter.done()]
        self._answer(waiting, [Stale(f"fenced by epoch {epoch}") for _ in waiting])

    def release(self, lease: Lease) -> None:
        """Free the lease's slot."""
        self.hosted[lease.model].store.release(lease.slot)
        if lease.paced:
            self.admission.leave(lease.counted, lease, self.now())

    # ---------------------------------------------------------------- inside

    def _host(
        self, name: str, model: StreamingModel, slots: int, stream: str, priority: int
    ) -> tuple[SlotStore, Runner]:
        """Slots for a model and what steps it."""
        if self._device_streams is None:
            store = SlotStore(model, slots, self.device, name=name)
            return store, CpuRunner(model, store, self.now)
        graphs = self._device_streams.graphs(stream, priority)
        with graphs:
            store = SlotStore(model, slots, self.device, name=name, on=graphs)
        return store, graphs.runner(model, store)

    def _joined(self) -> AbstractContextManager[object]:
        """See ``Streams.joined``."""
        return nullcontext() if self._device_streams is None else self._device_streams.joined()

    def _admit(self, engine: Engine, hosted: Hosted, lane: Lane, paced: bool, source: Lease | None) -> Lease:
        store, now = hosted.store, self.now()
        try:
            if not store.free:
                reason = f"all {store.slots} slots of model {store.name!r} are taken"
                self.admission.refuse(reason, self.admission.utilisation(), now)
            if paced:
                self.admission.check(lane, now)
        except AtCapacity:
            self.counts["refused"] += 1
            raise
        slot = store.acquire() if source is None else store.fork(source.slot)
        lease = Lease(engine, store, slot, lane, hosted.checks[lane.variant], paced=paced)
        if paced:
            self.admission.enter(lane, lease, now)
        self.counts["admitted"] += 1
        return lease

    def _measure(self, hosted: Hosted, lane: Lane) -> LaneMetrics:
        """Step every bucket a few times on the scratch slot; the first time does not count."""
        measured = LaneMetrics(lane.buckets)
        specs = hosted.model.input_spec(lane.variant)
        row = {name: spec.new(1)[0].numpy() for name, spec in specs.items()}
        for bucket in lane.buckets:
            if self._cost is not None:
                measured.steps[bucket].add(self._cost(lane.model, lane.variant, bucket))
                continue
            turns = [0] * bucket if lane.turns > 1 else []
            rows = Rows([row] * bucket, [hosted.store.scratch] * bucket, turns)
            for repeat in range(WARM_STEPS):
                flight = hosted.runner.launch(lane.variant, bucket, 0, lane.slices, rows)
                _, seconds = flight.wait()
                if repeat:
                    measured.steps[bucket].add(seconds / lane.slices)
        return measured

    def _run_due(self) -> None:
        while calls := self.scheduler.due_calls():
            for call in calls:
                call()

    def _failed(self, batch: Batch, error: Exception) -> None:
        rows = self.scheduler.done(batch, self.now(), 0.0, failed=True)
        if not rows:
            return  # an earlier slice had failed
        self.counts["failed"] += 1
        failures: list[Exception] = []
        for _ in rows:
            lane = batch.lane
            text = f"{type(error).__name__}: {error}"
            failure = StepFailed(f"the step of model {lane.model!r} variant {lane.variant!r} failed: {text}")
            failure.__cause__ = error
            failures.append(failure)
        self._answer([batch.works[row] for row in rows], failures)
        self._run_due()

    def _answer(self, works: Sequence[Work], outcomes: Sequence[Row | Exception]) -> None:
        """Settle the waiters: of each event loop with one call into it, of blocked threads directly."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Work, Row | Exception]]] = {}
        for pair in zip(works, outcomes, strict=True):
            waiter = pair[0].waiter
            if isinstance(waiter, Future):
                settle(waiter, pair[1])
            else:
                loop = waiter.get_loop()
                if loop in loops:
                    loops[loop].append(pair)
                else:
                    loops[loop] = [pair]
        for loop, pairs in loops.items():
            if loop is running_loop():
                self._settle_all(pairs)
                continue
            try:
                loop.call_soon_threadsafe(self._settle_all, pairs)
            except RuntimeError:  # the loop was closed
                self.counts["undelivered"] += len(pairs)

    def _settle_all(self, pairs: Sequence[tuple[Work, Row | Exception]]) -> None:
        """In the waiters' event loop."""
        for work, outcome in pairs:
            work.lease.answered(work)
            waiter = work.waiter
            if not waiter.done():
                settle(waiter, outcome)
            else:
                self.counts["abandoned" if waiter.cancelled() else "discarded"] += 1
