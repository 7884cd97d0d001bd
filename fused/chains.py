"""What the finders of patterns share: chains of nodes in a captured graph, and what may be done to them.

A *chain* starts at the call of a layer and grows over its only reader, as long as that is the next thing that
one fused call can do. It never grows over a value that somebody else reads, nor over an in-place write that
stock would show to others: see :class:`Memory`. ``patterns`` looks for convolutions and batch norms,
``transformer_patterns`` for linear layers, norms and attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastnets.fused import dispatch
from fastnets.fused.activation import recognise, recognise_call
from fastnets.fused.capture import IN_PLACE_OPERATORS, iadd

_ADD_FUNCTIONS = (operator.add, torch.add, iadd)
_ADD_METHODS = ("add", "add_")
_IN_PLACE_FUNCTIONS = frozenset([*IN_PLACE_OPERATORS.values(), operator.setitem, operator.delitem])
# Their results are memory of their own. The finders of patterns add the calls that they put into graphs.
FRESH_FUNCTIONS: set[Callable] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat),
    *(nn.functional.avg_pool2d, nn.functional.max_pool2d, nn.functional.linear, nn.functional.layer_norm),
    nn.functional.scaled_dot_product_attention,
}
_FRESH_MODULES = (nn.modules.conv._ConvNd, _BatchNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.LayerNorm)


@dataclass(frozen=True)
class Fusion:
    """One fused call: what it does, and the stock layers in it, by their path from the container.

    Attributes:
        family: whose call it is: "conv", "bn", "linear", "norm", "attention", "group_norm", "pool", ...
        kind: what is fused, as in "conv+bn+add+relu".
        layers: (role, path) of the modules; none where the network calls functions only.
        activation: the name of the activation in it, "none" where there is none.
        joins: path of the layer whose call computes this one's, too, where our kernels run.
    """

    family: str
    kind: str
    layers: tuple[tuple[str, str], ...] = ()
    activation: str = "none"
    joins: str = ""

    @property
    def head(self) -> str:
        """Path of the layer that the group is named after; "" is the container itself."""
        return self.layers[0][1] if self.layers else ""

    def path(self, role: str) -> str | None:
        """Path of the module with that role, None where there is none."""
        return dict(self.layers).get(role)


@dataclass(frozen=True)
class Left:
    """Something after a fused layer that a fused call could do, in principle, and does not; and why."""

    path: str
    kind: str
    reason: str


@dataclass
class Chain:
    """What one fused call will do.

    Attributes:
        parts: (role, node) in the order of the graph; the first is the head.
        residual: the other operand of the addition, where there is a part "add".
        scale: the other operand of the multiplication, where there is a part "scale".
        activation: of the part "act".
    """

    parts: list[tuple[str, fx.Node]]
    residual: fx.Node | None = None
    scale: fx.Node | None = None
    activation: tuple[str, float] = ("none", 0.0)
    reads: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    @classmethod
    def from_head(cls, role: str, head: fx.Node) -> Chain:
        return cls([(role, head)], reads=[(head, operand) for operand in head.all_input_nodes])

    @property
    def last(self) -> fx.Node:
        """The node whose value the call makes."""
        return self.parts[-1][1]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for _, node in self.parts]

    def get(self, role: str) -> fx.Node | None:
        return dict(self.parts).get(role)

    def append(self, role: str, node: fx.Node, operand: fx.Node | None = None) -> None:
        """``operand``: what the node reads besides the chain."""
        self.parts.append((role, node))
        if operand is not None:
            self.reads.append((node, operand))

    def drop(self) -> None:
        """Take the last part off again."""
        role, node = self.parts.pop()
        self.reads = [(reader, read) for reader, read in self.reads if reader is not node]
        if role == "add":
            self.residual = None
        elif role == "scale":
            self.scale = None
        elif role == "act":
            self.activation = ("none", 0.0)

    def module_of(self, role: str) -> str | None:
        """Path of the module that the part calls; None where it calls a function or is not there."""
        node = self.get(role)
        return node.target if node is not None and node.op == "call_module" else None

    def layers(self, *roles: str) -> tuple[tuple[str, str], ...]:
        """(role, path) of the parts that are modules."""
        return tuple((role, self.module_of(role)) for role in roles if self.module_of(role) is not None)


class ChainFinder:
    """Base of the finders of patterns: one graph, and what is known about it."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, backend: str, keep_stock: frozenset[str], memory: Memory
    ):
        self.graph = graph
        self.modules = memory.modules
        self.backend = backend
        self.keep_stock = keep_stock
        self.memory = memory
        self.fusions: list[Fusion] = []
        self.left: list[Left] = []
        self.why: dict[fx.Node, str] = {}

    @property
    def unfolding(self) -> str:
        """The backend of calls that fold nothing anyway."""
        return "auto" if self.backend == dispatch.UNFOLDED else self.backend

    def calls(self, node: fx.Node, what: Callable[[nn.Module], bool]) -> bool:
        """Whether the node calls, with one argument, a module of the kind that may be fused."""
        return (
            node.op == "call_module"
            and len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], fx.Node)
            and node.target not in self.keep_stock
            and what(self.modules[node.target])
        )

    def grow(self, chain: Chain, take: Callable[[Chain, fx.Node], bool]) -> bool:
        """Let the chain take its only reader, if that is what ``take`` looks for."""
        readers = list(chain.last.users)
        if len(readers) != 1:
            for reader in readers:
                self.why.setdefault(reader, f"{name_of(chain.last)} has {len(readers)} readers")
            return False
        if not take(chain, readers[0]):
            return False
        # The fused call reads everything where its last node stands.
        for reader, read in chain.reads:
            conflict = self.memory.write_between(chain.nodes, reader, read)
            if conflict is not None:
                self.why.setdefault(readers[0], f"{name_of(conflict)} writes in place to what it reads")
                chain.drop()
                return False
        return True

    def take_add(self, chain: Chain, node: fx.Node) -> bool:
        operands = addends(node)
        if operands is None:
            return False
        residual = operands[1] if operands[0] is chain.last else operands[0]
        if residual is chain.last or not isinstance(residual, fx.Node):
            self.why.setdefault(node, "it does not add two tensors")
            return False
        if writes(node) and operands[0] is residual and not self.memory.is_private(residual, node):
            self.why.setdefault(node, "it writes in place to a tensor that others see")
            return False
        chain.append("add", node, residual)
        chain.residual = residual
        return True

    def take_act(self, chain: Chain, node: fx.Node) -> bool:
        found = self.activation(node)
        if found is None or found[0] == "none" or node.args[0] is not chain.last:
            return False
        chain.append("act", node)
        chain.activation = found
        return True

    def activation(self, node: fx.Node) -> tuple[str, float] | None:
        """``(name, negative_slope)`` where the node is an activation of one tensor."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if node.op == "call_module":
            return recognise(self.modules[node.target]) if len(node.args) == 1 and not node.kwargs else None
        if node.op in ("call_function", "call_method"):
            return recognise_call(node.target, node.args[1:], node.kwargs)
        return None

    def replace(self, chain: Chain, result: fx.Node) -> None:
        """Let ``result``, which stands before the chain's last node, take the chain's place."""
        chain.last.replace_all_uses_with(result)
        self.erase(chain.nodes)

    def erase(self, nodes: list[fx.Node]) -> None:
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.memory.forget()


def sole_readers(
    graph: fx.Graph, call: Callable, position: int, maker: Callable
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``(reader, read)``: calls of ``call`` whose argument at ``position`` a call of ``maker`` has made for
    them alone. The graph may change in between."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not call:
            continue
        read = node.args[position]
        if isinstance(read, fx.Node) and read.target is maker and list(read.users) == [node]:
            yield node, read


def put_one_call(
    call: Callable, arguments: tuple, nodes: tuple[fx.Node, ...], options: dict | None = None
) -> None:
    """Let ``call(*arguments, **options)`` take the place of the nodes: first the one whose value it makes,
    then what only that one needs, readers before what they read."""
    last, graph = nodes[0], nodes[0].graph
    with graph.inserting_before(last):
        fused = graph.call_function(call, arguments, options)
    last.replace_all_uses_with(fused)
    for node in nodes:
        graph.erase_node(node)


def joined(
    fusions: tuple[Fusion, ...],
    head: tuple[str, str],
    *,
    before: tuple[str, str] | None = None,
    after: tuple[str, str] | None = None,
) -> tuple[Fusion, ...]:
    """The fusions, with ``head`` and the one before it or after it as one, in the head's family and place.

    Each is named by its family and the path of a layer in it. Roles of what comes before become "ROLE
    before".
    """

    def named(family: str, path: str) -> Fusion:
        return next(f for f in fusions if f.family == family and path in dict(f.layers).values())

    whole, other = named(*head), named(*(after or before))
    parts = (whole, other) if after else (other, whole)
    layers = other.layers if after else tuple((f"{role} before", path) for role, path in other.layers)
    one = replace(whole, kind="+".join(part.kind for part in parts), layers=(*whole.layers, *layers))
    return tuple(one if f is whole else f for f in fusions if f is not other)


def addends(node: fx.Node) -> tuple | None:
    """The two operands of a plain addition, else None."""
    is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not is_add or len(node.args) != 2:
        return None
    if any(name != "alpha" or value != 1 for name, value in node.kwargs.items()):
        return None
    return node.args


def name_of(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name


def writes(node: fx.Node) -> bool:
    """Whether the node is one of those operations that write to their first operand."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    in_place = node.target in _IN_PLACE_FUNCTIONS or getattr(node.target, "__name__", "").endswith("_")
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def may_write_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether something between the two nodes might overwrite what the first reads."""
    node = first.next
    while node is not last:
        if writes(node) or node.op == "call_module" or "residual_dies" in node.kwargs:
            return True
        node = node.next
    return False


def _reshapes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("view", "reshape", "flatten", "view_as", "reshape_as", "contiguous")
    return node.op == "call_function" and node.target in (torch.flatten, torch.reshape)


class Memory:
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
            return node.target in FRESH_FUNCTIONS and "out" not in node.kwargs
        if node.op == "call_method":
            return node.target in ("add", "mul", "sub", "clone")
        if node.op != "call_module":
            return False
        module = self.modules[node.target]
        if isinstance(module, _FRESH_MODULES):
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
