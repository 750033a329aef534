"""What the engine raises. Every message names the value and the remedy."""

from __future__ import annotations

from ..chunk import Stale as Stale


class EngineError(RuntimeError):
    """Base of everything the engine raises on purpose."""


class AtCapacity(EngineError):
    """No room for another session now.

    reason: why, in words.
    utilisation: the share of the device that the admitted sessions would need with this one, from measured step times.
    expected_wait: seconds until a session is expected to leave.
    """

    def __init__(self, reason: str, utilisation: float, expected_wait: float) -> None:
        super().__init__(
            f"at capacity: {reason} (utilisation {utilisation:.2f}); a place is expected in {expected_wait:.1f} s: "
            "retry then, or choose a longer chunk"
        )
        self.reason = reason
        self.utilisation = utilisation
        self.expected_wait = expected_wait


class InboxFull(EngineError):
    """A lease has as many unanswered chunks as it may hold; await one before submitting the next."""


class Closed(EngineError):
    """The engine or the lease was closed before the work was done."""


class StepFailed(EngineError):
    """The model raised while stepping a batch; ``__cause__`` is the model's own error.

    The slots of that batch may be half written: ``reset`` or ``restore`` the lease before going on.
    """


class OutOfSlots(EngineError):
    """Every slot of a store is taken."""


class BadSlot(EngineError):
    """A slot that is not, or no longer, held: released twice, or from another store."""


class BadSnapshot(EngineError, ValueError):
    """A snapshot that does not fit: other model, other state layout, or not a snapshot at all."""


class BadInput(EngineError, ValueError):
    """A step's inputs do not fit the model's ``input_spec``."""
