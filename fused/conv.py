"""Convolution, batch norm with running statistics, residual addition and activation as one op.

    y = act( (conv2d(x, weight) + bias − mean) / sqrt(var + eps) · bn_weight + bn_bias + residual )

x [N, C, H, W], weight [K, C/groups, R, S], the other vectors [K], residual and y [N, K, P, Q]. Every part
but the convolution may be left out. The result is always dense channels-last, as the next convolution wants
it.

Top to bottom: the implementations, the choice between them, the op, its gradient, and the call that modules
and rewritten networks make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import cudnn, dispatch, onednn, packing
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import (
    BATCH_NORMS,
    bn_add_act_inference,
    call_stock,
    epilogue,
    has_hooks,
    in_transform,
    is_inference,
    watched,
)
from fastnets.fused.batch_norm_training import Normalization, Pending, sums_of, uses_batch_statistics
from fastnets.fused.batch_norm_training import input_gradient as normalization_gradient
from fastnets.fused.conv_training import (
    explicit_padding,
    gradient_backend,
    input_gradient,
    output_shape,
    passes_on,
    train,
    weight_gradient,
)
from fastnets.fused.conv_training import implementation as training_implementation
from fastnets.fused.ownership import may_overwrite

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, float eps, str activation, float negative_slope, str backend) -> Tensor"
)


class Options(NamedTuple):
    """What the op takes besides tensors, in the schema's order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    eps: float
    activation: str
    negative_slope: float


class Weights(NamedTuple):
    """The tensors that belong to the layer, in the schema's order; all but the first may be None."""

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


# --- the implementations ------------------------------------------------------------------------------------


def _reference(x: Tensor, weights: Weights, residual: Tensor | None, options: Options) -> Tensor:
    """The stock composition: the definition of the op."""
    weight, bias, *bn = weights
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, *options[:4])
    return onednn.channels_last(epilogue(y, None, *bn, residual, *options[4:]))


def in_dtype_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Filter and bias; a conversion that would change nothing costs a microsecond, and is not asked for."""
    dtype = x.dtype
    return (
        weight if weight.dtype == dtype else weight.to(dtype),
        bias if bias is None or bias.dtype == dtype else bias.to(dtype),
    )


def _triton(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual,
    stride, padding, dilation, groups, eps, activation, negative_slope,
) -> Tensor:  # fmt: skip
    from fastnets.kernels.conv import conv_bn_act as launch

    return launch(
        x,
        *in_dtype_of(x, weight, bias),
        mean,
        var,
        bn_weight,
        bn_bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
    )


def _convolution_then_epilogue(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual,
    stride, padding, dilation, groups, eps, activation, negative_slope,
) -> Tensor:  # fmt: skip
    """The vendor's convolution, then scale, shift, residual and activation in one pass of ours."""
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    geometry = (stride, padding, dilation, groups)
    if mean is None and residual is None and activation == "none":
        return F.conv2d(x, weight, bias, *geometry)
    y = F.conv2d(x, weight, None, *geometry)
    vectors = (bias, mean, var, bn_weight, bn_bias)
    return bn_add_act_inference(y, *vectors, residual, eps, activation, negative_slope, "triton")


