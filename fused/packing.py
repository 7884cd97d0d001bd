"""Folded and packed weights, and when to forget them.

Vendor calls want weights that BN is folded into, in a layout of their own. Making them costs more than the
convolution, so they are kept between calls, and they must never outlive the values they were made from.
Tensor versions catch in-place writes, but fused optimizers and writes through ``.data`` leave the version as
it was. So what was prepared is valid only while all of this holds:

* the tensors it was made from are the same objects, at the same versions;
* no *generation* has passed: optimizer steps, ``train()``/``eval()``, ``.to()`` and friends, loading a state
  dict and ``fastnets.refresh()`` each begin a new one;
* no forward with gradients enabled has used the weight since (a training step may follow it).

Tensors that somebody else refills behind our back (DTensor and FSDP parameters, views) or that carry no
version (inference tensors) are prepared anew for every call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_SHAPES_PER_WEIGHT = 4  # packed layouts kept for one weight; the oldest goes first
_generation = 0
_epoch = 0
_entries: dict[int, _WeightEntry] = {}
_non_finite: dict[int, weakref.ref] = {}
_transient: contextvars.ContextVar[bool] = contextvars.ContextVar("fastnets_transient", default=False)


class Prepared:
    """A call made ready: ``run(x, residual)`` with all that depends on the weights alone done.

    ``run`` None says that nothing can be prepared for these weights. The weight itself is not held, so that
    the entry dies with it; the other tensors it was made from are.
    """

    __slots__ = ("generation", "key", "others", "run", "versions")

    def __init__(
        self,
        key: tuple,
        run: Callable[[Tensor, Tensor | None], Tensor] | None,
        weight: Tensor,
        others: Sequence[Tensor | None],
    ):
        self.key = key
        self.run = run
        self.others = tuple(others)
        self.versions = _versions(weight, others)
        self.generation = _generation

    def is_current(self, weight: Tensor, others: Sequence[Tensor | None]) -> bool:
        """Whether the tensors, in the order of construction, still hold what this was made from."""
        if self.generation != _generation:
            return False
        for mine, theirs in zip(self.others, others):
            if mine is not theirs:
                return False
        return self.versions == _versions(weight, others)


def _versions(weight: Tensor, others: Sequence[Tensor | None]) -> list[int]:
    return [weight._version, *[t._version for t in others if t is not None]]


def drop_dead(pop: Callable, address: int, dead: weakref.ref) -> None:
    """For a weak reference: forget what a dict keeps under the address of what died, by its ``pop``."""
    pop(address, None)  # bound early: at interpreter exit weights can outlive this module's names


class _WeightEntry:
    __slots__ = ("by_key", "weight")

    def __init__(self, weight: Tensor):
        self.weight = weakref.ref(weight, functools.partial(drop_dead, _entries.pop, id(weight)))
        self.by_key: dict[tuple, Prepared] = {}


def lookup(weight: Tensor, key: tuple, others: Sequence[Tensor | None]) -> Prepared | None:
    """What was prepared for this weight, the layer's other tensors and ``key`` (shapes, options), if still
    true."""
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        return None
    prepared = entry.by_key.get(key)
    if prepared is None:
        return None
    if prepared.is_current(weight, others):
        return prepared
    del _entries[id(weight)]  # all keys share the tensors that changed
    return None


def keep(weight: Tensor, prepared: Prepared) -> None:
    """Keep ``prepared`` for later calls with the same weight and key."""
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        entry = _entries[id(weight)] = _WeightEntry(weight)
    while len(entry.by_key) >= _SHAPES_PER_WEIGHT:
        entry.by_key.pop(next(iter(entry.by_key)))
    entry.by_key[prepared.key] = prepared


def may_keep(sources: Sequence[Tensor | None]) -> bool:
    """Whether what is made from these tensors may be kept at all."""
    if _transient.get():
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and fsdp.FSDPModule.__subclasses__():
        return False  # a fully_shard'ed module exists: it refills unsharded parameters without a version
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_inference() and not t._is_view())
        for t in sources
    )


@contextlib.contextmanager
def transient() -> Iterator[None]:
    """Keep nothing inside the block: a forward with gradients enabled may be followed by a training step."""
    token = _transient.set(True)
    try:
        yield
    finally:
        _transient.reset(token)


def mark_non_finite(weight: Tensor) -> None:
    """Note that this layer holds NaN or infinities, and prepare everything anew in that knowledge."""
    if id(weight) not in _non_finite:
        _non_finite[id(weight)] = weakref.ref(
            weight, functools.partial(drop_dead, _non_finite.pop, id(weight))
        )
        _entries.clear()


def any_non_finite() -> bool:
    """Whether some fused layer alive holds NaN or infinities, which a vendor's ReLU could turn into zeros."""
    return bool(_non_finite)


def forget(weight: Tensor) -> None:
    """Drop what is kept for one weight (called by every forward with gradients enabled)."""
    _entries.pop(id(weight), None)


def bump() -> None:
    """Begin a new generation: everything kept is made anew at its next use."""
    global _generation
    _generation += 1
    _entries.clear()
    _non_finite.clear()


def renew() -> None:
    """As ``bump``, for what no optimizer does: the network's structure changed, or the user asks for it."""
    global _epoch
    _epoch += 1
    bump()


def epoch() -> int:
    """How often ``renew`` was called."""
    return _epoch


def generation() -> int:
    """How often anything began a new generation."""
    return _generation


def keeps(weight: Tensor) -> bool:
    """Whether something that was made from this weight is kept."""
    return id(weight) in _entries


def refresh(model: nn.Module | None = None) -> None:
    """Make fused layers see weights that were written behind autograd's back, as ``p.data.mul_(2)`` does.

    Optimizer steps, ``load_state_dict``, ``.to()``, ``.train()``/``.eval()`` and in-place operations on
    parameters need no call. What was kept is rebuilt at the next forward, for all optimized models of the
    process.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"fastnets.refresh expects an nn.Module or nothing, got {type(model).__name__}")
    renew()


def _after_optimizer_step(optimizer, args, kwargs) -> None:
    bump()


register_optimizer_step_post_hook(_after_optimizer_step)
