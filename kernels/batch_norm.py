"""The one-pass epilogue: batch norm, residual add and activation.

    y = act((x + bias - mean) * rsqrt(var + eps) * weight + bn_bias + residual)

over channel 1 of a tensor of 2 to 5 dims, one read of x (and of the residual) and one write, for any
strides. ``bn_add_act`` takes running statistics: it follows a convolution that ran elsewhere, or stands
alone (pre-activation networks). Training launches the same kernel with batch statistics and 1 / sqrt(var +
eps) computed once per channel: ``kernels.batch_norm_training.normalize_add_act``. So does group norm, whose
statistics are one per sample and group of channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, check_activation
from fastnets.kernels.bitmask import pack_positive, store_bits
from fastnets.kernels.channel_tiles import (
    channel_tiles,
    check_input,
    check_vectors,
    contiguous_vectors,
    pass_config,
    pass_configs,
    statistic_index,
    step_index,
    step_offsets,
)
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, launch

__all__ = ["bn_add_act", "configs", "launch_bn_add_act", "representative_calls"]


@triton.jit(
    do_not_specialize=[
        "sizes", "outer_per_sample", "group_channels", "y_strides", "x_strides", "r_strides",
    ]
)  # fmt: skip
def bn_add_act_kernel(
    x,
    y,
    residual,
    bits,
    bias,
    mean,
    var,
    rstd,
    weight,
    bn_bias,
    # See ``channel_tiles``.
    sizes,
    outer_per_sample,
    group_channels,
    y_strides,
    x_strides,
    r_strides,
    eps,
    negative_slope,
    ACTIVATION: tl.constexpr,
    # mean and rstd are per sample and group of channels, not per channel.
    PER_GROUP: tl.constexpr,
    Y_LAYOUT: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    R_LAYOUT: tl.constexpr,
    OUTER_DIMS: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(sizes[3] * CHANNEL_UNIT, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    outer, inner, channels, valid_inner, valid_channels = step_index(
        pid // blocks, pid % blocks, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS, BLOCK_INNER,
        BLOCK_CHANNELS,
    )  # fmt: skip
    valid = valid_inner[:, None] & valid_channels[None, :]
    x_offset = step_offsets(outer, inner, channels, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
    value = tl.load(x + x_offset, mask=valid, other=0.0).to(tl.float32)

    if bias is not None:
        value += tl.load(bias + channels, mask=valid_channels, other=0.0).to(tl.float32)[None, :]
    statistic = statistic_index(
        outer, channels, outer_per_sample, group_channels, sizes[3] * CHANNEL_UNIT, PER_GROUP
    )
    if mean is not None:
        value -= tl.load(mean + statistic, mask=valid_channels, other=0.0).to(tl.float32)[None, :]
    if var is not None:
        scale = tl.rsqrt(tl.load(var + channels, mask=valid_channels, other=1.0).to(tl.float32) + eps)
        if weight is not None:
            scale *= tl.load(weight + channels, mask=valid_channels, other=0.0).to(tl.float32)
        value *= scale[None, :]
    elif rstd is not None:
        scale = tl.load(rstd + statistic, mask=valid_channels, other=0.0).to(tl.float32)
        if weight is not None:
            scale *= tl.load(weight + channels, mask=valid_channels, other=0.0).to(tl.float32)
        value *= scale[None, :]
    elif weight is not None:
        value *= tl.load(weight + channels, mask=valid_channels, other=0.0).to(tl.float32)[None, :]
    if bn_bias is not None:
        value += tl.load(bn_bias + channels, mask=valid_channels, other=0.0).to(tl.float32)[None, :]

    if residual is not None:
        r_offset = step_offsets(outer, inner, channels, sizes, r_strides, R_LAYOUT, OUTER_DIMS)
        value += tl.load(residual + r_offset, mask=valid, other=0.0).to(tl.float32)
    result = activate(value, ACTIVATION, negative_slope).to(y.dtype.element_ty)
    y_offset = step_offsets(outer, inner, channels, sizes, y_strides, Y_LAYOUT, OUTER_DIMS)
    tl.store(y + y_offset, result, mask=valid)
    if bits is not None:
        # From the rounded value, which is what stock differentiates at.
        rounded = result.to(tl.float32)
        passing = ~(rounded <= 0.0)
        if ACTIVATION == "relu6":
            passing = passing & ~(rounded >= 6.0)
        CONTIGUOUS: tl.constexpr = Y_LAYOUT[0]
        store_bits(bits, passing, y_offset, valid, CONTIGUOUS)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``."""
    return pass_configs()


