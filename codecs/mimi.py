"""Mimi, the neural codec of Moshi (arXiv 2410.00037, section 3.3): 24 kHz sound to 12.5 frames a second of 8 to 32
codes of 11 bits, and back, a frame at a time.

SEANet, a transformer at 25 Hz, a convolution to 12.5 Hz and split residual vector quantisation, then the mirror image.
:class:`Mimi` runs whole signals; :class:`MimiEncoder` and :class:`MimiDecoder` are the same networks stepped over
sessions' slots. A step equals the whole signal for as long as a session lasts: Kyutai's streaming code overwrites keys
that its window still needs once the first 10 s are over, transformers' decoder keeps no state of its convolutions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers.conv import CausalConv1d, CausalConvTranspose1d, joined
from ..models.layers.packing import pack
from ..models.layers.transformer import Transformer
from ..models.streaming import Specs, State, StreamingModel, TensorSpec
from .mimi_config import DOWN, MimiConfig
from .mimi_quantizer import SplitQuantizer
from .mimi_seanet import Convolution, SeanetDecoder, SeanetEncoder

__all__ = ["Mimi", "MimiConfig", "MimiDecoder", "MimiEncoder"]


class Context(Protocol):
    """Where a layer finds what came before its input."""

    def convolve(self, layer: Convolution, x: Tensor, branch: Tensor | None = None, elu: bool = False) -> Tensor:
        """``[B, C, T] -> [B, C', T']``, of ``x + branch``, through ELU if asked for."""

    def transform(self, layer: Transformer, x: Tensor) -> Tensor:
        """``[B, T, d] -> [B, T, d]``."""


class Whole:
    """Whole signals: nothing came before."""

    def convolve(self, layer: Convolution, x: Tensor, branch: Tensor | None = None, elu: bool = False) -> Tensor:
        result: Tensor = layer(joined(x, branch, elu))
        return result

    def transform(self, layer: Transformer, x: Tensor) -> Tensor:
        result: Tensor = layer(x, layer.whole(x.shape[1], x.device))
        return result


class Half(nn.Module):
    """What the encoder and the decoder have in common: their layers' names in the sessions' state."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def names(self) -> dict[nn.Module, str]:
        """Of all layers that keep state."""
        kept = (CausalConv1d, CausalConvTranspose1d, Transformer)
        return {layer: f"{self.prefix}.{name}" for name, layer in self.named_modules() if isinstance(layer, kept)}


class Encoder(Half):
    """Samples to latents."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__("mimi.encoder")
        self.seanet = SeanetEncoder(config)
        self.transformer = Transformer(config.transformer)
        self.downsample = CausalConv1d(config.width, config.width, 2 * DOWN, DOWN, bias=False, pad="replicate")

    def forward(self, pcm: Tensor, context: Context) -> Tensor:
        """``[B, frame * n] -> [B, n, d]``."""
        x = self.seanet(pcm[:, None], context.convolve)
        x = context.transform(self.transformer, x.transpose(1, 2))
        return context.convolve(self.downsample, x.transpose(1, 2)).transpose(1, 2)


class Decoder(Half):
    """Latents to samples."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__("mimi.decoder")
        width = config.width
        self.upsample = CausalConvTranspose1d(width, width, 2 * DOWN, DOWN, groups=width, bias=False)
        self.transformer = Transformer(config.transformer)
        self.seanet = SeanetDecoder(config)

    def forward(self, latents: Tensor, context: Context) -> Tensor:
        """``[B, n, d] -> [B, frame * n]``."""
        x = context.convolve(self.upsample, latents.transpose(1, 2))
        x = context.transform(self.transformer, x.transpose(1, 2))
        pcm: Tensor = self.seanet(x.transpose(1, 2), context.convolve)
        return pcm.flatten(1)


