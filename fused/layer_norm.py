"""Layer norm and RMS norm with the residual addition before or after.

    s = x + residual;   y = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias        add_layer_norm: (y, s)
    y = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias + residual                 layer_norm

over the trailing dims that ``normalized_shape`` names; RMS norm is the same without mean and bias. s is
rounded to its dtype first, as stock does. Saved for the backward are s (or x) and fp32 statistics, one or two
numbers a row. Layer norm over the channels of channels-last images (torchvision's ``LayerNorm2d``, ConvNeXt)
is one over rows of memory: ``layer_norm(x.permute(0, 2, 3, 1), ...).permute(0, 3, 1, 2)`` copies nothing.

On the CPU ``backend="auto"`` and "library" are stock's own calls, with their gradients. After Ba, Kiros and
Hinton, "Layer Normalization", 2016, and Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import has_hooks, in_transform, is_inference, watched

# --- the implementations ------------------------------------------------------------------------------------


def choose(x: Tensor, backend: str, op: str = "", *details: object) -> str:
    """The implementation that serves the ops: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend, op=op, details=details, refuses="does not normalise")


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _dtypes(x, before, after, dtype) -> tuple[torch.dtype, torch.dtype]:
    """(of what is normalised, of y)."""
    kind = x.dtype if before is None else torch.promote_types(x.dtype, before.dtype)
    if dtype is None:
        dtype = kind if after is None else torch.promote_types(kind, after.dtype)
    return kind, dtype


