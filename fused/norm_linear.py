"""Layer norm or RMS norm and the linear layer that reads it, as one op.

    y = residual + layer_scale · act(norm(x) @ weightᵀ + bias)

x [..., K], norm over its last dimension; the rest as in ``fused.linear``. Run one after the other, the
norm's result is written and read again. Here x is normalised while the product loads it. What that takes of
x's rows, a mean and a sum of squared deviations, comes from one pass that reads x, or from the op that made
x: ``norm_linear_statistics`` returns with y the statistics of y's rows, see ``kernels.row_statistics``.

Only inference gains by it: with gradients, and wherever our kernels do not serve or are predicted to lose,
the norm and the layer run one after the other, as they did.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import composed, dispatch
from fastnets.fused import layer_norm as norms
from fastnets.fused.batch_norm import has_hooks, in_transform, is_inference, watched
from fastnets.fused.layer_norm import LAYER_NORMS, call_layer_norm, rms_eps
from fastnets.fused.linear import (
    LINEARS,
    call_linear,
    call_linear_act,
    choose,
    function_runs_stock,
    linear_flops,
    result_dtype,
    runs_stock,
    validate_linear,
)

NORMS = ("none", "layer_norm", "rms_norm")
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? statistics, str norm, float eps, str activation, float negative_slope, "
    "str backend) -> "
)
_TENSORS = 8

# --- the implementations ------------------------------------------------------------------------------------


def _triton(
    x, weight, bias, layer_scale, residual, norm_weight, norm_bias, statistics, norm, eps, activation,
    negative_slope, backend, keep=False,
):  # fmt: skip
    from fastnets.kernels.linear import linear_act as launch
    from fastnets.kernels.row_statistics import Norm

    of_x = None
    if norm != "none":
        of_x = Norm(norm_weight, norm_bias, eps, norm == "layer_norm", statistics)
    return launch(
        x, weight.to(x.dtype), bias, layer_scale, residual, activation=activation,
        negative_slope=negative_slope, norm=of_x, keep_statistics=keep,
        dtype=result_dtype(x, layer_scale, residual),
    )  # fmt: skip


def _composed(differentiable: bool, *arguments) -> Tensor:
    """The norm and the layer one after the other: what the op means, and its gradient."""
    x, *linear, norm_weight, norm_bias, _, norm, eps, activation, negative_slope, backend = arguments
    ops = torch.ops.fastnets
    if norm != "none":
        normalise = ops.layer_norm if differentiable else ops.layer_norm_inference
        x = normalise(x, None, norm_weight, norm_bias, 1, eps, norm == "layer_norm", None, backend)
    multiply = ops.linear_act if differentiable else ops.linear_act_inference
    return multiply(x, *linear, activation, negative_slope, backend)


def _statistics_of(y: Tensor) -> Tensor:
    """Those of whole rows, by PyTorch."""
    rows = y.detach().reshape(-1, y.shape[-1]).float()
    variance, mean = torch.var_mean(rows, 1, correction=0)
    return torch.stack([mean, variance * rows.shape[1]], 1)[:, None]


def implementation_of(
    x: Tensor, weight: Tensor, extra: bool, activation: str, norm: str, backend: str, known: bool = False
) -> str:
    """ "triton" for one launch, "reference" for the norm and the layer one after the other.

    extra: as in ``linear.choose``. known: whether the statistics of x's rows are there.
    """
    wanted = dispatch.requested(backend)
    if wanted in ("library", "reference") or not x.numel() or x.dtype not in dispatch.OUR_DTYPES:
        return "reference"
    if choose(x, weight, extra, activation, backend) != "triton":
        return "reference"
    K = x.shape[-1]
    M = x.numel() // K
    as_measured = ("layer_norm", K, 1, norm == "layer_norm", False, False, False)
    if norm != "none" and norms.choose(x, backend, *as_measured) != "triton":
        return "reference"
    from fastnets.kernels.device import current_device
    from fastnets.kernels.linear import product_precision

    sizes = (M, weight.shape[0], K, x.element_size(), product_precision(x))
    gains = _gains(*sizes, norm, known, wanted == "triton", current_device(x))
    return "triton" if gains else "reference"


@functools.lru_cache(maxsize=4096)
def _gains(
    M: int, N: int, K: int, element_size: int, precision: str, norm: str, known: bool, forced: bool, device
) -> bool:
    """Whether a norm at the head of our product saves bytes and, unless our kernels were asked for, is not
    predicted to cost more time than that saves: every tile of columns normalises x anew, with about 8
    instructions an element, which is nothing beside products without tensor cores."""
    from fastnets.kernels.layer_norm import is_wide
    from fastnets.kernels.linear import streams

    if norm == "none":
        return not streams(M, element_size, precision, device)
    if is_wide(K) or streams(M, element_size, precision, device):
        return False
    if forced:
        return True
    extra = M * K * -(-N // 128) * 8 / (0.5e12 * device.fp32_tflops)
    bandwidth = 1e9 * device.dram_bandwidth * (2.5 if 2 * element_size * M * K < device.l2_bytes else 1)
    saved = (2 if known else 1) * element_size * M * K / bandwidth + (3e-6 if known else 0.0)
    return extra < saved


# --- the ops ------------------------------------------------------------------------------------------------


def _chosen(x, weight, bias, layer_scale, residual, norm_weight, norm_bias, statistics, norm, eps, activation,
            negative_slope, backend) -> str:  # fmt: skip
    extra = layer_scale is not None or residual is not None
    return implementation_of(x, weight, extra, activation, norm, backend, statistics is not None)


@dispatch.replays(tensors=_TENSORS)
def _body(*arguments):
    _validate(*arguments)
    return _triton(*arguments) if _chosen(*arguments) == "triton" else _composed(False, *arguments)


@dispatch.replays(tensors=_TENSORS)
def _statistics_body(*arguments):
    _validate(*arguments)
    if _chosen(*arguments) == "triton":
        return _triton(*arguments, keep=True)
    y = _composed(False, *arguments)
    return y, _statistics_of(y)


def _validate(
    x, weight, bias, layer_scale, residual, norm_weight, norm_bias, statistics, norm, eps, activation,
    negative_slope, backend,
):  # fmt: skip
    """Errors name the argument, the fact and the remedy."""
    validate_linear(x, weight, bias, layer_scale, residual, activation)
    if norm not in NORMS:
        raise ValueError(f"norm_linear: norm={norm!r} is not one of {', '.join(NORMS)}")
    K = x.shape[-1]
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and norm == "none":
            raise ValueError(f"norm_linear: {name} is given with norm='none'; leave it out")
        if tensor is not None and (tensor.shape != (K,) or tensor.device != x.device):
            raise ValueError(
                f"norm_linear: {name} is {tuple(tensor.shape)} on {tensor.device}, expected ({K},) on "
                f"{x.device}"
            )
    if statistics is not None and (
        statistics.dim() != 3 or (statistics.shape[0], statistics.shape[2]) != (math.prod(x.shape[:-1]), 2)
    ):
        raise ValueError(
            f"norm_linear: statistics are {tuple(statistics.shape)}, expected those that "
            "norm_linear_statistics returned with x"
        )


def _fake(x, weight, bias, layer_scale, residual, *others):
    _validate(x, weight, bias, layer_scale, residual, *others)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=result_dtype(x, layer_scale, residual))


def _statistics_fake(*arguments):
    if _chosen(*arguments) == "triton":
        return _triton(*arguments, keep=True)  # nothing is launched
    y = _fake(*arguments)
    return y, y.new_empty((math.prod(y.shape[:-1]), 1, 2), dtype=torch.float32)


def _with_gradients(*arguments):
    _validate(*arguments)
    return _composed(True, *arguments)


def _statistics_with_gradients(*arguments):
    y = _with_gradients(*arguments)
    return y, _statistics_of(y)


_differentiable, _infer = composed.register(
    *("norm_linear", _SCHEMA + "Tensor", _body, _fake),
    with_gradients=_with_gradients, flops=linear_flops, autocast=_with_gradients,
)  # fmt: skip
_statistics_differentiable, _statistics_infer = composed.register(
    *("norm_linear_statistics", _SCHEMA + "(Tensor, Tensor)", _statistics_body, _statistics_fake),
    with_gradients=_statistics_with_gradients, flops=linear_flops, autocast=_statistics_with_gradients,
)  # fmt: skip


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer_norm",
    activation: str = "none",
    negative_slope: float = 0.01,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``linear_act(F.layer_norm(x, (K,), norm_weight, norm_bias, eps), weight, bias, ...)``; see the top of
    this file.

    Args:
        norm: "layer_norm" or "rms_norm"; norm_weight, norm_bias: [K]. The rest: see ``linear_act``.

    Returns:
        [..., N], contiguous. Differentiable once, in every tensor.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        x, weight, bias, layer_scale, residual, norm_weight, norm_bias, None, norm, eps, activation,
        negative_slope, dispatch.validate_backend(backend),
    )  # fmt: skip


# --- what rewritten networks call ---------------------------------------------------------------------------

_memory = dispatch.Memory()


def call_norm_linear(
    norm: nn.Module | None,
    linear: nn.Linear,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    layer_scale: Tensor | None = None,
    backend: str = "auto",
    *,
    statistics: Tensor | None = None,
    keep: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """``residual + layer_scale * act(linear(norm(x)))`` in one launch where our kernels serve it in
    inference, else by ``call_layer_norm`` and ``call_linear_act``, whose remarks hold.

    norm: None is none. statistics: of x's rows, where there are some. keep: return (y, statistics of y's
    rows), None for the latter where our kernels do not serve.
    """
    if norm is None and not keep:
        return call_linear_act(linear, act, x, residual, activation, negative_slope, layer_scale, backend)
    parameters = linear._parameters
    weight = parameters.get("weight")
    inference = is_inference() and x.__class__ is Tensor
    plain = inference and not (has_hooks(linear) or (act is not None and has_hooks(act)))
    if plain and (norm is None or _is_plain(norm, x)):
        vectors, options = _of_norm(norm, x)
        tensors = (x, weight, parameters.get("bias"), layer_scale, residual, *vectors, statistics)
        options = (*options, activation, negative_slope, backend)
        key = (id(weight), x.shape, keep)
        remembered = _memory.get(key)
        if (
            remembered is not None
            and linear.__class__ in LINEARS
            and remembered.serves(tensors, options)
        ):  # fmt: skip
            return remembered.call(tensors)
        known = statistics is not None
        if _serves(linear, act, x, residual, layer_scale, activation, options[0], backend, known):
            body, op = (_statistics_body, _statistics_infer) if keep else (_body, _infer)
            if watched(x):
                return op(*tensors, *options)
            call = body.recorded(*tensors, *options)
            if call is None:
                return body(*tensors, *options)
            _memory.keep(key, call, tensors, options)
            return call(tensors)
    if norm is not None:
        x = call_layer_norm(norm, x, None, "auto" if backend == dispatch.UNFOLDED else backend)
    y = call_linear_act(linear, act, x, residual, activation, negative_slope, layer_scale, backend)
    return (y, None) if keep else y


def _of_norm(norm: nn.Module | None, x: Tensor) -> tuple[tuple, tuple]:
    """((weight, bias), (kind, eps)) of a norm of x's rows; None is none."""
    if norm is None:
        return (None, None), ("none", 0.0)
    vectors = norm._parameters.get("weight"), norm._parameters.get("bias")
    if norm.__class__ is nn.LayerNorm:
        return vectors, ("layer_norm", norm.eps)
    return vectors, ("rms_norm", rms_eps(norm.eps, x))


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Whether the norm is stock, over the last dimension, and nothing wants to see its call."""
    return (
        norm.__class__ in LAYER_NORMS
        and not has_hooks(norm)
        and norm.normalized_shape == x.shape[-1:]
        and all(p is None or p.__class__ is nn.Parameter for p in norm._parameters.values())
        and all(p is None or x.is_meta or p.device == x.device for p in norm._parameters.values())
    )


def _serves(linear, act, x, residual, layer_scale, activation, norm, backend, known: bool) -> bool:
    if not _may_serve(x, backend) or runs_stock(linear, act, x, residual, layer_scale, backend):
        return False
    extra = residual is not None or layer_scale is not None
    weight = linear._parameters["weight"]
    return implementation_of(x, weight, extra, activation, norm, backend, known) == "triton"


def _may_serve(x: Tensor, backend: str) -> bool:
    if dispatch.are_decisions_watched():  # what is measured is the norm, and the layer, each for itself
        return False
    if x.dtype not in dispatch.OUR_DTYPES or in_transform() or _has_any_global_hook():
        return False
    autocasts = torch.is_autocast_enabled(dispatch.device_type_of(x))
    return not autocasts and not dispatch.leaves_to_stock(x, backend)


def takes_norm(
    norm: nn.Module, linear: nn.Linear, act: nn.Module | None, activation: str, x: Tensor, backend: str,
    known: bool = False,
) -> bool:  # fmt: skip
    """Whether ``call_norm_linear`` would run in one launch for an input like ``x``; known: with statistics
    of its rows. linear: a linear layer, or multi-head attention, whose projection is meant."""
    if not is_inference() or not _is_plain(norm, x) or has_hooks(linear):
        return False
    kind = _of_norm(norm, x)[1][0]
    if isinstance(linear, nn.MultiheadAttention):
        weight, bias = linear.in_proj_weight, linear.in_proj_bias
        if weight is None or not _may_serve(x, backend):
            return False
        if function_runs_stock(x, weight, bias, None, None, backend):
            return False
        return implementation_of(x, weight, False, "none", kind, backend, known) == "triton"
    return _serves(linear, act, x, None, None, activation, kind, backend, known)


def asks_for_statistics(reader: tuple, x: Tensor, residual: Tensor | None, backend: str) -> bool:
    """Whether a reader (norm, linear layer, activation module, activation) would take the norm of a result of
    the residual's kind, made of x."""
    plain = residual is not None and x.__class__ is Tensor and residual.__class__ is Tensor
    return plain and x.dtype == residual.dtype and takes_norm(*reader, residual, backend, known=True)


def call_norm_linear_function(
    norm: nn.Module | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    backend: str = "auto",
    *,
    statistics: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(``residual + layer_scale * F.linear(norm(x), weight, bias)``, statistics of its rows or None): as
    ``call_norm_linear``, else by ``call_layer_norm`` and ``call_linear``."""
    known, extra = statistics is not None, residual is not None or layer_scale is not None
    if (
        (norm is not None or keep)
        and is_inference()
        and x.__class__ is Tensor
        and (norm is None or _is_plain(norm, x))
        and _may_serve(x, backend)
        and not function_runs_stock(x, weight, bias, residual, layer_scale, backend)
    ):
        vectors, options = _of_norm(norm, x)
        if implementation_of(x, weight, extra, "none", options[0], backend, known) == "triton":
            tensors = (x, weight, bias, layer_scale, residual, *vectors, statistics)
            body, op = (_statistics_body, _statistics_infer) if keep else (_body, _infer)
            y = (op if watched(x) else body)(*tensors, *options, "none", 0.0, backend)
            return y if keep else (y, None)
    if norm is not None:
        x = call_layer_norm(norm, x, None, "auto" if backend == dispatch.UNFOLDED else backend)
    return call_linear(x, weight, bias, residual, layer_scale, backend), None
