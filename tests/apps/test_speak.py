"""``antiphon speak`` and ``antiphon voice`` with small random models: what is written, and one line for errors."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from tiny_speech import MELS, SPEECH, voice, write

from antiphon.apps import voices
from antiphon.apps.cli import main
from antiphon.apps.cli.speak import LIMITS, pieces
from antiphon.codecs import audio_file, prompt_mel
from antiphon.models import hub
from antiphon.models.cosyvoice.voice import Voice
from antiphon.pipelines import speech_checkpoint
from antiphon.pipelines.speech_checkpoint import Loaded, load
from antiphon.pipelines.synthesizer import Synthesizer

SAMPLE = Path(audio_file.__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
TEXT = "It was the best of times. So be it."
RATE = 24000

Ran = tuple[int, str, str]
Antiphon = Callable[..., Ran]


@pytest.fixture
def antiphon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Antiphon:
    """Run a command in this process, with a home of its own: status, standard output, standard error."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["antiphon", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("speech") / "tiny")


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without voices."""
    return write(tmp_path_factory.mktemp("speech") / "mute", voices=False)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    loaded = load(model)
    with Synthesizer(loaded.speech) as models:
        for name, one in loaded.voices.items():
            models.register(name, one)
        return {
            name: np.concatenate([piece.samples for piece in models.speak(TEXT, name, 5)]) for name in loaded.voices
        }


@pytest.mark.parametrize("given", [None, "ada", "file"])
def test_writes_what_the_models_say(antiphon, model, expected, tmp_path, given):
    output = tmp_path / "out.wav"
    named = {"file": model / "voices" / "ada.safetensors", None: None}.get(given, given)
    status, out, err = antiphon(
        "speak", TEXT, "-o", output, "--model", model, "--seed", 5, *(["--voice", named] if named else [])
    )
    assert (status, out) == (0, ""), err
    name = "bob" if given is None else "ada"
    assert re.fullmatch(
        rf"[\d.]+ s of audio; first after [\d.]+ s; real-time factor [\d.]+; tiny, voice {name}, seed 5\n", err
    )
    written = audio_file.read(output, RATE)
    assert written.shape == expected[name].shape
    assert np.abs(written - expected[name]).max() < 1e-4


def test_a_sentence_longer_than_the_flow_remembers_is_said_to_its_end(antiphon, model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[pieces.__module__], "LIMITS", replace(LIMITS, left=20))
    status, _, err = antiphon("speak", TEXT, "-o", tmp_path / "out.wav", "--model", model, "--seed", 5)
    assert status == 0, err
    assert audio_file.read(tmp_path / "out.wav", RATE).shape == expected["bob"].shape


def test_text_may_come_on_standard_input(antiphon, model, expected, tmp_path, monkeypatch):
    class Slow(io.BytesIO):
        def read1(self, size: int = -1) -> bytes:
            return super().read1(5)

    loaded = load(model)
    with Synthesizer(loaded.speech) as models:
        models.register("bob", loaded.voices["bob"])
        said = np.concatenate([piece.samples for piece in models.speak("Grüße, " + TEXT, arriving=True)])
    output = tmp_path / "out.flac"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Slow(TEXT.encode())))
    status, _, err = antiphon("speak", "-o", output, "--model", model, "--seed", 5)  # sentence by sentence
    assert status == 0, err
    assert np.abs(audio_file.read(output, RATE) - expected["bob"]).max() < 1e-4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Slow(("Grüße, " + TEXT).encode())))
    status, _, err = antiphon("speak", "--stream-from-stdin", "-o", output, "--model", model)
    assert status == 0, err
    assert np.abs(audio_file.read(output, RATE) - said).max() < 1e-4


def test_what_is_typed_ends_with_its_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("Hello there\n\nHow are you?  \nfine"))
    assert list(pieces()) == ["Hello there.\n", "\n", "How are you?\n", "fine.\n"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("hello", "-o", "out.xyz"), r"out\.xyz: cannot write \.xyz; use \.wav"),
        (("-o", "out.wav"), r"give the text to speak, or --stream-from-stdin"),
        (("hello", "--stream-from-stdin", "-o", "out.wav"), r"give the text to speak, or --stream-from-stdin"),
        (("hello", "-o", "out.wav", "--voice", "adda"), r"no voice or file 'adda'; did you mean 'ada'\?"),
        (("hello", "-o", "out.wav", "--device", "tpu"), r"no device 'tpu'"),
        (("hello", "-o", "out.wav", "--speaker", "hdmi"), r"-o writes a file, --speaker plays: give one of them"),
        (("... !", "-o", "out.wav"), r"there is nothing to say in this text"),
        (
            ("hello", "-o", "out.wav", "--voice", "long.wav"),
            r"long\.wav: the clip lasts 31\.0 s: cut it, a voice takes 1 to 30",
        ),
    ],
)
def test_one_line_for_what_is_wrong(antiphon, model, tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    if "long.wav" in arguments:
        audio_file.write(Path("long.wav"), np.resize(audio_file.read(SAMPLE, RATE), 31 * RATE), RATE)
    status, out, err = antiphon("speak", *arguments, "--model", model)
    assert (status, out) == (2, "")
    assert re.match(f"antiphon: {match}", err)
    assert err.count("\n") == 1
    assert not Path("out.wav").exists()


def test_a_model_without_voices_says_how_to_make_one(antiphon, mute, tmp_path):
    status, _, err = antiphon("speak", TEXT, "-o", tmp_path / "out.wav", "--model", mute)
    assert status == 2
    assert err == (
        "antiphon: mute comes without voices: name one with --voice; antiphon voice make clip.wav -o NAME makes one\n"
    )


def test_without_a_checkpoint_it_names_the_remedy(antiphon, tmp_path, monkeypatch):
    class NoNetwork:
        def model_info(self, *args: object, **kwargs: object) -> None:
            raise hub.NETWORK_ERRORS[-1]("no route")

    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    monkeypatch.setattr(hub, "snapshot_download", absent)
    monkeypatch.setattr(speech_checkpoint, "embedded", list)
    status, _, err = antiphon("speak", TEXT, "-o", tmp_path / "out.wav")
    assert status == 2
    assert re.fullmatch(r"antiphon: FunAudioLLM/CosyVoice2-0\.5B is not on this computer .*'hf download .*\n", err)


def listening(loaded: Loaded) -> None:
    """Give a model what it makes voices with: tokens and an embedding from the sound's loudness."""

    def voice_of(pcm: np.ndarray, *, text: str = "", name: str = "") -> Voice:
        mel = prompt_mel.PromptMel(MELS)(torch.from_numpy(pcm)[None])[0]
        tokens = (mel[::2].mean(1).abs() * 7).long() % SPEECH
        return Voice.of(tokens, mel, mel.mean(0)[:6], text, name)

    object.__setattr__(loaded, "voice_of", voice_of)