def _reference(s, weight, bias, dims, eps, centred) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) in float32 at least; the mean of RMS norm is an empty tensor."""
    s = s.to(_wide(s))
    over = tuple(range(s.dim() - dims, s.dim()))
    if not s.numel():
        rows = math.prod(s.shape[: s.dim() - dims])
        return s.clone(), s.new_zeros(rows if centred else 0), s.new_zeros(rows)
    if centred:
        var, mean = torch.var_mean(s, over, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + eps)
        y = (s - mean) * rstd
    else:
        mean = s.new_empty(0)
        rstd = torch.rsqrt(s.square().mean(over, keepdim=True) + eps)
        y = s * rstd
    if weight is not None:
        y = y * weight.to(s.dtype)
    if bias is not None:
        y = y + bias.to(s.dtype)
    return y, mean.flatten(), rstd.flatten()


def _run(x, before, after, weight, bias, dims, eps, centred, dtype, keep, backend):
    """(y, sum or None, mean or None, rstd or None)."""
    _validate(x, before, after, weight, bias, dims)
    adds = before is not None, after is not None
    if choose(x, backend, "layer_norm", x.shape[-1], dims, centred, *adds, keep) == "triton":
        from fastnets.kernels.layer_norm import layer_norm as launch

        return launch(x, dims, weight, bias, before, after, eps=eps, centred=centred, dtype=dtype, keep=keep)
    _, dtype = _dtypes(x, before, after, dtype)
    total = None if before is None else (x + before).contiguous()
    y, mean, rstd = _reference(x if total is None else total, weight, bias, dims, eps, centred)
    if after is not None:
        y = y + after
    return y.to(dtype).contiguous(), total, mean, rstd


def _validate(x, before, after, weight, bias, dims) -> None:
    if not x.is_floating_point():
        raise TypeError(f"layer_norm: x is {x.dtype}; convert it to a floating dtype first")
    if not 1 <= dims <= x.dim():
        raise ValueError(f"layer_norm: a row cannot be the last {dims} of {x.dim()} dimensions")
    row = x.shape[x.dim() - dims :]
    residual = after if before is None else before
    for name, tensor, expected in (
        ("weight", weight, row), ("bias", bias, row), ("residual", residual, x.shape)
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}, as x"
            )
        if tensor.device != x.device:
            raise ValueError(f"layer_norm: {name} is on {tensor.device}, x on {x.device}; move one of them")


# --- the ops ------------------------------------------------------------------------------------------------

_REST = (
    "Tensor? weight, Tensor? bias, int dims, float eps, bool centred, ScalarType? dtype, str backend"
)  # fmt: skip


@dispatch.replays(tensors=4)
def _infer_body(x, residual, weight, bias, dims, eps, centred, dtype, backend):
    return _run(x, None, residual, weight, bias, dims, eps, centred, dtype, False, backend)[0]


def _infer_fake(x, residual, weight, bias, dims, eps, centred, dtype, backend):
    _validate(x, None, residual, weight, bias, dims)
    return torch.empty(x.shape, dtype=_dtypes(x, None, residual, dtype)[1], device=x.device)


@dispatch.replays(tensors=4)
def _add_infer_body(x, residual, weight, bias, dims, eps, centred, dtype, backend):
    return _run(x, residual, None, weight, bias, dims, eps, centred, dtype, False, backend)[:2]


def _add_infer_fake(x, residual, weight, bias, dims, eps, centred, dtype, backend):
    _validate(x, residual, None, weight, bias, dims)
    kind, dtype = _dtypes(x, residual, None, dtype)
    return tuple(torch.empty(x.shape, dtype=d, device=x.device) for d in (dtype, kind))


def _forward_body(x, before, after, weight, bias, dims, eps, centred, dtype, backend):
    y, total, mean, rstd = _run(x, before, after, weight, bias, dims, eps, centred, dtype, True, backend)
    if total is None:
        total = x.new_empty(0)
    return y, total, rstd.new_empty(0) if mean is None else mean, rstd


def _forward_fake(x, before, after, weight, bias, dims, eps, centred, dtype, backend):
    _validate(x, before, after, weight, bias, dims)
    kind, dtype = _dtypes(x, before, after, dtype)
    rows = x.shape[: x.dim() - dims].numel()
    like = {"dtype": _wide(x) if before is None else _wide(x, before), "device": x.device}
    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        torch.empty(0 if before is None else x.shape, dtype=kind, device=x.device),
        torch.empty(rows if centred else 0, **like),
        torch.empty(rows, **like),
    )


def _backward_body(dy, dtotal, s, mean, rstd, weight, dims, centred, wanted, dtype, backend):
    """(dx or an empty tensor, vector gradients [0 to 2, *row]): see ``kernels.layer_norm_backward``."""
    if choose(s, backend) == "triton":
        from fastnets.kernels.layer_norm_backward import layer_norm_backward as launch

        mean = mean if centred else None
        dx, sums = launch(dy, s, dims, mean, rstd, weight, dtotal, wanted=tuple(wanted), dtype=dtype)
        return s.new_empty(0) if dx is None else dx, sums
    wide, leading = _wide(s), s.dim() - dims
    shape = (*s.shape[:leading], *[1] * dims)
    rows, over = tuple(range(leading)), tuple(range(leading, s.dim()))
    normalized = s.to(wide)
    if centred:
        normalized = normalized - mean.view(shape)
    normalized = normalized * rstd.view(shape)
    dy = dy.to(wide)
    sums = s.new_empty((wanted[1] + wanted[2], *s.shape[leading:]), dtype=dtype)
    if wanted[1]:
        sums[0] = (dy * normalized).sum(rows) if rows else dy * normalized
    if wanted[2]:
        sums[-1] = dy.sum(rows) if rows else dy
    if not wanted[0]:
        return s.new_empty(0), sums
    g = dy if weight is None else dy * weight.to(wide)
    dx = g - normalized * (g * normalized).mean(over, keepdim=True)
    if centred:
        dx = dx - g.mean(over, keepdim=True)
    dx = dx * rstd.view(shape)
    return (dx if dtotal is None else dx + dtotal).to(s.dtype).contiguous(), sums


def _backward_fake(dy, dtotal, s, mean, rstd, weight, dims, centred, wanted, dtype, backend):
    row = s.shape[s.dim() - dims :]
    sums = s.new_empty((wanted[1] + wanted[2], *row), dtype=dtype)
    return torch.empty(s.shape if wanted[0] else 0, dtype=s.dtype, device=s.device), sums


_forward = dispatch.register(
    f"layer_norm_forward(Tensor x, Tensor? before, Tensor? after, {_REST})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_body,
    _forward_fake,
)
_backward = dispatch.register(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor s, Tensor mean, Tensor rstd, Tensor? weight, "
    "int dims, bool centred, bool[3] wanted, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, before, _, weight, bias, *ctx.options = inputs
        _, total, mean, rstd = output
        if before is None:
            ctx.mark_non_differentiable(total, mean, rstd)
        else:
            ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if before is None else total, mean, rstd, weight)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, dtotal, *_):
        if dy is None:
            return dtotal, dtotal, *[None] * 8
        s, mean, rstd, weight = ctx.saved_tensors
        dims, _, centred, _, backend = ctx.options
        needs_x, needs_before, needs_after, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        needs_x = needs_x or needs_before
        dx = dweight = dbias = None
        if needs_x or needs_weight or needs_bias:
            kinds = {weight.dtype} if needs_weight else set()
            kinds |= {ctx.bias_dtype} if needs_bias else set()
            dtype = next(iter(kinds)) if len(kinds) == 1 else mean.dtype
            wanted = (needs_x, needs_weight, needs_bias)
            dx, sums = _backward(dy, dtotal, s, mean, rstd, weight, dims, centred, wanted, dtype, backend)
            dx = dx if needs_x else None
            dweight = sums[0].to(weight.dtype) if needs_weight else None
            dbias = sums[-1].to(ctx.bias_dtype) if needs_bias else None
        return dx, dx if needs_before else None, dy if needs_after else None, dweight, dbias, *[None] * 5


def _autograd(x, residual, weight, bias, *options):
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _LayerNorm.apply(x, None, residual, weight, bias, *options)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*tensors, *options)


def _add_autograd(x, residual, weight, bias, *options):
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _LayerNorm.apply(x, residual, None, weight, bias, *options)[:2]
    with torch._C._AutoDispatchBelowAutograd():
        return _add_differentiable(*tensors, *options)


def _autocast_of(op):
    def autocast(x, *arguments):
        """On CUDA autocast has layer norm in float32: its result is, and no cast comes before."""
        *rest, dtype, backend = arguments
        if x.is_cuda and dtype is None and x.dtype != torch.float64:
            dtype = torch.float32
        with torch._C._ExcludeDispatchKeyGuard(dispatch.AUTOCAST_KEYS):
            return op()(x, *rest, dtype, backend)

    return autocast


_infer = dispatch.register(
    f"layer_norm_inference(Tensor x, Tensor? residual, {_REST}) -> Tensor",
    _infer_body,
    _infer_fake,
    autocast=_autocast_of(lambda: _infer),
)
_differentiable = dispatch.register(
    f"layer_norm(Tensor x, Tensor? residual, {_REST}) -> Tensor",
    _infer_body,
    _infer_fake,
    autograd=_autograd,
    autocast=_autocast_of(lambda: _differentiable),
)
_add_infer = dispatch.register(
    f"add_layer_norm_inference(Tensor x, Tensor residual, {_REST}) -> (Tensor, Tensor)",
    _add_infer_body,
    _add_infer_fake,
    autocast=_autocast_of(lambda: _add_infer),
)
_add_differentiable = dispatch.register(
    f"add_layer_norm(Tensor x, Tensor residual, {_REST}) -> (Tensor, Tensor)",
    _add_infer_body,
    _add_infer_fake,
    autograd=_add_autograd,
    autocast=_autocast_of(lambda: _add_differentiable),
)

# --- functions ----------------------------------------------------------------------------------------------


def _stock_serves(x: object, backend: str) -> bool:
    """Whether stock's own functions are to run: on the CPU unless asked otherwise, and where asked to."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or in_transform():
        return True
    return dispatch.leaves_to_stock(x, backend) or (
        not torch.compiler.is_compiling() and dispatch.requested(backend) == "library"
    )


