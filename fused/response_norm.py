"""Local response normalization across channels, with the ReLU before it.

    v = relu(x) or x;   y[c] = v[c] / (k + alpha / size · Σ v[c']²)^beta,  c' in the window of c

x [N, C, ...]; ``F.local_response_norm``'s windows and arguments. One read and one write, where stock's takes
nine passes; only x is kept for the backward, and the two neighbours on each side are read out of the cache.
On the CPU ``backend="auto"`` is stock, but for channels-last maps in inference, whose shifted squares are
added up image by image. Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional
Neural Networks", 2012.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import has_hooks, in_transform, is_unobserved_inference


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _validate(x: Tensor, size: int) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"local_response_norm: x must be [N, C, ...] of 3 to 5 dimensions, got {x.dim()}")
    if not x.is_floating_point():
        raise TypeError(f"local_response_norm: x is {x.dtype}; convert it to a floating dtype first")
    if size < 1:
        raise ValueError(f"local_response_norm: size={size} must be at least 1")


def _stock(x, size, alpha, beta, k, relu) -> Tensor:
    return F.local_response_norm(F.relu(x) if relu else x, size, alpha, beta, k)


def _is_shifted(x: Tensor, size: int, beta: float) -> bool:
    """Whether ``_shifted`` is the sooner: for channels-last maps in fp32, in inference on the CPU.

    Measured (two cores, AlexNet's and GoogLeNet's maps): an eighth of stock's time for one image, a fifth for
    eight.
    """
    return (
        is_unobserved_inference(x)
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.numel() > 0
        and 1 <= size <= _MOST_SHIFTS
        and beta == 0.75
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def _shifted(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """The op with beta 0.75, by additions of the squares shifted along the channels, which lie side by side.

    One image at a time: its sums stay in the cache from one addition to the next.
    """
    C = x.shape[1]
    y = torch.empty_like(x)
    before, after = size // 2, (size - 1) // 2
    share = alpha / size
    constant = x.new_full((1,), k)
    for image, result in zip(x.permute(0, 2, 3, 1).unbind(), y.permute(0, 2, 3, 1).unbind()):
        total = torch.addcmul(constant, image, image, value=share)
        for shift in range(1, min(max(before, after) + 1, C)):
            if shift <= before:
                part = image.narrow(2, 0, C - shift)
                total.narrow(2, shift, C - shift).addcmul_(part, part, value=share)
            if shift <= after:
                part = image.narrow(2, shift, C - shift)
                total.narrow(2, 0, C - shift).addcmul_(part, part, value=share)
        root = total.rsqrt_()
        torch.mul(image, root, out=result)
        result.mul_(root.sqrt_())  # t^(-3/4) = t^(-1/2) · (t^(-1/2))^(1/2)
    return y


_MOST_SHIFTS = 9


def _body(x, size, alpha, beta, k, relu, backend):
    _validate(x, size)
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.response_norm import local_response_norm as launch

        return launch(x, size, alpha=alpha, beta=beta, k=k, relu=relu)
    if not x.numel():
        return torch.empty_like(x)
    return torch.empty_like(x).copy_(_stock(_wide(x), size, alpha, beta, k, relu))


def _fake(x, size, alpha, beta, k, relu, backend):
    _validate(x, size)
    return torch.empty_like(x)


def _window_sum(t: Tensor, before: int, after: int) -> Tensor:
    """Σ over channels c − before to c + after."""
    padded = F.pad(t.transpose(1, -1), (before, after)).transpose(1, -1)
    return sum(padded.narrow(1, i, t.shape[1]) for i in range(before + after + 1))


def _backward_body(dy, x, size, alpha, beta, k, relu, backend):
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.response_norm import local_response_norm_backward as launch

        return launch(dy, x, size, alpha=alpha, beta=beta, k=k, relu=relu)
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    before, after = size // 2, (size - 1) // 2
    v = _wide(x)
    v = v.relu() if relu else v
    s = k + alpha / size * _window_sum(v.square(), before, after)
    direct = dy * s**-beta
    result = direct - 2 * alpha * beta / size * v * _window_sum(direct * v / s, after, before)
    return dx.copy_(torch.where(x <= 0, 0, result) if relu else result)


def _backward_fake(dy, x, size, alpha, beta, k, relu, backend):
    return torch.empty_like(x)


_REST = "int size, float alpha, float beta, float k, bool relu, str backend) -> Tensor"
_infer = dispatch.register(f"local_response_norm_inference(Tensor x, {_REST}", _body, _fake)
_backward = dispatch.register(
    f"local_response_norm_backward(Tensor dy, Tensor x, {_REST}", _backward_body, _backward_fake
)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _infer(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy):
        return _backward(dy, *ctx.saved_tensors, *ctx.options), *[None] * 6


def _autograd(x, *options):
    if torch.is_grad_enabled() and x.requires_grad:
        return _LocalResponseNorm.apply(x, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(x, *options)


_differentiable = dispatch.register(
    f"local_response_norm(Tensor x, {_REST}", _body, _fake, autograd=_autograd
)


def local_response_norm(
    x: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``F.local_response_norm(relu(x) or x, size, alpha, beta, k)``: its windows and its division of alpha.

    x: [N, C, ...] of 3 to 5 dimensions, a floating dtype, any strides. The result is like x, in its memory
    format. Differentiable once; computed in float32 at least and rounded once. Raises ``ValueError`` and
    ``TypeError`` for what does not fit.
    """
    dispatch.validate_backend(backend)
    if in_transform() or dispatch.leaves_to_stock(x, backend):
        if _is_shifted(x, size, beta):
            return _shifted(x.relu() if relu else x, size, alpha, k)
        return _stock(x, size, alpha, beta, k, relu)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, size, alpha, beta, k, relu, backend)


