"""Batch norm with the batch's statistics, residual addition and activation: a training step's passes.

    mean, rstd = of z [N, C, ...] over everything but the channel
    y = act( (z − mean) · rstd · bn_weight + bn_bias + residual )

Forward, one pass over z for the statistics (none where the convolution that made z emits them) and one for
y. Backward, with u = bn(z) + residual, x̂ = (z − mean) · rstd and dv = dy · act'(u):

    dbn_bias = Σ dv,  dbn_weight = Σ dv · x̂,  dresidual = dv                     one pass over dy and z
    dz = bn_weight · rstd · (dv − Σ dv / count − x̂ · Σ dv · x̂ / count)            and one more

Saved are z, mean and rstd; u is computed again from z, or, where a residual was added, act'(u) of ReLU-like
activations is kept as one bit per element and the residual of others is kept. Batch norm with its running
statistics (frozen, in a network that trains) is the same without the two sums in dz. With a process group
the statistics and the sums are those over all ranks (SyncBatchNorm).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.synchronize import group_of, merge_over_ranks, sum_over_ranks

# Activations whose derivative is 0 or 1, so that a bit tells it.
_STEPWISE = ("relu", "relu6")


class Normalization(NamedTuple):
    """One application of a batch norm: what it takes to normalise z, and to go back through it.

    mean, rstd: [C], float32 at least. count: how many values each statistic is of, 1 element; None where
    those are z's own. batch: the statistics are the batch's (they depend on z). group: name of the process
    group that they are taken over, "" for this process alone.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    count: Tensor | None
    batch: bool
    group: str

    @classmethod
    def by_running_statistics(cls, mean, var, weight, bias, eps: float) -> Normalization:
        """Of a batch norm in evaluation."""
        wide = torch.promote_types(var.dtype, torch.float32)
        return cls(mean.to(wide), torch.rsqrt(var.to(wide) + eps), weight, bias, None, False, "")


class Pending(NamedTuple):
    """act(bn(z)), not computed yet, for the one convolution that reads it."""

    z: Tensor
    norm: Normalization
    activation: str
    negative_slope: float
    backend: str

    def compute(self) -> Tensor:
        """The tensor it stands for, by one pass."""
        return add_act(self.z, self.norm, None, self.activation, self.negative_slope, self.backend)


# --- the passes, each an op ---------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A [C] vector in the shape that broadcasts over x."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _wide_per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return per_channel(vector.to(_wide(x)), x)


def _over_pixels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _vectors_like(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=_wide(x)) for _ in range(count))


@dispatch.replays(tensors=3)
def _statistics_body(x, running_mean, running_var, momentum, eps, merged, backend):
    if not x.numel():  # a rank without samples
        return tuple(torch.zeros_like(v) for v in _vectors_like(x, 2))
    if backend == "triton":
        from fastnets.kernels import batch_norm_training as kernels

        return finish_statistics(
            kernels.channel_statistics(x), running_mean, running_var, momentum, eps, merged
        )
    values = x.to(_wide(x))
    var, mean = torch.var_mean(values, _over_pixels(x), correction=0)
    count = x.numel() // x.shape[1]
    if merged:
        return mean, var * count
    _update_running(mean, var, count, running_mean, running_var, momentum)
    return mean, torch.rsqrt(var + eps)


def finish_statistics(statistics, running_mean, running_var, momentum: float, eps: float, merged: bool):
    """A kernel's per-tile statistics as (mean, rstd), running statistics updated; or merged, (mean, M2)."""
    from fastnets.kernels import batch_norm_training as kernels

    if merged:
        whole = kernels.merge_statistics(statistics)
        return whole.mean.view(-1), whole.m2.view(-1)
    return kernels.finalize_statistics(statistics, running_mean, running_var, momentum=momentum, eps=eps)


