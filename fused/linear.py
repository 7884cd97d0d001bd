"""Linear layer, activation, layer scale and residual addition as one op.

    y = residual + layer_scale · act(x @ weightᵀ + bias)

x [..., K], weight [N, K], bias and layer_scale [N], residual and y [..., N]; every part but the product may
be left out. y has the dtype that stock's composition has: x's, or the wider one of a residual or layer scale
(autocast leaves those in float32).

Top to bottom: the implementations, the choice between them, the op, its gradient, and the calls that modules
and rewritten networks make.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch, onednn, packing
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.activation import recognise
from fastnets.fused.batch_norm import has_hooks, in_transform, is_inference, watched
from fastnets.fused.linear_backward import gradient_backend, gradient_of_product, matrix_product

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? residual, str activation, "
    "float negative_slope, str backend"
)

# --- the implementations ------------------------------------------------------------------------------------


def _finish(z, layer_scale, residual, activation, negative_slope, owned=True) -> Tensor:
    """The stock composition after the product. owned: nobody else sees z, so it may be written in place."""
    entry = activation_of(activation)
    y = (entry.in_place if owned and entry.in_place else entry.forward)(z, negative_slope)
    if layer_scale is not None:
        y = y * layer_scale
    if residual is None:
        return y
    fresh = (owned or y is not z) and y.dtype == torch.promote_types(y.dtype, residual.dtype)
    return y.add_(residual) if fresh else y + residual


def _product(x, weight, bias) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _composition(x, weight, bias, layer_scale, residual, activation, negative_slope) -> Tensor:
    """The definition of the op, in differentiable operations."""
    z = _product(x, weight, bias)
    return _finish(z, layer_scale, residual, activation, negative_slope, not torch.is_grad_enabled())


def _triton(x, weight, bias, layer_scale, residual, activation, negative_slope, keep=False):
    from fastnets.kernels.linear import linear_act as launch

    return launch(
        x,
        weight.to(x.dtype),
        bias,
        layer_scale,
        residual,
        activation=activation,
        negative_slope=negative_slope,
        keep_pre_activation=keep,
        dtype=result_dtype(x, layer_scale, residual),
    )


def _vendor(x, weight, bias, layer_scale, residual, activation, negative_slope) -> Tensor:
    """The vendor's product on CUDA with what its epilogue can do, and the rest in one pass of ours."""
    from fastnets.kernels.linear import finish_linear

    plain = layer_scale is None and residual is None
    if plain and bias is not None and activation in _CUBLAS_EPILOGUES:
        # cuBLASLt's GELU is the one by tanh; as elsewhere in PyTorch that calls it, NaN may become 0 in ReLU.
        y = torch._addmm_activation(
            bias.to(x.dtype), x.reshape(-1, x.shape[-1]), weight.to(x.dtype).t(),
            use_gelu=activation == "gelu_tanh",
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)
    z = _product(x, weight, bias)
    if plain and activation == "none":
        return z
    dtype = result_dtype(x, layer_scale, residual)
    return finish_linear(
        z.contiguous(), None, layer_scale, residual, activation=activation, negative_slope=negative_slope,
        in_place=dtype == z.dtype, dtype=dtype,
    )  # fmt: skip


