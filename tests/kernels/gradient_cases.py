"""Gradients of convolutions for the tests of their kernels: operands, stock PyTorch's answers, checks."""

import torch
import torch.nn.functional as F

from fastnets.kernels.conv_backward import Normalized, conv_input_gradient, conv_weight_gradient
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.launch import Config
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import ACTIVATIONS, Case, in_layout, output_shape

FULL = torch.float32


def operands(case: Case, dtype, draw=torch.randn, dy_layout="last"):
    """(dy, x, weight) of a case, in its layouts; random ones are scaled to keep sums near 1."""
    x, weight = draw(case.N, case.C, case.H, case.W), draw(case.K, case.C // case.groups, case.R, case.S)
    dy = draw(*output_shape(case))
    if draw is torch.randn:
        weight = weight / (case.K // case.groups * case.R * case.S) ** 0.5
        dy = dy / (dy.numel() / case.K) ** 0.5
    return (
        in_layout(dy.to(dtype), dy_layout),
        in_layout(x.to(dtype), case.x),
        in_layout(weight.to(dtype), case.weight),
    )


def stock(case: Case, dy, x, weight, dtype=None):
    """(dx, dw) as eager computes them, in another dtype where one is given."""
    dy, x, weight = (t.to(dtype or t.dtype) for t in (dy, x, weight))
    stride, padding, dilation, groups = case.geometry.values()
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )
    return dx, dw


def run(lane, case: Case, dy, x, weight, **options):
    """(dx, dw) as our kernels compute them; options by the name of their operand's gradient."""
    dy, x, weight = (lane.put(t) for t in (dy, x, weight))
    with lane:
        dx = conv_input_gradient(dy, weight, x.shape, **case.geometry, **options.get("dx", {}))
        dw = conv_weight_gradient(dy, x, weight.shape, **case.geometry, **options.get("dw", {}))
    for gradient in (dx, dw):
        assert gradient.is_contiguous(memory_format=torch.channels_last)
    return dx, dw


def signs(*shape):
    return integers(*shape, low=-1, high=1)


def check_exact(lane, case: Case, dtype, dy_layout="last", **options):
    """On small integers, whose sums no rounding can touch: equal to float64, element for element."""
    tensors = operands(case, dtype, signs, dy_layout)
    expected = stock(case, *tensors, torch.float64)
    assert max(gradient.abs().max() for gradient in expected) <= 256, "too large to be exact in bfloat16"
    for reference, gradient in zip(expected, run(lane, case, *tensors, **options)):
        assert gradient.dtype == dtype
        assert_exact(reference, gradient)


CORE = {
    "3x3": Case(N=1, C=40, K=24, padding=(1, 1)),
    "3x3, stride 2": Case(N=1, C=40, K=24, padding=(1, 1), stride=(2, 2)),
    "1x1": Case(N=1, C=48, K=40, R=1, S=1),
}


SPLIT = Config(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, SPLIT_K=4, HALVES=False, num_warps=4, num_stages=2
)


def vectors_of(C, affine=True):
    """(mean, rstd, bn_weight, bn_bias) of C channels."""
    affines = (torch.randn(C), torch.randn(C)) if affine else (None, None)
    return torch.randn(C), torch.rand(C) + 0.5, *affines


def bn(z, vectors, dtype):
    """(x̂, u) of z in a dtype."""
    mean, rstd, weight, bias = (None if v is None else v.to(z.device, dtype)[:, None, None] for v in vectors)
    centred = (z.to(dtype) - mean) * rstd
    return centred, centred if weight is None else centred * weight + bias


def packed(bits, z):
    """A mask: the bits [N, C, H, W], one for each element of z in its memory order."""
    order = bits.permute(0, 2, 3, 1) if z.stride(1) == 1 else bits
    order = F.pad(order.flatten().to(torch.uint8), (0, -order.numel() % 8)).view(-1, 8)
    return (order << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def stock_normalized(case, dy, weight, z, vectors, activation, added, bits, dtype, slope):
    """(dv, sums) of the composition: stock gradients in a dtype, of the activation at u, and its sums.

    In 16-bit dtypes batch norm and activation are those of fp32, as stock's are, on stock's rounded dx.
    """
    wide = torch.float64 if dtype == torch.float64 else FULL
    dx, _ = stock(case, dy, z, weight, dtype)
    if added is not None:
        dx = dx + added.to(dtype)
    centred, u = bn(z, vectors, wide)
    u = u.detach().requires_grad_()
    if bits is None:
        (dv,) = torch.autograd.grad(ACTIVATIONS[activation](u, slope), u, dx.to(wide))
    else:
        dv = dx.to(wide) * bits
    dv = dv.to(dtype)
    sums = torch.stack([dv.to(wide).sum((0, 2, 3)), (dv.to(wide) * centred).sum((0, 2, 3))])
    return dv, sums


def check_normalized(
    lane, case, dtype, activation="relu", added=None, layout="last", affine=True, slope=0.2, mask=False,
    **options,
):  # fmt: skip
    """dv and its sums by the error ratio. Layouts: of added, if any, and of z. mask: act' is a random one."""
    dy, z, weight = operands(case, dtype)
    z = in_layout(z, layout)
    if added is not None:
        added = in_layout(torch.randn(z.shape).to(dtype), added)
    vectors = vectors_of(case.C, affine)
    prologue = Prologue(*(lane.put(v) for v in vectors), activation, slope)
    bits = torch.rand(z.shape) < 0.5 if mask else None
    normalized = Normalized(lane.put(z), prologue, lane.put(packed(bits, z)) if mask else None)
    put = [lane.put(t) for t in (dy, weight, added)]
    with lane:
        dv, sums = conv_input_gradient(
            *put[:2], z.shape, **case.geometry, added=put[2], normalized=normalized, **options
        )
    assert dv.is_contiguous(memory_format=torch.channels_last)
    arguments = (case, dy, weight, z, vectors, activation, added, bits)
    reference, reference_sums = stock_normalized(*arguments, torch.float64, slope)
    usual, usual_sums = stock_normalized(*arguments, dtype, slope)
    assert_close_to(reference, usual, dv, ratio=3)
    assert_close_to(reference_sums, usual_sums, sums, ratio=3)
    # The sums are those of what is stored, to fp32's own error.
    centred, _ = bn(z, vectors, torch.float64)
    stored = dv.cpu().double()
    of_stored = torch.stack([stored.sum((0, 2, 3)), (stored * centred).sum((0, 2, 3))])
    terms = torch.stack([stored.abs().sum((0, 2, 3)), (stored * centred).abs().sum((0, 2, 3))])
    assert ((sums.cpu().double() - of_stored).abs() <= 3e-6 * terms + 1e-12).all()
