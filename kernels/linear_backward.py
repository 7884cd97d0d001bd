"""What the gradient of a linear layer needs besides two matrix products: one pass over dy.

    y = residual + layer_scale · act(z),   z = x @ weightᵀ + bias

    dz = layer_scale · dy · act'(z)      dbias = Σ dz      dscale = Σ dy · act(z)      sums over the M rows

The pass reads dy and z once and writes dz; the sums are taken on the way, before dz is rounded. Each program
walks down a strip of rows and leaves one fp32 row of partial sums, which ``partial_sums`` adds in a fixed
order. The products dx = dz @ weight and dweight = dzᵀ @ x are the vendor's, or ``linear.matrix_product``,
whose epilogue is this pass over the layer before.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, activation_backward, check_activation
from fastnets.kernels.conv_shape import INT32_ELEMENTS, vector_width
from fastnets.kernels.conv_tile import aligned
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, launch, tiles
from fastnets.kernels.partial_sums import sum_rows

__all__ = ["activation_gradient", "configs", "representative_calls"]

_WIDE = Config(BLOCK_M=8, BLOCK_N=256, num_warps=4, num_stages=1)
_NARROW = Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1)
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit(do_not_specialize=["M", "N", "rows", "dy_m"])
def activation_gradient_kernel(
    dy, z, layer_scale, dz, bias_sums, scale_sums, M, N, rows, dy_m, dy_n, negative_slope,
    VECTOR: tl.constexpr, VECTOR_DY: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of ``rows`` rows: grid (strips of rows, column tiles).

    dy [M, N] with its strides, z and dz contiguous. bias_sums, scale_sums: [strips, N] or None. VECTOR:
    divides N; VECTOR_DY: elements of an aligned access to dy.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    N = aligned(N, VECTOR, tl.int32)
    dy_m = aligned(dy_m, VECTOR_DY, INDEX)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    n = n.to(INDEX)
    if layer_scale is not None:
        scale = tl.load(layer_scale + n, mask=inside_n, other=0.0).to(tl.float32)
    of_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_scale = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, M)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < last)[:, None] & inside_n[None, :]
        m = m.to(INDEX)
        offsets = (m * N)[:, None] + n[None, :]
        gradient = tl.load(
            dy + ((m * dy_m)[:, None] + (n * dy_n)[None, :]), mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        u = tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32)
        if layer_scale is not None:
            of_scale += gradient * activate(u, ACTIVATION, negative_slope)
            gradient *= scale[None, :]
        gradient = activation_backward(gradient, u, ACTIVATION, negative_slope)
        of_bias += gradient
        tl.store(dz + offsets, gradient.to(dz.dtype.element_ty), mask=inside)
    to = tl.program_id(0).to(INDEX) * N + n
    if bias_sums is not None:
        tl.store(bias_sums + to, tl.sum(of_bias, 0), mask=inside_n)
    if scale_sums is not None:
        tl.store(scale_sums + to, tl.sum(of_scale, 0), mask=inside_n)


@functools.lru_cache(maxsize=4096)
def _plan(
    M: int, N: int, z_size: int, dy: tuple[int, int], dy_size: int, device: Device, config: Config | None
) -> tuple[Config, int, int, dict[str, object]]:
    """(config, strips, rows of each, flags)."""
    config = config or (_WIDE if N >= _WIDE.BLOCK_N else _NARROW)
    columns = tiles(N, config.BLOCK_N)
    wanted = max(1, PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors // columns)
    rows = tiles(tiles(M, wanted), config.BLOCK_M) * config.BLOCK_M
    dy_m, dy_n = dy
    flags = {
        "VECTOR": vector_width(z_size, N),
        "VECTOR_DY": vector_width(dy_size, dy_m, N) if dy_n == 1 else 1,
        "WIDE": max(M * N, M * dy_m + N * dy_n) > INT32_ELEMENTS,
    }
    return config, tiles(M, rows), rows, flags


def activation_gradient(
    dy: torch.Tensor,
    z: torch.Tensor,
    layer_scale: torch.Tensor | None = None,
    *,
    activation: str,
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    bias_sums: bool = True,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz [M, N], Σ dz [N], Σ dy · act(z) [N]) from dy [..., N] and the contiguous pre-activation z [..., N].

    dy has any strides and dtype (fp32, fp16, bf16), dz is of ``dtype``, z's by default. The sums are fp32;
    empty where ``bias_sums`` is False, and without a layer_scale [N]. Of ReLU and ReLU6, the activation's
    result serves as z too. The same bits from run to run.
    """
    N = z.shape[-1]
    M = z.numel() // N if N else 0
    check_activation(activation)
    if dy.shape != z.shape or not z.is_contiguous() or dy.dtype not in DTYPES or z.dtype not in DTYPES:
        raise ValueError(
            f"dy is {list(dy.shape)} {dy.dtype} and z {list(z.shape)} {z.dtype}; expected one shape, z "
            "contiguous, and fp32, fp16 or bf16"
        )
    if layer_scale is not None and layer_scale.shape != (N,):
        raise ValueError(f"layer_scale has shape {list(layer_scale.shape)}, expected [{N}]")
    device = z.device
    dz = torch.empty((M, N), dtype=dtype or z.dtype, device=device)
    sums = [torch.empty(N if asked else 0, dtype=torch.float32, device=device)
            for asked in (bias_sums, layer_scale is not None)]  # fmt: skip
    if dz.numel() == 0:
        return dz, *(s.zero_() for s in sums)
    dy = dy.reshape(M, N)
    strides = dy.stride()
    sizes = min(z.element_size(), dz.element_size()), dy.element_size()
    config, strips, rows, flags = _plan(M, N, sizes[0], strides, sizes[1], current_device(z), config)
    partial = [
        torch.empty((strips, N), dtype=torch.float32, device=device) if s.numel() else None for s in sums
    ]
    launch(
        activation_gradient_kernel, (strips, tiles(N, config.BLOCK_N)), dy, z, layer_scale, dz, *partial,
        M, N, rows, *strides, negative_slope, config=config, reads=(dy, z, layer_scale),
        writes=(dz, *partial), ACTIVATION=activation, **flags,
    )  # fmt: skip
    for rows_of, total in zip(partial, sums):
        if rows_of is not None:
            sum_rows(rows_of, total)
    return dz, *sums


def configs(device: Device) -> list[Config]:
    """Both configs, on every device: the pass is bound by memory."""
    return [_WIDE, _NARROW]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def call(name, M, N, dtype, activation, scale=False, dy_dtype=None, transposed=False):
        def thunk(config: Config | None = None):
            z = torch.empty((M, N), dtype=dtype, device="meta")
            dy = torch.empty((N, M) if transposed else (M, N), dtype=dy_dtype or dtype, device="meta")
            vector = torch.empty(N, device="meta") if scale else None
            return activation_gradient(
                dy.t() if transposed else dy, z, vector, activation=activation, config=config
            )

        return RepresentativeCall(name, thunk)

    return [
        call("GELU, bf16", 1576, 3072, torch.bfloat16, "gelu"),
        call("GELU, fp32", 1576, 3072, torch.float32, "gelu_tanh"),
        call("layer scale, fp16, dy fp32", 1576, 768, torch.float16, "none", True, torch.float32),
        call("layer scale, SiLU, odd, dy transposed", 300, 83, torch.float16, "silu", True, transposed=True),
        call("past 2^31 elements", 1 << 20, 3072, torch.bfloat16, "gelu"),
    ]