def result_dtype(x: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> torch.dtype:
    dtype = x.dtype
    for other in (layer_scale, residual):
        if other is not None and other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


# --- the choice ---------------------------------------------------------------------------------------------

_CUBLAS_EPILOGUES = ("relu", "gelu_tanh")


def _preferred(x: Tensor, weight: Tensor, extra: bool, activation: str, backend: str) -> str:
    """What was asked for, or measured to be the fastest for such a call."""
    return dispatch.preferred("linear_act", backend, x, weight.shape, activation, extra)


def choose(x: Tensor, weight: Tensor, extra: bool, activation: str, backend: str, wanted: str = "") -> str:
    """The implementation that serves a call: "triton", "library" or "reference".

    extra: whether a layer scale or a residual follows. wanted: the backend that ``dispatch.preferred`` gave
    for ``backend``, where the caller has asked.

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = wanted or _preferred(x, weight, extra, activation, backend)
    if wanted == "reference":
        return wanted
    ours = dispatch.ours_take((x.dtype,), wanted)
    if wanted == "triton":
        return wanted
    device = dispatch.device_type_of(x)
    if device == "cpu":
        why_not = onednn.linear_unsupported(x.dtype)
        if why_not is None and not (wanted == "auto" and backend == dispatch.UNFOLDED):
            return "library"
    elif device == "cuda":
        why_not = None if ours else f"it does not take {x.dtype}"
        if why_not is None and wanted == "library":
            return "library"
        if why_not is None:
            from fastnets.kernels.device import current_device
            from fastnets.kernels.linear import product_precision

            M = math.prod(x.shape[:-1])
            precision = product_precision(x)
            size = x.element_size()
            return _unmeasured(M, *weight.shape, size, precision, extra, activation, current_device(x))
    else:
        why_not = f"there is no fused vendor call for device type {device!r}"
    if wanted == "library":
        raise dispatch.UnsupportedByBackend(
            f"backend 'library' cannot serve this linear layer: {why_not}; use backend='auto' or 'reference'"
        )
    return "reference"


@functools.lru_cache(maxsize=4096)
def _unmeasured(
    M: int, N: int, K: int, element_size: int, precision: str, extra: bool, activation: str, device
) -> str:
    """ "triton" or "library" on CUDA where nothing was measured, from counts alone.

    The vendor's product is the faster one: ours is taken to reach 70 % of its rate where both are bound by
    multiplying, and 55 % on sm_90 and later, whose matrix units want tensor maps (measured on an H200: 340 of
    620 TFLOP/s at 6304×768×3072 in bfloat16). Against that stand the pass that ours saves, which reads and
    writes y once more, and its launch. So ours serves where there is an epilogue that the vendor lacks and
    the product is bound by memory or short (K up to about a thousand); exact fp32, where vendors are furthest
    ahead, only where weights stream. Without an epilogue, or with one that cuBLASLt has, the vendor's call
    has nothing to lose.
    """
    if not extra and (activation == "none" or activation in _CUBLAS_EPILOGUES):
        return "library"
    bandwidth = 1e9 * device.dram_bandwidth
    moved = element_size * (M * K + N * K + M * N) / bandwidth
    tflops = device.tensor_tflops * (1 if element_size == 2 else 0.5)
    if device.capability < 80 or (element_size == 4 and precision == "ieee"):
        return "triton" if M == 1 else "library"
    multiply = 2 * M * N * K / (1e12 * tflops)
    vendor = max(multiply, moved)
    ours = max(multiply / (0.7 if device.capability < 90 else 0.55), moved)
    # y of less than half the L2 is read and written there, at about 2.5 times the bandwidth.
    y = element_size * M * N
    one_pass = 2 * y / (bandwidth * (2.5 if 2 * y < device.l2_bytes else 1)) + 3e-6
    return "triton" if ours <= vendor + one_pass else "library"


# --- the op -------------------------------------------------------------------------------------------------


@dispatch.replays(tensors=5)
def _body(x, weight, bias, layer_scale, residual, activation, negative_slope, backend):
    on_cpu = dispatch.device_type_of(x) == "cpu"
    extra = layer_scale is not None or residual is not None
    wanted = _preferred(x, weight, extra, activation, backend)
    if on_cpu and x.dim():
        rows = math.prod(x.shape[:-1])
        added = residual is not None and (residual.shape == (*x.shape[:-1], weight.shape[0]), residual.dtype)
        # A scale that the network views or computes is another tensor at each call.
        kept, given = layer_scale, None
        if layer_scale is not None and layer_scale.__class__ is not nn.Parameter:
            kept, given = None, layer_scale
        key = (
            "linear", rows, x.shape[-1], x.dtype, x.device, added, activation, negative_slope, backend,
            wanted, torch._C._get_mkldnn_enabled(), x.is_meta, given is None,
        )  # fmt: skip
        prepared = packing.lookup(weight, key, (bias, kept))
        if prepared is not None:
            return prepared.run(x, residual, given)
    validate_linear(x, weight, bias, layer_scale, residual, activation)
    implementation = choose(x, weight, extra, activation, backend, wanted)
    arguments = (x, weight, bias, layer_scale, residual, activation, negative_slope)
    if implementation == "reference" or x.numel() == 0:
        return _composition(*arguments)
    if implementation == "triton":
        return _triton(*arguments)
    if not on_cpu:
        return _vendor(*arguments)
    if x.is_meta:
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=result_dtype(x, layer_scale, residual))
    sources = (weight, bias, kept)
    keep = packing.may_keep(sources)
    cast = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    run = onednn.prepare_linear(rows, *cast, kept, activation, negative_slope, keep)
    if keep:
        packing.keep(weight, packing.Prepared(key, run, weight, sources[1:]))
    return run(x, residual, given)


def validate_linear(x, weight, bias, layer_scale, residual, activation) -> None:
    """Errors name the argument, the fact and the remedy."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_act: x must be [..., K] and weight [N, K], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not x.is_floating_point() or weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"linear_act: x is {x.dtype}, weight {weight.dtype}; convert to one floating dtype")
    N = weight.shape[0]
    for name, tensor in (("bias", bias), ("layer_scale", layer_scale)):
        if tensor is not None and tensor.shape != (N,):
            raise ValueError(f"linear_act: {name} has shape {tuple(tensor.shape)}, expected ({N},)")
    for name, tensor in (("weight", weight), ("bias", bias), ("layer_scale", layer_scale),
                         ("residual", residual)):  # fmt: skip
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear_act: {name} is on {tensor.device}, x on {x.device}; move one of them")
    expected = (*x.shape[:-1], N)
    if residual is not None and (residual.shape != expected or not residual.is_floating_point()):
        raise ValueError(
            f"linear_act: residual is {tuple(residual.shape)} {residual.dtype}, the layer gives {expected} "
            f"{x.dtype}; expand or convert it first"
        )
    activation_of(activation)


def _fake(x, weight, bias, layer_scale, residual, activation, negative_slope, backend):
    validate_linear(x, weight, bias, layer_scale, residual, activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=result_dtype(x, layer_scale, residual))


def linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


# --- its gradient -------------------------------------------------------------------------------------------


def _keeps(activation: str, layer_scale: Tensor | None, residual: Tensor | None) -> str:
    """What the backward reads of the forward: "nothing", y ("output") or x @ weightᵀ + bias ("z")."""
    if layer_scale is None:
        if activation == "none":
            return "nothing"
        if residual is None and activation in ("relu", "relu6"):
            return "output"  # which is as positive, and as far below 6, as z was
    return "z"


def _training_body(x, weight, bias, layer_scale, residual, activation, negative_slope, backend):
    """(y, z)."""
    validate_linear(x, weight, bias, layer_scale, residual, activation)
    extra = layer_scale is not None or residual is not None
    arguments = (layer_scale, residual, activation, negative_slope)
    implementation = choose(x, weight, extra, activation, _learning(backend))
    if implementation == "triton" and x.numel():
        return _triton(x, weight, bias, *arguments, keep=True)
    z = _product(x, weight, bias)
    if implementation == "library" and x.is_cuda and x.numel():
        from fastnets.kernels.linear import finish_linear

        dtype = result_dtype(x, layer_scale, residual)
        y = finish_linear(
            z, None, layer_scale, residual, activation=activation, negative_slope=negative_slope, dtype=dtype
        )
        return y, z
    y = _finish(z, layer_scale, residual, activation, negative_slope, owned=False)
    return (y.clone() if y is z else y), z


def _learning(backend: str) -> str:
    """In training nothing is packed: by its own heuristic a CPU keeps to stock operations."""
    return dispatch.UNFOLDED if backend == "auto" else backend


def _training_fake(x, weight, bias, layer_scale, residual, activation, negative_slope, backend):
    y = _fake(x, weight, bias, layer_scale, residual, activation, negative_slope, backend)
    return y, torch.empty_like(y, dtype=x.dtype)


_training = dispatch.register(
    f"linear_act_training({_ARGUMENTS}) -> (Tensor, Tensor)",
    _training_body,
    _training_fake,
    flops=linear_flops,
)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, layer_scale, residual, activation, negative_slope, backend):
        with torch._C._AutoDispatchBelowAutograd(), packing.transient():
            arguments = (x, weight, bias, layer_scale, residual, activation, negative_slope, backend)
            if _keeps(activation, layer_scale, residual) == "z":
                return _training(*arguments)
            return _differentiable(*arguments[:-1], _learning(backend)), x.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, layer_scale, residual, *ctx.options, ctx.backend = inputs
        y, z = output
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        keeps = _keeps(ctx.options[0], layer_scale, residual)
        saved = {"nothing": None, "output": y, "z": z}[keeps]
        ctx.save_for_backward(x, weight, layer_scale, saved)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, _):
        x, weight, layer_scale, saved = ctx.saved_tensors
        if dy is None:
            return (None,) * 8
        wants_x, wants_weight, wants_bias, wants_scale, wants_residual = ctx.needs_input_grad[:5]
        dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
        passes, products = gradient_backend(x, ctx.backend)
        dz, dbias, dscale = gradient_of_product(
            dy, saved, layer_scale, *ctx.options, x.dtype, wants_bias, passes
        )
        dx = dweight = None
        if wants_x:
            dx = matrix_product(dz, weight.to(dz.dtype).t(), x.dtype, products).view(x.shape)
        if wants_weight:
            dweight = matrix_product(dz.t(), x.reshape(-1, x.shape[-1]).t(), weight.dtype, products)
        return (
            dx,
            dweight,
            dbias.to(ctx.bias_dtype) if wants_bias else None,
            dscale.to(layer_scale.dtype) if wants_scale else None,
            dresidual,
            *(None,) * 3,
        )


