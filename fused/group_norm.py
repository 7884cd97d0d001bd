"""Group norm and instance norm with residual addition and activation.

    mean, rstd = of each sample and group of channels
    y = act( (x − mean) · rstd · weight + bias + residual )

x [N, C, ...] of 2 to 5 dimensions and any strides, weight and bias [C]. A group is C / groups neighbouring
channels; instance norm is group norm with as many groups as channels. Forward takes one pass over x for the
statistics and one for y; backward two over the gradient and x. Saved are x, mean and rstd, and the residual
where the activation's gradient needs it. On the CPU ``backend="auto"`` is stock.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import bn_add_act, call_stock, choose, has_hooks, in_transform
from fastnets.fused.layers import fusible_activation

_ARGUMENTS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, str activation, "
    "float negative_slope, str backend"
)

# --- the implementations ------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.to(_wide(x)).reshape(x.shape[0] * groups, -1)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(_wide(x)).view(1, -1, *[1] * (x.dim() - 2))


def _reference_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return _empty_statistics(x, groups)
    var, mean = torch.var_mean(_by_group(x, groups), 1, correction=0)
    return mean, torch.rsqrt(var + eps)


def _empty_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return tuple(x.new_zeros(x.shape[0] * groups, dtype=_wide(x)) for _ in range(2))


def _preactivation(x, mean, rstd, weight, bias, residual, groups) -> tuple[Tensor, Tensor]:
    """(x̂, u), in float32 at least."""
    normalized = ((_by_group(x, groups) - mean[:, None]) * rstd[:, None]).view(x.shape)
    u = normalized if weight is None else normalized * _per_channel(weight, x)
    if bias is not None:
        u = u + _per_channel(bias, x)
    return normalized, u if residual is None else u + residual


@dispatch.replays(tensors=4)
def _forward_body(x, weight, bias, residual, groups, eps, activation, negative_slope, backend):
    _validate(x, weight, bias, residual, groups, activation)
    if choose(x, backend) == "triton":
        from fastnets.kernels import group_norm as kernels

        mean, rstd = kernels.group_statistics(x, groups, eps=eps)
        y = kernels.group_norm_add_act(
            x, mean, rstd, weight, bias, residual,
            groups=groups, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        return y, mean, rstd
    mean, rstd = _reference_statistics(x, groups, eps)
    _, u = _preactivation(x, mean, rstd, weight, bias, residual, groups)
    y = activation_of(activation).forward(u, negative_slope)
    return torch.empty_like(x).copy_(y), mean, rstd


def _body(*arguments):
    return _forward_body(*arguments)[0]


def _validate(x, weight, bias, residual, groups, activation) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"group_norm_act: x must be [N, C, ...] of 2 to 5 dimensions, got {x.dim()}")
    if not x.is_floating_point():
        raise TypeError(f"group_norm_act: x is {x.dtype}; convert it to a floating dtype first")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"group_norm_act: groups={groups} does not divide {x.shape[1]} channels")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (x.shape[1],):
            raise ValueError(
                f"group_norm_act: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},)"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"group_norm_act: {name} is on {tensor.device}, x on {x.device}; move one")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"group_norm_act: residual is {tuple(residual.shape)} {residual.dtype}, "
            f"x {tuple(x.shape)} {x.dtype}; expand or convert it first"
        )
    activation_of(activation)


def _forward_fake(x, weight, bias, residual, groups, eps, activation, negative_slope, backend):
    _validate(x, weight, bias, residual, groups, activation)
    return torch.empty_like(x), *_empty_statistics(x, groups)


def _fake(*arguments):
    return _forward_fake(*arguments)[0]


def _backward_body(
    dy, x, mean, rstd, weight, bias, residual, groups, activation, negative_slope, keep, backend
):
    """(dx, dv or an empty tensor, (dbias, dweight))."""
    if choose(x, backend) == "triton":
        from fastnets.kernels.group_norm import group_norm_backward

        dx, dv, sums = group_norm_backward(
            dy, x, mean, rstd, weight, bias, residual,
            groups=groups, activation=activation, negative_slope=negative_slope, keep=keep,
        )  # fmt: skip
        return dx, x.new_empty(0) if dv is None else dv, sums
    normalized, u = _preactivation(x, mean, rstd, weight, bias, residual, groups)
    dv = activation_of(activation).backward(dy.to(_wide(x)), u, negative_slope)
    over_pixels = [0, *range(2, x.dim())]
    sums = torch.stack([dv.sum(over_pixels), (dv * normalized).sum(over_pixels)])
    weighted = dv if weight is None else dv * _per_channel(weight, x)
    a, b = (_by_group(t, groups).mean(1, keepdim=True) for t in (weighted, weighted * normalized))
    dx = _by_group(weighted, groups) - a - _by_group(normalized, groups) * b
    dx = torch.empty_like(x).copy_((dx * rstd[:, None]).view(x.shape))
    return dx, torch.empty_like(x).copy_(dv) if keep else x.new_empty(0), sums


def _backward_fake(dy, x, *rest):
    keep = rest[-2]
    sums = x.new_empty((2, x.shape[1]), dtype=_wide(x))
    return torch.empty_like(x), torch.empty_like(x) if keep else x.new_empty(0), sums


# --- the ops ------------------------------------------------------------------------------------------------

_infer = dispatch.register(f"group_norm_act_inference({_ARGUMENTS}) -> Tensor", _body, _fake)
_forward = dispatch.register(
    f"group_norm_act_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward_body, _forward_fake
)
_backward = dispatch.register(
    "group_norm_act_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? residual, int groups, str activation, float negative_slope, bool keep, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


class _GroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, groups, _, *options = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.adds, ctx.options = residual is not None, (groups, *options)
        kept = None if options[0] == "none" else residual
        ctx.save_for_backward(x, mean, rstd, weight, bias, kept)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        x, mean, rstd, weight, bias, residual = ctx.saved_tensors
        groups, activation, negative_slope, backend = ctx.options
        keep = ctx.adds and activation != "none"
        dx, dv, sums = _backward(
            dy, x, mean, rstd, weight, bias, residual, groups, activation, negative_slope, keep, backend
        )
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        return (
            dx if wants_x else None,
            sums[1].to(weight.dtype) if wants_weight else None,
            sums[0].to(bias.dtype) if wants_bias else None,
            (dv if keep else dy) if wants_residual else None,
            *[None] * 5,
        )


def _autograd(*arguments):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        return _GroupNormAct.apply(*arguments)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*arguments)


_differentiable = dispatch.register(
    f"group_norm_act({_ARGUMENTS}) -> Tensor", _body, _fake, autograd=_autograd
)


def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``act(group_norm(x, groups, weight, bias, eps) + residual)``; see the top of this file.

    Args:
        x: [N, C, ...], 2 to 5 dimensions, a floating dtype, any strides. C is a multiple of ``groups``.
        weight, bias: [C], of any floating dtype.
        residual: x's shape and dtype, any strides.
        activation: a name in ``fastnets.fused.activation.ACTIVATIONS``.

    Returns:
        A tensor like x, in x's memory format. Differentiable once, in all tensors. Computed in float32 at
        least and rounded once.

    Raises:
        ValueError, TypeError: for shapes and dtypes other than these.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        x, weight, bias, residual, groups, eps, activation, negative_slope,
        dispatch.validate_backend(backend),
    )  # fmt: skip


# --- what rewritten networks call ---------------------------------------------------------------------------

_INSTANCE_NORMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
GROUP_NORMS = {nn.GroupNorm, *_INSTANCE_NORMS}


def _stock_serves(norm: nn.Module, act: nn.Module | None, x: object, residual, backend: str) -> bool:
    """Whether the modules themselves are to run: see ``call_group_norm_act``."""
    if (
        type(norm) not in GROUP_NORMS
        or has_hooks(norm)
        or (act is not None and has_hooks(act))
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or not x.is_floating_point()
        or in_transform()
    ):
        return True
    if dispatch.leaves_to_stock(x, backend) or torch.is_autocast_enabled(dispatch.device_type_of(x)):
        return True
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return True
    if norm.weight is not None and norm.weight.dtype not in (x.dtype, torch.float32):
        return True
    if type(norm) is nn.GroupNorm:
        if not 2 <= x.dim() <= 5 or x.shape[1] != norm.num_channels:
            return True
        values = x.numel() // max(norm.num_groups, 1)
        return values <= 1
    if x.dim() != _INSTANCE_NORMS[type(norm)] or x.shape[1] != norm.num_features:
        return True
    if not (norm.training or norm.running_mean is None):
        return False
    # Statistics of the batch that also update running ones, or of a single value.
    return norm.running_mean is not None or math.prod(x.shape[2:]) <= 1


def call_group_norm_act(
    norm: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(x) + residual)``, norm a stock GroupNorm or InstanceNorm, by the fused op where that is
    stock's result, by the modules themselves elsewhere.

    Stock runs on the CPU (``backend="auto"``), under autocast, where a hook would be skipped, for shapes that
    stock refuses, for residuals that broadcast or promote, and for an InstanceNorm that updates running
    statistics. One that normalises with them is batch norm's op.
    """
    if _stock_serves(norm, act, x, residual, backend):
        return call_stock(norm, act, x, residual, activation, negative_slope)
    options = {"activation": activation, "negative_slope": negative_slope, "backend": backend}
    if type(norm) is nn.GroupNorm:
        return group_norm_act(x, norm.num_groups, norm.weight, norm.bias, residual, eps=norm.eps, **options)
    if norm.training or norm.running_mean is None:
        return group_norm_act(x, x.shape[1], norm.weight, norm.bias, residual, eps=norm.eps, **options)
    return bn_add_act(
        x, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, residual, eps=norm.eps,
        **options,
    )  # fmt: skip


