"""What a step of each model that speaks takes, and what its bytes, operations and launches need."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...models.cosyvoice.lm_config import Burst
from ...models.layers.kernels import plain
from ...models.streaming import StreamingModel
from ...pipelines.engine import Engine, Lease
from ...pipelines.engine.runner import Sliced, slice_count, turn_count
from ...pipelines.speech import Part, Speech
from .asr import ceilings
from .floor import floor_of, launch_seconds, launches_of
from .references import synchronize

SPOKEN = 100  # tokens that a session has spoken when its step is timed
REPEATS = 7

Stage = tuple[str, Part, Hashable]


def stages(speech: Speech) -> list[Stage]:
    """The steps that an utterance is made of: name, model, variant."""
    found: list[Stage] = []
    for variant in speech.reader.variants:
        if isinstance(variant, Burst):
            found.append((f"draw {variant.tokens} tokens", "lm", variant))
        elif variant > 1:
            found.append((f"read {variant} tokens", "lm", variant))
    found += [(f"flow, {hop} tokens", "flow", hop) for hop in sorted(speech.flow.variants)]
    return found + [(f"vocoder, {frames} frames", "vocoder", frames) for frames in sorted(speech.vocoder.variants)]


def inputs_of(part: Part, model: StreamingModel, variant: Hashable, rows: int) -> dict[str, Tensor]:
    """Random ones."""
    generator = torch.Generator().manual_seed(0)
    if part != "vocoder":
        made: dict[str, Tensor] = cast(Any, model).probe_inputs(variant, rows, generator)
        return made
    inputs = {name: spec.new(rows) for name, spec in model.input_spec(variant).items()}
    inputs["mel"].normal_(generator=generator)
    return inputs


def age(part: Part, prompt: int, state: dict[str, Tensor], row: int) -> None:
    """Make a session's state that of one in the middle of an utterance, with noise for memories."""
    for name, tensor in state.items():
        if name.endswith((".rings", ".tails")):
            tensor[row].normal_()
        elif name.endswith(".seen"):
            tensor[row].fill_({"lm": prompt + SPOKEN, "flow": SPOKEN, "vocoder": 2 * SPOKEN}[part])


def bench_stages(
    engine: Engine, name: str, speech: Speech, batches: Sequence[int], prompt: int
) -> list[dict[str, Any]]:
    """Median milliseconds of a whole step, inputs in and outputs out, and of the device alone."""
    rows: list[dict[str, Any]] = []
    metrics = engine.metrics()["models"]
    for stage, part, variant in stages(speech):
        model = speech.parts[part]
        about = metrics[f"{name}.{part}"]
        known = about["variants"][variant]["buckets"]
        most = min(known[-1], about["slots"])
        sizes = [size for size in batches if size <= most]
        with ExitStack() as stack:
            leases = [
                stack.enter_context(closing(engine.open_sync(f"{name}.{part}", variant))) for _ in range(max(sizes))
            ]
            for size in sizes:
                inputs = inputs_of(part, model, variant, size)
                chunk = [
                    (lease, {key: value[index] for key, value in inputs.items()})
                    for index, lease in enumerate(leases[:size])
                ]
                seconds = []
                for _ in range(REPEATS):
                    for lease in leases[:size]:
                        engine.ask_sync(partial(_age, part, prompt, lease))
                    begin = synchronize(engine.device)
                    engine.run_sync(chunk)
                    seconds.append(synchronize(engine.device) - begin)
                steps = engine.metrics()["models"][f"{name}.{part}"]["variants"][variant]["steps"]
                bucket = next(one for one in known if one >= size)
                rows.append(
                    {
                        "stage": stage,
                        "rows": size,
                        "ms": round(statistics.median(seconds) * 1e3, 3),
                        "device_ms": round(steps[bucket]["median"] * _passes(model, variant) * 1e3, 3),
                    }
                )
    return rows


def _passes(model: StreamingModel, variant: Hashable) -> int:
    """Slices or turns of a step."""
    return slice_count(model, variant) * turn_count(model, variant)


def _age(part: Part, prompt: int, lease: Lease) -> None:
    age(part, prompt, lease.store.state, lease.slot.row)


@torch.inference_mode()
def floors(
    speech: Speech, batches: Sequence[int], device: torch.device, dtype: torch.dtype, prompt: int
) -> list[dict[str, Any]]:
    """What each step must at least take: weights read once a pass, memories once a pass and row, counted operations
    of arithmetic, and its launches."""
    bandwidth, rate = ceilings(device, dtype)
    launch = launch_seconds(device)
    rows: list[dict[str, Any]] = []
    for stage, part, variant in stages(speech):
        model = speech.parts[part]
        flop, launches = counted(part, model, variant, device, prompt)
        passes = _passes(model, variant)
        weights = passes * weight_bytes(part, speech)
        memory = memory_bytes(part, speech, passes, prompt)
        for size in batches:
            floor = floor_of(weights + size * memory, size * flop, launches, launch, bandwidth, rate)
            about = {"stage": stage, "rows": size, "weight_bytes": weights, "memory_bytes": memory, "flop": flop}
            rows.append({**about, **floor})
    return rows


def weight_bytes(part: Part, speech: Speech) -> int:
    """Of the matrices that a pass reads: the UNet's for the flow, no embeddings."""
    modules = {"lm": speech.reader, "flow": speech.flow.flow.estimator, "vocoder": speech.vocoder}
    named = modules[part].named_parameters()
    return sum(
        weight.numel() * weight.element_size() for name, weight in named if weight.dim() > 1 and "embedding" not in name
    )


def memory_bytes(part: Part, speech: Speech, passes: int, prompt: int) -> int:
    """Of a session's keys, values and tails that a step reads, its voice's among them."""
    spec = speech.parts[part].state_spec()
    if part == "vocoder":
        return spec["hift.tails"].bytes
    rings = sum(one.bytes for name, one in spec.items() if name.endswith((".rings", ".tails")))
    if part == "flow":
        return rings + sum(table[0].numel() * table.element_size() for table in speech.flow.voices.caches.values())
    config = speech.reader.lm.config.transformer
    return passes * rings * min(prompt + SPOKEN, config.ring) // config.ring


def counted(part: Part, model: StreamingModel, variant: Hashable, device: torch.device, prompt: int) -> tuple[int, int]:
    """Operations of arithmetic of one row of a step, and launches of a step."""
    state = {name: spec.new(2, device) for name, spec in model.state_spec().items()}
    inputs = {name: value.to(device) for name, value in inputs_of(part, model, variant, 1).items()}
    arguments = (
        inputs, state, torch.zeros(1, dtype=torch.int64, device=device),
        torch.ones(1, dtype=torch.bool, device=device),
    )  # fmt: skip
    flop, launches = 0, 0
    for index in range(slice_count(model, variant)):
        step = model.step if slice_count(model, variant) == 1 else partial(cast(Sliced, model).step_slice, index)
        age(part, prompt, state, 0)
        with plain(), FlopCounterMode(display=False) as flops:
            step(*arguments)
        flop += flops.get_total_flops()
        launches += launches_of(partial(step, *arguments), device)
    return flop, launches
