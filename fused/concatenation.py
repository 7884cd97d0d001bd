"""Concatenation of channels that grows, layer by layer, in one channels-last buffer (DenseNet).

Stock copies all that there is for every layer that appends to it: ``x = cat((x, layer(x)), 1)`` moves the
block's first channels as often as the block has layers. Here the first of a chain of concatenations makes
room for all of them, the following ones write what is new behind what is there, and each result is a view of
the buffer's first channels.

That is for CUDA and without gradients; elsewhere, and wherever shapes, dtypes or classes are not what the
chain expects, ``torch.cat`` runs. The values before the last one are views, so the pattern asks that nobody
reads one after the next has been made, and that nobody to whom layout shows reads one at all.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import call_bn_add_act, in_transform
from fastnets.fused.chains import Fusion
from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.excited_conv import call_excited_conv
from fastnets.fused.preactivation import call_preactivated_conv


class Room:
    """A buffer [N, C, H, W] in channels-last memory, of which ``value``, the first channels, are in use."""

    __slots__ = ("buffer", "value")

    def __init__(self, like: Tensor, channels: int):
        N, _, H, W = like.shape
        self.buffer = torch.empty(
            (N, channels, H, W), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        )
        self.value = self.buffer[:, :0]

    def takes(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the tensors fit behind what is there."""
        (N, channels, H, W), dtype = self.buffer.shape, self.buffer.dtype
        new = 0
        for t in tensors:
            size = t.shape
            if len(size) != 4 or (size[0], *size[2:]) != (N, H, W) or t.dtype != dtype:
                return False
            if t.device != self.buffer.device:
                return False
            new += size[1]
        return self.value.shape[1] + new <= channels

    def append(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """All channels up to the last of these tensors."""
        begin = self.value.shape[1]
        for t in tensors:
            end = begin + t.shape[1]
            self.buffer[:, begin:end].copy_(t)
            begin = end
        self.value = self.buffer[:, :begin]
        return self.value


def call_concatenate(
    room: Room | None, tensors: tuple[Tensor, ...], later: int, backend: str
) -> tuple[Tensor, Room | None]:
    """``torch.cat(tensors, 1)``, and where the next concatenation of the chain may continue.

    room: where the one before, whose result is the first tensor, was made. later: how many come after this
    one, each expected to append as much.
    """
    if room is not None and room.value is tensors[0] and room.takes(tensors[1:]):
        # The last result is dense, as stock's is.
        new = sum([t.shape[1] for t in tensors[1:]])
        if later or room.value.shape[1] + new == room.buffer.shape[1]:
            return room.append(tensors[1:]), room
    elif room is None and later and _may_share(tensors, backend):
        first, *new = tensors
        channels = first.shape[1] + (1 + later) * sum([t.shape[1] for t in new])
        room = Room(first, channels)
        if room.takes(tensors):
            return room.append(tensors), room
    return torch.cat(tensors, 1), None


def _may_share(tensors: tuple[Tensor, ...], backend: str) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if any(t.__class__ is not Tensor or t.dim() != 4 for t in tensors) or in_transform():
        return False
    wanted = dispatch.requested(backend)
    return wanted == "triton" or (wanted != "reference" and dispatch.device_type_of(tensors[0]) == "cuda")


def grow_in_place(graph: fx.Graph, backend: str) -> tuple[Fusion, ...]:
    """Let chains of concatenations in a graph of inference share a buffer; after all other patterns."""
    fusions = []
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in done or not is_channel_concatenation(node):
            continue
        chain = _chain_from(graph, node)
        done.update(chain)
        if len(chain) > 1:
            _replace(graph, chain, "auto" if backend == dispatch.UNFOLDED else backend)
            fusions.append(Fusion("concatenation", "concatenation"))
    return tuple(fusions[:1])


def is_channel_concatenation(node: fx.Node) -> bool:
    """Whether the node is ``torch.cat((x, ...), 1)`` of values of the graph."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return False
    if len(node.args) + len(node.kwargs) != 2 or not isinstance(node.args[0], (tuple, list)):
        return False
    dim = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    parts = node.args[0]
    return dim == 1 and len(parts) > 1 and all(isinstance(part, fx.Node) for part in parts)


def _chain_from(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The concatenations, ``node`` first, of which each begins with the one before and nobody reads that
    later."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    chain = [node]
    while True:
        last = chain[-1]
        following = max(last.users, key=order.get, default=None)
        if following is None or not is_channel_concatenation(following):
            return chain
        parts = following.args[0]
        others = [reader for reader in last.users if reader is not following]
        if parts[0] is not last or last in parts[1:] or not all(map(_reads_any_layout, others)):
            return chain
        chain.append(following)


def _reads_any_layout(node: fx.Node) -> bool:
    return node.op == "call_module" or node.target in _READERS


# Fused calls that return memory of their own.
_READERS = (call_bn_add_act, call_conv_bn_act, call_excited_conv, call_preactivated_conv)


def _replace(graph: fx.Graph, chain: list[fx.Node], backend: str) -> None:
    room = None
    for later, node in zip(range(len(chain) - 1, -1, -1), chain):
        with graph.inserting_before(node):
            call = graph.call_function(call_concatenate, (room, tuple(node.args[0]), later, backend))
            value = graph.call_function(operator.getitem, (call, 0))
            room = graph.call_function(operator.getitem, (call, 1)) if later else None
        node.replace_all_uses_with(value)
        graph.erase_node(node)
