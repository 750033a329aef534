"""Mimi over slots: streaming is offline far past its window, whoever shares the batch, wherever a session moves."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import safetensors.torch
import torch

from antiphon.codecs.mimi import Mimi, MimiConfig, MimiDecoder, MimiEncoder, Whole
from antiphon.codecs.mimi_checkpoint import CheckpointError, config_from_hf, load, save
from antiphon.codecs.mimi_names import to_layout
from antiphon.models import hub
from antiphon.pipelines.engine import Engine

# Two stages and a window of 6 steps (3 frames of 80 samples), so that tests run far past it.
CONFIG = MimiConfig(
    sample_rate=1000,
    channels=4,
    ratios=(5, 8),
    width=32,
    layers=2,
    heads=4,
    feedforward=64,
    window=6,
    codebooks=8,
    bins=64,
    code_width=8,
)
FRAMES = 24
SESSIONS = 8


@torch.no_grad()
def made(config: MimiConfig = CONFIG) -> Mimi:
    """Random weights, with codebooks as wide as what they quantise, so that codes vary."""
    torch.manual_seed(4)
    mimi = Mimi(config).eval()
    for name, weight in mimi.named_parameters():
        if weight.dim() > 1:
            weight.mul_(2)
        elif ".scale" in name:
            weight.normal_(0.5, 0.1)
    latents = mimi.encoder(sound(config), Whole())
    for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        projected = branch.into(latents).flatten(0, 1)
        books = branch.codebooks.embedding
        books.normal_().mul_(projected.std(0) * 0.6)
        books[0] += projected.mean(0)
    return mimi


def sound(config: MimiConfig = CONFIG, rows: int = SESSIONS) -> torch.Tensor:
    return torch.randn(rows, config.frame * FRAMES, generator=torch.Generator().manual_seed(6)) * 0.5


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return made()


@pytest.fixture(scope="module")
def codes(mimi: Mimi) -> torch.Tensor:
    with torch.no_grad():
        found = mimi.encode(sound())
    assert all(len(book.unique()) > 10 for book in found.movedim(1, 0))
    return found


def slots_of(model: MimiEncoder | MimiDecoder, count: int) -> dict[str, torch.Tensor]:
    return {name: spec.new(count + 1) for name, spec in model.state_spec().items()}


def streamed(model: MimiEncoder | MimiDecoder, inputs: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """A batch from its first step to its last; sizes in the inputs' last dimension."""
    name = next(iter(model.input_spec(1)))
    state, slots = slots_of(model, len(inputs)), torch.arange(len(inputs))
    active = torch.ones(len(inputs), dtype=torch.bool)
    steps = inputs.split(sizes, -1)
    return torch.cat([next(iter(model.step({name: part}, state, slots, active).values())) for part in steps], -1)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 24, [2] * 12, [4] * 6, [1, 4, 2, 2, 1, 4, 3, 1, 4, 2]], ids=str)
