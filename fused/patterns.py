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
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastnets.fused import dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.activation import recognise, recognise_call
from fastnets.fused.batch_norm import call_bn_add_act
from fastnets.fused.capture import IN_PLACE_OPERATORS, iadd
from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.conv_training import Pending
from fastnets.fused.group_norm import GROUP_NORMS, call_group_norm_act
from fastnets.fused.layout import LayoutError
from fastnets.fused.ownership import GIVEN, MADE_HERE
from fastnets.fused.pool import POOLS, call_pool2d


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
_ADD_FUNCTIONS = (operator.add, torch.add, iadd)
_ADD_METHODS = ("add", "add_")
_IN_PLACE_FUNCTIONS = frozenset([*IN_PLACE_OPERATORS.values(), operator.setitem, operator.delitem])
_FRESH_FUNCTIONS = frozenset(
    [operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat]
    + [
        torch.nn.functional.avg_pool2d,
        torch.nn.functional.max_pool2d,
        call_pool2d,
        call_group_norm_act,
        *_CALLS,
    ]
)
_FRESH_MODULES = (nn.modules.conv._ConvNd, _BatchNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.LayerNorm)


@dataclass(frozen=True)
class Fusion:
    """One fused call: the stock layers in it, by their path from the container (None: not there).

    Attributes:
        activation: the name of the activation at the end, "none" where there is none.
        act: path of the activation's module; None where the network calls a function.
        add: a residual is added before the activation.
    """

    conv: str | None
    bn: str | None
    add: bool
    activation: str
    act: str | None

    @property
    def head(self) -> str:
        """Path of the layer that the group is named after."""
        return self.conv if self.conv is not None else self.bn or ""

    @property
    def kind(self) -> str:
        """What is fused, as in "conv+bn+add+relu"."""
        parts = ["conv"] if self.conv is not None else []
        parts += ["bn"] if self.bn is not None else []
        parts += ["add"] if self.add else []
        return "+".join(parts + ([self.activation] if self.activation != "none" else []))


@dataclass(frozen=True)
class Left:
    """A batch norm, addition or activation after a convolution or batch norm that was not fused, and why."""

    path: str
    kind: str
    reason: str


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


def fuse(graph: fx.Graph, root: nn.Module, backend: str, keep_stock: frozenset[str] = frozenset()) -> tuple:
    """Rewrite ``graph`` in place.

    root: the module that paths start from. backend: what the fused calls are to run on. keep_stock: paths of
    convolutions and batch norms that stay as they are.

    Returns ``(fusions, left)``, tuples of :class:`Fusion` and :class:`Left`. Raises :class:`LayoutError` for
    a graph whose meaning depends on the layout of its tensors.
    """
    rewriter = _Rewriter(graph, root, backend, keep_stock)
    for is_head in (is_convolution, is_batch_norm):
        # From the end of the graph, so that of two branches that meet in an addition the later one takes it.
        for node in reversed(list(graph.nodes)):
            if rewriter.calls(node, is_head):
                rewriter.fuse_from(node)
    rewriter.replace_group_norms()
    rewriter.replace_pools()
    rewriter.memory.forget()
    if (node := rewriter.memory.write_seen_through_reshape()) is not None:
        raise LayoutError(f"{_name(node)} writes in place to a tensor that its forward has reshaped")
    rewriter.note_leftovers()
    return tuple(rewriter.fusions), tuple(rewriter.left)


_CONV_CALLS = {call_conv_bn_act: 3, call_conv_bn_iadd_act: 4}  # position of x; the residual comes next


