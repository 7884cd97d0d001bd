"""One call of a 2-D convolution, checked: its geometry, its operands and how they lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fastnets.kernels.activation import check_activation
from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.device import current_device
from fastnets.kernels.launch import DTYPES, Config

__all__ = [
    "ConvCall",
    "ConvPlan",
    "ConvShape",
    "Pool",
    "Prologue",
    "Shortcut",
    "ceil_div",
    "checked_vectors",
    "conv_call",
    "convolution_shape",
    "forget_plans",
    "pixel_pitch",
    "product_precision",
    "vector_width",
]

_VECTORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")

# The largest extent addressed in 32 bits, with room for the offsets of lanes that are masked.
INT32_ELEMENTS = 2**31 - 2**20

# Kernel arguments that Triton need not specialise on: what matters of them is in VECTOR_* and other flags,
# and one compiled kernel serves all layers that agree on those.
SIZES = (
    *("M", "H", "W", "K", "P", "Q", "y_pitch", "x_n", "x_h", "x_w"),
    *("weight_k", "weight_r", "weight_s", "residual_n", "residual_p", "residual_q"),
)


@dataclass(frozen=True)
class ConvShape:
    """x [N, C, H, W] and weight [K, C/groups, R, S] give y [N, K, P, Q]."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def M(self) -> int:
        """Output pixels: the rows of the implicit matrix product."""
        return self.N * self.P * self.Q

    @property
    def group_channels(self) -> int:
        return self.C // self.groups

    @property
    def group_outputs(self) -> int:
        return self.K // self.groups

    @property
    def taps(self) -> int:
        return self.R * self.S

    @property
    def geometry(self) -> dict[str, int]:
        """Filter, stride, padding and dilation, by the names of the kernels' compile-time arguments."""
        names = ("STRIDE", "PAD", "DILATION")
        pairs = zip(names, (self.stride, self.padding, self.dilation))
        sides = {f"{name}_{side}": size for name, pair in pairs for side, size in zip("HW", pair)}
        return {"R": self.R, "S": self.S, **sides}

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.M * self.K * self.group_channels * self.taps


class Prologue(NamedTuple):
    """What a convolution does to x when loading it: act((x - mean) · rstd · bn_weight + bn_bias) or x · gate.

    x is then the output of an earlier convolution, of which only the statistics are known yet. mean and rstd
    are [C] fp32; bn_weight and bn_bias are [C] of any float dtype, or None. The value is rounded to x's dtype
    before it is multiplied, as a stored activation would be, and padding stays zero.

    eps: with one, mean and rstd are running statistics of any float dtype: rstd holds variances, and is taken
    for 1/sqrt(rstd + eps).

    gate: [N, C] of any float dtype, one value for each channel of each image, as squeeze-and-excite has them;
    nothing else goes with it.
    """

    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    bn_weight: torch.Tensor | None = None
    bn_bias: torch.Tensor | None = None
    activation: str = "none"
    negative_slope: float = 0.01
    eps: float | None = None
    gate: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """(mean, rstd, bn_weight, bn_bias): what a kernel takes by pointer."""
        return self[:4]