def test_streaming_is_offline(codes, chunks):
    mimi = made().double()
    pcm = sound().double()
    whole = mimi.encode(pcm)
    assert (whole == codes).float().mean() > 0.99  # in float32, but for ties
    samples = [chunk * CONFIG.frame for chunk in chunks]
    assert torch.equal(streamed(MimiEncoder(mimi, 8), pcm, samples), whole)
    said = streamed(MimiDecoder(mimi, 8), whole, chunks)
    assert (said - mimi.decode(whole)).abs().max() < 1e-6  # steps put out float32
    assert said.square().mean() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_streaming_is_offline_when_packed(mimi, codes, frames):
    encoder, decoder = MimiEncoder(mimi, 8), MimiDecoder(mimi, 8)
    encoder.prepare()
    decoder.prepare()
    assert torch.equal(streamed(encoder, sound(), [frames * CONFIG.frame] * (FRAMES // frames)), codes)
    said = streamed(decoder, codes, [frames] * (FRAMES // frames))
    assert (said - mimi.decode(codes)).abs().max() < 1e-5


@torch.no_grad()
def test_the_published_window_over_half_a_minute():
    """The window's 250 steps are 10 s at 12.5 frames a second."""
    config = MimiConfig(channels=2, ratios=(2, 2), width=16, layers=2, heads=2, feedforward=16, codebooks=4, bins=64)
    mimi = made(dataclasses.replace(config, code_width=8, steps=(5,))).double()
    pcm = torch.randn(1, 400 * mimi.config.frame, dtype=torch.float64)
    codes = mimi.encode(pcm)
    assert torch.equal(streamed(MimiEncoder(mimi, 4), pcm, [5 * mimi.config.frame] * 80), codes)
    said = streamed(MimiDecoder(mimi, 4), codes, [5] * 80)
    assert (said - mimi.decode(codes)).abs().max() < 1e-6


def test_gradients_reach_every_weight():
    mimi = made()
    latents = mimi.encoder(sound(), Whole())
    mimi.decoder(
        mimi.quantizer.semantic.back(mimi.quantizer.semantic.into(latents)), Whole()
    ).square().mean().backward()
    trained = [name for name, weight in mimi.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert {name for name, _ in mimi.named_parameters() if "acoustic" not in name} == set(trained)


@torch.no_grad()
def test_more_codebooks_begin_with_fewer(mimi, codes):
    for count in (1, 2, 5):
        assert torch.equal(mimi.encode(sound(), count), codes[:, :count])
        assert torch.equal(streamed(MimiEncoder(mimi, count), sound(), [CONFIG.frame] * FRAMES), codes[:, :count])
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"1 to 8 codebooks, not {count}"):
            MimiEncoder(mimi, count)
        with pytest.raises(ValueError, match=f"1 to 8 codebooks, not {count}"):
            mimi.encode(sound(), count)


@torch.no_grad()
def test_rows_of_a_decoder_may_have_different_numbers_of_codebooks(mimi, codes):
    """-1, and whatever else is not a code, stands for nothing."""
    mixed = codes.clone()
    counts = [1, 2, 3, 4, 5, 6, 7, 8]
    for row, count in enumerate(counts):
        mixed[row, count:] = (-1, CONFIG.bins, 1 << 40)[row % 3]
    said = streamed(MimiDecoder(mimi, 8), mixed, [1] * FRAMES)
    for row, count in enumerate(counts):
        assert (said[row] - mimi.decode(codes[row : row + 1, :count])).abs().max() < 1e-5


@torch.no_grad()
def test_a_partial_frame_is_filled_up_with_silence(mimi):
    pcm = sound()[:, : 5 * CONFIG.frame - 3]
    filled = torch.cat((pcm, torch.zeros(SESSIONS, 3)), 1)
    assert torch.equal(mimi.encode(pcm), mimi.encode(filled))
    assert mimi.encode(pcm).shape == (SESSIONS, 8, 5)


def opened(mimi: Mimi, slots: int = SESSIONS) -> Engine:
    engine = Engine(inline=True)
    engine.add("hear", MimiEncoder(mimi, 8), slots=slots, variants=(1,))
    engine.add("say", MimiDecoder(mimi, 8), slots=slots, variants=(1,))
    return engine


def play(engine: Engine, sessions: list[int], seed: int = 0) -> dict[int, tuple]:
    """Sessions that hear and then say what they heard, at random times. Returns codes and sound of each."""
    chance = random.Random(seed)
    hear = {session: engine.open_sync("hear") for session in sessions}
    say = {session: engine.open_sync("say") for session in sessions}
    parts = sound().split(CONFIG.frame, 1)
    heard = {session: [] for session in sessions}
    said = {session: [] for session in sessions}
    while any(len(made) < len(parts) for made in said.values()):
        ready = [session for session in sessions if len(said[session]) < len(parts) and chance.random() < 0.7]
        chance.shuffle(ready)
        rows = engine.run_sync([(hear[one], {"pcm": parts[len(heard[one])][one]}) for one in ready])
        for one, row in zip(ready, rows, strict=True):
            heard[one].append(row["codes"].clone())
        rows = engine.run_sync([(say[one], {"codes": heard[one][-1]}) for one in ready])
        for one, row in zip(ready, rows, strict=True):
            said[one].append(row["pcm"].clone())
    return {session: (torch.cat(heard[session], 1), torch.cat(said[session])) for session in sessions}


@pytest.fixture(scope="module")
def together(mimi: Mimi) -> dict[int, tuple]:
    torch.set_num_threads(1)
    with opened(mimi) as engine:
        return play(engine, list(range(SESSIONS)))


def test_the_engine_gives_what_the_whole_signal_gives(mimi, codes, together):
    whole = mimi.decode(codes)
    for session, (heard, said) in together.items():
        assert torch.equal(heard, codes[session])
        assert (said - whole[session]).abs().max() < 1e-5


@pytest.mark.parametrize(("order", "seed"), [([3], 1), ([6, 2, 0], 2), ([5, 7, 4, 1, 0, 6, 3, 2], 3)], ids=str)
def test_alone_and_in_any_company_to_the_bit(mimi, together, order, seed):
    with opened(mimi) as engine:
        for session, (heard, said) in play(engine, order, seed=seed).items():
            assert torch.equal(heard, together[session][0])
            assert torch.equal(said, together[session][1])


def test_a_snapshot_continues_in_another_engine(mimi, together):
    heard, said = together[2]
    parts = sound()[2].split(CONFIG.frame)
    with opened(mimi) as engine, opened(mimi, 5) as other:
        other.open_sync("hear")
        leases = {name: engine.open_sync(name) for name in ("hear", "say")}
        codes, pcm = [], []
        for index, part in enumerate(parts):
            if index in (1, 2, 13):
                moved = {}
                for name, lease in leases.items():
                    moved[name] = (other if index != 2 else engine).open_sync(name)
                    moved[name].restore(lease.pack(lease.snapshot_sync()))
                leases = moved
            codes.append(leases["hear"].step_sync({"pcm": part})["codes"].clone())
            pcm.append(leases["say"].step_sync({"codes": codes[-1]})["pcm"].clone())
    assert torch.equal(torch.cat(codes, 1), heard)
    assert torch.equal(torch.cat(pcm), said)


def test_inactive_rows_leave_no_trace(mimi):
    for model in (MimiEncoder(mimi, 8), MimiDecoder(mimi, 8)):
        model.prepare()
        state, slots = slots_of(model, 4), torch.arange(4)
        inputs = {name: spec.new(4) for name, spec in model.input_spec(1).items()}
        for active in ([True] * 4, [True, False, False, True]):
            before = {name: tensor.clone() for name, tensor in state.items()}
            model.step(inputs, state, slots, torch.tensor(active))
            for row, moved in enumerate(active):
                same = all(torch.equal(tensor[row], before[name][row]) for name, tensor in state.items())
                assert same != moved


@pytest.mark.gpu
def test_on_a_gpu(mimi, codes, together, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    try:
        engine = Engine("cuda", inline=True)
        for name, model in (("hear", MimiEncoder(mimi, 8)), ("say", MimiDecoder(mimi, 8))):
            engine.add(name, model, slots=SESSIONS, variants=(1,))
        with engine:
            for session, (heard, _) in play(engine, list(range(SESSIONS))).items():
                assert (heard == together[session][0]).float().mean() > 0.99
    finally:
        mimi.to("cpu")


def test_published_sizes():
    config = MimiConfig()
    assert (config.frame, config.frame_rate) == (1920, 12.5)
    assert [config.bit_rate(codebooks) for codebooks in (8, 32)] == [1100, 4400]
    with torch.device("meta"):
        mimi = Mimi(config)
    assert 79.3e6 < sum(weight.numel() for weight in mimi.parameters()) < 79.4e6
    state = sum(spec.bytes for half in (MimiEncoder(mimi), MimiDecoder(mimi)) for spec in half.state_spec().values())
    assert 16.4e6 < state < 17e6


def test_settings_that_make_no_codec():
    for change, match in (
        ({"ratios": ()}, "ratios must be positive strides"),
        ({"semantic": 8}, "8 of 8 codebooks cannot be semantic"),
        ({"steps": (1, 1)}, "steps must be distinct"),
        ({"channels": 5}, "5 channels cannot be compressed 2 times"),
        ({"kernel": 0}, "kernel must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(CONFIG, **change)


# Checkpoints


def test_ours_is_saved_and_loaded(mimi, tmp_path):
    save(tmp_path, mimi, "# Tiny\n")
    assert (tmp_path / "README.md").read_text() == "# Tiny\n"
    again = load(tmp_path, steps=(3,))
    assert again.config == dataclasses.replace(CONFIG, steps=(3,))
    expected = mimi.state_dict()
    assert all(torch.equal(value, expected[key].half().float()) for key, value in again.state_dict().items())
    with torch.no_grad():
        again.decoder.seanet.last.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"decoder\.seanet\.last\.bias does not fit into float16"):
        save(tmp_path, again)


KYUTAI = MimiConfig(channels=4, width=64, layers=1, heads=1, feedforward=64, codebooks=3, bins=16, code_width=8)


@pytest.fixture
def kyutai(tmp_path):
    """A folder with Kyutai's file, of the published shape but narrow; and the codec in it."""
    torch.manual_seed(1)
    mimi = Mimi(KYUTAI)
    weights = {key: value.contiguous() for key, value in to_layout(mimi.state_dict(), KYUTAI, "kyutai").items()}
    safetensors.torch.save_file(weights, tmp_path / "tokenizer-x.safetensors")
    return tmp_path, mimi, weights


def test_kyutais_file_needs_no_configuration(kyutai):
    folder, mimi, _ = kyutai
    for path in (folder, folder / "tokenizer-x.safetensors"):
        again = load(path)
        assert again.config == KYUTAI
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in mimi.state_dict().items())


@pytest.mark.parametrize("layout", ["kyutai", "transformers"])
def test_damaged_files(kyutai, layout):
    folder, mimi, weights = kyutai
    name = "tokenizer-x.safetensors"
    if layout == "transformers":
        (folder / name).unlink()
        name = "model.safetensors"
        weights = {key: value.contiguous() for key, value in to_layout(mimi.state_dict(), KYUTAI, layout).items()}
        settings = {"hidden_size": 64, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        settings |= {"num_key_value_heads": 1, "intermediate_size": 64, "codebook_size": 16, "num_quantizers": 3}
        settings |= {"codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "upsample_groups": 64}
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mimi"}))
    safetensors.torch.save_file(weights, folder / name)
    load(folder)
    dropped = next(
        key
        for key in weights
        if "decoder_transformer" in key and key.endswith("norm2.weight" if layout == "kyutai" else "fc2.weight")
    )
    for content, match in (
        ({key: value for key, value in weights.items() if key != dropped}, f"lacks {dropped}"),
        (weights | {"extra.weight": torch.zeros(1)}, r"has no place for extra\.weight"),
        (weights | {dropped: torch.zeros(3)}, f"{dropped} is \\[3\\]"),
    ):
        safetensors.torch.save_file(content, folder / name)
        with pytest.raises(CheckpointError, match=match):
            load(folder)
    for content, match in ((b"", "damaged"), ((folder / name).read_bytes()[:999], "damaged")):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            load(folder)


def test_the_published_configuration():
    settings = {
        "audio_channels": 1,
        "codebook_dim": 256,
        "codebook_size": 2048,
        "frame_rate": 12.5,
        "head_dim": 64,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "model_type": "mimi",
        "norm_eps": 1e-05,
        "num_key_value_heads": 8,
        "num_quantizers": 32,
        "pad_mode": "constant",
        "rope_theta": 10000.0,
        "sampling_rate": 24000,
        "sliding_window": 250,
        "trim_right_ratio": 1.0,
        "upsample_groups": 512,
        "upsampling_ratios": [8, 6, 5, 4],
        "use_causal_conv": True,
        "use_conv_shortcut": False,
    }
    assert config_from_hf(settings) == MimiConfig()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "encodec"}, "model_type is 'encodec'"),
        ({"use_conv_shortcut": True}, "use_conv_shortcut is True; only False is known"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; only 8 is known"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0; only 10000.0 is known"),
        ({"frame_rate": 25.0}, "frame_rate is 25.0; only 12.5 is known"),
        ({"head_dim": 32}, "head_dim is 32; only 64 is known"),
    ],
)
def test_settings_of_transformers_that_are_not_known(settings, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf({"model_type": "mimi"} | settings)


def test_what_is_no_codec_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither a config\.json of Mimi nor a single tokenizer-"):
        load(tmp_path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="the weights of no codec that is known"):
        load(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        load(tmp_path / "x.safetensors")


class NoNetwork:
    def model_info(self, *args: object, **kwargs: object) -> None:
        raise hub.NETWORK_ERRORS[-1]("no route")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "kyutai/mimi",
            "kyutai/mimi is not on this computer and the hub cannot be reached: run 'hf download kyutai/mimi'",
        ),
        ("mimi", "no file, folder or hub name 'mimi'; the published codec is kyutai/mimi"),
        ("../none/such", "no file, folder or hub name"),
        ("some/x.safetensors", "no file, folder or hub name"),
    ],
)
def test_names_that_cannot_be_had(monkeypatch, tmp_path, name, match):
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    monkeypatch.setattr(hub, "snapshot_download", absent)
    with pytest.raises(CheckpointError, match=match):
        load(name)


def test_a_cached_checkpoint_needs_no_network(monkeypatch, kyutai):
    folder, _, _ = kyutai
    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(folder))
    assert load("kyutai/moshiko-pytorch-bf16").config == KYUTAI
    # A copy of the language model alone is not enough.
    (folder / "tokenizer-x.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "moshi"}')
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        load("kyutai/moshiko-pytorch-bf16")


def test_only_the_codecs_files_are_fetched(monkeypatch, kyutai):
    folder, _, _ = kyutai
    asked = {}

    class Api:
        def model_info(self, name: str, **options: object) -> object:
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": file}) for file in files]})

    def download(name: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError
        asked.update(options)
        return str(folder)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    files = ["config.json", "model.safetensors", "tokenizer-x.safetensors", "tokenizer_spm_32k_3.model"]
    assert load("kyutai/moshiko-pytorch-bf16").config == KYUTAI
    assert asked["allow_patterns"] == ["tokenizer-*.safetensors", "*.json"]
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    load("kyutai/mimi")
    assert asked["allow_patterns"] == ["config.json", "model.safetensors"]
    files = ["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="holds neither a tokenizer-"):
        load("kyutai/mimi")
