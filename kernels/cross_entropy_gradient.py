"""The backward of ``kernels.cross_entropy``: the gradient that its forward kept, times the incoming one."""

import torch
import triton
import triton.language as tl

from fastnets.kernels.cross_entropy_tile import (
    as_rows,
    clamp_classes,
    classes_at_once,
    extent,
    pick,
    row_offset,
    steps,
)
from fastnets.kernels.cross_entropy_tile import configs_of_rows as configs
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["configs", "representative_calls", "scale_gradient"]


@triton.jit(
    do_not_specialize=["M", "V_units"],
    do_not_specialize_on_alignment=["g_n", "g_v", "g_d", "l_n", "l_d"],
)
def scale_gradient_kernel(
    gradient,
    dloss,
    divisor,
    dx,
    M,
    V_units,
    D,
    g_n,
    g_v,
    g_d,
    l_n,
    l_d,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx = gradient · dloss / divisor, row by row; dx has the strides of ``gradient``."""
    V = V_units * VEC
    blocks = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    row = (pid // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    v = (pid % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (row < M)[:, None] & (v < V)[None, :]
    row_mask = row < M
    row = tl.where(row_mask, row, 0)
    v = clamp_classes(v, v < V, VEC)
    n = row // D
    d = row % D
    if WIDE:
        n = n.to(tl.int64)
        d = d.to(tl.int64)
        v = v.to(tl.int64)
    dloss_row = tl.load(dloss + (n * l_n + d * l_d), mask=row_mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(dloss_row, tl.zeros_like(dloss_row) + tl.load(divisor))
    offset = row_offset(n, d, g_n, g_d, VEC) + (v * g_v)[None, :]
    value = tl.load(gradient + offset, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(dx + offset, value.to(dx.dtype.element_ty), mask=mask)


def scale_gradient(
    gradient: torch.Tensor, dloss: torch.Tensor, divisor: torch.Tensor, *, config: Config | None = None
) -> torch.Tensor:
    """The logits' gradient from what ``cross_entropy`` kept: gradient · dloss / divisor.

    gradient: [N, V, d...], dense. dloss: a scalar, or [N, d...] with reduction "none", any strides. A new
    tensor with the strides of ``gradient``, which stays as it is (the graph may be kept).
    """
    rows, V = as_rows(gradient), gradient.shape[1]
    N, _, D = rows.shape
    dx = torch.empty_like(rows)
    if dx.numel() == 0:
        return dx.view(gradient.shape)
    dloss = dloss.expand(N, D) if dloss.dim() == 0 else dloss.reshape(N, D)
    config = config or pick(V, rows.stride(1) == 1)
    vec = classes_at_once(V, rows)
    launch(
        scale_gradient_kernel,
        (tiles(N * D, config.BLOCK_ROWS) * tiles(V, config.BLOCK_V),),
        rows,
        dloss,
        divisor,
        dx,
        *(N * D, V // vec, D),
        *steps(rows, vec),
        *dloss.stride(),
        config=config,
        reads=(rows, dloss, divisor),
        writes=(dx,),
        VEC=vec,
        WIDE=extent(rows) + 2**20 >= 2**31,
    )
    return dx.view(gradient.shape)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the shapes that networks have: see ``kernels``."""

    def call(shape, dtype, per_row=False):
        def thunk(config=None):
            gradient = torch.empty(shape, dtype=dtype, device="meta")
            size = (shape[0], *shape[2:]) if per_row else ()
            dloss = torch.empty(size, dtype=torch.float32, device="meta")
            scale_gradient(gradient, dloss, torch.empty(1, device="meta"), config=config)

        return thunk

    table = [
        ("1000 classes, bf16", call((256, 1000), torch.bfloat16)),
        ("32000 classes, fp32, rows", call((512, 32000), torch.float32, True)),
        ("21 classes of pixels, fp16, rows", call((8, 21, 64, 64), torch.float16, True)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