def _prepare(
    prepare: Callable, x: Tensor, weights: Weights, residual: Tensor | None, options: Options, keep: bool
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """``run(x, residual)`` of a vendor's fused call, with all that depends on the weights alone done.

    None where the vendor's call would be wrong: x's dtype cannot hold the folded weights, or they are not
    finite, or another layer's are not and this one's ReLU would turn the NaN it may be given into zeros
    (vendors compute ``max(x, 0)``).
    """
    folded = onednn.fold(*weights, options.eps, x.dtype)
    if folded is None:
        return None
    if not x.is_meta and not all(bool(t.isfinite().all()) for t in folded if t is not None):
        packing.mark_non_finite(weights.weight)
        return None
    if packing.any_non_finite() and options.activation in ("relu", "relu6"):
        return None
    return prepare(x, folded, *options[:4], *options[5:], residual is not None, keep)


# --- the choice ---------------------------------------------------------------------------------------------


def choose(x: Tensor, weight: Tensor, groups: int, activation: str, backend: str, wanted: str = "") -> str:
    """The implementation that serves a call: "triton", "onednn", "cudnn", "cudnn+epilogue" or "reference".

    wanted: the backend that ``dispatch.preferred`` gave for ``backend``, where the caller has asked.

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = wanted or dispatch.requested(backend)
    if wanted == "reference":
        return wanted
    ours = dispatch.ours_take((x.dtype,), wanted)
    if wanted == "triton":
        return wanted
    device = dispatch.device_type_of(x)
    if device == "cpu":
        why_not = onednn.unsupported(x.dtype)
        if why_not is None and not (wanted == "auto" and backend == dispatch.UNFOLDED):
            return "onednn"
    elif device == "cuda":
        why_not = None if ours else f"it does not take {x.dtype}"
        if why_not is None and wanted == "library":
            return "cudnn" if cudnn.fuses(x.dtype, activation) else "cudnn+epilogue"
        if why_not is None:
            # Unmeasured: ours where vendors are weak, else the vendor's dense k×k with our epilogue.
            weak = groups > 1 or weight.shape[2:] == (1, 1) or weight.shape[1] <= 4
            return "triton" if weak else "cudnn+epilogue"
    else:
        why_not = f"there is no fused vendor call for device type {device!r}"
    if wanted == "library":
        raise dispatch.UnsupportedByBackend(
            f"backend 'library' cannot serve this convolution: {why_not}; use backend='auto' or 'reference'"
        )
    return "reference"


def preferred(x, weight, stride, dilation, groups, activation, adds, backend) -> str:
    """What was asked for, or measured to be the fastest for such a call."""
    return dispatch.preferred(
        "conv_bn_act", backend, x, weight.shape, stride, dilation, groups, activation, adds
    )


# --- the op -------------------------------------------------------------------------------------------------


def _body(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual,
    stride, padding, dilation, groups, eps, activation, negative_slope, backend, in_place=False,
    remember=False,
):  # fmt: skip
    """in_place: the residual may be overwritten. remember: this is what ``call_conv_bn_act`` may repeat."""
    options = Options(tuple(stride), tuple(padding), tuple(dilation), groups, eps, activation, negative_slope)
    vectors = (bias, mean, var, bn_weight, bn_bias)
    wanted = preferred(x, weight, stride, dilation, groups, activation, residual is not None, backend)
    if packing.keeps(weight):
        key = _folding_key(x, weight.shape, residual, options, backend, wanted)
        prepared = packing.lookup(weight, key, vectors)
        if prepared is not None and prepared.run is not None:
            return prepared.run(x, residual, in_place)
        if prepared is not None:
            return _reference(x, Weights(weight, *vectors), residual, options)

    tensors = (x, weight, *vectors, residual)
    kind = dispatch.kind_of(tensors, (*options, backend, wanted, _assumed_device(x)))
    call = _calls.get(kind)
    if call is not None:
        if remember:
            _memory.keep((id(weight), x.shape), call, tensors, (*options, backend))
        return call(tensors)
    weights = Weights(weight, *vectors)
    shape = validate_convolution(x, weights, residual, options)
    implementation = choose(x, weight, groups, activation, backend, wanted)
    if implementation == "reference" or x.numel() == 0:
        return _reference(x, weights, residual, options)
    if implementation in _CALLS:
        if len(_calls) >= dispatch.KINDS:
            _calls.clear()
        call = _calls[kind] = dispatch.replayed(_CALLS[implementation], options)
        return call(tensors)
    keep = packing.may_keep(weights)
    run = None
    if keep or _folding_pays(shape, weight):
        prepare = onednn.prepare_convolution if implementation == "onednn" else cudnn.prepare_convolution
        run = _prepare(prepare, x, weights, residual, options, keep)
    if keep:
        key = _folding_key(x, weight.shape, residual, options, backend, wanted)
        packing.keep(weight, packing.Prepared(key, run, weight, vectors))
    return run(x, residual) if run is not None else _reference(x, weights, residual, options)


def _folding_key(x, filter_shape, residual, options: Options, backend: str, wanted: str) -> tuple:
    """What folded and packed weights depend on besides the weights. All batches share them, except one image
    (PyTorch may prefer other algorithms), none, and those of few pixels."""
    batch = (min(len(x), 2), onednn.over_few_pixels(x, filter_shape)) if x.dim() == 4 else 0
    added = residual is not None and (residual.shape[1:], residual.dtype, len(residual) == len(x))
    return (
        batch, x.shape[1:], x.dtype, x.device, added, options, backend, wanted,
        torch._C._get_mkldnn_enabled(), _assumed_device(x),
    )  # fmt: skip


def _assumed_device(x: Tensor) -> str | None:
    return dispatch.device_type_of(x) if x.is_meta else None


# By implementation: what is repeated for all tensors of one kind.
_CALLS = {"triton": _triton, "cudnn+epilogue": _convolution_then_epilogue}
_calls: dict[tuple, Callable[[tuple], Tensor]] = {}
_memory = dispatch.Memory()


def _folding_pays(shape: tuple, weight: Tensor) -> bool:
    """Whether folding anew for one call costs less than the passes over the output that it saves."""
    N, K, P, Q = shape
    return N * K * P * Q > max(2 * weight.numel(), 1 << 17)


def validate_convolution(x: Tensor, weights: Weights, residual: Tensor | None, options: Options) -> tuple:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    weight = weights.weight
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"conv_bn_act: x must be [N, C, H, W] and weight [K, C/groups, R, S], got {x.dim()}-D and "
            f"{weight.dim()}-D; add the batch dimension with x.unsqueeze(0)"
        )
    if not x.is_floating_point() or weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"conv_bn_act: x is {x.dtype}, weight {weight.dtype}; convert to one floating dtype")
    stride, padding, dilation, groups = options[:4]
    (_, C, H, W), (K, channels_per_group, R, S) = x.shape, weight.shape
    if groups < 1 or C != channels_per_group * groups or K % groups:
        raise ValueError(
            f"conv_bn_act: x has {C} channels, but weight {tuple(weight.shape)} with groups={groups} takes "
            f"{channels_per_group * groups} in and gives a multiple of {groups} out"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"conv_bn_act: stride {list(stride)} and dilation {list(dilation)} must be at least 1, "
            f"padding {list(padding)} at least 0"
        )
    if (weights.running_mean is None) != (weights.running_var is None):
        raise ValueError("conv_bn_act: running_mean and running_var go together; give both or neither")
    if weights.running_mean is None and (weights.bn_weight is not None or weights.bn_bias is not None):
        raise ValueError("conv_bn_act: bn_weight or bn_bias without running_mean and running_var")
    for name, tensor in [*zip(Weights._fields, weights), ("residual", residual)]:
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"conv_bn_act: {name} is on {tensor.device}, x on {x.device}; move one of them")
        if tensor is not weight and tensor is not residual and tensor.shape != (K,):
            raise ValueError(f"conv_bn_act: {name} has shape {tuple(tensor.shape)}, expected ({K},)")
    shape = _, _, P, Q = output_shape(x, weight, stride, padding, dilation)
    if P < 1 or Q < 1:
        raise ValueError(
            f"conv_bn_act: input {H}×{W} with padding {list(padding)} is smaller than the filter {R}×{S} "
            f"with dilation {list(dilation)}"
        )
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"conv_bn_act: residual is {tuple(residual.shape)} {residual.dtype}, the convolution gives "
            f"{shape} {x.dtype}; expand or convert it first"
        )
    activation_of(options.activation)
    return shape


def _fake(x, *arguments):
    shape = validate_convolution(x, Weights(*arguments[:6]), arguments[6], Options(*arguments[7:14]))
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def conv_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Of a convolution with the result ``out_shape``, whatever follows it."""
    return torch.utils.flop_counter.conv_flop_count(x_shape, weight_shape, out_shape)


# --- its gradient -------------------------------------------------------------------------------------------

_DIFFERENTIABLE = (0, 1, 2, 5, 6, 7)  # x, weight, bias, bn_weight, bn_bias, residual among the op's arguments


def _tells_gradient(mean: Tensor | None, activation: str) -> bool:
    """Whether the result alone says what the activation does to a gradient; else the convolution is computed
    again in the backward."""
    return mean is None and activation_of(activation).from_output is not None


def _before_activation(grad, y, x, weight, bias, mean, var, bn_weight, bn_bias, residual, options, backend):
    """(the convolution's gradient, the residual's, bn_weight's, bn_bias's), from the op's."""
    act = activation_of(options.activation)
    if y is not None:
        grad = act.from_output(grad, y, options.negative_slope)
        return grad, grad, None, None
    z = F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *options[:4])
    if mean is None:
        grad = act.backward(grad, z if residual is None else z + residual, options.negative_slope)
        return grad, grad, None, None
    norm = Normalization.by_running_statistics(mean, var, bn_weight, bn_bias, options.eps)
    vectors, passes = (norm.mean, norm.rstd, bn_weight, bn_bias), passes_on(backend)
    named = (options.activation, options.negative_slope)
    dv, (dbn_bias, dbn_weight) = sums_of(grad, z, *vectors, residual, None, *named, True, passes)
    dz, _ = normalization_gradient(dv, z, *vectors, None, None, "none", 0.0, None, passes)
    return dz, dv, dbn_weight, dbn_bias


