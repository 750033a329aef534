"""The graphs that a server offers by name. Each is made for one session, from the options its client gave.

Inlets: ``audio`` and ``control``, and ``video`` where the graph looks. Outputs: ``captions`` (what the client said),
``turns.events``; a graph that replies has ``<stage>.audio`` and the text of the reply besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from .edge import Link
from .graph import Graph, did_you_mean
from .stage import Inlet, Stage
from .stages.converse import Converse
from .stages.dictate import Dictate
from .stages.emit import emit, relay
from .stages.parrot import Parrot
from .stages.respond import Answer, Respond
from .stages.scenes import Scenes
from .stages.speak import Speak
from .stages.transcribe import Transcribe
from .stages.turns import Turns
from .turn_taking import TurnSettings

OPTIONS = ("language", "lookahead_ms", "endpoint_ms", "turns")
REPLY_RATE = 24000
ENDPOINT_MS = 500.0  # as the silence that ends a turn, so that its caption settles with it
_TURN_SECONDS = 60


def captions(options: Mapping[str, Any], *, dictated: bool = False) -> Graph:
    """Live captions, with the events of turn taking.

    options: ``language``; ``lookahead_ms``, one of the model's; ``endpoint_ms``, silence that ends a caption;
    ``turns``, as the control event of that name. dictated: by a model that writes while it hears (see ``Dictate``); it
    knows languages by itself, and has no ``lookahead_ms``. Raises ValueError, naming the option.
    """
    graph, _, _, _ = _listening(options, dictated)
    return graph


def parrot(options: Mapping[str, Any], *, dictated: bool = False) -> Graph:
    """``captions``, and each turn said back (see ``Parrot``). The options are those of ``captions``."""
    graph, asr, turns, control = _listening(options, dictated)
    reply = Parrot(rate=REPLY_RATE)
    turn = Link(items=_TURN_SECONDS * 40, ms=_TURN_SECONDS * 1000)
    return graph | (turns["turn"] >> turn >> reply["turn"]) | (asr >> reply["text"]) | (control >> reply["control"])


def scenes(options: Mapping[str, Any], *, dictated: bool = False) -> Graph:
    """``captions``, and where the scene changes in the camera's or the screen's pictures (see ``Scenes``).

    The newest picture goes first; one that waited too long is dropped. The options are those of ``captions``.
    """
    graph, _, _, _ = _listening(options, dictated)
    return graph | (Inlet().named("video") >> Link(items=1, policy="drop_oldest") >> Scenes())


def converse(options: Mapping[str, Any]) -> Graph:
    """A full-duplex dialogue (see ``Converse``, whose options these are). Raises ValueError, naming the option."""
    known = [name for name in Converse.parameters.parameters if name not in ("self", "model")]
    _check(options, known)
    talk = Converse(**options)
    return (Inlet().named("audio") >> talk) | (Inlet().named("control") >> talk["control"])


def dictate(options: Mapping[str, Any]) -> Graph:
    """``captions`` by a model that writes while it hears. The options are those of ``captions``."""
    return captions(options, dictated=True)


def listening(graph: Graph) -> Graph:
    """What hears of a served graph, alone: ``captions`` by the same recogniser, with ``control``; every frame's event
    ``step`` too where the recogniser tells of them (see ``Dictate``). Raises ValueError where nothing hears words."""
    for node in graph.nodes:
        if isinstance(node, Dictate):
            return _written(Dictate(model=node.model, endpoint=node.endpoint, steps=True))
        if isinstance(node, Transcribe):
            return _written(node)
    raise ValueError("the graph served here writes down nothing that it hears")


def speaking(options: Mapping[str, Any]) -> Graph:
    """Text to speech: the inlet ``text``, and ``speak.audio`` and ``speak.said`` as fast as they are made.

    options: ``voice``, ``seed`` and ``arriving``, see ``Speak``. Raises ValueError, naming the option.
    """
    _check(options, ("voice", "seed", "arriving"))
    speak = Speak(**options, ahead=None)
    return Inlet().named("text") >> speak["text"]


def talk(
    options: Mapping[str, Any], answer: Answer | None = None, instructions: str = "", *, dictated: bool = False
) -> Graph:
    """``captions``, and each turn answered aloud: captions, a reply in text (see ``Respond``), its sound (``Speak``).

    options: those of ``captions``, and ``voice``. answer, instructions: see ``Respond``. Raises ValueError.
    """
    voice = {name: options[name] for name in ("voice",) if name in options}
    graph, asr, turns, control = _listening({name: options[name] for name in options if name not in voice}, dictated)
    respond, speak = Respond(answer=answer, instructions=instructions), Speak(**voice)
    turn = Link(items=_TURN_SECONDS * 40, ms=_TURN_SECONDS * 1000)
    # Each report lasts as long as the reply up to it, and is made up for by the next.
    told = Link(items=64, ms=_TURN_SECONDS * 1000, feedback=True, policy="drop_oldest")
    return (
        graph
        | (turns["turn"] >> turn >> respond["turn"])
        | (asr >> respond["text"])
        | (control >> respond["control"])
        | (respond["reply"] >> Link(items=256) >> speak["text"])
        | (speak["said"] >> relay().named("reply"))
        | (speak["said"] >> told >> respond["said"])
    )


GRAPHS: dict[str, Callable[[Mapping[str, Any]], Graph]] = {
    "captions": captions,
    "parrot": parrot,
    "scenes": scenes,
    "converse": converse,
    "dictate": dictate,
    "talk": talk,
}


def _listening(options: Mapping[str, Any], dictated: bool) -> tuple[Graph, Stage, Stage, Stage]:
    _check(options, [name for name in OPTIONS if not (dictated and name == "lookahead_ms")])
    endpoint = _number(options, "endpoint_ms", ENDPOINT_MS)
    if endpoint <= 0:
        raise ValueError(f"endpoint_ms={endpoint:g}: a positive number of milliseconds")
    lookahead = None if options.get("lookahead_ms") is None else _number(options, "lookahead_ms", 0.0)
    settings = TurnSettings().changed(options.get("turns") or {})
    audio, control = Inlet().named("audio"), Inlet().named("control")
    asr: Stage = Dictate(endpoint=endpoint / 1000)
    if not dictated:
        asr = Transcribe(lookahead=lookahead, language=options.get("language"), endpoint=endpoint / 1000)
    turns = Turns(**{field.name: getattr(settings, field.name) for field in fields(settings) if field.name in _TURNS})
    graph = (
        (audio >> asr["audio"])
        | (audio >> turns["audio"])
        | (asr >> turns["text"])
        | (asr >> emit().named("captions"))
        | (control >> asr["control"])
        | (control >> turns["control"])
    )
    return graph, asr, turns, control


def _written(asr: Dictate | Transcribe) -> Graph:
    captions = asr.named("captions")
    return (Inlet().named("audio") >> captions["audio"]) | (Inlet().named("control") >> captions["control"])


def _check(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(f"no option {name!r}{did_you_mean(name, known)}: there are {', '.join(known)}")


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    try:
        return float(options.get(name, default))
    except (TypeError, ValueError):
        raise ValueError(f"{name}={options[name]!r}: a number of milliseconds") from None


_TURNS = frozenset(Turns.parameters.parameters)
