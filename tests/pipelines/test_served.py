"""The graphs that a server offers by name."""

from __future__ import annotations

from functools import partial

import pytest

from antiphon.pipelines.graph import Graph
from antiphon.pipelines.served import GRAPHS, captions, converse, dictate, listening
from antiphon.pipelines.stages.converse import Converse
from antiphon.pipelines.stages.dictate import Dictate
from antiphon.pipelines.stages.transcribe import Transcribe
from antiphon.pipelines.stages.turns import Turns


def stage_of(graph: Graph, kind: type) -> object:
    return next(node for node in graph.nodes if isinstance(node, kind))


@pytest.mark.parametrize(
    ("name", "inlets", "outputs"),
    [
        ("captions", {"audio", "control"}, {"captions.out", "turns.events"}),
        ("parrot", {"audio", "control"}, {"captions.out", "turns.events", "parrot.audio", "parrot.said"}),
        ("scenes", {"audio", "control", "video"}, {"captions.out", "turns.events", "scenes.out"}),
        (
            "talk",
            {"audio", "control"},
            {"captions.out", "turns.events", "respond.events", "speak.audio", "reply.out"},
        ),
        ("converse", {"audio", "control"}, {"converse.audio", "converse.said"}),
        ("dictate", {"audio", "control"}, {"captions.out", "turns.events"}),
    ],
)
def test_inlets_and_outputs(name: str, inlets: set[str], outputs: set[str]) -> None:
    graph = GRAPHS[name]({})
    graph.validate()
    assert {graph.names[node] for node in graph.nodes if not node.inputs} == inlets
    assert {f"{graph.names[port.stage]}.{port.name}" for port in graph.open_outputs} == outputs


def test_options_reach_their_stages() -> None:
    turns = {"silence_ms": 300, "mode": "manual"}
    graph = captions({"language": "de-DE", "lookahead_ms": "80", "endpoint_ms": 250, "turns": turns})
    asr, turn = stage_of(graph, Transcribe), stage_of(graph, Turns)
    assert isinstance(asr, Transcribe)
    assert isinstance(turn, Turns)
    assert (asr.language, asr.lookahead, asr.endpoint) == ("de-DE", 80.0, 0.25)
    assert (turn.settings.silence_ms, turn.settings.mode) == (300, "manual")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"langage": "de"}, "did you mean 'language'"),
        ({"lookahead_ms": "soon"}, "lookahead_ms='soon'"),
        ({"endpoint_ms": 0}, "endpoint_ms=0"),
        ({"turns": {"threshold": 7}}, "threshold"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captions(options)


def test_a_model_that_writes_while_it_hears_takes_the_recognisers_place() -> None:
    for name in ("captions", "parrot", "scenes", "talk"):
        usual, dictated = GRAPHS[name]({}), partial(GRAPHS[name], dictated=True)({"endpoint_ms": 250, "language": "fr"})
        dictated.validate()
        assert len(usual.nodes) == len(dictated.nodes)
        assert len(usual.connections) == len(dictated.connections)
        assert not any(isinstance(node, Transcribe) for node in dictated.nodes)
        made = stage_of(dictated, Dictate)
        assert isinstance(made, Dictate)
        assert made.endpoint == 0.25
    with pytest.raises(ValueError, match="endpoint_ms=-1"):
        dictate({"endpoint_ms": -1})
    with pytest.raises(ValueError, match="no option 'lookahead_ms'"):
        dictate({"lookahead_ms": 80})


def test_what_hears_of_a_graph_stands_alone() -> None:
    for name in ("captions", "parrot", "scenes", "talk"):
        served = GRAPHS[name]({"lookahead_ms": 80})
        graph = listening(served)
        graph.validate()
        asr, copy = stage_of(served, Transcribe), stage_of(graph, Transcribe)
        assert isinstance(asr, Transcribe)
        assert isinstance(copy, Transcribe)
        assert (copy.lookahead, copy.endpoint, len(graph.nodes)) == (80.0, asr.endpoint, 3)
    writer = stage_of(listening(dictate({"endpoint_ms": 250})), Dictate)
    assert isinstance(writer, Dictate)
    assert (writer.endpoint, writer.steps) == (0.25, True)
    with pytest.raises(ValueError, match="writes down nothing"):
        listening(converse({}))


def test_a_conversation_has_options_of_its_own() -> None:
    made = stage_of(converse({"text_top_k": 7, "audio_seed": 3}), Converse)
    assert isinstance(made, Converse)
    assert made.options["text_top_k"] == 7
    assert made.options["audio_seed"] == 3
    with pytest.raises(ValueError, match="did you mean 'text_top_k'"):
        converse({"text_topk": 7})
    with pytest.raises(ValueError, match="audio_temperature is -1"):
        converse({"audio_temperature": -1.0})
