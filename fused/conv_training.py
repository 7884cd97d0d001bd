"""Convolution and batch norm in training: fewer passes over the maps than one layer after another makes.

    z = conv2d(x, weight) + bias                   mean, rstd of z over N, P, Q
    y = act((z − mean) · rstd · bn_weight + bn_bias + residual)

x [N, C, H, W], weight [K, C/groups, R, S], z, y and residual [N, K, P, Q]. What is saved on the way:

* our convolution emits the statistics of z from its epilogue; after the vendor's one pass takes them;
* y is made in one pass (``fused.batch_norm_training``); where its only reader is the next convolution it may
  stay *pending*: that convolution normalises z itself, by a pass or while it loads (1×1), and need not
  save y, since the weight's gradient can normalise z again (``save="less"``). Backward, its input gradient's
  epilogue turns dy into dv = dy · act'(u) and sums Σ dv and Σ dv · x̂, so that no pass over dy is left;
* where x goes on to other readers (a residual), it goes on *through* the convolution, whose input gradient
  adds the others' gradient in its epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnets.fused import batch_norm_training as norms
from fastnets.fused import dispatch, onednn, packing
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import call_stock
from fastnets.fused.batch_norm_training import Pending
from fastnets.fused.ownership import has_private_gradient
from fastnets.fused.synchronize import group_of

aten = torch.ops.aten

SAVES = ("auto", "less")


# --- the gradients of a convolution, each an op -------------------------------------------------------------

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_PROLOGUE = (
    "Tensor? mean, Tensor? rstd, Tensor? bn_weight, Tensor? bn_bias, str activation, float negative_slope"
)


def _input_gradient_body(
    dy, weight, input_shape, stride, padding, dilation, groups, added,
    z, mask, mean, rstd, bn_weight, bn_bias, activation, negative_slope, backend,
):  # fmt: skip
    weight = weight.to(dy.dtype)
    if backend == "triton" and dy.numel():
        from fastnets.kernels.conv_backward import Normalized
        from fastnets.kernels.conv_backward import conv_input_gradient as launch
        from fastnets.kernels.conv_shape import Prologue

        normalized = None
        if z is not None:
            prologue = Prologue(mean, rstd, bn_weight, bn_bias, activation, negative_slope)
            normalized = Normalized(z, prologue, mask)
        result = launch(
            dy, weight, tuple(input_shape), stride=tuple(stride), padding=tuple(padding),
            dilation=tuple(dilation), groups=groups, added=added, normalized=normalized,
        )  # fmt: skip
        return (result, dy.new_empty(0)) if z is None else result
    shape_only = torch.empty(input_shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    dx = aten.convolution_backward(
        dy, shape_only, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    if added is not None:
        dx = dx.add_(added)
    dx = onednn.channels_last(dx)
    if z is None:
        return dx, dy.new_empty(0)
    return norms.sums_of(
        dx, z, mean, rstd, bn_weight, bn_bias, None, mask, activation, negative_slope, True,
        passes_on(backend),
    )  # fmt: skip


def _input_gradient_fake(dy, weight, input_shape, *rest):
    dx = dy.new_empty(input_shape).to(memory_format=torch.channels_last)
    z = rest[5]
    if z is None:
        return dx, dy.new_empty(0)
    return torch.empty_like(z, dtype=dy.dtype), rest[7].new_empty((2, input_shape[1]))


input_gradient = dispatch.register(
    f"conv_input_gradient(Tensor dy, Tensor weight, SymInt[] input_shape, {_GEOMETRY}, Tensor? added, "
    f"Tensor? z, Tensor? mask, {_PROLOGUE}, str backend) -> (Tensor, Tensor)",
    _input_gradient_body,
    _input_gradient_fake,
)


def _weight_gradient_body(
    dy, x, weight_shape, dtype, stride, padding, dilation, groups,
    mean, rstd, bn_weight, bn_bias, activation, negative_slope, backend,
):  # fmt: skip
    if backend == "triton" and dy.numel():
        from fastnets.kernels.conv_backward import conv_weight_gradient as launch
        from fastnets.kernels.conv_shape import Prologue

        prologue = None
        if mean is not None:
            prologue = Prologue(mean, rstd, bn_weight, bn_bias, activation, negative_slope)
        return launch(
            dy, x, tuple(weight_shape), stride=tuple(stride), padding=tuple(padding),
            dilation=tuple(dilation), groups=groups, prologue=prologue, dtype=dtype,
        )  # fmt: skip
    if mean is not None:
        x = norms.normalize(
            x, mean, rstd, bn_weight, bn_bias, None, activation, negative_slope, False, passes_on(backend)
        )[0]
    shape_only = torch.empty(
        weight_shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last
    )
    dw = aten.convolution_backward(
        dy, x, shape_only, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return onednn.channels_last(dw.to(dtype))


weight_gradient = dispatch.register(
    "conv_weight_gradient(Tensor dy, Tensor x, SymInt[] weight_shape, ScalarType dtype, "
    f"{_GEOMETRY}, {_PROLOGUE}, str backend) -> Tensor",
    _weight_gradient_body,
    lambda dy, x, shape, dtype, *rest: dy.new_empty(shape, dtype=dtype).to(memory_format=torch.channels_last),
)


# --- the convolution ----------------------------------------------------------------------------------------

_SCHEMA = (
    "conv_training(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? rstd, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? count, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"{_GEOMETRY}, str activation, float negative_slope, bool batch, str group, "
    "float momentum, float eps, str statistics, str save, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def output_shape(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of the convolution of x [N, C, H, W] by weight [K, C/groups, R, S]."""
    P, Q = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.shape[0], weight.shape[0], P, Q


