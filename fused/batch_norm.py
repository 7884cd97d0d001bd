"""Batch norm with running statistics, residual addition and activation in one pass.

    y = act( (x + bias − running_mean) / sqrt(running_var + eps) · bn_weight + bn_bias + residual )

x [N, C, ...] of 2 to 5 dimensions, the vectors [C], residual of x's shape. Alone it serves what no
convolution comes before; after a vendor's convolution it is the epilogue (``bias`` is then the
convolution's).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch, packing
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm_training import (
    Normalization,
    Pending,
    add_act,
    normalization,
    per_channel,
    uses_batch_statistics,
)
from fastnets.fused.synchronize import group_of
from fastnets.kernels.recording import is_seen_by_modes

_SCHEMA = (
    "(Tensor x, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, float eps, str activation, float negative_slope, str backend) -> Tensor"
)

# --- the implementations ------------------------------------------------------------------------------------


def epilogue(
    y: Tensor,
    bias,
    mean,
    var,
    bn_weight,
    bn_bias,
    residual,
    eps: float,
    activation: str,
    negative_slope: float,
    owned: bool = True,
) -> Tensor:
    """The stock composition. ``owned``: nobody else sees ``y``, so it may be written in place."""
    if bias is not None:
        y = y + per_channel(bias.to(y.dtype), y)
        owned = True
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, eps)
        owned = True
    if residual is not None:
        y = y.add_(residual) if owned else y + residual
        owned = True
    entry = activation_of(activation)
    return (entry.in_place if owned and entry.in_place else entry.forward)(y, negative_slope)


# --- the op -------------------------------------------------------------------------------------------------


def choose(x: Tensor, backend: str, op: str = "", *details: object) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend, op=op, details=details)


@dispatch.replays(tensors=7)
def _body(x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, backend):
    _validate(x, bias, mean, var, bn_weight, bn_bias, residual, activation)
    if x.numel() and choose(x, backend, "bn_add_act", activation, residual is not None) == "triton":
        from fastnets.kernels.batch_norm import bn_add_act as launch

        return launch(
            x,
            bias,
            mean,
            var,
            bn_weight,
            bn_bias,
            residual,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
        )
    if (folded := _scale_and_shift(x, bias, mean, var, bn_weight, bn_bias, eps)) is not None:
        y = torch.addcmul(folded[1], x, folded[0])
        return epilogue(y, None, None, None, None, None, residual, eps, activation, negative_slope)
    y = epilogue(
        x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, owned=False
    )
    return x.clone() if y is x else y


def _scale_and_shift(x, bias, mean, var, bn_weight, bn_bias, eps) -> tuple[Tensor, Tensor] | None:
    """[C, 1, 1] each, where y = x · scale + shift is the batch norm, as PyTorch's own computes it; None where
    that is not the sooner way.

    Measured (fp32, two cores, DenseNet's sizes): on channels-last x, which may be the first channels of a
    wider map, it takes 0.4 to 0.8 of the time of ``F.batch_norm``.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or x.stride(1) != 1 or var is None:
        return None
    vectors = (bias, mean, bn_weight, bn_bias)
    prepared = packing.lookup(var, ("batch_norm", eps), vectors)
    if prepared is None:
        if torch.is_grad_enabled() or var.dtype != x.dtype or not packing.may_keep((var, *vectors)):
            return None
        scale = (var + eps).rsqrt_()
        if bn_weight is not None:
            scale *= bn_weight
        shift = -mean * scale if bias is None else (bias - mean) * scale
        if bn_bias is not None:
            shift += bn_bias
        folded = scale.detach()[:, None, None], shift.detach()[:, None, None]
        prepared = packing.Prepared(("batch_norm", eps), lambda: folded, var, vectors)
        packing.keep(var, prepared)
    return prepared.run()


_VECTORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")


def _validate(x, bias, mean, var, bn_weight, bn_bias, residual, activation) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"bn_add_act: x must be [N, C, ...] of 2 to 5 dimensions, got {x.dim()}")
    if not x.is_floating_point():
        raise TypeError(f"bn_add_act: x is {x.dtype}; convert it to a floating dtype first")
    if (mean is None) != (var is None):
        raise ValueError("bn_add_act: running_mean and running_var go together; give both or neither")
    if mean is None and (bn_weight is not None or bn_bias is not None):
        raise ValueError("bn_add_act: bn_weight or bn_bias without running_mean and running_var")
    channels, device = x.shape[1:2], x.device
    for name, vector in zip(_VECTORS, (bias, mean, var, bn_weight, bn_bias)):
        if vector is None:
            continue
        if vector.shape != channels:
            raise ValueError(f"bn_add_act: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},)")
        if vector.device != device:
            raise ValueError(f"bn_add_act: {name} is on {vector.device}, x on {device}; move one of them")
    if residual is not None and residual.device != device:
        raise ValueError(f"bn_add_act: residual is on {residual.device}, x on {device}; move one of them")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"bn_add_act: residual is {tuple(residual.shape)} {residual.dtype}, "
            f"x {tuple(x.shape)} {x.dtype}; expand or convert it first"
        )
    activation_of(activation)


