"""Our Mimi against transformers' and the ``moshi`` package's, with the same random weights.

Offline both must agree with ours. Streaming, transformers' encoder and, until its window is full, Kyutai's decoder are
exact; past its window Kyutai's streams differ from its own offline pass, which ours goes on to equal.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from antiphon.codecs.mimi import Mimi, MimiConfig, MimiDecoder, MimiEncoder
from antiphon.codecs.mimi_checkpoint import config_from_hf, config_from_kyutai, config_from_shapes, load
from antiphon.codecs.mimi_names import to_layout
from antiphon.codecs.mimi_quantizer import Codebooks

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
loaders = pytest.importorskip("moshi.models.loaders", reason="needs moshi==0.2.13, installed with --no-deps")
if not hasattr(transformers, "MimiModel"):
    pytest.skip("needs transformers with Mimi", allow_module_level=True)

FRAMES = 24
FRAME = 1920
WINDOWS = [250, 8]  # transformer steps, two a frame: wider than the signal, and a sixth of it
CODEBOOKS = 8
TOLERANCE = 1e-5


@torch.no_grad()
def randomise(model: torch.nn.Module, latents) -> None:
    """Weights under which every part matters; codebooks as wide as what they quantise, so that codes vary."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            fan_in = weight.shape[0] * 2 if "convtr" in name or "upsample" in name else weight[0].numel()
            weight.copy_(noise / fan_in**0.5)
        else:
            weight.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")) + 0.3 * ("scale" in name))
    spread = latents()
    for branch in ("semantic", "acoustic"):
        into, books = branches(model)[branch]
        projected = (into.weight[..., 0] @ spread).movedim(1, -1).flatten(0, -2)
        scale, centre = projected.std(0), projected.mean(0)
        for book in books:
            usage, sums = book.cluster_usage, getattr(book, "embed_sum", getattr(book, "embedding_sum", None))
            usage.copy_(torch.rand(usage.shape, generator=generator) + 0.5)
            sums.copy_((torch.randn(sums.shape, generator=generator) * scale + centre) * usage[:, None])
            book._embed = book._embedding = None
            scale, centre = scale * 0.7, torch.zeros_like(centre)


def branches(model: torch.nn.Module) -> dict:
    quantizer = model.quantizer
    if hasattr(quantizer, "rvq_first"):
        pair = {"semantic": quantizer.rvq_first, "acoustic": quantizer.rvq_rest}
        return {name: (one.input_proj, [layer._codebook for layer in one.vq.layers]) for name, one in pair.items()}
    pair = {
        "semantic": quantizer.semantic_residual_vector_quantizer,
        "acoustic": quantizer.acoustic_residual_vector_quantizer,
    }
    return {name: (one.input_proj, [layer.codebook for layer in one.layers]) for name, one in pair.items()}


def sound(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, FRAME * FRAMES, generator=torch.Generator().manual_seed(1)) * 0.3


def transformers_model(folder: Path, **changes: object) -> torch.nn.Module:
    """A tiny random model, saved to the folder."""
    sizes = {
        "hidden_size": 32,
        "num_filters": 4,
        "codebook_size": 64,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": CODEBOOKS,
        "upsample_groups": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "use_cache": True,
    }
    model = transformers.MimiModel(transformers.MimiConfig(**sizes | changes)).eval()
    randomise(model, lambda: model.encoder(sound()[:, None]).latents)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=WINDOWS)
def hf(request, tmp_path_factory):
    """Transformers' model and the folder it saved itself to."""
    folder = tmp_path_factory.mktemp("hf")
    return transformers_model(folder, sliding_window=request.param), folder


