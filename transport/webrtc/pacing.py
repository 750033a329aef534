"""When packets of sound leave: as their sound comes while it is made as it is heard, on the clock where it is ahead.

A sender that holds sound back to be safe delays all of it, and the peer's playout buffer, which measures how irregular
the packets are, does the same again. So nothing is held back at first: a frame leaves when its sound is complete, but
not before its predecessors have been heard. Sound that comes a little late is sent a little late, in its place in
media time; what comes after may catch up. Only when it stays away is there a gap, and each gap teaches a lead.
"""

from __future__ import annotations

import asyncio

from ...codecs.opus import CLOCK_RATE
from ...pipelines.clock import Clock

FRAME = 0.02  # seconds
TICKS = round(FRAME * CLOCK_RATE)
PATIENCE = 0.06  # seconds that a frame may be late for want of sound; then there is a gap
LATE = 0.003  # seconds after which a timer fires late
CATCH_UP = 0.1  # seconds that late sound may be caught up on
BEHIND = 0.4  # seconds that a sender held up may catch up on; beyond them sending goes on from now
LEAD_STEP, LONGEST_LEAD = 0.02, 0.1  # seconds that a gap adds to the lead, up to
QUIET = 500  # frames of sound without a gap, after which half a step is taken back
WINDOW = 50  # frames of sound of which the one that waited least is looked for
EXCESS = 0.002  # seconds that a wait may be too long
AHEAD = 0.3  # seconds: sound that always waits longer is made ahead, not as it is heard


class Alarm:
    """What one task waits for, and the time until which it does: an ``asyncio.Event`` with a time-out costs thrice."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the task that waits, or the next that will."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, until: float = float("inf"), *, fair: bool = False) -> bool:
        """Wait for ``ring``, at the latest until a time on the clock; whether it rang since the last wait.

        fair: an event loop that comes to it late may be as late with what would have rung: wait as long again.
        """
        if not self._rung:
            await self._sleep(until)
        if fair and not self._rung and (late := self.clock.now() - until) > LATE:
            await self._sleep(self.clock.now() + min(late, PATIENCE))
        rung, self._rung = self._rung, False
        return rung

    async def _sleep(self, until: float) -> None:
        left = until - self.clock.now()
        if left <= 0:
            return
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        timer = loop.call_later(left, _wake, waiter) if left < float("inf") else None
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Pace:
    """The times of a stream's packets, 20 ms each.

    due: clock time at which the next packet leaves, if its sound is there. ticks: its place in media time, at
    CLOCK_RATE. lead: seconds that sound waits before it begins, and keeps waiting at the least. gaps: times that sound
    ran out before its end. late: frames that waited for their sound.
    """

    def __init__(self, now: float, lead: float = 0.0) -> None:
        self.due, self.ticks, self.lead = now, 0, lead
        self.gaps = self.late = 0
        self._sent = now
        self._early = 0.0  # seconds by which the utterance is ahead of what went before it
        self._least = AHEAD  # that the sound of a frame waited, of the last frames
        self._looked = self._quiet = 0  # frames of sound since then; since a gap

    @property
    def patient(self) -> float:
        """The clock time until which sound that is due may be waited for."""
        return max(self.due, self._sent + FRAME) + PATIENCE

    def begin(self, now: float) -> None:
        """Sound begins: at once, though silence has just been sent."""
        self._early = max(0.0, self.due - now)
        self.due -= self._early
        self._least, self._looked = AHEAD, 0

    def end(self) -> None:
        """Sound ends: the silence after it makes up for what was sent early."""
        self.due += self._early
        self._early = 0.0

    def run_out(self, now: float) -> None:
        """Sound did not come in time."""
        self.gaps += 1
        self.lead = min(self.lead + LEAD_STEP, LONGEST_LEAD)
        self._quiet = 0
        self._skip(now)

    def send(self, now: float, came: float | None) -> int:
        """A packet leaves; its place in media time. came: when its sound was complete, None for silence."""
        if now - self.due > BEHIND:
            self._skip(now)
        if came is not None:
            self._watch(now, came)
        ticks, self._sent = self.ticks, now
        self.ticks += TICKS
        self.due += FRAME
        return ticks

    def _skip(self, now: float) -> None:
        """Leave out the time in which nothing was sent."""
        self.ticks += max(0, round((now - self.due) * CLOCK_RATE))
        self.due = max(self.due, now)

    def _watch(self, now: float, came: float) -> None:
        """Follow the times at which sound comes: later at once, earlier when a whole window was."""
        if came > self.due:
            self.late += came - self.due > EXCESS
            self.due = max(self.due, now - CATCH_UP)
        self._least = min(self._least, now - came)
        self._looked += 1
        if self._looked == WINDOW:
            if self._least < AHEAD and self._least - self.lead > EXCESS:
                sooner = min(self._least - self.lead, FRAME)
                self.due, self._early = self.due - sooner, self._early + sooner
            self._least, self._looked = AHEAD, 0
        self._quiet += 1
        if self._quiet == QUIET:
            self.lead, self._quiet = max(0.0, self.lead - LEAD_STEP / 2), 0
