"""Finding conv → BN → (+ residual) → activation in a captured graph, and putting one call in their place.

Each convolution, and each batch norm that none comes before, starts a chain. The chain grows over its only
reader as long as that is the next thing that the fused op can do:

    conv → [batch norm] → [+ residual] → [activation]          batch norm → [+ residual] → [activation]

Of two branches that meet in an addition, the one that finishes later takes it: the other is its residual. A
chain never grows over a value that somebody else reads, nor over an in-place write that stock would show to
others: see :class:`_Memory`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fastnets.fused import preactivation
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import call_bn_add_act
from fastnets.fused.chains import (
    FRESH_FUNCTIONS,
    Chain,
    ChainFinder,
    Fusion,
    Left,
    addends,
    joined,
    name_of,
    put_one_call,
    sole_readers,
    writes,
)
from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.conv_training import Pending
from fastnets.fused.group_norm import GROUP_NORMS, call_group_norm_act
from fastnets.fused.ownership import GIVEN, MADE_HERE
from fastnets.fused.pool import POOLS, call_pool2d
from fastnets.fused.preactivation import call_preactivated_conv


def call_conv_bn_iadd_act(onto_residual: bool, *arguments: object, **options: object) -> Tensor:
    """``call_conv_bn_act(*arguments)`` where stock adds in place, and so keeps the dtype of what it writes.

    onto_residual: stock writes the sum to the residual's memory, else to the layer's result.
    """
    return _call_iadd(call_conv_bn_act, onto_residual, *arguments, **options)


def call_bn_iadd_act(onto_residual: bool, *arguments: object) -> Tensor:
    """``call_bn_add_act(*arguments)``, likewise."""
    return _call_iadd(call_bn_add_act, onto_residual, *arguments)


def _call_iadd(call: Callable, onto_residual: bool, *arguments: object, **options: object) -> Tensor:
    *layers, act, x, residual, activation, negative_slope, backend = arguments
    source = x.z if x.__class__ is Pending else x
    dtype = source.dtype
    if call is call_conv_bn_act and not source.is_meta and torch.is_autocast_enabled(source.device.type):
        dtype = torch.get_autocast_dtype(source.device.type)
    if residual.dtype == dtype:
        return call(*arguments, **options)
    y = call(*layers, None, x, None, "none", 0.0, backend)
    total = operator.iadd(residual, y) if onto_residual else operator.iadd(y, residual)
    return activation_of(activation).forward(total, negative_slope) if act is None else act(total)


_CALLS = (call_conv_bn_act, call_bn_add_act, call_conv_bn_iadd_act, call_bn_iadd_act)
FRESH_FUNCTIONS.update((*_CALLS, call_pool2d, call_group_norm_act))


def is_convolution(module: nn.Module) -> bool:
    """A 2-D convolution with the stock forward (a parametrized one, too: it runs stock while it is that)."""
    cls = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and cls.forward is nn.Conv2d.forward
        and cls._conv_forward is nn.Conv2d._conv_forward
        and cls.__call__ is nn.Module.__call__
    )


def is_batch_norm(module: nn.Module) -> bool:
    """A 2-D batch norm with the stock forward."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)


def norm_kind(module: nn.Module) -> str:
    """What reports call a group or instance norm."""
    return "group norm" if isinstance(module, nn.GroupNorm) else "instance norm"


