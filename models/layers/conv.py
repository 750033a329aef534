"""Causal convolutions over time, a whole signal or a step of many sessions at a time; may be packed (see
:mod:`.packing`).

The streaming is that of Kyutai's Moshi (``moshi/modules/conv.py``; arXiv 2410.00037, section 3.3): a convolution
remembers the inputs that its next window overlaps, a transposed one the outputs that are not complete yet. A step of
many frames is the same as many steps of one.

A packed layer is a matrix product over the windows: for the few frames of a step on the CPU up to fifteen times as fast
as torch's convolution, which brings wide kernels into another order at every call. It makes its result with the
channels innermost in memory: what follows gets a ``[B, C, T]`` view, and another packed layer takes it without a copy.
On a GPU torch reorders a convolution's input and output: there a kernel of :mod:`.triton_windows` writes the windows
and another adds the outputs up; a product of ``LARGE`` work is left to the convolution, which may use 19-bit floats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..streaming import Specs, State, TensorSpec
from .kernels import use_kernels
from .linear import plain_linear
from .packing import Packable, pack_weight, packed_linear

# Operations from which a GPU's tensor cores make up for what a convolution costs beside its products, and the least
# numbers in a window and outputs of it: with fewer, memory is what a product waits for.
LARGE = 500e6
LEAST_INPUTS = 128
LEAST_OUTPUTS = 16


def joined(x: Tensor, branch: Tensor | None, elu: bool) -> Tensor:
    """``x + branch``, through ELU if asked for."""
    if branch is not None:
        x = x + branch
    return F.elu(x, inplace=branch is not None) if elu else x


class CausalConv1d(Packable, nn.Conv1d):
    """A convolution that sees no later input than the last of its stride.

    The ``(kernel - 1) * dilation + 1 - stride`` inputs before the first are zeros, or copies of the first
    (``pad="replicate"``). Raises ValueError for a kernel that is shorter than its stride.
    """

    packed: Tensor | None = None

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        pad: Literal["zeros", "replicate"] = "zeros",
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride, 0, dilation, groups, bias)
        self.past = (kernel - 1) * dilation + 1 - stride
        if self.past < 0:
            raise ValueError(f"a kernel of {kernel} with dilation {dilation} skips inputs at a stride of {stride}")
        if pad not in ("zeros", "replicate"):
            raise ValueError(f"pad must be zeros or replicate, got {pad!r}")
        self.replicate = pad == "replicate"

    def pack(self) -> None:
        """Make the packed copy; does nothing for grouped convolutions."""
        self.packed = _pack(self.weight.detach().transpose(1, 2).flatten(1)) if self.groups == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T] -> [B, C', T / stride]``. Raises ValueError where the stride does not divide T."""
        self._check(x)
        return self._convolve(F.pad(x, (self.past, 0), mode="replicate" if self.replicate else "constant"))

    def state_spec(self, prefix: str, dtype: torch.dtype) -> Specs:
        """The inputs that the next step's first window needs."""
        if not self.past:
            return {}
        spec = {f"{prefix}.past": TensorSpec((self.past, self.in_channels), dtype)}
        return spec | {f"{prefix}.started": TensorSpec((), torch.bool)} if self.replicate else spec

    def step(
        self,
        prefix: str,
        x: Tensor,
        state: State,
        slots: Tensor,
        target: Tensor,
        branch: Tensor | None = None,
        elu: bool = False,
    ) -> Tensor:
        """The sessions' next inputs ``[B, C, T] -> [B, C', T / stride]``.

        state, slots: as in :class:`~antiphon.models.streaming.StreamingModel`; target ``[B]``: the slots to write.
        branch, elu: the inputs are ``x + branch``, through ELU. Raises ValueError where the stride does not divide T.
        """
        self._check(x)
        memory, started = state.get(f"{prefix}.past"), state.get(f"{prefix}.started")
        if self.packed is not None and use_kernels(x):
            return self._step_kernels(self.packed, x, memory, started, slots, target, branch, elu)
        x = joined(x, branch, elu)
        if memory is None:
            return self._convolve(x)
        x = x.transpose(1, 2)
        past = memory.index_select(0, slots)
        if started is not None:
            past = torch.where(started.index_select(0, slots)[:, None, None], past, x[:, :1])
            started.index_fill_(0, target, True)
        window = torch.cat((past, x), 1)
        memory.index_copy_(0, target, window[:, -self.past :])
        return self._convolve(window.transpose(1, 2))

    def _step_kernels(
        self,
        matrix: Tensor,
        x: Tensor,
        memory: Tensor | None,
        started: Tensor | None,
        slots: Tensor,
        target: Tensor,
        branch: Tensor | None,
        elu: bool,
    ) -> Tensor:
        from .triton_windows import STEPS, WIDEST, single, windows

        (kernel,), (stride,), (dilation,) = self.kernel_size, self.stride, self.dilation
        thin = self.out_channels == 1 and self.in_channels <= WIDEST
        if thin and stride == dilation == 1 and kernel <= STEPS and started is None:
            x = single(x.transpose(1, 2), _innermost(branch), elu, memory, slots, target, matrix, self.bias)
            return x.transpose(1, 2)
        large = _is_large(x.shape[0] * x.shape[2] // stride, matrix)
        sizes = (1, 1, 1) if large else (kernel, stride, dilation)
        x = x.transpose(1, 2)
        if memory is not None or branch is not None or elu or sizes != (1, 1, 1):
            x = windows(x, _innermost(branch), elu, memory, slots, target, started, *sizes)
        if started is not None:
            started.index_fill_(0, target, True)
        if large:
            return _convolved(x, matrix, self.bias, kernel, stride, dilation).transpose(1, 2)
        return _linear(x, matrix, self.bias).transpose(1, 2)

    def _check(self, x: Tensor) -> None:
        if x.shape[2] % self.stride[0]:
            raise ValueError(f"{x.shape[2]} inputs are no multiple of the stride {self.stride[0]}")

    def _convolve(self, x: Tensor) -> Tensor:
        if self.packed is None or torch.is_grad_enabled():
            return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        (kernel,), (stride,), (dilation,) = self.kernel_size, self.stride, self.dilation
        if _is_large(len(x) * (x.shape[2] - self.past) // stride, self.packed):
            signal = x.transpose(1, 2).contiguous()
            return _convolved(signal, self.packed, self.bias, kernel, stride, dilation).transpose(1, 2)
        return _linear(self._windows(x), self.packed, self.bias).transpose(1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        """``[B, C, past + T] -> [B, T / stride, kernel * C]``."""
        x = x.transpose(1, 2).contiguous()
        rows, steps, channels = x.shape
        (kernel,), (stride,), (dilation,) = self.kernel_size, self.stride, self.dilation
        shape = (rows, (steps - self.past) // stride, kernel, channels)
        strides = (steps * channels, stride * channels, dilation * channels, 1)
        return x.as_strided(shape, strides).flatten(2)


class CausalConvTranspose1d(Packable, nn.ConvTranspose1d):
    """A transposed convolution whose outputs past ``stride`` times the inputs are cut off: they await later inputs.

    Raises ValueError for a kernel that is shorter than its stride.
    """

    packed: Tensor | None = None

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups, bias=bias)
        self.rest = kernel - stride
        if self.rest < 0:
            raise ValueError(f"a kernel of {kernel} leaves gaps at a stride of {stride}")

    def pack(self) -> None:
        """Make the packed copy; does nothing for grouped convolutions."""
        self.packed = None
        if self.groups == 1:
            whole = F.pad(self.weight.detach(), (0, -self.kernel_size[0] % self.stride[0]))
            self.packed = _pack(whole.permute(2, 1, 0).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the length is not up to the caller
        """``[B, C, T] -> [B, C', T * stride]``."""
        return self._add_bias(self._spread(x)[..., : x.shape[2] * self.stride[0]])

    def state_spec(self, prefix: str, dtype: torch.dtype) -> Specs:
        """The outputs that await later inputs, without the bias."""
        return {f"{prefix}.rest": TensorSpec((self.rest, self.out_channels), dtype)} if self.rest else {}

    def step(
        self,
        prefix: str,
        x: Tensor,
        state: State,
        slots: Tensor,
        target: Tensor,
        branch: Tensor | None = None,
        elu: bool = False,
    ) -> Tensor:
        """The sessions' next inputs ``[B, C, T] -> [B, C', T * stride]``; arguments as in CausalConv1d."""
        if self.rest == self.stride[0] and (self.packed is not None or self._depthwise) and use_kernels(x):
            return self._step_kernels(x, state[f"{prefix}.rest"], slots, target, branch, elu)
        y, length = self._spread(joined(x, branch, elu)), x.shape[2] * self.stride[0]
        if self.rest:
            memory = state[f"{prefix}.rest"]
            y[..., : self.rest] += memory.index_select(0, slots).transpose(1, 2)
            memory.index_copy_(0, target, y[..., length : length + self.rest].transpose(1, 2))
        return self._add_bias(y[..., :length])

    def _step_kernels(
        self, x: Tensor, memory: Tensor, slots: Tensor, target: Tensor, branch: Tensor | None, elu: bool
    ) -> Tensor:
        from .triton_windows import overlap, windows

        x = x.transpose(1, 2)
        if branch is not None or elu:
            x = windows(x, _innermost(branch), elu, None, slots, target, None)
        return overlap(self._parts(x), self.bias, memory, slots, target).transpose(1, 2)

    @property
    def _depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def _parts(self, x: Tensor) -> Tensor:
        """What each input adds to: ``[B, T, C] -> [B, T, kernel * C']``, filled up to whole strides."""
        if self.packed is None:
            return (x[:, :, None] * self.weight[:, 0].t()).flatten(2)
        if _is_large(x.shape[0] * x.shape[1], self.packed):
            return _convolved(x, self.packed, None)
        return _linear(x, self.packed, None)

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias[:, None]

    def _spread(self, x: Tensor) -> Tensor:
        """All that the inputs contribute to, without the bias: ``[B, C, T] -> [B, C', >= T * stride + rest]``."""
        if self.packed is None or torch.is_grad_enabled():
            return F.conv_transpose1d(x, self.weight, None, self.stride, groups=self.groups)
        (stride,), steps = self.stride, x.shape[2]
        parts = self._parts(x.transpose(1, 2))
        parts = parts.unflatten(2, (-1, stride * self.out_channels))  # [B, T, strides of the kernel, ...]
        y = F.pad(parts[:, :, 0], (0, 0, 0, parts.shape[2] - 1))
        for late in range(1, parts.shape[2]):
            y[:, late : late + steps] += parts[:, :, late]
        return y.reshape(len(y), -1, self.out_channels).transpose(1, 2)


def _pack(matrix: Tensor) -> Tensor | None:
    """What products take of ``[out, in]``: on a GPU a copy in this order."""
    return matrix.contiguous() if matrix.is_cuda else pack_weight(matrix)


def _innermost(x: Tensor | None) -> Tensor | None:
    """``[B, C, T] -> [B, T, C]``."""
    return None if x is None else x.transpose(1, 2)


def _is_large(rows: int, matrix: Tensor) -> bool:
    """Whether ``rows`` products with a matrix are better a convolution."""
    if matrix.is_mkldnn or matrix.shape[0] < LEAST_OUTPUTS or matrix.shape[1] < LEAST_INPUTS:
        return False
    return 2 * rows * matrix.numel() >= LARGE


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear(x, matrix, bias) if matrix.is_mkldnn else plain_linear(x, matrix, bias)


def _convolved(
    x: Tensor, matrix: Tensor, bias: Tensor | None, kernel: int = 1, stride: int = 1, dilation: int = 1
) -> Tensor:
    """Torch's convolution of ``[B, T, C]`` by ``[out, kernel * C]``, neither of which it has to reorder."""
    weight = matrix.view(len(matrix), kernel, 1, -1).permute(0, 3, 1, 2)
    image = x[:, :, None].permute(0, 3, 1, 2)  # channels last
    y = F.conv2d(image, weight, bias, (stride, 1), 0, (dilation, 1))
    return y.permute(0, 2, 3, 1).flatten(1, 2)
