"""The ``antiphon`` command. Each command's work is in the module of its name, imported when it is called, so that
``antiphon --help`` does not wait for torch.

An error is one line on standard error and exit status 2; an interrupt is exit status 130.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, complain

app = typer.Typer(
    name="antiphon",
    help="Real-time speech and video models for many people at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# click.ClickException: typer brings its own copy of click from 0.26 on and exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


class Format(StrEnum):
    """How captions are written."""

    text = "text"
    srt = "srt"
    vtt = "vtt"
    json = "json"


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Audio or video files; - for standard input.", metavar="FILE...")],
    model: Annotated[str | None, typer.Option(help="Embedded or hub name, or a path; see antiphon models.")] = None,
    lookahead: Annotated[float | None, typer.Option(help="Milliseconds the model may hear ahead: 0, 80, ...")] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.text,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play the file at its own pace, captioned live.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File, or folder for several files.")] = None,
    language: Annotated[str | None, typer.Option(help="For models with a choice of language, such as en-US.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="beam, rnnt or ctc (both greedy, cheaper); by default the model's own.")
    ] = None,
) -> None:
    """Turn speech into text."""
    from .transcribe import run

    run(
        files,
        model=model,
        lookahead=lookahead,
        format=format.value,
        realtime=realtime,
        output=output,
        language=language,
        device=device,
        decoder=decoder,
    )


@app.command()
def listen(
    device: Annotated[
        str | None, typer.Option(help="Microphone, by number or part of its name; see antiphon mic --list.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Embedded or hub name, or a path; see antiphon models.")] = None,
    lookahead: Annotated[float | None, typer.Option(help="Milliseconds the model may hear ahead: 0, 80, ...")] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.text,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the captions.")] = None,
    language: Annotated[str | None, typer.Option(help="For models with a choice of language, such as en-US.")] = None,
    record: Annotated[Path | None, typer.Option(help="Keep the sound too: .flac, .wav, .opus, .mp3.")] = None,
    echo_cancel: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Take out what this device hears: the monitor of your loudspeaker."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="End after so long; else Ctrl-C ends it.")] = None,
    compute: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Caption the microphone, live. Ctrl-C ends it."""
    from .listen import run

    run(
        device=device,
        model=model,
        lookahead=lookahead,
        format=format.value,
        output=output,
        language=language,
        record=record,
        echo_of=echo_cancel,
        seconds=seconds,
        compute=compute,
    )


