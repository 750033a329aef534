"""``antiphon serve``: the server for browsers, telephones and programs; ``antiphon token``: a token to join it."""

from __future__ import annotations

import gc
import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn

from ... import load_graph
from ...codecs.audio_file import AudioError
from ...models.conformer.checkpoint import CheckpointError, load
from ...models.conformer.hub import embedded
from ...models.cosyvoice.flow_config import FlowLimits
from ...models.moshi.config import FRAME_RATE
from ...models.silero import SileroVAD
from ...pipelines import duplex, speech_checkpoint, voice_prompts
from ...pipelines.engine import Engine
from ...pipelines.engine.engines import Engines
from ...pipelines.graph import Graph
from ...pipelines.recognizer import Recognizer
from ...pipelines.served import GRAPHS, talk
from ...pipelines.spec import SpecError
from ...pipelines.stages.converse import Converse
from ...pipelines.stages.dictate import Dictate
from ...pipelines.stages.speak import Speak
from ...transport.guard import Rules
from ...transport.protocols import twilio
from ...transport.service import GraphMaker, Service
from ...transport.tokens import Signer
from ..serve.app import PAGE, create_app
from ..serve.server import apart, configure
from ..voices import find as find_voice
from .console import CommandError, stderr
from .dictate import writes
from .transcribe import check_device

SECRET = "ANTIPHON_SECRET"
TWILIO_TOKEN = "ANTIPHON_TWILIO_TOKEN"
LLM_KEY = "ANTIPHON_LLM_KEY"
INSTRUCTIONS = "You talk with someone aloud. Answer in one or two short sentences, in words only: no lists, no mark-up."
# Mel frames that the flow looks back on, beside the voice's prompt: 3 s. With the embedded voice, in passages of 9 and
# of 17 s, that is the shortest window whose worst second lies no farther from the exact frames than that of another
# draw of noise; PLCMOS stays within its error, misheard words within two of 670 (antiphon bench speech_window). A
# session of CosyVoice2-0.5B's sizes, whose quality was not measured, takes 347 MB; with 10 s it would be 1155.
SPEECH_FRAMES = 150
INTERRUPTED = 130  # the status of a program that Ctrl-C ended


@dataclass(frozen=True)
class Memory:
    """What a dialogue model remembers. context: seconds it looks back, None as trained. sinks: first frames that stay
    in reach. fp8: whether all that is kept in 8 bits. restart_after: minutes; None: never."""

    context: float | None = None
    sinks: int = 0
    fp8: bool = False
    restart_after: float | None = None

    def graph(self, make: GraphMaker) -> GraphMaker:
        """The graphs of a maker of dialogues, with these restarts. Raises CommandError for another maker."""
        if self.restart_after is None:
            return make
        if make is not GRAPHS["converse"]:
            raise CommandError("--restart-after goes with --graph converse; a graph in YAML has it as an option")
        fixed = {"restart_after": self.restart_after * 60}
        return lambda options: make({**options, **fixed})

    def load(self, model: str, device: str, *, restarts: bool) -> duplex.Duplex:
        """A model that remembers so. Raises CheckpointError."""
        return duplex.load(
            model,
            device=device,
            window=None if self.context is None else round(self.context * FRAME_RATE),
            sinks=self.sinks,
            prefill=duplex.PREFILL if restarts else None,
            kv_dtype=torch.float8_e4m3fn if self.fp8 else None,
        )