def launch_bn_add_act(
    y: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bits: torch.Tensor | None,
    vectors: Sequence[torch.Tensor | None],
    eps: float,
    activation: str,
    negative_slope: float,
    config: Config | None,
    groups: int | None = None,
) -> None:
    """Launches the kernel on checked operands.

    y: dense, of x's shape. bits: uint8, see ``bitmask``. vectors: (bias, mean, var, rstd, weight, bn_bias),
    each [C]; with groups mean and rstd are [N * groups], and var is None.
    """
    of = channel_tiles(
        tuple(x.shape),
        (y.stride(), x.stride(), y.stride() if residual is None else residual.stride()),
        x.element_size(),
        groups is not None,
    )
    config = pass_config(of, x, config)
    vectors = contiguous_vectors(*vectors)
    # Bits are written beside y where its rows, and the tile's, fill whole bytes; else from y, once more.
    kind = of.layouts[0][0]
    row, block = (of.channels, config.BLOCK_CHANNELS) if kind == "channel" else (of.inner, config.BLOCK_INNER)
    later = bits if bits is not None and (kind == "none" or row % 8 or block < 8) else None
    if later is not None:
        bits = None
    launch(
        bn_add_act_kernel,
        (of.steps(config) * of.channel_tiles(config),),
        x,
        y,
        residual,
        bits,
        *vectors,
        of.sizes,
        of.outer_per_sample,
        x.shape[1] // (groups or 1),
        *of.strides,
        eps,
        negative_slope,
        config=config,
        reads=(x, residual, *vectors),
        writes=(y, bits) if bits is not None else (y,),
        ACTIVATION=activation,
        PER_GROUP=groups is not None,
        Y_LAYOUT=of.layouts[0],
        X_LAYOUT=of.layouts[1],
        R_LAYOUT=of.layouts[2],
        **of.constexprs,
    )
    if later is not None:
        pack_positive(y, later, 6.0 if activation == "relu6" else None)


def bn_add_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """``act((x + bias - mean) * rsqrt(var + eps) * bn_weight + bn_bias + residual)`` in one pass.

    x: [N, C, ...] of 2 to 5 dims, fp32, fp16 or bf16, any strides. residual: like x in shape and dtype, any
    strides. The vectors are [C], of any float dtype; any of them may be None. Computed in fp32 and rounded
    once. The result is dense, in the memory format of x. Raises ``ValueError`` and ``TypeError`` for what
    does not fit.
    """
    check_activation(activation)
    check_input("bn_add_act", x, residual=residual)
    check_vectors(
        "bn_add_act",
        x,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
    )
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    vectors = (bias, running_mean, running_var, None, bn_weight, bn_bias)
    launch_bn_add_act(y, x, residual, None, vectors, eps, activation, negative_slope, config)
    return y


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""

    def call(
        shape, dtype, memory_format=torch.contiguous_format, residual=True, activation="relu", slope=None
    ):
        def thunk(config=None):
            def tensor(*s):
                return torch.empty(*s, dtype=dtype, device="meta")

            x = tensor(*shape).to(memory_format=memory_format)
            r = None
            if residual == "transposed":
                r = tensor(*shape)
            elif residual == "sliced":
                r = tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
            elif residual:
                r = torch.empty_like(x)
            vectors = [torch.empty(shape[1], dtype=torch.float32, device="meta") for _ in range(4)]
            return bn_add_act(x, None, *vectors, r, activation=activation, config=config)

        return thunk

    last = torch.channels_last
    half, full = torch.float16, torch.float32
    table = [
        ("channels-last fp16, add, relu", call((32, 64, 56, 56), half, last)),
        ("channels-last bf16, silu", call((32, 144, 28, 28), torch.bfloat16, last, False, "silu")),
        ("channels-last fp32, add, relu", call((32, 256, 14, 14), full, last)),
        ("channels-last fp16, odd C, gelu", call((8, 27, 14, 14), half, last, False, "gelu")),
        ("contiguous fp16, add, relu", call((32, 64, 56, 56), half)),
        (
            "contiguous fp32, 7x7, hardswish",
            call((32, 512, 7, 7), full, residual=False, activation="hardswish"),
        ),
        ("channels-last fp16, contiguous residual", call((32, 64, 28, 28), half, last, "transposed")),
        ("contiguous fp16, sliced residual", call((8, 64, 28, 28), half, residual="sliced")),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
