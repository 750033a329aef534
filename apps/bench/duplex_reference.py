"""The reference that ``bench duplex`` times: the ``moshi`` package's own classes, with its CUDA graphs.

A batch steps in lockstep, as its ``run_inference`` does; with one row this is the loop of its server. Its rings are
attended whole from the first step on, so their age does not matter.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from ...codecs.mimi_config import MimiConfig
from .references import synchronize

SECONDS = 45.0  # of one batch size


class Moshi:
    """``MimiModel`` and ``LMGen`` with random weights. Raises ImportError where the package is missing."""

    name = "moshi"

    def __init__(
        self, settings: Mapping[str, Any], mimi: MimiConfig, rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        models: Any = import_module("moshi.models")
        loaders = models.loaders
        config = copy.deepcopy(loaders._mimi_config)
        config["seanet"] |= {"dimension": mimi.width, "n_filters": mimi.channels}
        config["quantizer"] |= {"dimension": mimi.code_width, "n_q": mimi.codebooks, "bins": mimi.bins}
        config["quantizer"] |= {"input_dimension": mimi.width, "output_dimension": mimi.width}
        config["transformer"] |= {"d_model": mimi.width, "num_heads": mimi.heads, "num_layers": mimi.layers}
        config["transformer"] |= {"dim_feedforward": mimi.feedforward, "input_dimension": mimi.width}
        config["transformer"] |= {"output_dimensions": [mimi.width]}
        self.rows, self.device = rows, device
        books = settings["n_q"] - settings["dep_q"]
        self.mimi = loaders.get_mimi(None, config, device=device, num_codebooks=books).eval()
        self.lm = loaders.get_moshi_lm(None, dict(settings), device=device, dtype=dtype).eval()
        self.gen = models.LMGen(self.lm, support_out_of_sync=rows > 1)

    @torch.no_grad()
    def times(self, frames: int) -> list[float]:
        """Seconds of each frame, samples in and samples out."""
        size = self.mimi.frame_size
        pcm = torch.randn(8, self.rows, 1, size, device=self.device) * 0.1
        seconds: list[float] = []
        until = time.monotonic() + SECONDS
        with self.mimi.streaming(self.rows), self.gen.streaming(self.rows):
            while len(seconds) < frames and time.monotonic() < until:
                begin = synchronize(self.device)
                tokens = self.gen.step(self.mimi.encode(pcm[len(seconds) % len(pcm)]))
                if tokens is not None:
                    self.mimi.decode(tokens[:, 1:].clamp(min=0)).cpu()
                seconds.append(synchronize(self.device) - begin)
                if len(seconds) == 1:  # it compiled
                    until = time.monotonic() + SECONDS
        return seconds
