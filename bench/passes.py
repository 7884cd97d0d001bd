"""How often an op goes over its operands: the conventions behind every traffic figure.

The rule is one pass: a dispatched op reads each tensor argument once, writes each result once and is one
kernel launch. What follows is the whole of the exceptions. They hold for what an op must move whatever its
algorithm; caches, halo re-reads, workspaces of vendor libraries and the like are left out, for eager and
fused alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PASSES", "Cost", "Pass", "bind", "cost_of", "nbytes", "tensors_in"]


@dataclass(frozen=True)
class Pass:
    """One sweep over the data, and one launch.

    reads: the arguments that it reads.
    writes: arguments that it changes although the op's schema does not say so.
    when: the op's bool argument that this pass depends on. Where it is false for all of an op's passes, the
        op is one pass like any other (batch norm by its running statistics).
    results: the entries of ``output_mask`` of which one must be asked for, else the pass does not run.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    when: str | None = None
    results: tuple[int, ...] | None = None


_RUNNING = ("running_mean", "running_var")
_SAVED = ("save_mean", "save_invstd", "save_var")


def _batch_norm(training: str | None) -> tuple[Pass, ...]:
    """Statistics need all of the input before the first value can be normalised: two passes in training."""
    statistics = Pass(("input", *_RUNNING), writes=_RUNNING, when=training)
    return statistics, Pass(("input", "weight", "bias"), when=training)


def _batch_norm_backward(grad: str, training: str | None) -> tuple[Pass, ...]:
    """The two sums over (dy, x) come first, then dx from dy and x again."""
    sums = Pass((grad, "input", *_SAVED), when=training)
    return sums, Pass((grad, "input", "weight", *_SAVED), when=training, results=(0,))


def _attention_backward(grad: str) -> tuple[Pass, ...]:
    """The row sums of dO·O come first; dO is then read again beside Q, K and V."""
    row_sums = Pass((grad, "out"))
    return row_sums, Pass((grad, "query", "key", "value", "attn_bias", "attn_mask", "logsumexp"))


PASSES: Mapping[str, tuple[Pass, ...]] = {
    "aten::native_batch_norm": _batch_norm("training"),
    "aten::_native_batch_norm_legit": _batch_norm("training"),
    "aten::cudnn_batch_norm": _batch_norm("training"),
    "aten::_batch_norm_with_update": _batch_norm(None),
    "aten::native_batch_norm_backward": _batch_norm_backward("grad_out", "train"),
    "aten::cudnn_batch_norm_backward": _batch_norm_backward("grad_output", None),
    "aten::batch_norm_backward": _batch_norm_backward("grad_out", "update"),
    # dgrad, wgrad and the bias gradient are three computations, each over all of dY.
    "aten::convolution_backward": (
        Pass(("grad_output", "weight"), results=(0,)),
        Pass(("grad_output", "input"), results=(1,)),
        Pass(("grad_output",), results=(2,)),
    ),
    "aten::linear_backward": (
        Pass(("grad_output", "weight"), results=(0,)),
        Pass(("grad_output", "self"), results=(1,)),
        Pass(("grad_output",), results=(2,)),
    ),
    # A row fits on chip, so the forward is one pass; the gradients of weight and bias run down the columns.
    "aten::native_layer_norm_backward": (
        Pass(("grad_out", "input", "mean", "rstd", "weight"), results=(0,)),
        Pass(("grad_out", "input", "mean", "rstd"), results=(1, 2)),
    ),
    "aten::native_group_norm": (Pass(("input",)), Pass(("input", "weight", "bias"))),
    "aten::native_group_norm_backward": (
        Pass(("grad_out", "input", "mean", "rstd")),
        Pass(("grad_out", "input", "mean", "rstd", "weight"), results=(0,)),
    ),
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward("grad_out"),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward("grad_out"),
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward("grad_out_"),
    "aten::_scaled_dot_product_cudnn_attention_backward": _attention_backward("grad_out"),
}


def _aten(names: str) -> list[str]:
    return [f"aten::{name}" for name in names.split()]


