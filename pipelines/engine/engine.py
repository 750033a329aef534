"""The engine: every model of one device, stepped for every session by one scheduler.

Sessions hold a ``Lease`` and await ``lease.step``; the engine gathers what is ready into batches, steps, and answers a
whole batch with one call into the event loop. It runs in a thread of its own, or (``inline=True``) on the event loop
that calls it, where tests on virtual time and command lines without a loop use it.
"""

from __future__ import annotations

import asyncio
import atexit
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar, cast

import torch

from ...models.streaming import StreamingModel
from ..clock import Clock, WallClock
from .admission import LIMIT, Shedding
from .answers import Command
from .core import Core, Cost
from .drive import Driver, InlineDriver, Item, ThreadDriver
from .errors import Closed
from .lease import Lease
from .metrics import prometheus
from .runner import EXACT_ROWS, InputCheck, Inputs, Row, Turning
from .scheduler import EDF_TICKS_SLICES, MAIN, Barrier, Lane, Policy, Work

T = TypeVar("T")

HIGHEST_PRIORITY = 2  # of a stream
LARGEST_BUCKET = 256
BETWEEN = (48, 80, 96, 112, 160, 192, 224)  # batch sizes beside the powers of two


class Engine:
    """Owner of all models of one device.

    clock: what deadlines are measured on; the wall clock by default, any other only with ``inline``.
    cost: seconds of virtual time of one slice, from model name, variant and bucket; only with ``inline``.
    slowdown: how many times that it takes while another stream is busy.
    limit: the share of the device that admission may give away.
    inbox: unanswered chunks a lease may have.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        clock: Clock | None = None,
        inline: bool = False,
        cost: Cost | None = None,
        slowdown: float = 1.0,
        policy: Policy = EDF_TICKS_SLICES,
        limit: float = LIMIT,
        inbox: int = 8,
        shedding: Shedding | None = None,
    ) -> None:
        if not inline and (cost is not None or not isinstance(clock, WallClock | None)):
            raise ValueError("a clock other than WallClock, and cost, need inline=True")
        self.device = _indexed(torch.device(device))
        self.inbox = inbox
        self.now = (clock or WallClock()).now
        self.shedding = shedding or Shedding()
        self._core = Core(
            self.device, self.now, cost=cost, slowdown=slowdown, policy=policy, limit=limit, inbox=inbox,
            shedding=self.shedding,
        )  # fmt: skip
        self._closed = False
        self._driver: Driver = InlineDriver(self._core) if inline else ThreadDriver(self._core, f"engine {self.device}")
        if not inline:
            atexit.register(self.close)

    def add(
        self,
        name: str,
        model: StreamingModel,
        *,
        slots: int,
        budget: float | None = None,
        variants: Sequence[Hashable] | None = None,
        buckets: Sequence[int] | None = None,
        exact: bool | None = None,
        tick: float | None = None,
        measure: bool = True,
        stream: str = MAIN,
        priority: int = 0,
        patient: bool = False,
    ) -> None:
        """Allocate slots for a model, prepare its buckets (on CUDA capture their graphs) and measure its steps. Blocks.

        budget: seconds from a chunk's arrival to its deadline; default the media time of a step.
        variants: those to serve; default all the model has. The first is the default of ``open``.
        buckets: batch sizes; by default those of ``default_buckets``, at least 4.
        exact: use only buckets that a probe finds to give bit-equal rows; default on the CPU.
        tick: shortest seconds between two starts of a variant; default a quarter of the budget, at most 20 ms.
        measure: False where nothing is to be refused for want of time: the steps are not measured beforehand.
        patient: steps that can wait do so while something urgent, which they would slow, runs on another stream, as
        long as their own is not busy.
        stream: models of different streams run at the same time, of one stream one after another. Steps that leave
        most of a device idle, waiting for memory or launches, gain from others beside them.
        priority: of the stream, as the first model on it asks, 0 to 2: where a device is full, kernels of higher ones
        start first. For streams of many short kernels beside others of long ones.
        """
        if name in self._core.hosted:
            raise ValueError(f"a model named {name!r} was added before; choose another name")
        chosen = tuple(model.variants if variants is None else variants)
        if unknown := [variant for variant in chosen if variant not in model.variants]:
            raise ValueError(f"model {name!r} has no variant {unknown[0]!r}; it has {list(model.variants)}")
        if not 0 <= priority <= HIGHEST_PRIORITY:
            raise ValueError(f"priority is {priority}; it goes from 0 to {HIGHEST_PRIORITY}")
        sizes = tuple(sorted(set(buckets))) if buckets is not None else default_buckets(max(slots, EXACT_ROWS))
        exact = self.device.type == "cpu" if exact is None else exact
        model.to(self.device).eval()
        model.prepare()
        host = partial(
            self._core.add, name, model, slots, chosen, sizes, budget=budget, tick=tick, exact=exact,
            measure=measure, stream=stream, priority=priority, patient=patient,
        )  # fmt: skip
        self.ask_sync(host)

    def model(self, name: str) -> StreamingModel:
        """The model added under this name. Raises ValueError."""
        return self._core.find(name).model

    async def open(self, name: str, variant: Hashable = None, *, paced: bool = True) -> Lease:
        """A slot for a session. Raises AtCapacity, and ValueError for an unknown model or variant.

        paced: the session sends at the pace of its media and its chunks have deadlines. False (a file): it counts
        against the slots only and runs in the gaps.
        """
        return await self.ask(partial(self._core.open, self, name, variant, paced), joined=False)

    async def open_together(self, names: Sequence[str], *, paced: bool = True) -> list[Lease]:
        """``open`` for a session that needs a place in several models: all, or none. Raises AtCapacity."""
        return await self.ask(partial(self._core.open_together, self, names, paced), joined=False)

    def open_sync(self, name: str, variant: Hashable = None, *, paced: bool = False) -> Lease:
        """``open``, blocking; for files unless ``paced``."""
        return self.ask_sync(partial(self._core.open, self, name, variant, paced))

    def run_sync(self, chunks: Sequence[tuple[Lease, Inputs]]) -> list[Row]:
        """Step several leases together and block until all outputs are there, in the order given."""
        answers: list[Future[Row]] = [Future() for _ in chunks]
        works = [lease.work(inputs, answer) for (lease, inputs), answer in zip(chunks, answers, strict=True)]
        for work in works:
            self.post(work)
        self._driver.wait_for(answers)
        return [answer.result() for answer in answers]

    def close(self) -> None:
        """Stop. Whatever is unanswered gets Closed; the thread is joined. May be called twice."""
        if not self._closed:
            self._closed = True
            self._driver.close()
            atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self) -> dict[str, Any]:
        """Numbers per model and variant (seconds and bytes), utilisation, and counts of all that was not delivered."""
        core = self._core
        models = {
            name: {
                "slots": hosted.store.slots,
                "used": hosted.store.used,
                "slot_bytes": hosted.store.slot_bytes,
                "bytes": hosted.store.total_bytes,
                "variants": {
                    variant: {
                        "buckets": list(lane.buckets),
                        "sessions": core.admission.sessions[lane],
                        "depth": lane.depth,
                        **core.measured[lane].summary(),
                    }
                    for variant, lane in hosted.lanes.items()
                },
            }
            for name, hosted in list(core.hosted.items())
        }
        return {
            "utilisation": core.admission.utilisation(),
            "load": core.scheduler.load(self.now()),
            "counts": dict(core.counts),
            "shed": dict(self.shedding.counts),
            "models": models,
        }

    def metrics_text(self) -> str:
        """``metrics`` in the Prometheus text format."""
        return prometheus(self.metrics())

    # ---------------------------------------------------------------- for leases

    def post(self, work: Work) -> None:
        """Queue a chunk."""
        self._hand(work, work.lane.next_start if work.deadline < math.inf else -math.inf)

    def tell(self, call: Callable[[], object], lease: Lease | None = None) -> None:
        """Have ``call`` run in the engine's thread; with a lease, after what that lease submitted before."""
        self._command(Command(call, None), lease)

    def ask(self, call: Callable[[], T], lease: Lease | None = None, *, joined: bool = True) -> asyncio.Future[T]:
        """``tell``, with a future of the result. joined: see ``Command``; not for what touches no memory of the device
        but a slot's, on the stream of its model."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._command(Command(call, future, joined=joined), lease)
        return future

    def ask_sync(self, call: Callable[[], T], lease: Lease | None = None) -> T:
        """``tell``, blocking until the result is there."""
        answer: Future[T] = Future()
        self._command(Command(call, answer), lease)
        self._driver.wait_for([answer])
        return answer.result()

    def drop(self, lease: Lease, epoch: float) -> None:
        """Drop the lease's waiting chunks of epochs before ``epoch``."""
        self._hand(Command(partial(self._core.fence, lease, epoch), None, joined=False))

    def leave(self, lease: Lease) -> None:
        """Drop what the lease has waiting, and free its slot after what it has running."""
        if not self._closed:
            self.drop(lease, math.inf)
            self.tell(partial(self._core.release, lease), lease)

    def fork(self, lease: Lease) -> asyncio.Future[Lease]:
        """A second lease with a copy of the state."""
        return self.ask(partial(self._core.fork, self, lease), lease)

    def switch(self, lease: Lease, variant: Hashable) -> asyncio.Future[tuple[Lane, InputCheck]]:
        """The lane and input check of another variant, with the lease counted there."""
        return self.ask(partial(self._core.switch, lease, variant), joined=False)

    def turns(self, lane: Lane, inputs: Inputs) -> int:
        """Turns that a step of these inputs takes. May be called from any thread."""
        if lane.turns == 1:
            return 1
        return cast(Turning, self._core.find(lane.model).model).turns_of(lane.variant, inputs)

    def lane(self, name: str, variant: Hashable) -> tuple[Lane, InputCheck]:
        """The lane and input check of a variant. May be called from any thread. Raises ValueError."""
        hosted = self._core.find(name)
        lane = hosted.lane(variant)
        return lane, hosted.checks[lane.variant]

    def _command(self, command: Command[Any], lease: Lease | None) -> None:
        self._hand(command if lease is None else Barrier(lease, command))

    def _hand(self, item: Item, not_before: float = -math.inf) -> None:
        if self._closed:
            raise Closed("the engine was closed")
        self._driver.post(item, not_before)


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as the CUDA device in use now; other devices as they are. Raises RuntimeError where there is no CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def default_buckets(slots: int, smallest: int = 1) -> tuple[int, ...]:
    """Powers of two from ``smallest``, and sizes ``BETWEEN`` the large ones, to the first that holds all slots.

    At most 256. Where a tick's rows come just beyond a size, a step for twice as many would outlast the tick.
    """
    powers = {smallest << power for power in range(LARGEST_BUCKET.bit_length())}
    sizes = sorted(powers | {size for size in BETWEEN if size > smallest})
    enough = next(index for index, size in enumerate(sizes) if size >= min(slots, LARGEST_BUCKET))
    return tuple(sizes[: enough + 1])