class Shortcut(NamedTuple):
    """A second convolution whose normalised result is added to the first's: bn'(conv2d(x, weight) + bias).

    A 1×1 filter without padding: x [N, C', H', W'] and weight [K, C', 1, 1] of the first one's dtype, under
    ``stride`` on the same [P, Q]. The other vectors are [K], as the first one's.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    bn_weight: torch.Tensor | None = None
    bn_bias: torch.Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    eps: float = 1e-5

    @property
    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """(bias, running_mean, running_var, bn_weight, bn_bias)."""
        return self[2:7]

    @property
    def layout(self) -> tuple:
        """All that a plan depends on."""
        return self.x.shape, self.x.stride(), self.stride


class Pool(NamedTuple):
    """A pooling of the result: the maximum or the mean of windows that touch and do not overlap, without
    padding. Pixels that fill no window are not computed."""

    window: tuple[int, int]
    maximum: bool = True

    def of(self, P: int, Q: int) -> tuple[int, int]:
        """The pooled size of a map."""
        return P // self.window[0], Q // self.window[1]

    def covered(self, shape: ConvShape) -> ConvShape:
        """The convolution, of whose result only the pixels in whole windows are left."""
        P, Q = self.of(shape.P, shape.Q)
        return replace(shape, P=P * self.window[0], Q=Q * self.window[1])

    @property
    def flags(self) -> dict[str, object]:
        """The compile-time arguments."""
        return {"POOL_H": self.window[0], "POOL_W": self.window[1], "MAXIMUM": self.maximum}


NO_POOL = Pool((1, 1))


class ConvPlan(NamedTuple):
    """All of a launch that follows from sizes, strides and options: worked out once, see ``ConvCall.plan``.

    sizes: the kernel's arguments between the tensors and ``eps``; tiles_m: row tiles, each with statistics.
    """

    config: Config
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    constexprs: dict[str, Any]
    tiles_m: int


@dataclass
class ConvCall:
    """The operands of a checked call. vectors: (bias, running_mean, running_var, bn_weight, bn_bias)."""

    shape: ConvShape
    x: torch.Tensor
    weight: torch.Tensor
    vectors: tuple[torch.Tensor | None, ...]
    residual: torch.Tensor | None
    eps: float
    activation: str
    negative_slope: float
    config: Config | None
    precision: str
    """Of fp32 products: "ieee", or "tf32" where torch's switch for convolutions allows it."""
    prologue: Prologue | None = None
    shortcut: Shortcut | None = None
    pool: Pool | None = None
    """With one, ``shape`` is what it covers."""
    out: torch.Tensor | None = None
    """Where y goes instead of memory of its own: see ``pitch``."""
    shuffles: bool = False
    """Whether the residual is not added: its channels and the result's take turns in y, which has 2K."""
    statistics: bool = False
    """Whether the statistics of y are asked for."""
    plans: dict[tuple, Any] = field(default_factory=dict)
    """What ``plan`` keeps, shared by all calls of the same sizes, strides and dtypes."""

    def plan(self, make: Callable[[ConvCall], Any]) -> Any:
        """``make(self)``, which depends on nothing but sizes, strides, dtypes, options and the device."""
        before = self.prologue
        key = (
            make, self.config, self.activation, self.precision, self.statistics,
            before if before is None else before.activation,
            None if self.shortcut is None else self.shortcut.layout, self.pool, self.pitch,
            self.residual.stride() if self.shuffles else None, current_device(self.x),
        )  # fmt: skip
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = make(self)
        return plan

    @property
    def pitch(self) -> int:
        """Elements between successive pixels of y: K, and more in a slice of a buffer's channels."""
        return self.shape.K if self.out is None else pixel_pitch(self.out.shape, self.out.stride())

    def empty_output(self) -> torch.Tensor:
        """y [N, K or 2K, P, Q], pooled or not, of x's dtype and device: ``out``, or else dense
        channels-last."""
        if self.out is not None:
            return self.out
        shape = self.shape
        N, K, (P, Q) = shape.N, shape.K, (self.pool or NO_POOL).of(shape.P, shape.Q)
        if self.shuffles:
            K *= 2
        strides = (K * P * Q, 1, K * Q, K)
        return torch.empty_strided((N, K, P, Q), strides, dtype=self.x.dtype, device=self.x.device)

    def empty_statistics(self, tiles: int) -> Statistics:
        """Where the epilogue writes the statistics of y's row tiles, or ``NO_STATISTICS``."""
        return empty_statistics(tiles, self.shape.K, self.x.device) if self.statistics else NO_STATISTICS

    def strides(self) -> tuple[int, ...]:
        """Of x, weight and residual in their order of dimensions: twelve numbers."""
        return self._layout(0)[0]

    def flags(self, outputs: int = 0) -> dict[str, object]:
        """The compile-time arguments that all convolution kernels share. outputs: elements of the output."""
        flags = self._layout(outputs)[1]
        if self.out is not None:
            size = self.x.element_size()
            flags = {**flags, "VECTOR_Y": vector_width(size, self.shape.group_outputs, self.pitch)}
        return {**flags, "PRECISION": self.precision, "ACTIVATION": self.activation}

    def _layout(self, outputs: int):
        residual = None if self.residual is None else self.residual.stride()
        size = self.x.element_size()
        return _layout(self.shape, size, self.x.stride(), self.weight.stride(), residual, outputs)