# Ops whose ``self`` gives a shape, or a place to write, and is not read.
SELF_UNREAD = frozenset(
    _aten(
        "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward "
        "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
        "copy_ fill_ zero_ bernoulli_ normal_ uniform_ random_ exponential_ _foreach_copy_ _foreach_zero_ "
        "zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_full"
    )
)

# Batch norms that, by their running statistics, leave the saved ones empty; on meta tensors they look
# written.
STATISTICS_UNWRITTEN = frozenset(
    _aten("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_no_update")
)

# Ops that touch only as many elements of the first argument as the second one (or the result) has.
PARTIAL: Mapping[str, tuple[str, str]] = {
    "aten::embedding": ("weight", "result"),
    "aten::index": ("self", "result"),
    "aten::index_select": ("self", "result"),
    "aten::gather": ("self", "result"),
    "aten::index_put_": ("self", "values"),
    "aten::index_add_": ("self", "source"),
    "aten::index_copy_": ("self", "source"),
    "aten::scatter_": ("self", "index"),
    "aten::scatter_add_": ("self", "src"),
}

# Optimizers whose schema marks the gradients as written, for the sake of a loss scaler.
GRADS_UNWRITTEN = frozenset(_aten("_fused_adam_ _fused_adamw_ _fused_sgd_ _fused_adagrad_"))

# Memory is set aside, or its description changed: nothing moves. Views are recognised by their schema.
FREE = frozenset(
    _aten(
        "as_strided_ t_ transpose_ squeeze_ unsqueeze_ swapaxes_ detach_ "
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize_ resize_as_ set_ "
        "record_stream _local_scalar_dense equal _fused_sdp_choice _assert_async"
    )
)


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, and kernel launches."""

    read: int = 0
    written: int = 0
    launches: int = 0


def nbytes(tensor: Tensor) -> int:
    """Bytes behind a tensor; a dimension that was expanded (stride 0) counts once."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    sizes = (size if stride or not size else 1 for size, stride in zip(tensor.shape, tensor.stride()))
    return math.prod(sizes) * tensor.element_size()


def bind(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the op's schema."""
    return {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}


def cost_of(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Cost:
    """What one call of an op costs by the rules above; ``Cost()`` for views and other free ops."""
    schema, name = func._schema, func._schema.name
    if name in FREE:
        return Cost()
    arguments = bind(func, args, kwargs)
    changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if name in GRADS_UNWRITTEN:
        changed.remove("grads")
    sweeps = [p for p in PASSES.get(name, ()) if p.when is None or arguments[p.when]]
    results = tensors_in(result)
    if name in STATISTICS_UNWRITTEN and not sweeps:
        results = results[:1]
    storages = {_storage(t) for value in arguments.values() for t in tensors_in(value)}
    written = sum(nbytes(t) for t in results if _storage(t) not in storages)
    if not changed and not written:
        return Cost()

    def size(argument: str) -> int:
        operands = tensors_in(arguments.get(argument))
        whole = sum(map(nbytes, operands))
        partial, measure = PARTIAL.get(name, (None, None))
        if argument != partial:
            return whole
        touched = results if measure == "result" else tensors_in(arguments.get(measure))
        return min(whole, sum(t.numel() for t in touched) * operands[0].element_size())

    written += sum(map(size, {*changed, *(argument for p in sweeps for argument in p.writes)}))
    if not written:  # empty tensors launch nothing
        return Cost()
    if not sweeps:
        unread = {a.name for a in schema.arguments if a.is_out}
        unread |= {"self"} if name in SELF_UNREAD else set()
        return Cost(sum(size(argument) for argument in arguments if argument not in unread), written, 1)
    if "output_mask" in arguments:
        mask = arguments["output_mask"]
        sweeps = [p for p in sweeps if p.results is None or any(mask[i] for i in p.results)]
    return Cost(sum(size(argument) for p in sweeps for argument in p.reads), written, len(sweeps))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an argument or a result: itself, or those in a list of them."""
    return list(_flatten(value))


def _flatten(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item)


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in; opaque layouts (oneDNN's) have none that can be asked for."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
