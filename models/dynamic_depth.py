"""Networks that use fewer of their blocks: by choice at inference, by chance in training.

G. Huang et al., "Deep Networks with Stochastic Depth", 2016 (arXiv:1603.09382): while training, each residual
branch is dropped for some of the samples, the later ones more often. A network trained so bears that whole
blocks are left out afterwards, which is what ``skip`` does: a network whose forward takes it runs without the
named blocks in this one call, with its weights untouched.

A residual block whose input and output have the same shape can be skipped: what remains is its shortcut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.fx
from torch import Tensor, fx, nn

__all__ = ["StochasticDepth", "blocks_to_skip", "stochastic_depth", "stochastic_depth_rates"]


class StochasticDepth(nn.Module):
    """Drops a residual branch for a sample with probability ``probability``, in training only.

    Input (N, ...): the branch before it is added. The samples that keep theirs get it divided by the chance
    of keeping it, so that the expectation is what evaluation computes.
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"stochastic depth: the probability must be in [0, 1), got {probability}")
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        return some_samples(branch, 1 - self.probability)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


@torch.fx.wrap  # a tracer takes it as it stands
def some_samples(branch: Tensor, keep: float) -> Tensor:
    """Each sample of the branch over ``keep`` with that chance, else zeros."""
    shape = (branch.shape[0], *(1,) * (branch.dim() - 1))
    return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)


def stochastic_depth(probability: float) -> nn.Module:
    """:class:`StochasticDepth`, or the identity where nothing is ever dropped."""
    return StochasticDepth(probability) if probability else nn.Identity()


def stochastic_depth_rates(last: float, depth: int) -> list[float]:
    """The paper's linear rule: from 0 at the first block up to ``last`` at the last one."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def blocks_to_skip(
    skip: float | Collection[int], depth: int, *, optional: Sequence[int] | None = None
) -> frozenset[int]:
    """The indices of the blocks that a call leaves out.

    skip: indices of blocks, negative ones from the end; or a share between 0 and 1 of all blocks, which is
    spread evenly over the optional ones (0.5: every other block, the first one stays). depth: how many blocks
    there are. optional: which of them can be skipped, ascending; all of them if not given.

    Raises ``TypeError`` for anything else, ``ValueError`` naming the block that does not exist or cannot be
    skipped.
    """
    if isinstance(skip, fx.Proxy):
        _refuse_to_skip(skip)
        return frozenset()
    optional = range(depth) if optional is None else optional
    if isinstance(skip, float):
        wanted = round(skip * depth)
        if not 0 <= skip <= 1 or wanted > len(optional):
            raise ValueError(
                f"skip={skip}: the share of skipped blocks must be between 0 and "
                f"{len(optional) / depth:.3g} ({len(optional)} of {depth} blocks can be skipped)"
            )
        return frozenset(optional[(2 * n + 1) * len(optional) // (2 * wanted)] for n in range(wanted))
    if isinstance(skip, (str, int)) or not isinstance(skip, Collection):
        raise TypeError(f"skip must be a collection of block indices or a share (a float), got {skip!r}")
    chosen = set()
    for index in skip:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"skip must hold block indices, got {index!r}")
        if not -depth <= index < depth:
            raise ValueError(f"skip: there is no block {index}; the network has {depth}")
        if index % depth not in optional:
            raise ValueError(
                f"skip: block {index % depth} changes the shape of its input, so it cannot be skipped; "
                f"blocks {', '.join(map(str, optional))} can"
            )
        chosen.add(index % depth)
    return frozenset(chosen)


@torch.fx.wrap  # a tracer records all blocks, and this refusal to leave any of them out
def _refuse_to_skip(skip: float | Collection[int]) -> None:
    if skip:
        raise ValueError(f"skip={skip}: a traced network runs all its blocks; call the network itself")
