"""Concatenation of channels in one channels-last buffer: grown layer by layer (DenseNet), or written into by
the convolutions themselves (Inception, SqueezeNet).

Where convolutions are concatenated that nobody else reads, each writes into its slice of the channels, and
only what else is concatenated is copied there.

Chains of concatenations are another matter. Stock copies all that there is for every layer that appends to
it: ``x = cat((x, layer(x)), 1)`` moves the block's first channels as often as the block has layers. Here the
first of a chain of concatenations makes room for all of them, the following ones write what is new behind
what is there, and each result is a view of the buffer's first channels.

Both are for inference, the slices for CUDA alone, the chains for the CPU in fp32, too. Elsewhere, and where
shapes, dtypes or classes are not what the pattern expects, ``torch.cat`` runs. The values of a chain before
the last one are views, so the pattern asks that nobody reads one after the next has been made, and that
nobody to whom layout shows reads one at all.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor, fx

from fastnets.fused import composed, dispatch
from fastnets.fused.batch_norm import call_bn_add_act, in_transform, watched
from fastnets.fused.chains import Fusion, may_write_between, put_one_call
from fastnets.fused.conv import (
    Options,
    Weights,
    call_conv_bn_act,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    in_dtype_of,
    validate_convolution,
    weights_of,
)
from fastnets.fused.conv_training import output_shape
from fastnets.fused.excited_conv import call_excited_conv
from fastnets.fused.preactivation import call_preactivated_conv

# --- convolutions that write into slices --------------------------------------------------------------------

_SCHEMA = (
    "(Tensor[] x, Tensor?[] layers, int[] geometry, float[] eps, str[] activation, float[] negative_slope, "
    "str backend) -> Tensor"
)


def _parts(tensors: tuple, options: tuple) -> list[tuple]:
    """Of each part (x, its six layer tensors, its ``Options``); the weight is None where x is no input of a
    convolution, but goes in as it is."""
    geometry, eps, activation, negative_slope = options
    count = len(eps)
    parts = []
    for i in range(count):
        stride, padding, dilation = (tuple(geometry[7 * i + j : 7 * i + j + 2]) for j in (0, 2, 4))
        groups = geometry[7 * i + 6]
        named = Options(stride, padding, dilation, groups, eps[i], activation[i], negative_slope[i])
        layer = tensors[count + 6 * i : count + 6 * i + 6]
        parts.append((tensors[i], Weights(*layer), named))
    return parts


@functools.cache
def _body_of(count: int):
    return dispatch.replays(tensors=7 * count)(functools.partial(_run, count))


def _run(count: int, *arguments) -> Tensor:
    *options, backend = arguments[7 * count :]
    parts = _parts(arguments[: 7 * count], options)
    shape = _shape_of(parts)
    x = parts[0][0]
    if not math.prod(shape) or composed.choose(x, backend) != "triton":
        return _composed(conv_below_autograd, parts, backend)
    from fastnets.kernels.conv import conv_bn_act as launch
    from fastnets.kernels.conv import writes_slices

    room = Room(x, shape)
    for x, weights, (stride, padding, dilation, groups, *rest) in parts:
        if weights.weight is None:
            room.append((x,))
            continue
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        layer = (*in_dtype_of(x, *weights[:2]), *weights[2:])
        named = dict(zip(("eps", "activation", "negative_slope"), rest))
        if writes_slices(x, layer[0], **geometry):
            launch(x, *layer, out=room.next(layer[0].shape[0]), **geometry, **named)
        else:
            room.append((launch(x, *layer, **geometry, **named),))
    return room.value


def _composed(convolve, parts: list[tuple], backend: str) -> Tensor:
    """Each part, and then the concatenation: what the op means, and its gradient."""
    found = [
        x if weights.weight is None else convolve(x, *weights, None, *options, backend)
        for x, weights, options in parts
    ]
    return torch.cat(found, 1).contiguous(memory_format=torch.channels_last)


def _shape_of(parts: list[tuple]) -> tuple[int, int, int, int]:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    shapes = [
        tuple(x.shape) if weights.weight is None else tuple(validate_convolution(x, weights, None, options))
        for x, weights, options in parts
    ]
    N, _, P, Q = shapes[0]
    dtypes = {x.dtype for x, *_ in parts}
    if any(len(s) != 4 or (s[0], *s[2:]) != (N, P, Q) for s in shapes) or len(dtypes) > 1:
        raise ValueError(
            f"conv_concatenation: the parts are {shapes} of {sorted(map(str, dtypes))}; they may differ in "
            "channels alone"
        )
    return N, sum(s[1] for s in shapes), P, Q


def _body(x, layers, *options):
    return _body_of(len(x))(*x, *layers, *options)


def _fake(x, layers, *options):
    shape = _shape_of(_parts((*x, *layers), options[:-1]))
    return x[0].new_empty(shape).to(memory_format=torch.channels_last)


def _flops(x_shapes, layer_shapes, geometry, *rest, out_shape=None, **kwargs) -> int:
    total = 0
    for i, shape in enumerate(layer_shapes[::6]):
        if shape is not None:
            result = (out_shape[0], shape[0], *out_shape[2:])
            total += conv_flops(x_shapes[i], shape, out_shape=result)
    return total


def _autograd(x, layers, *options):
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*x, *layers))
    if learns:
        parts = _parts((*x, *layers), options[:-1])
        _shape_of(parts)
        return _composed(conv_bn_act_op, parts, options[-1])
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(x, layers, *options)


_infer = dispatch.register("conv_concatenation_inference" + _SCHEMA, _body, _fake, flops=_flops)
_differentiable = dispatch.register(
    "conv_concatenation" + _SCHEMA, _body, _fake, autograd=_autograd, flops=_flops
)


def call_conv_concatenation(parts: tuple[tuple, ...], backend: str) -> Tensor:
    """``torch.cat([part, ...], 1)`` of convolutions (conv, bn, act, x, activation, negative_slope), and of
    tensors (x,): by one op, where our kernels run at least one of the convolutions in inference."""
    found: list[tuple] = []
    ours = 0
    may_share = _may_share(tuple(map(_source_of, parts)), backend)
    for part in parts:
        if len(part) == 1:
            found.append(part)
            continue
        conv, bn, act, x, activation, negative_slope = part
        if may_share and composed.may_be_ours(x, backend) and composed.runs_our_convolution(
            conv, bn, act, x, activation, backend
        ):  # fmt: skip
            found.append(part)
            ours += 1
        else:
            y = call_conv_bn_act(conv, bn, act, x, None, activation, negative_slope, backend)
            found.append((y,))
    if not ours or not _agree(found) or not _pays(found):
        return torch.cat([_value_of(part, backend) for part in found], 1)
    xs, layers, geometry, eps, activations, slopes = [], [], [], [], [], []
    for part in found:
        if len(part) == 1:
            xs.append(part[0])
            layers += [None] * 6
            geometry += [1, 1, 0, 0, 1, 1, 1]
            part = (None, None, None, part[0], "none", 0.0)
        else:
            conv, bn, _, x, *_ = part
            xs.append(x)
            layers += weights_of(conv, bn)
            geometry += [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
        eps.append(0.0 if part[1] is None else part[1].eps)
        activations.append(part[4])
        slopes.append(part[5])
    return (_infer if watched(xs[0]) else _body)(xs, layers, geometry, eps, activations, slopes, backend)


def _value_of(part: tuple, backend: str) -> Tensor:
    if len(part) == 1:
        return part[0]
    conv, bn, act, x, activation, negative_slope = part
    return call_conv_bn_act(conv, bn, act, x, None, activation, negative_slope, backend)


def _agree(parts: list[tuple]) -> bool:
    """Whether the results differ in channels alone."""
    seen = set()
    for part in parts:
        x = _source_of(part)
        if not isinstance(x, Tensor) or x.dim() != 4:
            return False
        shape = _result_shape(part)
        seen.add((shape[0], *shape[2:], x.dtype, x.device))
    return len(seen) == 1


def _pays(parts: list[tuple]) -> bool:
    from fastnets.kernels.conv_configs import slices_pay
    from fastnets.kernels.device import current_device

    x = _source_of(parts[0])
    written = sum(math.prod(_result_shape(part)) for part in parts if len(part) > 1)
    copies = sum(len(part) == 1 for part in parts)
    return slices_pay(written * x.element_size(), copies, current_device(x))


def _source_of(part: tuple) -> Tensor:
    return part[3] if len(part) > 1 else part[0]


def _result_shape(part: tuple) -> tuple:
    if len(part) == 1:
        return part[0].shape
    conv, x = part[0], part[3]
    return output_shape(x, conv._parameters["weight"], conv.stride, conv.padding, conv.dilation)


# --- chains that grow ---------------------------------------------------------------------------------------


class Room:
    """A buffer [N, C, H, W] in channels-last memory, of which ``value``, the first channels, are in use."""

    __slots__ = ("buffer", "value")

    def __init__(self, like: Tensor, shape: tuple[int, int, int, int]):
        self.buffer = torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        )
        self.value = self.buffer[:, :0]

    def takes(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the tensors fit behind what is there."""
        (N, channels, H, W), dtype = self.buffer.shape, self.buffer.dtype
        new = 0
        for t in tensors:
            size = t.shape
            if len(size) != 4 or (size[0], *size[2:]) != (N, H, W) or t.dtype != dtype:
                return False
            if t.device != self.buffer.device:
                return False
            new += size[1]
        return self.value.shape[1] + new <= channels

    def append(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """All channels up to the last of these tensors."""
        for t in tensors:
            self.next(t.shape[1]).copy_(t)
        return self.value

    def next(self, channels: int) -> Tensor:
        """The so many channels behind what is there, which belong to it from now on."""
        begin = self.value.shape[1]
        end = begin + channels
        self.value = self.buffer if end == self.buffer.shape[1] else self.buffer[:, :end]
        return self.buffer[:, begin:end]


def call_concatenate(
    room: Room | None, tensors: tuple[Tensor, ...], later: int, backend: str
) -> tuple[Tensor, Room | None]:
    """``torch.cat(tensors, 1)``, and where the next concatenation of the chain may continue.

    room: where the one before, whose result is the first tensor, was made. later: how many come after this
    one, each expected to append as much.
    """
    if room is not None and room.value is tensors[0] and room.takes(tensors[1:]):
        # The last result is dense, as stock's is.
        new = sum([t.shape[1] for t in tensors[1:]])
        if later or room.value.shape[1] + new == room.buffer.shape[1]:
            return room.append(tensors[1:]), room
    elif room is None and later and _may_share(tensors, backend):
        first, *new = tensors
        channels = first.shape[1] + (1 + later) * sum([t.shape[1] for t in new])
        room = Room(first, (first.shape[0], channels, *first.shape[2:]))
        if room.takes(tensors):
            return room.append(tensors), room
    return torch.cat(tensors, 1), None


def _may_share(tensors: tuple[Tensor, ...], backend: str) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if any(t.__class__ is not Tensor or t.dim() != 4 for t in tensors) or in_transform():
        return False
    wanted = dispatch.requested(backend)
    if wanted in ("triton", "reference"):
        return wanted == "triton"
    # On the CPU what norms of 16 bits make of a slice takes longer than the copy.
    on_cuda = dispatch.device_type_of(tensors[0]) == "cuda"
    return on_cuda or all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def grow_in_place(graph: fx.Graph, backend: str) -> tuple[Fusion, ...]:
    """Let chains of concatenations in a graph of inference share a buffer, and convolutions write into the
    slices of others; after all other patterns."""
    fusions = []
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in done or not is_channel_concatenation(node):
            continue
        chain = _chain_from(graph, node)
        done.update(chain)
        if len(chain) > 1:
            _replace(graph, chain, "auto" if backend == dispatch.UNFOLDED else backend)
            fusions.append(Fusion("concatenation", "concatenation"))
    for node in reversed(list(graph.nodes)):  # those that concatenate others' results come first
        if node.users and is_channel_concatenation(node) and _write_into_slices(node):
            fusions.append(Fusion("concatenation", "concatenation"))
    return tuple(fusions[:1])


def _write_into_slices(cat: fx.Node) -> bool:
    """Let the convolutions that ``cat`` alone reads be computed by the call that takes its place."""
    parts, nodes, backends = [], [], set()
    flat = _flattened(cat)
    for part in flat:
        if flat.count(part) == 1 and is_convolution_for(part, cat):
            conv, bn, act, x, _, activation, slope, backend = part.args
            parts.append((conv, bn, act, x, activation, slope))
            nodes.append(part)
            backends.add(backend)
        else:
            parts.append((part,))
    if len(backends) != 1:
        return False
    inner = [part for part in cat.args[0] if part not in flat]
    put_one_call(call_conv_concatenation, (tuple(parts), backends.pop()), (cat, *inner, *nodes))
    return True


def is_convolution_for(part: fx.Node, reader: fx.Node) -> bool:
    """Whether the node is a fused convolution without a residual, read once, that may as well run where
    ``reader`` does."""
    return (
        part.op == "call_function"
        and part.target is call_conv_bn_act
        and not part.kwargs
        and part.args[4] is None
        and len(part.users) == 1
        and not may_write_between(part, reader)
    )


def _flattened(cat: fx.Node) -> list[fx.Node]:
    """What is concatenated, also by concatenations of channels that this one alone reads."""
    parts = []
    for part in cat.args[0]:
        nested = is_channel_concatenation(part) and len(part.users) == 1
        parts += part.args[0] if nested and cat.args[0].count(part) == 1 else [part]
    return parts


def is_channel_concatenation(node: fx.Node) -> bool:
    """Whether the node is ``torch.cat((x, ...), 1)`` of values of the graph."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return False
    if len(node.args) + len(node.kwargs) != 2 or not isinstance(node.args[0], (tuple, list)):
        return False
    dim = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    parts = node.args[0]
    return dim == 1 and len(parts) > 1 and all(isinstance(part, fx.Node) for part in parts)


def _chain_from(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The concatenations, ``node`` first, of which each begins with the one before and nobody reads that
    later."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    chain = [node]
    while True:
        last = chain[-1]
        following = max(last.users, key=order.get, default=None)
        if following is None or not is_channel_concatenation(following):
            return chain
        parts = following.args[0]
        others = [reader for reader in last.users if reader is not following]
        if parts[0] is not last or last in parts[1:] or not all(map(_reads_any_layout, others)):
            return chain
        chain.append(following)


def _reads_any_layout(node: fx.Node) -> bool:
    return node.op == "call_module" or node.target in _READERS


# Fused calls that return memory of their own.
_READERS = (call_bn_add_act, call_conv_bn_act, call_excited_conv, call_preactivated_conv)


def _replace(graph: fx.Graph, chain: list[fx.Node], backend: str) -> None:
    room = None
    for later, node in zip(range(len(chain) - 1, -1, -1), chain):
        with graph.inserting_before(node):
            call = graph.call_function(call_concatenate, (room, tuple(node.args[0]), later, backend))
            value = graph.call_function(operator.getitem, (call, 0))
            room = graph.call_function(operator.getitem, (call, 1)) if later else None
        node.replace_all_uses_with(value)
        graph.erase_node(node)
