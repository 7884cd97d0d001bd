"""Squeeze-and-excite in two launches, and its gradient.

    m = mean of x over pixels;   y = x · gate(W₂ act(W₁ m + b₁) + b₂)

x [N, C, H, W]; W₁ [S, C, 1, 1], W₂ [C, S, 1, 1], weights of 1×1 convolutions. Stock takes seven launches or
more. Saved are x and m; the backward sums dy · x by planes, goes back through the two tiny layers, and scales
dy: two passes over images. On the CPU ``backend="auto"`` is stock. Hu, Shen and Sun, "Squeeze-and-Excitation
Networks", 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.activation import recognise
from fastnets.fused.batch_norm import has_hooks, in_transform
from fastnets.fused.pool import is_channels_last

_NAME = "squeeze_excite"


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(x, backend)


def _validate(x, w1, b1, w2, b2, activation, gate) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{_NAME}: x is {tuple(x.shape)} {x.dtype}, expected floating [N, C, H, W]")
    C, S = x.shape[1], w1.shape[0]
    expected = {"w1": (S, C, 1, 1), "b1": (S,), "w2": (C, S, 1, 1), "b2": (C,)}
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{_NAME}: {name} is {tuple(tensor.shape)}, expected {expected[name]}")
        if tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, x on {x.device}; move one of them")
    activation_of(activation)
    activation_of(gate)
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"{_NAME}: x {tuple(x.shape)} has no pixels")


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _layers(mean, w1, b1, w2, b2, activation) -> tuple[Tensor, Tensor, Tensor]:
    """(pre-activation [N, S], hidden [N, S], what the gate is of [N, C]), in float32 at least."""
    mean, w1, b1, w2, b2 = (_wide(t) for t in (mean, w1, b1, w2, b2))
    one = F.linear(mean.flatten(1), w1.flatten(1), b1)
    hidden = activation_of(activation).forward(one, 0.0)
    return one, hidden, F.linear(hidden, w2.flatten(1), b2)


def _dense(x: Tensor) -> Tensor:
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)


def _forward_body(x, w1, b1, w2, b2, activation, gate, backend):
    """(y, mean [N, C] in x's dtype)."""
    _validate(x, w1, b1, w2, b2, activation, gate)
    x = _dense(x)
    if x.numel() and choose(x, backend) == "triton":
        from fastnets.kernels import squeeze_excite as kernels
        from fastnets.kernels.plane_mean import plane_mean

        mean = plane_mean(x, channels_last=not x.is_contiguous()).flatten(1)
        if w1.shape[0] > kernels.MOST_SQUEEZED:
            scale = activation_of(gate).forward(_layers(mean, w1, b1, w2, b2, activation)[2], 0.0)
            return kernels.scale_planes(x, scale), mean
        y, _ = kernels.excite(x, mean, w1.contiguous(), b1, w2.contiguous(), b2, activation, gate)
        return y, mean
    mean = _wide(x).mean((2, 3)).to(x.dtype)
    scale = activation_of(gate).forward(_layers(mean, w1, b1, w2, b2, activation)[2], 0.0)
    y = torch.empty_like(x).copy_(_wide(x) * scale[:, :, None, None])
    return y, mean


def _body(*arguments):
    return _forward_body(*arguments)[0]


def _forward_fake(x, w1, b1, w2, b2, activation, gate, backend):
    _validate(x, w1, b1, w2, b2, activation, gate)
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return y, x.new_empty(x.shape[:2])


def _fake(*arguments):
    return _forward_fake(*arguments)[0]


def _backward_body(dy, x, mean, w1, b1, w2, b2, activation, gate, backend):
    """The gradients of x and of the four parameters, empty tensors for those that are not there."""
    x = _dense(x)
    pixels = x.shape[2] * x.shape[3]
    triton = x.numel() and choose(x, backend) == "triton"
    if triton:
        from fastnets.kernels import squeeze_excite as kernels
        from fastnets.kernels.plane_mean import plane_mean

        if dy.stride() != x.stride():
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        products = plane_mean(x, channels_last=not x.is_contiguous(), factor=dy, dtype=torch.float32)
        dscale = products.flatten(1) * pixels
    else:
        dscale = (_wide(dy) * _wide(x)).sum((2, 3))
    one, hidden, two = _layers(mean, w1, b1, w2, b2, activation)
    scale = activation_of(gate).forward(two, 0.0)
    dtwo = activation_of(gate).backward(dscale, two, 0.0)
    done = activation_of(activation).backward(dtwo @ _wide(w2).flatten(1), one, 0.0)
    shift = done @ _wide(w1).flatten(1) / pixels
    gradients = [
        (done.t() @ _wide(mean)).view_as(w1).to(w1.dtype),
        x.new_empty(0) if b1 is None else done.sum(0).to(b1.dtype),
        (dtwo.t() @ hidden).view_as(w2).to(w2.dtype),
        x.new_empty(0) if b2 is None else dtwo.sum(0).to(b2.dtype),
    ]
    if triton:
        dx = kernels.scale_planes(dy, scale.contiguous(), shift.contiguous(), dtype=x.dtype)
    else:
        dx = torch.empty_like(x).copy_(_wide(dy) * scale[:, :, None, None] + shift[:, :, None, None])
    return dx, *gradients


def _backward_fake(dy, x, mean, w1, b1, w2, b2, activation, gate, backend):
    dx = _fake(x, w1, b1, w2, b2, activation, gate, backend)
    return dx, *(
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (w1, b1, w2, b2)
    )


_REST = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate, str backend"
_infer = dispatch.register(f"squeeze_excite_inference(Tensor x, {_REST}) -> Tensor", _body, _fake)
_forward = dispatch.register(
    f"squeeze_excite_forward(Tensor x, {_REST}) -> (Tensor, Tensor)", _forward_body, _forward_fake
)
_backward = dispatch.register(
    f"squeeze_excite_backward(Tensor dy, Tensor x, Tensor mean, {_REST})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


class _SqueezeExcite(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], w1, b1, w2, b2)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 8
        gradients = _backward(dy, *ctx.saved_tensors, *ctx.options)
        needed = zip(gradients, ctx.needs_input_grad)
        return *[g if needs else None for g, needs in needed], None, None, None


def _autograd(*arguments):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
        return _SqueezeExcite.apply(*arguments)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*arguments)


