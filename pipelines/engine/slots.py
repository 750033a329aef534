"""State of many sessions of one model in preallocated slots.

Every tensor of ``StreamingModel.state_spec`` is allocated once as ``[S + 1, ...]``: a slot is one contiguous block per
tensor, row ``S`` is scratch for padding rows. Reset, snapshot, restore and fork are then row copies, the same for
every model. A ``Slot`` carries a generation, so that whoever held it before can no longer touch it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ...models.streaming import Specs, StreamingModel
from .errors import BadSlot, BadSnapshot, OutOfSlots

Snapshot = dict[str, Tensor]

FORMAT = "antiphon-slot"
VERSION = "1"

_generations = itertools.count(1)


class Slot(NamedTuple):
    """A held slot: its row, and the generation that tells this holder from earlier and later ones."""

    row: int
    generation: int


def spec_hash(specs: Specs) -> str:
    """A short digest of names, shapes, dtypes and reset values: equal digests can exchange snapshots."""
    lines = [f"{name} {list(spec.shape)} {spec.dtype} {spec.reset!r}" for name, spec in sorted(specs.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class SlotStore:
    """Slots for ``slots`` sessions of ``model`` on ``device``.

    ``state`` maps each name to its ``[slots + 1, ...]`` tensor and is what ``StreamingModel.step`` gets.
    on: entered around everything that is done to the state: the stream that the model's steps run on.
    Not thread-safe: the engine's thread owns it.
    """

    def __init__(
        self,
        model: StreamingModel,
        slots: int,
        device: torch.device | str = "cpu",
        *,
        name: str | None = None,
        on: AbstractContextManager[object] | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; a store needs at least 1")
        self.name = name or type(model).__name__
        self.specs = dict(model.state_spec())
        self.slots = slots
        self.scratch = slots
        self.state: dict[str, Tensor] = {key: spec.new(slots + 1, device) for key, spec in self.specs.items()}
        self._on = on or nullcontext()
        self._held: dict[int, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._hash = spec_hash(self.specs)

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Slots held."""
        return len(self._held)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one session's state."""
        return sum(spec.bytes for spec in self.specs.values())

    @property
    def total_bytes(self) -> int:
        """Bytes allocated for all slots, scratch included."""
        return self.slot_bytes * (self.slots + 1)

    def acquire(self) -> Slot:
        """Take a free slot, reset. Raises OutOfSlots."""
        slot = self._take()
        self._fill(slot.row)
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back. Raises BadSlot when it is not held by this generation."""
        index = self._check(slot)
        del self._held[index]
        self._free.append(index)

    def reset(self, slot: Slot) -> None:
        """Put every tensor of the slot to its reset value."""
        self._fill(self._check(slot))

    def reset_scratch(self) -> None:
        """Put the scratch row to its reset values."""
        self._fill(self.scratch)

    def snapshot(self, slot: Slot) -> Snapshot:
        """The slot's state as CPU tensors that share no memory with the store."""
        index = self._check(slot)
        with self._on:
            return {name: tensor[index].to("cpu", copy=True) for name, tensor in self.state.items()}

    def restore(self, slot: Slot, snapshot: Mapping[str, Tensor]) -> None:
        """Overwrite the slot with a snapshot. Raises BadSnapshot when names, shapes or dtypes differ."""
        index = self._check(slot)
        self.check(snapshot)
        with self._on:
            for name, tensor in self.state.items():
                tensor[index].copy_(snapshot[name])

    def fork(self, slot: Slot) -> Slot:
        """Take a free slot and copy this one into it, on the device. Raises OutOfSlots."""
        source = self._check(slot)
        copy = self._take()
        with self._on:
            for tensor in self.state.values():
                tensor[copy.row].copy_(tensor[source])
        return copy

    def check(self, snapshot: Mapping[str, Tensor]) -> None:
        """Raise BadSnapshot unless the snapshot has exactly this store's tensors."""
        if missing := sorted(self.specs.keys() - snapshot.keys()):
            raise BadSnapshot(f"the snapshot lacks {missing} of model {self.name!r}; take it from the same model")
        if extra := sorted(snapshot.keys() - self.specs.keys()):
            raise BadSnapshot(f"the snapshot holds {extra}, which model {self.name!r} does not have")
        for name, spec in self.specs.items():
            tensor = snapshot[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise BadSnapshot(
                    f"the snapshot's {name!r} is {list(tensor.shape)} {tensor.dtype}, model {self.name!r} keeps "
                    f"{list(spec.shape)} {spec.dtype}"
                )

    def to_bytes(self, snapshot: Mapping[str, Tensor]) -> bytes:
        """Serialise a snapshot as safetensors, with format version, model name and state layout in its header."""
        self.check(snapshot)
        header = {"format": FORMAT, "version": VERSION, "model": self.name, "spec": self._hash}
        return save_safetensors({name: tensor.contiguous() for name, tensor in snapshot.items()}, metadata=header)

    def from_bytes(self, data: bytes) -> Snapshot:
        """Read ``to_bytes`` back. Raises BadSnapshot naming what differs."""
        header = _header(data)
        if header.get("format") != FORMAT:
            raise BadSnapshot(f"not a slot snapshot: its format is {header.get('format')!r}, expected {FORMAT!r}")
        expected = {"version": VERSION, "model": self.name, "spec": self._hash}
        for key, value in expected.items():
            if header.get(key) != value:
                raise BadSnapshot(
                    f"the snapshot's {key} is {header.get(key)!r}, this store's is {value!r}: restore it into the "
                    "model and release that wrote it"
                )
        try:
            snapshot = load_safetensors(data)
        except SafetensorError as error:
            raise BadSnapshot(f"the snapshot is damaged: {error}") from error
        self.check(snapshot)
        return snapshot

    def _take(self) -> Slot:
        if not self._free:
            raise OutOfSlots(f"all {self.slots} slots of model {self.name!r} are taken; release one or add more")
        slot = Slot(self._free.pop(), next(_generations))
        self._held[slot.row] = slot.generation
        return slot

    def _check(self, slot: Slot) -> int:
        if self._held.get(slot.row) != slot.generation:
            raise BadSlot(f"slot {slot.row} of model {self.name!r} is not held by generation {slot.generation}")
        return slot.row

    def _fill(self, index: int) -> None:
        with self._on:
            for name, tensor in self.state.items():
                tensor[index].fill_(self.specs[name].reset)


def _header(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of little-endian length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise BadSnapshot(f"not a slot snapshot: {len(data)} bytes are too few or the start is damaged")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise BadSnapshot(f"not a slot snapshot: its header is not JSON ({error})") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}