@pytest.fixture(scope="module", params=WINDOWS)
def kyutai(request, tmp_path_factory):
    """Kyutai's model and a repository of it: a language model's configuration that names the codec's."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["quantizer"].update(dimension=8, n_q=CODEBOOKS, bins=64, input_dimension=32, output_dimension=32)
    config["transformer"].update(
        d_model=32,
        num_heads=4,
        num_layers=2,
        dim_feedforward=64,
        input_dimension=32,
        output_dimensions=[32],
        context=request.param,
    )
    model = loaders.get_mimi(None, config, num_codebooks=CODEBOOKS)
    randomise(model, lambda: model.encode_to_latent(sound()[:, None], quantize=False))
    folder = tmp_path_factory.mktemp("kyutai")
    safetensors.torch.save_file(model.state_dict(), folder / "tokenizer-tiny.safetensors")
    (folder / "config.json").write_text(json.dumps({"dim": 64, "mimi_config_name": "mimi.json"}))
    (folder / "mimi.json").write_text(json.dumps(config))
    return model, folder


def streamed(model: MimiEncoder | MimiDecoder, inputs: torch.Tensor, frames: int) -> torch.Tensor:
    """A batch from its first frame to its last."""
    ((name, spec),) = model.input_spec(frames).items()
    rows = len(inputs)
    state = {key: tensor.new(rows + 1) for key, tensor in model.state_spec().items()}
    slots, active = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
    steps = inputs.split(spec.shape[-1], -1)
    return torch.cat([next(iter(model.step({name: part}, state, slots, active).values())) for part in steps], -1)


def ready(mimi: Mimi) -> tuple[MimiEncoder, MimiDecoder]:
    pair = MimiEncoder(mimi, CODEBOOKS), MimiDecoder(mimi, CODEBOOKS)
    for model in pair:
        model.prepare()
    return pair


def varied(codes: torch.Tensor) -> bool:
    """Whether every codebook says several things."""
    return all(len(book.unique()) > 5 for book in codes.movedim(1, 0))


@torch.no_grad()
def test_whole_signals_of_transformers(hf):
    theirs, folder = hf
    ours = load(folder)
    assert ours.config.window == theirs.config.sliding_window
    codes = theirs.encode(sound()[:, None], num_quantizers=CODEBOOKS).audio_codes
    assert varied(codes)
    assert torch.equal(ours.encode(sound()), codes)
    pcm = theirs.decode(codes).audio_values[:, 0]
    assert pcm.square().mean() > 1e-2
    assert (ours.decode(codes) - pcm).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("codebooks", [1, 3])
def test_fewer_codebooks(hf, codebooks):
    theirs, folder = hf
    ours = load(folder)
    codes = theirs.encode(sound()[:, None], num_quantizers=codebooks).audio_codes
    assert torch.equal(ours.encode(sound(), codebooks), codes)
    assert (ours.decode(codes) - theirs.decode(codes).audio_values[:, 0]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"num_residual_layers": 2, "dilation_growth_rate": 3, "compress": 4, "residual_kernel_size": 5},
        {"upsampling_ratios": [8, 12, 10], "kernel_size": 5, "last_kernel_size": 7},
        {"num_semantic_quantizers": 3},
    ],
    ids=str,
)
def test_other_sizes(tmp_path, changes):
    theirs = transformers_model(tmp_path, **changes)
    ours = load(tmp_path)
    codes = theirs.encode(sound()[:, None], num_quantizers=CODEBOOKS).audio_codes
    assert torch.equal(ours.encode(sound()), codes)
    assert (ours.decode(codes) - theirs.decode(codes).audio_values[:, 0]).abs().max() < TOLERANCE
    encoder, decoder = ready(ours)
    assert torch.equal(streamed(encoder, sound(), 1), codes)
    assert (streamed(decoder, codes, 1) - ours.decode(codes)).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_streaming_encode_of_transformers(hf, frames):
    theirs, folder = hf
    encoder, _ = ready(load(folder))
    past, padding, expected = None, None, []
    for part in sound()[:, None].split(FRAME * frames, 2):
        found = theirs.encode(
            part, num_quantizers=CODEBOOKS, encoder_past_key_values=past, padding_cache=padding, use_streaming=True
        )
        past, padding = found.encoder_past_key_values, found.padding_cache
        expected.append(found.audio_codes)
    assert torch.equal(streamed(encoder, sound(), frames), torch.cat(expected, 2))


@torch.no_grad()
def test_whole_signals_of_kyutai(kyutai):
    theirs, folder = kyutai
    ours = load(folder)
    codes = theirs.encode(sound()[:, None])
    assert varied(codes)
    assert torch.equal(ours.encode(sound()), codes)
    pcm = theirs.decode(codes)[:, 0]
    assert pcm.square().mean() > 1e-2
    assert (ours.decode(codes) - pcm).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_streams_of_kyutai(kyutai, frames):
    theirs, folder = kyutai
    encoder, decoder = ready(load(folder))
    codes = theirs.encode(sound()[:, None])
    whole = theirs.decode(codes)[:, 0]
    with theirs.streaming(2):
        heard = torch.cat([theirs.encode(part) for part in sound()[:, None].split(FRAME * frames, 2)], 2)
    with theirs.streaming(2):
        said = torch.cat([theirs.decode(part) for part in codes.split(frames, 2)], 2)[:, 0]
    ours_heard, ours_said = streamed(encoder, sound(), frames), streamed(decoder, codes, frames)
    assert torch.equal(ours_heard, codes)
    assert (ours_said - whole).abs().max() < TOLERANCE
    fits = load(folder).config.window >= 2 * FRAMES
    assert torch.equal(heard, ours_heard) == fits
    assert ((said - ours_said).abs().max() < TOLERANCE) == fits


def test_every_key_is_kyutais_own(kyutai):
    theirs, folder = kyutai
    agrees(theirs.state_dict(), folder, "kyutai", {"in_projs.0.weight": "in_proj_weight", "out_projs.0": "out_proj"})


def test_every_key_is_transformers_own(hf):
    theirs, folder = hf
    # As the published file has them: transformers groups its modules since, and renames what it loads.
    names = {"encoder.encoder_seanet": "encoder", "decoder.decoder_seanet": "decoder"}
    names |= {f"{side}.{side}_transformer": f"{side}_transformer" for side in ("encoder", "decoder")}
    names |= {"encoder.downsample": "downsample", "decoder.upsample": "upsample"}
    agrees(theirs.state_dict(), folder, "transformers", names)


def agrees(theirs, folder, layout, names) -> None:
    """Ours in their layout: the same keys, and the same weights but for how codebooks are scaled."""
    ours = load(folder)
    back = to_layout(ours.state_dict(), ours.config, layout)
    expected = {}
    for key, value in theirs.items():
        old = next((key.replace(new, name) for new, name in names.items() if new in key), key)
        expected[old] = value
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(("embed_sum", "embedding_sum")):
            usage = expected[f"{key.rpartition('.')[0]}.cluster_usage"]
            assert torch.equal(back[key], value / usage[:, None])
        elif not key.endswith(("cluster_usage", "initialized")):
            assert torch.equal(back[key], value)


def test_older_names_load_too(hf, tmp_path):
    """The published file's, whose weights are then the same as by the names that transformers saves today."""
    _, folder = hf
    ours = load(folder)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    renamed = to_layout(ours.state_dict(), ours.config, "transformers")
    assert "encoder_transformer.layers.0.self_attn.q_proj.weight" in renamed
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in renamed.items()}, tmp_path / "model.safetensors"
    )
    again = load(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())