class _Options(NamedTuple):
    """What the op takes after its tensors, in the schema's order.

    activation, negative_slope, batch, group: of the batch norm before the convolution, whose vectors are
    (mean, rstd, bn_weight, bn_bias, count); x is then its z. momentum, eps, statistics: of the one after
    it; statistics is "none", "final" (mean, rstd; running statistics are updated) or "merged" (mean, M2).
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    activation: str
    negative_slope: float
    batch: bool
    group: str
    momentum: float
    eps: float
    statistics: str
    save: str
    backend: str

    @property
    def geometry(self) -> tuple:
        return self[:4]


def _loads_normalized(weight: Tensor, options: _Options) -> bool:
    """Whether the convolution normalises while it loads: not past 1×1, where values are loaded R·S times."""
    return (
        options.backend == "triton"
        and tuple(weight.shape[2:]) == (1, 1)
        and tuple(options.padding) == (0, 0)
        and options.groups == 1
    )


def passes_on(backend: str) -> str:
    """What batch norm's passes run on where the convolution runs on ``backend``: vendors have none."""
    return "reference" if backend == "reference" else "triton"


@dispatch.replays(tensors=10)
def _conv_body(
    x, weight, bias, mean, rstd, bn_weight, bn_bias, count, running_mean, running_var, *rest
):  # fmt: skip
    options = _Options(*rest)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    ours = options.backend == "triton" and x.numel() > 0
    y, prologue = x.new_empty(0), None
    if mean is not None and ours and _loads_normalized(weight, options):
        from fastnets.kernels.conv_shape import Prologue

        prologue = Prologue(mean, rstd, bn_weight, bn_bias, options.activation, options.negative_slope)
    elif mean is not None:
        y, _ = norms.normalize(
            x, mean, rstd, bn_weight, bn_bias, None, options.activation, options.negative_slope, False,
            passes_on(options.backend),
        )  # fmt: skip
        x = y
    stride, padding, dilation = (tuple(pair) for pair in options[:3])
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": options.groups}
    updates = (running_mean, running_var, options.momentum, options.eps, options.statistics == "merged")
    first, second = x.new_empty(0), x.new_empty(0)
    if ours and (options.statistics != "none" or prologue is not None):
        from fastnets.kernels.conv_training import conv_statistics as launch

        z, statistics = launch(x, weight, bias, **geometry, prologue=prologue)
        if options.statistics != "none":
            first, second = norms.finish_statistics(statistics, *updates)
        return z, first, second, y
    if ours:
        from fastnets.kernels.conv import conv_bn_act as launch

        return launch(x, weight, bias, **geometry), first, second, y
    z = onednn.channels_last(F.conv2d(x, weight, bias, *options.geometry))
    if options.statistics != "none":
        first, second = norms.batch_statistics(z, *updates, passes_on(options.backend))
    return z, first, second, y


def _conv_fake(x, weight, bias, mean, rstd, bn_weight, bn_bias, count, running_mean, running_var, *rest):
    options = _Options(*rest)
    K = weight.shape[0]
    z = x.new_empty(output_shape(x, weight, *options.geometry[:3])).to(memory_format=torch.channels_last)
    made = mean is not None and not _loads_normalized(weight, options)
    y = torch.empty_like(x) if made else x.new_empty(0)
    vectors = 2 * [0 if options.statistics == "none" else K]
    wide = torch.promote_types(x.dtype, torch.float32)
    return z, *(x.new_empty(n, dtype=x.dtype if n == 0 else wide) for n in vectors), y


