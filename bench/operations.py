"""The fused ops on shapes that stand for what networks do with them: for ``verify`` and the layer benches.

``OPERATIONS`` has one entry per op and shape. Each makes a :class:`Call`: the public function, its tensors
and its options, so that the same call can be run by any implementation, in float64, and backward.

    call = OPERATIONS["conv 3x3 64 @56"].make(Inputs("cuda", torch.bfloat16), batch_size=32)
    y = call.run(backend="triton")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastnets import fused
from fastnets.fused import pool as pools
from fastnets.fused.cross_entropy import cross_entropy
from fastnets.fused.layer_norm import layer_norm
from fastnets.fused.squeeze_excite import squeeze_excite

__all__ = ["OPERATIONS", "Call", "Inputs", "Operation"]


class Inputs:
    """Makes the tensors of calls: normal random numbers on one device, in one dtype, from one seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0):
        self.device = torch.device(device)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers of any shape; [N, C, H, W] is laid out channels-last."""
        values = scale * torch.randn(shape, generator=self.generator)
        values = values.to(self.device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def weight(self, *shape: int) -> Tensor:
        """Weights [out, in, ...] that keep the variance of their input, after He et al., 2015."""
        return self.normal(*shape, scale=(2 / (torch.Size(shape[1:]).numel())) ** 0.5)

    def statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        """Running mean and variance [channels] of a batch norm."""
        variance = 0.5 + torch.rand(channels, generator=self.generator)
        return self.normal(channels, scale=0.1), variance.to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


@dataclass
class Call:
    """``function(*tensors, **options)``; ``learns``: positions of the tensors that have a gradient."""

    function: Callable[..., Any]
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any] = field(default_factory=dict)
    learns: tuple[int, ...] = (0,)

    def run(self, backend: str) -> Tensor:
        """The op's (first) result by one implementation."""
        return _first(self.function(*self.tensors, **self.options, backend=backend))

    def in_float64(self) -> Call:
        """The same call with every floating-point tensor converted."""
        tensors = tuple(
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.tensors
        )
        return Call(self.function, tensors, self.options, self.learns)

    def gradients(self, backend: str, cotangent: Tensor) -> list[Tensor]:
        """Gradients of every tensor that learns, for dL/dy = ``cotangent``."""
        tensors = list(self.tensors)
        leaves = []
        for position in self.learns:
            if tensors[position] is not None:
                tensors[position] = tensors[position].detach().requires_grad_()
                leaves.append(tensors[position])
        with torch.enable_grad():
            y = _first(self.function(*tensors, **self.options, backend=backend))
        return list(torch.autograd.grad(y, leaves, cotangent.to(y.dtype).expand_as(y)))

    @property
    def compulsory_bytes(self) -> int:
        """Each tensor read once and the result written once: no implementation moves less."""
        read = sum(t.numel() * t.element_size() for t in self.tensors if isinstance(t, Tensor))
        meta = [t.to("meta") if isinstance(t, Tensor) else t for t in self.tensors]
        y = _first(self.function(*meta, **self.options, backend="reference"))
        return read + y.numel() * y.element_size()


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Operation:
    """One op on one shape. ``family`` groups the shapes of an op; ``trains``: it has a gradient."""

    name: str
    family: str
    make: Callable[[Inputs, int], Call]
    trains: bool = True


OPERATIONS: dict[str, Operation] = {}


def _add(name: str, family: str, make: Callable[[Inputs, int], Call], trains: bool = True) -> None:
    OPERATIONS[name] = Operation(name, family, make, trains)


# --- convolutions -------------------------------------------------------------------------------------------


