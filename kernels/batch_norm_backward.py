"""The two passes of batch norm's backward: what is summed per channel, and the input's gradient.

    u = x̂ * bn_weight + bn_bias + residual;   x̂ = (x - mean) * rstd;   y = act(u)
    dv = dy * act'(u)                                          is the residual's gradient
    sums = (Σ dv, Σ dv * x̂)                                    are those of bn_bias and bn_weight
    dx = bn_weight * rstd * (dv - sums[0] / count - x̂ * sums[1] / count)

Both read dy and x (the output of the convolution) and recompute u. The sums are of as many parts as are taken
in parallel, added in order by ``partial_sums``: the same bits in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import BINARY_DERIVATIVE, activation_backward, check_activation
from fastnets.kernels.bitmask import bytes_of, load_bits
from fastnets.kernels.channel_tiles import (
    channel_tiles,
    check_gradient,
    check_input,
    check_vectors,
    contiguous_vectors,
    memory_order,
    pass_config,
    pass_configs,
    reduction_config,
    reduction_configs,
    share_of_program,
    statistic_index,
    step_index,
    step_offsets,
)
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, launch
from fastnets.kernels.partial_sums import ROWS_PER_PROGRAM, sum_rows

__all__ = ["bn_backward_input", "bn_backward_sums", "configs", "representative_calls"]


@triton.jit
def _step_of_gradient(
    dy, x, residual, bits, mean, scale, shift, outer, inner, channels, valid, sizes, order_strides,
    dy_strides, x_strides, r_strides, negative_slope, ACTIVATION: tl.constexpr, ORDER_LAYOUT: tl.constexpr,
    DY_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr, R_LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr,
):  # fmt: skip
    """(dv, x - mean) of a tile in fp32, both 0 where it is not valid."""
    x_offset = step_offsets(outer, inner, channels, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
    centred = tl.load(x + x_offset, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
    dy_offset = step_offsets(outer, inner, channels, sizes, dy_strides, DY_LAYOUT, OUTER_DIMS)
    dv = tl.load(dy + dy_offset, mask=valid, other=0.0).to(tl.float32)
    if bits is not None:
        order_offset = step_offsets(outer, inner, channels, sizes, order_strides, ORDER_LAYOUT, OUTER_DIMS)
        dv = tl.where(load_bits(bits, order_offset, valid), dv, 0.0)
    elif ACTIVATION != "none":
        u = centred * scale[None, :] + shift[None, :]
        if residual is not None:
            r_offset = step_offsets(outer, inner, channels, sizes, r_strides, R_LAYOUT, OUTER_DIMS)
            u += tl.load(residual + r_offset, mask=valid, other=0.0).to(tl.float32)
        dv = activation_backward(dv, u, ACTIVATION, negative_slope)
    return tl.where(valid, dv, 0.0), tl.where(valid, centred, 0.0)


@triton.jit
def _channel_vectors(mean, rstd, weight, bn_bias, statistic, channels, valid):
    """(mean, rstd, scale, shift) of a tile's channels in fp32: u = (x - mean) * scale + shift."""
    center = tl.load(mean + statistic, mask=valid, other=0.0).to(tl.float32)
    inverse = tl.load(rstd + statistic, mask=valid, other=0.0).to(tl.float32)
    scale = inverse
    if weight is not None:
        scale = inverse * tl.load(weight + channels, mask=valid, other=0.0).to(tl.float32)
    shift = tl.zeros_like(center)
    if bn_bias is not None:
        shift = tl.load(bn_bias + channels, mask=valid, other=0.0).to(tl.float32)
    return center, inverse, scale, shift


