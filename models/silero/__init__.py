"""Silero VAD: how likely each 32 ms of sound is speech."""

from .vad import RATE, WINDOW, WINDOW_SECONDS, SileroVAD

__all__ = ["RATE", "WINDOW", "WINDOW_SECONDS", "SileroVAD"]
