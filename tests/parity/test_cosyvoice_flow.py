"""Our flow against upstream's (``cosyvoice2-eu``, installed with ``--no-deps``), with upstream's weights.

Upstream computes position embeddings and masks in float32 at most; the comparisons give it float64 ones.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import math
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.flow import FlowMatching
from antiphon.models.cosyvoice.flow_checkpoint import from_upstream
from antiphon.models.cosyvoice.flow_config import FlowConfig, FlowLimits
from antiphon.models.cosyvoice.flow_context import Mask
from antiphon.models.cosyvoice.flow_hops import Hops
from antiphon.models.cosyvoice.flow_stream import StreamingFlow

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
for package in ("cosyvoice", "matcha", "einops", "omegaconf", "diffusers", "conformer"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: see CONTRIBUTING", allow_module_level=True)

CHUNK = 5
OURS = FlowConfig(
    chunk=CHUNK, feedforward=64, layers=2, channels=64, unet_heads=2, unet_head_width=16, stage_blocks=1,
    middle_stages=2,
)  # fmt: skip
PROMPT, TOKENS = 7, 43


def stand_in(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def import_upstream(patch: pytest.MonkeyPatch) -> None:
    """Stand in for what upstream imports beside the flow: audio input and output, a logger, a name that moved."""
    for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        if importlib.util.find_spec("torchaudio") is None:
            patch.setitem(sys.modules, name, stand_in(name))
    utils = stand_in("matcha.utils")
    utils.__path__ = [f"{next(iter(importlib.util.find_spec('matcha').submodule_search_locations))}/utils"]
    patch.setitem(sys.modules, "matcha.utils", utils)
    patch.setitem(sys.modules, "matcha.utils.pylogger", stand_in("pylogger", get_pylogger=logging.getLogger))
    if importlib.util.find_spec("diffusers.models.lora") is None:
        lora = stand_in("diffusers.models.lora", LoRACompatibleLinear=torch.nn.Linear)
        patch.setitem(sys.modules, "diffusers.models.lora", lora)


def build_upstream() -> torch.nn.Module:
    from cosyvoice.flow.decoder import CausalConditionalDecoder
    from cosyvoice.flow.flow import CausalMaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import CausalConditionalCFM
    from cosyvoice.transformer.upsample_encoder import UpsampleConformerEncoder
    from omegaconf import DictConfig

    torch.manual_seed(1)
    encoder = UpsampleConformerEncoder(
        input_size=512,
        output_size=512,
        attention_heads=8,
        linear_units=64,
        num_blocks=2,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        use_cnn_module=False,
        macaron_style=False,
        static_chunk_size=CHUNK,
    )
    estimator = CausalConditionalDecoder(
        in_channels=320,
        out_channels=80,
        channels=[64],
        dropout=0.0,
        attention_head_dim=16,
        n_blocks=1,
        num_mid_blocks=2,
        num_heads=2,
        act_fn="gelu",
        static_chunk_size=2 * CHUNK,
        num_decoding_left_chunks=-1,
    )
    settings = {
        "sigma_min": 1e-6,
        "solver": "euler",
        "t_scheduler": "cosine",
        "training_cfg_rate": 0.2,
        "inference_cfg_rate": 0.7,
        "reg_loss_type": "l1",
    }
    solver = CausalConditionalCFM(
        in_channels=240, n_spks=1, spk_emb_dim=80, cfm_params=DictConfig(settings), estimator=estimator
    )
    return CausalMaskedDiffWithXvec(
        vocab_size=6561, input_frame_rate=25, pre_lookahead_len=3, encoder=encoder, decoder=solver
    )


def exact(flow: torch.nn.Module, patch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Float64 throughout, weights that matter everywhere."""
    import cosyvoice.flow.decoder as decoder

    patch.setattr(decoder, "mask_to_bias", lambda mask, dtype: (1.0 - mask.to(dtype)) * -1e10)
    flow = flow.double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for entrance in (flow.encoder.embed, flow.encoder.up_embed):
        table = entrance.pos_enc.pe
        distances = torch.arange(table.shape[1] // 2, -(table.shape[1] // 2) - 1, -1).double()
        rates = torch.exp(torch.arange(0, 512, 2).double() * -(math.log(10000.0) / 512))
        angles = distances[:, None] * rates
        sines = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[None]
        middle = slice(table.shape[1] // 2 - 100, table.shape[1] // 2 + 100)
        assert (table - sines).abs()[:, middle].max() < 1e-4
        entrance.pos_enc.pe = sines
    return flow


@pytest.fixture(scope="module")
def upstream() -> Iterator[torch.nn.Module]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_upstream(patch)
        yield exact(build_upstream(), patch)
        for name in [name for name in sys.modules if name.split(".")[0] in ("cosyvoice", "matcha")]:
            del sys.modules[name]
    logging.disable(level)


@pytest.fixture(scope="module")
def flow(upstream: torch.nn.Module) -> FlowMatching:
    with torch.device("meta"):
        made = FlowMatching(OURS)
    made.load_state_dict(from_upstream(upstream.state_dict(), OURS), assign=True)
    return made.eval()


class Case:
    """A prompt and tokens, and what upstream makes of them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 6561, (1, PROMPT + TOKENS), generator=generator)
        self.mel = torch.randn(1, 2 * PROMPT, 80, generator=generator).double()
        self.embedding = torch.randn(1, 192, generator=generator).double()

    def upstream(self, model: torch.nn.Module, *, streaming: bool, until: int, finalize: bool) -> list[Tensor]:
        """Encoder output, the samples each Euler step starts from, and the mel frames, all ``[T, 80]``."""
        inputs: list[Tensor] = []
        hook = model.decoder.estimator.register_forward_pre_hook(
            lambda _, given: inputs.extend((given[2][0].T.clone(), given[0][0].T.clone()))
        )
        told = self.tokens[:, :PROMPT]
        try:
            mel, _ = model.inference(
                token=self.tokens[:, PROMPT:until],
                token_len=torch.tensor([until - PROMPT], dtype=torch.int32),
                prompt_token=told,
                prompt_token_len=torch.tensor([PROMPT], dtype=torch.int32),
                prompt_feat=self.mel,
                prompt_feat_len=torch.tensor([2 * PROMPT], dtype=torch.int32),
                embedding=self.embedding,
                streaming=streaming,
                finalize=finalize,
            )
        finally:
            hook.remove()
        return [inputs[0], *inputs[1::2], mel[0].T]


@pytest.mark.parametrize("streaming", [False, True], ids=["full attention", "chunk mask"])
def test_every_euler_step(upstream: torch.nn.Module, flow: FlowMatching, streaming: bool) -> None:
    case = Case()
    mu, *starts, mel = case.upstream(upstream, streaming=streaming, until=PROMPT + TOKENS, finalize=True)
    lengths = torch.tensor([PROMPT + TOKENS])
    mask = Mask(CHUNK if streaming else None)
    with torch.no_grad():
        assert (flow.encode(case.tokens, lengths, mask)[0] - mu).abs().max() < 1e-12
    samples = flow.generate(case.tokens, lengths, case.mel, case.embedding, mask, every=True)[:, 0]
    assert len(starts) == len(samples) == 10
    assert torch.equal(flow.noise[: len(mu)].double(), starts[0])
    for ours, theirs in zip(samples, starts[1:], strict=False):
        assert (ours - theirs).abs().max() < 1e-12
    # Upstream returns float32.
    assert (samples[-1, 2 * PROMPT :] - mel).abs().max() < 1e-5
    assert mel.abs().mean() > 0.1


@pytest.mark.parametrize("schedule", [(CHUNK,), (CHUNK, 2 * CHUNK, 4 * CHUNK)], ids=str)
def test_the_official_hops(upstream: torch.nn.Module, flow: FlowMatching, schedule: tuple[int, ...]) -> None:
    """Each hop's frames are those upstream gets by computing all of the prefix again, under the trained mask."""
    case = Case()
    limits = FlowLimits(hops=(CHUNK, 2 * CHUNK, 4 * CHUNK), left=200, voices=1, prompt=PROMPT)
    model = StreamingFlow(flow, limits)
    model.prepare()
    voice = model.add_voice(case.tokens[0, :PROMPT].tolist(), case.mel[0], case.embedding[0])
    state = {name: spec.new(2) for name, spec in model.state_spec().items()}
    hops = Hops(voice, OURS, limits, schedule)
    steps = hops.push(case.tokens[0, PROMPT:].tolist())
    final = len(steps)
    steps += hops.finish()
    assert final >= 2
    assert len(steps) > final
    end, heard = voice.shared, []
    for number, hop in enumerate(steps):
        inputs = {name: torch.from_numpy(value)[None] for name, value in hop.inputs.items()}
        outputs = model.step(inputs, state, torch.tensor([0]), torch.tensor([True]))
        heard.append(outputs["mel"][0, hop.skip : hop.frames])
        end += int(hop.inputs["count"])
        last = number == len(steps) - 1
        until = end if last else end + OURS.lookahead
        theirs = case.upstream(upstream, streaming=True, until=until, finalize=last)[-1]
        assert (heard[-1] - theirs[-len(heard[-1]) :]).abs().max() < 1e-5
    assert sum(map(len, heard)) == 2 * TOKENS


def test_time_embeddings(upstream: torch.nn.Module, flow: FlowMatching) -> None:
    time = torch.tensor([0.0, 0.3, 0.975], dtype=torch.float64)
    estimator = upstream.decoder.estimator
    with torch.no_grad():
        embedded = estimator.time_mlp(estimator.time_embeddings(time))
        first = estimator.down_blocks[0][0].mlp(embedded)
        assert (flow.estimator.shifts(time)[:, 0] - first).abs().max() < 1e-12