def _autograd(*arguments):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
        packing.forget(arguments[1])
        return _LinearAct.apply(*arguments)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*arguments)


def _autocast(x, weight, bias, *arguments):
    """Casts what autocast would: x, and weight and bias where they are used."""
    with torch._C._ExcludeDispatchKeyGuard(dispatch.AUTOCAST_KEYS):
        if x.is_floating_point() and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            if weight.dtype not in (dtype, torch.float32):
                weight = weight.to(dtype)
        op = _differentiable if torch.is_grad_enabled() else _infer
        return op(x, weight, bias, *arguments)


_infer = dispatch.register(
    f"linear_act_inference({_ARGUMENTS}) -> Tensor", _body, _fake, autocast=_autocast, flops=linear_flops
)
_differentiable = dispatch.register(
    f"linear_act({_ARGUMENTS}) -> Tensor",
    _body,
    _fake,
    autograd=_autograd,
    autocast=_autocast,
    flops=linear_flops,
)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``residual + layer_scale * act(F.linear(x, weight, bias))``; see the top of this file.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides, one dimension or more.
        weight: [N, K], of x's dtype or float32; bias and layer_scale: [N].
        activation: a name in ``fastnets.fused.activation.ACTIVATIONS``.
        residual: [..., N], any strides.

    Returns:
        [..., N], contiguous. Differentiable once, in every tensor.
    """
    dispatch.validate_backend(backend)
    if in_transform():
        validate_linear(x, weight, bias, layer_scale, residual, activation)
        return _composition(x, weight, bias, layer_scale, residual, activation, negative_slope)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, weight, bias, layer_scale, residual, activation, negative_slope, backend)


# --- what rewritten networks call ---------------------------------------------------------------------------

_PLAIN_WEIGHTS = (nn.Parameter, Tensor)
SMALL_ON_CPU = 1 << 19  # multiply-adds: below, stock is done before a choice is made


def call_linear_act(
    linear: nn.Linear,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    layer_scale: Tensor | nn.Module | None = None,
    backend: str = "auto",
) -> Tensor:
    """``residual + layer_scale * act(linear(x))`` by the fused op where that is stock's result, by the
    modules themselves elsewhere.

    Stock runs where a hook would be skipped, the layer's class or forward is not the stock one (parametrized,
    patched), the tensors are not plain ones, or the residual broadcasts; and on the CPU where the layer is
    small or learns. ``act`` is the module that stock would call; None means a function or nothing.
    ``layer_scale`` is a tensor [N], or a module that multiplies by its ``gamma`` (timm's ``LayerScale``).
    """
    inference = is_inference() and x.__class__ is Tensor
    if inference and _memory:
        parameters = linear._parameters
        weight = parameters.get("weight")
        remembered = _memory.get((id(weight), x.shape))
        if remembered is not None and not (
            has_hooks(linear) or linear.__class__ not in LINEARS or (act is not None and has_hooks(act))
        ):
            scales = isinstance(layer_scale, nn.Module)
            scale = layer_scale._parameters.get("gamma") if scales else layer_scale
            tensors = (x, weight, parameters.get("bias"), scale, residual)
            if remembered.serves(tensors, (activation, negative_slope, backend)) and (
                not scales or _scales_plainly(layer_scale)
            ):
                return remembered.call(tensors)
    if runs_stock(linear, act, x, residual, layer_scale, backend):
        weight = linear._parameters.get("weight")
        if weight is not None and torch.is_grad_enabled():
            packing.forget(weight)  # a training step may follow
        return _call_stock(linear, act, x, residual, activation, negative_slope, layer_scale)
    parameters = linear._parameters
    scale = layer_scale._parameters["gamma"] if isinstance(layer_scale, nn.Module) else layer_scale
    tensors = (x, parameters["weight"], parameters["bias"], scale, residual)
    options = (activation, negative_slope, backend)
    if inference and not watched(x):
        call = _body.recorded(*tensors, *options)
        if call is not None:
            _memory.keep((id(tensors[1]), x.shape), call, tensors, options)
            return call(tensors)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(*tensors, *options)


_memory = dispatch.Memory()


def _call_stock(linear, act, x, residual, activation, negative_slope, layer_scale) -> Tensor:
    y = nn.Linear.forward(linear, x) if linear.__class__ is LinearAct else linear(x)
    y = act(y) if act is not None else activation_of(activation).forward(y, negative_slope)
    if layer_scale is not None:
        y = layer_scale(y) if isinstance(layer_scale, nn.Module) else y * layer_scale
    return y if residual is None else y + residual  # y is contiguous, and so is the sum


def runs_stock(linear, act, x, residual, layer_scale, backend) -> bool:
    weight = linear._parameters.get("weight")
    if (
        linear.__class__ not in LINEARS
        or weight.__class__ not in _PLAIN_WEIGHTS
        or (linear.__class__ is nn.Linear and has_hooks(linear))
        or (act is not None and has_hooks(act))
        or (isinstance(layer_scale, nn.Module) and not _scales_plainly(layer_scale))
        or _has_any_global_hook()
        or not isinstance(x, Tensor)
        or x.dim() == 0
        or x.layout != torch.strided
        or x.is_nested
        or x.shape[-1] != weight.shape[1]
        or not _dtypes_agree(weight, x)
        or (residual is not None and not _adds_plainly(weight, x, residual))
        or in_transform()
    ):
        return True
    return _stock_is_sooner(x, weight, backend)


def _stock_is_sooner(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the CPU, asked for nothing else, is done sooner with stock: layers that are small or learn."""
    if dispatch.device_type_of(x) == "cuda" or dispatch.requested(backend) != "auto":
        return False
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled() or backend == dispatch.UNFOLDED or x.numel() * weight.shape[0] < SMALL_ON_CPU
    )