def _layout(
    shape: ConvShape,
    element_size: int,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    residual: tuple[int, ...] | None,
    outputs: int,
) -> tuple[tuple[int, ...], dict[str, object]]:
    """What follows from sizes and strides alone: ``ConvCall.strides`` and most of its flags.

    outputs: elements of the largest output.
    """
    sizes_x = (shape.N, shape.C, shape.H, shape.W)
    sizes_weight = (shape.K, shape.group_channels, shape.R, shape.S)
    sizes_y = (shape.N, shape.K, shape.P, shape.Q)
    spans = [outputs, span(sizes_x, x), span(sizes_weight, weight)]
    x_n, x_c, x_h, x_w = x = stepping(sizes_x, x)
    weight_k, weight_c, weight_r, weight_s = weight = stepping(sizes_weight, weight)
    dense = False
    added = (0, 0, 0, 0)
    if residual is not None:
        spans.append(span(sizes_y, residual))
        added = stepping(sizes_y, residual)
        channels_last = (shape.K * shape.P * shape.Q, 1, shape.K * shape.Q, shape.K)
        dense = added == stepping(sizes_y, channels_last)
    # Offsets step by multiples of these, so that a run of channels can load as one vector.
    x_steps = (shape.group_channels, x_n, x_h, x_w)
    weight_steps = (shape.group_channels, weight_k, weight_r, weight_s)
    flags = {
        **shape.geometry,
        "VECTOR_X": vector_width(element_size, *x_steps) if x_c == 1 else 1,
        "VECTOR_WEIGHT": vector_width(element_size, *weight_steps) if weight_c == 1 else 1,
        "VECTOR_Y": vector_width(element_size, shape.group_outputs),
        "DENSE_RESIDUAL": dense,
        "WIDE": max(spans) > INT32_ELEMENTS,
    }
    return (*x, *weight, *added), flags


def convolution_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> ConvShape:
    """The geometry of x [N, C, H, W] under weight [K, C/groups, R, S]; ``ValueError`` where they misfit."""
    if len(x) != 4 or len(weight) != 4:
        raise ValueError(f"x and weight need 4 dimensions, they have {list(x)} and {list(weight)}")
    N, C, H, W = x
    K, group_channels, R, S = weight
    if groups < 1 or C % groups or K % groups:
        raise ValueError(f"groups={groups} must divide C={C} and K={K}")
    if group_channels * groups != C:
        raise ValueError(
            f"weight {list(weight)} with groups={groups} takes {group_channels * groups} channels, x has {C}"
        )
    if 0 in weight:
        raise ValueError(f"weight {list(weight)} is empty")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride={stride} and dilation={dilation} must be positive, padding={padding} not negative"
        )
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    if P < 1 or Q < 1:
        raise ValueError(
            f"a {R}x{S} filter with dilation={dilation} does not fit {H}x{W} padded by {padding}"
        )
    return ConvShape(N, C, H, W, K, R, S, P, Q, tuple(stride), tuple(padding), tuple(dilation), groups)


