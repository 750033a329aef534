"""A tiny random Moshi: 17 streams with Moshi's delays, a window of 12 frames; and a driver that steps it over slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antiphon.models.moshi.config import UNSET, read_config
from antiphon.models.moshi.lm import MoshiLM
from antiphon.models.moshi.sampling import Sampling

CARD, TEXT, WINDOW, STREAMS = 29, 37, 12, 17
SETTINGS: dict[str, Any] = {
    "dim": 32,
    "text_card": TEXT,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": CARD,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": WINDOW,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_dim_feedforward": 66,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, *[0, 1, 1, 1, 1, 1, 1, 1] * 2],
}
GREEDY = Sampling(text_temperature=0.0, audio_temperature=0.0)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights that matter everywhere: norms near one, rows of matrices of length about one and a half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.1 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5
            centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            parameter.copy_(centre + noise * scale)


def tiny_lm(
    seed: int = 0, *, prefill: int = 1, sinks: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> MoshiLM:
    """Ready to step."""
    lm = MoshiLM(read_config(SETTINGS | changes).changed(prefill=prefill, sinks=sinks)).to(dtype)
    randomise(lm, seed)
    lm.prepare()
    return lm


def inputs(
    codes: Tensor, sampling: Sampling = GREEDY, force: Tensor | None = None, spoken: int = 8
) -> dict[str, Tensor]:
    """A live step's inputs for ``[B, heard]`` codes."""
    rows = len(codes)
    chosen = {name: torch.from_numpy(value).expand(rows, *value.shape) for name, value in sampling.inputs().items()}
    force = torch.full((rows, 1 + spoken), UNSET) if force is None else force
    return {"codes": codes, "force": force, **chosen}


class Live:
    """``rows`` sessions side by side in slots."""

    def __init__(self, lm: MoshiLM, rows: int = 4) -> None:
        self.lm, self.rows = lm, rows
        self.state = {name: spec.new(rows + 1) for name, spec in lm.state_spec().items()}
        self.slots = torch.arange(rows)

    def step(self, codes: Tensor, sampling: Sampling = GREEDY, force: Tensor | None = None) -> dict[str, Tensor]:
        """All sessions by one frame."""
        active = torch.ones(self.rows, dtype=torch.bool)
        with torch.inference_mode():
            given = inputs(codes, sampling, force, self.lm.config.spoken)
            return self.lm.step(given, self.state, self.slots, active)

    def read(self, log: Tensor, count: int) -> dict[str, Tensor]:
        """A log ``[B, P, streams]`` into all sessions."""
        active = torch.ones(self.rows, dtype=torch.bool)
        with torch.inference_mode():
            given = {"log": log, "count": torch.full((self.rows,), count)}
            return self.lm.step(given, self.state, self.slots, active)


def user_codes(rows: int, frames: int, seed: int = 0, heard: int = 8) -> Tensor:
    """``[B, heard, T]``."""
    return torch.randint(0, CARD, (rows, heard, frames), generator=torch.Generator().manual_seed(seed))
