"""G.711: the telephone's 8-bit companding of sound at 8 kHz, mu-law (PCMU) and A-law (PCMA).

ITU-T G.711 (11/1988), tables 1a to 2b; the reference for bits is the ITU-T software tool library (G.191), whose
coders take 14-bit (mu) and 13-bit (A) values from the top of 16-bit ones. Both directions are table look-ups, exact
for every value.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

RATE = 8000

Law = Literal["mulaw", "alaw"]
Bytes = NDArray[np.uint8]

_BIAS = 33  # of mu-law's 14-bit values: makes every segment begin at a power of two
_CLIP = 8191 - _BIAS


def _mulaw_values() -> NDArray[np.int16]:
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4 & 7).astype(np.int32), (code & 15).astype(np.int32)
    magnitude = (((mantissa << 1) + _BIAS << exponent) - _BIAS) << 2
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _mulaw_codes() -> Bytes:
    value = np.arange(-32768, 32768) >> 2
    magnitude = np.minimum(np.abs(value), _CLIP) + _BIAS
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 5
    sign = np.where(value < 0, 0x80, 0)
    codes: Bytes = (~(sign | exponent << 4 | magnitude >> exponent + 1 & 15)).astype(np.uint8)
    return codes


def _alaw_values() -> NDArray[np.int16]:
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4 & 7).astype(np.int32), (code & 15).astype(np.int32)
    magnitude = np.where(exponent == 0, (mantissa << 4) + 8, (mantissa << 4) + 0x108 << np.maximum(exponent - 1, 0))
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.int16)


def _alaw_codes() -> Bytes:
    value = np.arange(-32768, 32768)
    magnitude = np.where(value < 0, ~value, value) >> 4  # 11 bits: 1's complement, as the reference has it
    exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 1))).astype(np.int32) - 3, 0)
    mantissa = magnitude >> np.maximum(exponent - 1, 0) & 15
    sign = np.where(value < 0, 0, 0x80)
    codes: Bytes = ((sign | exponent << 4 | mantissa) ^ 0x55).astype(np.uint8)
    return codes


_VALUES = {"mulaw": _mulaw_values(), "alaw": _alaw_values()}
_CODES = {"mulaw": _mulaw_codes(), "alaw": _alaw_codes()}  # of value + 32768


def encode(pcm: NDArray[np.int16], law: Law) -> Bytes:
    """16-bit samples ``[n]`` -> codes ``[n]``."""
    codes: Bytes = _CODES[law][pcm.astype(np.int32) + 32768]
    return codes


def decode(codes: Bytes, law: Law) -> NDArray[np.int16]:
    """Codes ``[n]`` -> 16-bit samples ``[n]``."""
    values: NDArray[np.int16] = _VALUES[law][codes]
    return values
