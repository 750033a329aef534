"""What a second of the HiFT vocoder's sound costs one CPU core, against the other ways of making it in pieces.

The step of :class:`~antiphon.codecs.hift.HiFT`, which computes nothing twice; the same network on each chunk and eleven
mel frames to either side of it, which is as exact to seven digits; and upstream's code (``cosyvoice2-eu``, where it is
installed) with the eight frames that its procedure takes again and fades, which is not. Random weights of the published
sizes, all in one process, each chunk in turn by each way; medians of CPU time.

    python -m antiphon.apps.bench.vocoder [--rounds 7] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...codecs.hift import UNKNOWN, HiFT, HiFTConfig
from .common import RESULTS, command_line, write_result

SIDE, UPSTREAM_SIDE = 11, 8  # mel frames computed again, to either side and before
CHUNKS = (10, 25, 50, 100)


def measure(config: HiFTConfig, rounds: int, chunks: Sequence[int] = CHUNKS) -> dict[str, Any]:
    """CPU seconds a second of sound, by way and by mel frames a chunk; and what a session keeps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vocoder = HiFT(config)
    vocoder.prepare()
    upstream = _upstream(config)
    costs: dict[str, dict[int, float]] = {}
    for chunk in chunks:
        ways = {"step": _step(vocoder, chunk), "window": _window(vocoder, chunk)}
        if upstream is not None:
            ways["upstream"] = _recompute(upstream, config, chunk)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                begin = time.process_time()
                way()
                spent[name].append(time.process_time() - begin)
        for name, times in spent.items():
            costs.setdefault(name, {})[chunk] = round(median(times[1:]) / vocoder.tick(chunk), 4)
    return {
        "cpu_seconds_a_second": costs,
        "state_bytes": sum(spec.bytes for spec in vocoder.state_spec().values()),
        "delay_ms": round(1000 * vocoder.delay / config.sample_rate, 1),
    }


def _step(vocoder: HiFT, chunk: int) -> Callable[[], object]:
    state = {name: spec.new(2) for name, spec in vocoder.state_spec().items()}
    inputs = {
        "mel": torch.randn(1, chunk, vocoder.config.mels),
        "end": torch.tensor([UNKNOWN]),
        "seed": torch.tensor([0]),
    }
    slot, active = torch.tensor([0]), torch.tensor([True])
    return lambda: vocoder.step(inputs, state, slot, active)


def _window(vocoder: HiFT, chunk: int) -> Callable[[], object]:
    mel = torch.randn(1, chunk + 2 * SIDE, vocoder.config.mels)
    return torch.no_grad()(lambda: vocoder(mel))


def _recompute(upstream: Any, config: HiFTConfig, chunk: int) -> Callable[[], object]:
    mel = torch.randn(1, config.mels, UPSTREAM_SIDE + chunk)
    source = torch.zeros(1, 1, UPSTREAM_SIDE * config.frame)
    return lambda: upstream.inference(speech_feat=mel, cache_source=source)


def _upstream(config: HiFTConfig) -> Any:
    """Upstream's vocoder of the same sizes, its weight norm folded; None where it is not installed."""
    if importlib.util.find_spec("cosyvoice") is None:
        return None
    predictor = importlib.import_module("cosyvoice.hifigan.f0_predictor")
    generator = importlib.import_module("cosyvoice.hifigan.generator")
    dilations = list(config.dilations)
    made = generator.HiFTGenerator(
        in_channels=config.mels,
        base_channels=config.width,
        nb_harmonics=config.harmonics - 1,
        sampling_rate=config.sample_rate,
        upsample_rates=list(config.rates),
        upsample_kernel_sizes=list(config.kernels),
        istft_params={"n_fft": config.n_fft, "hop_len": config.hop},
        resblock_kernel_sizes=list(config.block_kernels),
        resblock_dilation_sizes=[dilations] * len(config.block_kernels),
        source_resblock_kernel_sizes=list(config.source_kernels),
        source_resblock_dilation_sizes=[dilations] * len(config.source_kernels),
        f0_predictor=predictor.ConvRNNF0Predictor(1, config.mels, config.pitch_width),
    ).eval()
    for module in list(made.modules()):
        if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    numbers = measure(HiFTConfig(), options.rounds)
    for name, costs in numbers["cpu_seconds_a_second"].items():
        print(f"{name:9}" + "".join(f"  {chunk} frames: {cost:.3f}" for chunk, cost in costs.items()))
    print(f"a session keeps {numbers['state_bytes']} bytes and is {numbers['delay_ms']} ms behind its mel frames")
    print(write_result("vocoder", command_line("antiphon.apps.bench.vocoder", given), numbers, options.out))


if __name__ == "__main__":
    main()
