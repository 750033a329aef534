"""Stepping one model on the CPU: staging buffers for inputs, the step, and the rows of its outputs.

``cuda.py`` replaces the step by graph replays behind the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.streaming import Specs, State, StreamingModel, TensorSpec
from .errors import BadInput
from .slots import SlotStore

Inputs = Mapping[str, Any]
Array = NDArray[Any]


@runtime_checkable
class Sliced(Protocol):
    """A model whose step comes in parts, so that others can run in between. What parts share lives in the state."""

    def slices(self, variant: Hashable) -> int:
        """Number of parts of one step."""

    def step_slice(self, index: int, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Part ``index`` of ``step``; the last part's return value is the step's."""


@runtime_checkable
class Turning(Protocol):
    """A model some of whose steps are made of equal turns, so that sessions may join a batch and leave it in between.
    What turns share lives in the state; ``step`` takes all of them."""

    def turns(self, variant: Hashable) -> int:
        """Most turns of a step of ``variant``; 1 where it is not made of turns."""

    def turns_of(self, variant: Hashable, inputs: Inputs) -> int:
        """Turns of one session's step."""

    def step_turn(self, turn: Tensor, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Turn number ``turn [B]`` of each row's step. A row's outputs are the step's where it is its last."""


def turn_count(model: StreamingModel, variant: Hashable) -> int:
    """Most turns of one step of ``variant``."""
    return model.turns(variant) if isinstance(model, Turning) else 1


def slice_count(model: StreamingModel, variant: Hashable) -> int:
    """Parts of one step of ``variant``."""
    return model.slices(variant) if isinstance(model, Sliced) else 1


@dataclass(frozen=True, slots=True)
class Rows:
    """What a batch steps: of each session inputs, slot, and the turn that it takes where steps are made of turns."""

    inputs: Sequence[Mapping[str, Array]]
    slots: Sequence[int]
    turns: Sequence[int] = ()


class Row(Mapping[str, Tensor]):
    """One session's outputs: a view of its row of the batch's outputs, cut when asked for."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Mapping[str, Tensor], index: int) -> None:
        self._batch = batch
        self._index = index

    def __getitem__(self, name: str) -> Tensor:
        return self._batch[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)


class Staging:
    """Host buffers for one batch: inputs, slots and active flags, filled row by row.

    The tensors are ``[largest bucket, ...]``; a batch uses a prefix of them.
    """

    def __init__(self, specs: Specs, rows: int, scratch: int, *, pinned: bool = False) -> None:
        def buffer(spec: TensorSpec) -> Tensor:
            made = spec.new(rows)
            return made.pin_memory() if pinned else made

        self.inputs = {name: buffer(spec) for name, spec in specs.items()}
        self.slots = buffer(TensorSpec((), torch.int64, scratch))
        self.turns = buffer(TensorSpec((), torch.int64))
        self.active = buffer(TensorSpec((), torch.bool))
        self._views: dict[int, tuple[dict[str, Tensor], Tensor, Tensor]] = {}
        self._scratch = scratch
        self._slots: Array = self.slots.numpy()
        self._active: Array = self.active.numpy()
        self._fields = [_Field(name, specs[name], tensor.numpy()) for name, tensor in self.inputs.items()]

    def views(self, bucket: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The first ``bucket`` rows of inputs, slots and active flags."""
        if bucket not in self._views:
            inputs = {name: tensor[:bucket] for name, tensor in self.inputs.items()}
            self._views[bucket] = (inputs, self.slots[:bucket], self.active[:bucket])
        return self._views[bucket]

    def fill(self, rows: Rows, bucket: int) -> None:
        """Write the rows, and padding up to ``bucket``."""
        count = len(rows.inputs)
        if rows.turns:
            self.turns[:count] = torch.tensor(rows.turns)
            self.turns[count:bucket] = 0
        for field in self._fields:
            field.write([row[field.name] for row in rows.inputs], bucket)
        self._slots[:count] = rows.slots
        self._slots[count:bucket] = self._scratch
        self._active[:count] = True
        self._active[count:bucket] = False


class _Field:
    """One input's buffer, written by one concatenation of all rows."""

    def __init__(self, name: str, spec: TensorSpec, buffer: Array) -> None:
        self.name = name
        self._reset = spec.reset
        self._buffer = buffer
        self._flat = buffer.reshape(-1, *spec.shape[1:]) if spec.shape else None
        self._lines = spec.shape[0] if spec.shape else 1

    def write(self, values: list[Array], bucket: int) -> None:
        rows = len(values)
        if self._flat is None:
            self._buffer[:rows] = values
        else:
            np.concatenate(values, out=self._flat[: rows * self._lines])
        if rows < bucket:
            self._buffer[rows:bucket] = self._reset


class InputCheck:
    """Turns a step's inputs into numpy arrays of the declared shapes and dtypes. Raises BadInput."""

    def __init__(self, specs: Specs) -> None:
        self._specs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for name, spec in specs.items():
            try:
                self._specs[name] = (spec.shape, torch.empty(0, dtype=spec.dtype).numpy().dtype)
            except TypeError as error:
                raise BadInput(
                    f"input {name!r} is {spec.dtype}, which numpy lacks; declare float32 and cast inside the step"
                ) from error

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        checked: dict[str, Array] = {}
        for name, (shape, dtype) in self._specs.items():
            try:
                value = inputs[name]
            except KeyError:
                raise BadInput(f"input {name!r} is missing; the step takes {sorted(self._specs)}") from None
            if type(value) is not np.ndarray or value.dtype != dtype:
                value = _convert(name, value, dtype)
            if value.shape != shape:
                raise BadInput(f"input {name!r} has shape {list(value.shape)}, the step takes {list(shape)}")
            checked[name] = value
        if len(checked) != len(inputs):
            raise BadInput(f"inputs {sorted(set(inputs) - set(checked))} are unknown; the step takes {sorted(checked)}")
        return checked


def _convert(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise BadInput(f"input {name!r} is {array.dtype}, the step takes {dtype}")
    return array.astype(dtype, copy=False)


class Flight(Protocol):
    """A batch on its way through the device."""

    def ready(self) -> bool:
        """Whether ``wait`` would return at once."""

    def wait(self) -> tuple[dict[str, Tensor], float]:
        """Outputs ``[bucket, ...]`` on the CPU (empty unless the last slice ran) and the device's seconds."""


class Landed:
    """A flight that has arrived."""

    def __init__(self, outputs: dict[str, Tensor], seconds: float) -> None:
        self._outputs = outputs
        self._seconds = seconds

    def ready(self) -> bool:
        return True

    def wait(self) -> tuple[dict[str, Tensor], float]:
        return self._outputs, self._seconds


class Runner(Protocol):
    """Steps one model. ``depth``: batches that may be in flight at once."""

    depth: int

    def prepare(self, variant: Hashable, buckets: Sequence[int]) -> None:
        """Allocate (and capture) what batches of these sizes need."""

    def launch(self, variant: Hashable, bucket: int, first: int, last: int, rows: Rows) -> Flight:
        """Run slices ``first`` to ``last`` for these rows; of a variant made of turns, the turn of each."""


class CpuRunner:
    """Steps a model on the CPU, when asked."""

    depth = 1

    def __init__(self, model: StreamingModel, store: SlotStore, now: Callable[[], float]) -> None:
        self._model = model
        self._store = store
        self._now = now
        self._staging: dict[Hashable, Staging] = {}
        self._slices: dict[Hashable, int] = {}

    def prepare(self, variant: Hashable, buckets: Sequence[int]) -> None:
        self._staging[variant] = Staging(self._model.input_spec(variant), max(buckets), self._store.scratch)
        self._slices[variant] = slice_count(self._model, variant)

    def launch(self, variant: Hashable, bucket: int, first: int, last: int, rows: Rows) -> Flight:
        staging = self._staging[variant]
        started = self._now()
        if first == 0:
            staging.fill(rows, bucket)
        tensors, slot_rows, active = staging.views(bucket)
        arguments = (tensors, self._store.state, slot_rows, active)
        outputs: dict[str, Tensor] = {}
        with torch.inference_mode():
            if rows.turns:
                outputs = cast(Turning, self._model).step_turn(staging.turns[:bucket], *arguments)
            elif self._slices[variant] == 1:
                outputs = self._model.step(*arguments)
            else:
                for index in range(first, last):
                    outputs = cast(Sliced, self._model).step_slice(index, *arguments)
        return Landed(outputs if last == self._slices[variant] else {}, self._now() - started)


EXACT_ROWS = 4  # the smallest batch that everything else is held to: products of fewer rows round in their own ways


def probe_exact_buckets(
    model: StreamingModel, variant: Hashable, buckets: Sequence[int], *, steps: int = 4, seed: int = 0
) -> tuple[int, ...]:
    """The batch sizes that give every row the same bits as the base does: four rows, or the next size up there is.

    Matrix products may round differently by batch size (and by BLAS and CPU), most of all for a single row. The probe
    steps the same sessions in the base and, repeated or in part, in each other size, and compares all outputs and all
    state. Inputs are noise where they are floating point, else their reset value; a model may offer
    ``probe_inputs(variant, rows, generator)`` instead.
    """
    base = min((bucket for bucket in buckets if bucket >= EXACT_ROWS), default=max(buckets))
    reference = _probe(model, variant, base, base, steps, seed)
    exact = []
    for bucket in buckets:
        tensors = reference if bucket == base else _probe(model, variant, bucket, base, steps, seed)
        index = torch.arange(bucket) % base
        if all(_same_bits(tensor, expected[index]) for tensor, expected in zip(tensors, reference, strict=True)):
            exact.append(bucket)
    return tuple(exact)


def _probe(model: StreamingModel, variant: Hashable, rows: int, base: int, steps: int, seed: int) -> list[Tensor]:
    """All outputs and final states of ``rows`` sessions; row ``i`` gets the inputs of row ``i % base``."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    state = {name: spec.new(rows + 1, device) for name, spec in model.state_spec().items()}
    slots, active = torch.arange(rows, device=device), torch.ones(rows, dtype=torch.bool, device=device)
    index = torch.arange(rows) % base
    tensors: list[Tensor] = []
    with torch.inference_mode():
        for _ in range(steps):
            made = _probe_inputs(model, variant, base, generator)
            inputs = {name: value[index].to(device) for name, value in made.items()}
            if (count := slice_count(model, variant)) == 1:
                outputs = model.step(inputs, state, slots, active)
            else:
                for part in range(count):
                    outputs = cast(Sliced, model).step_slice(part, inputs, state, slots, active)
            tensors += [outputs[name].cpu() for name in sorted(outputs)]
    return tensors + [state[name][:rows].cpu() for name in sorted(state)]


def _probe_inputs(model: StreamingModel, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    offered = getattr(model, "probe_inputs", None)
    if offered is not None:
        return cast(dict[str, Tensor], offered(variant, rows, generator))
    inputs = {name: spec.new(rows) for name, spec in model.input_spec(variant).items()}
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return inputs


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    if left.is_floating_point():
        return bool(torch.all((left == right) | (left.isnan() & right.isnan())))
    return torch.equal(left, right)
