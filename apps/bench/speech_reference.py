"""The reference of ``bench speech``: upstream's own serving class, from the package ``cosyvoice2-eu``.

``CosyVoice2Model.tts(stream=True)`` as published: the language model token by token in a thread of its own, the flow
over the prompt and everything before at each hop, polled for every 100 ms. Weights are random, in float16 on a GPU as
its ``fp16=True`` has it, and no utterance ends early. Its measured time is from the call to the first samples.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any, cast

import torch
from torch import nn

from ...codecs.hift import HiFTConfig
from ...models.cosyvoice.flow_config import FlowConfig
from ...models.cosyvoice.lm_config import LMConfig
from .references import synchronize

WIDTH = 512  # of its encoder, which knows no other


class Upstream:
    """Upstream's models of given sizes. Raises ImportError where a package is missing."""

    name = "cosyvoice2-eu"

    def __init__(
        self, lm: LMConfig, flow: FlowConfig, vocoder: HiFTConfig, device: torch.device, *, prompt: int, half: bool
    ) -> None:
        """prompt: tokens of the voice's clip."""
        warnings.filterwarnings("ignore")
        with _stand_ins(), redirect_stdout(StringIO()):
            module: Any = import_module("cosyvoice.cli.model")
            parts = (_language_model(lm), _flow(flow), _vocoder(vocoder))
            # It looks for a device itself.
            self.model = module.CosyVoice2Model(*(part.to(device).eval() for part in parts), fp16=half)
        self.model.device = device
        if device.type != "cuda":
            self.model.llm_context = nullcontext()
        self.device, self.lm, self.prompt = device, lm, prompt
        generator = torch.Generator().manual_seed(0)
        self.speech = torch.randint(lm.speech, (1, prompt), generator=generator)
        self.mel = torch.randn(1, 2 * prompt, flow.mels, generator=generator)
        self.speaker = torch.randn(1, flow.speaker, generator=generator)
        ratio = lm.extent[1]
        self.model.llm.inference = functools.partial(
            self.model.llm.inference, max_token_text_ratio=ratio, min_token_text_ratio=ratio
        )

    def times(self, text: int, prompt_text: int, seed: int) -> tuple[float, float, int]:
        """Seconds to the first samples and to the last of an utterance of ``text`` tokens, and its samples."""
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.lm.text, (1, text + prompt_text), generator=generator)
        half = next(self.model.flow.parameters()).dtype
        begin = synchronize(self.device)
        first, count = 0.0, 0
        for chunk in self.model.tts(
            text=tokens[:, prompt_text:],
            flow_embedding=self.speaker.to(half),
            llm_embedding=self.speaker.to(half),
            prompt_text=tokens[:, :prompt_text],
            llm_prompt_speech_token=self.speech,
            flow_prompt_speech_token=self.speech,
            prompt_speech_feat=self.mel.to(half),
            stream=True,
        ):
            count += chunk["tts_speech"].shape[1]
            first = first or time.perf_counter() - begin
        return first, synchronize(self.device) - begin, count


