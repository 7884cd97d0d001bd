"""Local response normalization across channels with the ReLU before it, forward and backward in one pass.

    v = relu(x) or x;   s[c] = k + α / size · Σ v[c']²   over c' in [c − size // 2, c + (size − 1) // 2]
    y[c] = v[c] · s[c]^−β
    dv[c] = dy[c] · s[c]^−β − 2αβ / size · v[c] · Σ dy[c'] · v[c'] · s[c']^(−β − 1)   over c' that have c

x [N, C, ...] of 2 to 5 dims and any strides. α is divided by size and channels outside count as zeros, as
``F.local_response_norm`` has it. A tile reads its channels' neighbours again, out of the cache: each value
comes from memory once. The backward recomputes s and keeps nothing but x. After Krizhevsky, Sutskever and
Hinton, 2012.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastnets.kernels.channel_tiles import (
    channel_tiles,
    check_gradient,
    check_input,
    memory_order,
    pass_config,
    small_pass_configs,
    step_index,
    step_offsets,
)
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, launch

__all__ = ["configs", "local_response_norm", "local_response_norm_backward", "representative_calls"]


@triton.jit
def inverse_power(s, beta, BETA: tl.constexpr):
    """s^−β. BETA names the exponents that networks have, by square roots rounded once; else "any"."""
    if BETA == "0.75":
        root = tl.div_rn(1.0 + tl.zeros_like(s), tl.sqrt_rn(s))
        return root * tl.sqrt_rn(root)
    elif BETA == "0.5":
        return tl.div_rn(1.0 + tl.zeros_like(s), tl.sqrt_rn(s))
    elif BETA == "1":
        return tl.div_rn(1.0 + tl.zeros_like(s), s)
    else:
        log = tl.log2(s)
        # What the logarithm missed, to the first order.
        back = tl.exp2(log)
        log += (s - back) / back * 1.4426950408889634
        return tl.exp2(-beta * log)


@triton.jit
def _channel(
    t, outer, inner, c, valid_inner, C, sizes, strides, LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr
):
    """Channels c of a tile in fp32, zeros outside of the tensor."""
    inside = (c >= 0) & (c < C)
    at = step_offsets(outer, inner, tl.where(inside, c, 0), sizes, strides, LAYOUT, OUTER_DIMS)
    return tl.load(t + at, mask=valid_inner[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rectified(value, RELU: tl.constexpr):
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else value


@triton.jit
def _scale(
    x, outer, inner, c, valid_inner, C, sizes, strides, k, alpha,
    SIZE: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr,
):  # fmt: skip
    """s of channels c; alpha is already divided by SIZE."""
    total = 0.0
    for i in tl.static_range(SIZE):
        value = _channel(
            x, outer, inner, c + (i - SIZE // 2), valid_inner, C, sizes, strides, LAYOUT, OUTER_DIMS
        )
        value = _rectified(value, RELU)
        total += value * value
    return k + alpha * total


@triton.jit(do_not_specialize=["sizes", "y_strides", "x_strides"])
def response_norm_kernel(
    x, y, sizes, y_strides, x_strides, alpha, beta, k,
    SIZE: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr,
    Y_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr, INNER_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr, WIDE_OFFSETS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    C = sizes[3] * CHANNEL_UNIT
    blocks = tl.cdiv(C, BLOCK_CHANNELS)
    outer, inner, c, valid_inner, valid_c = step_index(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS,
        BLOCK_INNER, BLOCK_CHANNELS,
    )  # fmt: skip
    s = _scale(
        x, outer, inner, c, valid_inner, C, sizes, x_strides, k, alpha, SIZE, RELU, X_LAYOUT, OUTER_DIMS
    )
    valid = valid_inner[:, None] & valid_c[None, :]
    at = step_offsets(outer, inner, c, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
    value = _rectified(tl.load(x + at, mask=valid, other=0.0).to(tl.float32), RELU)
    to = step_offsets(outer, inner, c, sizes, y_strides, Y_LAYOUT, OUTER_DIMS)
    tl.store(y + to, (value * inverse_power(s, beta, BETA)).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["sizes", "dx_strides", "dy_strides", "x_strides"])
def response_norm_backward_kernel(
    dy, x, dx, sizes, dx_strides, dy_strides, x_strides, alpha, beta, k,
    SIZE: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr,
    DX_LAYOUT: tl.constexpr, DY_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNEL_UNIT: tl.constexpr, WIDE_OFFSETS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    C = sizes[3] * CHANNEL_UNIT
    blocks = tl.cdiv(C, BLOCK_CHANNELS)
    outer, inner, c, valid_inner, valid_c = step_index(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS,
        BLOCK_INNER, BLOCK_CHANNELS,
    )  # fmt: skip
    own = _channel(x, outer, inner, c, valid_inner, C, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
    value = _rectified(own, RELU)
    across = tl.zeros_like(own)
    # Not unrolled: five windows at a time are more than there are registers for.
    for i in range(SIZE):
        # The channels whose windows have c: the mirror image of the window of c.
        other = c + (i - (SIZE - 1) // 2)
        s = _scale(
            x, outer, inner, other, valid_inner, C, sizes, x_strides, k, alpha, SIZE, RELU, X_LAYOUT,
            OUTER_DIMS,
        )  # fmt: skip
        d = _channel(dy, outer, inner, other, valid_inner, C, sizes, dy_strides, DY_LAYOUT, OUTER_DIMS)
        d *= inverse_power(s, beta, BETA)
        v = _channel(x, outer, inner, other, valid_inner, C, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
        inside = valid_inner[:, None] & ((other >= 0) & (other < C))[None, :]
        across += tl.where(inside, d * _rectified(v, RELU) / s, 0.0)
    s = _scale(
        x, outer, inner, c, valid_inner, C, sizes, x_strides, k, alpha, SIZE, RELU, X_LAYOUT, OUTER_DIMS
    )
    direct = _channel(dy, outer, inner, c, valid_inner, C, sizes, dy_strides, DY_LAYOUT, OUTER_DIMS)
    direct *= inverse_power(s, beta, BETA)
    result = direct - 2.0 * alpha * beta * value * across
    if RELU:
        result = tl.where(own <= 0.0, 0.0, result)
    to = step_offsets(outer, inner, c, sizes, dx_strides, DX_LAYOUT, OUTER_DIMS)
    valid = valid_inner[:, None] & valid_c[None, :]
    tl.store(dx + to, result.to(dx.dtype.element_ty), mask=valid)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere."""
    return small_pass_configs()