class ConvFinder(ChainFinder):
    """Convolutions, batch norms and what follows them; group norms; pools."""

    def fuse(self) -> None:
        for is_head in (is_convolution, is_batch_norm):
            # From the end of the graph, so that of two branches that meet in an addition the later one takes
            # it.
            for node in reversed(list(self.graph.nodes)):
                if self.calls(node, is_head):
                    self._fuse_from(node)
        self._replace_group_norms()
        self._replace_pools()

    def _fuse_from(self, head: fx.Node) -> None:
        if is_convolution(self.modules[head.target]):
            chain = Chain.from_head("conv", head)
            self.grow(chain, self._take_bn)
        else:
            chain = Chain.from_head("bn", head)
        self.grow(chain, self.take_add)
        self.grow(chain, self.take_act)
        if chain.get("conv") is None and len(chain.parts) == 1:
            return  # a batch norm alone is one pass already
        self._replace(chain)

    def _take_bn(self, chain: Chain, node: fx.Node) -> bool:
        if not self.calls(node, is_batch_norm):
            return False
        chain.append("bn", node)
        return True

    def _replace(self, chain: Chain) -> None:
        conv, bn, add, act = (chain.get(role) for role in ("conv", "bn", "add", "act"))
        with self.graph.inserting_before(chain.last):
            bn_module = None if bn is None else self.graph.get_attr(bn.target)
            act_module = None if chain.module_of("act") is None else self.graph.get_attr(act.target)
            x, residual = chain.parts[0][1].args[0], chain.residual
            rest = (bn_module, act_module, x, residual, *chain.activation, self.backend)
            call = call_bn_add_act
            if conv is not None:
                call, rest = call_conv_bn_act, (self.graph.get_attr(conv.target), *rest)
            if add is not None and writes(add):
                call = call_bn_iadd_act if conv is None else call_conv_bn_iadd_act
                rest = (add.args[0] is residual, *rest)
            fused = self.graph.call_function(call, rest)
        self.replace(chain, fused)
        roles = [role for role, _ in chain.parts if role != "act"]
        if act is not None:
            roles.append(chain.activation[0])
        layers = chain.layers("conv", "bn", "act")
        self.fusions.append(Fusion(roles[0], "+".join(roles), layers, chain.activation[0]))

    def _replace_group_norms(self) -> None:
        """Group and instance norms with the activation that alone reads them, as one call."""
        for node in list(self.graph.nodes):
            if not self.calls(node, lambda module: type(module) in GROUP_NORMS):
                continue
            chain = Chain.from_head("norm", node)
            if not self.grow(chain, self.take_act):
                continue
            with self.graph.inserting_before(chain.last):
                norm = self.graph.get_attr(node.target)
                act = chain.module_of("act")
                act_module = None if act is None else self.graph.get_attr(act)
                arguments = (norm, act_module, node.args[0], *chain.activation, self.unfolding)
                fused = self.graph.call_function(call_group_norm_act, arguments)
            self.replace(chain, fused)
            kind = f"{norm_kind(self.modules[node.target])}+{chain.activation[0]}"
            self.fusions.append(Fusion("group_norm", kind, chain.layers("norm", "act"), chain.activation[0]))

    def _replace_pools(self) -> None:
        """Pooling by the op that keeps one byte for each window, or nothing, where stock keeps eight."""
        for node in list(self.graph.nodes):
            if not self.calls(node, lambda module: type(module) in POOLS):
                continue
            chain = Chain.from_head("pool", node)
            with self.graph.inserting_before(node):
                pool = self.graph.get_attr(node.target)
                fused = self.graph.call_function(call_pool2d, (pool, node.args[0], self.unfolding))
            self.replace(chain, fused)
            self.fusions.append(Fusion("pool", "pool", chain.layers("pool")))

    def note_leftovers(self) -> None:
        """Record what follows a convolution or batch norm, could in principle be fused, and was not."""
        for node in self.graph.nodes:
            sources = [s for s in node.all_input_nodes if s.target in _CALLS]
            if not sources:
                continue
            addition = addends(node) is not None
            if addition and all(source.args[-3] != "none" for source in sources):
                continue  # act(conv(x)) + y: nothing that one call could do
            if self.calls(node, is_batch_norm):
                kind = "bn"
            elif addition:
                kind = "add"
            elif (found := self.activation(node)) is not None and sources[0].args[-3] == "none":
                kind = found[0]
            else:
                continue
            reason = self.why.get(
                node, f"{name_of(sources[0])} has other readers or they are in another order"
            )
            self.left.append(Left(node.target if node.op == "call_module" else node.name, kind, reason))


CONV_CALLS = {
    call_conv_bn_act: 3,
    call_conv_bn_iadd_act: 4,
    call_preactivated_conv: 7,
}  # position of x; the residual comes next


def mark_dying_residuals(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Tell fused convolutions that are the last readers of their residuals so; the number of them.

    Every reader must be a convolution: what else reads a tensor may keep a view of it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    marked = 0
    for node in graph.nodes:
        position = CONV_CALLS.get(node.target) if node.op == "call_function" else None
        if position is None:
            continue
        x, residual = node.args[position : position + 2]
        if not isinstance(residual, fx.Node) or residual is x:
            continue
        readers = list(residual.users)
        if any(order[r] > order[node] or not _reads_as_convolution(r, modules) for r in readers):
            continue
        if residual.op == "placeholder" and len(inputs) == 1:
            node.kwargs = {"residual_dies": GIVEN}
        elif residual.op == "call_function" and residual.target in CONV_CALLS:
            node.kwargs = {"residual_dies": MADE_HERE}
        else:
            continue
        marked += 1
    return marked


def join_preactivations(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let 1×1 convolutions normalise what they load where they alone read a batch norm's result.

    For graphs of inference, after ``fuse``, whose ``fusions`` are returned with those that joined as one.
    """
    for node, x in sole_readers(graph, call_conv_bn_act, 3, call_bn_add_act):
        conv, bn, act, _, residual, *rest = node.args
        before, act_before, source, added, activation, slope, _ = x.args
        if added is not None or residual is x or not preactivation.serves(modules[conv.target]):
            continue
        arguments = (before, act_before, activation, slope, conv, bn, act, source, residual, *rest)
        put_one_call(call_preactivated_conv, arguments, (node, x))
        fusions = joined(fusions, ("conv", conv.target), before=("bn", before.target))
    return fusions


def _reads_as_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_function":
        return node.target in CONV_CALLS
    return node.op == "call_module" and is_convolution(modules[node.target])
