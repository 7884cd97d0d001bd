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
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of

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
        y = y + _per_channel(bias.to(y.dtype), y)
        owned = True
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, eps)
        owned = True
    if residual is not None:
        y = y.add_(residual) if owned else y + residual
        owned = True
    entry = activation_of(activation)
    return (entry.in_place if owned and entry.in_place else entry.forward)(y, negative_slope)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def affine_gradients(
    grad: Tensor,
    y: Tensor,
    bias,
    mean,
    var,
    bn_weight,
    bn_bias,
    residual,
    eps,
    activation,
    negative_slope,
    wanted,
) -> tuple[Tensor | None, ...]:
    """Gradients of the epilogue for y, and for bias, bn_weight, bn_bias, residual where ``wanted`` says so.

    With x̂ = (y + bias − mean)·rstd and z = x̂·bn_weight + bn_bias + residual: dz = grad·act'(z), dy =
    dz·rstd·bn_weight, dbn_weight = Σ dz·x̂, dbn_bias = Σ dz, dbias = Σ dy. Computed in float32 at least.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    over_pixels = [0, *range(2, y.dim())]
    centred = y.to(wide)
    if bias is not None:
        centred = centred + _per_channel(bias.to(wide), y)
    z, scale = centred, None
    if mean is not None:
        rstd = torch.rsqrt(var.to(wide) + eps)
        centred = (centred - _per_channel(mean.to(wide), y)) * _per_channel(rstd, y)
        scale = rstd if bn_weight is None else rstd * bn_weight.to(wide)
        z = centred if bn_weight is None else centred * _per_channel(bn_weight.to(wide), y)
        if bn_bias is not None:
            z = z + _per_channel(bn_bias.to(wide), y)
    if residual is not None:
        z = z + residual
    grad_z = activation_of(activation).backward(grad.to(wide), z, negative_slope)
    grad_y = grad_z if scale is None else grad_z * _per_channel(scale, y)
    want_bias, want_bn_weight, want_bn_bias, want_residual = wanted
    return (
        grad_y.to(y.dtype),
        grad_y.sum(over_pixels).to(bias.dtype) if want_bias else None,
        (grad_z * centred).sum(over_pixels).to(bn_weight.dtype) if want_bn_weight else None,
        grad_z.sum(over_pixels).to(bn_bias.dtype) if want_bn_bias else None,
        grad_z.to(residual.dtype) if want_residual else None,
    )


# --- the op -------------------------------------------------------------------------------------------------


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: "triton" or "reference" (vendors have no such pass).

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = dispatch.requested(backend)
    ours = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if wanted == "triton" and not ours:
        raise dispatch.UnsupportedByBackend(
            f"backend 'triton' does not take {x.dtype} (supported: float32, float16, bfloat16); "
            "use backend='auto' or convert the model"
        )
    if wanted in ("triton", "reference"):
        return wanted
    return "triton" if ours and dispatch.device_type_of(x) == "cuda" else "reference"


def _body(x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, backend):
    _validate(x, bias, mean, var, bn_weight, bn_bias, residual, activation)
    if x.numel() and choose(x, backend) == "triton":
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
    y = epilogue(
        x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, owned=False
    )
    return x.clone() if y is x else y


def _validate(x, bias, mean, var, bn_weight, bn_bias, residual, activation) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"bn_add_act: x must be [N, C, ...] of 2 to 5 dimensions, got {x.dim()}")
    if not x.is_floating_point():
        raise TypeError(f"bn_add_act: x is {x.dtype}; convert it to a floating dtype first")
    if (mean is None) != (var is None):
        raise ValueError("bn_add_act: running_mean and running_var go together; give both or neither")
    if mean is None and (bn_weight is not None or bn_bias is not None):
        raise ValueError("bn_add_act: bn_weight or bn_bias without running_mean and running_var")
    names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    vectors = dict(zip(names, (bias, mean, var, bn_weight, bn_bias)))
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (x.shape[1],):
            raise ValueError(f"bn_add_act: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},)")
    for name, tensor in {**vectors, "residual": residual}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"bn_add_act: {name} is on {tensor.device}, x on {x.device}; move one of them")
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


def _backward_body(
    grad, x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, wanted
):
    grads = affine_gradients(
        grad, x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, wanted[1:]
    )
    return [g.contiguous() if g is not grad else g.clone() for g, want in zip(grads, wanted) if want]


def _backward_fake(
    grad, x, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, negative_slope, wanted
):
    inputs = (x, bias, bn_weight, bn_bias, residual)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, want in zip(inputs, wanted) if want]


_backward = dispatch.register(
    "bn_add_act_backward(Tensor grad, "
    + _SCHEMA[1:].replace("str backend) -> Tensor", "bool[5] wanted) -> Tensor[]"),
    _backward_body,
    _backward_fake,
)

_DIFFERENTIABLE = (0, 1, 4, 5, 6)  # x, bias, bn_weight, bn_bias, residual among the op's arguments


class _BNAddAct(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _differentiable(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.arguments = inputs[7:10]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        grads = iter(_backward(grad, *ctx.saved_tensors, *ctx.arguments, wanted))
        by_position = {i: next(grads) for i, want in zip(_DIFFERENTIABLE, wanted) if want}
        return tuple(by_position.get(i) for i in range(11))


def _autograd(*args):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:7]):
        return _BNAddAct.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*args)


_differentiable = dispatch.register("bn_add_act" + _SCHEMA, _body, _fake, autograd=_autograd)


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


def is_unobserved_inference(x: object) -> bool:
    """Whether ``x`` is on the CPU, with no gradients and no compiler, tracer, mode or global hook around."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not _has_any_global_hook()
        and not in_transform()
    )


def uses_running_statistics(bn: nn.Module) -> bool:
    """Whether this is a stock batch norm that would normalise with its running statistics now."""
    return type(bn) in BATCH_NORMS and not bn.training and bn.running_mean is not None and not has_hooks(bn)


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
) -> Tensor:
    """``act(bn(x) + residual)`` by the fused op where that is stock's result, by the modules themselves
    elsewhere.

    Stock runs where BN uses batch statistics (training), a hook would be skipped, the tensors are not plain
    ones, or the residual broadcasts or promotes.
    """
    if (
        not uses_running_statistics(bn)
        or (act is not None and has_hooks(act))
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or not 2 <= x.dim() <= 5
        or (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype))
        or in_transform()
    ):
        return call_stock(bn, act, x, residual, activation, negative_slope)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        x,
        None,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        residual,
        bn.eps,
        activation,
        negative_slope,
        backend,
    )
