"""Our Moshi against Kyutai's ``moshi`` package and against transformers, with the same random weights.

Kyutai's ``LMGen`` and transformers compute norms and rotations in float32 whatever the weights, so tokens must be equal
and logits close to float32's precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from antiphon.models.moshi import checkpoint
from antiphon.models.moshi.lm import MoshiLM

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "moshi"))
from tiny_moshi import CARD, SETTINGS, TEXT, WINDOW, Live, randomise, user_codes

pytestmark = pytest.mark.parity
FRAMES = 4 * WINDOW


def kyutai_lm(**changes: Any) -> Any:
    """A tiny random ``LMModel``."""
    models = pytest.importorskip("moshi.models", reason="needs moshi==0.2.13, installed with --no-deps")
    lm = models.LMModel(device="cpu", dtype=torch.float32, **(SETTINGS | changes))
    randomise(lm)
    return lm.eval()


def saved(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def stepped(reference: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy ``LMGen``: output frames ``[B, 9, T]``, text logits ``[B, T, V]``."""
    from moshi.models import LMGen

    logits: list[Tensor] = []
    gen = LMGen(
        reference,
        use_sampling=False,
        support_out_of_sync=True,
        on_text_logits_hook=lambda made: logits.append(made[:, 0, 0].clone()),
    )
    with torch.no_grad(), gen.streaming(len(codes)):
        frames = [gen.step(codes[..., frame : frame + 1])[..., 0] for frame in range(codes.shape[2])]
    return torch.stack(frames, 2), torch.stack(logits, 1)


def ours(lm: MoshiLM, codes: Tensor) -> tuple[Tensor, Tensor]:
    logits: list[Tensor] = []
    hook = lm.text_head.register_forward_hook(lambda module, given, made: logits.append(made.clone()))
    live = Live(lm, len(codes))
    made = [live.step(codes[..., frame]) for frame in range(codes.shape[2])]
    hook.remove()
    return torch.stack([torch.cat((one["text"][:, None], one["codes"]), 1) for one in made], 2), torch.stack(logits, 1)


def near(made: Tensor, expected: Tensor) -> bool:
    """To float32's precision."""
    return bool((made - expected).abs().max() < 1e-5 * expected.abs().max())


def test_tokens_and_logits_are_lmgens_beyond_the_window(tmp_path: Path) -> None:
    reference, codes = kyutai_lm(), user_codes(3, FRAMES)
    lm = checkpoint.load(saved(tmp_path, reference.state_dict(), SETTINGS))
    tokens, logits = ours(lm, codes)
    expected, expected_logits = stepped(reference, codes)
    assert torch.equal(tokens, expected)
    assert near(logits, expected_logits)
    assert len(tokens[:, 0].unique()) > 8


def test_whole_conversations_are_lmmodels(tmp_path: Path) -> None:
    reference = kyutai_lm()
    lm = checkpoint.load(saved(tmp_path, reference.state_dict(), SETTINGS))
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-1, CARD, (2, 17, FRAMES), generator=generator)
    codes[:, 0] = torch.randint(-1, TEXT, (2, FRAMES), generator=generator)
    with torch.no_grad():
        expected, made = reference(codes), lm(codes)
    assert torch.equal(made.mask, expected.mask)
    assert near(made.text, expected.text_logits[:, 0])
    assert near(made.audio[made.mask], expected.logits[made.mask])


