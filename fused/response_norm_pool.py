"""Local response normalization and the maximum pooling behind it, as one op (AlexNet, GoogLeNet).

    y = max_pool2d(local_response_norm(relu(x) or x, size, alpha, beta, k), kernel, stride, padding, dilation)

What lies between the two is never stored. Inference gains by it; with gradients the two ops run one after the
other, and so they do for images that are not channels-last, whose pixels our kernel would read one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fastnets.fused import composed, dispatch
from fastnets.fused.batch_norm import has_hooks, watched
from fastnets.fused.chains import joined, put_one_call, sole_readers
from fastnets.fused.pool import _max_differentiable, _max_fake, _max_infer, _windows, call_pool2d, pair
from fastnets.fused.response_norm import _differentiable as _norm_differentiable
from fastnets.fused.response_norm import _infer as _norm_infer
from fastnets.fused.response_norm import _validate as _validate_norm
from fastnets.fused.response_norm import call_local_response_norm, runs_stock

# No Triton in there.
from fastnets.kernels.pool_windows import is_channels_last

_SCHEMA = (
    "(Tensor x, int size, float alpha, float beta, float k, bool relu, int[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, bool ceil_mode, str backend) -> Tensor"
)
MOST_ELEMENTS = 9  # of a window, as kernels.response_norm_pool


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: "triton", or "reference" for the two ops after one another."""
    return dispatch.triton_or_reference(x, backend)


def _validate(x: Tensor, size: int) -> None:
    _validate_norm(x, size)
    if x.dim() != 4:
        raise ValueError(f"local_response_norm_max_pool: x must be [N, C, H, W], got {x.dim()} dimensions")


@dispatch.replays(tensors=1)
def _body(x, *arguments):
    *options, backend = arguments
    size, alpha, beta, k, relu, *geometry = options
    _validate(x, size)
    windows = _windows(x.shape, None, *geometry)
    fits = is_channels_last(x) and geometry[0][0] * geometry[0][1] <= MOST_ELEMENTS
    if x.numel() and fits and choose(x, backend) == "triton":
        from fastnets.kernels.response_norm_pool import local_response_norm_max_pool as launch

        return launch(x, size, windows, alpha=alpha, beta=beta, k=k, relu=relu)
    return _composed(_norm_infer, _max_infer, x, *arguments)


def _composed(norm, pool, x, *arguments) -> Tensor:
    """The two ops one after the other: what the op means, and its gradient."""
    options, geometry, backend = arguments[:5], arguments[5:-1], arguments[-1]
    y = pool(norm(x, *options, backend), None, *geometry, backend)
    return y.contiguous(memory_format=torch.channels_last)


def _fake(x, *arguments):
    _validate(x, arguments[0])
    y = _max_fake(x, None, *arguments[5:])
    return y.to(memory_format=torch.channels_last)


def _with_gradients(x, *arguments):
    _validate(x, arguments[0])
    return _composed(_norm_differentiable, _max_differentiable, x, *arguments)


_differentiable, _infer = composed.register(
    "local_response_norm_max_pool", _SCHEMA, _body, _fake, with_gradients=_with_gradients
)


def local_response_norm_max_pool(
    x: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``F.max_pool2d(F.local_response_norm(relu(x) or x, size, alpha, beta, k), kernel_size, ...)``.

    x: [N, C, H, W], a floating dtype, any strides. Returns [N, C, P, Q] of x's dtype, dense channels-last.
    Differentiable once. Raises ``ValueError`` and ``TypeError`` for what does not fit.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, size, alpha, beta, k, relu, kernel_size, stride, padding, dilation, ceil_mode),
        dispatch.validate_backend(backend),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_response_norm_pool(
    norm: nn.LocalResponseNorm, pool: nn.MaxPool2d, x: Tensor, backend: str, pool_backend: str
) -> Tensor:
    """``pool(norm(x))``: in one launch where our kernel serves it in inference, else by
    ``call_local_response_norm`` and ``call_pool2d``, whose remarks hold."""
    if _in_one_launch(norm, pool, x, backend):
        options = (norm.size, norm.alpha, norm.beta, norm.k, False)
        run = _infer if watched(x) else _body
        return run(x, *options, *_geometry(pool), bool(pool.ceil_mode), backend)
    return call_pool2d(pool, call_local_response_norm(norm, x, backend), pool_backend)


def _in_one_launch(norm, pool, x, backend) -> bool:
    if torch.is_grad_enabled() or runs_stock(norm, x, backend) or x.dim() != 4 or has_hooks(pool):
        return False
    if not serves(norm, pool) or x.dtype not in dispatch.OUR_DTYPES or not x.numel():
        return False
    try:
        _windows(x.shape, None, *_geometry(pool), pool.ceil_mode)
    except ValueError:
        return False  # stock's error
    return choose(x, backend) == "triton"


def _geometry(pool: nn.MaxPool2d) -> tuple[tuple[int, int], ...]:
    window = pair(pool.kernel_size)
    return window, pair(pool.stride, window), pair(pool.padding), pair(pool.dilation)


def serves(norm: nn.Module, pool: nn.Module) -> bool:
    """Whether norm and pooling are of those that one launch does."""
    if type(norm) is not nn.LocalResponseNorm or type(pool) is not nn.MaxPool2d or pool.return_indices:
        return False
    R, S = pair(pool.kernel_size)
    return R * S <= MOST_ELEMENTS


def join_response_norms(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let local response norms pool their own result where a maximum pooling alone reads it.

    For graphs of inference, after all other patterns. Returns the fusions, those that joined as one.
    """
    for node, y in sole_readers(graph, call_pool2d, 1, call_local_response_norm):
        pool, _, pool_backend = node.args
        norm, x, backend = y.args
        if not serves(modules[norm.target], modules[pool.target]):
            continue
        put_one_call(call_response_norm_pool, (norm, pool, x, backend, pool_backend), (node, y))
        fusions = joined(fusions, ("response_norm", norm.target), after=("pool", pool.target))
    return fusions
