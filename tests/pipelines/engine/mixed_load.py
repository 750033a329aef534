"""Four models share one device on virtual time: the load that scheduling policies are compared on.

``sessions`` microphones send a chunk each 80 ms, half of them are being spoken to (a speech token each 33 ms, a second
of flow matching each second), a quarter is in the middle of a 7B answer (a token each 40 ms). Step times are roofline
estimates for one H200: their ratios matter, not the number of sessions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from antiphon.pipelines.engine import Batch, Lane, Policy, Scheduler, Work

UNBOUNDED = (1 << 20,)


@dataclass(frozen=True)
class Model:
    """slice_seconds: time of one slice for a batch size. tick: shortest time between two starts."""

    slice_seconds: Callable[[int], float]
    slices: int
    budget: float
    period: float
    share: float  # of the sessions
    tick: float


MODELS = {
    "recogniser": Model(lambda rows: 1.92e-3 + 0.7e-6 * rows, 1, 0.080, 0.080, 1.0, 0.020),
    "speech tokens": Model(lambda rows: 1.06e-3 + 2e-6 * rows, 1, 0.033, 0.0333, 0.5, 0.016),
    "language": Model(lambda rows: 5.4e-3 + 33e-6 * rows, 1, 0.040, 0.040, 0.25, 0.020),
    "flow": Model(lambda rows: 1.83e-3 + 62e-6 * rows, 10, 0.250, 1.0, 0.5, 0.060),
}


def missed(policy: Policy, sessions: int, seconds: float, seed: int = 0) -> dict[str, float]:
    """Model -> share of its chunks that came after their deadline; chunks not done by the end count when overdue."""
    scheduler = Scheduler(policy)
    lanes = {
        name: scheduler.add(Lane(name, None, model.period, model.budget, UNBOUNDED, model.slices, model.tick))
        for name, model in MODELS.items()
    }
    arrivals = _arrivals(lanes, sessions, seconds, seed)
    late, total = dict.fromkeys(MODELS, 0), dict.fromkeys(MODELS, 0)
    now, position = 0.0, 0
    while now < seconds + 1.0:
        while position < len(arrivals) and arrivals[position].arrival <= now:
            scheduler.submit(arrivals[position])
            position += 1
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            took = MODELS[decision.lane.model].slice_seconds(len(decision.works)) * (decision.last - decision.first)
            now += took
            if scheduler.done(decision, now, took):
                name = decision.lane.model
                total[name] += len(decision.works)
                late[name] += sum(now > work.deadline for work in decision.works)
            continue
        times = [decision] if decision is not None else []
        if position < len(arrivals):
            times.append(arrivals[position].arrival)
        if not times:
            break
        now = min(times)
    for work in scheduler.drain():
        assert isinstance(work, Work)
        total[work.lane.model] += 1
        late[work.lane.model] += now > work.deadline
    return {name: late[name] / total[name] for name in MODELS}


def _arrivals(lanes: dict[str, Lane], sessions: int, seconds: float, seed: int) -> list[Work]:
    """Every chunk a session of its own: the policies are compared on deadlines, not on order within a session."""
    rng = random.Random(seed)
    works = []
    for name, model in MODELS.items():
        for _ in range(int(sessions * model.share)):
            start = rng.random() * model.period
            while start < seconds:
                arrival = start + max(0.0, rng.gauss(0, 0.004)) if name == "recogniser" else start
                works.append(Work(lanes[name], object(), arrival + model.budget, arrival))
                start += model.period
    return sorted(works, key=lambda work: work.arrival)
