"""2-D pooling: maximum and average, fixed and adaptive windows.

    y[n, c, p, q] = max or mean of x[n, c, h, w] over the window (p, q)

x is [N, C, H, W] or [C, H, W]. Maximum pooling keeps one byte per window for its backward, the position of
the winner, where stock keeps its input and an int64 index. On the CPU ``backend="auto"`` is stock, but for
the mean of whole channels-last maps in inference, which is a product with equal weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import has_hooks, in_transform, is_unobserved_inference

# No Triton in there.
from fastnets.kernels.pool_windows import (
    Windows,
    adaptive_index_dtype,
    adaptive_windows,
    fixed_windows,
    index_dtype,
    is_channels_last,
)

aten = torch.ops.aten


# output_size is for adaptive windows; what follows it is then unread.
_WINDOWS = (
    "int[]? output_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
)


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend, refuses="does not pool")


def _windows(size, output_size, kernel_size, stride, padding, dilation, ceil_mode) -> Windows:
    """The windows over [..., H, W] = ``size``; ``ValueError`` for impossible ones."""
    size = tuple(size[-2:])
    if output_size is not None:
        return adaptive_windows(size, tuple(output_size))
    return fixed_windows(size, *map(tuple, (kernel_size, stride, padding, dilation)), ceil_mode)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# --- maximum ------------------------------------------------------------------------------------------------


def _stock_max(x, output_size, kernel_size, stride, padding, dilation, ceil_mode, with_index=False):
    """(y, index) of stock, or y alone."""
    if output_size is not None:
        return F.adaptive_max_pool2d(x, output_size, return_indices=with_index)
    return F.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=with_index
    )


def _axes(windows: Windows, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each dimension: where its windows begin, and whether they have an element inside the image."""
    axes = []
    for i, (extent, count, length) in enumerate(
        ((windows.H, windows.P, windows.R), (windows.W, windows.Q, windows.S))
    ):
        p = torch.arange(count, device=device)
        if windows.adaptive:
            axes.append((p * extent // count, torch.ones_like(p, dtype=torch.bool)))
            continue
        begin = p * windows.stride[i] - windows.padding[i]
        elements = begin[:, None] + windows.dilation[i] * torch.arange(length, device=device)
        axes.append((begin, ((elements >= 0) & (elements < extent)).any(1)))
    return axes


@dispatch.replays(tensors=1)
def _max_with_window_body(x, *arguments):
    *geometry, backend = arguments
    windows = _windows(x.shape, *geometry)
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.pool import max_pool as launch

        return launch(x, windows, keep_window=True)
    memory_format = _format(is_channels_last(x))
    y, index = _stock_max(x, *geometry, with_index=True)
    (top, rows), (left, columns) = _axes(windows, x.device)
    r = (index // windows.W - top[:, None]) // windows.dilation[0]
    s = (index % windows.W - left) // windows.dilation[1]
    window = torch.where(rows[:, None] & columns, r * windows.S + s, windows.R * windows.S)
    window = window.to(windows.index_dtype)
    return y.contiguous(memory_format=memory_format), window.contiguous(memory_format=memory_format)


@dispatch.replays(tensors=1)
def _max_body(x, *arguments):
    *geometry, backend = arguments
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.pool import max_pool as launch

        return launch(x, _windows(x.shape, *geometry))[0]
    return _stock_max(x, *geometry).contiguous(memory_format=_format(is_channels_last(x)))


def _max_fake(x, *arguments):
    y = _stock_max(x, *arguments[:-1])
    return x.new_empty(y.shape).to(memory_format=_format(is_channels_last(x)))


def _max_with_window_fake(x, *arguments):
    y = _max_fake(x, *arguments)
    output_size, kernel_size = arguments[:2]
    if output_size is None:
        dtype = index_dtype(kernel_size[0] * kernel_size[1])
    else:
        dtype = adaptive_index_dtype(x.shape[2:], output_size)
    return y, torch.empty_like(y, dtype=dtype)


@dispatch.replays(tensors=2)
def _max_backward_body(dy, window, size, channels_last, *arguments):
    *geometry, backend = arguments
    windows = _windows(size, *geometry)
    if dy.numel() and choose(dy, backend) == "triton":
        from fastnets.kernels.pool_backward import max_pool_backward as launch

        return launch(dy, window, windows, channels_last=channels_last)
    (top, _), (left, _) = _axes(windows, dy.device)
    element = window.long()
    won = element < windows.R * windows.S
    h = top[:, None] + element // windows.S * windows.dilation[0]
    w = left + element % windows.S * windows.dilation[1]
    index = torch.where(won, h * windows.W + w, 0)
    wide = torch.promote_types(dy.dtype, torch.float32)
    grad = torch.where(won, dy, 0).to(wide)
    dx = grad.new_zeros((*dy.shape[:2], windows.H * windows.W))
    dx = dx.scatter_add(2, index.flatten(2), grad.flatten(2)).to(dy.dtype)
    return dx.view(*dy.shape[:2], windows.H, windows.W).contiguous(memory_format=_format(channels_last))


def _max_backward_fake(dy, window, size, channels_last, *arguments):
    return dy.new_empty((*dy.shape[:2], *size)).to(memory_format=_format(channels_last))


_max_infer = dispatch.register(
    f"max_pool2d_inference(Tensor x, {_WINDOWS}, str backend) -> Tensor", _max_body, _max_fake
)
_max_with_window = dispatch.register(
    f"max_pool2d_with_window(Tensor x, {_WINDOWS}, str backend) -> (Tensor, Tensor)",
    _max_with_window_body,
    _max_with_window_fake,
)
_max_backward = dispatch.register(
    "max_pool2d_backward(Tensor dy, Tensor window, SymInt[2] size, bool channels_last, "
    f"{_WINDOWS}, str backend) -> Tensor",
    _max_backward_body,
    _max_backward_fake,
)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(x, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _max_with_window(x, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.arguments = inputs
        ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, _):
        dx = None
        if dy is not None:
            dx = _max_backward(dy, *ctx.saved_tensors, ctx.size, ctx.channels_last, *ctx.arguments)
        return dx, *[None] * len(ctx.arguments)


def _max_autograd(x, *arguments):
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, *arguments)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _max_differentiable(x, *arguments)


_max_differentiable = dispatch.register(
    f"max_pool2d(Tensor x, {_WINDOWS}, str backend) -> Tensor", _max_body, _max_fake, autograd=_max_autograd
)

# --- average ------------------------------------------------------------------------------------------------

# divisor 0: the number of pixels.
_AVERAGE = f"{_WINDOWS}, bool count_include_pad, int divisor, str backend"


def _stock_average(x, output_size, kernel_size, stride, padding, dilation, ceil_mode, include, divisor):
    if output_size is not None:
        return F.adaptive_avg_pool2d(x, output_size)
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, include, divisor or None)


@dispatch.replays(tensors=1)
def _average_body(x, *arguments):
    *geometry, include, divisor, backend = arguments
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.pool import average_pool as launch

        return launch(x, _windows(x.shape, *geometry), count_include_pad=include, divisor=divisor)
    y = _stock_average(x, *geometry, include, divisor)
    return y.contiguous(memory_format=_format(is_channels_last(x)))


def _average_fake(x, *arguments):
    y = _stock_average(x, *arguments[:-1])
    return x.new_empty(y.shape).to(memory_format=_format(is_channels_last(x)))


@dispatch.replays(tensors=1)
def _average_backward_body(dy, size, channels_last, *arguments):
    *geometry, include, divisor, backend = arguments
    if dy.numel() and choose(dy, backend) == "triton":
        from fastnets.kernels.pool_backward import average_pool_backward as launch

        options = {"count_include_pad": include, "divisor": divisor, "channels_last": channels_last}
        return launch(dy, _windows(size, *geometry), **options)
    memory_format = _format(channels_last)
    x = torch.empty((*dy.shape[:2], *size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    output_size, kernel_size, stride, padding, _, ceil_mode = geometry
    if output_size is not None:
        dx = aten._adaptive_avg_pool2d_backward(dy, x)
    else:
        dx = aten.avg_pool2d_backward(
            dy, x, kernel_size, stride, padding, ceil_mode, include, divisor or None
        )
    return dx.contiguous(memory_format=memory_format)


def _average_backward_fake(dy, size, channels_last, *arguments):
    return dy.new_empty((*dy.shape[:2], *size)).to(memory_format=_format(channels_last))


_average_infer = dispatch.register(
    f"avg_pool2d_inference(Tensor x, {_AVERAGE}) -> Tensor", _average_body, _average_fake
)
_average_backward = dispatch.register(
    f"avg_pool2d_backward(Tensor dy, SymInt[2] size, bool channels_last, {_AVERAGE}) -> Tensor",
    _average_backward_body,
    _average_backward_fake,
)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(x, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _average_differentiable(x, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.arguments = inputs
        ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy):
        dx = _average_backward(dy, ctx.size, ctx.channels_last, *ctx.arguments)
        return dx, *[None] * len(ctx.arguments)


def _average_autograd(x, *arguments):
    if torch.is_grad_enabled() and x.requires_grad:
        return _AveragePool.apply(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _average_differentiable(x, *arguments)


_average_differentiable = dispatch.register(
    f"avg_pool2d(Tensor x, {_AVERAGE}) -> Tensor", _average_body, _average_fake, autograd=_average_autograd
)

# --- functions ----------------------------------------------------------------------------------------------


def _stock_serves(x: object, backend: str) -> bool:
    """Whether the stock function is to run: on the CPU unless asked otherwise, and for what is no batch of
    floating images."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4) or not x.is_floating_point() or in_transform():
        return True
    return dispatch.leaves_to_stock(x, backend)


def pair(value, otherwise=None) -> tuple[int, int]:
    """Two ints from an int or a sequence, as PyTorch reads such arguments; ``otherwise`` for none."""
    if value is None or (isinstance(value, tuple | list) and not value):
        return otherwise
    if not isinstance(value, tuple | list):
        return value, value
    return (*value, *value) if len(value) == 1 else tuple(value)


def _output_size(size, x: Tensor) -> list[int]:
    pair = [size, size] if size is None or isinstance(size, int) else list(size)
    return [x.shape[i - 2] if extent is None else extent for i, extent in enumerate(pair)]


def _run(x: Tensor, stock: Callable, infer, differentiable, arguments: tuple) -> Tensor:
    """The op over a batch; impossible or empty windows are left to stock, which has errors for them."""
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    try:
        if not torch.compiler.is_compiling():
            _windows(batch.shape, *arguments[:6])
    except ValueError:
        return stock()
    y = (differentiable if torch.is_grad_enabled() else infer)(batch, *arguments)
    return y if x.dim() == 4 else y.squeeze(0)


def max_pool2d(
    x: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """``F.max_pool2d``: its arguments, results and errors. Saves one byte per window for the backward."""
    dispatch.validate_backend(backend)

    def stock():
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)

    if _stock_serves(x, backend):
        return stock()
    k = pair(kernel_size)
    arguments = (None, k, pair(stride, k), pair(padding), pair(dilation), ceil_mode, backend)
    return _run(x, stock, _max_infer, _max_differentiable, arguments)


def avg_pool2d(
    x: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``F.avg_pool2d``: its arguments, results and errors."""
    dispatch.validate_backend(backend)

    def stock():
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    if _stock_serves(x, backend) or divisor_override == 0:
        return stock()
    k = pair(kernel_size)
    geometry = (None, k, pair(stride, k), pair(padding), (1, 1), ceil_mode)
    arguments = (*geometry, count_include_pad, divisor_override or 0, backend)
    return _run(x, stock, _average_infer, _average_differentiable, arguments)


_UNREAD = ([], [], [], [], False)


def adaptive_max_pool2d(x: Tensor, output_size, *, backend: str = "auto") -> Tensor:
    """``F.adaptive_max_pool2d``: its arguments, results and errors."""
    dispatch.validate_backend(backend)

    def stock():
        return F.adaptive_max_pool2d(x, output_size)

    if _stock_serves(x, backend):
        return stock()
    arguments = (_output_size(output_size, x), *_UNREAD, backend)
    return _run(x, stock, _max_infer, _max_differentiable, arguments)


def adaptive_avg_pool2d(x: Tensor, output_size, *, backend: str = "auto") -> Tensor:
    """``F.adaptive_avg_pool2d``: its arguments, results and errors. Size 1 is global average pooling."""
    dispatch.validate_backend(backend)

    def stock():
        return F.adaptive_avg_pool2d(x, output_size)

    if _stock_serves(x, backend):
        return _mean_of_rows(x) if _is_mean_of_rows(x, output_size) else stock()
    arguments = (_output_size(output_size, x), *_UNREAD, True, 0, backend)
    return _run(x, stock, _average_infer, _average_differentiable, arguments)


def _is_mean_of_rows(x: Tensor, output_size: object) -> bool:
    """Whether the mean of each map of channels-last x is the sooner by a product, in inference on the CPU.

    Measured (fp32, two cores): it takes 0.4 to 0.7 of the time of ``F.adaptive_avg_pool2d``, the sum of which
    is not that of a product, and which divides in a pass of its own.
    """
    if not is_unobserved_inference(x) or x.dtype != torch.float32 or x.dim() != 4 or not x.numel():
        return False
    _, C, H, W = x.shape
    dense = C > 1 and H * W > 1 and x.stride() == (H * W * C, 1, W * C, C)
    return pair(output_size) == (1, 1) and dense and not torch.is_autocast_enabled("cpu")


def _mean_of_rows(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    mean = torch.bmm(_equal_weights(H * W).expand(N, 1, -1), x.permute(0, 2, 3, 1).view(N, H * W, C))
    return mean.view(N, 1, 1, C).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=256)
def _equal_weights(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((1, 1, count), 1.0 / count)


# --- modules, and what rewritten networks call --------------------------------------------------------------


def _of_module(pool: nn.Module, x: Tensor, backend: str) -> Tensor:
    """What the stock pooling module computes, hooks aside."""
    if isinstance(pool, nn.AvgPool2d):
        return avg_pool2d(
            x,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
            backend=backend,
        )
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return adaptive_avg_pool2d(x, pool.output_size, backend=backend)
    if isinstance(pool, nn.AdaptiveMaxPool2d):
        if pool.return_indices:
            return nn.AdaptiveMaxPool2d.forward(pool, x)
        return adaptive_max_pool2d(x, pool.output_size, backend=backend)
    if pool.return_indices:
        return nn.MaxPool2d.forward(pool, x)
    geometry = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return max_pool2d(x, *geometry, backend=backend)


POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def call_pool2d(pool: nn.Module, x: Tensor, backend: str = "auto") -> Tensor:
    """``pool(x)`` of a stock pooling module by the fused op where that is stock's result, by the module
    itself elsewhere: where a hook would be skipped, for ``return_indices``, and on the CPU unless a backend
    is asked for."""
    if type(pool) not in POOLS or has_hooks(pool) or _has_any_global_hook() or in_transform():
        return pool(x)
    return _of_module(pool, x, backend)


class _Pool(nn.Module):
    """Base of the modules below, before the stock class among the bases."""

    backend = "auto"

    def __init__(self, *arguments, backend: str = "auto", **options):
        super().__init__(*arguments, **options)
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, pool: nn.Module, *, backend: str = "auto") -> nn.Module:
        """The fused module with the settings of a stock one."""
        stock = cls.__mro__[2]
        if type(pool) is not stock:
            raise TypeError(
                f"{cls.__name__}.from_stock: got {type(pool).__name__}, expected nn.{stock.__name__}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name in stock.__constants__:
            setattr(self, name, getattr(pool, name))
        self.backend = dispatch.validate_backend(backend)
        return self.train(pool.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] or [C, H, W] -> the same with [P, Q] pixels, as the stock module."""
        return _of_module(self, x, self.backend)


class MaxPool2d(_Pool, nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps one byte per window for its backward; ``return_indices`` runs stock."""


class AvgPool2d(_Pool, nn.AvgPool2d):
    """``nn.AvgPool2d`` with a gathered, deterministic backward."""


class AdaptiveAvgPool2d(_Pool, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d``; ``output_size=1`` is global average pooling."""


class AdaptiveMaxPool2d(_Pool, nn.AdaptiveMaxPool2d):
    """``nn.AdaptiveMaxPool2d`` that keeps one byte per window for its backward."""