class Mimi(nn.Module):
    """The whole codec, for whole signals."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = SplitQuantizer(config.width, config.codebooks, config.semantic, config.bins, config.code_width)
        self.decoder = Decoder(config)

    def encode(self, pcm: Tensor, codebooks: int | None = None) -> Tensor:
        """``[B, T]`` samples, filled up with zeros to whole frames, ``-> [B, codebooks, n]`` int64; by default all.

        Raises ValueError for a number of codebooks that the codec does not have.
        """
        codebooks = self.config.codebooks if codebooks is None else codebooks
        self.quantizer.check(codebooks)
        pcm = F.pad(pcm, (0, -pcm.shape[1] % self.config.frame))
        return self.quantizer.encode(self.encoder(pcm, Whole()), codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """``[B, codebooks, n] -> [B, frame * n]`` samples; the number of codebooks is up to the caller."""
        self.quantizer.check(codes.shape[1])
        pcm: Tensor = self.decoder(self.quantizer.decode(codes), Whole())
        return pcm


class _Streaming(StreamingModel):
    """One half over slots; ``codebooks`` codes a frame. The variant is the frames of a step."""

    def __init__(self, mimi: Mimi, network: Half, codebooks: int) -> None:
        super().__init__()
        mimi.quantizer.check(codebooks)
        self.config = mimi.config
        self.codebooks = codebooks
        self.network = network
        self.quantizer = mimi.quantizer
        self._names = network.names()

    @property
    def variants(self) -> tuple[int, ...]:
        return self.config.steps

    def tick(self, variant: Hashable) -> float:
        return _frames(variant) / self.config.frame_rate

    def prepare(self) -> None:
        self.eval()
        pack(self)

    def state_spec(self) -> Specs:
        spec: dict[str, TensorSpec] = {}
        for layer, name in self._names.items():
            if isinstance(layer, Transformer):
                spec |= layer.state_spec(name)
            elif isinstance(layer, CausalConv1d | CausalConvTranspose1d):
                spec |= layer.state_spec(name, layer.weight.dtype)
        return spec

    @torch.no_grad()
    def step(self, inputs: State, state: State, slots: Tensor, active: Tensor) -> dict[str, Tensor]:
        return self._step(inputs, _Slots(self._names, state, slots, active))

    @abstractmethod
    def _step(self, inputs: State, context: Context) -> dict[str, Tensor]: ...


class MimiEncoder(_Streaming):
    """``pcm [B, frame * n]`` float32 -> ``codes [B, codebooks, n]`` int64.

    The first k codebooks of a session are its codes at k codebooks. Raises ValueError for a number of codebooks that
    the codec does not have.
    """

    def __init__(self, mimi: Mimi, codebooks: int = 8) -> None:
        super().__init__(mimi, mimi.encoder, codebooks)

    def input_spec(self, variant: Hashable) -> Specs:
        return {"pcm": TensorSpec((_frames(variant) * self.config.frame,))}

    def _step(self, inputs: State, context: Context) -> dict[str, Tensor]:
        pcm = inputs["pcm"].to(self.quantizer.semantic.into.weight.dtype)
        return {"codes": self.quantizer.encode(self.network(pcm, context), self.codebooks)}


class MimiDecoder(_Streaming):
    """``codes [B, codebooks, n]`` int64 -> ``pcm [B, frame * n]`` float32.

    A session with fewer codebooks has -1 for the others. Raises ValueError for a number of codebooks that the codec
    does not have.
    """

    def __init__(self, mimi: Mimi, codebooks: int = 8) -> None:
        super().__init__(mimi, mimi.decoder, codebooks)

    def input_spec(self, variant: Hashable) -> Specs:
        return {"codes": TensorSpec((self.codebooks, _frames(variant)), torch.int64, -1)}

    def probe_inputs(self, variant: Hashable, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random codes, for measuring which batch sizes are exact."""
        shape = (rows, self.codebooks, _frames(variant))
        return {"codes": torch.randint(self.config.bins, shape, generator=generator)}

    def _step(self, inputs: State, context: Context) -> dict[str, Tensor]:
        return {"pcm": self.network(self.quantizer.decode(inputs["codes"]), context).float()}


class _Slots:
    """The next of ``B`` sessions' signals."""

    def __init__(self, names: dict[nn.Module, str], state: State, slots: Tensor, active: Tensor) -> None:
        self.names, self.state, self.slots = names, state, slots
        scratch = next(iter(state.values())).shape[0] - 1
        self.target = torch.where(active, slots, scratch)

    def convolve(self, layer: Convolution, x: Tensor, branch: Tensor | None = None, elu: bool = False) -> Tensor:
        return layer.step(self.names[layer], x, self.state, self.slots, self.target, branch, elu)

    def transform(self, layer: Transformer, x: Tensor) -> Tensor:
        return layer.step(self.names[layer], x, self.state, self.slots, self.target)


def _frames(variant: Hashable) -> int:
    if not isinstance(variant, int):
        raise TypeError(f"the variant of a codec is the frames of a step, got {variant!r}")
    return variant
