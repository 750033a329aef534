"""Our flow against a second, independent one: ``minicpmo-utils`` (``stepaudio2``), installed with ``--no-deps``.

Its ``flashcosyvoice`` has CosyVoice 2's flow under the published names; its ``cosyvoice2`` the only other encoder with
caches from chunk to chunk. Both build their position embeddings in float32; the comparisons give them float64 ones.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_checkpoint import from_upstream
from antiphon.models.cosyvoice.flow_config import FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_context import Mask
from antiphon.models.cosyvoice.flow_stream import NO_TOKEN, StreamingFlow

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
for package in ("stepaudio2", "einops", "diffusers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: see CONTRIBUTING", allow_module_level=True)

CHUNK, LOOKAHEAD = 5, 3
# Its cached encoder needs as many blocks before the upsampling as after it.
OURS = FlowConfig(
    chunk=CHUNK, feedforward=64, layers=2, up_layers=2, channels=64, unet_heads=2, unet_head_width=16, stage_blocks=1,
    middle_stages=2,
)  # fmt: skip
PROMPT, TOKENS = 7, 43
PACKAGES = ("", ".flashcosyvoice", ".flashcosyvoice.modules", ".cosyvoice2")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Without what its packages import beside the networks, and a name that moved."""
    (root,) = importlib.util.find_spec("stepaudio2").submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        for name in PACKAGES:
            made = types.ModuleType(f"stepaudio2{name}")
            made.__path__ = [str(Path(root, *name.split(".")))]
            patch.setitem(sys.modules, made.__name__, made)
        if importlib.util.find_spec("diffusers.models.lora") is None:
            lora = types.ModuleType("diffusers.models.lora")
            lora.__spec__ = importlib.machinery.ModuleSpec(lora.__name__, None)
            lora.LoRACompatibleLinear = nn.Linear
            patch.setitem(sys.modules, lora.__name__, lora)
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "stepaudio2"]:
            patch.delitem(sys.modules, name)


def exact(network: nn.Module, *entrances: nn.Module) -> nn.Module:
    """Float64 throughout, weights that matter everywhere."""
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for entrance in entrances:
        half = entrance.pos_enc.pe.shape[1] // 2
        rates = torch.exp(torch.arange(0, 512, 2).double() * -(math.log(10000.0) / 512))
        angles = torch.arange(half, -half - 1, -1).double()[:, None] * rates
        entrance.pos_enc.pe = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[None]
    return network


@pytest.fixture(scope="module")
def theirs(importable: None) -> nn.Module:
    estimator = importlib.import_module("stepaudio2.flashcosyvoice.modules.flow_components.estimator")
    encoder = importlib.import_module("stepaudio2.flashcosyvoice.modules.flow_components.upsample_encoder")
    flow = importlib.import_module("stepaudio2.flashcosyvoice.modules.flow")
    torch.manual_seed(1)
    made = flow.CausalMaskedDiffWithXvec(
        encoder=encoder.UpsampleConformerEncoder(512, 512, 8, 64, 2, static_chunk_size=CHUNK),
        decoder=flow.CausalConditionalCFM(
            estimator=estimator.CausalConditionalDecoder(320, 80, [64], 0.0, 16, 1, 2, 2, "gelu", 2 * CHUNK, -1)
        ),
    )
    for blocks in (made.encoder.encoders, made.encoder.up_encoders):
        del blocks[2:]
    return exact(made, made.encoder.embed, made.encoder.up_embed)


@pytest.fixture(scope="module")
def flow(theirs: nn.Module) -> FlowMatching:
    """With their weights, every one of which has a place."""
    with torch.device("meta"):
        made = FlowMatching(OURS)
    made.load_state_dict(from_upstream(theirs.state_dict(), OURS), assign=True)
    return made.eval()


@pytest.fixture
def told() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a prompt's mel frames, an embedding."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 6561, (1, PROMPT + TOKENS), generator=generator)
    mel = torch.randn(1, 2 * PROMPT, 80, generator=generator).double()
    return tokens, mel, torch.randn(1, 192, generator=generator).double()


@pytest.mark.parametrize("streaming", [False, True], ids=["full attention", "chunk mask"])
def test_the_flow(
    theirs: nn.Module, flow: FlowMatching, told: tuple[Tensor, ...], streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mel, embedding = told
    lengths = torch.tensor([tokens.shape[1]])
    noise = flow.noise[: 2 * tokens.shape[1]].T[None].double()
    estimator = importlib.import_module("stepaudio2.flashcosyvoice.modules.flow_components.estimator")
    monkeypatch.setattr(estimator, "mask_to_bias", lambda mask, dtype: (1.0 - mask.to(dtype)) * -1e10)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.clone())
    expected, _ = theirs(tokens, lengths, mel, torch.tensor([2 * PROMPT]), embedding, streaming, True)
    monkeypatch.undo()
    made = flow.generate(tokens, lengths, mel, embedding, Mask(CHUNK if streaming else None))
    # They return float32.
    assert (made[0] - expected[0].T).abs().max() < 1e-5
    assert expected.abs().mean() > 0.1


@torch.no_grad()
def test_the_encoder_with_caches(theirs: nn.Module, flow: FlowMatching, told: tuple[Tensor, ...]) -> None:
    """Chunk after chunk, each side with its own caches and nothing computed twice."""
    module = importlib.import_module("stepaudio2.cosyvoice2.transformer.upsample_encoder_v2")
    encoder = module.UpsampleConformerEncoderV2(
        input_size=512, output_size=512, num_blocks=2, num_up_blocks=2, attention_heads=8, linear_units=64
    )
    encoder = exact(encoder, encoder.embed, encoder.up_embed)
    encoder.load_state_dict(theirs.encoder.state_dict())
    limits = FlowLimits(hops=(CHUNK,), left=2 * (PROMPT + TOKENS), voices=1, prompt=CHUNK)
    ours = StreamingFlow(flow, limits)
    ours.prepare()
    tokens, _, embedding = told
    voice = ours.add_voice((), torch.zeros(0, 80), embedding[0])
    state = {name: spec.new(2) for name, spec in ours.state_spec().items()}
    slot, active = torch.tensor([0]), torch.tensor([True])
    length = tokens.shape[1]
    convolved = attended = None
    for first in range(0, length, CHUNK):
        last = first + CHUNK >= length
        heard = tokens[:, first : first + CHUNK + LOOKAHEAD]
        with torch.compiler.set_stance("force_eager"):
            given = theirs.input_embedding(heard)
            expected, convolved, attended = encoder.forward_chunk(given, last, convolved, attended)
        expected = theirs.encoder_proj(expected)[0]
        inputs = torch.full((1, CHUNK + LOOKAHEAD), NO_TOKEN)
        inputs[:, : heard.shape[1]] = heard
        ours.step(
            {"tokens": inputs, "count": torch.tensor([CHUNK]), "voice": torch.tensor([voice.row])}, state, slot, active
        )
        made = state["flow.mu"][0]
        assert expected.shape == made.shape == (2 * CHUNK, 80)
        assert (made - expected).abs().max() < 1e-12, first
    assert length % CHUNK == 0
    assert int(state["flow.seen"][0]) == length