def call_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``residual + layer_scale * F.linear(x, weight, bias)`` where a network calls the function: by the fused
    op where that is stock's result, as stock computes it elsewhere. Parts of a weight are not packed."""
    if function_runs_stock(x, weight, bias, residual, layer_scale, backend):
        y = F.linear(x, weight, bias)
        y = y if layer_scale is None else y * layer_scale
        return y if residual is None else y + residual  # y is contiguous, and so is the sum
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, weight, bias, layer_scale, residual, "none", 0.0, backend)


def function_runs_stock(x, weight, bias, residual, layer_scale, backend) -> bool:
    """Whether ``call_linear`` leaves such a call to PyTorch."""
    tensors = [t for t in (x, weight, bias, residual, layer_scale) if t is not None]
    plain = all(t.__class__ in _PLAIN_WEIGHTS and not t.is_nested for t in tensors) and not in_transform()
    return (
        not plain
        or x.dim() == 0
        or x.shape[-1] != weight.shape[-1]
        or weight.dim() != 2
        or not _dtypes_agree(weight, x)
        or (residual is not None and not _adds_plainly(weight, x, residual))
        or (layer_scale is not None and layer_scale.shape != weight.shape[:1])
        or _stock_is_sooner(x, weight, backend)
        or (weight._is_view() and dispatch.leaves_to_stock(x, backend))
    )


