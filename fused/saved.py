"""What autograd keeps between a forward and its backward: each piece of memory once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["SavedBytes"]


class SavedBytes:
    """Adds up the memory that autograd saves, parameters and buffers left out.

    model: whose parameters and buffers are not counted. ``total``: bytes. Memory that two nodes save counts
    once for as long as it lives; a view counts as all of its storage.
    """

    def __init__(self, model: nn.Module | None = None):
        self.total = 0
        held = () if model is None else (*model.parameters(), *model.buffers())
        self._held = {t.untyped_storage()._cdata for t in held if t.layout is torch.strided}
        self._kept: dict[int, StorageWeakRef] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What forwards inside the block save is added."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield

    def add(self, tensor: Tensor) -> Tensor:
        """Autograd's pack hook."""
        if tensor.layout is torch.strided and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            known = self._kept.get(storage._cdata)
            if storage._cdata not in self._held and (known is None or known.expired()):
                self._kept[storage._cdata] = StorageWeakRef(storage)
                self.total += storage.nbytes()
        return tensor