def _update_running(mean, var, count, running_mean, running_var, momentum) -> None:
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (count / (count - 1)) if not isinstance(count, Tensor) else var * count / (count - 1)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _statistics_fake(x, running_mean, running_var, momentum, eps, merged, backend):
    return _vectors_like(x, 2)


batch_statistics = dispatch.register(
    "batch_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "float eps, bool merged, str backend) -> (Tensor, Tensor)",
    _statistics_body,
    _statistics_fake,
)


@dispatch.replays(tensors=5)
def _finalize_body(mean, m2, count, running_mean, running_var, momentum, eps, backend):
    if backend == "triton":
        from fastnets.kernels import batch_norm_training as kernels

        statistics = kernels.Statistics(mean, m2, count)
        return kernels.finalize_statistics(statistics, running_mean, running_var, momentum=momentum, eps=eps)
    total, parts, weights = count.sum(), mean.double(), count.double()[:, None]
    whole = (parts * weights).sum(0) / total
    var = (m2 + (parts - whole).square() * weights).sum(0) / total
    _update_running(whole, var, total, running_mean, running_var, momentum)
    return whole.to(mean.dtype), torch.rsqrt(var + eps).to(mean.dtype)


_finalize = dispatch.register(
    "finalize_statistics(Tensor mean, Tensor m2, Tensor count, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, str backend) -> (Tensor, Tensor)",
    _finalize_body,
    lambda mean, *rest: (torch.empty_like(mean[0]), torch.empty_like(mean[0])),
)


def _preactivation(x, mean, rstd, bn_weight, bn_bias, residual) -> tuple[Tensor, Tensor]:
    """(x̂, u), wide."""
    centred = (x.to(_wide(x)) - _wide_per_channel(mean, x)) * _wide_per_channel(rstd, x)
    u = centred if bn_weight is None else centred * _wide_per_channel(bn_weight, x)
    if bn_bias is not None:
        u = u + _wide_per_channel(bn_bias, x)
    return centred, u if residual is None else u + residual


@dispatch.replays(tensors=6)
def _normalize_body(x, mean, rstd, bn_weight, bn_bias, residual, activation, negative_slope, mask, backend):
    if backend == "triton" and x.numel():
        from fastnets.kernels.batch_norm_training import normalize_add_act

        result = normalize_add_act(
            x, mean, rstd, bn_weight, bn_bias, residual,
            activation=activation, negative_slope=negative_slope, mask=mask,
        )  # fmt: skip
        return result if mask else (result, x.new_empty(0, dtype=torch.uint8))
    _, u = _preactivation(x, mean, rstd, bn_weight, bn_bias, residual)
    y = torch.empty_like(x).copy_(activation_of(activation).forward(u, negative_slope))
    bits = _empty_mask(x, mask)
    if mask:
        slope = activation_of(activation).backward(torch.ones_like(u), u, negative_slope)
        flat = torch.zeros(8 * bits.numel(), dtype=torch.uint8, device=x.device)
        in_memory = torch.empty_like(y, dtype=torch.uint8).copy_(slope != 0)
        flat[: x.numel()] = in_memory.as_strided((x.numel(),), (1,))
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
        torch.sum(flat.view(-1, 8) * weights, 1, dtype=torch.uint8, out=bits)
    return y, bits


def _empty_mask(x: Tensor, mask: bool) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8 if mask else 0, dtype=torch.uint8)


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of ``mask`` as a 0/1 tensor of ``like``'s shape, laid out as a dense tensor of its format."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    dense = torch.empty_like(like, dtype=torch.uint8)
    return bits.view(-1)[: like.numel()].as_strided(dense.shape, dense.stride())


normalize = dispatch.register(
    "normalize_add_act(Tensor x, Tensor mean, Tensor rstd, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, str activation, float negative_slope, bool mask, str backend) -> (Tensor, Tensor)",
    _normalize_body,
    lambda x, *rest: (torch.empty_like(x), _empty_mask(x, rest[-2])),
)