class _ConvBNAct(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd(), packing.transient():
            return _differentiable(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, mean, var, bn_weight, bn_bias, residual, *rest, backend = inputs
        ctx.options = options = Options(*rest)
        tells = _tells_gradient(mean, options.activation)
        ctx.save_for_backward(
            output if tells else None, x, weight, bias, mean, var, bn_weight, bn_bias,
            None if tells else residual,
        )  # fmt: skip
        ctx.backend = backend

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, grad):
        y, x, weight, bias, *rest = ctx.saved_tensors
        options = ctx.options
        backend = gradient_backend(x, weight, options.groups, ctx.backend)
        dz, dresidual, dbn_weight, dbn_bias = _before_activation(
            grad, y, x, weight, bias, *rest, options, backend
        )
        wants = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        none = (None,) * 4
        dx = dweight = None
        if wants[0]:
            dx, _ = input_gradient(
                dz, weight, x.shape, *options[:4], None, None, None, *none, "none", 0.0, backend
            )
        if wants[1]:
            dweight = weight_gradient(
                dz, x, weight.shape, weight.dtype, *options[:4], *none, "none", 0.0, backend
            )
        dbias = dz.sum((0, 2, 3)).to(bias.dtype) if wants[2] else None
        found = (dx, dweight, dbias, dbn_weight, dbn_bias, dresidual)
        inputs = dict(zip(_DIFFERENTIABLE, (*ctx.saved_tensors[1:4], *ctx.saved_tensors[6:8], None)))
        by_position = {
            i: g if inputs[i] is None else g.to(inputs[i].dtype)
            for i, g, want in zip(_DIFFERENTIABLE, found, wants) if want
        }  # fmt: skip
        return tuple(by_position.get(i) for i in range(16))


def _autograd(*args):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:8]):
        packing.forget(args[1])
        return _ConvBNAct.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*args)


