"""A convolution with what follows it, down to a pooling of whole windows, as one op (LeNet, VGG).

    y = pool(act(bn(conv2d(x, weight) + bias)))

pool is the maximum or the mean of windows of at most 2×2 pixels that touch and do not overlap, without
padding. Inference gains by it: the map that is pooled is neither stored nor read. With gradients, and where
a convolution over many channels is not ours or is predicted to lose, the parts run one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastnets.fused import composed, dispatch, onednn
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import has_hooks, watched
from fastnets.fused.chains import joined, put_one_call, sole_readers
from fastnets.fused.conv import (
    Options,
    Weights,
    call_conv_bn_act,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    in_dtype_of,
    must_run_stock,
    preferred,
    validate_convolution,
    weights_of,
)
from fastnets.fused.conv import choose as choose_convolution
from fastnets.fused.conv import implementation_of as conv_implementation_of
from fastnets.fused.onednn import activate_in_place, channels_last
from fastnets.fused.pool import call_pool2d, pair
from fastnets.kernels.pool_windows import fixed_windows  # no Triton in there

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, float eps, str activation, "
    "float negative_slope, bool maximum, SymInt[2] window, str backend) -> Tensor"
)
_SMALL_ON_CPU = 1 << 19  # multiply-adds, about: below, stock's calls are done before oneDNN's is ready
MOST_CHANNELS, MOST_OUTPUTS, MOST_ELEMENTS = 31, 64, 4  # as kernels.conv_pool


def _why_not(C: int, K: int, window: tuple[int, int]) -> str | None:
    """``why_not_pooled`` without Triton: why C channels to K are not pooled by such windows, or None."""
    pixels = window[0] * window[1]
    if pixels > MOST_ELEMENTS or (C > MOST_CHANNELS and pixels not in (2, 4)):
        counts = "2 or 4" if C > MOST_CHANNELS else f"at most {MOST_ELEMENTS}"
        return f"windows of {window[0]}×{window[1]} over {C} channels; served are {counts} pixels"
    if C <= MOST_CHANNELS and K > MOST_OUTPUTS:
        return f"{C} channels to {K}; served are at most {MOST_OUTPUTS}, or more channels"
    return None


def _pooled(y: Tensor, maximum: bool, window: list[int]) -> Tensor:
    return F.max_pool2d(y, window) if maximum else F.avg_pool2d(y, window)


def _triton(
    x, weight, bias, mean, var, bn_weight, bn_bias,
    stride, padding, dilation, eps, activation, negative_slope, maximum, window,
) -> Tensor:  # fmt: skip
    from fastnets.kernels.conv_pool import conv_pool, pools_result

    layer = (*in_dtype_of(x, weight, bias), mean, var, bn_weight, bn_bias)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    epilogue = {"eps": eps, "activation": activation, "negative_slope": negative_slope}
    if pools_result(x, layer[0], window, **geometry):
        return conv_pool(x, *layer, window=window, maximum=maximum, **geometry, **epilogue)
    from fastnets.kernels.conv import conv_bn_act
    from fastnets.kernels.pool import average_pool, max_pool

    y = conv_bn_act(x, *layer, **geometry, **epilogue)
    windows = fixed_windows(tuple(y.shape[2:]), *(tuple(window),) * 2, (0, 0), (1, 1), False)
    return max_pool(y, windows)[0] if maximum else average_pool(y, windows)


@dispatch.replays(tensors=7)
def _body(*arguments):
    tensors, options, backend = arguments[:7], arguments[7:-1], arguments[-1]
    _validate(*tensors, *options)
    x, weight, bias, mean, var, bn_weight, bn_bias = tensors
    chosen = _choose(x, weight, options, backend) if x.numel() else "reference"
    if chosen == "triton":
        return _triton(*tensors, *options)
    *geometry, eps, activation, negative_slope, maximum, window = options
    if chosen != "reference":  # the vendor's convolution, with what it fuses
        convolution = Options(*geometry, 1, eps, activation, negative_slope)
        y = conv_below_autograd(*tensors, None, *convolution, backend)
        return channels_last(_pooled(y, maximum, window))
    y = F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    return channels_last(_pooled(activation_of(activation).forward(y, negative_slope), maximum, window))


def _choose(x: Tensor, weight: Tensor, options: tuple, backend: str) -> str:
    """As ``composed.choose``; over many channels ours runs where the convolution alone would be ours."""
    chosen = composed.choose(x, backend)
    if chosen != "triton" or x.shape[1] <= MOST_CHANNELS:
        return chosen
    stride, _, dilation, _, activation, *_ = options
    wanted = preferred(x, weight, stride, dilation, 1, activation, False, backend)
    return choose_convolution(x, weight, 1, activation, backend, wanted)


def _validate(
    x, weight, bias, mean, var, bn_weight, bn_bias,
    stride, padding, dilation, eps, activation, negative_slope, maximum, window,
) -> tuple:  # fmt: skip
    """The shape of the result; errors name the argument, the fact and the remedy."""
    weights = Weights(weight, bias, mean, var, bn_weight, bn_bias)
    options = Options(stride, padding, dilation, 1, eps, activation, negative_slope)
    N, K, P, Q = validate_convolution(x, weights, None, options)
    reason = _why_not(x.shape[1], K, window)
    if reason is not None:
        raise ValueError(f"conv_act_pool: {reason}. Call conv_bn_act and a pooling one after the other")
    if min(window) < 1 or P < window[0] or Q < window[1]:
        raise ValueError(f"conv_act_pool: a window of {window[0]}×{window[1]} does not fit {P}×{Q} pixels")
    return N, K, P // window[0], Q // window[1]


def _fake(x, *arguments):
    return x.new_empty(_validate(x, *arguments[:-1])).to(memory_format=torch.channels_last)


def _flops(x_shape, weight_shape, *arguments, out_shape=None, **kwargs) -> int:
    N, K, P, Q = out_shape
    window = arguments[-2]
    return conv_flops(x_shape, weight_shape, out_shape=(N, K, P * window[0], Q * window[1]))


def _with_gradients(*arguments):
    _validate(*arguments[:-1])
    *tensors, stride, padding, dilation, eps, activation, negative_slope, maximum, window, backend = arguments
    options = (stride, padding, dilation, 1, eps, activation, negative_slope, backend)
    return channels_last(_pooled(conv_bn_act_op(*tensors, None, *options), maximum, window))


_differentiable, _infer = composed.register(
    *("conv_act_pool", _SCHEMA, _body, _fake),
    with_gradients=_with_gradients, casts=(0,), flops=_flops,
)  # fmt: skip


def conv_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    maximum: bool = True,
    window: tuple[int, int] = (2, 2),
    backend: str = "auto",
) -> Tensor:
    """``pool(act(bn(conv2d(x, weight, bias))))``; see the top of this file.

    Args:
        x: [N, C, H, W], a floating dtype, any strides.
        weight: [K, C, R, S] of x's dtype, K ≤ 64 where C ≤ 31; the vectors are [K].
        maximum: the pooling takes the maximum, or the mean, of each ``window``: of 2 or 4 pixels, and of any
            number up to 4 where C ≤ 31.

    Returns:
        [N, K, P // window[0], Q // window[1]] of x's dtype, dense channels-last. Differentiable once.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, stride, padding, dilation),
        *(eps, activation, negative_slope, maximum, window, dispatch.validate_backend(backend)),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_conv_act_pool(
    pool: nn.Module,
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    activation: str,
    negative_slope: float,
    pool_backend: str,
    backend: str,
) -> Tensor:
    """``pool(act(bn(conv(x))))``: in one launch where our kernels serve it in inference, by PyTorch's
    functions where the CPU has little to compute and nothing to fold, else by ``call_conv_bn_act`` and
    ``call_pool2d``, whose remarks hold."""
    served = _served_as_one(pool, conv, bn, act, activation, x, backend)
    if served == "stock" and not watched(x):
        y = _convolve(conv, x)
        return pool.forward(y if activation == "none" else activate_in_place(y, activation, negative_slope))
    if served == "triton":
        arguments = (
            x, *weights_of(conv, bn), conv.stride, conv.padding, conv.dilation, 0.0 if bn is None else bn.eps,
            activation, negative_slope, type(pool) is nn.MaxPool2d, _window(pool), backend,
        )  # fmt: skip
        return (_infer if watched(x) else _body)(*arguments)
    y = call_conv_bn_act(conv, bn, act, x, None, activation, negative_slope, backend)
    return call_pool2d(pool, y, pool_backend)


def implementation_of(pool, conv, bn, act, activation: str, x: Tensor, backend: str = "auto") -> str:
    """The implementation that ``call_conv_act_pool`` would run for an input like ``x``, the convolution's
    where each part decides; "stock" if none."""
    served = _served_as_one(pool, conv, bn, act, activation, x, backend)
    return served or conv_implementation_of(conv, bn, act, activation, x, backend)


def _served_as_one(pool, conv, bn, act, activation, x, backend) -> str:
    """What runs all of it: "triton", "stock" for PyTorch's functions, or "" where each part decides."""
    if torch.is_grad_enabled() or conv.training or not isinstance(x, Tensor) or x.dim() != 4:
        return ""
    wanted, device = dispatch.requested(backend), dispatch.device_type_of(x)
    many = conv.in_channels > MOST_CHANNELS
    if wanted == "auto" and device == "cpu":
        return "stock" if not many and bn is None and _is_small_on_cpu(pool, conv, act, x, backend) else ""
    if wanted != "triton" and not (wanted == "auto" and device == "cuda"):
        return ""
    if x.dtype not in dispatch.OUR_DTYPES or 0 in x.shape:
        return ""
    if bn is not None and (bn.training or bn._buffers.get("running_mean") is None):
        return ""
    if not serves(conv, pool) or has_hooks(pool):
        return ""
    if must_run_stock(conv, bn, act, x, conv._parameters.get("weight"), None):
        return ""
    if many:
        compiles = torch.compiler.is_compiling()  # compilers cannot look at what was measured
        if not compiles and dispatch.are_decisions_watched():  # each part is measured for itself
            return ""
        if wanted != "triton" and (
            compiles or conv_implementation_of(conv, bn, act, activation, x, backend) != "triton"
        ):
            return ""
    # Stock's errors for images that are too small.
    sizes = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, _window(pool))
    fits = all(
        (e + 2 * p - d * (k - 1) - 1) // s + 1 >= w and e + 2 * p > d * (k - 1) for e, p, d, k, s, w in sizes
    )
    return "triton" if fits else ""


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Stock's convolution of few elements, by the way of PyTorch's that begins soonest."""
    weight, bias = _in_stock_layout(conv._parameters["weight"]), conv._parameters["bias"]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = conv.padding_mode == "zeros" and conv.padding.__class__ is tuple
    if plain and onednn.is_tiny(x, weight, *geometry):
        return torch.ops.aten.thnn_conv2d(x, weight, weight.shape[2:], bias, *geometry[:2])
    return conv._conv_forward(x, weight, bias)


def _in_stock_layout(weight: Tensor) -> Tensor:
    """A small filter by whose strides, also those of sizes of one, the convolution keeps stock's layout: few
    channels are pooled sooner in it."""
    _, C, R, S = weight.shape
    return weight.contiguous().as_strided(weight.shape, (C * R * S, R * S, S, 1))


def _is_small_on_cpu(pool, conv, act, x: Tensor, backend: str) -> bool:
    """Whether stock's own functions, without what nn.Module adds, are stock's answer and the soonest."""
    weight = conv._parameters.get("weight")
    if weight is None or backend == dispatch.UNFOLDED or x.__class__ is not Tensor:
        return False
    N, _, H, W = x.shape
    return (
        N * H * W * weight.numel() < _SMALL_ON_CPU
        and type(pool) in (nn.MaxPool2d, nn.AvgPool2d)
        and not has_hooks(pool)
        and not must_run_stock(conv, None, act, x, weight, None)
    )


def _window(pool: nn.Module) -> tuple[int, int]:
    return pair(pool.kernel_size)


def serves(conv: nn.Conv2d, pool: nn.Module) -> bool:
    """Whether the convolution and the pooling are of those that one launch does."""
    if type(pool) not in (nn.MaxPool2d, nn.AvgPool2d) or pool.ceil_mode or pair(pool.padding) != (0, 0):
        return False
    if type(pool) is nn.MaxPool2d and (pool.return_indices or pair(pool.dilation) != (1, 1)):
        return False
    if type(pool) is nn.AvgPool2d and pool.divisor_override is not None:
        return False
    window = _window(pool)
    if pair(pool.stride, window) != window or window[0] * window[1] == 1:
        return False
    if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv.in_channels <= MOST_CHANNELS and conv.kernel_size == (1, 1):
        return False
    return _why_not(conv.in_channels, conv.out_channels, window) is None


def join_pools(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let convolutions pool their own result where a pooling alone reads it.

    For graphs of inference, after all other patterns. Returns the fusions, those that joined as one.
    """
    for node, y in sole_readers(graph, call_pool2d, 1, call_conv_bn_act):
        pool, _, pool_backend = node.args
        conv, bn, act, x, residual, *rest, backend = y.args
        if residual is not None or y.kwargs or not serves(modules[conv.target], modules[pool.target]):
            continue
        arguments = (pool, conv, bn, act, x, *rest, pool_backend, backend)
        put_one_call(call_conv_act_pool, arguments, (node, y))
        fusions = joined(fusions, ("conv", conv.target), after=("pool", pool.target))
    return fusions