class _Conv(torch.autograd.Function):
    """forks: x is returned too, for its other readers, whose gradient then comes back through here. made: how
    x was made, by a batch norm whose gradient nobody sees but this: it is given dv and its sums for dy."""

    @staticmethod
    def forward(forks, made, *args):
        with torch._C._AutoDispatchBelowAutograd():
            results = _op(*args)
        return (*results, args[0].view_as(args[0])) if forks else results

    @staticmethod
    def setup_context(ctx, inputs, output):
        made, x, weight, _, mean, rstd, bn_weight, bn_bias, count, _, _, *rest = inputs[1:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:4])
        ctx.options = options = _Options(*rest)
        y = output[3]
        pending = mean is not None
        if not pending or y.numel() == 0 or options.save == "less":
            y = None
        # Of a pending input z is needed for batch norm's gradient; of another one only for the weight's.
        kept = x if pending or weight.requires_grad else None
        act, mask, z, ctx.below = (options.activation, options.negative_slope), None, x, None
        if made is not None:
            z, (mean, rstd, bn_weight, bn_bias, *_), mask, activation = made
            act, ctx.below = (activation, 0.0), x.grad_fn
        elif not pending:
            z = None
        ctx.save_for_backward(kept, y, weight, z, mask, mean, rstd, bn_weight, bn_bias, count)
        ctx.input_shape, ctx.act, ctx.pending = x.shape, act, pending

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dz, _first, _second, _y, forked=None):
        x, y, weight, z, mask, *vectors, count = ctx.saved_tensors
        options, pending = ctx.options, ctx.pending
        wants = ctx.needs_input_grad[2:]
        wants_x, wants_weight, wants_bias, _, _, wants_bn_weight, wants_bn_bias = wants[:7]
        if dz is None:
            return None, None, forked, *[None] * (len(wants) - 1)
        dx = dw = dbn_weight = dbn_bias = None
        if wants_weight:
            recomputes = pending and y is None
            # Vendors do not normalise what they load.
            backend = "triton" if recomputes and options.backend == "library" else options.backend
            dw = weight_gradient(
                dz, x if y is None else y, weight.shape, weight.dtype, *options.geometry,
                *(vectors if recomputes else (None,) * 4), *ctx.act, backend,
            )  # fmt: skip
        if wants_x or wants_bn_weight or wants_bn_bias:
            act = ctx.act
            # Only our kernels go through the activation at once; after a vendor's, the passes over z do.
            passes = pending and options.backend == "library"
            through = (z, mask, *vectors) if z is not None and not passes else (None,) * 6
            dx, sums = input_gradient(
                dz, weight, ctx.input_shape, *options.geometry, forked, *through, *act, options.backend
            )
            if passes:
                _, sums = norms.sums_of(dx, z, *vectors, None, None, *act, False, "triton")
            elif pending:
                act = ("none", 0.0)
            if ctx.below is not None:
                ctx.below.given = dx, sums
            elif pending:
                dx, dbn_weight, dbn_bias = norms.gradients_below(
                    dx, z, tuple(vectors), sums, count, options.batch, options.group, *act,
                    passes_on(options.backend), (wants_x, wants_bn_weight, wants_bn_bias),
                )  # fmt: skip
        dbias = dz.sum((0, 2, 3)) if wants_bias else None
        gradients = (dx if wants_x else None, dw, dbias, None, None, dbn_weight, dbn_bias)
        return None, None, *gradients, *[None] * (len(wants) - 7)


def _autograd(*args):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:7]):
        return _Conv.apply(False, None, *args)[:4]
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return torch.utils.flop_counter.conv_flop_count(x_shape, weight_shape, out_shape[0])


_op = dispatch.register(_SCHEMA, _conv_body, _conv_fake, autograd=_autograd, flops=_flops)


# --- what rewritten networks call ---------------------------------------------------------------------------


def implementation(x: Tensor, weight: Tensor, groups: int, backend: str) -> str:
    """What serves a layer in training: "triton", "library" (the vendor's convolution between our passes),
    "reference" or "stock" (the modules themselves).

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = dispatch.requested(backend)
    ours = dispatch.ours_take((x.dtype,), wanted)
    if wanted in ("triton", "reference"):
        return wanted
    if dispatch.device_type_of(x) != "cuda" or not ours:
        return "stock"
    # Unmeasured: ours where vendors are weak.
    depthwise = groups > 1 and weight.shape[1] == 1
    return "triton" if depthwise and wanted == "auto" else "library"


def gradient_backend(x: Tensor, weight: Tensor, groups: int, backend: str) -> str:
    """What computes a convolution's gradients: "triton", "library" or "reference", the last two by ATen."""
    how = implementation(x, weight, groups, backend)
    return "reference" if how == "stock" else how