def run(
    *,
    host: str,
    port: int,
    graph: str,
    model: str | None,
    device: str | None,
    lookaheads: Sequence[float] | None,
    decoder: str | None = None,
    max_sessions: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    proxies: Sequence[str],
    origins: Sequence[str],
    wyoming_port: int | None,
    speech_model: str | None = None,
    voices: Sequence[str] = (),
    llm_url: str | None = None,
    llm_model: str | None = None,
    instructions: str = "",
    memory: Memory | None = None,
    voice_prompts: Path | None = None,
) -> None:
    """See ``antiphon serve --help``. Raises CommandError."""
    memory = memory or Memory()
    check_device(device)
    rules = _rules(host, tls_cert, tls_key, insecure, proxies, origins)
    make = _graph(graph) if graph != "talk" else _talk(llm_url, llm_model, instructions)
    service = Service(
        memory.graph(_heard_by(model, graph, make)),
        None,
        name=Path(graph).stem,
        max_calls=max_sessions,
        signer=rules.signer,
        starting="loading and warming the models",
    )
    if llm_url is not None and graph != "talk":
        raise CommandError(f"--llm-url goes with --graph talk, not with {graph}")
    info: dict[str, Any] = {}
    failures: list[Exception] = []
    console = stderr()
    scheme = "https" if tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host

    async def start() -> None:
        try:
            with console.status("Loading and warming the models"):
                load = partial(
                    _engine, service.graph({}), model, device, lookaheads, decoder, max_sessions, memory, voice_prompts
                )
                service.engine, service.native, found = await apart(load)
                if speech_model or voices or any(isinstance(node, Speak) for node in service.graph({}).nodes):
                    add = partial(_add_speech, service.engine, speech_model, voices, max_sessions)
                    found |= await apart(add)
        except (CheckpointError, AudioError, ImportError, RuntimeError, ValueError) as error:
            failures.append(error)
            server.should_exit = True
            return
        info.update(found)
        gc.collect()
        gc.freeze()  # what lives as long as the server need not be looked at again
        service.starting = ""
        console.print(f"{service.name}: {scheme}://{shown}:{port}  (Ctrl-C ends it)")
        if rules.secret is not None:
            console.print("Clients need a token: antiphon token", style="dim")

    app = create_app(service, rules, info=info, start=start, beside=_wyoming(service, host, wyoming_port))
    server = uvicorn.Server(configure(app, host=host, port=port, tls_cert=tls_cert, tls_key=tls_key, proxies=proxies))
    try:
        listener = server.config.bind_socket()
    except SystemExit as error:
        raise CommandError(f"cannot listen on {host}:{port}: it is taken or not allowed; choose --port") from error
    try:
        server.run([listener])
    finally:
        listener.close()
        if service.engine is not None:
            service.engine.close()
        elif not failures:  # interrupted while the models load, which nothing can stop but the end of the process
            os._exit(INTERRUPTED)
    if failures:
        raise CommandError(str(failures[0])) from failures[0]


def token(seconds: float) -> None:
    """See ``antiphon token --help``. Raises CommandError."""
    secret = os.environ.get(SECRET)
    if not secret:
        raise CommandError(f"{SECRET} is not set: give it the server's secret")
    print(_signer(secret).issue("join", "cli", seconds))


def _rules(
    host: str, cert: Path | None, key: Path | None, insecure: bool, proxies: Sequence[str], origins: Sequence[str]
) -> Rules:
    if (cert is None) != (key is None):
        raise CommandError("--tls-cert and --tls-key go together")
    for path in (cert, key):
        if path is not None and not path.is_file():
            raise CommandError(f"no file {path}")
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise CommandError(f"--behind-proxy {proxy}: {error}; give an address such as 127.0.0.1") from error
    loopback = (host == "localhost" or _is_loopback(host)) and not proxies
    reached = "a server behind a proxy" if proxies else host
    secret = os.environ.get(SECRET) or None
    signer = Signer() if secret is None else _signer(secret)
    if not loopback:
        if secret is None:
            raise CommandError(
                f"{reached} can be reached from other machines: set {SECRET} to 32 or more random characters "
                "(openssl rand -hex 32), which clients then need"
            )
        if cert is None and not insecure and not proxies:
            raise CommandError(
                f"{reached} can be reached from other machines: give --tls-cert and --tls-key (browsers grant a "
                "microphone only over TLS), or --behind-proxy with the address of one that has TLS"
            )
    token = os.environ.get(TWILIO_TOKEN)
    signed = {twilio.PATH: twilio.signed_with(token)} if token else {}
    public = (*PAGE, "/js/", "/static/")
    return Rules(loopback, secret, signer, tuple(origins), public=public, signed=signed, proxies=tuple(proxies))