@dispatch.replays(tensors=8)
def _sums_body(
    dy, x, mean, rstd, bn_weight, bn_bias, residual, mask, activation, negative_slope, keep, backend
):
    if backend == "triton" and x.numel():
        from fastnets.kernels.batch_norm_backward import bn_backward_sums

        dv, sums = bn_backward_sums(
            dy, x, mean, rstd, bn_weight, bn_bias, residual, mask,
            activation=activation, negative_slope=negative_slope, keep=keep,
        )  # fmt: skip
        return (dy.new_empty(0) if dv is None else dv), sums
    centred, u = _preactivation(x, mean, rstd, bn_weight, bn_bias, residual)
    if mask is not None:
        dv = dy.to(_wide(x)) * _unpacked(mask, x)
    else:
        dv = activation_of(activation).backward(dy.to(_wide(x)), u, negative_slope)
    dv = dv.to(dy.dtype) if keep else dv
    wide = dv.to(_wide(x))
    sums = torch.stack([wide.sum(_over_pixels(x)), (wide * centred).sum(_over_pixels(x))])
    return torch.empty_like(x, dtype=dy.dtype).copy_(dv) if keep else dy.new_empty(0), sums


def _sums_fake(
    dy, x, mean, rstd, bn_weight, bn_bias, residual, mask, activation, negative_slope, keep, backend
):
    dv = torch.empty_like(x, dtype=dy.dtype) if keep else dy.new_empty(0)
    return dv, x.new_empty((2, x.shape[1]), dtype=_wide(x))


sums_of = dispatch.register(
    "bn_backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, Tensor? mask, str activation, float negative_slope, bool keep, str backend) "
    "-> (Tensor, Tensor)",
    _sums_body,
    _sums_fake,
)


