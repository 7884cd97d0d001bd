"""Finding squeeze-and-excite blocks and local response norms in a captured graph.

Both are one call in place of one module: ``se(x)`` of a block of torchvision, timm or ours in two launches
instead of seven, ``norm(x)`` of a local response norm in one instead of nine.
"""

from __future__ import annotations

from torch import fx, nn

from fastnets.fused.chains import FRESH_FUNCTIONS, Chain, ChainFinder, Fusion
from fastnets.fused.response_norm import call_local_response_norm
from fastnets.fused.squeeze_excite import call_squeeze_excite, parts_of

FRESH_FUNCTIONS.update((call_local_response_norm, call_squeeze_excite))


def is_response_norm(module: nn.Module) -> bool:
    """A stock local response norm."""
    return type(module) is nn.LocalResponseNorm


class ExciteFinder(ChainFinder):
    """Squeeze-and-excite blocks and local response norms, each by itself."""

    def fuse(self) -> None:
        for node in list(self.graph.nodes):
            if self.calls(node, lambda module: parts_of(module) is not None):
                # Its own layers stay in reports: where the module itself runs they are fused within it.
                fusion = Fusion("excite", "squeeze-excite", (("excite", node.target),))
                self._replace_call(node, call_squeeze_excite, fusion)
            elif self.calls(node, is_response_norm):
                fusion = Fusion("response_norm", "response norm", (("norm", node.target),))
                self._replace_call(node, call_local_response_norm, fusion)

    def _replace_call(self, node: fx.Node, call, fusion: Fusion) -> None:
        chain = Chain.from_head("head", node)
        with self.graph.inserting_before(node):
            module = self.graph.get_attr(node.target)
            fused = self.graph.call_function(call, (module, node.args[0], self.unfolding))
        self.replace(chain, fused)
        self.fusions.append(fusion)

    def note_leftovers(self) -> None:
        """Nothing around them could be fused and is not."""
