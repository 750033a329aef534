"""The ``antiphon`` command: formats, places, live captions, and one clear line for everything that can be wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import wave
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from antiphon.apps.cli import main
from antiphon.apps.cli.outputs import Outputs
from antiphon.apps.cli.transcribe import Latency, Recording, show
from antiphon.codecs import audio_file
from antiphon.pipelines.chunk import Text, Word
from antiphon.pipelines.clock import VirtualClock, run_virtual

SAMPLE = Path(__file__).parents[2] / "apps" / "samples" / "two_cities.flac"
RATE = 16000


@dataclass
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str


Antiphon = Callable[..., Ran]


@pytest.fixture
def antiphon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Antiphon:
    """Run the command in this process."""

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["antiphon", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert "Traceback" not in shown.err
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Five seconds of speech."""
    path = tmp_path / "clip.wav"
    audio_file.write(path, audio_file.read(SAMPLE)[9 * RATE : 14 * RATE], RATE)
    return path


def wav(path: Path, frames: np.ndarray, rate: int = RATE) -> Path:
    """``[n, channels]`` int16 or float32 frames as a WAV file."""
    channels, width = frames.shape[1], frames.dtype.itemsize
    kind = 3 if frames.dtype.kind == "f" else 1
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width, 8 * width)
    data = frames.tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def one_line(text: str, *parts: str) -> None:
    assert text.startswith("antiphon: ")
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text


def test_text_comes_out_with_a_closing_line(antiphon: Antiphon, clip: Path, checkpoint: Path) -> None:
    ran = antiphon("transcribe", clip, "--model", checkpoint)
    assert ran.status == 0
    assert ran.out.strip()
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"5\.0 s of audio in {number} s; real-time factor {number}; "
        rf"first partial after {number} s, final after {number} s\n",
        ran.err,
    )


def test_formats_agree(antiphon: Antiphon, clip: Path, checkpoint: Path) -> None:
    shown = {
        f: antiphon("transcribe", clip, "--model", checkpoint, "-f", f).out for f in ("text", "srt", "vtt", "json")
    }
    recording = json.loads(shown["json"])
    assert recording["audio"] == str(clip)
    assert recording["seconds"] == 5.0
    words = [word["text"] for caption in recording["captions"] for word in caption["words"]]
    assert words == shown["text"].split()
    assert shown["srt"].startswith("1\n00:00:0")
    assert shown["vtt"].startswith("WEBVTT\n\n00:00:0")
    for cues in (shown["srt"], shown["vtt"]):
        assert [word for word in cues.split() if re.fullmatch("[a-z]+", word)] == words


def test_live_captions_are_those_of_the_file(
    antiphon: Antiphon, clip: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = antiphon("transcribe", clip, "--model", checkpoint, "--lookahead", "80").out
    monkeypatch.setattr(asyncio, "run", run_virtual)
    ran = antiphon("transcribe", clip, "--model", checkpoint, "--lookahead", "80", "--realtime")
    assert (ran.status, ran.out) == (0, offline), ran.err
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"5\.0 s of audio; real-time factor {number}; "
        rf"first partial {number} s after its word began, final {number} s after its last word\n",
        ran.err,
    )


