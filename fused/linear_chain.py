"""A chain of small linear layers and their activations as one op: the classifier of LeNet and its like.

    h = x.flatten(1);  h = act_i(h @ weight_i.T + bias_i) for each layer i

x [M, K] or [M, C, H, W], weight_i [N_i, N_(i-1)], N_i ≤ 128, two or three layers. Inference gains by it; with
gradients the layers run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fastnets.fused import dispatch, onednn
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import has_hooks, is_unobserved
from fastnets.fused.chains import Fusion
from fastnets.fused.linear import SMALL_ON_CPU, call_linear_act, linear_act
from fastnets.fused.transformer_patterns import call_linear_scale_add
from fastnets.kernels.recording import is_seen_by_modes

_SCHEMA = "(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor"
_LAYERS, _WIDEST = (2, 3), 128  # as kernels.linear_chain, which is not imported before it is needed
_DEEPEST = 1024  # inputs of the first layer in rewritten networks: a program takes them all, block by block


def _body(x, weights, biases, activations, backend):
    _validate(x, weights, biases, activations)
    if x.numel() and dispatch.triton_or_reference(x, backend) == "triton":
        from fastnets.kernels.linear_chain import linear_chain as launch

        weights = [w if w.dtype == x.dtype else w.to(x.dtype) for w in weights]
        return launch(x, weights, biases, activations)
    y = x.flatten(1)
    for weight, bias, name in zip(weights, biases, activations):
        bias = None if bias is None else bias.to(x.dtype)
        y = activation_of(name).forward(torch.nn.functional.linear(y, weight.to(x.dtype), bias), 0.0)
    return y


def _validate(x, weights, biases, activations) -> None:
    if x.dim() not in (2, 4) or not x.is_floating_point():
        raise ValueError(
            f"linear_chain: x must be floating [M, K] or [M, C, H, W], got {x.dtype} {tuple(x.shape)}"
        )
    if len(weights) not in _LAYERS or not len(weights) == len(biases) == len(activations):
        raise ValueError(
            f"linear_chain: {len(weights)} weights, {len(biases)} biases and {len(activations)} activations; "
            "give two or three of each, or call linear_act"
        )
    width = math.prod(x.shape[1:])
    for i, (weight, bias, name) in enumerate(zip(weights, biases, activations)):
        activation_of(name)
        if name == "leaky_relu":
            raise ValueError("linear_chain: leaky_relu has a slope, which a chain does not take")
        if weight.dim() != 2 or weight.shape[1] != width or not 0 < weight.shape[0] <= _WIDEST:
            raise ValueError(
                f"linear_chain: weights[{i}] has shape {tuple(weight.shape)}, expected "
                f"[at most {_WIDEST}, {width}]; call linear_act for others"
            )
        if weight.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"linear_chain: x is {x.dtype}, weights[{i}] {weight.dtype}; convert one of them")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise ValueError(f"linear_chain: biases[{i}] has shape {tuple(bias.shape)}, expected ({width},)")


def _fake(x, weights, biases, activations, backend):
    _validate(x, weights, biases, activations)
    return x.new_empty((x.shape[0], weights[-1].shape[0]))


def _autograd(x, weights, biases, activations, backend):
    tensors = (x, *weights, *(b for b in biases if b is not None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        _validate(x, weights, biases, activations)
        y = x.flatten(1)
        for weight, bias, name in zip(weights, biases, activations):
            y = linear_act(y, weight, bias, activation=name, backend=backend)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(x, weights, biases, activations, backend)


def _autocast(x, weights, biases, activations, backend):
    with torch._C._ExcludeDispatchKeyGuard(dispatch.AUTOCAST_KEYS):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        op = _differentiable if torch.is_grad_enabled() else _infer
        return op(x, weights, biases, activations, backend)


def _flops(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * sum(n * k for n, k in weight_shapes)


_infer = dispatch.register("linear_chain_inference" + _SCHEMA, _body, _fake, autocast=_autocast, flops=_flops)
_differentiable = dispatch.register(
    "linear_chain" + _SCHEMA, _body, _fake, autograd=_autograd, autocast=_autocast, flops=_flops
)


def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    *,
    backend: str = "auto",
) -> Tensor:
    """``act_i(h @ weight_i.T + bias_i)`` layer after layer; see the top of this file.

    Args:
        x: [M, K] or [M, C, H, W], which is flattened; any strides.
        weights: two or three, [N_i, N_(i-1)], of x's dtype, N_i at most 128.
        biases: [N_i] or None for each. activations: a name for each, "leaky_relu" excepted.

    Returns:
        [M, N] of x's dtype, contiguous. Differentiable once.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(x, list(weights), list(biases), list(activations), dispatch.validate_backend(backend))


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_linear_chain(
    flatten: nn.Module | None,
    linears: tuple[nn.Linear, ...],
    acts: tuple[nn.Module | None, ...],
    activations: tuple[str, ...],
    x: Tensor,
    flattens: bool,
    backend: str,
) -> Tensor:
    """``flatten`` and linear layers with their activations: in one launch where our kernel serves them in
    inference, by PyTorch's functions where the CPU has little to compute, else by ``call_linear_act``, one
    after the other, whose remarks hold.

    flattens: stock flattens x first, by the module ``flatten`` or, where that is None, by a function.
    """
    wanted = _served_as_one(flatten, linears, acts, x, flattens, backend)
    if wanted and not _unobserved(x):
        wanted = ""
    if wanted == "stock":
        return _small_on_cpu(linears, activations, x)
    if wanted == "triton":
        weights = [linear._parameters["weight"] for linear in linears]
        biases = [linear._parameters["bias"] for linear in linears]
        return _infer(x, weights, biases, list(activations), backend)
    if flattens:
        x = x.flatten(1) if flatten is None else flatten(x)
    for linear, act, name in zip(linears, acts, activations):
        x = call_linear_act(linear, act, x, None, name, 0.0, None, backend)
    return x