def product_precision(x: torch.Tensor) -> str:
    """Of fp32 products: "ieee", or "tf32" where torch's switch for convolutions allows it."""
    # Meta tensors stand for those of the assumed device.
    if x.dtype != torch.float32 or not (x.is_cuda or x.is_meta):
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def conv_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    config: Config | None,
) -> ConvCall:
    """Checks the arguments that every convolution launcher takes.

    Raises ``TypeError`` for a dtype and ``ValueError`` for anything else that is no convolution.
    """
    check_activation(activation)
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    added = None if residual is None else (residual.shape, residual.stride(), residual.dtype)
    key = (
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, added,
        stride, padding, dilation, groups,
    )  # fmt: skip
    checked = _checked.get(key)
    if checked is None:
        shape = convolution_shape(x.shape, weight.shape, stride, padding, dilation, groups)
        _check_operands(x, weight, residual, shape)
        if len(_checked) >= _CHECKED:
            _checked.clear()
        checked = _checked[key] = shape, torch.Size((shape.K,)), {}
    shape, channels, plans = checked
    _, mean, var, bn_weight, bn_bias = vectors
    if (mean is None) != (var is None) or (mean is None and (bn_weight is not None or bn_bias is not None)):
        raise ValueError(
            "batch norm needs running_mean and running_var together; bn_weight and bn_bias need both"
        )
    for vector in vectors:
        if vector is not None and (vector.shape != channels or not vector.is_contiguous()):
            vectors = checked_vectors(vectors, shape.K)
            break
    precision = product_precision(x)
    return ConvCall(
        shape, x, weight, vectors, residual, eps, activation, negative_slope, config, precision, plans=plans
    )  # fmt: skip


_CHECKED = 4096  # calls that differ in sizes, strides or dtypes; beyond that all are checked anew
_checked: dict[tuple, tuple[ConvShape, torch.Size, dict]] = {}


def forget_plans() -> None:
    """Check and plan every call anew (for tests that change what plans depend on)."""
    _checked.clear()


def _check_operands(x, weight, residual, shape: ConvShape) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; supported: float32, float16, bfloat16")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype} but x is {x.dtype}; cast one of them")
    if residual is not None:
        size = [shape.N, shape.K, shape.P, shape.Q]
        if list(residual.shape) != size:
            raise ValueError(f"residual has shape {list(residual.shape)}, expected {size}; expand it")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype} but x is {x.dtype}; cast one of them")


def checked_vectors(vectors: tuple, K: int) -> tuple:
    """The vectors, contiguous."""
    for name, vector in zip(_VECTORS, vectors):
        if vector is not None and vector.shape != (K,):
            raise ValueError(f"{name} has shape {list(vector.shape)}, expected [{K}]")
    return tuple(v if v is None or v.is_contiguous() else v.contiguous() for v in vectors)


# What kernels take for mean, m2 and count where nobody asks for statistics.
NO_STATISTICS = Statistics(None, None, None)


def empty_statistics(tiles: int, channels: int, device: torch.device) -> Statistics:
    """Where a convolution's epilogue writes the statistics of its output, tile by tile."""
    size = (tiles, channels)
    mean, m2 = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
    return Statistics(mean, m2, torch.empty(tiles, dtype=torch.float32, device=device))


def stepping(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, 0 along dimensions of one element, where torch may report anything."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(sizes, strides))


def span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, through all strides."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))


def pixel_pitch(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one distance between successive pixels of a tensor [N, C, H, W], or None where there is no such."""
    N, _, H, W = sizes
    of_image, _, of_row, of_pixel = strides
    pitch = of_pixel if W > 1 else of_row if H > 1 else of_image
    rows = H == 1 or of_row == W * pitch
    images = N == 1 or of_image == H * W * pitch
    return pitch if rows and images else None


def ceil_div(size: int, block: int) -> int:
    # triton.cdiv is a function of kernels too, and takes 3 us of a launch.
    return -(-size // block)


def vector_width(element_size: int, *steps: int) -> int:
    """Elements that one access of at most 16 bytes may take where all offsets are multiples of ``steps``."""
    width = 16 // element_size
    while any(step % width for step in steps):
        width //= 2
    return width
