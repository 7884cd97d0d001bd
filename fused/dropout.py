"""Dropout and stochastic depth, with a residual addition, from a Philox seed: nothing else is kept.

    y = x · keep / (1 − p) + residual

The seed is drawn from torch's own generator of the tensor's device, as a tensor: ``torch.manual_seed`` and
``torch.utils.checkpoint`` hold, and a captured CUDA graph draws a new one at each replay. The numbers are
other ones than stock's, so ``optimize`` never swaps these in: they are to be asked for. One seed gives the
same result by every implementation, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import in_transform

MODES = ("element", "row", "batch")


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend, refuses="does not drop out")


# --- the reference: Philox4x32-10 in tensors ----------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a · b, both of 32 bits, in int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _WORD


def philox(seed: Tensor, *counter: Tensor) -> Tensor:
    """Four random words for each counter: int64 [n, 4] in [0, 2^32) from an int64 [1] and int64 [n].

    counter: up to four words, the low ones first; those left out are zero.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    words = [word & _WORD for word in counter]
    c0, c1, c2, c3 = words + [torch.zeros_like(words[0])] * (4 - len(words))
    for _ in range(10):
        high_a, low_a = _multiply(c0, _MULTIPLIERS[0])
        high_b, low_b = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], 1)


def _factors(seed: Tensor, count: int, p: float, rows: int) -> Tensor:
    """What each element of the result's memory is multiplied by, as float32 [count]."""
    device = seed.device
    if rows == 0:
        words = philox(seed, torch.arange(-(-count // 4), device=device)).flatten()[:count]
    else:
        words = philox(seed, torch.arange(rows, device=device))[:, 0]
    uniform = (words >> 8).to(torch.float32) * 2.0**-24
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    kept = torch.where(uniform >= torch.tensor(p, dtype=torch.float32, device=device), scale, 0.0)
    return kept if rows == 0 else kept.repeat_interleave(count // rows)


# --- the op -------------------------------------------------------------------------------------------------


def _rows(x: Tensor, mode: str) -> int:
    return {"element": 0, "row": x.shape[0] if x.dim() else 1, "batch": 1}[mode]


def _strides(x: Tensor, mode: str) -> tuple[int, ...]:
    """Those of the result: dense, and with rows one after the other where they are dropped whole."""
    like = torch.empty_like(x)
    if mode == "row" and x.dim() and like.stride(0) * x.shape[0] != x.numel():
        like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like.stride()


def _apply(x, residual, seed, p, mode, strides, backend) -> Tensor:
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels.dropout import dropout as launch

        return launch(x, seed, p, residual, rows=_rows(x, mode), strides=tuple(strides))
    y = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    return y.copy_(_composition(x, residual, seed, p, mode, strides)) if x.numel() else y


def _composition(x, residual, seed, p, mode, strides) -> Tensor:
    """The definition of the op, in differentiable operations."""
    factors = torch.empty_strided(x.shape, strides, dtype=torch.float32, device=x.device)
    factors.as_strided((x.numel(),), (1,)).copy_(_factors(seed, x.numel(), p, _rows(x, mode)))
    value = x.to(torch.promote_types(x.dtype, torch.float32)) * factors
    return (value if residual is None else value + residual).to(x.dtype)


def _body(x, residual, seed, p, mode, backend):
    _validate(x, residual, seed, p, mode)
    return _apply(x, residual, seed, p, mode, _strides(x, mode), backend)


def _validate(x, residual, seed, p, mode) -> None:
    if not x.is_floating_point():
        raise TypeError(f"dropout: x is {x.dtype}; convert it to a floating dtype first")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if mode not in MODES:
        raise ValueError(f"dropout: mode={mode!r} is not one of {', '.join(MODES)}")
    if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
        raise ValueError(f"dropout: seed is {tuple(seed.shape)} {seed.dtype}, expected (1,) torch.int64")
    if seed.device != x.device:
        raise ValueError(f"dropout: seed is on {seed.device}, x on {x.device}; move one of them")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
    ):
        raise ValueError(
            f"dropout: residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, "
            f"x {tuple(x.shape)} {x.dtype} on {x.device}; expand or convert it first"
        )


def _fake(x, residual, seed, p, mode, backend):
    _validate(x, residual, seed, p, mode)
    return x.new_empty_strided(x.shape, _strides(x, mode))


def _backward_body(dy, seed, p, mode, strides, backend):
    return _apply(dy, None, seed, p, mode, strides, backend)


def _backward_fake(dy, seed, p, mode, strides, backend):
    return dy.new_empty_strided(dy.shape, strides)


_SCHEMA = "(Tensor x, Tensor? residual, Tensor seed, float p, str mode, str backend) -> Tensor"
_infer = dispatch.register("dropout_inference" + _SCHEMA, _body, _fake)
_backward = dispatch.register(
    "dropout_backward(Tensor dy, Tensor seed, float p, str mode, SymInt[] strides, str backend) -> Tensor",
    _backward_body,
    _backward_fake,
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _differentiable(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, seed, *ctx.arguments, ctx.backend = inputs
        ctx.strides = output.stride()
        ctx.save_for_backward(seed)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _backward(dy, *ctx.saved_tensors, *ctx.arguments, ctx.strides, ctx.backend)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None, None


def _autograd(x, residual, *arguments):
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return _Dropout.apply(x, residual, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(x, residual, *arguments)


_differentiable = dispatch.register("dropout" + _SCHEMA, _body, _fake, autograd=_autograd)

# --- functions and modules ----------------------------------------------------------------------------------


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed, int64 [1], from torch's generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _drop(x, p, training, residual, mode, seed, backend) -> Tensor:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0.0:
        return x if residual is None else x + residual
    seed = draw_seed(x.device) if seed is None else seed
    dispatch.validate_backend(backend)
    if in_transform():
        _validate(x, residual, seed, p, mode)
        return _composition(x, residual, seed, p, mode, _strides(x, mode))
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, residual, seed, p, mode, backend)


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``F.dropout(x, p, training) + residual`` with a mask that is computed again in the backward.

    x: any shape, a floating dtype, any strides; residual: like x, or None. seed: int64 [1] on x's device; by
    default a new one is drawn. Rounded once. Differentiable once, in x and residual.
    """
    return _drop(x, p, training, residual, "element", seed, backend)


def stochastic_depth(
    x: Tensor,
    p: float,
    mode: str,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``torchvision.ops.stochastic_depth(x, p, mode, training) + residual``: whole rows x[n] are dropped
    (``mode`` "row"), or all of x at once ("batch"). After Huang et al., 2016; see ``dropout``."""
    if mode not in MODES[1:]:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
    return _drop(x, p, training, residual, mode, seed, backend)


class Dropout(nn.Dropout):
    """``nn.Dropout`` from a seed, with an optional residual: ``Dropout(0.1)(x, residual)``.

    ``inplace=True`` is refused: the backward of others may need x.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, backend: str = "auto"):
        if inplace:
            raise ValueError("Dropout: inplace=True is not supported; leave it out, nothing is kept of x")
        super().__init__(p)
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, module: nn.Dropout, *, backend: str = "auto") -> Dropout:
        """The fused module with the settings of a stock one."""
        if type(module) is not nn.Dropout:
            raise TypeError(f"Dropout.from_stock: got {type(module).__name__}, expected nn.Dropout")
        return cls(module.p, module.inplace, backend=backend).train(module.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input of any shape, residual like it or None -> a tensor like input."""
        return dropout(input, self.p, self.training, residual=residual, backend=self.backend)


class StochasticDepth(nn.Module):
    """``torchvision.ops.StochasticDepth`` from a seed, with an optional residual:
    ``StochasticDepth(0.2, "row")(x, residual)``."""

    def __init__(self, p: float, mode: str, *, backend: str = "auto"):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"drop probability has to be between 0 and 1, but got {p}")
        if mode not in MODES[1:]:
            raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
        self.p = p
        self.mode = mode
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, module: nn.Module, *, backend: str = "auto") -> StochasticDepth:
        """The fused module with the settings of torchvision's."""
        if type(module).__name__ != "StochasticDepth":
            raise TypeError(
                f"StochasticDepth.from_stock: got {type(module).__name__}, expected torchvision's"
            )
        return cls(module.p, module.mode, backend=backend).train(module.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [N, ...], residual like it or None -> a tensor like input."""
        return stochastic_depth(
            input, self.p, self.mode, self.training, residual=residual, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"
