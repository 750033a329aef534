"""One session's hold on a model: a slot, an order of chunks, an epoch."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import Closed, InboxFull, Stale
from .runner import InputCheck, Inputs, Row
from .scheduler import Lane, Work
from .slots import Slot, SlotStore, Snapshot

if TYPE_CHECKING:
    from .engine import Engine


class Lease:
    """Made by ``Engine.open`` and ``Lease.fork``; used by one session, from one thread.

    Calls on a lease take effect in the order they are made: ``reset`` after two ``step`` calls comes after those steps.
    epoch: steps of earlier epochs are refused; ``fence`` raises it. counted: the lane that admission counts it in.
    """

    def __init__(
        self, engine: Engine, store: SlotStore, slot: Slot, lane: Lane, check: InputCheck, *, paced: bool
    ) -> None:
        self.epoch = 0
        self.paced = paced
        self.store = store
        self.slot = slot
        self.lane = lane
        self.counted = lane
        self._engine = engine
        self._check = check
        self._waiting: deque[Work] = deque()
        self._closed = False

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.lane.model

    @property
    def variant(self) -> Hashable:
        """What the next step will be batched by."""
        return self.lane.variant

    def step(self, inputs: Inputs, *, deadline: float | None = None, epoch: int | None = None) -> asyncio.Future[Row]:
        """Queue one chunk at once and return a future of its outputs (name -> CPU tensor, this session's row).

        inputs: as in the model's ``input_spec``, numpy or torch; read when the batch is built, so leave them unchanged
        until the result is there.
        deadline: on the engine's clock; default the lane's budget from now, or none for a lease that is not paced.
        epoch: default the lease's own.

        Raises BadInput, Closed, InboxFull, or Stale (also through the future, when fenced while it waits); the future
        raises StepFailed when the model did.
        """
        if epoch is None:
            epoch = self.epoch
        if len(self._waiting) >= self._engine.inbox:
            raise InboxFull(f"{len(self._waiting)} chunks of this lease wait already; await one first")
        future: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        work = self._work(inputs, deadline, epoch, future)
        self._engine.post(work)
        self._waiting.append(work)
        return future

    def step_sync(self, inputs: Inputs) -> Row:
        """Step and block until the outputs are there: for files, without an event loop."""
        return self._engine.run_sync([(self, inputs)])[0]

    def fence(self, epoch: int) -> None:
        """Start a new epoch: waiting chunks of earlier ones are dropped, their awaiters get Stale now.

        A chunk that is being stepped is not taken back: its result is discarded, its effect on the state stays.
        ``reset`` or ``restore`` where that matters.
        """
        self._open_or_raise()
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        self._refuse_waiting(Stale(f"fenced by epoch {epoch}"), epoch)
        self._engine.drop(self, epoch)

    def reset(self) -> None:
        """Put the state back to that of a fresh session."""
        self._open_or_raise()
        self._engine.tell(lambda: self.store.reset(self.slot), self)

    def restore(self, snapshot: Mapping[str, Tensor] | bytes) -> None:
        """Continue from a snapshot, of this or another slot, engine or process. Raises BadSnapshot."""
        self._open_or_raise()
        tensors = self.store.from_bytes(snapshot) if isinstance(snapshot, bytes) else snapshot
        self.store.check(tensors)
        self._engine.tell(lambda: self.store.restore(self.slot, tensors), self)

    async def snapshot(self) -> Snapshot:
        """The state after everything submitted so far, as CPU tensors. ``pack`` makes bytes of it."""
        self._open_or_raise()
        return await self._engine.ask(lambda: self.store.snapshot(self.slot), self)

    def snapshot_sync(self) -> Snapshot:
        """``snapshot``, blocking."""
        self._open_or_raise()
        return self._engine.ask_sync(lambda: self.store.snapshot(self.slot), self)

    def pack(self, snapshot: Mapping[str, Tensor]) -> bytes:
        """A snapshot as bytes that ``restore`` of any lease of the same model takes."""
        return self.store.to_bytes(snapshot)

    async def fork(self) -> Lease:
        """A second lease that continues from this one's state. Raises AtCapacity."""
        self._open_or_raise()
        return await self._engine.fork(self)

    async def switch(self, variant: Hashable) -> None:
        """Use another variant from the next ``step`` on. Raises AtCapacity and ValueError."""
        self._open_or_raise()
        self.lane, self._check = await self._engine.switch(self, variant)
        self.counted = self.lane

    def use(self, variant: Hashable) -> None:
        """Use another variant from the next ``step`` on, as ``switch`` does, but stay counted where the session is:
        for models whose sessions take steps of all variants in turn. Raises ValueError."""
        if variant != self.lane.variant:
            self._open_or_raise()
            self.lane, self._check = self._engine.lane(self.model, variant)

    def close(self) -> None:
        """Give the slot back, after a chunk that is being stepped; awaiters of waiting chunks get Closed."""
        if self._closed:
            return
        self._closed = True
        self._refuse_waiting(Closed("the lease was closed"), math.inf)
        self._engine.leave(self)

    def work(self, inputs: Inputs, waiter: Any) -> Work:
        """A chunk for ``Engine.run_sync``."""
        return self._work(inputs, None, self.epoch, waiter)

    def answered(self, work: Work) -> None:
        """The engine answered the oldest waiting chunk."""
        if self._waiting and self._waiting[0] is work:
            self._waiting.popleft()

    def _work(self, inputs: Inputs, deadline: float | None, epoch: int, waiter: Any) -> Work:
        self._open_or_raise()
        if epoch < self.epoch:
            raise Stale(f"epoch {epoch} was fenced by epoch {self.epoch}")
        now = self._engine.now()
        if deadline is None:
            deadline = now + self.lane.budget if self.paced else math.inf
        lane, checked = self.lane, self._check(inputs)
        return Work(lane, self, deadline, now, epoch, checked, waiter, self._engine.turns(lane, checked))

    def _refuse_waiting(self, error: Exception, epoch: float) -> None:
        kept: deque[Work] = deque()
        for work in self._waiting:
            if work.epoch >= epoch:
                kept.append(work)
            elif not work.waiter.done():
                work.waiter.set_exception(error)
                work.waiter.exception()  # an awaiter that is gone already is no news
        self._waiting = kept

    def _open_or_raise(self) -> None:
        if self._closed:
            raise Closed("the lease was closed; open another")