def test_in_memory_names_load_too(hf, tmp_path):
    """Those of transformers' own state dict."""
    theirs, folder = hf
    ours = load(folder).state_dict()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    again = load(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.items())


@torch.no_grad()
def test_published_sizes():
    """The default configuration is transformers' and Kyutai's, and Kyutai's shapes say so by themselves."""
    assert config_from_hf({"model_type": "mimi"}) == MimiConfig()
    assert config_from_hf(transformers.MimiConfig().to_dict()) == MimiConfig()
    assert config_from_kyutai(loaders._mimi_config) == MimiConfig()
    with torch.device("meta"):
        mimi = Mimi(MimiConfig())
        theirs = loaders.get_mimi(None, device="meta")
    assert config_from_shapes(theirs.state_dict()) == MimiConfig()
    back = to_layout(mimi.state_dict(), mimi.config, "kyutai")
    named = {
        key.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0", "out_proj"): value.shape
        for key, value in theirs.state_dict().items()
    }
    assert {key: value.shape for key, value in back.items()} == named


def test_search_finds_what_cdist_finds():
    """In float64, for inputs of any distance from their codebooks."""
    generator = torch.Generator().manual_seed(2)
    books = Codebooks(4, 512, 32).double()
    books.embedding.copy_(torch.randn(books.embedding.shape, generator=generator, dtype=torch.float64))
    for scale in (0.01, 1.0, 30.0):
        x = torch.randn(400, 32, generator=generator, dtype=torch.float64) * scale
        codes = books.encode(x, 4)
        for entries, found in zip(books.embedding, codes, strict=True):
            assert torch.equal(found, torch.cdist(x, entries, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))
            x = x - entries[found]
