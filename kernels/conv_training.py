"""Convolution in training: what it writes is normalised only when all of it is there.

    z = conv2d(x, weight) + bias                   and, of every tile of z's pixels, mean and M2 per channel

Batch norm needs the mean and variance of z, which no tile knows. The epilogue of each convolution kernel sums
up its own tile, from the fp32 accumulator rounded as it is stored, so that no pass over z is spent on it;
``batch_norm_training.finalize_statistics`` merges the tiles.

    z = conv2d(act(bn(x)), weight) + bias          with a ``Prologue``

Where x is itself such a z, a 1×1 convolution can normalise it on the way in. The activation between the two
convolutions is then never stored. The kernels are those of inference (``conv``, ``conv_joint``,
``conv_grouped``, ``depthwise``): statistics and prologue are compile-time branches there.
"""

from __future__ import annotations

import torch

from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv import taps_conv
from fastnets.kernels.conv_configs import checked_prologue, kernel_of
from fastnets.kernels.conv_grouped import packed_conv
from fastnets.kernels.conv_rows import few_channels_conv
from fastnets.kernels.conv_shape import Prologue, conv_call
from fastnets.kernels.depthwise import depthwise_conv
from fastnets.kernels.launch import Config

__all__ = ["conv_statistics"]

_CONV = {"taps": taps_conv, "joint": few_channels_conv, "packed": packed_conv}


def conv_statistics(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    prologue: Prologue | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, Statistics]:
    """conv2d(x, weight, bias) -> (z [N, K, P, Q], the statistics of its tiles).

    x [N, C, H, W] and weight [K, C/groups, R, S] share a dtype (fp32, fp16, bf16) and have any strides; bias
    [K] is fp32 or of that dtype. z is dense channels-last of x's dtype. The statistics are of z as it is
    stored, rounded: mean and m2 [T, K], count [T] (pixels of each tile), fp32, the same bits from run to run;
    an empty batch has none (T = 0).

    prologue: x is an earlier z, and act(bn(x)) takes its place, rounded to x's dtype, while it is loaded;
    padding stays zero. config: one of ``conv.configs`` or of the file whose kernel serves the shape.

    Raises ``ValueError`` or ``TypeError`` for arguments that are no convolution; ``UnsupportedConfig`` where
    ``conv_configs.why_no_prologue`` names a reason, or for a config that does not fit the kernel.
    """
    call = conv_call(
        x, weight, (bias, None, None, None, None), None, stride, padding, dilation, groups,
        1e-5, "none", 0.01, config,
    )  # fmt: skip
    shape = call.shape
    if prologue is not None:
        prologue = checked_prologue(prologue, shape)
    kernel = kernel_of(shape)
    if kernel == "depthwise":
        return depthwise_conv(
            x, weight, call.vectors, None, stride, padding, dilation, groups, 1e-5, "none", 0.01, config,
            statistics=True,
        )  # fmt: skip
    call.prologue, call.statistics = prologue, True
    return _CONV[kernel](call)
