"""From a teacher's 24 kHz speech to a 16 kHz training clip: resampling, speaker perturbation, and what is unfit."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional as F

CLIP_RATE = 16_000
PLAIN = (2, 3)  # 24 kHz -> 16 kHz
# Output over input samples. Beside 2/3 these scale pitch, formants and tempo by 0.90, 0.93, 0.97, 1, 1.03, 1.07, 1.10.
PERTURBED = ((20, 27), (5, 7), (20, 29), PLAIN, (20, 31), (5, 8), (20, 33))

_ZEROS = 16  # zero crossings of the interpolation kernel on either side
_CUTOFF = 0.95  # of the lower Nyquist frequency
_SECONDS_A_CHARACTER = (0.03, 0.16)
_QUIET = 10 ** (-45 / 20)
_CLIPPED = 0.999
_CLIPPED_SHARE = 1e-3


@lru_cache(maxsize=len(PERTURBED))
def _kernel(up: int, down: int) -> tuple[torch.Tensor, int]:
    """Windowed-sinc polyphase filters [up, 1, taps] for input samples -reach .. reach + down around each group."""
    scale = _CUTOFF * min(1.0, up / down)
    reach = math.ceil(_ZEROS / scale)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    lag = torch.arange(-reach, reach + down, dtype=torch.float64) - phase
    window = torch.cos(lag.clamp(-reach, reach) * math.pi / (2 * reach)) ** 2
    return (torch.sinc(lag * scale) * window * scale).float()[:, None], reach


def resample(samples: torch.Tensor, ratio: tuple[int, int]) -> torch.Tensor:
    """samples [N] -> [ceil(N * up / down)], band limited, for ratio = (up, down)."""
    up, down = ratio
    kernel, reach = _kernel(up, down)
    count = -(-len(samples) * up // down)
    padded = F.pad(samples, (reach, reach + down))
    return F.conv1d(padded[None, None], kernel.to(samples), stride=down)[0].T.reshape(-1)[:count]


def defect(clip: torch.Tensor, characters: int) -> str | None:
    """Why a 16 kHz clip of a text of so many characters is unfit for training, or None when it is fit."""
    if not len(clip) or not bool(torch.isfinite(clip).all()):
        return "not a finite signal"
    shortest, longest = (seconds * characters for seconds in _SECONDS_A_CHARACTER)
    seconds = len(clip) / CLIP_RATE - 0.5  # some half second of silence stands around the words
    if not shortest <= max(seconds, 0.0) <= longest:
        return "too short or too long for its text"
    if float(clip.square().mean().sqrt()) < _QUIET:
        return "almost silent"
    if float((clip.abs() >= _CLIPPED).float().mean()) > _CLIPPED_SHARE:
        return "clipped"
    return None
