"""The UNet's velocity on a GPU: what lies between its products is a kernel each, or part of a product's.

A step has few rows, so that launches bound it. The sums are those of :mod:`.unet`, with the same roundings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.triton_conv import mish, mish_windows, windows
from ..layers.triton_fused import add_norm
from ..layers.triton_linear import FEW, WIDEST, norm_linear
from .flow_context import InPlace

if TYPE_CHECKING:
    from .unet import Estimator, Residual, Stage, TransformerBlock


def velocity(estimator: Estimator, x: Tensor, shifts: Tensor, context: InPlace) -> Tensor:
    """As :meth:`.unet.Estimator.forward`."""
    stages = [cast("Stage", stage) for stage in estimator.stages]
    each = estimator.config.stage_blocks
    branch: Tensor | None = None
    skip = x
    for index, stage in enumerate(stages):
        if index == len(stages) - 1:
            x, branch = torch.cat((_sum(x, branch), skip), 2), None
        x = _residual(stage.residual, x, branch, shifts[:, index, None], context)
        branch = None
        for layer, block in enumerate(cast("Iterable[TransformerBlock]", stage.blocks), index * each):
            x, branch = _block(block, x, branch, layer, context)
        if index == 0:
            conv = estimator.after_first
            skip, window = windows(x, branch, conv.kernel, *context.edges(conv.columns))
            x, branch = conv(window), None
    last, final, norm = estimator.after_last, estimator.final, estimator.norm
    _, window = windows(x, branch, last.kernel, *context.edges(last.columns))
    _, window = windows(last(window), None, final.kernel, *context.edges(final.columns))
    return estimator.project(mish(final(window), (norm.weight, norm.bias), norm.eps, None))


def _sum(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else x + branch


def _residual(residual: Residual, x: Tensor, branch: Tensor | None, shift: Tensor, context: InPlace) -> Tensor:
    """Of ``x + branch``."""
    conv1, conv2, norm1, norm2 = residual.conv1, residual.conv2, residual.norm1, residual.norm2
    x, window = windows(x, branch, conv1.kernel, *context.edges(conv1.columns))
    edges = context.edges(conv2.columns)
    window = mish_windows(conv1(window), (norm1.weight, norm1.bias), norm1.eps, shift, conv2.kernel, *edges)
    return mish(conv2(window), (norm2.weight, norm2.bias), norm2.eps, residual.skip(x))


def _block(
    block: TransformerBlock, x: Tensor, branch: Tensor | None, layer: int, context: InPlace
) -> tuple[Tensor, Tensor]:
    """A sum that waits to be made in, one that waits to be made out."""
    x, query = _norm_linear(x, branch, block.norm1, block.qkv, kept=context.room(layer).flatten(2))
    branch = block.out(context.attend(layer, query))
    x, wide = _norm_linear(x, branch, block.norm2, block.up, gelu=True)
    return x, block.down(wide)


def _norm_linear(
    x: Tensor,
    branch: Tensor | None,
    norm: nn.LayerNorm,
    linear: Linear,
    *,
    gelu: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`~..layers.triton_linear.norm_linear`; of many rows the norm is made once, then the product."""
    if x.shape[0] * x.shape[1] <= FEW and x.shape[2] <= WIDEST:
        affine = norm.weight, norm.bias
        return norm_linear(x, branch, affine, norm.eps, linear.weight, linear.bias, gelu=gelu, kept=kept)
    total, normed = add_norm(x, branch, None, norm.weight, norm.bias, norm.eps)
    made = linear(normed)
    if kept is not None:
        made, rest = made.split((made.shape[2] - kept.shape[2], kept.shape[2]), 2)
        kept.copy_(rest)
    return total, F.gelu(made) if gelu else made