@dispatch.replays(tensors=8)
def _input_gradient_body(
    dy, x, mean, rstd, bn_weight, bn_bias, sums, count, activation, negative_slope, affine, backend
):
    """(dz, the sums as gradients of bn_bias and bn_weight where their dtype is asked for)."""
    vectors = _affine_gradients(sums, affine, x)
    if backend == "triton" and x.numel():
        from fastnets.kernels.batch_norm_backward import bn_backward_input

        dz = bn_backward_input(
            dy, x, mean, rstd, bn_weight, bn_bias, sums,
            x.numel() // x.shape[1] if count is None else count,
            activation=activation, negative_slope=negative_slope, batch_statistics=sums is not None,
            affine=None if affine is None else vectors,
        )  # fmt: skip
        return dz, vectors
    centred, u = _preactivation(x, mean, rstd, bn_weight, bn_bias, None)
    dv = activation_of(activation).backward(dy.to(_wide(x)), u, negative_slope)
    if sums is not None:
        share = sums / (x.numel() // x.shape[1] if count is None else count)
        dv = dv - _wide_per_channel(share[0], x) - centred * _wide_per_channel(share[1], x)
    scale = rstd if bn_weight is None else rstd * bn_weight.to(rstd.dtype)
    if affine is not None:
        vectors.copy_(sums)
    return torch.empty_like(x).copy_(dv * _wide_per_channel(scale, x)), vectors


def _affine_gradients(sums: Tensor | None, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if dtype is None else torch.empty_like(sums, dtype=dtype)


input_gradient = dispatch.register(
    "bn_backward_input(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? sums, Tensor? count, str activation, float negative_slope, ScalarType? affine, str backend) "
    "-> (Tensor, Tensor)",
    _input_gradient_body,
    lambda dy, x, *rest: (torch.empty_like(x), _affine_gradients(rest[4], rest[-2], x)),
)


def gradients_below(
    dv: Tensor,
    z: Tensor,
    vectors: tuple,
    sums: Tensor | None,
    count: Tensor | None,
    batch: bool,
    group: str,
    activation: str,
    negative_slope: float,
    backend: str,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (z, bn_weight, bn_bias), those that are wanted, from dv (or dy, with its activation).

    vectors: (mean, rstd, bn_weight, bn_bias). sums: Σ dv and Σ dv · x̂ of this process; None where neither
    the vectors' gradients are wanted nor the statistics are the batch's.
    """
    bn_weight, bn_bias = vectors[2:]
    wants_z, wants_weight, wants_bias = wants
    whole = sums
    if group and sums is not None:
        whole = sum_over_ranks(sums, group)
    own = bn_weight if wants_weight else bn_bias if wants_bias else None
    # One launch rounds them, where they are what it reads anyway.
    rounds = own is not None and wants_z and batch and not group and own.dtype != sums.dtype
    dz = None
    if wants_z:
        dz, rounded = input_gradient(
            dv, z, *vectors, whole if batch else None, count, activation, negative_slope,
            own.dtype if rounds else None, backend,
        )  # fmt: skip
        sums = rounded if rounds else sums
    dweight = sums[1].to(bn_weight.dtype) if wants_weight else None
    dbias = sums[0].to(bn_bias.dtype) if wants_bias else None
    return dz, dweight, dbias


# --- forward and backward together --------------------------------------------------------------------------

_SCHEMA = (
    "bn_add_act_training(Tensor x, Tensor? residual, Tensor mean, Tensor rstd, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? count, bool batch, str group, str activation, float negative_slope, "
    "str backend) -> Tensor"
)


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, mean, rstd, bn_weight, bn_bias, count, batch, group, activation, slope, backend):
        mask = residual is not None and activation in _STEPWISE
        with torch._C._AutoDispatchBelowAutograd():
            return normalize(x, mean, rstd, bn_weight, bn_bias, residual, activation, slope, mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, mean, rstd, bn_weight, bn_bias, count, *options = inputs
        ctx.set_materialize_grads(False)
        mask = output[1]
        ctx.mark_non_differentiable(mask)
        ctx.masked = residual is not None and options[2] in _STEPWISE
        kept = None if ctx.masked or options[2] == "none" else residual
        ctx.save_for_backward(x, mask if ctx.masked else None, kept, mean, rstd, bn_weight, bn_bias, count)
        ctx.options = options
        ctx.adds = residual is not None
        ctx.given = None, None  # dv and its sums, from the one reader of y

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 12
        x, mask, residual, mean, rstd, bn_weight, bn_bias, count = ctx.saved_tensors
        batch, group, activation, slope, backend = ctx.options
        wants_x, wants_residual, _, _, wants_weight, wants_bias = ctx.needs_input_grad[:6]
        (given, sums), ctx.given = ctx.given, (None, None)
        if given is dy:
            activation = "none"  # the reader of y went through it already
        elif ctx.adds or wants_weight or wants_bias or (batch and wants_x):
            keep = ctx.adds and activation != "none"
            dv, sums = sums_of(
                dy, x, mean, rstd, bn_weight, bn_bias, residual, mask, activation, slope, keep, backend
            )
            if keep:
                dy, activation = dv, "none"
        dx, dweight, dbias = gradients_below(
            dy, x, (mean, rstd, bn_weight, bn_bias), sums, count, batch, group, activation, slope, backend,
            (wants_x, wants_weight, wants_bias),
        )  # fmt: skip
        return dx, dy if wants_residual else None, None, None, dweight, dbias, *[None] * 6


def _training_body(
    x, residual, mean, rstd, bn_weight, bn_bias, count, batch, group, activation, slope, backend
):
    return normalize(x, mean, rstd, bn_weight, bn_bias, residual, activation, slope, False, backend)[0]


class Made(NamedTuple):
    """How a tensor was made, y = act(bn(z) + residual), for a reader that goes back through that at once.

    mask: where act'(u) is 1, one bit per element of y; None where u = bn(z).
    """

    z: Tensor
    norm: Normalization
    mask: Tensor | None
    activation: str


# Not an attribute of y, which would be pickled with it.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def how_it_was_made(y: Tensor) -> Made | None:
    """How batch norm made ``y``, where a gradient that went through the activation may do so once more
    without harm, as one with another reader's gradient added to it would. None where ``y`` was written to
    since, by what sees the gradient first."""
    return _made.get(y) if type(y.grad_fn) is _Training._backward_cls else None


def _training_autograd(*args):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:6]):
        y, mask = _Training.apply(*args)
        x, residual, *norm, activation, _, _ = args
        if activation in (*_STEPWISE, "none") and not torch.compiler.is_compiling():
            masked = residual is not None and activation != "none"
            mean, rstd, weight, bias, count, batch, group = norm
            if not masked:
                mask = None
            kept = [None if t is None else t.detach() for t in (x, weight, bias)]
            norm = Normalization(mean, rstd, *kept[1:], count, batch, group)
            _made[y] = Made(kept[0], norm, mask, activation)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return _training(*args)


_training = dispatch.register(
    _SCHEMA, _training_body, lambda x, *rest: torch.empty_like(x), autograd=_training_autograd
)


def add_act(
    x: Tensor,
    norm: Normalization,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    backend: str,
) -> Tensor:
    """``act(bn(x) + residual)``, differentiable in x, the residual and the norm's weight and bias.

    x [N, C, ...] of 2 to 5 dimensions and a floating dtype, residual of its shape and dtype, any strides;
    the result lies in x's memory format. backend: "triton" or "reference".
    """
    mean, rstd, weight, bias, count, batch, group = norm
    return _training(
        x, residual, mean, rstd, weight, bias, count, batch, group, activation, negative_slope, backend
    )


# --- what a batch-norm module asks for ----------------------------------------------------------------------


def begin(bn: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """(running_mean, running_var, momentum) to be updated by one forward of ``bn``, as stock does it.

    Both None where ``bn`` is not to update any. Counts the batch. Momentum None is the cumulative average.
    """
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return None, None, 0.0
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return bn.running_mean, bn.running_var, 0.0 if momentum is None else momentum


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether ``bn`` would normalise by the batch's statistics now."""
    return bn.training or bn.running_mean is None


def normalization(bn: nn.Module, x: Tensor, backend: str) -> Normalization:
    """How ``bn`` normalises ``x`` now; batch statistics take a pass over ``x`` and update the running ones.

    Raises:
        ValueError: one value per channel, as stock raises.
    """
    if not uses_batch_statistics(bn):
        return frozen(bn)
    group = group_of(bn)
    if not group:
        F._verify_batch_size(x.shape)
    running_mean, running_var, momentum = begin(bn)
    with torch.no_grad():
        first, second = batch_statistics(
            x.detach(), running_mean, running_var, momentum, bn.eps, bool(group), backend
        )
    return from_statistics(bn, x, first, second, group, running_mean, running_var, momentum, backend)


def from_statistics(
    bn: nn.Module,
    z: Tensor,
    first: Tensor,
    second: Tensor,
    group: str,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    backend: str,
) -> Normalization:
    """The normalisation by statistics that were taken of ``z``: (mean, rstd), or with a group (mean, M2)."""
    count = None
    if group:
        own = torch.full((1,), z.numel() // z.shape[1], dtype=first.dtype, device=z.device)
        with torch.no_grad():
            statistics = merge_over_ranks((first[None], second[None], own), group)
            first, second = _finalize(*statistics, running_mean, running_var, momentum, bn.eps, backend)
            count = statistics[2].sum().view(1)
    if running_mean is not None and not torch.compiler.is_compiling():
        # Written by a kernel, which autograd does not see.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return Normalization(first, second, bn.weight, bn.bias, count, True, group)


def frozen(bn: nn.Module) -> Normalization:
    """Normalisation by the running statistics."""
    return Normalization.by_running_statistics(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