def _signer(secret: str) -> Signer:
    try:
        return Signer(secret)
    except ValueError as error:
        raise CommandError(f"{SECRET}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _graph(name: str) -> GraphMaker:
    if name in GRAPHS:
        return GRAPHS[name]
    path = Path(name)
    if not path.is_file():
        raise CommandError(f"no graph {name!r}: use {', '.join(GRAPHS)} or the path of a YAML file")
    try:
        graph: Graph = load_graph(path)
    except (SpecError, OSError) as error:
        raise CommandError(str(error)) from error

    def fixed(options: Mapping[str, Any]) -> Graph:
        return graph

    return fixed


def _heard_by(model: str | None, graph: str, make: Callable[..., Graph]) -> GraphMaker:
    """The maker, or where this model writes while it hears, the same with it as the recogniser."""
    if graph not in ("captions", "parrot", "scenes", "talk") or not writes(model):
        return make
    return partial(make, dictated=True)


def _talk(url: str | None, model: str | None, instructions: str) -> GraphMaker:
    """Dialogues with the language model behind an endpoint, or with one who only echoes."""
    if (url is None) != (model is None):
        raise CommandError("--llm-url and --llm-model go together")
    if url is None or model is None:
        return partial(talk, instructions=instructions)
    from ..chat import Chat

    try:
        chat = Chat(url, model, os.environ.get(LLM_KEY))
    except ValueError as error:
        raise CommandError(f"--llm-url {error}") from error
    return partial(talk, answer=chat, instructions=instructions or INSTRUCTIONS)


def _add_speech(
    engine: Engine | Engines, model: str | None, names: Sequence[str], slots: int
) -> dict[str, Any]:  # fmt: skip
    """Add what speaks to the engine, with the voices of these names (none: all its own); what ``/info`` says of it."""
    main = engine.engines[0] if isinstance(engine, Engines) else engine
    limits = FlowLimits(left=SPEECH_FRAMES, rolling=True, voices=1, prompt=1)
    loaded = speech_checkpoint.load(model, device=main.device, limits=limits)
    chosen = [find_voice(loaded, name) for name in names] or list(loaded.voices.items()) or [find_voice(loaded, None)]
    speech = loaded.speech.with_room_for(voice for _, voice in chosen)
    speech.install(main, slots=slots)
    for name, voice in chosen:
        speech.register(main, name, voice)
    return {"speech_model": loaded.name, "voices": [name for name, _ in chosen]}


def _engine(
    graph: Graph,
    model: str | None,
    device: str | None,
    lookaheads: Sequence[float] | None,
    decoder: str | None,
    slots: int,
    memory: Memory,
    voices: Path | None = None,
) -> tuple[Engine | Engines, str | None, dict[str, Any]]:
    """The engine, the language that its recogniser is not told, and what ``/info`` says of it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    main = Engine(device)
    node = next((node for node in graph.nodes if isinstance(node, Converse | Dictate)), None)
    if node is not None:
        name = model or (duplex.default() if isinstance(node, Converse) else duplex.PUBLISHED_WRITER)
        loaded = memory.load(name, device, restarts=getattr(node, "restart_after", None) is not None)
        spoken = {} if voices is None else {"voice_prompts": voice_prompts.add(loaded, voices)}
        main.add(node.model, loaded, slots=slots)
        native, about = None, _about(name, loaded, main) | spoken
        if isinstance(node, Converse):
            return main, native, about
    elif memory != Memory() or voices is not None:
        raise ValueError("--context, --sinks, --kv-fp8 and --voice-prompts go with a dialogue model: --graph converse")
    else:
        checkpoint = load(model, device=device)
        recognizer = Recognizer(checkpoint, decoder)
        variants = [recognizer.variant(one) for one in lookaheads] if lookaheads else None
        main.add("asr", recognizer, slots=slots, variants=variants)
        native = None if checkpoint.prompt is not None else "en"
        about = _about(model or embedded()[0], checkpoint, main)
    cpu = main if main.device.type == "cpu" else Engine("cpu")
    cpu.add("vad", SileroVAD(), slots=slots)
    return (main if cpu is main else Engines(main, cpu)), native, about


def _about(model: str, network: torch.nn.Module, engine: Engine) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
    }


def _wyoming(service: Service, host: str, port: int | None) -> Callable[[], AbstractAsyncContextManager[None]] | None:
    if port is None:
        return None

    @asynccontextmanager
    async def beside() -> AsyncIterator[None]:
        from ...transport.protocols.wyoming import serve

        server = await serve(service, host, port)
        try:
            yield
        finally:
            server.close()

    return beside