_differentiable = dispatch.register(
    f"squeeze_excite(Tensor x, {_REST}) -> Tensor", _body, _fake, autograd=_autograd
)


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
    *,
    backend: str = "auto",
) -> Tensor:
    """``x * gate(conv(act(conv(mean(x), w1, b1)), w2, b2))``: see the top of this file.

    Args:
        x: [N, C, H, W], a floating dtype, any strides. The result is channels-last where x is, else
            contiguous.
        w1, b1, w2, b2: [S, C, 1, 1], [S] or None, [C, S, 1, 1], [C] or None; any floating dtype.
        activation, gate: names in ``fastnets.fused.activation.ACTIVATIONS``.

    Returns:
        A tensor like x. Differentiable once. The mean is rounded to x's dtype, as stock's is; the rest is
        computed in float32 at least and rounded once.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    dispatch.validate_backend(backend)
    if in_transform() or dispatch.leaves_to_stock(x, backend):
        _validate(x, w1, b1, w2, b2, activation, gate)
        hidden = activation_of(activation).forward(F.conv2d(x.mean((2, 3), keepdim=True), w1, b1), 0.0)
        return x * activation_of(gate).forward(F.conv2d(hidden, w2, b2), 0.0)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, w1, b1, w2, b2, activation, gate, backend)


# --- what rewritten networks call ---------------------------------------------------------------------------

# Of each class that is known, by module and name: (reduce, act, expand, gate).
_PARTS = {
    ("torchvision.ops.misc", "SqueezeExcitation"): ("fc1", "activation", "fc2", "scale_activation"),
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): ("conv_reduce", "act1", "conv_expand", "gate"),
    ("timm.layers.squeeze_excite", "SEModule"): ("fc1", "act", "fc2", "gate"),
    ("fastnets.models.blocks", "SqueezeExcite"): ("fc1", "act", "fc2", "gate"),
}


def _known_class(module: nn.Module) -> tuple[str, ...] | None:
    """The parts of a squeeze-and-excite of torchvision, timm or ours, or of its rewritten class."""
    cls = type(module)
    blueprint = cls.__dict__.get("_fastnets")
    cls = cls if blueprint is None else blueprint.stock_class
    return _PARTS.get((cls.__module__, cls.__name__))


def parts_of(module: nn.Module) -> tuple[nn.Conv2d, str, nn.Conv2d, str] | None:
    """(reduce, activation, expand, gate) of a module that is squeeze-and-excite and no more, else None."""
    names = _known_class(module)
    if names is None:
        return None
    if getattr(module, "add_maxpool", False) or type(getattr(module, "bn", None)) not in (
        type(None),
        nn.Identity,
    ):
        return None
    reduce, act, expand, gate = (getattr(module, name, None) for name in names)
    acts = recognise_layer(act), recognise_layer(gate)
    for conv in (reduce, expand):
        if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.groups != 1:
            return None
        if conv.stride != (1, 1) or conv.padding not in ((0, 0), "valid", "same"):
            return None
    if None in acts:
        return None
    return reduce, acts[0], expand, acts[1]


def recognise_layer(act: nn.Module | None) -> str | None:
    """The name of an activation, timm's own sigmoid among them; None for others."""
    if type(act).__module__.startswith("timm.layers.activations"):
        return {"Sigmoid": "sigmoid", "HardSigmoid": "hardsigmoid", "Tanh": "tanh"}.get(type(act).__name__)
    found = None if act is None else recognise(act)
    return None if found is None or found[0] in ("leaky_relu", "none") else found[0]


