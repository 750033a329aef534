"""Join: several inputs aligned by media time."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from .chunk import Chunk, Joined
from .stage import Context, Input, Stage, select, stage


@stage
class Join(Stage):
    """For each chunk of the first input, what every other input held in the same span of media time.

    ports: the inputs' names; the first leads, and gives the ``Joined`` chunks their time. A span is emitted once all
    inputs have reached its end (or have ended), or once the lead is ``skew_ms`` of media past it: then the others'
    parts are whatever has come, and what comes too late for its span is counted as ``late``. No input is read more
    than ``skew_ms`` ahead of the span being filled, so little is held. A chunk that overlaps two spans is in both.
    """

    def __init__(self, *ports: str, skew_ms: float = 200.0) -> None:
        if len(set(ports)) != len(ports) or len(ports) < 2:
            raise ValueError(f"Join{ports}: name at least two different ports")
        self.inputs, self.skew = ports, skew_ms / 1e3

    async def run(self, ctx: Context, *inputs: Input) -> AsyncIterator[Joined]:
        held: list[deque[Chunk]] = [deque() for _ in inputs]
        reached = [float("-inf")] * len(inputs)  # media time up to which each input has delivered
        done = float("-inf")  # end of the last span emitted
        while True:
            while held[0]:
                end = held[0][0].end_seconds
                waiting = any(at < end and not one.ended for one, at in zip(inputs, reached, strict=True))
                if waiting and reached[0] < end + self.skew:
                    break
                lead = held[0].popleft()
                parts = ((lead,), *(_overlapping(chunks, lead) for chunks in list(held)[1:]))
                done = end
                yield Joined(
                    parts,
                    rate=lead.rate,
                    start=lead.start,
                    duration=lead.duration,
                    final=lead.final,
                    epoch=max(chunk.epoch for part in parts for chunk in part),
                )
            front = held[0][0].end_seconds if held[0] else reached[0]
            wanted = [
                one
                for i, one in enumerate(inputs)
                if not one.ended and (i == 0 or reached[i] < max(front, 0.0) + self.skew)
            ]
            if inputs[0].ended and not held[0]:
                return
            ready = await select(*wanted)
            if ready is None:
                continue
            chunk = ready.get_nowait()
            if chunk is None:
                continue
            at = inputs.index(ready)
            reached[at] = max(reached[at], chunk.end_seconds)
            if at > 0 and chunk.end_seconds <= done and chunk.start_seconds < done:
                ctx.count("late")
            else:
                held[at].append(chunk)


def _overlapping(chunks: deque[Chunk], lead: Chunk) -> tuple[Chunk, ...]:
    """The chunks that fall into the lead's span; those that end within or before it leave the queue."""
    start, end = lead.start_seconds, lead.end_seconds
    part = tuple(c for c in chunks if c.start_seconds < end and (c.end_seconds > start or c.start_seconds >= start))
    kept = [c for c in chunks if c.end_seconds > end or c.start_seconds >= end]
    chunks.clear()
    chunks.extend(kept)
    return part