def test_the_shape_of_kyutais_published_fixture(tmp_path: Path) -> None:
    """``moshi/tests/test_lm.py``: sines, LayerNorm, a schedule of depth weights, low-rank embeddings, old spellings."""
    settings = {
        "delays": [0, 1, 2, 4],
        "n_q": 3,
        "dep_q": 3,
        "card": 32,
        "text_card": 48,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 1,
        "hidden_scale": 1,
        "depformer_dim": 16,
        "depformer_multi_linear": True,
        "depformer_weights_per_step": True,
        "depformer_weights_per_step_schedule": [0, 1, 1],
        "depformer_low_rank_embeddings": 8,
        "depformer_num_heads": 1,
        "depformer_gating": "silu",
        "context": 4,
    }
    models = pytest.importorskip("moshi.models", reason="needs moshi==0.2.13, installed with --no-deps")
    reference = models.LMModel(device="cpu", dtype=torch.float32, **settings).eval()
    randomise(reference)
    lm = checkpoint.load(saved(tmp_path, old_spelling(reference.state_dict()), settings))
    codes = torch.randint(-1, 32, (3, 4, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, made = reference(codes), lm(codes)
    assert torch.equal(made.mask, expected.mask)
    assert near(made.text, expected.text_logits[:, 0])
    assert near(made.audio[made.mask], expected.logits[made.mask])
    # Stepping adds positions from the session's own count.
    nothing = user_codes(2, 12, heard=0)
    from moshi.models import LMGen

    gen = LMGen(reference, use_sampling=False, support_out_of_sync=True)
    live = Live(lm, 2)
    with torch.no_grad(), gen.streaming(2):
        for frame in range(12):
            want = gen.step(nothing[..., frame : frame + 1])[..., 0]
            got = live.step(nothing[..., frame])
            assert torch.equal(torch.cat((got["text"][:, None], got["codes"]), 1), want)


def test_a_model_that_only_writes_is_kyutais_speech_to_text(tmp_path: Path) -> None:
    """``dep_q`` 0, no delays, every codebook heard, and classifiers of pauses."""
    changes = {"n_q": 8, "dep_q": 0, "delays": [0] * 9, "extra_heads_num_heads": 4, "extra_heads_dim": 6}
    reference = kyutai_lm(**changes)
    from moshi.models import LMGen

    lm = checkpoint.load(saved(tmp_path, reference.state_dict(), SETTINGS | changes | {"model_type": "stt"}))
    codes = user_codes(2, FRAMES)
    gen, live = LMGen(reference, use_sampling=False, support_out_of_sync=True), Live(lm, 2)
    with torch.no_grad(), gen.streaming(2):
        for frame in range(FRAMES):
            text, heads = gen.step_with_extra_heads(codes[..., frame : frame + 1])
            made = live.step(codes[..., frame])
            assert torch.equal(made["text"], text[:, 0, 0])
            assert near(made["heads"], torch.stack(heads, 2)[:, 0])


def old_spelling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of all depth steps in one tensor, as the published repositories have them."""
    old: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        for side, spelled in (("in", "in_proj_weight"), ("out", "out_proj.weight")):
            if f".{side}_projs." in name:
                scale = "_scb" if name.endswith("_scb") else ""
                parts.setdefault(name.partition(f"{side}_projs.")[0] + spelled + scale, []).append(value)
                break
        else:
            old[name] = value
    return old | {name: torch.cat(values) for name, values in parts.items()}


def test_every_key_is_read_and_written_back(tmp_path: Path) -> None:
    reference = kyutai_lm().state_dict()
    for name, tensors in (("new", reference), ("old", old_spelling(reference))):
        lm = checkpoint.load(saved(tmp_path / name, tensors, SETTINGS))
        checkpoint.save(tmp_path / f"{name} again", lm, SETTINGS, dtype=torch.float32)
        again = safetensors.torch.load_file(tmp_path / f"{name} again" / "model.safetensors")
        assert again.keys() == reference.keys()
        assert all(torch.equal(again[key], reference[key]) for key in reference)


def test_8_bit_weights_are_scaled(tmp_path: Path) -> None:
    """bitsandbytes' rows: the largest magnitude is 127."""
    reference = kyutai_lm().state_dict()
    tensors: dict[str, Tensor] = {}
    for name, value in reference.items():
        if value.dim() == 2 and not name.startswith(("emb.", "text_emb", "depformer_emb", "depformer_text_emb")):
            largest = value.abs().amax(1)
            tensors[name] = (value / largest[:, None] * 127).round().to(torch.int8)
            tensors[f"{name}_scb"] = largest
        else:
            tensors[name] = value
    for number, theirs in enumerate((tensors, old_spelling(tensors))):
        folder = saved(tmp_path / str(number), theirs, SETTINGS, "model.q8.safetensors")
        lm = checkpoint.load(folder)
        checkpoint.save(tmp_path / "again", lm, SETTINGS, dtype=torch.float32)
        again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
        for name, value in reference.items():
            step = tensors[f"{name}_scb"][:, None] / 127 if f"{name}_scb" in tensors else torch.tensor(0.0)
            assert ((again[name] - value).abs() <= 0.5001 * step).all(), name


def test_a_model_of_both_sides_speaks_one(tmp_path: Path) -> None:
    """PersonaPlex: 16 depth steps, the last 8 for codebooks that the user's sound gives."""
    both, codes = kyutai_lm(dep_q=16), user_codes(2, 20)
    lm = checkpoint.load(saved(tmp_path, old_spelling(both.state_dict()), SETTINGS))
    one = kyutai_lm()
    one.load_state_dict({name: both.state_dict()[name] for name in one.state_dict()})
    tokens, _ = ours(lm, codes)
    assert torch.equal(tokens, stepped(one, codes)[0])


def test_transformers_stepped_by_hand(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 2 * 44}
    codec = transformers.MimiConfig(
        hidden_size=32,
        num_filters=4,
        codebook_size=32,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=8,
        upsample_groups=32,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    config = transformers.MoshiConfig(
        vocab_size=TEXT,
        audio_vocab_size=CARD,
        max_position_embeddings=3000,
        sliding_window=WINDOW,
        num_codebooks=8,
        audio_encoder_config=codec.to_dict(),
        depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 2 * 20},
        attn_implementation="eager",
        **sizes,
    )
    reference = transformers.MoshiForConditionalGeneration(config).eval()
    randomise(reference.decoder, 1)
    randomise(reference.depth_decoder, 2)
    randomise(reference.embed_tokens, 3)
    reference.save_pretrained(tmp_path)
    lm = checkpoint.load(tmp_path)
    codes = user_codes(2, FRAMES, 4)
    tokens, logits = ours(lm, codes)
    sampled, expected_logits = by_hand(transformers, reference, codes)
    # Ours come out without delays: text and codebook 0 of the step before.
    assert torch.equal(tokens[:, :2, 1:], sampled[:, :2, :-1])
    assert torch.equal(tokens[:, 2:, 1:], sampled[:, 2:, 1:])
    assert near(logits, expected_logits)


def by_hand(transformers: Any, model: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy full duplex: its own ``generate`` feeds silence for the user. Sampled ``[B, 9, T]`` and text logits."""
    rows, delays = len(codes), SETTINGS["delays"]
    cache = transformers.DynamicCache(config=model.decoder.config)
    text, audio = torch.full((rows,), TEXT), torch.full((rows, 8), CARD)
    sampled, logits = [], []
    with torch.no_grad():
        for frame in range(codes.shape[2]):
            heard = torch.full((rows, 16), CARD)
            for book, delay in enumerate(delays[1:9]):
                if frame > delay:
                    heard[:, book] = audio[:, book]
                    heard[:, 8 + book] = codes[:, book, frame - delay]
            x = model.decoder.model.embed_tokens(text[:, None])
            x = x + sum(model.embed_tokens[book](heard[:, book : book + 1]) for book in range(16))
            out = model.decoder(inputs_embeds=x, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            text = token = logits[-1].argmax(-1)
            depth, made = transformers.DynamicCache(config=model.depth_decoder.config), []
            for _ in range(8):
                step = model.depth_decoder(
                    input_ids=token[:, None],
                    last_hidden_state=out.last_hidden_state[:, -1:],
                    past_key_values=depth,
                    use_cache=True,
                )
                token = step.logits[:, -1].argmax(-1)
                made.append(token)
            audio = torch.stack(made, 1)
            sampled.append(torch.cat((text[:, None], audio), 1))
    return torch.stack(sampled, 2), torch.stack(logits, 1)
