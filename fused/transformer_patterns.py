"""Finding the chains of Transformers and ConvNeXts in a captured graph, and putting one call in their place.

    linear → [activation] → [permute] → [· layer scale] → [+ residual]      activation(gate) · up
    block  →                [permute] → [· layer scale] → [+ residual]      [x + residual →] norm
    F.scaled_dot_product_attention, F.linear, F.layer_norm

A *block* is a child that ends in a linear layer (an attention module, an MLP): what follows the child's call
is handed down to it, see ``fused.handing_down``. A chain that goes through a permutation, as ConvNeXt's does
between [N, H, W, C] and [N, C, H, W], is computed on the near side: the other operands are permuted back,
which moves nothing. Dropout and stochastic depth are not in the graph where they return their input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastnets.fused.attention import attention, implementation_of
from fastnets.fused.batch_norm import has_hooks, in_transform
from fastnets.fused.capture import CaptureError, capture
from fastnets.fused.chains import FRESH_FUNCTIONS, Chain, ChainFinder, Fusion, Left, addends, name_of, writes
from fastnets.fused.gated import gated_act
from fastnets.fused.handing_down import call_then_add, ends_in_linear, finish
from fastnets.fused.layer_norm import call_layer_norm, layer_norm
from fastnets.fused.layout import is_stock
from fastnets.fused.linear import call_linear, call_linear_act
from fastnets.fused.norm_linear import call_norm_linear

_MULTIPLY = (operator.mul, torch.mul, "mul", "mul_")
_RESHAPING = ("reshape", "view", "unsqueeze", "flatten", "squeeze")
_PARTS_OF_ONE = ("chunk", "split", "unbind", "tensor_split")
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def is_linear(module: nn.Module) -> bool:
    """A linear layer with the stock forward (a parametrized one, too: it runs stock while it is that)."""
    cls = type(module)
    return (
        isinstance(module, nn.Linear)
        and cls.forward is nn.Linear.forward
        and cls.__call__ is nn.Module.__call__
    )


def is_norm(module: nn.Module) -> bool:
    """A stock layer norm or RMS norm."""
    return type(module) in _NORMS


def is_attention(module: nn.Module) -> bool:
    """PyTorch's multi-head attention, or a class of its that was rewritten or is ours."""
    return isinstance(module, nn.MultiheadAttention) and (
        type(module).forward is nn.MultiheadAttention.forward or ends_in_linear(module)
    )


def is_elementary(module: nn.Module) -> bool:
    """Whether ``module`` does one thing to its input that a chain goes through: a layer scale (its only
    parameter times the input), or torchvision's permutation. Graphs go through it."""
    cls = type(module)
    if cls.__name__ == "Permute" and cls.__module__.startswith("torchvision."):
        return True
    if len(module._parameters) != 1 or module._buffers or module._modules or is_stock(cls):
        return False
    if None in module._parameters.values():
        return False
    try:
        graph = capture(module, training=False, inline=None).graph
    except CaptureError:
        return False
    nodes = list(graph.nodes)
    if len(nodes) != 4 or [nodes[0].op, nodes[1].op] != ["placeholder", "get_attr"]:
        return False
    x, parameter, product, output = nodes
    return _multiplies(product) and set(product.args) == {x, parameter} and output.args[0] is product


# --- what the graphs call -----------------------------------------------------------------------------------


