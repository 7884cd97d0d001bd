"""What ops have in common that do in one launch what two ops do one after the other.

The two are what such an op means. They run where gradients are wanted and where our kernel does not serve;
vendors have no call for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastnets.fused import dispatch
from fastnets.fused.conv import implementation_of, must_run_stock


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: "triton", or "reference" for the two ops after one another.

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = dispatch.requested(backend)
    return "reference" if wanted == "library" else dispatch.triton_or_reference(x, backend)


def register(
    name: str,
    schema: str,
    body: Callable,
    fake: Callable,
    *,
    with_gradients: Callable,
    casts: tuple[int, ...] = (),
    **rules: Callable,
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The op and its twin below autograd, ``NAME_inference``; see ``dispatch.register``.

    with_gradients: the two ops by their differentiable forms, after a check of all arguments but the backend.
    casts: positions of the tensors that autocast casts, the convolutions' operands, which may be None; BN's
        vectors keep their precision.
    """

    def autocast(x, *others):
        arguments = [x, *others]
        with torch._C._ExcludeDispatchKeyGuard(dispatch.AUTOCAST_KEYS):
            if x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
                for i in casts:
                    arguments[i] = None if arguments[i] is None else arguments[i].to(dtype)
            return (differentiable if torch.is_grad_enabled() else infer)(*arguments)

    if casts:
        rules["autocast"] = autocast
    infer = dispatch.register(f"{name}_inference{schema}", body, fake, **rules)

    def autograd(*arguments):
        learns = torch.is_grad_enabled()
        if learns and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            return with_gradients(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return differentiable(*arguments)

    differentiable = dispatch.register(f"{name}{schema}", body, fake, autograd=autograd, **rules)
    return differentiable, infer


def may_be_ours(x: object, backend: str) -> bool:
    """Whether our kernels may run at all in inference: asked first, since the CPU has other ways."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or x.dim() != 4:
        return False
    if x.dtype not in dispatch.OUR_DTYPES or torch.is_autocast_enabled(dispatch.device_type_of(x)):
        return False
    wanted = dispatch.requested(backend)
    return wanted == "triton" or (wanted == "auto" and dispatch.device_type_of(x) == "cuda")


def runs_our_convolution(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    activation: str,
    backend: str,
    adds: bool = False,
) -> bool:
    """Whether ``call_conv_bn_act`` would run our kernel on these very tensors, given ``may_be_ours``."""
    if conv.training or (bn is not None and (bn.training or bn._buffers.get("running_mean") is None)):
        return False
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != conv.in_channels:
        return False
    if must_run_stock(conv, bn, act, x, conv._parameters.get("weight"), None):
        return False
    if conv.padding_mode != "zeros" or conv.padding.__class__ is str:
        return False
    return implementation_of(conv, bn, act, activation, x, backend, adds) == "triton"