def implementation_of(linears, acts, x: Tensor, backend: str = "auto") -> str:
    """The implementation that ``call_linear_chain`` would run for a flat input like ``x``, "" where each
    layer decides."""
    return _served_as_one(None, linears, acts, x, False, backend)


def _small_on_cpu(linears, activations, x: Tensor) -> Tensor:
    """Stock's functions: what nn.Module adds to each is a third of the time of LeNet's classifier."""
    y = x.flatten(1)
    for linear, name in zip(linears, activations):
        y = torch.nn.functional.linear(y, linear._parameters["weight"], linear._parameters["bias"])
        if name != "none":
            y = onednn.activate_in_place(y, name, 0.0)
    return y


def _served_as_one(flatten, linears, acts, x, flattens, backend) -> str:
    """What runs all layers: "triton", "stock" for PyTorch's functions, or "" where each layer decides."""
    if torch.is_grad_enabled() or x.__class__ is not Tensor or x.dim() != (4 if flattens else 2):
        return ""
    wanted, device = dispatch.requested(backend), dispatch.device_type_of(x)
    on_cpu = wanted == "auto" and device == "cpu" and backend != dispatch.UNFOLDED
    if on_cpu and x.numel() * linears[0].out_features >= SMALL_ON_CPU:
        return ""
    if not on_cpu and wanted != "triton" and not (wanted == "auto" and device == "cuda"):
        return ""
    if x.dtype not in dispatch.OUR_DTYPES:
        return ""
    if any(m is not None and has_hooks(m) for m in (flatten, *linears, *acts)):
        return ""
    width = math.prod(x.shape[1:])
    for linear in linears:
        weight = linear._parameters.get("weight")
        if linear.__class__ is not nn.Linear or weight.__class__ not in (nn.Parameter, Tensor):
            return ""
        if weight.dtype != x.dtype or weight.device != x.device or weight.shape[1] != width:
            return ""
        width = weight.shape[0]
    return "stock" if on_cpu else "triton"


def _unobserved(x: Tensor) -> bool:
    """As ``is_unobserved``; modes that count may look on."""
    if not is_seen_by_modes():
        return is_unobserved(x) and not torch.is_autocast_enabled(x.device.type)
    return x.is_meta


def join_linear_chains(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Put one call for two or three small linear layers of which each alone reads the one before.

    For graphs of inference, after all other patterns. Returns the fusions, those that joined as one.
    """
    nodes = [node for node in graph.nodes if _is_small_linear(node, modules)]
    for head in nodes:
        if head.target is not call_linear_scale_add:
            continue
        chain = [head]
        while len(chain) < max(_LAYERS):
            readers = list(chain[-1].users)
            if len(readers) != 1 or readers[0] not in nodes or readers[0].args[2] is not chain[-1]:
                break
            chain.append(readers[0])
        if len(chain) in _LAYERS and _is_head(head, nodes):
            fusions = _join(graph, modules, chain, fusions)
    return fusions


def _is_head(head: fx.Node, nodes: list[fx.Node]) -> bool:
    before = head.args[2]
    return before not in nodes or len(before.users) != 1


def _is_small_linear(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op != "call_function" or node.target is not call_linear_scale_add:
        return False
    linear, _, _, residual, scale, *_ = node.args
    plain = residual is None and scale is None and node.args[-3] != "leaky_relu" and not node.kwargs
    layer = modules[linear.target]
    return plain and layer.out_features <= _WIDEST and layer.in_features <= _DEEPEST


def _join(graph: fx.Graph, modules: dict[str, nn.Module], chain: list[fx.Node], fusions: tuple) -> tuple:
    head, last = chain[0], chain[-1]
    x = head.args[2]
    flatten = x if _flattens(x, modules) and len(x.users) == 1 else None
    linears, acts = (tuple(node.args[i] for node in chain) for i in (0, 1))
    with graph.inserting_before(last):
        module = (
            graph.get_attr(flatten.target) if flatten is not None and flatten.op == "call_module" else None
        )
        source = x if flatten is None else flatten.args[0]
        names = tuple(node.args[-3] for node in chain)
        arguments = (module, linears, acts, names, source, flatten is not None, head.args[-1])
        fused = graph.call_function(call_linear_chain, arguments)
    last.replace_all_uses_with(fused)
    for node in (*reversed(chain), *(() if flatten is None else (flatten,))):
        graph.erase_node(node)
    paths = [linear.target for linear in linears]
    parts = [f for f in fusions if f.family == "linear" and f.path("linear") in paths]
    parts.sort(key=lambda f: paths.index(f.path("linear")))
    layers = tuple(
        (role if i == 0 else f"{role} {i}", p) for i, f in enumerate(parts) for role, p in f.layers
    )
    one = Fusion("linear", "+".join(f.kind for f in parts), layers, parts[0].activation)
    return tuple(one if f is parts[0] else f for f in fusions if f not in parts[1:])


def _flattens(node: object, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module = modules[node.target]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target not in ("flatten", torch.flatten):
        return False
    return (node.args[1:] == (1,) and not node.kwargs) or (
        len(node.args) == 1 and node.kwargs == {"start_dim": 1}
    )
