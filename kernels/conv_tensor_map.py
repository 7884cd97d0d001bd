"""Convolution that loads by tensor maps: a second candidate for stride 1 on sm_90 and later, off by default.

The product is that of ``conv``; what differs is how A comes in. A tile's rows are not BLOCK_M successive
pixels but a box of BLOCK_I images × BLOCK_P rows × BLOCK_Q columns of the output. Under a stride of 1 the
pixels that one tap needs are a box of the input too, shifted by the tap, so that one instruction copies it

    x [N, H, W, C]  ⊃  [n : n + BLOCK_I, h : h + BLOCK_P, w : w + BLOCK_Q, c : c + BLOCK_K]

and the hardware fills what lies outside the tensor with zeros, which *is* the padding. No thread computes an
address or a mask. The price is paid where P or Q is no multiple of the box.

Nothing here has run on the hardware it is for. Only a measurement on the user's device may choose it.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastnets.kernels.conv_configs import kernel_configs, representative
from fastnets.kernels.conv_shape import ConvCall, ConvShape, ceil_div, conv_call
from fastnets.kernels.conv_tile import aligned, finish_tile
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch

__all__ = ["configs", "conv_bn_act", "representative_calls"]

SIZES = ("N", "C", "K", "P", "Q", "residual_n", "residual_p", "residual_q")


@triton.jit(do_not_specialize=SIZES)
def conv_tensor_map_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, residual,
    N, C, K, P, Q, residual_n, residual_k, residual_p, residual_q, eps, negative_slope,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One box of output pixels for BLOCK_N channels: grid (channel tiles · boxes,).

    x: descriptor of [N, H, W, C], boxes [BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_K]. weight: descriptor of
    [K, R·S, C], boxes [BLOCK_N, 1, BLOCK_K].
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    K = aligned(K, VECTOR_Y, tl.int32)

    # Channel tiles of one box run together: they share its windows.
    place = tl.program_id(0)
    first_k = place % tl.cdiv(K, BLOCK_N) * BLOCK_N
    place = place // tl.cdiv(K, BLOCK_N)
    first_q = place % tl.cdiv(Q, BLOCK_Q) * BLOCK_Q
    place = place // tl.cdiv(Q, BLOCK_Q)
    first_p = place % tl.cdiv(P, BLOCK_P) * BLOCK_P
    first_n = place // tl.cdiv(P, BLOCK_P) * BLOCK_I

    tap = 0
    s = 0
    c = 0
    h = first_p - PAD_H
    w = first_q - PAD_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(R * S * tl.cdiv(C, BLOCK_K)):
        a = x.load([first_n, h, w, c]).reshape(BLOCK_M, BLOCK_K)
        b = weight.load([first_k, tap, c]).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(a, b.T, acc)

        c += BLOCK_K
        tap_done = c >= C
        row_done = tap_done & (s == S - 1)
        c = tl.where(tap_done, 0, c)
        tap += tap_done.to(tl.int32)
        h += tl.where(row_done, DILATION_H, 0)
        w += tl.where(row_done, -(S - 1) * DILATION_W, tl.where(tap_done, DILATION_W, 0))
        s = tl.where(row_done, 0, s + tap_done.to(tl.int32))

    lane = tl.arange(0, BLOCK_M)
    n = first_n + lane // (BLOCK_P * BLOCK_Q)
    p = first_p + lane // BLOCK_Q % BLOCK_P
    q = first_q + lane % BLOCK_Q
    m = (n.to(INDEX) * P + p) * Q + q
    inside = (n < N) & (p < P) & (q < Q)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    finish_tile(
        acc, m, inside, first_k, K, 0, y, K, vectors, eps, added, negative_slope,
        VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, HALVES,
    )  # fmt: skip


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """``conv.conv_bn_act`` by tensor maps: the same arguments and result, for fewer shapes.

    Raises ``ValueError`` where ``why_not`` names a reason, before anything is launched.
    """
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    call = conv_call(
        x, weight, vectors, residual, stride, padding, dilation, groups,
        eps, activation, negative_slope, config,
    )  # fmt: skip
    return tensor_map_conv(call)


def why_not(call: ConvCall) -> str | None:
    """Why tensor maps cannot serve a call, or None where they can."""
    shape, size = call.shape, call.x.element_size()
    device = current_device(call.x)
    if device.capability < 90:
        return f"{device.name} (sm_{device.capability}) has no tensor maps, they need sm_90"
    if call.x.dtype == torch.float32:
        return "float32 has no exact tensor-core product; float16 and bfloat16 are supported"
    if shape.stride != (1, 1) or shape.groups != 1:
        return (
            f"stride={shape.stride}, groups={shape.groups}: boxes are read with stride (1, 1) and one group"
        )
    for name, tensor in (("x", call.x), ("weight", call.weight)):
        steps = [s * size for n, s in zip(tensor.shape, tensor.stride()) if n > 1 and s != 1]
        channels_last = tensor.shape[1] == 1 or tensor.stride(1) == 1
        if not channels_last or any(step % 16 or step == 0 for step in steps) or tensor.data_ptr() % 16:
            return (
                f"{name} {list(tensor.shape)} with strides {list(tensor.stride())} is not channels-last in "
                "multiples of 16 bytes"
            )
    weight_s, weight_r = call.weight.stride(3), call.weight.stride(2)
    if shape.R > 1 and shape.S > 1 and weight_r != shape.S * weight_s:
        return "the filters' taps are not one run"
    return None


def tensor_map_conv(call: ConvCall) -> torch.Tensor:
    """Runs ``conv_tensor_map_kernel``."""
    reason = why_not(call)
    if reason is not None:
        raise ValueError(f"conv_tensor_map: {reason}; use kernels.conv.conv_bn_act")
    shape = call.shape
    y = call.empty_output()
    if y.numel() == 0:
        return y
    device = current_device(y)
    config = call.config or configs(device)[0]
    if config.get("SPLIT_K", 1) > 1:
        raise UnsupportedConfig(f"SPLIT_K={config.SPLIT_K}: this kernel does not split its columns")
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    box = pixel_box(shape, BLOCK_M)
    N, C, H, W, K = shape.N, shape.C, shape.H, shape.W, shape.K
    x_n, _, x_h, x_w = call.x.stride()
    weight_k, _, weight_r, weight_s = call.weight.stride()
    tap = weight_s if shape.S > 1 else weight_r
    x = _descriptor(call.x, (N, H, W, C), (x_n, x_h, x_w, 1), (*box, BLOCK_K))
    weight = _descriptor(call.weight, (K, shape.taps, C), (weight_k, tap, 1), (BLOCK_N, 1, BLOCK_K))
    boxes = [ceil_div(size, block) for size, block in zip((N, shape.P, shape.Q), box)]
    flags = call.flags(y.numel())
    for name in ("STRIDE_H", "STRIDE_W", "VECTOR_X", "VECTOR_WEIGHT", "PRECISION"):
        del flags[name]
    # The tile is a box here, and the order of programs is the kernel's own.
    meta = {name: value for name, value in config.meta.items() if name in ("BLOCK_N", "BLOCK_K", "HALVES")}
    plain = Config(**meta, num_warps=config.num_warps, num_stages=config.num_stages)
    launch(
        conv_tensor_map_kernel, (ceil_div(K, BLOCK_N) * boxes[0] * boxes[1] * boxes[2],),
        x, weight, y, *call.vectors, call.residual, N, C, K, shape.P, shape.Q,
        *call.strides()[8:], call.eps, call.negative_slope, config=plain,
        reads=(call.x, call.weight, *call.vectors, call.residual), writes=(y,), flops=shape.flops,
        BLOCK_I=box[0], BLOCK_P=box[1], BLOCK_Q=box[2], **flags,
    )  # fmt: skip
    return y


def pixel_box(shape: ConvShape, pixels: int) -> tuple[int, int, int]:
    """(images, rows, columns), powers of two of the given product: the box that covers y with the fewest.

    Among equals the one nearest a square: its windows overlap most.
    """
    powers = [1 << i for i in range(pixels.bit_length())]
    candidates = [box for box in itertools.product(powers, repeat=3) if box[0] * box[1] * box[2] == pixels]

    def cost(box: tuple[int, int, int]) -> tuple[int, int]:
        sizes = zip((shape.N, shape.P, shape.Q), box)
        boxes = [ceil_div(size, block) for size, block in sizes]
        return boxes[0] * boxes[1] * boxes[2], box[0] + box[1] + box[2]

    return min(candidates, key=cost)


def _descriptor(tensor: torch.Tensor, shape: tuple, strides: tuple, block: tuple) -> TensorDescriptor:
    # A dimension of one element may report any stride; the descriptor wants a multiple of 16 bytes.
    legal = [stride if size > 1 else 16 for size, stride in zip(shape[:-1], strides[:-1])]
    return TensorDescriptor(tensor, list(shape), [*legal, 1], list(block))


def configs(device: Device) -> list[Config]:
    """Every config worth measuring on this device; none before sm_90."""
    return kernel_configs("tensor map", device) if device.capability >= 90 else []


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""
    call = functools.partial(representative, run=tensor_map_conv, kernel="tensor map")
    half = torch.bfloat16
    return [
        call("3x3", x=(8, 64, 28, 28), filters=(64, 3, 3), padding=1, residual=True),
        call("3x3, bf16, odd C and K", x=(8, 72, 28, 28), filters=(40, 3, 3), padding=1, dtype=half),
        call("1x1", x=(8, 256, 14, 14), filters=(1024, 1, 1), residual=True, activation="silu"),
    ]
