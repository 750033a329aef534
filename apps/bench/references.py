"""The reference recognisers that ``bench asr`` times: NeMo's and transformers' own cache-aware streaming.

Each takes the weights in its publisher's names and yields the seconds of every chunk, features in and tokens out, the
features made beforehand. NeMo: ``ConformerEncoder`` with its cache tuple and the label-looping decoder (CUDA graphs on
a GPU). transformers: ``NemotronAsrStreamingForRNNT.generate`` fed by a generator, timed between the chunks it asks for.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...models.conformer.config import ConformerConfig, TransducerConfig


def synchronize(device: torch.device) -> float:
    """The time once everything queued on the device is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def chunks(mel: Tensor, lookahead: int) -> Iterator[Tensor]:
    """``[B, T, F]`` in the chunks both references take: ``1 + 8 R`` frames, then ``8 (R + 1)`` each."""
    start, size = 0, 1 + 8 * lookahead
    while start + size <= mel.shape[1]:
        yield mel[:, start : start + size]
        start, size = start + size, 8 * (lookahead + 1)


class NeMo:
    """NeMo's streaming encoder and greedy decoder."""

    name = "nemo_toolkit"

    def __init__(
        self,
        encoder: ConformerConfig,
        decoder: TransducerConfig,
        weights: Mapping[str, Tensor],
        lookahead: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
        from nemo.collections.asr.modules.rnnt import RNNTDecoder, RNNTJoint
        from nemo.collections.asr.parts.submodules.transducer_decoding import GreedyBatchedRNNTLabelLoopingComputer

        self.lookahead = lookahead
        self.encoder = ConformerEncoder(
            feat_in=encoder.mels,
            n_layers=encoder.layers,
            d_model=encoder.width,
            feat_out=-1,
            subsampling="dw_striding",
            subsampling_factor=8,
            subsampling_conv_channels=encoder.channels,
            causal_downsampling=True,
            ff_expansion_factor=encoder.feedforward // encoder.width,
            self_attention_model="rel_pos",
            n_heads=encoder.heads,
            att_context_size=[[encoder.left, lookahead]],
            att_context_style="chunked_limited",
            xscaling=encoder.scale_input,
            untie_biases=True,
            pos_emb_max_len=5000,
            conv_kernel_size=encoder.kernel,
            conv_norm_type=encoder.conv_norm,
            conv_context_size="causal",
            dropout=0.0,
            dropout_pre_encoder=0.0,
            dropout_emb=0.0,
            dropout_att=0.0,
            use_bias=encoder.bias,
        )
        words = [str(index) for index in range(decoder.vocabulary)]
        prediction = {"pred_hidden": decoder.width, "pred_rnn_layers": decoder.layers, "t_max": None, "dropout": 0.0}
        network = {
            "encoder_hidden": encoder.width,
            "pred_hidden": decoder.width,
            "joint_hidden": decoder.joint_width,
            "activation": "relu",
            "dropout": 0.2,
        }
        self.decoder = RNNTDecoder(prednet=prediction, vocab_size=decoder.vocabulary, blank_as_pad=True)
        self.joint = RNNTJoint(jointnet=network, num_classes=decoder.vocabulary, vocabulary=words)
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder), ("joint", self.joint)):
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own)
            module.to(device, dtype).eval()
        self.encoder.setup_streaming_params()
        self.greedy = GreedyBatchedRNNTLabelLoopingComputer(
            decoder=self.decoder,
            joint=self.joint,
            blank_index=decoder.blank,
            max_symbols_per_step=decoder.max_symbols,
            allow_cuda_graphs=device.type == "cuda",
        )
        self.device, self.dtype = device, dtype
        self.tokens: list[list[int]] = []

    @torch.inference_mode()
    def times(self, mel: Tensor) -> list[float]:
        """Seconds of each chunk of ``mel [B, T, F]``; the tokens are in ``tokens``."""
        config, rows = self.encoder.streaming_cfg, mel.shape[0]
        mel = mel.transpose(1, 2).to(self.device, self.dtype)
        cache = self.encoder.get_initial_cache_state(batch_size=rows, dtype=self.dtype, device=self.device)
        state: Any = None
        drop = config.drop_extra_pre_encoded
        self.tokens = [[] for _ in range(rows)]
        seconds: list[float] = []
        position, size = 0, config.chunk_size[0]
        while position + size <= mel.shape[2]:
            later = int(position > 0)
            begin = synchronize(self.device)
            low = position - config.pre_encode_cache_size[later]
            window = torch.nn.functional.pad(mel[:, :, max(low, 0) : position + size], (max(0, -low), 0))
            config.drop_extra_pre_encoded = drop * later
            length = torch.full((rows,), window.shape[2], dtype=torch.int64, device=self.device)
            returned = self.encoder.forward_internal(window, length, *cache)
            frames, valid, *cache = self.encoder.streaming_post_process(returned, keep_all_outputs=False)
            hypotheses, state = self._decode(frames.transpose(1, 2), valid, state)
            counts, labels = hypotheses.current_lengths.tolist(), hypotheses.transcript.tolist()
            seconds.append(synchronize(self.device) - begin)
            for row in range(rows):
                self.tokens[row] += labels[row][: counts[row]]
            position += config.shift_size[later]
            size = config.chunk_size[1]
        config.drop_extra_pre_encoded = drop
        return seconds

    def _decode(self, frames: Tensor, valid: Tensor, state: Any) -> tuple[Any, Any]:
        decode = self.greedy if self.device.type == "cuda" else self.greedy.torch_impl
        hypotheses, *_, state = decode(frames, valid, state)
        return hypotheses, state


