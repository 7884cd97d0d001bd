"""Group norm with residual addition and activation, forward and backward, on the kernels of batch norm.

    mean, var = of each sample and group of channels;   x̂ = (x - mean) * rstd
    u = x̂ * weight + bias + residual;   y = act(u)

x [N, C, ...] of 2 to 5 dims and any strides, channels-last too without a copy; weight, bias [C]. A group is
C / groups neighbouring channels; instance norm has as many groups as channels. The statistics of each
sample's channels are taken as batch norm takes those of a batch, and merged over the channels of a group;
normalising and both passes of the backward are batch norm's kernels, reading statistics by (sample, group):

    dv = dy * act'(u);   a, b = averages of dv * weight and dv * weight * x̂ over each group
    dx = rstd * (dv * weight - a - x̂ * b);   dweight = Σ dv * x̂;   dbias = Σ dv;   dresidual = dv
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import check_activation
from fastnets.kernels.batch_norm import launch_bn_add_act
from fastnets.kernels.batch_norm_backward import launch_backward_input, launch_backward_sums
from fastnets.kernels.batch_norm_training import channel_statistics, finalize_statistics
from fastnets.kernels.channel_tiles import (
    check_gradient,
    check_input,
    check_vectors,
    contiguous_vectors,
    pass_configs,
    reduction_configs,
)
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles
from fastnets.kernels.partial_sums import sum_rows

__all__ = [
    "configs",
    "group_norm_add_act",
    "group_norm_backward",
    "group_statistics",
    "representative_calls",
]


def group_statistics(
    x: torch.Tensor, groups: int, *, eps: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, rstd) [N * groups] fp32 of x [N, C, ...], in one read; rstd = 1 / sqrt(biased var + eps)."""
    check_input("group_statistics", x)
    _check_groups("group_statistics", x, groups)
    if x.numel() == 0:
        return tuple(torch.zeros(x.shape[0] * groups, device=x.device) for _ in range(2))
    statistics = channel_statistics(x, per_sample=True, config=config)
    return finalize_statistics(statistics, momentum=0.0, eps=eps, members=x.shape[1] // groups)


def group_norm_add_act(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    groups: int,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """``act((x - mean) * rstd * weight + bias + residual)`` in one pass; mean, rstd of ``group_statistics``.

    x: fp32, fp16 or bf16; residual: like x in shape and dtype, any strides. Computed in fp32 and rounded
    once; y is dense in the memory format of x.
    """
    check_activation(activation)
    _check("group_norm_add_act", x, mean, rstd, weight, bias, residual, groups)
    y = torch.empty_like(x)
    if x.numel():
        vectors = (None, mean, None, rstd, weight, bias)
        launch_bn_add_act(y, x, residual, None, vectors, 0.0, activation, negative_slope, config, groups)
    return y


@triton.jit(do_not_specialize=["statistics", "groups", "members"])
def group_averages_kernel(
    sums,
    weight,
    averages,
    statistics,
    groups,
    members,
    elements,
    BLOCK_STATISTICS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """averages [N * groups, 2] of sums [N, 2, groups * members], each channel's times its weight."""
    statistic = tl.program_id(0) * BLOCK_STATISTICS + tl.arange(0, BLOCK_STATISTICS)
    valid = statistic < statistics
    sample = (statistic // groups).to(tl.int64)
    first = (statistic % groups) * members
    channel_total = groups * members
    total = tl.zeros([BLOCK_STATISTICS, BLOCK_MEMBERS], tl.float32)
    product = tl.zeros([BLOCK_STATISTICS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, members, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        mask = valid[:, None] & (member < members)[None, :]
        channel = first[:, None] + member[None, :]
        at = (sample * 2 * channel_total)[:, None] + channel
        one = tl.load(sums + at, mask=mask, other=0.0)
        two = tl.load(sums + at + channel_total, mask=mask, other=0.0)
        if weight is not None:
            w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
            one *= w
            two *= w
        total += one
        product += two
    tl.store(averages + 2 * statistic, tl.sum(total, axis=1) / elements, mask=valid)
    tl.store(averages + 2 * statistic + 1, tl.sum(product, axis=1) / elements, mask=valid)


def group_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    groups: int,
    activation: str = "none",
    negative_slope: float = 0.01,
    keep: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dx, dv, (dbias, dweight) [2, C] fp32): see the top of this file.

    dy: of x's shape, fp32, fp16 or bf16, any strides, expanded ones too. keep: whether dv, the residual's
    gradient, is written (in dy's dtype and x's memory format), else None. dx has x's dtype and memory format.
    """
    name = "group_norm_backward"
    check_activation(activation)
    check_gradient(name, dy, x)
    _check(name, x, mean, rstd, weight, bias, residual, groups)
    if residual is not None and activation != "none" and not keep:
        raise ValueError(f"{name}: with a residual dx is computed from dv; use keep=True")
    vectors = (mean, rstd, weight, bias)
    if config is not None and config not in reduction_configs():
        first, second = None, config
    else:
        first, second = config, None
    dv, sums = launch_backward_sums(
        dy, x, vectors, residual, None, activation, negative_slope, keep, first, groups
    )
    channels = x.shape[1]
    vector_gradients = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x), dv, vector_gradients.zero_()
    sum_rows(sums, vector_gradients)
    averages = _group_averages(sums, weight, x, groups)
    from_dv = dy if dv is None else dv
    dx = launch_backward_input(
        from_dv, x, vectors, averages, None, 1.0, activation if dv is None else "none", negative_slope,
        second, groups,
    )  # fmt: skip
    return dx, dv, vector_gradients


def _group_averages(sums, weight, x, groups) -> torch.Tensor:
    statistics, members = x.shape[0] * groups, x.shape[1] // groups
    averages = torch.empty(statistics, 2, dtype=torch.float32, device=x.device)
    config = _MANY_MEMBERS if members > 8 else _FEW_MEMBERS
    (weight,) = contiguous_vectors(weight)
    launch(
        group_averages_kernel,
        (tiles(statistics, config.BLOCK_STATISTICS),),
        sums,
        weight,
        averages,
        statistics,
        groups,
        members,
        float(x.numel() // statistics),
        config=config,
        reads=(sums, weight),
        writes=(averages,),
    )
    return averages


_FEW_MEMBERS = Config(BLOCK_STATISTICS=128, BLOCK_MEMBERS=8, num_warps=4, num_stages=1)
_MANY_MEMBERS = Config(BLOCK_STATISTICS=16, BLOCK_MEMBERS=64, num_warps=4, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config of the kernels of batch norm that group norm may pick; its own kernel has two more, which
    follow from the shape."""
    return [*reduction_configs(), *pass_configs()]


def _check_groups(function: str, x: torch.Tensor, groups: int) -> None:
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{function}: groups={groups} does not divide {x.shape[1]} channels")


def _check(function, x, mean, rstd, weight, bias, residual, groups) -> None:
    check_input(function, x, residual=residual)
    check_vectors(function, x, weight=weight, bias=bias)
    _check_groups(function, x, groups)
    for name, vector in (("mean", mean), ("rstd", rstd)):
        if vector.shape != (x.shape[0] * groups,):
            raise ValueError(
                f"{function}: {name} has shape {tuple(vector.shape)}, expected ({x.shape[0] * groups},), "
                "one for each sample and group"
            )


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""
    last = torch.channels_last

    def tensor(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)

    def call(
        kind, shape, dtype, memory_format=torch.contiguous_format, *, groups, activation, affine=True,
        residual=False,
    ):  # fmt: skip
        x = tensor(shape, dtype, memory_format)
        vectors = [tensor(shape[0] * groups) for _ in range(2)]
        vectors += [tensor(shape[1]) if affine else None for _ in range(2)]
        added = x if residual else None

        def forward(config=None):
            if config is None or config in reduction_configs():
                group_statistics(x, groups, eps=1e-5, config=config)
            if config is None or config in pass_configs():
                group_norm_add_act(x, *vectors, added, groups=groups, activation=activation, config=config)

        def backward(config=None):
            return group_norm_backward(
                x, x, *vectors, added, groups=groups, activation=activation, keep=residual, config=config
            )

        return forward if kind == "forward" else backward

    half, full = torch.float16, torch.float32
    large, small = (32, 64, 56, 56), (32, 512, 7, 7)
    table = []
    for kind in ("forward", "backward"):
        table += [
            (
                f"{kind}, channels-last fp16, add, relu",
                call(kind, large, half, last, groups=32, activation="relu", residual=True),
            ),
            (
                f"{kind}, instances, contiguous fp32, leaky_relu",
                call(kind, small, full, groups=512, activation="leaky_relu", affine=False),
            ),
        ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