def _fake(x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, backend):
    _validate(x, bias, mean, var, bn_weight, bn_bias, residual, activation)
    return torch.empty_like(x)


_infer = dispatch.register("bn_add_act_inference" + _SCHEMA, _body, _fake)


def bn_add_act_inference(x: Tensor, *arguments: object) -> Tensor:
    """The op below autograd; its computation alone where nobody watches, 15 µs earlier."""
    if x.__class__ is Tensor and torch._C._len_torch_dispatch_stack() == 0 and not dispatch.IN_RANGES:
        return _body(x, *arguments)
    return _infer(x, *arguments)


def _autograd(x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, backend):
    """Composed of ops that have gradients."""
    tensors = (x, bias, mean, var, bn_weight, bn_bias, residual)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return _differentiable(*tensors, eps, activation, negative_slope, backend)
    _validate(*tensors, activation)
    if bias is not None:
        x = x + per_channel(bias.to(x.dtype), x)
    if mean is None:
        return activation_of(activation).forward(x if residual is None else x + residual, negative_slope)
    norm = Normalization.by_running_statistics(mean, var, bn_weight, bn_bias, eps)
    return add_act(x, norm, residual, activation, negative_slope, choose(x, backend))


_differentiable = bn_add_act_op = dispatch.register("bn_add_act" + _SCHEMA, _body, _fake, autograd=_autograd)


def bn_add_act(
    x: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``act(bn(x + bias) + residual)`` with BN's running statistics; see the top of this file.

    Args:
        x: [N, C, ...], 2 to 5 dimensions, a floating dtype, any strides.
        residual: x's shape and dtype, any strides.
        activation: a name in ``fastnets.fused.activation.ACTIVATIONS``.

    Returns:
        A tensor like x, in x's memory format. Differentiable once, in everything but the statistics.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        x,
        bias,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        residual,
        eps,
        activation,
        negative_slope,
        dispatch.validate_backend(backend),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------

BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run anything besides its own class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def in_transform() -> bool:
    """Whether functorch or forward-mode AD is active: their rules are known for stock operations only."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_inference() -> bool:
    """Whether nothing asks for gradients, compiles, or wants to see each module's call.

    What ``dispatch.Remembered`` then compares tells modes, tracers and functorch."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _has_any_global_hook()
        or torch.autograd.forward_ad._current_level >= 0
    )


def watched(x: Tensor) -> bool:
    """Whether anything wants to see the op itself: a compiler, a tracer, autocast or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or is_seen_by_modes()
        or x.__class__ is not Tensor
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._get_tracing_state() is not None
        or dispatch.IN_RANGES
    )


def is_unobserved_inference(x: object) -> bool:
    """Whether ``x`` is on the CPU, with no gradients and no compiler, tracer, mode or global hook around."""
    return is_unobserved(x) and x.device.type == "cpu"


def is_unobserved(x: object) -> bool:
    """Whether ``x`` is a plain tensor, with no gradients, compiler, tracer, mode or global hook around."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not is_seen_by_modes()
        and torch._C._get_tracing_state() is None
        and not _has_any_global_hook()
        and not in_transform()
    )


def call_stock(
    bn: nn.Module | None,
    act: nn.Module | None,
    y: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The stock composition by the stock modules themselves, hooks included.

    ``act`` None means that the network called a function. In place only where stock could have been without
    anybody seeing it: ``y`` then comes fresh from ``bn``.
    """
    fresh = bn is not None and not has_hooks(bn)
    if bn is not None:
        y = bn(y)
    if residual is not None:
        if fresh and residual.shape == y.shape and residual.dtype == y.dtype:
            y += residual
        else:
            y = y + residual
    if act is not None:
        return act(y)
    return activation_of(activation).forward(y, negative_slope)


def call_bn_add_act(
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
    *,
    defers: bool = False,
) -> Tensor | Pending:
    """``act(bn(x) + residual)`` by the fused op where that is stock's result, by the modules themselves
    elsewhere.

    Stock runs where a hook would be skipped, the tensors are not plain ones, the residual broadcasts or
    promotes, and with gradients on the CPU. defers: the one reader is a convolution that takes a
    :class:`Pending`.
    """
    if (
        bn.__class__ not in BATCH_NORMS
        or has_hooks(bn)
        or (act is not None and has_hooks(act))
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or not 2 <= x.dim() <= 5
        or (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype))
        or in_transform()
    ):
        return call_stock(bn, act, x, residual, activation, negative_slope)
    if uses_batch_statistics(bn) or torch.is_grad_enabled():
        passes = choose(x, backend)
        if passes == "reference" and dispatch.requested(backend) != passes and not group_of(bn):
            return call_stock(bn, act, x, residual, activation, negative_slope)
        norm = normalization(bn, x, passes)
        if defers and residual is None:
            return Pending(x, norm, activation, negative_slope, passes)
        return add_act(x, norm, residual, activation, negative_slope, passes)
    vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return _infer(x, None, *vectors, residual, bn.eps, activation, negative_slope, backend)