def _autocast(x, *arguments):
    """Casts what autocast would, but not the weights: they are folded from their full precision."""
    weights, residual, options = arguments[:6], arguments[6], arguments[7:]
    with torch._C._ExcludeDispatchKeyGuard(dispatch.AUTOCAST_KEYS):
        if x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            residual = None if residual is None else residual.to(dtype)
        op = _differentiable if torch.is_grad_enabled() else _infer
        return op(x, *weights, residual, *options)


_infer = dispatch.register(
    "conv_bn_act_inference" + _SCHEMA, _body, _fake, autocast=_autocast, flops=conv_flops
)
_differentiable = dispatch.register(
    "conv_bn_act" + _SCHEMA, _body, _fake, autograd=_autograd, autocast=_autocast, flops=conv_flops
)

conv_bn_act_op = _differentiable


def conv_below_autograd(x: Tensor, *arguments: object) -> Tensor:
    """The op below autograd; its computation alone where nobody watches."""
    return (_infer if watched(x) else _body)(x, *arguments)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``act(bn(conv2d(x, weight, bias)) + residual)`` with BN's running statistics; see the top of this file.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, any strides.
        weight: [K, C/groups, R, S], of x's dtype.
        residual: [N, K, P, Q], of x's dtype, any strides.
        activation: a name in ``fastnets.fused.activation.ACTIVATIONS``.

    Returns:
        [N, K, P, Q] of x's dtype, dense channels-last. Differentiable once, in everything but the statistics.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual),
        *(stride, padding, dilation, groups, eps, activation, negative_slope),
        dispatch.validate_backend(backend),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------

_PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def call_conv_bn_act(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
    residual_dies: str = "",
    **training: object,
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` by the fused op where that is stock's result, by the modules
    themselves elsewhere.

    Stock runs where a hook would be skipped, the convolution's class or forward is not the stock one
    (parametrized, patched), the tensors are not plain ones, or the residual broadcasts or promotes. ``act``
    is the module that stock would call; None means a function or nothing. ``residual_dies``: set where this
    call is the residual's last reader (see ``fused.ownership``). ``training``: set in graphs of training
    forwards, see ``conv_training.train``, which serves layers in training mode.
    """
    if training or conv.training or (bn is not None and bn.training) or x.__class__ is Pending:
        return _call_in_training(conv, bn, act, x, residual, activation, negative_slope, backend, **training)
    if _memory and x.__class__ is Tensor and is_inference():
        weights = weights_of(conv, bn)
        remembered = _memory.get((id(weights[0]), x.shape))
        if remembered is not None:
            eps = 0.0 if bn is None else bn.eps
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            tensors = (x, *weights, residual)
            if (
                remembered.serves(tensors, (*geometry, eps, activation, negative_slope, backend))
                and conv.__class__ is nn.Conv2d
                and conv.padding_mode == "zeros"
                and not has_hooks(conv)
                and (bn is None or (bn.__class__ in BATCH_NORMS and not has_hooks(bn)))
                and (act is None or not has_hooks(act))
            ):
                return remembered.call(tensors)
    return _call(conv, bn, act, x, residual, activation, negative_slope, backend, residual_dies)


def _call_in_training(
    conv, bn, act, x, residual, activation, negative_slope, backend, forks=False, **options
):
    """By ``conv_training.train`` where the layer learns and is plain; else as any other."""
    weight = conv._parameters.get("weight")
    seen = x.z if x.__class__ is Pending else x
    learns = bn is not None and (uses_batch_statistics(bn) or torch.is_grad_enabled())
    if (learns or x.__class__ is Pending) and not must_run_stock(conv, bn, act, seen, weight, residual):
        return train(conv, bn, act, x, residual, activation, negative_slope, backend, forks=forks, **options)
    if x.__class__ is Pending:
        x = x.compute()
    if learns or (torch.is_grad_enabled() and _learns_as_stock(x, activation, backend)):
        packing.forget(weight)
        y = call_stock(bn, act, conv(x), residual, activation, negative_slope)
    else:
        y = _call(conv, bn, act, x, residual, activation, negative_slope, backend, "")
    return (y, x) if forks else y


def _learns_as_stock(x: Tensor, activation: str, backend: str) -> bool:
    """Whether a convolution without batch norm trains faster by its own modules: oneDNN's fused call would
    fold anew each time, and an activation whose result does not tell its gradient costs a convolution."""
    if dispatch.requested(backend) != "auto":
        return False
    return dispatch.device_type_of(x) != "cuda" or not _tells_gradient(None, activation)


def _call(conv, bn, act, x, residual, activation, negative_slope, backend, residual_dies):
    weight, bias, *bn_vectors = weights = weights_of(conv, bn)
    if bn is not None and bn_vectors[0] is None:  # batch statistics in evaluation, too
        return _call_in_training(conv, bn, act, x, residual, activation, negative_slope, backend)
    grad = torch.is_grad_enabled()
    alone = bn is None and residual is None and activation == "none"
    if (grad and (alone or _too_small_to_fold(x, weight, backend))) or must_run_stock(
        conv, bn, act, x, weight, residual
    ):
        if grad and weight is not None:
            packing.forget(weight)  # a training step may follow
        return call_stock(bn, act, conv(x), residual, activation, negative_slope)
    padding = conv.padding
    if conv.padding_mode != "zeros" or padding.__class__ is str:
        x, padding = explicit_padding(conv, x)
    eps = 0.0 if bn is None else bn.eps
    options = (conv.stride, padding, conv.dilation, conv.groups, eps, activation, negative_slope, backend)
    if grad:
        return _differentiable(x, weight, bias, *bn_vectors, residual, *options)
    if watched(x):
        return _infer(x, weight, bias, *bn_vectors, residual, *options)
    in_place = residual_dies != "" and may_overwrite(residual, residual_dies)
    # What the dispatcher would call, 8 µs earlier.
    return _body(x, *weights, residual, *options, in_place, True)


def weights_of(conv: nn.Conv2d, bn: nn.Module | None) -> tuple:
    """The layer's tensors in the order of ``Weights``, read past nn.Module's slow attribute look-up."""
    parameters = conv._parameters
    if bn is None:
        return parameters.get("weight"), parameters.get("bias"), None, None, None, None
    buffers, affine = bn._buffers, bn._parameters
    return (
        parameters.get("weight"),
        parameters.get("bias"),
        buffers.get("running_mean"),
        buffers.get("running_var"),
        affine.get("weight"),
        affine.get("bias"),
    )


def must_run_stock(conv, bn, act, x, weight, residual) -> bool:
    return (
        conv.__class__ is not nn.Conv2d
        or weight.__class__ not in _PLAIN_WEIGHTS
        or (bn is not None and (bn.__class__ not in BATCH_NORMS or has_hooks(bn)))
        or has_hooks(conv)
        or (act is not None and has_hooks(act))
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or x.dim() != 4
        or not _dtypes_agree(weight, x, residual)
        or (residual is not None and not _adds_plainly(conv, x, residual))
        or in_transform()
    )


def _too_small_to_fold(x: object, weight: Tensor | None, backend: str) -> bool:
    """With gradients enabled nothing is kept, and on the CPU a fused call that must fold first can lose to
    stock."""
    if torch.compiler.is_compiling():  # the compiled graph keeps the op, which chooses when it runs
        return False
    if x.__class__ is not Tensor or x.dim() != 4 or weight is None or x.device.type != "cpu":
        return False
    if dispatch.requested(backend) != "auto":
        return False
    N, _, H, W = x.shape
    return not _folding_pays((N, weight.shape[0], H, W), weight)


def _dtypes_agree(weight: Tensor, x: Tensor, residual: Tensor | None) -> bool:
    """Whether stock would compute in one dtype, which autocast may choose."""
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (dtype, weight.dtype):
            return False
        return residual is None or residual.dtype == torch.get_autocast_dtype(x.device.type)
    return dtype == weight.dtype and (residual is None or residual.dtype == dtype)


def _adds_plainly(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> bool:
    """Whether the residual has the shape of the convolution's result, so that nothing broadcasts."""
    N, _, H, W = x.shape
    size = residual.shape
    if len(size) != 4 or size[0] != N or size[1] != conv.out_channels:
        return False
    padding = conv.padding
    if padding == "same":
        return size[2] == H and size[3] == W
    down, across = (0, 0) if padding == "valid" else padding
    (R, S), (by_row, by_column), stride = conv.kernel_size, conv.dilation, conv.stride
    P = (H + 2 * down - by_row * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * across - by_column * (S - 1) - 1) // stride[1] + 1
    return size[2] == P and size[3] == Q


def implementation_of(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    activation: str,
    x: Tensor,
    backend: str = "auto",
    adds: bool = False,
) -> str:
    """The implementation that ``call_conv_bn_act`` would run for an input like ``x``; "stock" if none.

    adds: whether a residual is added.
    """
    weight = conv._parameters.get("weight")
    if bn is not None and uses_batch_statistics(bn):
        plain = not must_run_stock(conv, bn, act, x, weight, None)
        return training_implementation(x, weight, conv.groups, backend) if plain else "stock"
    if (torch.is_grad_enabled() and _too_small_to_fold(x, weight, backend)) or must_run_stock(
        conv, bn, act, x, weight, None
    ):
        return "stock"
    wanted = preferred(x, weight, conv.stride, conv.dilation, conv.groups, activation, adds, backend)
    return choose(x, weight, conv.groups, activation, backend, wanted)
