"""Convolutions for the tests of every convolution kernel: their inputs, and stock PyTorch's answers."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastnets.kernels.conv_shape import conv_call
from tests.accuracy import assert_close_to, assert_exact, integers

ACTIVATIONS = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "relu6": lambda y, slope: F.relu6(y),
    "leaky_relu": F.leaky_relu,
    "silu": lambda y, slope: F.silu(y),
    "hardswish": lambda y, slope: F.hardswish(y),
    "hardsigmoid": lambda y, slope: F.hardsigmoid(y),
    "sigmoid": lambda y, slope: torch.sigmoid(y),
    "tanh": lambda y, slope: torch.tanh(y),
    "gelu": lambda y, slope: F.gelu(y),
    "gelu_tanh": lambda y, slope: F.gelu(y, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """x [N, C, H, W] under K filters of R × S.

    Layouts: those of ``in_layout``; residual has one, or is None. bn: "full", "no affine" or None.
    """

    N: int = 2
    C: int = 64
    H: int = 7
    W: int = 6
    K: int = 40
    R: int = 3
    S: int = 3
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1
    activation: str = "relu"
    bias: bool = False
    bn: str | None = "full"
    residual: str | None = None
    x: str = "last"
    weight: str = "last"
    geometry: dict = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        geometry = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        object.__setattr__(self, "geometry", geometry)


def in_layout(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a [N, C, H, W] tensor laid out: "last" (channels), "contiguous", "sliced", "misaligned",
    "transposed", or "expanded", which repeats the first image."""
    if layout == "last":
        return values.to(memory_format=torch.channels_last)
    if layout == "contiguous":
        return values.contiguous()
    if layout == "sliced":
        # Inner pixels and channels of a larger channels-last tensor, whose other elements are NaN.
        N, C, H, W = values.shape
        whole = torch.full((N, H + 2, W + 3, C + 5), float("nan"), dtype=values.dtype)
        view = whole[:, 1 : H + 1, 2 : W + 2, 3 : C + 3].permute(0, 3, 1, 2)
        return view.copy_(values)
    if layout == "misaligned":
        # Channels-last, with rows that are a multiple of 16 bytes apart but start 2 or 4 bytes off.
        N, C, H, W = values.shape
        whole = torch.full((N, H, W, C + 8), float("nan"), dtype=values.dtype)
        return whole[..., 1 : C + 1].permute(0, 3, 1, 2).copy_(values)
    if layout == "transposed":
        return values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert layout == "expanded"
    return values[:1].expand(values.shape)


def operands(case: Case, dtype: torch.dtype, draw=torch.randn, vector_dtype=torch.float32) -> dict:
    """The tensors of ``conv_bn_act`` by name; random weights are scaled to keep sums near 1."""
    fan_in = case.C // case.groups * case.R * case.S
    weight = draw(case.K, case.C // case.groups, case.R, case.S)
    if draw is torch.randn:
        weight = weight / fan_in**0.5
    x = in_layout(draw(case.N, case.C, case.H, case.W).to(dtype), case.x)
    result = {"x": x, "weight": in_layout(weight.to(dtype), case.weight)}
    if case.bias:
        result["bias"] = draw(case.K).to(dtype)
    if case.bn is not None:
        result["running_mean"] = draw(case.K).to(vector_dtype)
        result["running_var"] = (torch.rand(case.K) + 0.5).to(vector_dtype)
    if case.bn == "full":
        result["bn_weight"] = draw(case.K).to(vector_dtype)
        result["bn_bias"] = draw(case.K).to(vector_dtype)
    if case.residual is not None:
        result["residual"] = in_layout(draw(*output_shape(case)).to(dtype), case.residual)
    return result


def output_shape(case: Case) -> tuple[int, int, int, int]:
    sizes = zip((case.H, case.W), (case.R, case.S), case.stride, case.padding, case.dilation)
    P, Q = (
        (n + 2 * pad - dilation * (taps - 1) - 1) // stride + 1 for n, taps, stride, pad, dilation in sizes
    )
    return case.N, case.K, P, Q


def shape_of(case: Case):
    """The ``ConvShape`` that the launcher makes of it."""
    x = torch.empty(case.N, case.C, case.H, case.W, device="meta")
    weight = torch.empty(case.K, case.C // case.groups, case.R, case.S, device="meta")
    return conv_call(x, weight, (None,) * 5, None, *case.geometry.values(), 1e-5, "none", 0.01, None).shape


def stock(case: Case, tensors: dict, dtype: torch.dtype | None = None, eps=1e-5, slope=0.01) -> torch.Tensor:
    """Eager PyTorch's answer, every tensor cast to ``dtype`` first where one is given."""
    t = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    y = F.conv2d(t["x"], t["weight"], t.get("bias"), **case.geometry)
    if case.bn is not None:
        affine = (t.get("bn_weight"), t.get("bn_bias"))
        y = F.batch_norm(y, t["running_mean"], t["running_var"], *affine, training=False, eps=eps)
    if case.residual is not None:
        y = y + t["residual"]
    return ACTIVATIONS[case.activation](y, slope)


def run(lane, launcher, case: Case, tensors: dict, **options) -> torch.Tensor:
    tensors = {name: lane.put(tensor) for name, tensor in tensors.items()}
    with lane:
        y = launcher(**tensors, **case.geometry, activation=case.activation, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def check(lane, launcher, case: Case, dtype: torch.dtype, vector_dtype=torch.float32, **options) -> None:
    """Our result against float64, by the error of stock PyTorch in the same dtype."""
    tensors = operands(case, dtype, vector_dtype=vector_dtype)
    y = run(lane, launcher, case, tensors, **options)
    stock_options = {"slope": options["negative_slope"]} if "negative_slope" in options else {}
    stock_options |= {"eps": options["eps"]} if "eps" in options else {}
    assert_close_to(
        stock(case, tensors, torch.float64, **stock_options), stock(case, tensors, **stock_options), y
    )


def check_exact(lane, launcher, case: Case, dtype: torch.dtype, **options) -> None:
    """On small integers, whose sums no rounding can touch: equal to float64, element for element."""

    def draw(*shape):
        return integers(*shape, low=-1, high=1)

    tensors = operands(case, dtype, draw)
    y = run(lane, launcher, case, tensors, **options)
    expected = stock(case, tensors, torch.float64)
    assert expected.abs().max() <= 256, "the case is too large to be exact in bfloat16"
    assert_exact(expected, y)