def call_local_response_norm(norm: nn.LocalResponseNorm, x: Tensor, backend: str = "auto") -> Tensor:
    """``norm(x)`` by the op where that is stock's result, by the module itself elsewhere: where a hook would
    be skipped, on the CPU but for what ``local_response_norm`` has a way of its own for, and under autocast.
    """
    if runs_stock(norm, x, backend) and not _runs_shifted(norm, x, backend):
        return norm(x)
    return local_response_norm(x, norm.size, norm.alpha, norm.beta, norm.k, backend=backend)


def runs_stock(norm: nn.LocalResponseNorm, x: object, backend: str) -> bool:
    """Whether the module itself is to run on x."""
    return (
        norm.__class__ is not nn.LocalResponseNorm
        or has_hooks(norm)
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or not 3 <= x.dim() <= 5
        or not x.is_floating_point()
        or in_transform()
        or dispatch.leaves_to_stock(x, backend)
        or torch.is_autocast_enabled(dispatch.device_type_of(x))
    )


def _runs_shifted(norm: nn.LocalResponseNorm, x: object, backend: str) -> bool:
    return (
        norm.__class__ is nn.LocalResponseNorm
        and not has_hooks(norm)
        and isinstance(x, Tensor)
        and dispatch.leaves_to_stock(x, backend)
        and _is_shifted(x, norm.size, norm.beta)
    )


class LocalResponseNorm(nn.LocalResponseNorm):
    """``nn.LocalResponseNorm``: its arguments and results; with ``relu=True`` of what a ReLU leaves."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        relu: bool = False,
        backend: str = "auto",
    ):
        super().__init__(size, alpha, beta, k)
        self.relu = relu
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, module: nn.Module, *, relu: bool = False, backend: str = "auto") -> LocalResponseNorm:
        """The fused module with the settings of a stock one."""
        if type(module) is not nn.LocalResponseNorm:
            raise TypeError(f"LocalResponseNorm.from_stock: got {type(module).__name__}, expected nn's")
        self = cls(module.size, module.alpha, module.beta, module.k, relu=relu, backend=backend)
        return self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, ...] -> a tensor like it."""
        return local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, relu=self.relu, backend=self.backend
        )
