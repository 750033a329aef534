"""The inside of Antiphon: slots of session state, and one deadline scheduler that steps every model for every session.

``Engine`` hosts models and gives out leases; ``Scheduler`` decides what runs next; ``SlotStore`` keeps the state.
"""

from .admission import Admission, Shedding
from .engine import Engine, default_buckets
from .errors import (
    AtCapacity,
    BadInput,
    BadSlot,
    BadSnapshot,
    Closed,
    EngineError,
    InboxFull,
    OutOfSlots,
    Stale,
    StepFailed,
)
from .lease import Lease
from .runner import Row, Sliced, probe_exact_buckets
from .scheduler import EDF, EDF_TICKS, EDF_TICKS_SLICES, FIFO, ONE_AT_A_TIME, Batch, Lane, Policy, Scheduler, Work
from .slots import Slot, SlotStore, Snapshot

__all__ = [
    "EDF",
    "EDF_TICKS",
    "EDF_TICKS_SLICES",
    "FIFO",
    "ONE_AT_A_TIME",
    "Admission",
    "AtCapacity",
    "BadInput",
    "BadSlot",
    "BadSnapshot",
    "Batch",
    "Closed",
    "Engine",
    "EngineError",
    "InboxFull",
    "Lane",
    "Lease",
    "OutOfSlots",
    "Policy",
    "Row",
    "Scheduler",
    "Shedding",
    "Sliced",
    "Slot",
    "SlotStore",
    "Snapshot",
    "Stale",
    "StepFailed",
    "Work",
    "default_buckets",
    "probe_exact_buckets",
]
