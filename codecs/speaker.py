"""A speaker's embedding from a clip of theirs: CAM++ (arXiv 2303.00332), from its publisher's ONNX file.

The file (``campplus.onnx`` of CosyVoice) takes Kaldi filter banks without their mean over the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.files import CheckpointError
from ..models.ort import CPU, open_session
from .kaldi_fbank import SAMPLE_RATE, KaldiFbank

__all__ = ["SAMPLE_RATE", "SpeakerEmbedding"]

_MELS = 80  # where the file leaves their number open


class SpeakerEmbedding:
    """path: the ONNX file. providers: see ``ort.open_session``.

    Raises ImportError naming the package that is missing, FileNotFoundError, and CheckpointError for a model that does
    not take filter banks.
    """

    def __init__(self, path: str | PathLike[str], *, providers: Sequence[str] = CPU) -> None:
        self._session = open_session(path, providers)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 3:
            shapes = ", ".join(f"{value.name} {value.shape}" for value in inputs)
            raise CheckpointError(f"{path}: takes {shapes}; a speaker model takes filter banks [clips, frames, mels]")
        self._input, self._output = inputs[0].name, outputs[0].name
        mels = inputs[0].shape[2]
        self._fbank = KaldiFbank(mels if isinstance(mels, int) else _MELS)

    def __call__(self, pcm: NDArray[np.float32] | Tensor) -> Tensor:
        """``[n]`` samples at 16 kHz, at least 400 -> ``[width]`` float32 (192 for CAM++), of any length.

        Raises ValueError for a clip that is too short.
        """
        features = self._fbank(torch.as_tensor(pcm)[None])
        features = features - features.mean(1, keepdim=True)
        (made,) = self._session.run((self._output,), {self._input: features.numpy()})
        return torch.from_numpy(np.asarray(made, np.float32)).flatten()
