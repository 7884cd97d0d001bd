"""The gradient of a linear layer with its epilogue: the pass over dy, and the products that follow it.

    dz = act'(z) · layer_scale · dy;   dx = dz @ weight;   dweight = dzᵀ @ x

and the sums over rows that biases and layer scales learn by. The layer itself is in ``fused.linear``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of


def _backward_body(dy, saved, layer_scale, activation, negative_slope, dtype, wants_bias, backend):
    """(dz, Σ dz over rows, Σ dy · act(z) over rows), the sums in fp32 and empty where nobody asks."""
    N = dy.shape[-1]
    if backend == "triton" and dy.numel():
        from fastnets.kernels.linear_backward import activation_gradient

        return activation_gradient(
            dy, saved, layer_scale, activation=activation, negative_slope=negative_slope, dtype=dtype,
            bias_sums=wants_bias,
        )  # fmt: skip
    entry = activation_of(activation)
    none = dy.new_empty(0, dtype=torch.float32)
    rows = tuple(range(dy.dim() - 1))
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dscale = none
    dact = dy
    if layer_scale is not None:
        product = dy * entry.forward(saved, negative_slope)
        dscale = product.sum(rows, dtype=wide) if rows else product.to(wide)
        dact = dy * layer_scale
    dz = entry.backward(dact.to(dtype), saved, negative_slope)
    if activation == "none":
        dz = dz.clone()  # an op's result is no input
    dbias = none
    if wants_bias:
        dbias = dz.sum(rows, dtype=wide) if rows else dz.to(wide)
    return dz.view(-1, N) if dz.is_contiguous() else dz.reshape(-1, N).contiguous(), dbias, dscale


def _backward_fake(dy, saved, layer_scale, activation, negative_slope, dtype, wants_bias, backend):
    N = dy.shape[-1]
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    rows = dy.numel() // N if N else 0
    sums = [dy.new_empty(N if asked else 0, dtype=wide) for asked in (wants_bias, layer_scale is not None)]
    return dy.new_empty((rows, N), dtype=dtype), *sums


_backward = dispatch.register(
    "linear_act_backward(Tensor dy, Tensor saved, Tensor? layer_scale, str activation, float negative_slope, "
    "ScalarType dtype, bool wants_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


def _matrix_product_body(x, weight, dtype, backend):
    if backend == "triton" and x.numel() and weight.numel():
        from fastnets.kernels.linear import matrix_product as launch

        return launch(x, weight, dtype=dtype)[0]
    return torch.mm(x, weight.t()).to(dtype)


matrix_product = dispatch.register(
    "matrix_product(Tensor x, Tensor weight, ScalarType dtype, str backend) -> Tensor",
    _matrix_product_body,
    lambda x, weight, dtype, backend: x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype),
    flops=lambda x, weight, *args, out_shape=None, **kwargs: 2 * math.prod(x) * weight[0],
)


def gradient_backend(x: Tensor, backend: str) -> tuple[str, str]:
    """What serves (the pass over dy, the two products of the backward): "triton" or "reference" each.

    The products are the vendor's unless ours are asked for by name: they have no epilogue to save a pass.
    """
    wanted = dispatch.requested(backend)
    ours = dispatch.ours_take((x.dtype,), wanted)
    if wanted in ("triton", "reference"):
        return wanted, wanted
    return ("triton" if ours and dispatch.device_type_of(x) == "cuda" else "reference"), "reference"


def gradient_of_product(
    dy, saved, layer_scale, activation, negative_slope, dtype, wants_bias, passes
):  # fmt: skip
    """dz [M, N], and the sums that were asked for; nothing is copied where dz is dy."""
    if saved is None:
        dz = dy.reshape(-1, dy.shape[-1]).to(dtype)
        return dz, (dz.sum(0) if wants_bias else None), None
    return _backward(dy, saved, layer_scale, activation, negative_slope, dtype, wants_bias, passes)
