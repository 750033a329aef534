"""``antiphon bench NAME`` and ``antiphon train NAME``: the rest of the line goes to ``main`` of the module so named."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from ...pipelines.graph import did_you_mean
from .console import CommandError

BENCHMARKS = {
    "asr": "streaming recognition: step time, sessions in real time, beside other implementations",
    "duplex": "full-duplex dialogue: a frame's time, sessions in real time, beside the moshi package",
    "runtime": "what the graph itself costs a chunk",
    "speech": "speech synthesis: first audio, streams in real time, beside upstream's own serving",
    "speech_window": "speech synthesis: quality and memory of what the flow looks back on",
    "transport_loss": "speech over a network that loses packets, beside aiortc's own receiver",
    "transport_peers": "mouth to ear through an echo, and how many peers a core carries, beside aiortc alone",
}
RECIPES = {
    "asr": "the embedded recogniser, from speech with transcripts and a teacher",
    "bank": "utterances that dialogues are composed of, for 'codec' and 'duplex'",
    "codec": "a small Mimi, the codec of the dialogue model",
    "codec_refine": "that codec's decoder further, for one voice",
    "duplex": "the tiny full-duplex dialogue model",
    "duplex_eval": "how a full-duplex model behaves in calls with a simulated user",
    "synthesise": "speech to train on, from text",
    "tts": "a small voice: its bank, tokenizer, flow, vocoder, language model, card and evaluation",
}


def run(kind: str, programs: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Run the program named first (a module of ``apps/<kind>``) with the rest; without a name, list them.

    Raises CommandError for an unknown name, or one that needs a package that is not installed.
    """
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"Usage: antiphon {kind} NAME [OPTIONS]   (antiphon {kind} NAME --help)\n")
        for name, what in programs.items():
            print(f"  {name:<12}{what}")
        return
    name, *rest = arguments
    if name not in programs:
        raise CommandError(f"{kind} has no {name!r}{did_you_mean(name, programs)}")
    try:
        module = importlib.import_module(f"..{kind}.{name}", __package__)
    except ImportError as error:
        raise CommandError(f"{kind} {name} needs {error.name}: pip install 'antiphon[{kind}]'") from error
    module.main(rest)