def train(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor | Pending,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    backend: str,
    *,
    defers: bool = False,
    forks: bool = False,
    sole: bool = False,
    save: str = "auto",
) -> object:
    """``act(bn(conv(x)) + residual)`` in training; the layers are plain and their dtypes agree.

    defers: the one reader is a convolution that takes a :class:`Pending`. forks: return (result, x), the x
    that other readers are to read. sole: all other readers of x in its container read it through this.
    """
    z = x.z if x.__class__ is Pending else x
    weight, bias = conv.weight, conv.bias
    packing.forget(weight)  # a training step may follow
    group = "" if bn is None else group_of(bn)
    how = implementation(z, weight, conv.groups, backend)
    if how == "stock" and group:
        how = "reference"  # stock's SyncBatchNorm runs on GPUs only
    if how == "stock":
        x = inputs = _computed(x)
        if dispatch.device_type_of(x) == "cpu" and x.dtype != torch.float64:
            inputs = x.contiguous(memory_format=torch.channels_last)  # the layout that all layers then follow
        y = call_stock(bn, act, conv(inputs), residual, activation, negative_slope)
        return (y, x) if forks else y
    passes = passes_on(how)
    other = x
    batch = bn is not None and norms.uses_batch_statistics(bn)
    if how == "library" and not (x.__class__ is Pending and save == "less"):
        z = conv._conv_forward(_computed(x), weight, bias)
        norm = None if bn is None else norms.normalization(bn, z, passes)
    else:
        made = None
        if sole and has_private_gradient(x):
            made = norms.how_it_was_made(x)
        padding = conv.padding
        if conv.padding_mode != "zeros" or padding.__class__ is str:
            x, padding = explicit_padding(conv, _computed(x))
            made = None
        geometry = (conv.stride, padding, conv.dilation)
        if batch and not group:
            source = x.z if x.__class__ is Pending else x
            F._verify_batch_size(torch.Size(output_shape(source, weight, *geometry)))
        running = norms.begin(bn) if batch else (None, None, 0.0)
        statistics = "none" if not batch else "merged" if group else "final"
        eps = 0.0 if bn is None else bn.eps
        padded = x is not other  # then other readers go past the convolution
        z, first, second, through = convolve(
            x, weight, bias, running, (*geometry, conv.groups), eps, statistics, save, how,
            forks and not padded, made,
        )  # fmt: skip
        other = other if padded else through
        norm = None
        if batch:
            norm = norms.from_statistics(bn, z, first, second, group, *running, passes)
        elif bn is not None:
            norm = norms.frozen(bn)
    if norm is None:
        y = z if residual is None else z + residual
        y = activation_of(activation).forward(y, negative_slope) if act is None else act(y)
    elif defers and residual is None and (how == "triton" or save == "less"):
        y = Pending(z, norm, activation, negative_slope, passes)
    else:
        y = norms.add_act(z, norm, residual, activation, negative_slope, passes)
    return (y, other) if forks else y


def convolve(
    x: Tensor | Pending,
    weight: Tensor,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, float],
    geometry: tuple,
    eps: float,
    statistics: str,
    save: str,
    backend: str,
    forks: bool = False,
    made: norms.Made | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | Pending]:
    """(z, the two statistics, the x for other readers); see the top of this file."""
    vectors = (None,) * 5
    act: tuple = ("none", 0.0, False, "")
    source = x
    if x.__class__ is Pending:
        norm = x.norm
        vectors = (norm.mean, norm.rstd, norm.weight, norm.bias, norm.count)
        act = (x.activation, x.negative_slope, norm.batch, norm.group)
        source = x.z
    if not source.is_meta and torch.is_autocast_enabled(source.device.type):
        cast = source.to(torch.get_autocast_dtype(source.device.type))
        if cast is not source:
            forks, made, source = False, None, cast
    running_mean, running_var, momentum = running
    arguments = (
        source, weight, bias, *vectors, running_mean, running_var, *geometry, *act, momentum, eps,
        statistics, save, backend,
    )  # fmt: skip
    forks = forks and x.__class__ is not Pending and not torch.compiler.is_compiling()
    if torch.is_grad_enabled() and source.requires_grad and (forks or made is not None):
        z, first, second, _, *other = _Conv.apply(forks, made, *arguments)
        return z, first, second, other[0] if forks else x
    z, first, second, _ = _op(*arguments)
    return z, first, second, x


def _computed(x: Tensor | Pending) -> Tensor:
    return x.compute() if x.__class__ is Pending else x


def explicit_padding(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where equal numbers of zeros would not do, and the numbers of zeros still to add."""
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
    if conv.padding.__class__ is not str:
        return x, conv.padding
    if conv.padding == "valid":
        return x, (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)