def is_squeeze_excite(module: nn.Module) -> bool:
    """Whether ``call_squeeze_excite`` may stand for a call of the module."""
    return parts_of(module) is not None


def call_squeeze_excite(module: nn.Module, x: Tensor, backend: str = "auto") -> Tensor:
    """``module(x)`` by the fused op where that is stock's result, by the module itself elsewhere.

    The module runs on the CPU (``backend="auto"``), where it or a part of it has hooks, and where dtypes
    differ.
    """
    arguments = fused_arguments(module, x, backend)
    return module(x) if arguments is None else squeeze_excite(x, *arguments, backend=backend)


def fused_arguments(module: nn.Module, x: Tensor, backend: str) -> tuple | None:
    """What ``squeeze_excite`` takes besides x to stand for ``module(x)``; None where the module is to run."""
    if (
        not isinstance(x, Tensor)
        or x.dim() != 4
        or not x.is_floating_point()
        or in_transform()
        or dispatch.leaves_to_stock(x, backend)
        or _has_any_global_hook()
        or has_hooks(module)
        or any(has_hooks(part) or "parametrizations" in part._modules for part in module.children())
    ):
        return None
    parts = parts_of(module)
    device_type = dispatch.device_type_of(x)
    autocast = torch.is_autocast_enabled(device_type)
    computed = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if parts is None or x.dtype != computed or x.shape[1] != parts[0].in_channels or not x.numel():
        return None
    reduce, activation, expand, gate = parts
    if not autocast and not reduce.weight.dtype == expand.weight.dtype == x.dtype:
        return None
    return reduce.weight, reduce.bias, expand.weight, expand.bias, activation, gate


class SqueezeExcite(nn.Module):
    """Squeeze-and-excite: ``SqueezeExcite(96, 24, act=nn.SiLU())(x)``.

    input_channels, squeeze_channels: of the two 1×1 convolutions ``reduce`` and ``expand``. act, gate: stock
    activation modules. ``from_stock`` takes torchvision's ``SqueezeExcitation``, timm's ``SqueezeExcite`` and
    ``SEModule``, and shares their layers.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        *,
        act: nn.Module | None = None,
        gate: nn.Module | None = None,
        device=None,
        dtype=None,
        backend: str = "auto",
    ):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.reduce = nn.Conv2d(input_channels, squeeze_channels, 1, **kind)
        self.expand = nn.Conv2d(squeeze_channels, input_channels, 1, **kind)
        self.act = nn.ReLU() if act is None else act
        self.gate = nn.Sigmoid() if gate is None else gate
        self.backend = dispatch.validate_backend(backend)
        self._name_activations()

    def _name_activations(self) -> None:
        self.activations = recognise_layer(self.act), recognise_layer(self.gate)
        if None in self.activations:
            raise ValueError(f"SqueezeExcite: {self.act} or {self.gate} is no activation that is known")

    @classmethod
    def from_stock(cls, module: nn.Module, *, backend: str = "auto") -> SqueezeExcite:
        """The fused module around a stock one's layers, which the two share."""
        parts = parts_of(module)
        if parts is None:
            raise TypeError(
                f"SqueezeExcite.from_stock: got {type(module).__name__}, expected torchvision's "
                "SqueezeExcitation or timm's SqueezeExcite with 1×1 convolutions and known activations"
            )
        _, act, _, gate = _known_class(module)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.reduce, self.expand = parts[0], parts[2]
        self.act, self.gate = getattr(module, act), getattr(module, gate)
        self.backend = dispatch.validate_backend(backend)
        self._name_activations()
        return self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, H, W] -> a tensor like it."""
        reduce, expand = self.reduce, self.expand
        arguments = (reduce.weight, reduce.bias, expand.weight, expand.bias, *self.activations)
        return squeeze_excite(input, *arguments, backend=self.backend)
