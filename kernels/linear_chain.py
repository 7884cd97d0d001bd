"""A chain of small linear layers in one launch: the end of a small network, which launches alone would bound.

    h = x;  h = act_i(h @ weight_i.T + bias_i) for each layer i;  y = h

x [M, K] or, flattened on the way in, [M, C, H, W] with K = C·H·W and any strides; weight_i [N_i, N_(i-1)],
N_i ≤ 128, two or three layers. Each program takes BLOCK_M rows through all layers. A hidden row is rounded to
x's dtype, as if it had been stored, and is: to a scratch that its program alone writes and reads, so that it
comes back from L1 in blocks of columns, whatever its width. Weights come from L2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, check_activation
from fastnets.kernels.conv_configs import products_of
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = ["LAYERS", "WIDEST", "configs", "linear_chain", "representative_calls"]

LAYERS = (2, 3)
WIDEST = 128  # outputs of a layer: one tile


@triton.jit
def _layer(
    source, rows, columns_h, columns_w, row_at, c_step, h_step, w_step, K, weight, bias, N,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(source[rows] @ weight.T + bias), fp32 [BLOCK_M, BLOCK_N]; column k of source is pixel (h, w) of
    channel c. Columns past N are act(0)."""
    n = tl.arange(0, BLOCK_N)
    inside_n = n < N
    filters = tl.where(inside_n, n, 0) * K
    lanes = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        present = first + lanes < K
        k = tl.where(present, first + lanes, 0)
        at = (
            k // (columns_h * columns_w) * c_step
            + k // columns_w % columns_h * h_step
            + k % columns_w * w_step
        )
        a = tl.load(
            source + (row_at[:, None] + at[None, :]), mask=rows[:, None] & present[None, :], other=0.0
        )
        b_mask = inside_n[:, None] & present[None, :]
        b = tl.load(weight + (filters[:, None] + k[None, :]), mask=b_mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    return activate(acc, ACTIVATION, 0.0)


@triton.jit(do_not_specialize=("M", "x_n", "x_c", "x_h", "x_w"))
def linear_chain_kernel(
    x, y, scratch, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, M, K, N_1, N_2, N_3,
    H, W, x_n, x_c, x_h, x_w,
    ACTIVATION_1: tl.constexpr, ACTIVATION_2: tl.constexpr, ACTIVATION_3: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of y [M, N of the last layer]. Grid (row tiles,). scratch: [layers - 1, M, BLOCK_N] of
    x's dtype. weight_3 None: two layers."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = m < M
    m = tl.minimum(m, M - 1)
    n = tl.arange(0, BLOCK_N)
    hidden = scratch + (m * BLOCK_N)[:, None] + n[None, :]

    acc = _layer(x, rows, H, W, m * x_n, x_c, x_h, x_w, K, weight_1, bias_1, N_1,
                 ACTIVATION_1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    tl.store(hidden, acc.to(x.dtype.element_ty), mask=rows[:, None])
    tl.debug_barrier()  # the block's other threads read what was stored
    acc = _layer(scratch, rows, 1, 1, m * BLOCK_N, 1, 0, 0, N_1, weight_2, bias_2, N_2,
                 ACTIVATION_2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if weight_3 is not None:
        scratch += M.to(tl.int64) * BLOCK_N
        hidden += M.to(tl.int64) * BLOCK_N
        tl.store(hidden, acc.to(x.dtype.element_ty), mask=rows[:, None])
        tl.debug_barrier()
        acc = _layer(scratch, rows, 1, 1, m * BLOCK_N, 1, 0, 0, N_2, weight_3, bias_3, N_3,
                     ACTIVATION_3, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        N_2 = N_3
    lies_at = (m * N_2)[:, None] + n[None, :]
    tl.store(y + lies_at, acc.to(y.dtype.element_ty), mask=rows[:, None] & (n < N_2)[None, :])


def linear_chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activations: Sequence[str],
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """The chain's result y [M, N] of x [M, K] or [M, C, H, W]; see the top of this file.

    x and the weights share a dtype (fp32, fp16, bf16), biases are of it or fp32. Products of fp32 follow
    torch's switch for matrix products. Raises ``ValueError`` or ``TypeError`` for what is no such chain.
    """
    _check(x, weights, biases, activations)
    M, K = x.shape[0], x[0].numel() if x.shape[0] else 0
    y = torch.empty((M, weights[-1].shape[0]), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    precision = _precision(x)
    products = products_of(x.element_size(), precision, current_device(x))
    if config is None:
        config = _CONFIGS[products]
    elif config != _CONFIGS[products]:
        raise UnsupportedConfig(f"{config} is not for {products} products")
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    biases = [b if b is None or b.is_contiguous() else b.contiguous() for b in biases]
    scratch = torch.empty((len(weights) - 1, M, config.BLOCK_N), dtype=x.dtype, device=x.device)
    H, W = x.shape[2:] if x.dim() == 4 else (1, 1)
    strides = x.stride() if x.dim() == 4 else (*x.stride(), 0, 0)
    outputs = [w.shape[0] for w in weights]
    third = (None, None) if len(weights) == 2 else (weights[2], biases[2])
    layers = (weights[0], biases[0], weights[1], biases[1], *third)
    launch(
        linear_chain_kernel, (tiles(M, config.BLOCK_M),), x, y, scratch, *layers,
        *(M, K, *(*outputs, 0)[:3], H, W, *strides),
        config=config, flops=2 * M * sum(w.numel() for w in weights),
        reads=(x, scratch, *layers), writes=(y, scratch),
        PRECISION=precision,
        **{f"ACTIVATION_{i + 1}": (*activations, "none")[i] for i in range(3)},
    )  # fmt: skip
    return y


def _precision(x: torch.Tensor) -> str:
    if x.dtype != torch.float32 or not (x.is_cuda or x.is_meta):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _check(x, weights, biases, activations) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; supported: float32, float16, bfloat16")
    if x.dim() not in (2, 4):
        raise ValueError(f"x must be [M, K] or [M, C, H, W], it has shape {list(x.shape)}")
    if len(weights) not in LAYERS or len(biases) != len(weights) or len(activations) != len(weights):
        raise ValueError(
            f"{len(weights)} weights, {len(biases)} biases, {len(activations)} activations: "
            "give as many of each, two or three"
        )
    width = 1
    for size in x.shape[1:]:
        width *= size
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations)):
        check_activation(activation)
        if activation == "leaky_relu":
            raise ValueError("leaky_relu has a slope, which a chain does not take; call linear_act")
        if weight.dim() != 2 or weight.shape[1] != width or not 0 < weight.shape[0] <= WIDEST:
            raise ValueError(
                f"weights[{i}] has shape {list(weight.shape)}, expected [at most {WIDEST}, {width}]"
            )
        if weight.dtype != x.dtype:
            raise TypeError(f"weights[{i}] is {weight.dtype} but x is {x.dtype}; cast one of them")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise ValueError(f"biases[{i}] has shape {list(bias.shape)}, expected [{width}]")


_CONFIGS = {
    "16-bit": Config(BLOCK_M=16, BLOCK_N=WIDEST, BLOCK_K=64, num_warps=4, num_stages=3),
    "tf32": Config(BLOCK_M=16, BLOCK_N=WIDEST, BLOCK_K=32, num_warps=4, num_stages=2),
    "fma": Config(BLOCK_M=16, BLOCK_N=WIDEST, BLOCK_K=16, num_warps=4, num_stages=2),
}


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on this device."""
    kinds = ("fma",) if device.capability < 80 else ("16-bit", "tf32", "fma")
    return [_CONFIGS[kind] for kind in kinds]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def chain(x, widths, activations, dtype, tf32=False, bias=True):
        def thunk(config=None):
            image = torch.empty(x, dtype=dtype, device="meta")
            if len(x) == 4:
                image = image.to(memory_format=torch.channels_last)
            sizes = [image[0].numel(), *widths]
            weights = [torch.empty(n, k, dtype=dtype, device="meta") for k, n in zip(sizes, widths)]
            biases = [torch.empty(n, dtype=dtype, device="meta") if bias else None for n in widths]
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            try:
                return linear_chain(image, weights, biases, activations, config=config)
            finally:
                torch.backends.cuda.matmul.fp32_precision = before

        return thunk

    lenet = functools.partial(chain, (256, 16, 5, 5), (120, 84, 10))
    relu = ("relu", "relu", "none")
    table = [
        ("three layers of images, bf16", lenet(relu, torch.bfloat16)),
        ("three layers of images, fp32", lenet(("sigmoid", "sigmoid", "none"), torch.float32)),
        ("three layers of images, TF32", lenet(relu, torch.float32, tf32=True)),
        (
            "two layers, no bias, fp16",
            chain((64, 256), (128, 10), ("gelu", "none"), torch.float16, bias=False),
        ),
        ("two layers, fp32", chain((64, 784), (100, 10), ("tanh", "none"), torch.float32)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
