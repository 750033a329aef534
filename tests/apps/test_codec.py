"""``antiphon codec`` with a small random codec: what it writes, what it says, and one clear line for what is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon.apps.cli import main
from antiphon.codecs import audio_file
from antiphon.codecs.mimi import Mimi, MimiConfig
from antiphon.codecs.mimi_checkpoint import load, save
from antiphon.models import hub

SAMPLE = Path(audio_file.__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
CONFIG = MimiConfig(channels=4, width=32, layers=1, heads=2, feedforward=64, codebooks=8, bins=64, code_width=8)
RATE = CONFIG.sample_rate

Ran = tuple[int, str, str]
Antiphon = Callable[..., Ran]


@pytest.fixture
def antiphon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Antiphon:
    """Run the command in this process: status, standard output, standard error."""

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["antiphon", "codec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in our layout."""
    torch.manual_seed(3)
    mimi = Mimi(CONFIG)
    for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        branch.codebooks.embedding.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("codec")
    save(folder, mimi)
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Three seconds of speech, which are 37 frames and a half."""
    path = tmp_path / "clip.wav"
    audio_file.write(path, audio_file.read(SAMPLE, RATE)[9 * RATE : 12 * RATE], RATE)
    return path


@torch.no_grad()
@pytest.mark.parametrize("codebooks", [1, 3, 8])
def test_writes_what_the_codec_leaves(antiphon, model, clip, tmp_path, codebooks):
    output = tmp_path / "out.wav"
    status, out, err = antiphon(clip, "-o", output, "--codebooks", codebooks, "--model", model)
    assert (status, out) == (0, "")
    kbits = f"{12.5 * codebooks * 6 / 1000:g}"
    assert re.fullmatch(
        rf"3\.0 s of audio in [\d.]+ s; real-time factor [\d.]+; "
        rf"{codebooks} codebook{'s' * (codebooks > 1)} at 12\.5 frames a second, {re.escape(kbits)} kbit/s\n",
        err,
    )
    mimi = load(model)
    pcm = torch.from_numpy(audio_file.read(clip, RATE))[None]
    expected = mimi.decode(mimi.encode(pcm, codebooks))[0, : pcm.shape[1]].clamp(-1, 1)
    written = audio_file.read(output, RATE)
    assert len(written) == 3 * RATE
    assert np.abs(written - expected.numpy()).max() < 1e-4  # 16 bits
    assert expected.std() > 1e-2


def test_other_rates_and_formats(antiphon, model, tmp_path):
    clip, output = tmp_path / "clip.flac", tmp_path / "out.opus"
    audio_file.write(clip, audio_file.read(SAMPLE, 44100)[:44100], 44100)
    status, _, err = antiphon(clip, "-o", output, "--model", model)
    assert status == 0, err
    assert abs(audio_file.info(output).duration - 1) < 0.05


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("missing.wav", "-o", "out.wav"), r"antiphon: missing\.wav: no such file"),
        (("{clip}", "-o", "{clip}"), r"antiphon: .*clip\.wav is the recording itself: give another name"),
        (("{clip}", "-o", "out.xyz"), r"antiphon: out\.xyz: cannot write \.xyz; use \.wav"),
        (("{clip}", "-o", "out.wav", "--codebooks", "9"), r"antiphon: this codec has 1 to 8 codebooks, not 9"),
        (("{clip}", "-o", "out.wav", "--device", "tpu"), r"antiphon: no device 'tpu'"),
        (("{clip}", "-o", "out.wav", "--model", "{clip}"), r"antiphon: .*clip\.wav: damaged or incomplete"),
        (("{clip}",), r"antiphon: Missing option '--output'"),
    ],
)
def test_one_line_for_what_is_wrong(antiphon, model, clip, tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(clip=clip) for argument in arguments]
    status, out, err = antiphon(*filled, *(() if "--model" in filled else ("--model", model)))
    assert (status, out) == (2, "")
    assert re.match(match, err)
    assert err.count("\n") == 1
    assert not (tmp_path / "out.wav").exists()


def test_without_a_checkpoint_it_names_the_remedy(antiphon, clip, tmp_path, monkeypatch):
    class NoNetwork:
        def model_info(self, *args: object, **kwargs: object) -> None:
            raise hub.NETWORK_ERRORS[-1]("no route")

    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    monkeypatch.setattr(hub, "snapshot_download", absent)
    status, _, err = antiphon(clip, "-o", tmp_path / "out.wav")
    assert status == 2
    assert err == (
        "antiphon: kyutai/mimi is not on this computer and the hub cannot be reached: run 'hf download kyutai/mimi' "
        "where there is a network, or give the path of a copy\n"
    )
    assert not (tmp_path / "out.wav").exists()