def _row(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _checked_dims(function: str, x: Tensor, row: tuple[int, ...]) -> int:
    dims = len(row)
    if not 1 <= dims <= x.dim() or x.shape[x.dim() - dims :] != row:
        raise RuntimeError(
            f"{function}: normalized_shape={list(row)} expects x of shape [*, {', '.join(map(str, row))}], "
            f"got {list(x.shape)}"
        )
    return dims


def rms_eps(eps: float | None, *tensors: Tensor | None) -> float:
    if eps is not None:
        return eps
    return torch.finfo(_wide(*[t for t in tensors if t is not None])).eps


def _normalise(function, x, residual, row, weight, bias, eps, centred, backend) -> Tensor:
    dims = _checked_dims(function, x, row)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, residual, weight, bias, dims, eps, centred, None, dispatch.validate_backend(backend))


def _add_and_normalise(function, x, residual, row, weight, bias, eps, centred, backend):
    dims = _checked_dims(function, x, row)
    op = _add_differentiable if torch.is_grad_enabled() else _add_infer
    return op(x, residual, weight, bias, dims, eps, centred, None, dispatch.validate_backend(backend))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``F.layer_norm(x, normalized_shape, weight, bias, eps) + residual``.

    x: [*, *normalized_shape], a floating dtype; residual: of x's shape, or None; any strides, rows of which
    are read where they lie. weight, bias: of ``normalized_shape`` and any floating dtype. The result is
    contiguous, as stock's is. Differentiable once, in all tensors; computed in float32 at least and rounded
    once. Raises ``RuntimeError`` (as stock), ``ValueError`` and ``TypeError`` for what does not fit.
    """
    row = _row(normalized_shape)
    if _stock_serves(x, backend):
        y = F.layer_norm(x, row, weight, bias, eps)
        return y if residual is None else y + residual
    return _normalise("layer_norm", x, residual, row, weight, bias, eps, True, backend)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``F.rms_norm(x, normalized_shape, weight, eps) + residual``: see ``layer_norm``. eps None is that of
    the dtype which is computed in."""
    row = _row(normalized_shape)
    if _stock_serves(x, backend):
        y = F.rms_norm(x, row, weight, eps)
        return y if residual is None else y + residual
    return _normalise("rms_norm", x, residual, row, weight, None, rms_eps(eps, x), False, backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(layer norm of s, s), s = x + residual as stock rounds it: two reads and two writes.

    residual: of x's shape, any floating dtype; the rest as in ``layer_norm``.
    """
    row = _row(normalized_shape)
    if _stock_serves(x, backend) or residual.shape != x.shape:
        s = x + residual
        return layer_norm(s, row, weight, bias, eps, backend=backend), s
    return _add_and_normalise("add_layer_norm", x, residual, row, weight, bias, eps, True, backend)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(RMS norm of s, s), s = x + residual: see ``add_layer_norm``."""
    row = _row(normalized_shape)
    if _stock_serves(x, backend) or residual.shape != x.shape:
        s = x + residual
        return rms_norm(s, row, weight, eps, backend=backend), s
    eps = rms_eps(eps, x, residual)
    return _add_and_normalise("add_rms_norm", x, residual, row, weight, None, eps, False, backend)


# --- what rewritten networks call ---------------------------------------------------------------------------

LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)