class _Cache(nn.Module):
    """Upstream's backbone passes a mask of the new positions, which current transformers take for one of all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, attention_mask: Any = None, **given: Any) -> Any:
        return self.model(**given)


def _language_model(config: LMConfig) -> nn.Module:
    llm: Any = import_module("cosyvoice.llm.llm")
    transformers: Any = import_module("transformers")
    common: Any = import_module("cosyvoice.utils.common")
    settings = transformers.Qwen2Config(
        vocab_size=config.text,
        hidden_size=config.width,
        intermediate_size=config.feedforward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        rms_norm_eps=config.eps,
        tie_word_embeddings=True,
    )
    encoder = llm.Qwen2Encoder.__new__(llm.Qwen2Encoder)
    nn.Module.__init__(encoder)
    backbone = transformers.Qwen2ForCausalLM(settings)
    encoder.model = _Cache(backbone)
    encoder.hidden_size = config.width
    encoder.get_input_embeddings = backbone.get_input_embeddings
    made = llm.Qwen2LM(
        config.width, config.width, config.speech, encoder, sampling=common.ras_sampling, mix_ratio=list(config.mix)
    )
    with torch.no_grad():
        made.llm_decoder.bias[config.speech :] -= 100
    return cast(nn.Module, made)


def _flow(config: FlowConfig) -> nn.Module:
    encoder = import_module("cosyvoice.transformer.upsample_encoder").UpsampleConformerEncoder(
        input_size=WIDTH,
        output_size=WIDTH,
        attention_heads=8,
        linear_units=config.feedforward,
        num_blocks=config.layers,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        use_cnn_module=False,
        macaron_style=False,
        static_chunk_size=config.chunk,
    )
    estimator = import_module("cosyvoice.flow.decoder").CausalConditionalDecoder(
        in_channels=4 * config.mels,
        out_channels=config.mels,
        channels=[config.channels],
        dropout=0.0,
        attention_head_dim=config.unet_head_width,
        n_blocks=config.stage_blocks,
        num_mid_blocks=config.middle_stages,
        num_heads=config.unet_heads,
        act_fn="gelu",
        static_chunk_size=2 * config.chunk,
        num_decoding_left_chunks=-1,
    )
    settings = {
        "sigma_min": 1e-6,
        "solver": "euler",
        "t_scheduler": "cosine",
        "training_cfg_rate": 0.2,
        "inference_cfg_rate": config.guidance,
        "reg_loss_type": "l1",
    }
    solver = import_module("cosyvoice.flow.flow_matching").CausalConditionalCFM(
        in_channels=3 * config.mels,
        n_spks=1,
        spk_emb_dim=config.mels,
        cfm_params=import_module("omegaconf").DictConfig(settings),
        estimator=estimator,
    )
    made = import_module("cosyvoice.flow.flow").CausalMaskedDiffWithXvec(
        input_size=WIDTH,
        output_size=config.mels,
        spk_embed_dim=config.speaker,
        vocab_size=config.vocabulary,
        input_frame_rate=25,
        pre_lookahead_len=config.lookahead,
        encoder=encoder,
        decoder=solver,
    )
    return cast(nn.Module, made)


def _vocoder(config: HiFTConfig) -> nn.Module:
    predictor: Any = import_module("cosyvoice.hifigan.f0_predictor")
    dilations = list(config.dilations)
    made = import_module("cosyvoice.hifigan.generator").HiFTGenerator(
        in_channels=config.mels,
        base_channels=config.width,
        nb_harmonics=config.harmonics - 1,
        sampling_rate=config.sample_rate,
        nsf_alpha=config.amplitude,
        nsf_sigma=config.noise,
        nsf_voiced_threshold=config.voiced_hertz,
        upsample_rates=list(config.rates),
        upsample_kernel_sizes=list(config.kernels),
        istft_params={"n_fft": config.n_fft, "hop_len": config.hop},
        resblock_kernel_sizes=list(config.block_kernels),
        resblock_dilation_sizes=[dilations] * len(config.block_kernels),
        source_resblock_kernel_sizes=list(config.source_kernels),
        source_resblock_dilation_sizes=[dilations] * len(config.source_kernels),
        f0_predictor=predictor.ConvRNNF0Predictor(1, config.mels, config.pitch_width),
    )
    return cast(nn.Module, made)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand in for what upstream imports beside the models: audio input and output, a logger, a name that moved."""
    logging.disable(logging.WARNING)
    made = {}
    if importlib.util.find_spec("torchaudio") is None:
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi", "torchaudio.transforms"):
            made[name] = _module(name)
    found = importlib.util.find_spec("matcha")
    if found is None or not found.submodule_search_locations:
        raise ImportError("no package matcha: it comes with cosyvoice2-eu", name="cosyvoice2-eu")
    made["matcha.utils"] = _module("matcha.utils", __path__=[f"{next(iter(found.submodule_search_locations))}/utils"])
    made["matcha.utils.pylogger"] = _module("matcha.utils.pylogger", get_pylogger=logging.getLogger)
    if importlib.util.find_spec("diffusers.models.lora") is None:
        made["diffusers.models.lora"] = _module("diffusers.models.lora", LoRACompatibleLinear=nn.Linear)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        logging.disable(logging.NOTSET)


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update({"__path__": []} | attributes)
    return module
