"""Gated activations: y = act(gate) · up, the middle of SwiGLU and GEGLU blocks.

gate and up are two tensors [..., N] or the halves of one packed [..., 2N], as one linear layer makes them:
then they are read, and their gradients written, where they lie, and no concatenation is made in the backward.
Saved are gate and up. On the CPU ``backend="auto"`` is stock's two operations. Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import in_transform


def _halves(gate: Tensor, up: Tensor | None, gate_last: bool) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    one, two = gate.chunk(2, -1)
    return (two, one) if gate_last else (one, two)


def _validate(gate, up, activation) -> None:
    activation_of(activation)
    if not gate.is_floating_point():
        raise TypeError(f"gated_act: gate is {gate.dtype}; convert it to a floating dtype first")
    if gate.dim() == 0:
        raise ValueError("gated_act: gate must have at least one dimension")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gated_act: {gate.shape[-1]} packed features are no two halves")
    elif up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"gated_act: up is {tuple(up.shape)} {up.dtype} on {up.device}, "
            f"gate {tuple(gate.shape)} {gate.dtype} on {gate.device}; expand or convert it first"
        )


def _composition(gate, up, activation) -> Tensor:
    return activation_of(activation).forward(gate, 0.0) * up


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dispatch.replays(tensors=2)
def _body(gate, up, activation, gate_last, backend):
    _validate(gate, up, activation)
    one, two = _halves(gate, up, gate_last)
    if dispatch.triton_or_reference(gate, backend) == "triton":
        from fastnets.kernels.gated import gated_act as launch

        return launch(one, two, activation)
    return _composition(_wide(one), _wide(two), activation).to(gate.dtype).contiguous()


def _fake(gate, up, activation, gate_last, backend):
    _validate(gate, up, activation)
    one, _ = _halves(gate, up, gate_last)
    return gate.new_empty(one.shape)


def _backward_body(dy, gate, up, activation, gate_last, backend):
    """The gradients of gate and up; with up None that of the packed tensor and an empty one."""
    one, two = _halves(gate, up, gate_last)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    d_one, d_two = _halves(dgate, dup, gate_last)
    if dispatch.triton_or_reference(gate, backend) == "triton":
        from fastnets.kernels.gated import gated_act_backward as launch

        launch(dy, one, two, activation, d_one, d_two)
    else:
        entry, dy = activation_of(activation), _wide(dy)
        d_one.copy_(entry.backward(dy * _wide(two), _wide(one), 0.0))
        d_two.copy_(dy * entry.forward(_wide(one), 0.0))
    return dgate, gate.new_empty(0) if dup is None else dup


def _backward_fake(dy, gate, up, activation, gate_last, backend):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


_SCHEMA = "(Tensor gate, Tensor? up, str activation, bool gate_last, str backend) -> Tensor"
_infer = dispatch.register("gated_act_inference" + _SCHEMA, _body, _fake)
_backward = dispatch.register(
    "gated_act_backward(Tensor dy, Tensor gate, Tensor? up, str activation, bool gate_last, str backend)"
    " -> (Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


class _GatedAct(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _differentiable(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, up, *ctx.options = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = _backward(dy, gate, up, *ctx.options)
        needs_gate, needs_up = ctx.needs_input_grad[:2]
        return dgate if needs_gate else None, dup if needs_up else None, None, None, None


def _autograd(gate, up, *options):
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _GatedAct.apply(gate, up, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(gate, up, *options)


_differentiable = dispatch.register("gated_act" + _SCHEMA, _body, _fake, autograd=_autograd)


def gated_act(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``act(gate) * up``: SwiGLU with "silu", GEGLU with "gelu" or "gelu_tanh".

    Args:
        gate: [..., N]; or [..., 2N] with ``up=None``, the packed halves (gate, up), or (up, gate) with
            ``gate_last``. A floating dtype, any strides.
        up: like gate, or None.
        activation: a name in ``fastnets.fused.activation.ACTIVATIONS``.

    Returns:
        [..., N], contiguous. Differentiable once; computed in float32 at least and rounded once.

    Raises:
        ValueError, TypeError: for shapes and dtypes other than these.
    """
    dispatch.validate_backend(backend)
    if in_transform() or dispatch.leaves_to_stock(gate, backend):
        _validate(gate, up, activation)
        return _composition(*_halves(gate, up, gate_last), activation)
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(gate, up, activation, gate_last, backend)