@app.command()
def mic(
    list_devices: Annotated[bool, typer.Option("--list", "-l", help="List the sound devices.")] = False,
    device: Annotated[str | None, typer.Option(help="Microphone to test, by number or part of its name.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to test it.")] = 5.0,
) -> None:
    """Test a microphone's level, or list the sound devices."""
    from .mic import run

    run(list_devices=list_devices, device=device, seconds=seconds)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a secret and TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    graph: Annotated[
        str, typer.Option(help="captions, parrot, scenes, converse, dictate, talk, or a YAML file.")
    ] = "captions",
    model: Annotated[str | None, typer.Option(help="Embedded or hub name, or a path; see antiphon models.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    lookahead: Annotated[
        list[float] | None, typer.Option(help="Milliseconds that clients may choose; repeatable. All by default.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="beam, rnnt or ctc (both greedy, cheaper); by default the model's own.")
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Calls at a time; more are refused.")] = 32,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key, PEM.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, on a network that you trust.")] = False,
    behind_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address of a proxy in front, which has TLS and sets X-Forwarded-For; repeatable."),
    ] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Other origins whose pages may connect; repeatable.")] = None,
    wyoming_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve Home Assistant's Wyoming protocol too, usually 10300.")
    ] = None,
    speech_model: Annotated[
        str | None,
        typer.Option(help="What speaks in --graph talk and /v1/audio/speech, by name or path; else what is embedded."),
    ] = None,
    voice: Annotated[
        list[str] | None,
        typer.Option(help="Speak with these, as of antiphon speak; repeatable, the first is the default."),
    ] = None,
    llm_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that --graph talk asks, such as Ollama's .../v1.")
    ] = None,
    llm_model: Annotated[str | None, typer.Option(help="What the endpoint calls its model.")] = None,
    instructions: Annotated[str, typer.Option(help="What the language model is told first.")] = "",
    context: Annotated[
        float | None, typer.Option(min=1, help="Seconds that a dialogue model looks back; by default as trained.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="Its first frames of 80 ms that stay in reach for ever.")] = 0,
    kv_fp8: Annotated[
        bool, typer.Option("--kv-fp8", help="Keep what it looks back on in 8 bits: more calls in the same memory.")
    ] = False,
    restart_after: Annotated[
        float | None, typer.Option(min=3, help="Minutes after which a dialogue starts over from its last two.")
    ] = None,
    voice_prompts: Annotated[
        Path | None,
        typer.Option(help="Folder of clips or .pt files: the voices that calls of PersonaPlex may name."),
    ] = None,
) -> None:
    """Serve live captions, or another graph, to browsers (WebRTC), telephones and programs."""
    from .serve import Memory, run

    run(
        host=host,
        port=port,
        graph=graph,
        model=model,
        device=device,
        lookaheads=lookahead,
        decoder=decoder,
        max_sessions=max_sessions,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        proxies=behind_proxy or (),
        origins=origin or (),
        wyoming_port=wyoming_port,
        speech_model=speech_model,
        voices=voice or (),
        llm_url=llm_url,
        llm_model=llm_model,
        instructions=instructions,
        memory=Memory(context, sinks, kv_fp8, restart_after),
        voice_prompts=voice_prompts,
    )


@app.command()
def talk(
    model: Annotated[str | None, typer.Option(help="moshiko, or another hub name or path; antiphon models.")] = None,
    file: Annotated[
        str | None, typer.Option(help="Talk with a recording in place of the microphone.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", help="File for that dialogue: you left, the model right.", metavar="FILE")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep the dialogue: .flac, .wav, .opus, .mp3.", metavar="FILE")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Microphone, by number or part of its name; see antiphon mic --list."),
    ] = None,
    output_device: Annotated[
        str | None, typer.Option("--output", metavar="DEVICE", help="Loudspeaker, by number or part of its name.")
    ] = None,
    echo_cancel: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Take out what this device hears, a monitor, or speaker: what is said here. Headphones need neither.",
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="End after so long; else Ctrl-C ends it.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same one, and the model draws the same.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the voice: 0 takes the likeliest; by default the model's own.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of the voice: draw from so many, 0 for all.")] = None,
    text_temperature: Annotated[float | None, typer.Option(min=0, help="Of what is said.")] = None,
    text_top_k: Annotated[int | None, typer.Option(min=0, help="Of what is said.")] = None,
    text_prompt: Annotated[str, typer.Option(help="Who the model is to be, for PersonaPlex.")] = "",
    voice_prompt: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The voice it is to have, for PersonaPlex: a clip or a .pt."),
    ] = None,
    compute: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Talk with a model that hears and speaks at the same time. Ctrl-C ends it."""
    from .talk import run

    sampling = {
        "text_seed": seed,
        "audio_seed": seed,
        "audio_temperature": temperature,
        "audio_top_k": top_k,
        "text_temperature": text_temperature,
        "text_top_k": text_top_k,
    }
    run(
        model=model,
        file=file,
        output=output,
        record=record,
        microphone=input,
        speaker=output_device,
        echo_of=echo_cancel,
        seconds=seconds,
        sampling=sampling,
        compute=compute,
        text_prompt=text_prompt,
        voice_prompt=voice_prompt,
    )


@app.command()
def codec(
    file: Annotated[str, typer.Argument(help="Audio or video file; - for standard input.", metavar="FILE")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the result: .wav, .flac, .opus, .mp3.")],
    codebooks: Annotated[int, typer.Option(min=1, help="Codes a frame; more sound better.")] = 8,
    model: Annotated[str, typer.Option(help="Hub name, or a path.")] = "kyutai/mimi",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Hear what the Mimi codec leaves of a recording."""
    from .codec import run

    run(file, output=output, codebooks=codebooks, model=model, device=device)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say; else what is piped in.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File: .wav, .flac, .opus, .mp3; else it is played.")
    ] = None,
    voice: Annotated[
        str | None,
        typer.Option(
            help="Name (heart, michael, emma of what is embedded), or a file: of antiphon voice make, or a clip."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Embedded or hub name, or a path.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another one says it another way.")] = 0,
    stream_from_stdin: Annotated[
        bool, typer.Option("--stream-from-stdin", help="Speak what comes on standard input, as it comes.")
    ] = False,
    speaker: Annotated[
        str | None, typer.Option(help="Loudspeaker, by number or part of its name; see antiphon mic --list.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
) -> None:
    """Turn text into speech."""
    from .speak import run

    run(
        text,
        output=output,
        voice=voice,
        model=model,
        seed=seed,
        stream_from_stdin=stream_from_stdin,
        speaker=speaker,
        device=device,
    )


voices = typer.Typer(help="Voices to speak with.", no_args_is_help=True)
app.add_typer(voices, name="voice")


@voices.command("make")
def make_voice(
    clip: Annotated[str, typer.Argument(help="A recording of 3 to 30 seconds of one speaker.", metavar="CLIP")],
    output: Annotated[str, typer.Option("--output", "-o", help="A name, or a .safetensors file.")],
    text: Annotated[str, typer.Option(help="What is said in it.")] = "",
    model: Annotated[str | None, typer.Option(help="Hub name or path of the model that is to speak.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
) -> None:
    """Make a voice of a recording."""
    from .voice import make

    make(clip, output=output, text=text, model=model, device=device)


@voices.command("list")
def list_voices() -> None:
    """The voices made on this computer."""
    from ..voices import made

    for name in made():
        print(name)


@app.command()
def token(
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long it may be used to join.")] = 60.0,
) -> None:
    """Make a token for joining a server whose ANTIPHON_SECRET is set here."""
    from .serve import token as make

    make(seconds)


@app.command()
def models() -> None:
    """List the models: embedded, on this computer, and known by name."""
    from .models import run

    run()


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure: antiphon bench NAME [OPTIONS]. Without a name, list the benchmarks."""
    from .programs import BENCHMARKS, run

    run("bench", BENCHMARKS, context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Make a checkpoint: antiphon train NAME [OPTIONS]. Without a name, list the recipes."""
    from .programs import RECIPES, run

    run("train", RECIPES, context.args)


@app.command()
def version() -> None:
    """Print the version."""
    from ... import __version__

    print(__version__)


def main() -> None:
    """The console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to programmers; ours are shown as lines
    # Torch's threads wait for each other after every small operation. Where they spin there for milliseconds, they keep
    # the core that the last of them needs, on a computer that has other work too.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        # The reader has what it wanted; nothing may be left to flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except CommandError as error:
        complain(str(error))
        status = 2
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message:
            complain(f"{message} (try: antiphon --help)")
        status = 2
    sys.exit(status or 0)
