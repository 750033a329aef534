"""Smart Turn v3 as a step: the last 8 s of a turn in, the probability that its speaker has finished out.

The network is the publisher's ONNX file, run through onnxruntime: Whisper-tiny's encoder with a classifier
(https://huggingface.co/pipecat-ai/smart-turn-v3, BSD-2-Clause). A call costs tens of milliseconds, so give it an engine
of its own, beside that of the voice detector.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from os import PathLike

import torch
from torch import Tensor

from ..codecs.whisper_mel import WhisperMel
from ..models.ort import CPU, open_session
from ..models.streaming import Specs, State, StreamingModel, TensorSpec

RATE = 16000
HEARD = 8 * RATE  # samples


class SmartTurn(StreamingModel):
    """Judges many sessions' pauses a step, on the CPU. Keeps no state.

    path: the ONNX file, such as ``smart-turn-v3.2-cpu.onnx``. providers: see ``models.ort.open_session``.
    Raises ImportError, FileNotFoundError.
    """

    def __init__(self, path: str | PathLike[str], *, providers: Sequence[str] = CPU) -> None:
        super().__init__()
        self._session = open_session(path, providers)
        self.mel = WhisperMel()

    @property
    def variants(self) -> tuple[Hashable, ...]:
        return ("8s",)

    def tick(self, variant: Hashable) -> float:
        """Of media to the next pause, about; what a session costs is reckoned by it."""
        return 1.0

    def state_spec(self) -> Specs:
        return {}

    def input_spec(self, variant: Hashable) -> Specs:
        return {"pcm": TensorSpec((HEARD,))}

    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        """inputs: ``pcm [B, 128000]`` float32, with zeros before a shorter turn. Returns ``finished [B]``, 0 ... 1.

        Rows are judged one by one, and padding rows not at all.
        """
        finished = torch.zeros(len(active))
        for row in active.nonzero()[:, 0].tolist():
            features = self.mel(inputs["pcm"][row : row + 1]).numpy()
            finished[row] = float(self._session.run(None, {"input_features": features})[0].reshape(-1)[0])
        return {"finished": finished}
