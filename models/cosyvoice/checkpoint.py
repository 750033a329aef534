"""CosyVoice 2 by hub name or folder: language model, flow and text tokenizer, and where its other parts lie.

The vocoder (``hift.pt``) and the ONNX files are read by ``codecs``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from .. import hub
from ..files import CheckpointError, read_json, reading
from . import flow_checkpoint, lm_checkpoint
from .flow import FlowMatching
from .lm import SpeechLM
from .lm_config import BURSTS, LMConfig
from .tokenizer import TextTokenizer

DEFAULT = "FunAudioLLM/CosyVoice2-0.5B"
_TEXT = "CosyVoice-BlankEN"
_WEIGHTS = ("llm.pt", "flow.pt", "hift.pt")
_ONNX = ("speech_tokenizer_v2.onnx", "campplus.onnx")
_WORDS = ("vocab.json", "merges.txt")
_PARTS = (*_WEIGHTS, *_ONNX, *(f"{_TEXT}/{name}" for name in _WORDS))
_FETCHED = (*_PARTS, f"{_TEXT}/config.json")
_VERSION_3 = ("cosyvoice3.yaml", "speech_tokenizer_v3.onnx")


@dataclass(frozen=True)
class Files:
    """What is where. text: the folder of the text tokenizer and of the backbone's ``config.json``."""

    folder: Path
    lm: Path
    flow: Path
    hift: Path
    speech_tokenizer: Path
    speaker: Path
    text: Path

    def lm_config(self, *, capacity: int | None = None, kept: torch.dtype | None = None) -> LMConfig:
        """The language model's sizes, as the backbone's ``config.json`` has them. Raises CheckpointError.

        capacity, kept: as in ``LMConfig``.
        """
        path = self.text / "config.json"
        config = LMConfig()
        if path.is_file():
            settings = read_json(path)
            with reading(path):
                config = LMConfig.of_qwen2(settings)
        return dataclasses.replace(config, capacity=capacity or config.capacity, kept=kept)


@dataclass(frozen=True, eq=False)
class CosyVoice:
    """The networks that work on tokens and features, and the files of those that work on sound."""

    files: Files
    lm: SpeechLM
    flow: FlowMatching
    tokenizer: TextTokenizer


def find(name: str | PathLike[str] = DEFAULT) -> Files:
    """The files of a checkpoint, fetched from the hub where needed.

    Raises CheckpointError for what is nowhere, lacks parts or is another CosyVoice.
    """
    folder = Path(name)
    if not folder.exists():
        known = str(name)
        if known.count("/") != 1 or known.startswith(("/", ".", "~")):
            raise CheckpointError(f"no folder or checkpoint {known!r}; the published one is {DEFAULT}")
        here = hub.cached(known)
        folder = here if here is not None and not _missing(here) else hub.fetch(known, _choose)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a folder with {', '.join(_WEIGHTS)} is wanted, this is a file")
    if newer := [file for file in _VERSION_3 if (folder / file).is_file()]:
        raise CheckpointError(f"{folder}: holds {newer[0]}; {_REFUSED}")
    if missing := _missing(folder):
        raise CheckpointError(f"{folder}: lacks {', '.join(missing)}; fetch all of {DEFAULT} again")
    paths = (folder / file for file in (*_WEIGHTS, *_ONNX, _TEXT))
    return Files(folder, *paths)


_REFUSED = (
    "of CosyVoice 3 only the language model (llm.pt) is read, not its flow (a diffusion transformer), its vocoder "
    f"(a causal HiFT) and its speech tokenizer; use {DEFAULT}"
)


def _missing(folder: Path) -> list[str]:
    return [file for file in _PARTS if not (folder / file).is_file()]


def _choose(names: Sequence[str]) -> Sequence[str]:
    if newer := [file for file in _VERSION_3 if file in names]:
        raise CheckpointError(f"this repository holds {newer[0]}; {_REFUSED}")
    if missing := [file for file in _PARTS if file not in names]:
        raise CheckpointError(f"this repository holds no {missing[0]}: it is no CosyVoice 2; use {DEFAULT}")
    return _FETCHED


def load(
    name: str | PathLike[str] | Files = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    capacity: int | None = None,
    kept: torch.dtype | None = None,
) -> CosyVoice:
    """A checkpoint's networks, in place.

    dtype: of the weights; None for bfloat16 on a GPU and float32 elsewhere. capacity, kept: as in ``LMConfig``.
    Raises CheckpointError for files that are missing, damaged or of another model.
    """
    files = name if isinstance(name, Files) else find(name)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    tokenizer = TextTokenizer(files.text)
    config = files.lm_config(capacity=capacity, kept=kept)
    if torch.device(device).type == "cuda":
        config = dataclasses.replace(config, bursts=BURSTS)
    if len(tokenizer) > config.text:
        raise CheckpointError(f"{files.text}: {len(tokenizer)} tokens, but the language model reads {config.text}")
    lm = lm_checkpoint.load(files.lm, config).to(device, dtype)
    flow = flow_checkpoint.load(files.flow).to(device, dtype)
    if lm.config.speech != flow.config.vocabulary:
        raise CheckpointError(
            f"{files.folder}: the language model draws from {lm.config.speech} speech tokens, the flow reads "
            f"{flow.config.vocabulary}: {files.lm.name} and {files.flow.name} are of different models"
        )
    return CosyVoice(files, lm, flow, tokenizer)