def mark_dying_residuals(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Tell fused convolutions that are the last readers of their residuals so; the number of them.

    Every reader must be a convolution: what else reads a tensor may keep a view of it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    marked = 0
    for node in graph.nodes:
        position = _CONV_CALLS.get(node.target) if node.op == "call_function" else None
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
        elif residual.op == "call_function" and residual.target in _CONV_CALLS:
            node.kwargs = {"residual_dies": MADE_HERE}
        else:
            continue
        marked += 1
    return marked


def _reads_as_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_function":
        return node.target in _CONV_CALLS
    return node.op == "call_module" and is_convolution(modules[node.target])


@dataclass
class _Chain:
    """What one fused call will do; ``last`` is the node whose value it makes."""

    nodes: list[fx.Node]
    conv: fx.Node | None = None
    bn: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    act: fx.Node | None = None
    activation: tuple[str, float] = ("none", 0.0)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


class _Rewriter:
    def __init__(self, graph: fx.Graph, root: nn.Module, backend: str, keep_stock: frozenset[str]):
        self.graph = graph
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.backend = backend
        self.keep_stock = keep_stock
        self.memory = _Memory(graph, self.modules)
        self.fusions: list[Fusion] = []
        self.left: list[Left] = []
        self.why: dict[fx.Node, str] = {}

    def calls(self, node: fx.Node, what) -> bool:
        """Whether the node calls, with one argument, a module of the kind that may be fused."""
        return (
            node.op == "call_module"
            and len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], fx.Node)
            and node.target not in self.keep_stock
            and what(self.modules[node.target])
        )

    def fuse_from(self, head: fx.Node) -> None:
        chain = _Chain([head])
        if is_convolution(self.modules[head.target]):
            chain.conv = head
            self._grow(chain, self._take_bn)
        else:
            chain.bn = head
        self._grow(chain, self._take_add)
        self._grow(chain, self._take_act)
        if chain.conv is None and len(chain.nodes) == 1:
            return  # a batch norm alone is one pass already
        self._replace(chain)

    def _grow(self, chain: _Chain, take) -> None:
        readers = list(chain.last.users)
        if len(readers) != 1:
            for reader in readers:
                self.why.setdefault(reader, f"{_name(chain.last)} has {len(readers)} readers")
            return
        if take(chain, readers[0]):
            conflict = self.memory.write_between(chain.nodes, chain.nodes[0], chain.nodes[0].args[0])
            if conflict is None and chain.add is not None:
                conflict = self.memory.write_between(chain.nodes, chain.add, chain.residual)
            if conflict is not None:
                self._drop_last(chain, f"{_name(conflict)} writes in place to what it reads")

    @staticmethod
    def _drop_last(chain: _Chain, reason: str) -> None:
        node = chain.nodes.pop()
        if node is chain.bn:
            chain.bn = None
        elif node is chain.add:
            chain.add = chain.residual = None
        else:
            chain.act, chain.activation = None, ("none", 0.0)

    def _take_bn(self, chain: _Chain, node: fx.Node) -> bool:
        if not self.calls(node, is_batch_norm):
            return False
        chain.bn = node
        chain.nodes.append(node)
        return True

    def _take_add(self, chain: _Chain, node: fx.Node) -> bool:
        operands = _addends(node)
        if operands is None:
            return False
        residual = operands[1] if operands[0] is chain.last else operands[0]
        if residual is chain.last or not isinstance(residual, fx.Node):
            self.why.setdefault(node, "it does not add two tensors")
            return False
        if writes(node) and operands[0] is residual and not self.memory.is_private(residual, node):
            self.why.setdefault(node, "it writes in place to a tensor that others see")
            return False
        chain.add, chain.residual = node, residual
        chain.nodes.append(node)
        return True

    def _take_act(self, chain: _Chain, node: fx.Node) -> bool:
        found = self._activation(node)
        if found is None or found[0] == "none" or node.args[0] is not chain.last:
            return False
        chain.act, chain.activation = node, found
        chain.nodes.append(node)
        return True

    def _activation(self, node: fx.Node) -> tuple[str, float] | None:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if node.op == "call_module":
            return recognise(self.modules[node.target]) if len(node.args) == 1 and not node.kwargs else None
        if node.op in ("call_function", "call_method"):
            return recognise_call(node.target, node.args[1:], node.kwargs)
        return None

    def _replace(self, chain: _Chain) -> None:
        act = chain.act.target if chain.act is not None and chain.act.op == "call_module" else None
        with self.graph.inserting_before(chain.last):
            bn = None if chain.bn is None else self.graph.get_attr(chain.bn.target)
            act_module = None if act is None else self.graph.get_attr(act)
            x, residual = chain.nodes[0].args[0], chain.residual
            rest = (bn, act_module, x, residual, *chain.activation, self.backend)
            call = call_bn_add_act
            if chain.conv is not None:
                call, rest = call_conv_bn_act, (self.graph.get_attr(chain.conv.target), *rest)
            if chain.add is not None and writes(chain.add):
                call = call_bn_iadd_act if chain.conv is None else call_conv_bn_iadd_act
                rest = (chain.add.args[0] is residual, *rest)
            fused = self.graph.call_function(call, rest)
        chain.last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        self.memory.forget()
        self.fusions.append(
            Fusion(
                conv=None if chain.conv is None else chain.conv.target,
                bn=None if chain.bn is None else chain.bn.target,
                add=chain.add is not None,
                activation=chain.activation[0],
                act=act,
            )
        )

    def replace_group_norms(self) -> None:
        """Group and instance norms with the activation that alone reads them, as one call."""
        for node in list(self.graph.nodes):
            if not self.calls(node, lambda module: type(module) in GROUP_NORMS) or len(node.users) != 1:
                continue
            act = next(iter(node.users))
            found = self._activation(act)
            if found is None or found[0] == "none" or act.args[0] is not node:
                continue
            if self.memory.write_between([node, act], node, node.args[0]) is not None:
                continue
            with self.graph.inserting_before(act):
                norm = self.graph.get_attr(node.target)
                module = self.graph.get_attr(act.target) if act.op == "call_module" else None
                call = self.graph.call_function(
                    call_group_norm_act, (norm, module, node.args[0], *found, self._unfolding)
                )
            act.replace_all_uses_with(call)
            for done in (act, node):
                self.graph.erase_node(done)
            self.memory.forget()

    @property
    def _unfolding(self) -> str:
        """The backend of calls that fold nothing anyway."""
        return "auto" if self.backend == dispatch.UNFOLDED else self.backend

    def replace_pools(self) -> None:
        """Pooling by the op that keeps one byte for each window, or nothing, where stock keeps eight."""
        for node in list(self.graph.nodes):
            if not self.calls(node, lambda module: type(module) in POOLS):
                continue
            with self.graph.inserting_before(node):
                pool = self.graph.get_attr(node.target)
                call = self.graph.call_function(call_pool2d, (pool, node.args[0], self._unfolding))
            node.replace_all_uses_with(call)
            self.graph.erase_node(node)

    def note_leftovers(self) -> None:
        """Record what follows a convolution or batch norm, could in principle be fused, and was not."""
        for node in self.graph.nodes:
            sources = [s for s in node.all_input_nodes if s.target in _CALLS]
            if not sources:
                continue
            addition = _addends(node) is not None
            if addition and all(source.args[-3] != "none" for source in sources):
                continue  # act(conv(x)) + y: nothing that one call could do
            if self.calls(node, is_batch_norm):
                kind = "bn"
            elif addition:
                kind = "add"
            elif (found := self._activation(node)) is not None and sources[0].args[-3] == "none":
                kind = found[0]
            else:
                continue
            reason = self.why.get(node, f"{_name(sources[0])} has other readers or they are in another order")
            self.left.append(Left(node.target if node.op == "call_module" else node.name, kind, reason))


