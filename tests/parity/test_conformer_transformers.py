"""Our recogniser against transformers' ``nemotron_asr_streaming`` with the same random weights, in float64.

Transformers computes position embeddings and softmax in float32, whatever the model's precision. The exact comparisons
run it with both in float64; one test shows how little that changes.
"""

from __future__ import annotations

import json

import pytest
import torch

from antiphon.models.conformer import hf
from antiphon.models.conformer.checkpoint import load
from antiphon.models.conformer.context import sinusoids
from antiphon.models.conformer.names import HF, to_layout

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
nemotron = pytest.importorskip(
    "transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming",
    reason="needs the parity extra: transformers 5.20 or newer",
)

PAIRS = [
    (left, right) for left, rights in ((70, (0, 1, 6, 13)), (56, (0, 1, 3, 6, 13)), (8, (0, 1, 3))) for right in rights
]
LABELS, BLANK = 16, 16


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + centre)


def encoder_settings(left: int, **changes: object) -> dict:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "subsampling_conv_channels": 16,
        "num_mel_bins": 80,
        "sliding_window": left + 1,
        "default_num_lookahead_tokens": 0,
        "scale_input": False,
        "attention_bias": False,
        "convolution_bias": False,
    } | changes


@pytest.fixture
def precise(monkeypatch):
    """Position embeddings in float64, as ours are."""

    def forward(self, hidden_states, *args, **kwargs):
        original = before(self, hidden_states, *args, **kwargs)
        count = original.shape[1]
        exact = sinusoids(torch.arange(count // 2, count // 2 - count, -1), original.shape[2])
        assert (exact - original[0]).abs().max() < 1e-4
        return exact.expand_as(original)

    cls = nemotron.NemotronAsrStreamingEncoderRelPositionalEncoding
    before = cls.forward
    monkeypatch.setattr(cls, "forward", forward)


def model(left: int, kind: str = "nemotron_asr_streaming", mels: int = 80, **changes: object) -> torch.nn.Module:
    """A tiny random recogniser of transformers whose decoder emits now and then."""
    torch.manual_seed(left)
    sizes = {"vocab_size": LABELS + 1, "blank_token_id": BLANK, "decoder_hidden_size": 24, "max_symbols_per_step": 3}
    if kind == "nemotron3_5_asr":
        sizes |= {"num_prompts": 8, "prompt_intermediate_size": 20, "default_prompt_id": 5}
        config_class, model_class = transformers.Nemotron3_5AsrConfig, transformers.Nemotron3_5AsrForRNNT
    else:
        config_class, model_class = transformers.NemotronAsrStreamingConfig, transformers.NemotronAsrStreamingForRNNT
    encoder = transformers.NemotronAsrStreamingEncoderConfig(**encoder_settings(left, num_mel_bins=mels, **changes))
    theirs = model_class(config_class(encoder_config=encoder, **sizes)).double().eval()
    randomise(theirs)
    with torch.no_grad():
        frames = theirs.encoder(torch.randn(1, 800, mels).double(), num_lookahead_tokens=0).last_hidden_state[0]
        projector = theirs.encoder_projector
        projected = frames @ projector.weight.T
        projector.weight.div_(projected.std(0)[:, None]).mul_(2)
        projector.bias.copy_(-(projector.weight @ frames.mean(0)))
        theirs.decoder.embedding.weight[BLANK] = 0
        theirs.joint.head.weight.mul_(4)
        theirs.joint.head.bias.zero_()
        theirs.joint.head.bias[BLANK] = 2.0
        theirs.joint.head.bias[0] = -1e4  # the padding token
    theirs.generation_config.decoder_start_token_id = BLANK
    theirs.generation_config.pad_token_id = 0
    return theirs


def save(theirs: torch.nn.Module, folder, lookaheads: tuple[int, ...]) -> None:
    """As publishers do: configuration and weights by transformers itself."""
    theirs.save_pretrained(folder)
    pieces = ["<unk>", *(f"▁{chr(97 + index)}" for index in range(LABELS - 1))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": BLANK,
                "content": "<blank>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "model": {"type": "BPE", "vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": []},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    extractor = {"feature_size": theirs.config.encoder_config.num_mel_bins}
    processor = {
        "feature_extractor": extractor,
        "supported_num_lookahead_tokens": list(lookaheads),
        "default_num_lookahead_tokens": lookaheads[0],
        "prompt_dictionary": {"auto": 5, "en-US": 0, "de-DE": 2},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))


@pytest.mark.parametrize(
    "changes", [{}, {"scale_input": True, "attention_bias": True, "convolution_bias": True}], ids=str
)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_encoder(precise, tmp_path, left, right, changes):
    theirs = model(left, **changes)
    save(theirs, tmp_path, (right,))
    ours = load(tmp_path, dtype=torch.float64)
    assert ours.config.encoder.left == left
    assert ours.config.encoder.bias == bool(changes)
    mel = torch.randn(2, 8 * (left + 40), 80, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.encoder(mel, num_lookahead_tokens=right).last_hidden_state
        frames, lengths = ours.encoder(mel, torch.tensor([mel.shape[1]] * 2), right)
    assert expected.shape == frames.shape
    assert lengths.tolist() == [frames.shape[1]] * 2
    assert (frames - expected).abs().max() < 1e-12


def test_float32_position_embeddings_change_little(tmp_path):
    theirs = model(70)
    save(theirs, tmp_path, (1,))
    ours = load(tmp_path, dtype=torch.float64)
    mel = torch.randn(1, 900, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.encoder(mel, num_lookahead_tokens=1).last_hidden_state
        frames, _ = ours.encoder(mel, torch.tensor([900]), 1)
    assert 1e-12 < (frames - expected).abs().max() < 1e-5


def stream(ours, mel: torch.Tensor, right: int, language: int | None = None) -> list[tuple[int, int]]:
    """Tokens and their frames of one session."""
    parts = (ours.encoder, ours.transducer)
    state = {name: spec.new(2) for part in parts for name, spec in part.state_spec().items()}
    slots, active = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    frames, found, made = right + 1, [], 0
    padded = torch.cat((torch.zeros(7, mel.shape[1]).double(), mel, torch.zeros(8 * frames, mel.shape[1]).double()))
    while made * 8 < len(mel):
        block = padded[None, 8 * made : 8 * (made + frames)]
        out, valid = ours.encoder.step(block, torch.tensor([len(mel)]), state, slots, active)
        if language is not None:
            out = ours.prompt(out, torch.tensor([language]))
        tokens, times, count = ours.transducer.decode(out, valid, state, slots, active)
        n = int(count)
        found += [
            (token, time + made) for token, time in zip(tokens[0, :n].tolist(), times[0, :n].tolist(), strict=True)
        ]
        made += frames
    return found


@pytest.mark.parametrize("right", [0, 1, 6])
def test_tokens_of_streaming_generate(precise, tmp_path, right):
    theirs = model(70)
    save(theirs, tmp_path, (13, 6, 1, 0))
    ours = load(tmp_path, dtype=torch.float64)
    total = 0
    for _ in range(3):
        mel = torch.randn(1 + 8 * right + 8 * 8 * (right + 1), 80, dtype=torch.float64)

        def chunks(mel=mel):
            start = 0
            while start < len(mel):
                size = 8 * (right + 1) if start else 1 + 8 * right
                yield mel[None, start : start + size]
                start += size

        whole = theirs.generate(input_features=mel[None], num_lookahead_tokens=right, max_length=10_000)
        streamed = theirs.generate(input_features=chunks(), num_lookahead_tokens=right, max_length=10_000)
        ours_tokens = [token for token, _ in stream(ours, mel, right)]
        for output in (whole, streamed):
            ids = output if isinstance(output, torch.Tensor) else output.sequences
            assert [id for id in ids[0].tolist() if id not in (0, BLANK)] == ours_tokens
        total += len(ours_tokens)
    assert total > 10


@pytest.mark.skipif(
    not hasattr(transformers, "Nemotron3_5AsrForRNNT"), reason="needs transformers with nemotron3_5_asr"
)
def test_language_prompt(precise, tmp_path):
    theirs = model(56, "nemotron3_5_asr", mels=128)
    save(theirs, tmp_path, (3, 0, 6, 13))
    ours = load(tmp_path, dtype=torch.float64)
    assert ours.lookaheads == (3, 0, 6, 13)
    assert ours.prompt.default == 5
    mel = torch.randn(8 * 24 - 7, 128, dtype=torch.float64)
    said = set()
    for language in ("auto", "de-DE", "en-US"):
        index = ours.prompt.index(language)
        with torch.no_grad():
            expected = theirs.get_audio_features(
                input_features=mel[None], num_lookahead_tokens=3, prompt_ids=torch.tensor([index])
            ).pooler_output
            frames, _ = ours.encoder(mel[None], torch.tensor([len(mel)]), 3)
            projected = ours.transducer.from_encoder(ours.prompt(frames, torch.tensor([index])))
        assert (projected - expected).abs().max() < 1e-12
        output = theirs.generate(
            input_features=mel[None], num_lookahead_tokens=3, prompt_ids=torch.tensor([index]), max_length=10_000
        )
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        tokens = [token for token, _ in stream(ours, mel, 3, index)]
        assert [id for id in ids[0].tolist() if id not in (0, BLANK)] == tokens
        said.add(tuple(tokens))
    assert len(said) > 1


def test_every_key_is_transformers_own(tmp_path):
    theirs = model(70, attention_bias=True, convolution_bias=True)
    save(theirs, tmp_path, (1,))
    ours = load(tmp_path, dtype=torch.float64)
    back = to_layout(ours.state_dict(), HF)
    expected = theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_defaults_are_those_of_transformers():
    encoder = transformers.NemotronAsrStreamingEncoderConfig()
    weights = {"joint.head.weight": torch.zeros(1025, 1)}
    ours = hf.config_from({"model_type": "nemotron_asr_streaming"}, {}, {}, weights).encoder
    assert (ours.width, ours.layers, ours.heads, ours.feedforward, ours.mels, ours.kernel, ours.channels) == (
        encoder.hidden_size,
        encoder.num_hidden_layers,
        encoder.num_attention_heads,
        encoder.intermediate_size,
        encoder.num_mel_bins,
        encoder.conv_kernel_size,
        encoder.subsampling_conv_channels,
    )
    assert ours.left == encoder.sliding_window - 1
    assert ours.scale_input == encoder.scale_input
    assert ours.lookaheads[0] == encoder.default_num_lookahead_tokens
