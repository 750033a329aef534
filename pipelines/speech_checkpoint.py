"""Speech models as files: CosyVoice 2 as it is published, or our own folder.

config.json           "kind": "speech", sizes of the networks, and, where they are the model's own: the voice to use
                      where none is named, how tokens are drawn ("sampling"), the flow's steps ("hops")
model.safetensors     weights of all three under lm., flow. and vocoder.
tokenizer.json        the text tokenizer
voices/NAME.safetensors
campplus.onnx, speech_tokenizer_v2.onnx    where it can make voices of clips
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from ..codecs import audio_file, hift_checkpoint, speaker, speech_tokenizer, voice_clip
from ..codecs.hift import HiFT, HiFTConfig
from ..codecs.resample import Samples
from ..models import hub
from ..models.cosyvoice import checkpoint
from ..models.cosyvoice.checkpoint import DEFAULT
from ..models.cosyvoice.flow import FlowMatching
from ..models.cosyvoice.flow_config import FlowConfig, FlowLimits
from ..models.cosyvoice.flow_stream import StreamingFlow
from ..models.cosyvoice.lm import SpeechLM
from ..models.cosyvoice.lm_config import BURSTS, LMConfig
from ..models.cosyvoice.sampling import Sampling
from ..models.cosyvoice.tokenizer import TextTokenizer
from ..models.cosyvoice.voice import Voice
from ..models.files import CheckpointError, check_keys, read_json, read_safetensors, reading
from .speech import Reader, Speech

KIND = "speech"
VOICES = "voices"
_TOKENIZER, _SPEAKER = "speech_tokenizer_v2.onnx", "campplus.onnx"
_RATE = 24000
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Loaded:
    """Models, and what comes with them. voices: by name, the default first."""

    name: str
    speech: Speech
    voices: dict[str, Voice] = field(default_factory=dict)
    tokenizer: Path | None = None
    speaker: Path | None = None

    def voice_of(self, pcm: Samples, *, text: str = "", name: str = "") -> Voice:
        """A voice from a clip at 24 kHz, in which ``text`` is said.

        Raises ValueError for a clip that is too short or too long, and CheckpointError where the checkpoint lacks what
        voices are made with.
        """
        if self.tokenizer is None or self.speaker is None:
            raise CheckpointError(
                f"{self.name} speaks with the voices it has; make voices of clips with {DEFAULT}, whose files "
                f"{_TOKENIZER} and {_SPEAKER} do that"
            )
        with reading(self.tokenizer):
            tokenizer = speech_tokenizer.OnnxSpeechTokenizer(self.tokenizer)
        with reading(self.speaker):
            embedding = speaker.SpeakerEmbedding(self.speaker)
        return voice_clip.voice_from_clip(
            pcm, _RATE, tokenizer=tokenizer, speaker=embedding, prompt_text=text, name=name
        )  # fmt: skip


def read_clip(path: str | PathLike[str]) -> Samples:
    """A clip to make a voice of. Raises AudioError."""
    return audio_file.read(path, _RATE)


def embedded() -> list[str]:
    """Names of the speech models that come with the package."""
    return hub.embedded(hub.EMBEDDED, "kind", KIND)


def load(
    name: str | PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    limits: FlowLimits | None = None,
) -> Loaded:
    """Models by name or folder; None for the one that comes with the package, or else the published one.

    dtype: of the weights; None for bfloat16 on a GPU and float32 elsewhere. limits: what the flow keeps; its hops are
    the model's where it has its own.
    Raises CheckpointError with the remedy for what is nowhere, damaged, or another model.
    """
    if name is None:
        name = next(iter(embedded()), DEFAULT)
    folder = hub.EMBEDDED / name if str(name) in embedded() else Path(name)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("kind") == KIND:
        return _own(folder, device, dtype, limits)
    files = checkpoint.find(name)
    model = checkpoint.load(files, device=device, dtype=dtype)
    vocoder = hift_checkpoint.load(files.hift).to(device)
    speech = Speech(Reader(model.lm, model.tokenizer), StreamingFlow(model.flow, limits), vocoder)
    return Loaded(str(name), speech, _voices(files.folder), files.speech_tokenizer, files.speaker)


def save(
    folder: Path, lm: SpeechLM, flow: FlowMatching, vocoder: HiFT, settings: Mapping[str, Any] | None = None
) -> None:
    """Write the networks in our layout; the tokenizer and the voices lie beside them.

    settings: ``voice``, ``sampling``, ``hops``, ``language``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks: dict[str, torch.nn.Module] = {"lm": lm, "flow": flow, "vocoder": vocoder}
    sizes = {part: dataclasses.asdict(config) for part, config in
             (("lm", lm.config), ("flow", flow.config), ("vocoder", vocoder.config))}  # fmt: skip
    for name in ("kept", "bursts"):  # the device's matter
        sizes["lm"].pop(name)
    config = {"kind": KIND, **(settings or {}), **sizes}
    weights = {
        f"{part}.{key}": value.detach().contiguous()
        for part, network in networks.items()
        for key, value in network.state_dict().items()
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def _own(folder: Path, device: torch.device | str, dtype: torch.dtype | None, limits: FlowLimits | None) -> Loaded:
    config = read_json(folder / "config.json")
    weights = read_safetensors(folder)
    tokenizer = TextTokenizer(folder)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with reading(folder / "config.json"):
        bursts = BURSTS if torch.device(device).type == "cuda" else ()
        lm = SpeechLM(dataclasses.replace(configured(LMConfig, config["lm"]), bursts=bursts))
        flow = FlowMatching(configured(FlowConfig, config["flow"]))
        vocoder = HiFT(configured(HiFTConfig, config["vocoder"]))
        sampling = configured(Sampling, config.get("sampling", {}))
        if hops := config.get("hops"):
            limits = dataclasses.replace(limits or FlowLimits(), hops=tuple(hops))
    if len(tokenizer) > lm.config.text:
        raise CheckpointError(f"{folder}: {len(tokenizer)} text tokens, but the language model reads {lm.config.text}")
    networks: dict[str, torch.nn.Module] = {"lm": lm, "flow": flow, "vocoder": vocoder}
    with reading(folder / "model.safetensors"):
        wanted = [f"{part}.{key}" for part, network in networks.items() for key in network.state_dict()]
        check_keys(weights, wanted, "the configured model")
        for part, network in networks.items():
            own = {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}
            network.load_state_dict({key: value.float() for key, value in own.items()})
        speech = Speech(
            Reader(lm.to(device, dtype).eval(), tokenizer, config.get("language", "en"), sampling),
            StreamingFlow(flow.to(device, dtype).eval(), limits),
            vocoder.to(device).eval(),
        )
    parts = [folder / name if (folder / name).is_file() else None for name in (_TOKENIZER, _SPEAKER)]
    return Loaded(folder.name, speech, _voices(folder, config.get("voice")), *parts)


def configured(kind: type[T], settings: Mapping[str, Any]) -> T:
    """A network's configuration from JSON, in which tuples are lists. Raises TypeError for settings it has not."""
    return kind(**{key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
                   for key, value in settings.items()})  # fmt: skip


def _voices(folder: Path, first: str | None = None) -> dict[str, Voice]:
    paths = sorted((folder / VOICES).glob("*.safetensors"), key=lambda path: (path.stem != first, path.stem))
    return {path.stem: Voice.load(path) for path in paths}