def _convolution(C, K, size, kernel, stride=1, groups=1, activation="relu", residual=False):
    def make(inputs: Inputs, N: int) -> Call:
        P = (size - 1) // stride + 1
        tensors = (
            inputs.normal(N, C, size, size),
            inputs.weight(K, C // groups, kernel, kernel),
            None,
            *inputs.statistics(K),
            1 + inputs.normal(K, scale=0.1),
            inputs.normal(K, scale=0.1),
            inputs.normal(N, K, P, P) if residual else None,
        )
        options = {
            "stride": (stride, stride),
            "padding": (kernel // 2, kernel // 2),
            "groups": groups,
            "activation": activation,
        }
        return Call(fused.conv_bn_act, tensors, options, learns=(0, 1, 5, 6, 7))

    return make


for _name, _shape in {
    "7x7/2 3→64 @224, stem": (3, 64, 224, 7, 2),
    "3x3/2 3→32 @224, stem": (3, 32, 224, 3, 2, 1, "relu6"),
    "1x1 64→256 @56, residual": (64, 256, 56, 1, 1, 1, "relu", True),
    "1x1 256→64 @56": (256, 64, 56, 1),
    "3x3 64→64 @56": (64, 64, 56, 3),
    "3x3/2 128→128 @56": (128, 128, 56, 3, 2),
    "1x1 1024→256 @14": (1024, 256, 14, 1),
    "3x3 512→512 @7": (512, 512, 7, 3),
    "1x1 24→144 @56": (24, 144, 56, 1, 1, 1, "relu6"),
    "1x1 160→960 @7, SiLU": (160, 960, 7, 1, 1, 1, "silu"),
    "3x3 in 32 groups of 4 @56": (128, 128, 56, 3, 1, 32),
}.items():
    _add(f"conv {_name}", "convolution", _convolution(*_shape))

for _name, _shape in {
    "3x3 96 @112/2": (96, 96, 112, 3, 2, 96, "relu6"),
    "3x3 144 @56": (144, 144, 56, 3, 1, 144, "relu6"),
    "5x5 240 @28": (240, 240, 28, 5, 1, 240, "silu"),
    "7x7 192 @28": (192, 192, 28, 7, 1, 192, "none"),
    "3x3 960 @7": (960, 960, 7, 3, 1, 960, "hardswish"),
}.items():
    _add(f"depthwise {_name}", "depthwise", _convolution(*_shape))


# --- norms, pools, losses -----------------------------------------------------------------------------------


def _batch_norm(C, size, residual, activation="relu"):
    def make(inputs: Inputs, N: int) -> Call:
        x = inputs.normal(N, C, size, size)
        affine = (1 + inputs.normal(C, scale=0.1), inputs.normal(C, scale=0.1))
        tensors = (x, None, *inputs.statistics(C), *affine, inputs.normal(*x.shape) if residual else None)
        return Call(fused.bn_add_act, tensors, {"activation": activation}, learns=(0, 4, 5, 6))

    return make


_add("bn + relu 64 @112", "batch norm", _batch_norm(64, 112, False))
_add("bn + add + relu 256 @56", "batch norm", _batch_norm(256, 56, True))
_add("bn + add + relu 2048 @7", "batch norm", _batch_norm(2048, 7, True))


def _group_norm(C, size, groups):
    def make(inputs: Inputs, N: int) -> Call:
        affine = (1 + inputs.normal(C, scale=0.1), inputs.normal(C, scale=0.1))
        tensors = (inputs.normal(N, C, size, size), groups, *affine)
        return Call(fused.group_norm_act, tensors, {"activation": "relu"}, learns=(0, 2, 3))

    return make


_add("group norm 32 of 256 @56", "group norm", _group_norm(256, 56, 32))
_add("instance norm 64 @112", "group norm", _group_norm(64, 112, 64))


def _pool(function, C, size, *arguments, **options):
    def make(inputs: Inputs, N: int) -> Call:
        return Call(function, (inputs.normal(N, C, size, size), *arguments), options)

    return make


_add("max pool 3x3/2 64 @112", "pool", _pool(pools.max_pool2d, 64, 112, 3, 2, padding=1))
_add("average pool 3x3 192 @28", "pool", _pool(pools.avg_pool2d, 192, 28, 3, 1, padding=1))
_add("global average pool 2048 @7", "pool", _pool(pools.adaptive_avg_pool2d, 2048, 7, 1))


def _cross_entropy(classes, label_smoothing=0.0):
    def make(inputs: Inputs, N: int) -> Call:
        tensors = (inputs.normal(8 * N, classes, scale=3.0), inputs.integers(classes, 8 * N))
        return Call(cross_entropy, tensors, {"label_smoothing": label_smoothing})

    return make


_add("cross-entropy 1000", "loss", _cross_entropy(1000))
_add("cross-entropy 50257, smoothed", "loss", _cross_entropy(50257, 0.1))


# --- attention, and what stands around it in Transformers ---------------------------------------------------


def _attention(heads, length, head_dim, *, key_heads=None, queries=None, samples=None, bias=False, **options):
    """samples: by default the batch size. q, k and v lie in one packed projection unless grouped."""

    def make(inputs: Inputs, N: int) -> Call:
        B, kv_heads = samples or N, key_heads or heads
        if key_heads is None and queries is None:
            packed = inputs.normal(B, length, 3 * heads * head_dim)
            q, k, v = packed.unflatten(2, (3, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = inputs.normal(B, queries or length, heads * head_dim).unflatten(2, (heads, head_dim))
            k, v = (
                inputs.normal(B * kv_heads, length, head_dim).unflatten(0, (B, kv_heads)) for _ in range(2)
            )
            q = q.transpose(1, 2)
        terms = inputs.normal(heads, length, length) if bias else None
        more = {**options, "enable_gqa": True} if key_heads else options
        return Call(
            lambda q, k, v, bias, **rest: fused.attention(q, k, v, bias=bias, **rest),
            (q, k, v, terms), more, learns=(0, 1, 2, 3),
        )  # fmt: skip

    return make


_add("attention 12×197×64, ViT-B", "attention", _attention(12, 197, 64))
_add("attention 12×577×64, ViT-B @384", "attention", _attention(12, 577, 64))
_add("attention 16×4096×64, causal", "attention", _attention(16, 4096, 64, samples=2, is_causal=True))
_add(
    "attention 32×4096×128 of 8 key heads, causal", "attention",
    _attention(32, 4096, 128, key_heads=8, samples=1, is_causal=True),
)  # fmt: skip
_add("attention 64 windows, 4×49×32, bias", "attention", _attention(4, 49, 32, samples=64, bias=True))
_add(
    "attention of 1 query, 32×4096×128 of 8 key heads", "attention",
    _attention(32, 4096, 128, key_heads=8, queries=1), trains=False,
)  # fmt: skip


def _linear(rows, K, N_out, *, activation="none", residual=False):
    """rows: for each sample."""

    def make(inputs: Inputs, N: int) -> Call:
        shape = (N, rows) if rows > 1 else (N,)
        tensors = (
            inputs.normal(*shape, K),
            inputs.weight(N_out, K),
            inputs.normal(N_out, scale=0.1),
            inputs.normal(*shape, N_out) if residual else None,
        )
        return Call(
            lambda x, w, b, residual, **rest: fused.linear_act(x, w, b, residual=residual, **rest),
            tensors, {"activation": activation}, learns=(0, 1, 2, 3),
        )  # fmt: skip

    return make


_add("linear 768→2304, ViT-B q, k, v", "linear", _linear(197, 768, 2304))
_add("linear 768→768 + residual", "linear", _linear(197, 768, 768, residual=True))
_add("linear 768→3072, GELU", "linear", _linear(197, 768, 3072, activation="gelu"))
_add("linear 3072→768 + residual", "linear", _linear(197, 3072, 768, residual=True))
_add("linear 2048→1000, classifier", "linear", _linear(1, 2048, 1000))


def _row_norm(function, columns, *, residual=False, centred=True):
    """Gradients are of the activations alone: PyTorch's of bf16 weights are coarse on the CPU."""

    def make(inputs: Inputs, N: int) -> Call:
        x = inputs.normal(N, 197, columns)
        affine = [1 + inputs.normal(columns, scale=0.1)]
        if centred:
            affine.append(inputs.normal(columns, scale=0.1))
        activations = (x, inputs.normal(*x.shape)) if residual else (x,)
        learns = tuple(range(len(activations)))
        return Call(function, (*activations, (columns,), *affine), {"eps": 1e-5}, learns)

    return make


_add("layer norm 768", "layer norm", _row_norm(layer_norm, 768))
_add("add + layer norm 768", "layer norm", _row_norm(fused.add_layer_norm, 768, residual=True))
_add("RMS norm 4096", "layer norm", _row_norm(fused.rms_norm, 4096, centred=False))


def _gated(hidden):
    def make(inputs: Inputs, N: int) -> Call:
        return Call(fused.gated_act, (inputs.normal(N, 128, 2 * hidden), None), {"activation": "silu"})

    return make


_add("SwiGLU 3584", "gated", _gated(3584))


def _rope(heads, key_heads, length, head_dim):
    def make(inputs: Inputs, N: int) -> Call:
        q, k = (
            inputs.normal(N, length, h * head_dim).unflatten(2, (h, head_dim)).transpose(1, 2)
            for h in (heads, key_heads)
        )
        steps = torch.exp(torch.arange(head_dim // 2) * (-9.2 / (head_dim // 2)))
        angles = (torch.arange(length)[:, None] * steps).repeat(1, 2).to(inputs.device)
        return Call(fused.apply_rope, (q, k, angles.cos(), angles.sin()))

    return make


_add("RoPE 32 and 8 heads, 128×128", "rope", _rope(32, 8, 128, 128))


# --- what is between convolutions ---------------------------------------------------------------------------


def _squeeze_excite(C, squeezed, size):
    def make(inputs: Inputs, N: int) -> Call:
        first, second = inputs.weight(squeezed, C, 1, 1), inputs.weight(C, squeezed, 1, 1)
        biases = inputs.normal(squeezed, scale=0.1), inputs.normal(C, scale=0.1)
        tensors = (inputs.normal(N, C, size, size), first, biases[0], second, biases[1])
        return Call(squeeze_excite, tensors, {"activation": "silu"}, learns=(0, 1, 2, 3, 4))

    return make


_add("squeeze-excite 672/28 @14", "squeeze-excite", _squeeze_excite(672, 28, 14))


def _excited_convolution(C, squeezed, K, size):
    def function(x, weight, mean, var, bn_weight, bn_bias, w1, b1, w2, b2, *, backend):
        return fused.squeeze_excite_conv_bn_act(
            x, weight, None, mean, var, bn_weight, bn_bias, w1=w1, b1=b1, w2=w2, b2=b2,
            excite_activation="silu", backend=backend,
        )  # fmt: skip

    def make(inputs: Inputs, N: int) -> Call:
        tensors = (
            inputs.normal(N, C, size, size),
            inputs.weight(K, C, 1, 1),
            *inputs.statistics(K),
            1 + inputs.normal(K, scale=0.1),
            inputs.normal(K, scale=0.1),
            inputs.weight(squeezed, C, 1, 1),
            inputs.normal(squeezed, scale=0.1),
            inputs.weight(C, squeezed, 1, 1),
            inputs.normal(C, scale=0.1),
        )
        return Call(function, tensors, learns=(0, 1, 4, 5, 6, 7, 8, 9))

    return make


def _shortcut_convolution(C, K, channels, size, step):
    def function(x, weight, shortcut_x, shortcut_weight, *vectors, backend):
        names = ("mean", "var", "bn_weight", "bn_bias")
        of_shortcut = {f"shortcut_{name}": t for name, t in zip(names, vectors[4:])}
        return fused.conv_shortcut(
            x, weight, None, *vectors[:4], shortcut_x=shortcut_x, shortcut_weight=shortcut_weight,
            shortcut_stride=(step, step), activation="relu", backend=backend, **of_shortcut,
        )  # fmt: skip

    def make(inputs: Inputs, N: int) -> Call:
        affine = [(1 + inputs.normal(K, scale=0.1), inputs.normal(K, scale=0.1)) for _ in range(2)]
        tensors = (
            inputs.normal(N, C, size, size),
            inputs.weight(K, C, 1, 1),
            inputs.normal(N, channels, step * size, step * size),
            inputs.weight(K, channels, 1, 1),
            *(*inputs.statistics(K), *affine[0], *inputs.statistics(K), *affine[1]),
        )
        return Call(function, tensors, learns=(0, 1, 2, 3, 6, 7, 10, 11))

    return make


def _shuffled_convolution(C, size):
    def function(x, weight, passed, *vectors, backend):
        return fused.conv_channel_shuffle(
            x, weight, None, *vectors, passed=passed, activation="relu", backend=backend
        )

    def make(inputs: Inputs, N: int) -> Call:
        tensors = (
            inputs.normal(N, C, size, size),
            inputs.weight(C, C, 1, 1),
            inputs.normal(N, C, size, size),
            *inputs.statistics(C),
            *(1 + inputs.normal(C, scale=0.1), inputs.normal(C, scale=0.1)),
        )
        return Call(function, tensors, learns=(0, 1, 2, 5, 6))

    return make


def _response_norm(function, C, size, **options):
    def make(inputs: Inputs, N: int) -> Call:
        options_of_alexnet = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0, **options}
        return Call(function, (inputs.normal(N, C, size, size),), options_of_alexnet)

    return make


def _depthwise_norm(C, size):
    def make(inputs: Inputs, N: int) -> Call:
        tensors = (
            inputs.normal(N, C, size, size),
            inputs.weight(C, 1, 7, 7),
            inputs.normal(C, scale=0.1),
            1 + inputs.normal(C, scale=0.1),
            inputs.normal(C, scale=0.1),
        )
        return Call(fused.depthwise_layer_norm, tensors, {"padding": (3, 3)}, learns=(0, 1, 2, 3, 4))

    return make


_add("squeeze-excite 672/28 + conv 1x1 112 @14", "squeeze-excite", _excited_convolution(672, 28, 112, 14))
_add(
    "conv 1x1 128 to 512 @28 + shortcut 1x1/2 of 256",
    "conv + shortcut",
    _shortcut_convolution(128, 512, 256, 28, 2),
)
_add("conv 1x1 116 @14, channel shuffle", "conv + channel shuffle", _shuffled_convolution(116, 14))
_add("response norm 96 @55", "response norm", _response_norm(fused.local_response_norm, 96, 55))
_add(
    "response norm 256 @27 + max pool 3x3/2",
    "response norm",
    _response_norm(fused.local_response_norm_max_pool, 256, 27, kernel_size=(3, 3), stride=(2, 2)),
)
_add("depthwise 7x7 96 @56 + layer norm", "depthwise + layer norm", _depthwise_norm(96, 56))