def _scales_plainly(module: nn.Module) -> bool:
    gamma = module._parameters.get("gamma")
    return (
        type(module).__name__ == "LayerScale"
        and not has_hooks(module)
        and gamma is not None
        and gamma.dim() == 1
    )


def _adds_plainly(weight: Tensor, x: Tensor, residual: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.is_floating_point()
        and residual.device == x.device
        and residual.shape == (*x.shape[:-1], weight.shape[0])
    )


def _dtypes_agree(weight: Tensor, x: Tensor) -> bool:
    """Whether stock would multiply in one dtype, which autocast may choose."""
    if not x.is_floating_point() or (x.device != weight.device and not x.is_meta):
        return False
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, weight.dtype)
    return x.dtype == weight.dtype


class LinearAct(nn.Linear):
    """``nn.Linear`` with an activation, a layer scale and a residual: ``LinearAct(K, N, activation="gelu")``.

    Parameters and state dict are those of ``nn.Linear``; with ``layer_scale`` (the initial value of [N]
    scales) there is a parameter ``layer_scale`` besides. ``forward(x, residual=None)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        layer_scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation_of(activation).name
        self.negative_slope = float(negative_slope)
        self.backend = dispatch.validate_backend(backend)
        scale = None
        if layer_scale is not None:
            scale = nn.Parameter(torch.full((out_features,), float(layer_scale), device=device, dtype=dtype))
        self.register_parameter("layer_scale", scale)

    @classmethod
    def from_stock(
        cls,
        linear: nn.Linear,
        act: nn.Module | None = None,
        layer_scale: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> LinearAct:
        """The fused module on the parameters of a stock one, and the activation module after it."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"LinearAct.from_stock: got {type(linear).__name__}, expected nn.Linear")
        named = recognise(act)
        if named is None:
            raise ValueError(f"LinearAct.from_stock: {type(act).__name__} is not an activation that fuses")
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        module = cls(*sizes, "meta", activation=named[0], negative_slope=named[1], backend=backend)
        module.weight, module.bias = linear.weight, linear.bias
        if layer_scale is not None:
            scale = layer_scale if isinstance(layer_scale, nn.Parameter) else nn.Parameter(layer_scale)
            module.register_parameter("layer_scale", scale)
        return module.train(linear.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [..., K], residual [..., N] or None -> [..., N]."""
        return call_linear_act(
            self, None, input, residual, self.activation, self.negative_slope, self.layer_scale, self.backend
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


LINEARS = (nn.Linear, LinearAct)


def implementation_of(
    linear: nn.Linear,
    act: nn.Module | None,
    activation: str,
    x: Tensor,
    residual: Tensor | None = None,
    layer_scale: Tensor | nn.Module | None = None,
    backend: str = "auto",
) -> str:
    """The implementation that ``call_linear_act`` would run for an input like ``x``; "stock" if none."""
    if runs_stock(linear, act, x, residual, layer_scale, backend):
        return "stock"
    extra = residual is not None or layer_scale is not None
    return choose(x, linear.weight, extra, activation, backend)