BETAS = {0.75: "0.75", 0.5: "0.5", 1.0: "1"}


def local_response_norm(
    x: torch.Tensor,
    size: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    relu: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """The norm of ``relu(x)`` or x, in fp32 and rounded once; dense, in the memory format of x.

    x: [N, C, ...], fp32, fp16 or bf16, any strides. size: channels of a window, at least 1.
    """
    _check("local_response_norm", x, size)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    of = channel_tiles(tuple(x.shape), (y.stride(), x.stride()), x.element_size())
    config = pass_config(of, x, config, small=True)
    launch(
        response_norm_kernel,
        (of.steps(config) * of.channel_tiles(config),),
        x, y, of.sizes, *of.strides, alpha / size, beta, k,
        config=config, reads=(x,), writes=(y,), SIZE=size, BETA=BETAS.get(beta, "any"), RELU=relu,
        Y_LAYOUT=of.layouts[0], X_LAYOUT=of.layouts[1], **of.constexprs,
    )  # fmt: skip
    return y


def local_response_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    size: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    relu: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """dx, of x's dtype and memory format. dy: of x's shape, fp32, fp16 or bf16, any strides."""
    _check("local_response_norm_backward", x, size)
    check_gradient("local_response_norm_backward", dy, x)
    dx = torch.empty_strided(x.shape, memory_order(x), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx
    itemsize = min(x.element_size(), dy.element_size())
    of = channel_tiles(tuple(x.shape), (dx.stride(), dy.stride(), x.stride()), itemsize)
    config = pass_config(of, x, config, small=True)
    launch(
        response_norm_backward_kernel,
        (of.steps(config) * of.channel_tiles(config),),
        dy, x, dx, of.sizes, *of.strides, alpha / size, beta, k,
        config=config, reads=(dy, x), writes=(dx,), SIZE=size, BETA=BETAS.get(beta, "any"), RELU=relu,
        DX_LAYOUT=of.layouts[0], DY_LAYOUT=of.layouts[1], X_LAYOUT=of.layouts[2], **of.constexprs,
    )  # fmt: skip
    return dx


def _check(function: str, x: torch.Tensor, size: int) -> None:
    check_input(function, x)
    if size < 1:
        raise ValueError(f"{function}: size={size} must be at least 1")


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the networks that have it, AlexNet and GoogLeNet: see ``kernels``."""

    def call(shape, dtype, memory_format, backward, beta=0.75, relu=False):
        def thunk(config=None):
            x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
            options = {"beta": beta, "relu": relu, "config": config}
            if backward:
                return local_response_norm_backward(x, x, 5, **options)
            return local_response_norm(x, 5, **options)

        return thunk

    last, first = torch.channels_last, torch.contiguous_format
    table = []
    for backward in (False, True):
        kind = "backward" if backward else "forward"
        table += [
            (f"{kind}, AlexNet, fp16", call((32, 96, 55, 55), torch.float16, last, backward)),
            (f"{kind}, GoogLeNet, contiguous fp32", call((32, 192, 56, 56), torch.float32, first, backward)),
            (
                f"{kind}, bf16, relu, another exponent",
                call((8, 64, 28, 28), torch.bfloat16, last, backward, 0.6, True),
            ),
        ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