@triton.jit(
    do_not_specialize=[
        "sizes", "outer_per_sample", "group_channels", "order_strides", "dy_strides", "x_strides",
        "r_strides", "steps", "steps_per_split",
    ]
)  # fmt: skip
def bn_backward_sums_kernel(
    dy, x, residual, bits, mean, rstd, weight, bn_bias, dv_out, partial, sizes, outer_per_sample,
    group_channels, order_strides, dy_strides, x_strides, r_strides, steps, steps_per_split, negative_slope,
    ACTIVATION: tl.constexpr, PER_GROUP: tl.constexpr, ORDER_LAYOUT: tl.constexpr, DY_LAYOUT: tl.constexpr,
    X_LAYOUT: tl.constexpr, R_LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr, INNER_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr, WIDE_OFFSETS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel_total = sizes[3] * CHANNEL_UNIT
    blocks = tl.cdiv(channel_total, BLOCK_CHANNELS)
    block, row, begin, end = share_of_program(steps, steps_per_split, blocks)
    own = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    valid_own = own < channel_total
    inner_tiles = tl.cdiv(sizes[2] * INNER_UNIT, BLOCK_INNER)
    statistic = statistic_index(
        begin // inner_tiles, own, outer_per_sample, group_channels, channel_total, PER_GROUP
    )
    center, inverse, scale, shift = _channel_vectors(mean, rstd, weight, bn_bias, statistic, own, valid_own)
    total = tl.zeros([BLOCK_INNER, BLOCK_CHANNELS], tl.float32)
    product = tl.zeros([BLOCK_INNER, BLOCK_CHANNELS], tl.float32)
    for step in range(begin, end):
        outer, inner, channels, valid_inner, valid_channels = step_index(
            step, block, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS, BLOCK_INNER, BLOCK_CHANNELS
        )
        valid = valid_inner[:, None] & valid_channels[None, :]
        dv, centred = _step_of_gradient(
            dy, x, residual, bits, center, scale, shift, outer, inner, channels, valid, sizes, order_strides,
            dy_strides, x_strides, r_strides, negative_slope, ACTIVATION, ORDER_LAYOUT, DY_LAYOUT, X_LAYOUT,
            R_LAYOUT, OUTER_DIMS,
        )  # fmt: skip
        if dv_out is not None:
            rounded = dv.to(dv_out.dtype.element_ty)
            at = step_offsets(outer, inner, channels, sizes, order_strides, ORDER_LAYOUT, OUTER_DIMS)
            tl.store(dv_out + at, rounded, mask=valid)
            # The sums are of what the next pass will read.
            dv = rounded.to(tl.float32)
        total += dv
        product += dv * centred
    at = row.to(tl.int64) * 2 * channel_total + own
    tl.store(partial + at, tl.sum(total, axis=0), mask=valid_own)
    tl.store(partial + at + channel_total, tl.sum(product, axis=0) * inverse, mask=valid_own)


def bn_backward_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    keep: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dv, sums [2, C] fp32) with dv = dy * act'(u) and sums = (Σ dv, Σ dv * x̂), in one pass over dy and x.

    dy, x: [N, C, ...], one shape, any strides, expanded ones too. u is recomputed from x, and from residual
    where there is one; with ``mask`` (of ``normalize_add_act``) neither residual nor bn_weight and bn_bias
    are read. keep=True also writes dv, the residual's gradient, in dy's dtype and x's memory format; the sums
    are then of the rounded dv. keep=False returns None for it. Σ dv is the gradient of bn_bias, Σ dv * x̂ that
    of bn_weight.
    """
    name = "bn_backward_sums"
    check_activation(activation)
    check_input(name, x, residual=residual)
    check_gradient(name, dy, x)
    check_vectors(name, x, mean=mean, rstd=rstd, bn_weight=bn_weight, bn_bias=bn_bias)
    if mask is not None:
        if activation not in BINARY_DERIVATIVE:
            raise ValueError(f"{name}: a mask does not hold the derivative of {activation!r}; leave it out")
        if mask.dtype != torch.uint8 or mask.shape != (bytes_of(x),) or not mask.is_contiguous():
            raise ValueError(
                f"{name}: mask is {tuple(mask.shape)} {mask.dtype}, expected ({bytes_of(x)},) uint8 as "
                "normalize_add_act made it"
            )
        residual = bn_weight = bn_bias = None
    vectors = (mean, rstd, bn_weight, bn_bias)
    dv, sums = launch_backward_sums(dy, x, vectors, residual, mask, activation, negative_slope, keep, config)
    return dv, sums[0]


def launch_backward_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    vectors: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    keep: bool,
    config: Config | None,
    groups: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dv or None, sums [1, 2, C]) of checked operands; vectors: (mean, rstd, bn_weight, bn_bias).

    With groups mean and rstd are [N * groups] and the sums each sample's own, [N, 2, C].
    """
    dv = torch.empty_like(x, dtype=dy.dtype) if keep else None
    order = memory_order(x) if dv is None else dv.stride()
    tensors = (dy, x, x if residual is None else residual)
    of = channel_tiles(
        tuple(x.shape),
        (order, *(t.stride() for t in tensors)),
        min(t.element_size() for t in tensors),
        groups is not None,
    )
    sums = torch.empty(of.samples, 2, of.channels, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return dv, sums.zero_()
    config, splits, steps_per_split = reduction_config(of, x, config, ROWS_PER_PROGRAM)
    partial = torch.empty(splits, *sums.shape, dtype=torch.float32, device=x.device)
    vectors = contiguous_vectors(*vectors)
    launch(
        bn_backward_sums_kernel,
        (of.samples * splits * of.channel_tiles(config),),
        dy,
        x,
        residual,
        mask,
        *vectors,
        dv,
        partial,
        of.sizes,
        of.outer_per_sample,
        x.shape[1] // (groups or 1),
        *of.strides,
        of.steps(config) // of.samples,
        steps_per_split,
        negative_slope,
        config=config,
        reads=(dy, x, residual, mask, *vectors),
        writes=(partial,) if dv is None else (dv, partial),
        ACTIVATION=activation,
        PER_GROUP=groups is not None,
        ORDER_LAYOUT=of.layouts[0],
        DY_LAYOUT=of.layouts[1],
        X_LAYOUT=of.layouts[2],
        R_LAYOUT=of.layouts[3],
        **of.constexprs,
    )
    return dv, partial[0] if splits == 1 else sum_rows(partial, sums)


@triton.jit(
    do_not_specialize=[
        "sizes", "outer_per_sample", "group_channels", "dz_strides", "dy_strides", "x_strides",
    ]
)  # fmt: skip
def bn_backward_input_kernel(
    dy, x, mean, rstd, weight, bn_bias, sums, count_of_device, dz, affine, sizes, outer_per_sample,
    group_channels, dz_strides, dy_strides, x_strides, count, negative_slope, ACTIVATION: tl.constexpr,
    PER_GROUP: tl.constexpr, DZ_LAYOUT: tl.constexpr, DY_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr,
    OUTER_DIMS: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNEL_UNIT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    # PER_GROUP: sums are averages [statistics, 2], with bn_weight in them.
    channel_total = sizes[3] * CHANNEL_UNIT
    blocks = tl.cdiv(channel_total, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    outer, inner, channels, valid_inner, valid_channels = step_index(
        pid // blocks, pid % blocks, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS, BLOCK_INNER,
        BLOCK_CHANNELS,
    )  # fmt: skip
    valid = valid_inner[:, None] & valid_channels[None, :]
    statistic = statistic_index(outer, channels, outer_per_sample, group_channels, channel_total, PER_GROUP)
    center, inverse, scale, shift = _channel_vectors(
        mean, rstd, weight, bn_bias, statistic, channels, valid_channels
    )
    dv, centred = _step_of_gradient(
        dy, x, None, None, center, scale, shift, outer, inner, channels, valid, sizes, dz_strides,
        dy_strides, x_strides, x_strides, negative_slope, ACTIVATION, DZ_LAYOUT, DY_LAYOUT, X_LAYOUT,
        X_LAYOUT, OUTER_DIMS,
    )  # fmt: skip
    if PER_GROUP:
        average = tl.load(sums + 2 * statistic, mask=valid_channels, other=0.0)
        slope = tl.load(sums + 2 * statistic + 1, mask=valid_channels, other=0.0) * inverse
        result = dv * scale[None, :] - (average[None, :] + centred * slope[None, :]) * inverse[None, :]
    elif sums is not None:
        if count_of_device is not None:
            n = tl.load(count_of_device).to(tl.float32)
        else:
            n = count
        average = tl.load(sums + channels, mask=valid_channels, other=0.0) / n
        slope = tl.load(sums + channel_total + channels, mask=valid_channels, other=0.0) / n * inverse
        result = (dv - average[None, :] - centred * slope[None, :]) * scale[None, :]
        if affine is not None:  # the sums once more, as gradients of bn_bias and bn_weight
            once = valid_channels & (pid // blocks == 0)
            dbias = tl.load(sums + channels, mask=once, other=0.0)
            dweight = tl.load(sums + channel_total + channels, mask=once, other=0.0)
            tl.store(affine + channels, dbias.to(affine.dtype.element_ty), mask=once)
            tl.store(affine + channel_total + channels, dweight.to(affine.dtype.element_ty), mask=once)
    else:
        result = dv * scale[None, :]
    at = step_offsets(outer, inner, channels, sizes, dz_strides, DZ_LAYOUT, OUTER_DIMS)
    tl.store(dz + at, result.to(dz.dtype.element_ty), mask=valid)


def bn_backward_input(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    count: float | torch.Tensor | None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    batch_statistics: bool = True,
    affine: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The gradient of batch norm's input, in one pass over dy and x: see the top of this file.

    dy, x: as for ``bn_backward_sums``. activation: "none" where dy is dv already (after ``keep=True``), else
    dv is recomputed from dy and x. sums: [2, C] fp32, count: elements per channel that they are of (a number
    or a tensor of one element on x's device); both are ignored with batch_statistics=False, where mean and
    rstd are constants: dz = bn_weight * rstd * dv. dz is dense, in x's dtype and memory format.

    affine: [2, C] of any float dtype, into which the same launch writes the sums rounded: the gradients of
    bn_bias and bn_weight. Needs batch_statistics.
    """
    name = "bn_backward_input"
    check_activation(activation)
    check_input(name, x)
    check_gradient(name, dy, x)
    check_vectors(name, x, mean=mean, rstd=rstd, bn_weight=bn_weight, bn_bias=bn_bias)
    on_device = None
    if not batch_statistics:
        sums, count = None, 1.0
    else:
        if sums is None or count is None:
            raise ValueError(f"{name}: batch_statistics=True needs sums and count; give both")
        if sums.shape != (2, x.shape[1]) or sums.dtype != torch.float32:
            raise ValueError(
                f"{name}: sums is {tuple(sums.shape)} {sums.dtype}, expected (2, {x.shape[1]}) float32"
            )
        sums = sums.contiguous()
        if affine is not None and (affine.shape != sums.shape or not affine.is_contiguous()):
            raise ValueError(
                f"{name}: affine is {tuple(affine.shape)}, expected contiguous {tuple(sums.shape)}"
            )
        if isinstance(count, torch.Tensor):
            if count.numel() != 1:
                raise ValueError(f"{name}: count has shape {tuple(count.shape)}, expected one element")
            on_device, count = count, 1.0
    vectors = (mean, rstd, bn_weight, bn_bias)
    return launch_backward_input(
        dy, x, vectors, sums, on_device, float(count), activation, negative_slope, config, affine=affine
    )


@functools.lru_cache(maxsize=256)
def _with_registers(config: Config, in_vectors: bool) -> Config:
    # Left to itself, ptxas spills at 96 registers to fit a fifth block. One address per element takes more.
    return config.replace(maxnreg=128 if in_vectors else 255)


def launch_backward_input(
    dy: torch.Tensor,
    x: torch.Tensor,
    vectors: Sequence[torch.Tensor | None],
    sums: torch.Tensor | None,
    count_of_device: torch.Tensor | None,
    count: float,
    activation: str,
    negative_slope: float,
    config: Config | None,
    groups: int | None = None,
    affine: torch.Tensor | None = None,
) -> torch.Tensor:
    """dz of checked operands; vectors: (mean, rstd, bn_weight, bn_bias).

    With groups mean and rstd are [N * groups], and sums are averages [N * groups, 2] of dv * bn_weight and
    dv * bn_weight * x̂.
    """
    dz = torch.empty_like(x)
    if x.numel() == 0:
        return dz
    of = channel_tiles(
        tuple(x.shape),
        (dz.stride(), dy.stride(), x.stride()),
        min(dy.element_size(), x.element_size()),
        groups is not None,
    )
    config = _with_registers(pass_config(of, x, config), all(unit > 1 for _, unit in of.layouts))
    vectors = contiguous_vectors(*vectors)
    launch(
        bn_backward_input_kernel,
        (of.steps(config) * of.channel_tiles(config),),
        dy,
        x,
        *vectors,
        sums,
        count_of_device,
        dz,
        affine,
        of.sizes,
        of.outer_per_sample,
        x.shape[1] // (groups or 1),
        *of.strides,
        count,
        negative_slope,
        config=config,
        reads=(dy, x, sums, *vectors),
        writes=(dz,) if affine is None else (dz, affine),
        ACTIVATION=activation,
        PER_GROUP=groups is not None,
        DZ_LAYOUT=of.layouts[0],
        DY_LAYOUT=of.layouts[1],
        X_LAYOUT=of.layouts[2],
        **of.constexprs,
    )
    return dz


def configs(device: Device) -> list[Config]:
    """Every config that both launchers take."""
    return [*reduction_configs(), *pass_configs()]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""
    last = torch.channels_last

    def tensor(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)

    def sums(shape, dtype, memory_format=torch.contiguous_format, *, activation="relu", dy=None, **options):
        x = tensor(shape, dtype, memory_format)
        gradient = {
            None: x,
            "contiguous": tensor(shape, dtype),
            "expanded": tensor((*shape[:2], 1, 1), dtype).expand(shape),
        }[dy]
        residual = x if options.get("residual") else None
        mask = torch.empty(bytes_of(x), dtype=torch.uint8, device="meta") if options.get("mask") else None
        vectors = [tensor(shape[1]) for _ in range(4)]

        def thunk(config=None):
            return bn_backward_sums(
                gradient, x, *vectors, residual, mask, activation=activation,
                keep=options.get("keep", False), config=config,
            )  # fmt: skip

        return thunk

    def gradient(shape, dtype, memory_format=torch.contiguous_format, *, activation="none", count=1.0):
        x = tensor(shape, dtype, memory_format)
        vectors = [tensor(shape[1]) for _ in range(4)]
        of = (None, None) if count is None else (tensor((2, shape[1])), count)

        def thunk(config=None):
            return bn_backward_input(
                x, x, *vectors, *of, activation=activation, batch_statistics=count is not None, config=config
            )

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    large, small = (32, 64, 56, 56), (32, 512, 7, 7)
    count = tensor(())
    table = [
        ("sums, channels-last fp16, relu", sums(large, half, last)),
        ("sums, channels-last bf16, silu", sums(large, bf16, last, activation="silu")),
        ("sums, channels-last fp32, add, gelu", sums(large, full, last, residual=True, activation="gelu")),
        ("sums, channels-last fp16, add, kept", sums(large, half, last, residual=True, keep=True)),
        ("sums, channels-last fp16, mask, kept", sums(large, half, last, mask=True, keep=True)),
        ("sums, channels-last fp16, contiguous dy", sums(large, half, last, dy="contiguous")),
        ("sums, channels-last bf16, expanded dy", sums(large, bf16, last, dy="expanded")),
        ("sums, channels-last fp16, odd C", sums((8, 27, 9, 9), half, last)),
        ("sums, contiguous fp16, add, kept", sums(large, half, residual=True, keep=True)),
        ("sums, contiguous fp32, 7x7, hardswish", sums(small, full, activation="hardswish")),
        ("sums, contiguous bf16, mask", sums(large, bf16, mask=True, keep=True)),
        ("input gradient, channels-last fp16", gradient(large, half, last)),
        ("input gradient, channels-last bf16, silu", gradient(large, bf16, last, activation="silu")),
        ("input gradient, channels-last fp32, relu, count on device",
         gradient(large, full, last, activation="relu", count=count)),
        ("input gradient, frozen, channels-last fp16, relu",
         gradient(large, half, last, activation="relu", count=None)),
        ("input gradient, contiguous bf16, relu", gradient(large, bf16, activation="relu")),
        ("input gradient, contiguous fp32, 7x7", gradient(small, full)),
    ]  # fmt: skip
    return [RepresentativeCall(name, thunk) for name, thunk in table]
