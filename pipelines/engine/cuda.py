"""Stepping one model on CUDA: one captured graph per variant, bucket and slice, replayed.

Inputs go from pinned staging to static device buffers, the graph runs over them, and outputs come back into pinned
buffers with an event, all on the model's stream. Two batches of a stream may be in flight: the host fills the next
while the device runs. All graphs of a stream share one memory pool. That is safe because they run one after another and
each graph's outputs are copied out before the next graph can reuse the memory; streams, which run at the same time,
share none. While a model is made ready cuDNN may choose among deterministic algorithms only: the same inputs give the
same bits whenever its graphs run (cuBLAS has a workspace for each stream, and gives them anyway). What a graph reads is
kept for as long as the graph: making a model ready that shares parts with it replaces what was made of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...models.streaming import StreamingModel
from .runner import Rows, Sliced, Staging, Turning, slice_count, turn_count
from .slots import SlotStore

EAGER_STEPS = 2  # before a capture: lets libraries allocate their workspaces and pick their kernels


class Streams:
    """The streams of a device by name. Made in the thread that steps its models, whose current stream is then one that
    none of them runs on."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.device = device
        self._graphs: dict[str, Graphs] = {}
        self._commands = torch.cuda.Stream(device)
        torch.cuda.set_stream(self._commands)

    def graphs(self, name: str, priority: int = 0) -> Graphs:
        """What is captured for a stream, which is made, with this priority, where it is new."""
        if name not in self._graphs:
            self._graphs[name] = Graphs(self.device, priority)
        return self._graphs[name]

    @contextmanager
    def joined(self) -> Iterator[None]:
        """What runs inside, on the thread's own stream, comes after all that was launched before and before all that
        is launched after."""
        for graphs in self._graphs.values():
            self._commands.wait_stream(graphs.stream)
        try:
            yield
        finally:
            for graphs in self._graphs.values():
                graphs.stream.wait_stream(self._commands)