def call_layer_norm(norm: nn.Module, x: Tensor, residual: Tensor | None = None, backend: str = "auto"):
    """``norm(x)`` or, with a residual, ``(norm(s), s)`` with ``s = x + residual``; norm a stock LayerNorm or
    RMSNorm.

    The module itself runs where a hook would be skipped, and for tensors that are not plain.
    """
    stock = norm.__class__ not in LAYER_NORMS or has_hooks(norm) or _has_any_global_hook()
    plain = not stock and x.__class__ is Tensor
    if plain and is_inference() and (_memory or not dispatch.leaves_to_stock(x, backend)):
        parameters, eps = norm._parameters, norm.eps
        tensors = (x, residual, parameters.get("weight"), parameters.get("bias"))
        options = (norm.__class__, norm.normalized_shape, eps, backend)
        remembered = _memory.get((id(norm), x.shape))
        if remembered is not None and remembered.serves(tensors, options):
            return remembered.call(tensors)
        if not watched(x) and not _stock_serves(x, backend):
            call = _recorded(tensors, *options)
            if call is not None:
                _memory.keep((id(norm), x.shape), call, tensors, options)
                return call(tensors)
    if stock or not isinstance(x, Tensor):
        if residual is None:
            return norm(x)
        s = x + residual
        return norm(s), s
    centred = norm.__class__ is nn.LayerNorm
    vectors = (norm.weight, norm.bias) if centred else (norm.weight,)
    if residual is None:
        function = layer_norm if centred else rms_norm
        return function(x, norm.normalized_shape, *vectors, norm.eps, backend=backend)
    function = add_layer_norm if centred else add_rms_norm
    return function(x, residual, norm.normalized_shape, *vectors, norm.eps, backend=backend)