def call_linear_scale_add(
    linear: nn.Linear,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    activation: str,
    negative_slope: float,
    backend: str,
    *,
    norm: nn.Module | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """``act(linear(x)) · scale + residual``: ``call_linear_act`` for whatever the network multiplies with.

    norm, statistics: where x is to be normalised first, see ``call_norm_linear``.
    """
    vector, plain = as_vector(scale, linear.out_features)
    added, times = (residual, vector) if plain else (None, None)
    options = (activation, negative_slope, times, backend)
    if norm is None:
        y = call_linear_act(linear, act, x, added, *options)
    else:
        y = call_norm_linear(norm, linear, act, x, added, *options, statistics=statistics)
    return y if plain else finish(y, residual, scale)


def as_vector(scale: Tensor | None, features: int) -> tuple[Tensor | None, bool]:
    """A layer scale as one value per feature, and whether it is that."""
    if scale is None:
        return None, True
    if not isinstance(scale, Tensor) or scale.dim() == 0 or scale.shape[-1] != features:
        return None, False
    if scale.dim() > 1:
        if scale.numel() != features:
            return None, False
        scale = scale.flatten()
    return scale, True


def operand_of_permuted(operand: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What is combined with ``x.permute(dims)`` element by element, as it is combined with ``x`` itself."""
    missing = len(dims) - operand.dim()
    if missing > 0:
        operand = operand.reshape((1,) * missing + operand.shape)
    more = max(-missing, 0)
    back = sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))
    return operand.permute(*range(more), *(more + i for i in back))


def call_gated(
    act: nn.Module | None, gate: Tensor, up: Tensor, activation: str, negative_slope: float, backend: str
) -> Tensor:
    """``act(gate) · up``, by the fused op where both are alike."""
    if (
        (act is not None and has_hooks(act))
        or gate.shape != up.shape
        or gate.dtype != up.dtype
        or not gate.is_floating_point()
        or in_transform()
    ):
        from fastnets.fused.activation import activation as activation_of

        gate = activation_of(activation).forward(gate, negative_slope) if act is None else act(gate)
        return gate * up
    return gated_act(gate, up, activation, backend=backend)


def call_add_norm(norm: nn.Module, x: Tensor, residual: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(norm(s), s)`` with ``s = x + residual``, also where the two broadcast or promote."""
    if not isinstance(x, Tensor) or x.shape != residual.shape or x.dtype != residual.dtype:
        s = x + residual
        return call_layer_norm(norm, s, None, backend), s
    return call_layer_norm(norm, x, residual, backend)


FRESH_FUNCTIONS.update((call_linear_scale_add, call_then_add, call_gated, attention, layer_norm))


# --- finding them -------------------------------------------------------------------------------------------


class TransformerFinder(ChainFinder):
    """Linear layers, norms and attention, and what follows them."""

    def fuse(self) -> None:
        self._replace_gates()
        for node in reversed(list(self.graph.nodes)):  # see ``patterns``
            if self.calls(node, is_linear):
                self._fuse_linear(node)
            elif node.op == "call_module" and ends_in_linear(self.modules[node.target]):
                self._hand_down(node)
        for node in list(self.graph.nodes):
            if self.calls(node, is_norm):
                self._fuse_norm(node)
            elif node.op == "call_function" and node.target in _FUNCTIONS:
                self._replace_function(node)

    # linear and block chains

    def _fuse_linear(self, head: fx.Node) -> None:
        chain = Chain.from_head("linear", head)
        self.grow(chain, self.take_act)
        dims = self._grow_epilogue(chain)
        linear, act = head.target, chain.module_of("act")
        with self.graph.inserting_before(chain.last):
            modules = (
                self.graph.get_attr(linear),
                None if act is None else self.graph.get_attr(act),
            )
            operands = self._operands(chain, dims)
            arguments = (*modules, head.args[0], *operands, *chain.activation, self.backend)
            fused = self.graph.call_function(call_linear_scale_add, arguments)
            if dims is not None:
                fused = self.graph.call_function(torch.permute, (fused, dims))
        self._record("linear", chain)
        self.replace(chain, fused)

    def _hand_down(self, head: fx.Node) -> None:
        """Let the child that ``head`` calls scale and add at its end."""
        chain = Chain.from_head("block", head)
        unread: list[fx.Node] = []
        if is_attention(self.modules[head.target]):  # returns (output, weights)
            if any(user.target is not operator.getitem for user in head.users):
                return
            outputs = [user for user in head.users if user.args[1] == 0]
            unread = [user for user in head.users if user not in outputs]
            if len(outputs) != 1 or any(user.users for user in unread):
                return
            chain.append("output", outputs[0])
        dims = self._grow_epilogue(chain)
        if chain.get("scale") is None and chain.get("add") is None:
            return
        with self.graph.inserting_before(chain.last):
            module = self.graph.get_attr(head.target)
            arguments = (module, *self._operands(chain, dims), *head.args)
            fused = self.graph.call_function(call_then_add, arguments, dict(head.kwargs))
            if dims is not None:
                fused = self.graph.call_function(torch.permute, (fused, dims))
        self._record("block", chain)
        for node in unread:
            self.graph.erase_node(node)
        self.replace(chain, fused)

    def _grow_epilogue(self, chain: Chain) -> tuple[int, ...] | None:
        """[permute] → [scale] → [add]; the permutation's dimensions where there is one."""
        before = len(chain.parts)
        dims = None
        if self.grow(chain, self._take_permutation):
            dims = _permutation(chain.last)
        self.grow(chain, self._take_scale)
        self.grow(chain, self.take_add)
        if dims is not None and len(chain.parts) == before + 1:
            chain.drop()
            return None
        return dims

    def _operands(self, chain: Chain, dims: tuple[int, ...] | None) -> tuple:
        """(residual, scale) as nodes, on the near side of the permutation."""
        operands = (chain.residual, chain.scale)
        if dims is None:
            return operands
        return tuple(
            None if operand is None else self.graph.call_function(operand_of_permuted, (operand, dims))
            for operand in operands
        )

    def _take_permutation(self, chain: Chain, node: fx.Node) -> bool:
        if _permutation(node) is None or node.args[0] is not chain.last:
            return False
        chain.append("permute", node)
        return True

    def _take_scale(self, chain: Chain, node: fx.Node) -> bool:
        if not _multiplies(node):
            return False
        operands = [operand for operand in node.args if operand is not chain.last]
        if len(operands) != 1 or not _is_parameter(operands[0]):
            return False
        if writes(node) and node.args[0] is not chain.last:
            return False
        chain.append("scale", node, operands[0])
        chain.scale = operands[0]
        return True

    def _record(self, family: str, chain: Chain) -> None:
        roles = [role for role, _ in chain.parts if role not in ("permute", "output")]
        kind = "+".join(chain.activation[0] if role == "act" else role for role in roles)
        layers = chain.layers(family, "act")
        self.fusions.append(Fusion(family, kind, layers, chain.activation[0]))

    # norms

    def _fuse_norm(self, node: fx.Node) -> None:
        total = node.args[0]
        operands = addends(total) if isinstance(total, fx.Node) else None
        norm_layers = (("norm", node.target),)
        if operands is not None and self._may_add_before(total, operands, node):
            with self.graph.inserting_before(total):
                norm = self.graph.get_attr(node.target)
                both = self.graph.call_function(call_add_norm, (norm, *operands, self.unfolding))
                normalised = self.graph.call_function(operator.getitem, (both, 0))
                added = self.graph.call_function(operator.getitem, (both, 1))
            node.replace_all_uses_with(normalised)
            total.replace_all_uses_with(added)
            self.erase([total, node])
            self.fusions.append(Fusion("norm", f"add+{self._norm_kind(node)}", norm_layers))
            return
        with self.graph.inserting_before(node):
            norm = self.graph.get_attr(node.target)
            fused = self.graph.call_function(call_layer_norm, (norm, total, None, self.unfolding))
        node.replace_all_uses_with(fused)
        kind = self._norm_kind(node)
        self.erase([node])
        self.fusions.append(Fusion("norm", kind, norm_layers))

    def _norm_kind(self, node: fx.Node) -> str:
        return "rms_norm" if isinstance(self.modules[node.target], nn.RMSNorm) else "layer_norm"

    def _may_add_before(self, total: fx.Node, operands: tuple, norm: fx.Node) -> bool:
        """Whether the addition may be the norm's: two tensors, not written in place."""
        if not all(isinstance(operand, fx.Node) for operand in operands) or operands[0] is operands[1]:
            return False
        if writes(total) or total.kwargs:
            return False
        return self.memory.write_between([total, norm], total, total) is None

    # gates

    def _replace_gates(self) -> None:
        for node in list(self.graph.nodes):
            if not _multiplies(node) or writes(node):
                continue
            for act, up in (node.args[:2], node.args[1::-1]):
                if self._is_gate(act, up, node):
                    self._replace_gate(act, up, node)
                    break

    def _is_gate(self, act: object, up: object, product: fx.Node) -> bool:
        if not isinstance(act, fx.Node) or not isinstance(up, fx.Node) or act is up:
            return False
        found = self.activation(act)
        if found is None or found[0] == "none" or list(act.users) != [product]:
            return False
        gate = act.args[0]
        if gate is up or not (self._is_projection(gate) and self._is_projection(up)):
            return False
        return self.memory.write_between([act, product], act, gate) is None

    def _is_projection(self, node: fx.Node) -> bool:
        """A linear layer's result, or a part of one."""
        if self.calls(node, is_linear):
            return True
        if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            return False
        return getattr(node.args[0].target, "__name__", node.args[0].target) in _PARTS_OF_ONE

    def _replace_gate(self, act: fx.Node, up: fx.Node, product: fx.Node) -> None:
        chain = Chain.from_head("act", act)
        chain.activation = self.activation(act)
        chain.append("product", product, up)
        with self.graph.inserting_before(product):
            module = chain.module_of("act")
            module = None if module is None else self.graph.get_attr(module)
            arguments = (module, act.args[0], up, *chain.activation, self.unfolding)
            fused = self.graph.call_function(call_gated, arguments)
        self.fusions.append(Fusion("gate", f"{chain.activation[0]}*up", chain.layers("act")))
        self.replace(chain, fused)

    # functions

    def _replace_function(self, node: fx.Node) -> None:
        call, kind = _FUNCTIONS[node.target]
        if "input" in node.kwargs:
            return
        kwargs, read = {**node.kwargs, "backend": self.unfolding}, [node]
        repeated = node.kwargs.get("attn_mask")
        if call is call_attention and self._may_stay_short(repeated, node):
            kwargs["attn_mask"], kwargs["repeats"] = repeated.args[:2]
            read.insert(0, repeated)
        with self.graph.inserting_before(node):
            fused = self.graph.call_function(call, node.args, kwargs)
        node.replace_all_uses_with(fused)
        self.erase(read)
        self.fusions.append(Fusion(kind, kind))

    def _may_stay_short(self, mask: object, reader: fx.Node) -> bool:
        """Whether ``mask`` is ``short.repeat(n, 1, 1, 1)`` for this reader alone."""
        if not isinstance(mask, fx.Node) or mask.op != "call_method" or mask.target != "repeat":
            return False
        if mask.args[2:] != (1, 1, 1) or mask.kwargs or list(mask.users) != [reader]:
            return False
        return self.memory.write_between([mask, reader], mask, mask.args[0]) is None

    def note_leftovers(self) -> None:
        """Record what follows a linear layer, could in principle be fused, and was not."""
        for node in self.graph.nodes:
            sources = [s for s in node.all_input_nodes if s.target is call_linear_scale_add]
            if not sources or sources[0].args[3] is not None or sources[0].args[4] is not None:
                continue
            if addends(node) is not None:
                kind = "add"
            elif (found := self.activation(node)) is not None and sources[0].args[5] == "none":
                kind = found[0]
            else:
                continue
            if kind == "none":
                continue
            reason = self.why.get(node, f"{name_of(sources[0])} has other readers")
            self.left.append(Left(node.target if node.op == "call_module" else node.name, kind, reason))


def call_attention(
    *arguments: object, backend: str = "auto", repeats: int | None = None, **options: object
) -> Tensor:
    """``F.scaled_dot_product_attention`` by the fused op where that serves, by PyTorch's elsewhere.

    repeats: how often the network repeats ``attn_mask`` along the batch; our kernels read it as it is.
    """
    if repeats is not None:
        query, key, value, mask = *arguments[:3], options["attn_mask"]
        if _reads_in_turn(query, key, value, mask, repeats, backend):
            apart = (t.unflatten(0, (repeats, -1)) for t in arguments[:3])
            return attention(*apart, backend=backend, **options).flatten(0, 1)
        options["attn_mask"] = mask.repeat(repeats, 1, 1, 1)
    tensors = [a for a in (*arguments[:4], *options.values()) if isinstance(a, Tensor)]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_nested for t in tensors) or in_transform():
        return F.scaled_dot_product_attention(*arguments, **options)
    return attention(*arguments, backend=backend, **options)


def _reads_in_turn(query, key, value, mask, repeats: int, backend: str) -> bool:
    """Whether our kernels run, and can take a mask of ``batch / repeats`` for each part of the batch."""
    if not all(type(t) in (Tensor, nn.Parameter) and t.dim() == 4 for t in (query, key, value, mask)):
        return False
    batches = {query.shape[0], key.shape[0], value.shape[0], mask.shape[0] * repeats}
    if repeats < 2 or len(batches) != 1 or in_transform():
        return False
    return implementation_of(query, key, value, backend, mask) == "triton"


def call_layer_norm_function(
    x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """``F.layer_norm``, likewise."""
    if not _is_plain(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    return layer_norm(x, normalized_shape, weight, bias, eps, backend=backend)


def _is_plain(x: Tensor, *parameters: Tensor | None) -> bool:
    if in_transform() or not x.is_floating_point() or x.dim() < 2:
        return False
    tensors = [x, *(p for p in parameters if p is not None)]
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_nested and t.dtype == x.dtype for t in tensors)


_FUNCTIONS: dict[Callable, tuple[Callable, str]] = {
    F.scaled_dot_product_attention: (call_attention, "attention"),
    F.linear: (call_linear, "linear"),
    F.layer_norm: (call_layer_norm_function, "layer_norm"),
}
FRESH_FUNCTIONS.update((call_attention, call_linear, call_layer_norm_function))


def _multiplies(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and (node.target in _MULTIPLY or getattr(node.target, "__name__", "") == "imul")
        and len(node.args) == 2
        and not node.kwargs
    )


def _is_parameter(node: object) -> bool:
    """A parameter or buffer, perhaps reshaped."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return True
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_method", "call_function") and name in _RESHAPING and _is_parameter(node.args[0])


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions where the node permutes its first argument."""
    if node.target not in ("permute", torch.permute) or node.kwargs:
        return None
    dims = node.args[1:]
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)
    return dims if dims and all(isinstance(d, int) for d in dims) else None


def is_linear_result(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's value comes from a linear layer, here or in a child: it is contiguous then."""
    if node.op == "call_module":
        child = root.get_submodule(node.target)
        return ends_in_linear(child) and not isinstance(child, nn.MultiheadAttention)
    return node.target is call_linear_scale_add


def ending_in_addition(graph: fx.Graph, root: nn.Module) -> fx.Graph | None:
    """The graph with two more inputs, whose last layer scales and adds them: ``(..., residual, scale)``.

    None where the graph does not end in a linear layer, or in a block that does.
    """
    result = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    if not isinstance(result, fx.Node) or len(result.users) != 1:
        return None
    first_of = result.target is operator.getitem and result.args[1] == 0  # of attention's two results
    last = result.args[0] if first_of else result
    if last.op == "call_module":
        block = root.get_submodule(last.target)
        if len(last.users) != 1 or not ends_in_linear(block):
            return None
        if first_of != isinstance(block, nn.MultiheadAttention):
            return None
    elif last.target is not call_linear_scale_add or first_of or last.args[3:6] != (None, None, "none"):
        return None

    adding, copies = fx.Graph(), {}
    output = adding.graph_copy(graph, copies)
    last, result = copies[last], output
    inputs = [node for node in adding.nodes if node.op == "placeholder"]
    with adding.inserting_after(inputs[-1]) if inputs else adding.inserting_before(next(iter(adding.nodes))):
        residual = adding.placeholder("_fn_residual")
    with adding.inserting_after(residual):
        scale = adding.placeholder("_fn_scale")
    if last.op == "call_module":
        with adding.inserting_before(last):
            block = adding.get_attr(last.target)
            added = adding.call_function(call_then_add, (block, residual, scale, *last.args), last.kwargs)
        if first_of:
            adding.erase_node(result)
        else:
            last.replace_all_uses_with(added)
        adding.erase_node(last)
        result = added
    else:
        last.args = (*last.args[:3], residual, scale, *last.args[5:])
    adding.output(result)
    return adding