def _addends(node: fx.Node) -> tuple | None:
    """The two operands of a plain addition, else None."""
    is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not is_add or len(node.args) != 2:
        return None
    if any(name != "alpha" or value != 1 for name, value in node.kwargs.items()):
        return None
    return node.args


def _name(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name


def writes(node: fx.Node) -> bool:
    """Whether the node is one of those operations that write to their first operand."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    in_place = node.target in _IN_PLACE_FUNCTIONS or getattr(node.target, "__name__", "").endswith("_")
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _reshapes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("view", "reshape", "flatten", "view_as", "reshape_as", "contiguous")
    return node.op == "call_function" and node.target in (torch.flatten, torch.reshape)


class _Memory:
    """Which nodes may share memory, and which write to it: told conservatively.

    Every node has *origins*, the nodes whose memory it may be a view of. Inputs of the graph may alias each
    other, and so may parameters and buffers: each group counts as one origin.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]):
        self.graph = graph
        self.modules = modules
        self._origins: dict[fx.Node, frozenset] | None = None
        self._order: dict[fx.Node, int] = {}

    def forget(self) -> None:
        """The graph has changed."""
        self._origins = None

    def write_between(self, chain: list[fx.Node], reader: fx.Node, read: fx.Node) -> fx.Node | None:
        """A node outside the chain that writes to ``read`` after ``reader`` and before the chain's last node.

        The fused call reads everything where the last node stands, so such a write would come too early.
        """
        self._analyse()
        node = reader.next if reader is not chain[-1] else reader
        while node is not chain[-1]:
            if node not in chain and not self._origins[read].isdisjoint(self._written(node)):
                return node
            node = node.next
        return None

    def is_private(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether ``node`` is memory of its own that nobody but ``reader`` reads."""
        self._analyse()
        return self._origins[node] == {node} and list(node.users) == [reader]

    def write_seen_through_reshape(self) -> fx.Node | None:
        """A write to memory that is read later by a reshape: a view in some layouts, a copy in others."""
        self._analyse()
        nodes = list(self.graph.nodes)
        for i, reshape in enumerate(nodes):
            if not _reshapes(reshape):
                continue
            for j in range(i + 1, len(nodes)):
                written = self._written(nodes[j], surely=True)
                if not written.isdisjoint(self._origins[reshape]) and self._read_beside(nodes, j, written):
                    return nodes[j]
        return None

    def _read_beside(self, nodes: list[fx.Node], write: int, written: frozenset) -> bool:
        """Whether memory of the origins ``written`` is read after node ``write``, but not from its result."""
        results = {nodes[write]}
        for node in nodes[write + 1 :]:
            for read in node.all_input_nodes:
                if read in results:
                    results.add(node)
                elif not written.isdisjoint(self._origins[read]):
                    return True
        return False

    def _analyse(self) -> None:
        if self._origins is not None:
            return
        self._origins = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                origins = frozenset(["inputs"])
            elif node.op == "get_attr":
                origins = frozenset(["state"])
            elif self._is_fresh(node):
                origins = frozenset([node])
            else:
                origins = frozenset().union(*(self._origins[n] for n in node.all_input_nodes)) | {node}
            self._origins[node] = origins

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs
        if node.op == "call_method":
            return node.target in ("add", "mul", "sub", "clone")
        if node.op != "call_module":
            return False
        module = self.modules[node.target]
        if isinstance(module, _FRESH_MODULES) or is_batch_norm(module):
            return True
        return recognise(module) is not None and type(module) is not nn.Identity and not _in_place(module)

    def _written(self, node: fx.Node, surely: bool = False) -> frozenset:
        """The origins that the node may write to; ``surely``: without those that a user's module might."""
        if node.op == "call_module":
            module = self.modules[node.target]
            if type(module).__module__.startswith("torch.nn") and not list(module.children()):
                written = node.all_input_nodes if _in_place(module) else []
            else:
                written = [] if surely else node.all_input_nodes  # a module of the user's own might
        elif node.op in ("call_function", "call_method"):
            written = node.all_input_nodes[:1] if writes(node) else []
            if "out" in node.kwargs:
                written = node.all_input_nodes
        else:
            written = []
        return frozenset().union(*(self._origins[n] for n in written)) - {"state"}


def _in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))