_memory = dispatch.Memory()


def _recorded(tensors: tuple, cls: type, row: tuple, eps: float | None, backend: str):
    """What repeats a call of a norm of this class; None where nothing does."""
    x, residual = tensors[:2]
    if x.shape[-len(row) :] != row:  # which is an error
        return None
    if residual is None:
        body = _infer_body
    elif residual.__class__ is Tensor and residual.shape == x.shape:
        body = _add_infer_body
    else:
        return None
    if cls is nn.RMSNorm:
        eps = rms_eps(eps, *[t for t in (x, residual) if t is not None])
    return body.recorded(*tensors, len(row), eps, cls is nn.LayerNorm, None, backend)


# --- modules ------------------------------------------------------------------------------------------------


class _FromStock:
    """``from_stock`` of the modules below, whose second base is the stock module."""

    @classmethod
    def from_stock(cls, module: nn.Module, *, backend: str = "auto"):
        """The fused module with the settings of a stock one, and its parameters, which the two share."""
        stock = nn.LayerNorm if issubclass(cls, nn.LayerNorm) else nn.RMSNorm
        if type(module) is not stock:
            raise TypeError(
                f"{cls.__name__}.from_stock: got {type(module).__name__}, expected {stock.__name__}"
            )
        self = cls(module.normalized_shape, module.eps, False, backend=backend)
        self.elementwise_affine = module.elementwise_affine
        for name, parameter in module._parameters.items():
            setattr(self, name, parameter)
        return self.train(module.training)


class LayerNorm(_FromStock, nn.LayerNorm):
    """``nn.LayerNorm``: its arguments, parameters and results. ``LayerNorm(768)(x)``; with a second tensor,
    ``LayerNorm(768)(x, residual)``, that is added behind."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.backend = dispatch.validate_backend(backend)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [*, *normalized_shape], residual of its shape or None -> a tensor like input."""
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual,
            backend=self.backend,
        )  # fmt: skip


class AddLayerNorm(LayerNorm):
    """Residual addition and layer norm: ``AddLayerNorm(768)(x, residual)`` is ``(norm(s), s)`` with
    ``s = x + residual``. Arguments and parameters are ``nn.LayerNorm``'s."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """input, residual [*, *normalized_shape] -> (normalised sum, sum)."""
        return add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend
        )


class RMSNorm(_FromStock, nn.RMSNorm):
    """``nn.RMSNorm``: its arguments, parameters and results; with a second tensor that is added behind."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.backend = dispatch.validate_backend(backend)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [*, *normalized_shape], residual of its shape or None -> a tensor like input."""
        return rms_norm(
            input, self.normalized_shape, self.weight, self.eps, residual=residual, backend=self.backend
        )


class AddRMSNorm(RMSNorm):
    """Residual addition and RMS norm: ``AddRMSNorm(4096)(x, residual)`` is ``(norm(s), s)`` with
    ``s = x + residual``. Arguments and parameters are ``nn.RMSNorm``'s."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """input, residual [*, *normalized_shape] -> (normalised sum, sum)."""
        return add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps, backend=self.backend
        )