class Graphs:
    """A stream and the memory pool of all graphs that are captured for it. As a context: on the stream."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1 - priority)  # the lower the sooner; 0 is everybody else's
        self.pool = torch.cuda.graph_pool_handle()
        self._entered: list[AbstractContextManager[object]] = []

    def __enter__(self) -> None:
        entered: AbstractContextManager[object] = torch.cuda.stream(self.stream)
        entered.__enter__()
        self._entered.append(entered)

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(None, None, None)

    def runner(self, model: StreamingModel, store: SlotStore) -> CudaRunner:
        """A runner of ``model``."""
        return CudaRunner(model, store, self)


@dataclass(eq=False, slots=True)
class _Capture:
    """One graph and the tensors its replay writes."""

    graph: torch.cuda.CUDAGraph
    outputs: dict[str, Tensor]


class _Landing:
    """Pinned host memory of one batch in flight: staging for inputs, room for outputs, and when both are free."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.outputs: dict[str, Tensor] = {}
        self.landed = _event(blocking=True)

    def make_room(self, outputs: dict[str, Tensor]) -> None:
        """Pinned buffers for these outputs, where there are none as large yet."""
        for name, tensor in outputs.items():
            held = self.outputs.get(name)
            if held is None or len(held) < len(tensor):
                self.outputs[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class _Lane:
    """Buffers and graphs of one variant."""

    def __init__(self, landings: list[_Landing], device: torch.device, slices: int, *, turning: bool) -> None:
        staging = landings[0].staging
        self.landings = landings
        self.turns: Iterator[_Landing] = itertools.cycle(landings)
        self.landing = landings[0]  # of the batch that started last
        self.slices = slices
        self.turning = turning
        self.taken: tuple[int, Sequence[int], list[int]] | None = None  # what the device's buffers hold, of turns
        self.inputs = {name: tensor.to(device) for name, tensor in staging.inputs.items()}
        self.slots = staging.slots.to(device)
        self.active = staging.active.to(device)
        self.turn = staging.turns.to(device)
        self.captures: dict[int, list[_Capture]] = {}

    def arguments(self, bucket: int, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
        """What the model's step gets: prefixes of the static buffers."""
        inputs = {name: tensor[:bucket] for name, tensor in self.inputs.items()}
        return inputs, state, self.slots[:bucket], self.active[:bucket]


class CudaFlight:
    """A batch on the device, or its outputs on their way back."""

    def __init__(
        self, outputs: dict[str, Tensor], started: torch.cuda.Event, ended: torch.cuda.Event, landed: torch.cuda.Event
    ) -> None:
        self._outputs = outputs
        self._started, self._ended, self._landed = started, ended, landed

    def ready(self) -> bool:
        return bool(self._landed.query())

    def wait(self) -> tuple[dict[str, Tensor], float]:
        self._landed.synchronize()
        seconds = self._started.elapsed_time(self._ended) / 1e3
        # The pinned buffers are used again by the batch after the next: hand out a copy.
        return {name: tensor.clone() for name, tensor in self._outputs.items()}, seconds


class CudaRunner:
    """Steps a model by replaying graphs."""

    depth = 2

    def __init__(self, model: StreamingModel, store: SlotStore, graphs: Graphs) -> None:
        self._model = model
        self._store = store
        self._graphs = graphs
        self._lanes: dict[Hashable, _Lane] = {}
        self._read: list[Tensor] = []

    def prepare(self, variant: Hashable, buckets: Sequence[int]) -> None:
        """Capture every bucket, the largest first, so that the smaller ones find their memory in the pool."""
        torch.cuda.synchronize(self._graphs.device)  # weights and state may have been made on another stream
        specs = self._model.input_spec(variant)
        stagings = [Staging(specs, max(buckets), self._store.scratch, pinned=True) for _ in range(self.depth)]
        slices = slice_count(self._model, variant)
        landings, turning = [_Landing(staging) for staging in stagings], turn_count(self._model, variant) > 1
        with self._graphs, deterministic():
            lane = _Lane(landings, self._graphs.device, slices, turning=turning)
            for bucket in sorted(buckets, reverse=True):
                lane.captures[bucket] = [self._capture(lane, bucket, index) for index in range(slices)]
                for landing in lane.landings:
                    landing.make_room(lane.captures[bucket][-1].outputs)
        self._lanes[variant] = lane
        self._read = held(self._model)

    def launch(self, variant: Hashable, bucket: int, first: int, last: int, rows: Rows) -> CudaFlight:
        lane, stream = self._lanes[variant], self._graphs.stream
        captures = lane.captures[bucket]
        started, ended = _event(enable_timing=True), _event(enable_timing=True)
        with torch.cuda.stream(stream), torch.inference_mode():
            if first == 0:
                lane.landing = next(lane.turns)
                lane.landing.landed.synchronize()  # the batch that used it before: long landed, unless this one hurries
                # The turn after the last of the same rows finds its inputs on the device.
                if not rows.turns or lane.taken != (bucket, rows.slots, list(rows.turns)):
                    lane.landing.staging.fill(rows, bucket)
                    self._upload(lane, bucket)
                if rows.turns:
                    lane.taken = (bucket, rows.slots, [turn + 1 for turn in rows.turns])
            landing = lane.landing
            started.record(stream)
            for capture in captures[first:last]:
                capture.graph.replay()
            ended.record(stream)
            outputs: dict[str, Tensor] = {}
            if last == lane.slices:
                for name, tensor in captures[-1].outputs.items():
                    outputs[name] = landing.outputs[name][:bucket]
                    outputs[name].copy_(tensor, non_blocking=True)
            # The next slice may start before this one is waited for: only the last marks the buffers free.
            landed = landing.landed if last == lane.slices else _event(blocking=True)
            landed.record(stream)
        return CudaFlight(outputs, started, ended, landed)

    def _upload(self, lane: _Lane, bucket: int) -> None:
        tensors, slots, active = lane.landing.staging.views(bucket)
        for name, tensor in tensors.items():
            lane.inputs[name][:bucket].copy_(tensor, non_blocking=True)
        lane.slots[:bucket].copy_(slots, non_blocking=True)
        lane.active[:bucket].copy_(active, non_blocking=True)
        if lane.turning:
            lane.turn[:bucket].copy_(lane.landing.staging.turns[:bucket], non_blocking=True)

    def _capture(self, lane: _Lane, bucket: int, index: int) -> _Capture:
        """Capture slice ``index`` for this bucket. The buffers hold padding rows, so only scratch is written."""
        arguments = lane.arguments(bucket, self._store.state)
        stream = self._graphs.stream
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(EAGER_STEPS):
                    self._step(lane, index, arguments)
                    lane.turn.zero_()
            stream.synchronize()
            # Other threads may use CUDA meanwhile: only this one's calls belong to the capture.
            try:
                with torch.cuda.graph(graph, pool=self._graphs.pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = self._step(lane, index, arguments)
            except BaseException:
                self._graphs.pool = torch.cuda.graph_pool_handle()  # the allocator still records into the old one
                raise
        return _Capture(graph, outputs)

    def _step(self, lane: _Lane, index: int, arguments: tuple[Any, Any, Any, Any]) -> dict[str, Tensor]:
        if lane.turning:
            turn = lane.turn[: len(arguments[2])]
            outputs = cast(Turning, self._model).step_turn(turn, *arguments)
            turn.add_(1)
            return outputs
        if lane.slices == 1:
            return self._model.step(*arguments)
        return cast(Sliced, self._model).step_slice(index, *arguments)


@contextmanager
def deterministic() -> Iterator[None]:
    """Convolutions by algorithms that give the same bits each time, and not by the fastest of a race."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def held(model: nn.Module) -> list[Tensor]:
    """Aliases of all tensors that a model's modules hold: weights, buffers, and what ``prepare`` made of them."""
    found: list[Tensor] = []

    def search(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value.detach())
        elif isinstance(value, Mapping):
            for one in value.values():
                search(one)
        elif isinstance(value, list | tuple):
            for one in value:
                search(one)

    for module in model.modules():
        search(vars(module))
    return found


def _event(*, enable_timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    """``blocking``: waiting for it sleeps instead of spinning."""
    return torch.cuda.Event(enable_timing=enable_timing, blocking=blocking)
