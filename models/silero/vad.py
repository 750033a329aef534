"""Silero VAD as a streaming step: 512 samples (32 ms) at 16 kHz in, the probability of speech out.

The network is the publisher's ONNX file (versions 5 and 6 have the same interface), run through onnxruntime. Its LSTM
state and the 64 samples before the window, which the publisher's wrapper keeps on itself (``utils_vad.py``,
``OnnxWrapper``), are slot tensors here. https://github.com/snakers4/silero-vad, MIT licence.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..ort import CPU, open_session
from ..streaming import Specs, State, StreamingModel, TensorSpec

RATE = 16000
WINDOW = 512  # samples
WINDOW_SECONDS = WINDOW / RATE
_CONTEXT = 64  # samples before the window
_LAYERS, _WIDTH = 2, 128  # hidden and cell state of one LSTM layer

_FILE = Path("data", "silero_vad.onnx")


class SileroVAD(StreamingModel):
    """One window of many sessions a step. Steps on the CPU: beside a CUDA engine, put it into one of its own
    (``Engines(Engine("cuda"), Engine("cpu"))``).

    path: the ONNX file; default that of the ``silero-vad`` package. providers: see ``ort.open_session``.
    Raises ImportError naming the package that is missing, FileNotFoundError.
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, providers: Sequence[str] = CPU) -> None:
        super().__init__()
        self._session = open_session(path or packaged(), providers)
        self._rate = np.array(RATE, np.int64)

    @property
    def variants(self) -> tuple[Hashable, ...]:
        return ("16k",)

    def tick(self, variant: Hashable) -> float:
        return WINDOW_SECONDS

    def state_spec(self) -> Specs:
        return {"lstm": TensorSpec((_LAYERS, _WIDTH)), "context": TensorSpec((_CONTEXT,))}

    def input_spec(self, variant: Hashable) -> Specs:
        return {"pcm": TensorSpec((WINDOW,))}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``pcm [B, 512]`` float32. Returns ``speech [B]``, the probability in 0 ... 1.

        Raises RuntimeError on another device than the CPU.
        """
        pcm, lstm, context = inputs["pcm"], state["lstm"], state["context"]
        if lstm.device.type != "cpu":
            raise RuntimeError(f'Silero VAD cannot step on {lstm.device}: add it to an Engine("cpu"), see Engines')
        held, before = lstm[slots], context[slots]
        feed = {
            "input": torch.cat((before, pcm), 1).numpy(),
            "state": np.ascontiguousarray(held.numpy().swapaxes(0, 1)),
            "sr": self._rate,
        }
        speech, after = self._session.run(("output", "stateN"), feed)
        lstm[slots] = torch.where(active[:, None, None], torch.from_numpy(after).transpose(0, 1), held)
        context[slots] = torch.where(active[:, None], pcm[:, -_CONTEXT:], before)
        return {"speech": torch.from_numpy(speech)[:, 0]}


def packaged() -> Path:
    """The ONNX file of the ``silero-vad`` package, found without importing it. Raises ImportError."""
    spec = find_spec("silero_vad")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise ImportError(
        "Silero VAD's weights come with the package silero-vad, version 5 or later: pip install silero-vad "
        "(or give the path of a silero_vad.onnx)"
    )
