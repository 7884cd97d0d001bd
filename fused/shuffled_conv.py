"""A convolution whose channels are shuffled with those that pass by it, in one launch (ShuffleNet v2).

    y = channel_shuffle(cat((passed, act(bn(conv2d(x, weight) + bias))), 1), groups=2)

Half of a unit's channels are filtered, half pass untouched, and two copies of all of them put the two halves
together: the concatenation and the shuffle. Here the convolution's epilogue loads a tile of what passes, and
stores the two tiles' channels in turns: y[:, 2k] = passed[:, k], y[:, 2k + 1] = the convolution's channel k.
Batch norm uses running statistics. Only inference gains from this: with gradients, and wherever our kernel
does not serve, the convolution, the concatenation and the shuffle run one after the other, as they did.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastnets.fused import composed, dispatch, onednn
from fastnets.fused.batch_norm import has_hooks, watched
from fastnets.fused.chains import put_one_call
from fastnets.fused.concatenation import (
    call_conv_concatenation,
    is_channel_concatenation,
    is_convolution_for,
)
from fastnets.fused.conv import (
    Options,
    Weights,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    in_dtype_of,
    validate_convolution,
    weights_of,
)
from fastnets.fused.conv_training import output_shape

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor passed, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float eps, "
    "str activation, float negative_slope, str backend) -> Tensor"
)


@dispatch.replays(tensors=8)
def _body(x, *arguments):
    *layer, passed = arguments[:7]
    *options, backend = arguments[7:]
    _validate(x, *arguments)
    if x.numel() and composed.choose(x, backend) == "triton":
        from fastnets.kernels.conv import conv_bn_act as launch
        from fastnets.kernels.conv import shuffles

        geometry = dict(zip(("stride", "padding", "dilation", "groups"), options[:4]))
        tensors = *in_dtype_of(x, *layer[:2]), *layer[2:]
        if not shuffles(x, tensors[0], passed, **geometry):
            passed = onednn.channels_last(passed)
        if shuffles(x, tensors[0], passed, **geometry):
            named = dict(zip(("eps", "activation", "negative_slope"), options[4:]))
            return launch(x, *tensors, passed=passed, **geometry, **named)
    return _composed(conv_below_autograd, x, *layer, passed, *options, backend)


def _composed(convolve, x, *arguments) -> Tensor:
    """The convolution, the concatenation and the shuffle: what the op means, and its gradient."""
    layer, passed, options = arguments[:6], arguments[6], arguments[7:]
    y = torch.cat((passed, convolve(x, *layer, None, *options)), 1)
    return onednn.channels_last(F.channel_shuffle(y, 2))


def _validate(x, *arguments) -> tuple:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    layer, passed, options = arguments[:6], arguments[6], arguments[7:-1]
    shape = N, K, P, Q = validate_convolution(x, Weights(*layer), None, Options(*options))
    if tuple(passed.shape) != tuple(shape) or passed.dtype != x.dtype:
        raise ValueError(
            f"conv_channel_shuffle: passed is {tuple(passed.shape)} {passed.dtype}, the convolution gives "
            f"{tuple(shape)} {x.dtype}; the halves must agree: concatenate and shuffle others yourself"
        )
    if passed.device != x.device:
        raise ValueError(
            f"conv_channel_shuffle: passed is on {passed.device}, x on {x.device}; move one of them"
        )
    return N, 2 * K, P, Q


def _fake(x, *arguments):
    return x.new_empty(_validate(x, *arguments)).to(memory_format=torch.channels_last)


def _flops(x_shape, weight_shape, *arguments, out_shape=None, **kwargs) -> int:
    N, channels, P, Q = out_shape
    return conv_flops(x_shape, weight_shape, out_shape=(N, channels // 2, P, Q))


def _with_gradients(*arguments):
    _validate(*arguments)
    return _composed(conv_bn_act_op, *arguments)


_differentiable, _infer = composed.register(
    *("conv_channel_shuffle", _SCHEMA, _body, _fake),
    with_gradients=_with_gradients, casts=(0, 7), flops=_flops,
)  # fmt: skip


def conv_channel_shuffle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    passed: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``channel_shuffle(cat((passed, conv_bn_act(x, weight, ...)), 1), 2)``; see the top of this file.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, any strides.
        weight: [K, C/groups, R, S], of x's dtype. The other vectors are [K].
        passed: [N, K, P, Q], of x's dtype; channels of a channels-last tensor are read where they lie.

    Returns:
        [N, 2K, P, Q] of x's dtype, dense channels-last. Differentiable once, in all but the statistics.

    Raises:
        ValueError: arguments that are no convolution, or ``passed`` of another shape, dtype or device.

    N. Ma et al., "ShuffleNet V2", 2018 (arXiv:1807.11164).
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, passed),
        *(stride, padding, dilation, groups, eps, activation, negative_slope),
        dispatch.validate_backend(backend),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_conv_channel_shuffle(
    shuffle: nn.Module | None,
    passed: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``shuffle(torch.cat((passed, act(bn(conv(x)))), 1))``: in one launch where our kernels serve it in
    inference, else by ``call_conv_concatenation``, whose remarks hold, and by ``shuffle``.

    shuffle: the stock module; None where the network reshapes and transposes by itself.
    """
    if _in_one_launch(shuffle, passed, conv, bn, act, x, activation, backend):
        arguments = (
            x, *weights_of(conv, bn), passed, conv.stride, conv.padding, conv.dilation, conv.groups,
            0.0 if bn is None else bn.eps, activation, negative_slope, backend,
        )  # fmt: skip
        return (_infer if watched(x) else _body)(*arguments)
    layer = (conv, bn, act, x, activation, negative_slope)
    y = call_conv_concatenation(((passed,), layer), backend)
    if shuffle is not None:
        return shuffle(y)
    N, C, H, W = y.shape
    return y.reshape(N, 2, C // 2, H, W).transpose(1, 2).contiguous().reshape(N, C, H, W)


def _in_one_launch(shuffle, passed, conv, bn, act, x, activation, backend) -> bool:
    if not composed.may_be_ours(x, backend) or not isinstance(passed, Tensor):
        return False
    if shuffle is not None and (not _is_shuffle(shuffle) or has_hooks(shuffle)):
        return False
    if passed.dtype != x.dtype or passed.device != x.device:
        return False
    if not composed.runs_our_convolution(conv, bn, act, x, activation, backend):
        return False
    weight = conv._parameters["weight"]
    return passed.shape == output_shape(x, weight, conv.stride, conv.padding, conv.dilation)


def _is_shuffle(module: nn.Module) -> bool:
    return type(module) is nn.ChannelShuffle and module.groups == 2


def join_shuffles(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let convolutions store their channels in turns with those that they alone are shuffled with.

    For graphs of inference, before ``grow_in_place``; returns the fusions, which say so.
    """
    for cat in list(graph.nodes):
        if not is_channel_concatenation(cat) or len(cat.args[0]) != 2:
            continue
        nodes = _shuffle_of(cat, modules)
        passed, part = cat.args[0]
        if not nodes or passed is part or not is_convolution_for(part, nodes[0]):
            continue
        conv, bn, act, x, _, activation, slope, backend = part.args
        path = nodes[0].target if nodes[0].op == "call_module" else None
        with graph.inserting_before(nodes[0]):
            module = None if path is None else graph.get_attr(path)
        arguments = (module, passed, conv, bn, act, x, activation, slope, backend)
        put_one_call(call_conv_channel_shuffle, arguments, (*nodes, cat, part))
        fusions = tuple(
            _with_shuffle(f, path) if f.family == "conv" and f.path("conv") == conv.target else f
            for f in fusions
        )
    return fusions


def _with_shuffle(fusion, path: str | None):
    layers = fusion.layers if path is None else (*fusion.layers, ("shuffle", path))
    return replace(fusion, kind=f"{fusion.kind}+shuffle", layers=layers)


def _shuffle_of(cat: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The nodes that shuffle what was concatenated in two groups, readers before what they read; none where
    anything else is done with it. Either the stock module, or torchvision's

        x.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W)
    """
    readers = list(cat.users)
    if len(readers) == 1 and readers[0].op == "call_module":
        (node,) = readers
        plain = node.args == (cat,) and not node.kwargs
        return readers if plain and _is_shuffle(modules[node.target]) else []
    sizes = {n: i for n in _after(readers) if (i := _dimension(n, cat)) is not None}
    split = next((n for n in readers if _reshapes(n)), None)
    if split is None:
        return []
    N, groups, half, H, W, *more = (*_sizes_given(split), *[None] * 5)
    C = half.args[0] if isinstance(half, fx.Node) and half.target is operator.floordiv else None
    halves = half == -1 or (C is not None and sizes.get(C) == 1 and half.args[1] == 2)
    if groups != 2 or not halves or [sizes.get(n) for n in (N, H, W)] != [0, 2, 3] or more != [None] * 5:
        return []
    last, found = split, {split, *sizes, *([] if C is None else [half])}
    for follows in (_transposes, _is_contiguous, _reshapes):
        after, *others = (*last.users, None)
        if others == [None] and follows(after):
            last = after
            found.add(last)
        elif follows is not _is_contiguous:  # which changes nothing before a reshape that copies
            return []
    N, C, *rest = _sizes_given(last)
    if (C != -1 and sizes.get(C) != 1) or [sizes.get(n) for n in (N, *rest)] != [0, 2, 3]:
        return []
    found.update(n for n in readers if _is_size(n))
    if any(n is not last and not found.issuperset(n.users) for n in (*found, cat)):
        return []
    return [n for n in reversed(cat.graph.nodes) if n in found]


def _after(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes and their readers."""
    return [*nodes, *(reader for node in nodes for reader in node.users)]


def _is_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "size") or (
        node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    )


def _dimension(node: fx.Node, x: fx.Node) -> int | None:
    """The dimension of x whose size the node is."""
    if _is_size(node) and len(node.args) == 2 and node.op == "call_method" and node.args[0] is x:
        return node.args[1]
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    read, index = node.args
    of_all = isinstance(read, fx.Node) and _is_size(read) and read.args[0] is x
    return index if of_all and isinstance(index, int) and _dimension(read, x) is None else None


def _reshapes(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("view", "reshape") and not node.kwargs


def _sizes_given(node: fx.Node) -> tuple:
    sizes = node.args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _transposes(node: fx.Node) -> bool:
    by_function = node.op == "call_function" and node.target is torch.transpose
    named = by_function or (node.op == "call_method" and node.target == "transpose")
    return named and tuple(node.args[1:]) in ((1, 2), (2, 1)) and not node.kwargs


def _is_contiguous(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "contiguous" and len(node.args) + len(node.kwargs) == 1
