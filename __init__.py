"""Antiphon: real-time speech and video models for many people at once.

    for caption in antiphon.transcribe("talk.mp3"): ...                      # files
    graph = antiphon.FileSource("talk.mp3") >> antiphon.Transcribe()         # graphs of async stages

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .models.conformer.checkpoint import CheckpointError as CheckpointError
    from .models.cosyvoice.voice import Voice as Voice
    from .models.silero import SileroVAD as SileroVAD
    from .pipelines.captions import Caption as Caption
    from .pipelines.captions import Final as Final
    from .pipelines.captions import Partial as Partial
    from .pipelines.chunk import Audio as Audio
    from .pipelines.chunk import Chunk as Chunk
    from .pipelines.chunk import Event as Event
    from .pipelines.chunk import Text as Text
    from .pipelines.chunk import Tokens as Tokens
    from .pipelines.chunk import Video as Video
    from .pipelines.chunk import Word as Word
    from .pipelines.edge import Link as Link
    from .pipelines.engine import AtCapacity as AtCapacity
    from .pipelines.engine import Engine as Engine
    from .pipelines.engine.engines import Engines as Engines
    from .pipelines.graph import Graph as Graph
    from .pipelines.join import Join as Join
    from .pipelines.recognizer import Recognizer as Recognizer
    from .pipelines.session import Session as Session
    from .pipelines.spec import load_graph as load_graph
    from .pipelines.speech import Speech as Speech
    from .pipelines.stage import Context as Context
    from .pipelines.stage import Inlet as Inlet
    from .pipelines.stage import Input as Input
    from .pipelines.stage import Stage as Stage
    from .pipelines.stage import StageError as StageError
    from .pipelines.stage import stage as stage
    from .pipelines.stages.parrot import Echo as Echo
    from .pipelines.stages.parrot import Parrot as Parrot
    from .pipelines.stages.respond import Respond as Respond
    from .pipelines.stages.speak import Speak as Speak
    from .pipelines.stages.transcribe import Transcribe as Transcribe
    from .pipelines.stages.turns import Turns as Turns
    from .pipelines.synthesizer import Synthesizer as Synthesizer
    from .pipelines.transcription import Transcriber as Transcriber
    from .pipelines.transcription import transcribe as transcribe
    from .transport.call import Call as Call
    from .transport.devices import DeviceError as DeviceError
    from .transport.echo_cancel import EchoCancel as EchoCancel
    from .transport.files import FileSink as FileSink
    from .transport.files import FileSource as FileSource
    from .transport.microphone import Microphone as Microphone
    from .transport.microphone import Speaker as Speaker
    from .transport.service import Service as Service

_HOMES = {
    "models.conformer.checkpoint": ("CheckpointError",),
    "models.cosyvoice.voice": ("Voice",),
    "models.silero": ("SileroVAD",),
    "pipelines.captions": ("Caption", "Final", "Partial"),
    "pipelines.chunk": ("Audio", "Chunk", "Event", "Text", "Tokens", "Video", "Word"),
    "pipelines.edge": ("Link",),
    "pipelines.engine": ("AtCapacity", "Engine"),
    "pipelines.engine.engines": ("Engines",),
    "pipelines.graph": ("Graph",),
    "pipelines.join": ("Join",),
    "pipelines.recognizer": ("Recognizer",),
    "pipelines.session": ("Session",),
    "pipelines.spec": ("load_graph",),
    "pipelines.speech": ("Speech",),
    "pipelines.stage": ("Context", "Inlet", "Input", "Stage", "StageError", "stage"),
    "pipelines.stages.parrot": ("Echo", "Parrot"),
    "pipelines.stages.respond": ("Respond",),
    "pipelines.stages.speak": ("Speak",),
    "pipelines.stages.transcribe": ("Transcribe",),
    "pipelines.stages.turns": ("Turns",),
    "pipelines.synthesizer": ("Synthesizer",),
    "pipelines.transcription": ("Transcriber", "transcribe"),
    "transport.call": ("Call",),
    "transport.devices": ("DeviceError",),
    "transport.echo_cancel": ("EchoCancel",),
    "transport.files": ("FileSink", "FileSource"),
    "transport.microphone": ("Microphone", "Speaker"),
    "transport.service": ("Service",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load_graph":
        _register_stages()
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _register_stages() -> None:
    """A graph in YAML may name any stage: importing a module registers its stages."""
    stages = import_module(".pipelines.stages", __name__)
    found = [f"pipelines.stages.{module.name}" for module in iter_modules(stages.__path__)]
    for name in (*found, "pipelines.join", "transport.files", "transport.microphone", "transport.echo_cancel"):
        import_module(f".{name}", __name__)