# --- modules ------------------------------------------------------------------------------------------------


class _NormAct(nn.Module):
    """Base of the modules below: a stock ``norm``, a stock ``act`` and the fused forward."""

    _stock: tuple[type[nn.Module], ...]

    def __init__(self, norm: nn.Module, act: nn.Module | None, backend: str):
        super().__init__()
        self.norm = norm
        self.act = act
        self.backend = dispatch.validate_backend(backend)
        self.activation = fusible_activation(act)

    @classmethod
    def from_stock(cls, norm: nn.Module, act: nn.Module | None = None, *, backend: str = "auto"):
        """The fused module around existing stock modules, which it shares."""
        if type(norm) not in cls._stock:
            expected = " or ".join(f"nn.{stock.__name__}" for stock in cls._stock)
            raise TypeError(f"{cls.__name__}.from_stock: norm is {type(norm).__name__}, expected {expected}")
        self = cls.__new__(cls)
        _NormAct.__init__(self, norm, act, backend)
        return self.train(norm.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, ...], residual of x's shape or None -> a tensor like x."""
        return call_group_norm_act(self.norm, self.act, x, *self.activation, self.backend, residual)


class GroupNormAct(_NormAct):
    """Group norm, optional residual addition and activation: ``GroupNormAct(32, 64, act=nn.SiLU())(x)``.

    Takes ``nn.GroupNorm``'s arguments, and ``act``, a stock activation module or None. Parameters are those
    of the two stock modules, ``norm`` and ``act``.
    """

    _stock = (nn.GroupNorm,)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        act: nn.Module | None = None,
        backend: str = "auto",
    ):
        super().__init__(nn.GroupNorm(num_groups, num_channels, eps, affine, device, dtype), act, backend)


class InstanceNormAct(_NormAct):
    """Instance norm of images, optional residual addition and activation.

    Takes ``nn.InstanceNorm2d``'s arguments, and ``act``, a stock activation module or None. Parameters are
    those of the two stock modules, ``norm`` and ``act``. ``from_stock`` takes the 1-D and 3-D ones too.
    """

    _stock = tuple(_INSTANCE_NORMS)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device=None,
        dtype=None,
        *,
        act: nn.Module | None = None,
        backend: str = "auto",
    ):
        norm = nn.InstanceNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(norm, act, backend)
