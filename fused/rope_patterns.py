"""Finding rotary position embeddings in a captured graph.

    x · cos + turned(x) · sin [→ x's dtype]

where ``turned`` puts the negated second of each pair in front of the first: of a head's halves, by ``chunk``
or by slices as Hugging Face writes it, or of neighbours, by ``stack`` as timm does. One launch in place of
six.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import in_transform
from fastnets.fused.chains import FRESH_FUNCTIONS, ChainFinder, Fusion, addends, writes
from fastnets.fused.rope import apply_rope

_NEGATE = (operator.neg, torch.neg, "neg")
_MULTIPLY = (operator.mul, torch.mul, "mul")
_EVEN, _ODD = (Ellipsis, slice(None, None, 2)), (Ellipsis, slice(1, None, 2))


def call_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, casts: bool, backend: str) -> Tensor:
    """x turned, by the fused op where the tables are of positions and their result is of x's dtype.

    casts: the network rounds the result to x's dtype.
    """
    if _fits(x, cos, sin, casts) and not dispatch.leaves_to_stock(x, backend):
        return apply_rope(x, None, cos, sin, interleaved=interleaved, backend=backend)[0]
    if interleaved:
        turned = torch.stack([-x[_ODD], x[_EVEN]], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    out = x * cos + turned * sin
    return out.to(x.dtype) if casts else out


FRESH_FUNCTIONS.add(call_rope)


def _fits(x: Tensor, cos: Tensor, sin: Tensor, casts: bool) -> bool:
    if any(type(t) not in (Tensor, nn.Parameter) for t in (x, cos, sin)) or in_transform():
        return False
    if x.dim() != 4 or not x.is_floating_point() or not cos.is_floating_point():
        return False
    if cos.shape != sin.shape or cos.requires_grad or sin.requires_grad or cos.shape[-2:] != x.shape[-2:]:
        return False
    if cos.dim() != 2 and not (cos.dim() == 4 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == 1):
        return False
    return casts or torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)) == x.dtype


class RopeFinder(ChainFinder):
    """Rotations of one tensor, each by itself."""

    def fuse(self) -> None:
        for node in list(self.graph.nodes):
            found = None if writes(node) or node.kwargs else self._rotation(node)
            if found is not None:
                self._replace(node, *found)

    def _rotation(self, total: fx.Node) -> tuple | None:
        """(x, cos, sin, interleaved, the nodes in between) where the sum is one."""
        sides = addends(total) or ()
        for one, other in (sides, sides[::-1]) if len(sides) == 2 else ():
            for turned, sin in _factors(other):
                found = _turned(turned)
                if found is None:
                    continue
                x, interleaved, inner = found
                cos = next((table for y, table in _factors(one) if y is x), None)
                inner = [one, other, *inner]
                # What somebody else reads has to be computed all the same.
                private = all(set(node.users) <= {total, *inner} for node in inner)
                if private and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                    return x, cos, sin, interleaved, inner
        return None

    def _replace(
        self, total: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool, inner: list
    ) -> None:
        last, casts = total, False
        readers = list(total.users)
        if len(readers) == 1 and _is_cast_to(readers[0], x):
            last, casts = readers[0], True
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        chain = sorted({total, last, *inner}, key=places.__getitem__)
        for read in (x, cos, sin):
            if self.memory.write_between(chain, chain[0], read) is not None:
                return
        with self.graph.inserting_before(last):
            fused = self.graph.call_function(call_rope, (x, cos, sin, interleaved, casts, self.unfolding))
        last.replace_all_uses_with(fused)
        self.erase(chain)
        self.fusions.append(Fusion("rope", "rope"))

    def note_leftovers(self) -> None:
        """Nothing around them could be fused and is not."""


def _factors(node: object) -> list[tuple]:
    """The operands of a plain product of two tensors, in both orders."""
    if not isinstance(node, fx.Node) or node.target not in _MULTIPLY or len(node.args) != 2 or node.kwargs:
        return []
    return [node.args, node.args[::-1]]


def _turned(node: object) -> tuple[fx.Node, bool, list[fx.Node]] | None:
    """(x, whether pairs are neighbours, the nodes from x to this one) where it is ``turned(x)``."""
    if not isinstance(node, fx.Node):
        return None
    inner = [node]
    if node.target in ("flatten", "reshape", "view", torch.flatten):
        stack = node.args[0]
        if not isinstance(stack, fx.Node) or stack.target is not torch.stack or _dim(stack) != -1:
            return None
        inner.append(stack)
        pair = _pair(stack, inner)
        if pair is None or [_index(part) for part in pair] != [_EVEN, _ODD]:
            return None
        x = pair[0].args[0]
        merged = node.target in ("flatten", torch.flatten) and node.args[1:] == (-2,)
        merged = merged or (len(node.args) == 2 and _is_attribute(node.args[1], x, "shape"))
        return (x, True, inner) if merged and pair[1].args[0] is x else None
    if node.target is not torch.cat or _dim(node) != -1:
        return None
    pair = _pair(node, inner)
    x = None if pair is None else _halved(*pair, inner)
    return None if x is None else (x, False, inner)


def _dim(node: fx.Node) -> object:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _pair(joined: fx.Node, inner: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(first, second) of ``[-second, first]``, which the node joins."""
    parts = joined.args[0] if joined.args else ()
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    negated, first = parts
    if not all(isinstance(part, fx.Node) for part in parts) or negated.target not in _NEGATE:
        return None
    second = negated.args[0]
    if not all(isinstance(part, fx.Node) and part.target is operator.getitem for part in (first, second)):
        return None
    inner += [negated, first, second]
    return first, second


def _index(node: fx.Node) -> object:
    return tuple(node.args[1]) if isinstance(node.args[1], list | tuple) else node.args[1]


def _halved(first: fx.Node, second: fx.Node, inner: list[fx.Node]) -> fx.Node | None:
    """The tensor whose last dim's halves the two are."""
    x, indices = first.args[0], (_index(first), _index(second))
    if second.args[0] is not x:
        return None
    if indices == (0, 1):
        if x.target not in ("chunk", torch.chunk) or not isinstance(x.args[0], fx.Node):
            return None
        given = [*x.args[1:], *x.kwargs.values()]
        inner.append(x)
        return x.args[0] if given == [2, -1] else None
    if not all(isinstance(i, tuple) and len(i) == 2 and i[0] is Ellipsis for i in indices):
        return None
    (_, low), (_, high) = indices
    if not isinstance(low, slice) or not isinstance(high, slice):
        return None
    outer = (low.start, low.step, high.stop, high.step)
    halves = outer == (None,) * 4 and low.stop is not None
    return x if halves and all(_is_half_of_last(i, x) for i in (low.stop, high.start)) else None


def _is_half_of_last(node: object, x: fx.Node) -> bool:
    """Whether it is ``x.shape[-1] // 2``."""
    if not isinstance(node, fx.Node) or node.target is not operator.floordiv or node.args[1] != 2:
        return False
    size = node.args[0]
    return (
        isinstance(size, fx.Node)
        and size.target is operator.getitem
        and size.args[1] == -1
        and _is_attribute(size.args[0], x, "shape")
    )


def _is_attribute(node: object, x: fx.Node, name: str) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args == (x, name)


def _is_cast_to(node: fx.Node, x: fx.Node) -> bool:
    """Whether it is ``….to(x.dtype)``."""
    return node.target == "to" and len(node.args) == 2 and not node.kwargs and _is_attribute(
        node.args[1], x, "dtype"
    )  # fmt: skip