class Transformers:
    """transformers' streaming generation."""

    name = "transformers"

    def __init__(
        self,
        encoder: ConformerConfig,
        decoder: TransducerConfig,
        weights: Mapping[str, Tensor],
        lookahead: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        from transformers import (
            NemotronAsrStreamingConfig,
            NemotronAsrStreamingEncoderConfig,
            NemotronAsrStreamingForRNNT,
        )

        inner = NemotronAsrStreamingEncoderConfig(
            hidden_size=encoder.width,
            num_hidden_layers=encoder.layers,
            num_attention_heads=encoder.heads,
            intermediate_size=encoder.feedforward,
            conv_kernel_size=encoder.kernel,
            subsampling_conv_channels=encoder.channels,
            num_mel_bins=encoder.mels,
            sliding_window=encoder.left + 1,
            default_num_lookahead_tokens=lookahead,
            scale_input=encoder.scale_input,
            attention_bias=encoder.bias,
            convolution_bias=encoder.conv_bias,
        )
        config = NemotronAsrStreamingConfig(
            encoder_config=inner,
            vocab_size=decoder.vocabulary + 1,
            blank_token_id=decoder.blank,
            decoder_hidden_size=decoder.width,
            num_decoder_layers=decoder.layers,
            max_symbols_per_step=decoder.max_symbols,
        )
        make: Any = NemotronAsrStreamingForRNNT  # its annotations differ from version to version
        self.model = make(config)
        self.model.load_state_dict(dict(weights))
        self.model.to(device, dtype).eval()
        self.model.generation_config.decoder_start_token_id = decoder.blank
        self.model.generation_config.pad_token_id = 0
        self.blank, self.lookahead, self.device, self.dtype = decoder.blank, lookahead, device, dtype
        self.tokens: list[list[int]] = []

    @torch.inference_mode()
    def times(self, mel: Tensor) -> list[float]:
        """Seconds of each chunk of ``mel [B, T, F]``; the tokens are in ``tokens`` (right for one row only)."""
        mel = mel.to(self.device, self.dtype)
        moments: list[float] = []

        def feed() -> Iterator[Tensor]:
            for chunk in chunks(mel, self.lookahead):
                moments.append(synchronize(self.device))
                yield chunk
            moments.append(synchronize(self.device))

        frames = 1 + mel.shape[1] // 8
        out = self.model.generate(
            input_features=feed(),
            num_lookahead_tokens=self.lookahead,
            return_dict_in_generate=True,
            max_new_tokens=frames * 11,
        )
        self.tokens = [[token for token in row if token != self.blank] for row in out.sequences.tolist()]
        return [after - before for before, after in pairwise(moments)]