def test_live_latency_counts_from_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Two captions: shown 0.4 and 0.6 s after their first word began, final 1.1 and 1.3 s after their last ended."""

    async def captions() -> AsyncIterator[Text]:
        for start, partial, final in ((1.0, 1.4, 2.6), (5.0, 5.6, 6.8)):
            words = (Word("one", start, start + 0.2), Word("two", start + 0.3, start + 0.5))
            await asyncio.sleep(partial - asyncio.get_running_loop().time())
            yield Text(text="one", words=words[:1], rate=RATE)
            await asyncio.sleep(final - asyncio.get_running_loop().time())
            yield Text(text="one two", words=words, rate=RATE, final=True)

    async def shown() -> str:
        latency = Latency()
        with Outputs(["a.wav"], "text", None, in_turn=True) as outputs:
            await show(captions(), VirtualClock(), Recording("a.wav", 8.0), outputs, latency)
        return str(latency)

    expected = "first partial 0.50 s after its word began, final 1.20 s after its last word"
    assert run_virtual(shown()) == expected
    assert capsys.readouterr().out == "one two\none two\n"


def test_several_files_follow_each_other(antiphon: Antiphon, clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.flac"
    audio_file.write(other, audio_file.read(SAMPLE)[4 * RATE : 6 * RATE], RATE)
    alone = [antiphon("transcribe", path, "--model", checkpoint).out for path in (clip, other)]
    both = antiphon("transcribe", clip, other, "--model", checkpoint).out
    assert both == f"==> {clip} <==\n{alone[0]}==> {other} <==\n{alone[1]}"
    lines = antiphon("transcribe", clip, other, "--model", checkpoint, "-f", "json").out.splitlines()
    assert [json.loads(line)["audio"] for line in lines] == [str(clip), str(other)]


def test_output_goes_to_a_file_or_a_folder(antiphon: Antiphon, clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = antiphon("transcribe", clip, "--model", checkpoint).out
    ran = antiphon("transcribe", clip, "--model", checkpoint, "-o", tmp_path / "one.txt")
    assert (ran.status, ran.out) == (0, "")
    assert (tmp_path / "one.txt").read_text() == text
    same_name = tmp_path / "clip.flac"
    audio_file.write(same_name, audio_file.read(clip), RATE)
    ran = antiphon("transcribe", clip, same_name, "--model", checkpoint, "-f", "srt", "-o", tmp_path / "all")
    assert ran.status == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["clip.flac.srt", "clip.wav.srt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CLIP", "-o", "CLIP"], "is one of the recordings"),
        (["CLIP", "CLIP"], "is given twice"),
        (["CLIP", "SAMPLE", "-f", "srt"], "add --output FOLDER"),
        (["CLIP", "-o", "CLIP/under.txt"], "cannot write"),
        (["CLIP", "SAMPLE", "-o", "CLIP"], "need a folder"),
        (["-", "--realtime"], "standard input cannot be played"),
        (["CLIP", "--lookahead", "100"], "no lookahead of 100 ms; it has: 0, 80, 480, 1040"),
        (["CLIP", "--language", "fr-FR"], "no choice of language"),
        (["CLIP", "--format", "xml"], "'xml' is not one of"),
        (["CLIP", "--modle", "x"], "No such option: --modle"),
        (["CLIP", "--device", "warp"], "no device 'warp': use cpu, cuda"),
        (["CLIP", "--device", "cuda:99"], "there is no cuda:99 here"),
        ([], "Missing argument"),
    ],
)
def test_wrong_use_is_one_line(
    antiphon: Antiphon, clip: Path, checkpoint: Path, arguments: list[str], message: str
) -> None:
    given = [argument.replace("CLIP", str(clip)).replace("SAMPLE", str(SAMPLE)) for argument in arguments]
    ran = antiphon("transcribe", *given, *(["--model", str(checkpoint)] if given else []))
    assert (ran.status, ran.out) == (2, "")
    one_line(ran.err, message)


@pytest.mark.parametrize("realtime", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"words, not sound\n" * 99, "not a recording"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\0\0\0\0", "holds no audio"),
    ],
)
def test_what_is_no_recording_is_one_line(
    antiphon: Antiphon,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    message: str,
    realtime: bool,
) -> None:
    monkeypatch.setattr(asyncio, "run", run_virtual)
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    ran = antiphon("transcribe", path, "--model", checkpoint, *(["--realtime"] if realtime else []))
    assert (ran.status, ran.out) == (2, "")
    one_line(ran.err, str(path), message)


def test_a_bad_file_among_good_ones_stops_none_of_them(antiphon: Antiphon, clip: Path, checkpoint: Path) -> None:
    alone = antiphon("transcribe", clip, "--model", checkpoint).out
    ran = antiphon("transcribe", "missing.wav", clip, "--model", checkpoint)
    assert ran.status == 2
    assert alone in ran.out
    lines = ran.err.splitlines()
    assert lines[0] == "antiphon: missing.wav: no such file"
    assert lines[-1] == "antiphon: 1 of 2 files could not be read"


def test_truncated_is_captioned_as_far_as_it_goes(antiphon: Antiphon, clip: Path, checkpoint: Path) -> None:
    clip.write_bytes(clip.read_bytes()[: 2 * 2 * RATE])
    ran = antiphon("transcribe", clip, "--model", checkpoint)
    assert ran.status == 0
    assert ran.out.strip()
    assert ran.err.splitlines()[0] == f"antiphon: warning: {clip}: cut short; read 2.0 s"


def test_channels_do_not_matter(antiphon: Antiphon, clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    frames = np.round(audio_file.read(clip) * 32768).astype("<i2")[:, None]
    eight = wav(tmp_path / "eight.wav", np.repeat(frames, 8, axis=1))
    assert (
        antiphon("transcribe", eight, "--model", checkpoint).out
        == antiphon("transcribe", clip, "--model", checkpoint).out
    )


def test_telephone_rate_silence_and_nan_are_results(antiphon: Antiphon, checkpoint: Path, tmp_path: Path) -> None:
    slow = wav(
        tmp_path / "slow.wav", np.round(audio_file.read(SAMPLE, 8000)[:16000] * 32767).astype("<i2")[:, None], 8000
    )
    ran = antiphon("transcribe", slow, "--model", checkpoint)
    assert ran.status == 0
    assert ran.err.startswith("2.0 s of audio")
    silent = wav(tmp_path / "silent.wav", np.zeros((2 * RATE, 1), "<i2"))
    broken = wav(tmp_path / "nan.wav", np.full((2 * RATE, 1), np.nan, "<f4"))
    quiet, nan = (antiphon("transcribe", path, "--model", checkpoint) for path in (silent, broken))
    assert quiet.status == nan.status == 0
    assert quiet.out == nan.out
    assert (
        nan.err.splitlines()[0] == f"antiphon: warning: {broken}: 32000 samples were not numbers and count as silence"
    )


def test_standard_input(antiphon: Antiphon, clip: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(clip.read_bytes())))
    ran = antiphon("transcribe", "-", "--model", checkpoint, "-f", "json")
    assert json.loads(ran.out)["audio"] == "standard input"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("parakeet_realtime_eou_120m-v2", "nvidia/parakeet_realtime_eou_120m-v1"),
        ("nemotron-speech-streaming", "nvidia/nemotron-speech-streaming-en-0.6b"),
    ],
)
def test_a_wrong_model_name_suggests_the_nearest(antiphon: Antiphon, clip: Path, name: str, nearest: str) -> None:
    ran = antiphon("transcribe", clip, "--model", name)
    assert ran.status == 2
    one_line(ran.err, name, f"did you mean '{nearest}'?")


class Payload:
    """What a malicious pickle would do: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_bad_checkpoints_are_one_line_and_run_nothing(
    antiphon: Antiphon, clip: Path, checkpoint: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made-by-the-pickle"
    weights = pickle.dumps(Payload(made))
    (tmp_path / "folder").mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (tmp_path / "folder" / file.name).write_bytes(content[: len(content) // 2] if "model" in file.name else content)
    (tmp_path / "empty").mkdir()
    bad = [
        archive(tmp_path / "pickle.nemo", {"./model_config.yaml": b"encoder: {}", "./model_weights.ckpt": weights}),
        archive(tmp_path / "outside.nemo", {"../../made-by-the-pickle": b"x", "./model_weights.ckpt": weights}),
        tmp_path / "folder",
        tmp_path / "empty",
        clip,
    ]
    for path in bad:
        ran = antiphon("transcribe", clip, "--model", path)
        assert ran.status == 2, path
        one_line(ran.err, str(path))
    assert not made.exists()
    assert not (tmp_path.parent / made.name).exists()


def test_an_interrupt_is_quiet(
    antiphon: Antiphon, clip: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("antiphon.apps.cli.transcribe._batch", interrupted)
    ran = antiphon("transcribe", clip, "--model", checkpoint)
    assert (ran.status, ran.out, ran.err) == (130, "", "")


def test_models_lists_what_is_known(antiphon: Antiphon) -> None:
    ran = antiphon("models")
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert {len(row) for row in rows} == {7}
    (row,) = [row for row in rows if row[0] == "nvidia/parakeet_realtime_eou_120m-v1"]
    assert row[1] == "recognition"
    assert row[4:] == ["80", "English", "NVIDIA Open Model License"]
    assert {"moshiko", "stt-2.6b-en", "FunAudioLLM/CosyVoice2-0.5B", "kyutai/mimi"} < {row[0] for row in rows}
    embedded = {row[0]: row[1] for row in rows if row[2] == "embedded"}
    assert {"recognition", "full-duplex dialogue"} <= set(embedded.values())


def test_models_reads_the_card_of_an_embedded_one(
    antiphon: Antiphon, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antiphon.models.conformer.hub.EMBEDDED", checkpoint.parent)
    row = antiphon("models").out.splitlines()[0].split("\t")
    assert row == [checkpoint.name, "recognition", "embedded", "0 MB", "480, 0, 80, 1040", "en", "apache-2.0"]


def test_version_and_bench(antiphon: Antiphon) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", antiphon("version").out)
    assert "runtime" in antiphon("bench").out
    ran = antiphon("bench", "rutime")
    assert ran.status == 2
    one_line(ran.err, "did you mean 'runtime'?")
    ran = antiphon("no-such-command")
    assert ran.status == 2
    one_line(ran.err, "no-such-command")


def process(*arguments: str | Path, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "from antiphon.apps.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, antiphon.apps.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_hub_name_without_a_network_is_one_line(clip: Path) -> None:
    out, err = (
        running := process("transcribe", clip, "--model", "nvidia/nemotron-speech-streaming-en-0.6b")
    ).communicate()
    assert (running.returncode, out) == (2, b"")
    one_line(err.decode(), "hub cannot be reached", "hf download nvidia/nemotron-speech-streaming-en-0.6b")


def test_a_reader_that_leaves_early_is_no_error(clip: Path, checkpoint: Path) -> None:
    running = process("transcribe", clip, "--model", checkpoint)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    err = running.stderr.read().decode()
    assert running.wait() == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_a_minute(checkpoint: Path, tmp_path: Path) -> None:
    """Sparse recordings of silence: the peak of the whole command."""
    code = """
import resource, sys
from antiphon.pipelines.transcription import Transcriber
with Transcriber(sys.argv[1], 1040) as transcriber:
    for path in sys.argv[2:]:
        for _ in transcriber.transcribe(path): pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    paths = []
    for minutes in (1, 60):
        paths.append(str(tmp_path / f"{minutes}.wav"))
        with wave.open(paths[-1], "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(b"\0\0")
        size = minutes * 60 * RATE * 2
        with open(paths[-1], "r+b") as raw:
            raw.seek(4)
            raw.write(struct.pack("<I", 36 + size))
            raw.seek(40)
            raw.write(struct.pack("<I", size))
            raw.truncate(44 + size)
    command = [sys.executable, "-c", code, str(checkpoint), *paths]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    short, long = map(int, out.split())
    assert (long - short) * 1024 < 16 * 2**20