def test_a_voice_is_made_of_a_clip_and_spoken_with(antiphon, model, tmp_path, monkeypatch):
    clip, output = tmp_path / "clip.wav", tmp_path / "out.wav"
    audio_file.write(clip, audio_file.read(SAMPLE, RATE)[9 * RATE : 10 * RATE], RATE)
    original = speech_checkpoint.load

    def loads(*arguments: object, **options: object) -> Loaded:
        loaded = original(*arguments, **options)
        listening(loaded)
        return loaded

    monkeypatch.setattr(speech_checkpoint, "load", loads)
    status, _, err = antiphon("voice", "make", SAMPLE, "-o", "long", "--text", "it was", "--model", model)
    assert status == 0, err
    assert "long.safetensors: a voice of 24.5 s" in err
    status, _, err = antiphon("speak", TEXT, "-o", output, "--model", model, "--voice", "long")
    assert status == 2
    assert re.match(
        r"antiphon: the voice 'long' says \d+ tokens of text in 24\.5 s: .* make it of a shorter clip\n", err
    )
    said = Voice.load(voices.folder() / "long.safetensors")
    replace(said, prompt_text="").save(voices.folder() / "long.safetensors")
    status, _, err = antiphon("speak", TEXT, "-o", output, "--model", model, "--voice", "long")
    assert status == 0, err
    status, _, err = antiphon("voice", "make", clip, "-o", "eve", "--text", "it was", "--model", model)
    assert status == 0, err
    assert "eve.safetensors: a voice of 1.0 s" in err
    made = Voice.load(voices.folder() / "eve.safetensors")
    assert (made.name, made.prompt_text, len(made.prompt_tokens)) == ("eve", "it was", 25)
    assert antiphon("voice", "list")[1] == "eve\nlong\n"
    sounds = []
    for given in ("eve", voices.folder() / "eve.safetensors", clip):
        status, _, err = antiphon("speak", TEXT, "-o", output, "--model", model, "--voice", given)
        assert status == 0, err
        sounds.append(audio_file.read(output, RATE))
    assert np.array_equal(sounds[0], sounds[1])
    assert not np.array_equal(sounds[0][:RATE], sounds[2][:RATE])  # whose text is not known


def test_a_voice_cannot_be_made_of_everything(antiphon, model, tmp_path):
    clip = tmp_path / "clip.wav"
    audio_file.write(clip, audio_file.read(SAMPLE, RATE)[:RATE], RATE)
    short, long, silent = (tmp_path / f"{name}.wav" for name in ("short", "long", "silent"))
    audio_file.write(short, audio_file.read(SAMPLE, RATE)[: RATE // 2], RATE)
    audio_file.write(long, np.resize(audio_file.read(SAMPLE, RATE), 31 * RATE), RATE)
    audio_file.write(silent, np.zeros(5 * RATE, np.float32), RATE)
    for arguments, match in (
        ((long, "-o", "eve"), r".*long\.wav: the clip lasts 31\.0 s: cut it, a voice takes 1 to 30 s"),
        ((short, "-o", "eve"), r".*short\.wav: the clip lasts 0\.5 s: record more, a voice takes 1 to 30 s"),
        ((silent, "-o", "eve"), r".*silent\.wav: the clip is silent: record it louder"),
        ((clip, "-o", "eve"), r"tiny speaks with the voices it has; make voices of clips with FunAudioLLM/CosyVoice2"),
        ((clip, "-o", "eve.wav"), r"eve\.wav: a voice is written to a \.safetensors file"),
        (("missing.wav", "-o", "eve"), r"missing\.wav: no such file"),
    ):
        status, _, err = antiphon("voice", "make", *arguments, "--model", model)
        assert status == 2
        assert re.match(f"antiphon: {match}", err), err
        assert err.count("\n") == 1
    assert voices.made() == []
    assert voice().prompt_text
