"""``explain``: what runs instead of each layer, by which implementation, and why not where nothing does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastnets.fused import (
    batch_norm,
    conv,
    conv_pool,
    cuda_graphs,
    dispatch,
    group_norm,
    linear,
    pool,
    response_norm,
    squeeze_excite,
    whole_forward,
)
from fastnets.fused.activation import is_activation, recognise
from fastnets.fused.attention import implementation_of as implementation_of_attention
from fastnets.fused.capture import CaptureError, capture, has_hooks
from fastnets.fused.chains import Fusion, Left
from fastnets.fused.fuse import is_layer
from fastnets.fused.known_forwards import fusions_of
from fastnets.fused.layer_norm import choose as choose_norm
from fastnets.fused.layout import is_stock
from fastnets.fused.linear_chain import implementation_of as implementation_of_chain
from fastnets.fused.norm_linear import takes_norm
from fastnets.fused.optimize import arguments_of, restore
from fastnets.fused.patterns import is_batch_norm, norm_kind
from fastnets.fused.saved import SavedBytes
from fastnets.fused.swap import Rewritten
from fastnets.fused.variants import blueprint_of, is_sequential, variants_in_force

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_GROUP_NORMS = tuple(group_norm.GROUP_NORMS)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_LAYERS = (
    *(*_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.MultiheadAttention),
    *(*_NORMS, *_GROUP_NORMS, *pool.POOLS, nn.LocalResponseNorm),
)
# Which implementation the op of a family of fused calls would choose.
_CHOICES = {
    "bn": batch_norm.choose,
    "norm": choose_norm,
    "group_norm": group_norm.choose,
    "pool": pool.choose,
    "excite": squeeze_excite.choose,
    "response_norm": response_norm.choose,
}
_STOCK_ON_CPU = ("group_norm", "norm", "pool", "excite", "response_norm")
_COUNTED = ("conv", "linear", "attention")  # the layers that have FLOPs
_OF_NO_LAYER = ("concatenation", "rope")


@dataclass
class Row:
    """One fused call, or one stock layer.

    Attributes:
        path: of the layer that the group starts with, as in ``named_modules``.
        kind: "conv+bn+add+relu", or the stock layer's kind.
        fused: whether a fused call stands for it.
        implementation: what runs in evaluation mode: "onednn", "triton", "stock", ...
        reason: why nothing is fused; empty where something is.
        layers: how many stock operations the row stands for.
        counts: it is a convolution, a linear layer or attention, or something after one that a fused call
            could do.
        flops, bytes: what stock computes, and moves in one pass per operation; None where shapes are unknown.
    """

    path: str
    kind: str
    fused: bool
    implementation: str
    reason: str = ""
    layers: int = 1
    counts: bool = True
    flops: int | None = None
    bytes: int | None = None


@dataclass
class Report:
    """What ``explain`` returns: printable.

    Attributes:
        rows: in the order of ``named_modules``.
        coverage_by: shares in fused layers, 0 to 1. "layers": of the convolutions, linear layers and
            attentions, and of the batch norms, additions and activations that follow one; "flops" and
            "bytes": of all rows, present where the shapes are known.
        notes: remarks on the network as a whole.
        saved_bytes: what a training step keeps for its backward, "stock" and "fused"; empty where the shapes
            are not known or nothing is trained.
    """

    model: str
    rows: list[Row]
    coverage_by: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    saved_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the FLOPs in fused layers, 0 to 1; of the layers where the shapes are not known."""
        return self.coverage_by.get("flops", self.coverage_by["layers"])

    def __str__(self) -> str:
        total = sum(row.flops or 0 for row in self.rows)
        header = ("layer", "runs as", "implementation", "FLOPs", "why not")
        table = [header]
        for row in self.rows:
            share = f"{row.flops / total:.1%}" if total and row.flops is not None else ""
            table.append((row.path or "(root)", row.kind, row.implementation, share, row.reason))
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * min(110, max(map(len, lines))))
        return "\n".join([self.model, *lines, "", self._summary(), *self.notes])

    def _summary(self) -> str:
        counted = [row for row in self.rows if row.counts]
        found = {"convolutions": "conv", "linear layers": "linear", "attention": "attention"}
        shares = []
        for name, kind in found.items():
            rows = [row for row in counted if row.kind.startswith(kind)]
            if rows:
                shares.append(f"{name} fused: {sum(r.fused for r in rows)} of {len(rows)}")
        text = "; ".join(
            [
                *shares,
                f"with what follows them: {self.coverage_by['layers']:.1%} of "
                f"{sum(r.layers for r in counted)} operations",
            ]
        )
        if "flops" in self.coverage_by:
            text += f"\nin fused layers: {self.coverage_by['flops']:.2%} of the FLOPs, "
            text += f"{self.coverage_by['bytes']:.1%} of the bytes that stock moves"
        else:
            text += "\nno FLOPs: give example_inputs to explain or to optimize"
        if self.saved_bytes:
            stock, fused = (self.saved_bytes[key] / 2**20 for key in ("stock", "fused"))
            text += f"\nkept for the backward of a training step: {fused:,.1f} MiB, by stock {stock:,.1f} MiB"
        return text


def explain(model: nn.Module, example_inputs: object = None) -> Report:
    """What runs instead of each layer of ``model``, and why not where nothing does.

    model: a network, optimized or not. example_inputs: a tensor or a tuple of positional arguments, for
    FLOPs, bytes and implementations by shape; only their shapes are used. ``optimize`` keeps those that it
    was given.

    The report is on evaluation mode, but for what a training step keeps for its backward. Raises
    ``TypeError`` where ``model`` is not a module, or ``example_inputs`` hold no tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastnets.explain expects an nn.Module, got {type(model).__name__}")
    notes: list[str] = []
    shapes = _Shapes(model, example_inputs, notes)
    rows = _Rows(model, shapes).collect()
    if dispatch.DISABLED:
        notes.append("FASTNETS_DISABLE=1 is set: fastnets.optimize leaves networks as they are")
    elif not any(isinstance(m, Rewritten) for m in model.modules()):
        notes.append(
            "nothing is rewritten: pass the network through fastnets.optimize, or read the reasons above"
        )
    elif any(is_batch_norm(m) and m.training for m in model.modules()):
        notes.append(
            "the network is in training mode: the implementations are those that will run after .eval()"
        )
    blueprint = blueprint_of(type(model))
    if blueprint is not None and blueprint.recipe.replays:
        notes.append(cuda_graphs.describe(model))
    if remark := whole_forward.describe(model):
        notes.append(remark)
    report = Report(f"{type(model).__name__}", rows, notes=notes)
    counted = [row for row in rows if row.counts]
    report.coverage_by["layers"] = _share(counted, "layers")
    if shapes.known:
        report.coverage_by["flops"] = _share(rows, "flops")
        report.coverage_by["bytes"] = _share(rows, "bytes")
        report.saved_bytes = shapes.saved_bytes(model, notes)
    return report


def _backend_of(module: nn.Module) -> str:
    recipe = getattr(getattr(type(module), "_fastnets", None), "recipe", None)
    return recipe.backend if recipe is not None else getattr(module, "backend", "auto")


def _share(rows: list[Row], what: str) -> float:
    total = sum(getattr(row, what) or 0 for row in rows)
    return sum(getattr(row, what) or 0 for row in rows if row.fused) / total if total else 0.0


class _Rows:
    """Collects the rows, outer containers first: the outermost graph that runs a layer speaks for it."""

    def __init__(self, model: nn.Module, shapes: _Shapes):
        self.model = model
        self.optimized = any(isinstance(m, Rewritten) for m in model.modules())
        self.shapes = shapes
        self.claimed: set[nn.Module] = set()
        self.gone_through: set[nn.Module] = set()
        self.attending: set[str] = set()  # paths of containers whose call of attention is fused
        self.found: dict[str, list[Row]] = {}
        self.reasons: dict[nn.Module, str] = {}

    def collect(self) -> list[Row]:
        named = list(self.model.named_modules())
        for path, module in named:
            if module in self.gone_through:
                continue
            if isinstance(module, Rewritten):
                self._from_container(path, module)
            for fusion in fusions_of(module):
                self._add_fusion(path, module, fusion)
        for path, module in named:
            if module not in self.claimed and (isinstance(module, _LAYERS) or self._does_more(module)):
                self._add(path, self._stock_row(path, module))
        for path in self.shapes.attention:
            if path not in self.attending:
                reason = self._reason(f"{path}.attention" if path else "attention", None)
                row = Row(path, "attention", False, "stock", reason)
                row.flops, row.bytes = self.shapes.attention_cost(path)
                self._add(path, row)
        order = {path: i for i, (path, _) in enumerate(named)}
        paths = sorted(self.found, key=lambda path: order.get(path, len(order)))
        return [row for path in paths for row in self.found[path]]

    def _does_more(self, module: nn.Module) -> bool:
        """Whether this is an activation, or a layer of the user's own: no container, with parameters."""
        if is_activation(module):
            return True
        own = not is_stock(type(module)) and bool(module._parameters)
        return own and module not in self.gone_through and next(module.children(), None) is None

    def _add(self, path: str, row: Row) -> None:
        self.found.setdefault(path, []).append(row)

    def _from_container(self, prefix: str, module: nn.Module) -> None:
        seen: set = set()
        for variant in variants_in_force(module):
            for path in variant.captured.inlined:
                self.gone_through.add(module.get_submodule(path))
            for fusion in reversed(variant.fusions):
                if fusion not in seen:
                    self._add_fusion(prefix, module, fusion)
            for left in variant.left:
                if left not in seen:
                    self._add_left(prefix, module, left)
            seen.update(variant.fusions, variant.left)

    def _add_fusion(self, prefix: str, module: nn.Module, fusion: Fusion) -> None:
        layers = {role: module.get_submodule(path) for role, path in fusion.layers}
        head = next(iter(layers.values()), None)
        if head in self.claimed or (fusion.family == "attention" and prefix in self.attending):
            return
        path = _join(prefix, fusion.head)
        if fusion.family != "block":
            self.claimed.update(layers.values())
        if isinstance(head, nn.MultiheadAttention):
            self.claimed.add(head.out_proj)
        if head is None and fusion.family not in _OF_NO_LAYER:
            self.claimed.add(module)  # of a class that is derived from the layer's and calls its function
            if fusion.family == "attention":
                self.attending.add(prefix)
        reason = self._why_stock_now(fusion, layers)
        parts = fusion.kind.split("+")
        counts = fusion.family in (*_COUNTED, "block")
        row = Row(path, fusion.kind, not reason, "stock", reason, len(parts), counts)
        if not reason:
            row.implementation = self._implementation(path, fusion, module, layers)
            joins = fusion.joins and row.implementation == "triton"
            if joins and self._is_joined(path, fusion, module, layers):
                row.implementation = f"triton, with {_join(prefix, fusion.joins)}"
        if fusion.family == "attention" and head is None:
            row.flops, row.bytes = self.shapes.attention_cost(path)
        elif fusion.family not in ("block", *_OF_NO_LAYER):
            row.flops, row.bytes = self._cost(prefix, fusion, head if head is not None else module, layers)
        self._add(path, row)

    def _is_joined(self, path: str, fusion: Fusion, module: nn.Module, layers: dict) -> bool:
        """Whether a norm is at the head of the linear layer after it; others are where they are found."""
        if fusion.family != "norm":
            return True
        norm, reader = layers["norm"], module.get_submodule(fusion.joins)
        x, backend = self.shapes.example_for(path, norm), _backend_of(module)
        with torch.no_grad(), dispatch.assume_device_type(_device_of([module])):
            return takes_norm(norm, reader, None, fusion.activation, x, backend)

    def _cost(self, prefix: str, fusion: Fusion, head: nn.Module, layers: dict) -> tuple:
        """FLOPs and bytes of a fused call: of a chain of linear layers, of all of them."""
        found = [(fusion.head, head)]
        found += [(path, layers[role]) for role, path in fusion.layers if role.startswith("linear ")]
        parts: list[list[str]] = []
        for part in fusion.kind.split("+"):
            if not parts or part == "linear":
                parts.append([])
            parts[-1].append(part)
        costs = [self.shapes.cost(_join(prefix, p), layer, own) for (p, layer), own in zip(found, parts)]
        return (None, None) if None in costs[0] else tuple(map(sum, zip(*costs)))

    @staticmethod
    def _why_stock_now(fusion: Fusion, layers: dict[str, nn.Module]) -> str:
        """Why a fused call runs the stock layers as things stand; empty where it fuses."""
        for (_, path), layer in zip(fusion.layers, layers.values()):
            if has_hooks(layer):
                return f"{path} carries hooks"
        for role, stock in (("conv", nn.Conv2d), ("linear", nn.Linear)):
            layer, path = layers.get(role), fusion.path(role)
            if layer is None:
                continue
            if type(layer).forward is not stock.forward or "parametrizations" in layer._modules:
                return f"{path} is parametrized ({type(layer).__name__})"
            if type(layer._parameters.get("weight")) is not nn.Parameter:
                kind = type(layer._parameters.get("weight")).__name__
                return f"{path}'s weight is a {kind} now; fused where a forward finds a plain parameter"
        return ""

    def _implementation(
        self, path: str, fusion: Fusion, module: nn.Module, layers: dict[str, nn.Module]
    ) -> str:
        backend = _backend_of(module)
        evaluating = [m for m in layers.values() if m.training]
        for m in evaluating:
            m.__dict__["training"] = False
        try:
            with torch.no_grad(), dispatch.assume_device_type(_device_of([module])):
                return self._choice(path, fusion, module, layers, backend)
        except dispatch.UnsupportedByBackend as error:
            return f"raises: {error}"
        finally:
            for m in evaluating:
                m.__dict__["training"] = True

    def _choice(self, path, fusion: Fusion, module, layers: dict[str, nn.Module], backend: str) -> str:
        """Which implementation the op would choose for an input of the shape that is known, or guessed."""
        if fusion.family == "block":
            return "the block's last layer"
        if fusion.family == "concatenation":
            return "one buffer" if _device_of([module]) == "cuda" else "stock"
        if fusion.family == "rope":
            stock = _device_of([module]) != "cuda" and backend in ("auto", dispatch.UNFOLDED)
            return "stock" if stock else "reference" if backend == "reference" else "triton"
        head = next(iter(layers.values()), module)
        x = self.shapes.example_for(path, head)
        if fusion.family == "conv":
            convolution = (layers["conv"], layers.get("bn"), layers.get("act"), fusion.activation, x, backend)
            if "pool" in layers:
                return conv_pool.implementation_of(layers["pool"], *convolution)
            return conv.implementation_of(*convolution, "add" in fusion.kind.split("+"))
        backend = "auto" if backend == dispatch.UNFOLDED else backend
        if fusion.family in _STOCK_ON_CPU and dispatch.leaves_to_stock(x, backend):
            return "stock"
        if fusion.family == "linear" and fusion.layers:
            act = layers.get("act")
            linears = [layer for role, layer in layers.items() if role.startswith("linear")]
            acts = [layer for role, layer in layers.items() if role.startswith("act")]
            chosen = implementation_of_chain(linears, acts, x, backend) if len(linears) > 1 else ""
            return chosen or linear.implementation_of(
                layers["linear"], act, fusion.activation, x, backend=backend
            )
        if fusion.family == "attention":
            return implementation_of_attention(*self.shapes.heads_for(path, head), backend)
        if fusion.family in _CHOICES:
            return _CHOICES[fusion.family](x, backend)
        return "reference"

    def _add_left(self, prefix: str, module: nn.Module, left: Left) -> None:
        path = _join(prefix, left.path)
        layer = dict(module.named_modules()).get(left.path)
        if layer is not None and layer in self.claimed and left.kind == "bn":
            return
        if layer is not None and isinstance(layer, _LAYERS):
            self.claimed.add(layer)
        flops, moved = self.shapes.cost(path, layer, [left.kind]) if layer is not None else (None, None)
        self._add(path, Row(path, left.kind, False, "stock", left.reason, flops=flops, bytes=moved))

    def _stock_row(self, path: str, layer: nn.Module) -> Row:
        kind = _stock_kind(layer)
        if kind == "attention":
            self.claimed.add(layer.out_proj)
        flops, moved = self.shapes.cost(path, layer, [kind])
        counts = kind in _COUNTED
        return Row(path, kind, False, "stock", self._reason(path, layer), 1, counts, flops, moved)

    def _reason(self, path: str, layer: nn.Module | None) -> str:
        others = (*_GROUP_NORMS, *pool.POOLS, nn.LocalResponseNorm)
        known = isinstance(layer, others) or recognise(layer) is not None
        if layer is not None and not is_layer(layer) and not known:
            own = not is_stock(type(layer))
            return f"{type(layer).__name__} " + ("has a forward of its own" if own else "has no fused form")
        container_path, container = self._container_of(path)
        if container is None:
            return "it is the whole network"
        if self._kept_stock(path):
            return "kept stock by filter_fn"
        if isinstance(container, Rewritten):
            failed = [v.reason for v in container._fastnets.variants.values() if v.captured is None]
            if failed and not variants_in_force(container):
                return f"{container_path or 'the root'} cannot be captured: {failed[0]}"
        elif container not in self.reasons:
            self.reasons[container] = self._why_not_captured(container)
        if reason := self.reasons.get(container):
            return f"{container_path or 'the root'} ({type(container).__name__}) cannot be captured: {reason}"
        if layer is not None and self.optimized and (is_batch_norm(layer) or isinstance(layer, _GROUP_NORMS)):
            return "nothing stands before or after it that it could fuse with"
        if layer is not None and is_activation(layer) and self._calls(container, path):
            return "it follows nothing that it could fuse with"
        if not self.optimized:
            return "the network is not optimized"
        return "its container does not call it as a layer"

    def _calls(self, container: nn.Module, path: str) -> bool:
        """Whether the captured forward of a layer's container calls that layer."""
        layer = self.model.get_submodule(path)
        nodes = [n for v in variants_in_force(container) for n in v.captured.graph.nodes] if isinstance(
            container, Rewritten) else []  # fmt: skip
        return any(n.op == "call_module" and container.get_submodule(n.target) is layer for n in nodes)

    def _kept_stock(self, path: str) -> bool:
        above = path
        while above:
            above = above.rpartition(".")[0]
            blueprint = blueprint_of(type(self.model.get_submodule(above)))
            own_path = path[len(above) + 1 :] if above else path
            if blueprint is not None and own_path in blueprint.recipe.keep_stock:
                return True
        return False

    def _container_of(self, path: str) -> tuple[str, nn.Module | None]:
        """The nearest module above ``path`` that is more than a list of modules."""
        while path:
            path = path.rpartition(".")[0]
            module = self.model.get_submodule(path)
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not is_stock(type(module)):
                return path, module
        return "", None

    @staticmethod
    def _why_not_captured(container: nn.Module) -> str:
        if is_stock(type(container)) and not is_sequential(container):
            return "it is a container of PyTorch's own"
        if "forward" in container.__dict__:
            return "its forward was replaced on the instance"
        try:
            capture(container, training=False, inline=None)
        except CaptureError as error:
            return str(error)
        return ""


def _stock_kind(layer: nn.Module) -> str:
    if isinstance(layer, _CONVOLUTIONS):
        return "conv"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, _NORMS):
        return "rms_norm" if isinstance(layer, nn.RMSNorm) else "layer_norm"
    if isinstance(layer, _GROUP_NORMS):
        return norm_kind(layer)
    if isinstance(layer, nn.LocalResponseNorm):
        return "response norm"
    if isinstance(layer, pool.POOLS):
        return "pool"
    return "bn" if isinstance(layer, nn.modules.batchnorm._BatchNorm) else type(layer).__name__


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _device_of(layers) -> str:
    for layer in layers:
        for tensor in () if layer is None else layer.parameters():
            return dispatch.device_type_of(tensor)
    return "cpu"


class _Shapes:
    """Shapes of every layer's inputs and outputs, from one run of a stock copy on meta tensors."""

    def __init__(self, model: nn.Module, example_inputs: object, notes: list[str]):
        self.calls: dict[str, list[tuple[list[tuple], list[tuple]]]] = {}
        self.attention: dict[str, list[list[tuple]]] = {}  # of scaled_dot_product_attention, by the caller
        self.running: list[str] = []
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.known = False
        self.arguments = self._arguments(model, example_inputs)
        if self.arguments is None:
            return
        try:
            self._run(model)
            self.known = True
        except Exception as error:  # the network may not run on meta tensors, or not be copyable
            notes.append(
                f"shapes are unknown: the network does not run on meta tensors ({type(error).__name__})"
            )

    @staticmethod
    def _arguments(model: nn.Module, example_inputs: object) -> tuple | None:
        def to_meta(x):
            return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

        if example_inputs is not None:
            return pytree.tree_map(to_meta, arguments_of(example_inputs))
        recorded = model._fastnets.recipe.example if isinstance(model, Rewritten) else None
        if recorded is None:
            return None
        leaves, spec = recorded
        leaves = [
            None if leaf is None else torch.empty(leaf[0], dtype=leaf[1], device="meta") for leaf in leaves
        ]
        return pytree.tree_unflatten(leaves, spec)

    def _run(self, model: nn.Module) -> None:
        twin = restore(_on_meta(model)).eval()
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(self._entering(path))
            module.register_forward_hook(self._recorder(path))
        with torch.no_grad(), _AttentionCalls(self):
            twin(*self.arguments)

    def saved_bytes(self, model: nn.Module, notes: list[str]) -> dict[str, int]:
        """What the forward of a training step keeps for its backward, of stock and of ``model`` as it is."""
        if not any(p.requires_grad for p in model.parameters()):
            return {}
        found = {}
        try:
            for name, twin in (("stock", restore(_on_meta(model))), ("fused", _on_meta(model))):
                saved = SavedBytes(twin.train())
                with torch.enable_grad(), dispatch.assume_device_type(_device_of([model])), saved.watching():
                    twin(*self.arguments)
                found[name] = saved.total
        except Exception as error:  # one value per channel, say, or an op that meta tensors have not
            notes.append(f"what a training step keeps is unknown: its forward raises {_first_line(error)}")
            return {}
        return found

    def _entering(self, path: str):
        return lambda module, args: self.running.append(path)

    def _recorder(self, path: str):
        def record(module, args, output):
            self.running.pop()
            inputs = [tuple(x.shape) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
            outputs = [tuple(y.shape) for y in pytree.tree_leaves(output) if isinstance(y, Tensor)]
            self.calls.setdefault(path, []).append((inputs, outputs))

        return record

    def example_for(self, path: str, layer: nn.Module) -> Tensor:
        """A meta tensor like the layer's input; a guess of 14 by 14 pixels where shapes are unknown."""
        calls = self.calls.get(path)
        if calls and calls[0][0]:
            shape = calls[0][0][0]
        elif isinstance(layer, nn.Linear):
            shape = (196, layer.in_features)
        elif isinstance(layer, _NORMS):
            shape = (196, *layer.normalized_shape)
        elif isinstance(layer, nn.MultiheadAttention):
            shape = (1, 196, layer.embed_dim)
        else:
            names = ("in_channels", "num_features", "num_channels")
            shape = (1, next((getattr(layer, n) for n in names if hasattr(layer, n)), 64), 14, 14)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def heads_for(self, path: str, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Meta tensors like the query, key and value of the attention at ``path``."""
        if isinstance(layer, nn.MultiheadAttention):
            x = self.example_for(path, layer)
            N, L = (1, x.shape[0]) if x.dim() == 2 else x.shape[:2] if layer.batch_first else x.shape[1::-1]
            shape = (N, layer.num_heads, L, layer.head_dim)
            return (torch.empty(shape, dtype=self.dtype, device="meta"),) * 3
        shapes = self.attention.get(path, [[(1, 12, 197, 64)] * 3])[0][:3]
        return tuple(torch.empty(shape, dtype=self.dtype, device="meta") for shape in shapes)

    def cost(self, path: str, layer: nn.Module | None, parts: list[str]) -> tuple[int | None, int | None]:
        """FLOPs of the layer at ``path``; bytes that stock moves for it and the operations after it."""
        if not self.known:
            return None, None
        flops = elements = 0
        for inputs, outputs in self.calls.get(path, []):
            read, written = sum(map(_numel, inputs)), sum(map(_numel, outputs))
            if isinstance(layer, (*_CONVOLUTIONS, nn.Linear)):
                transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                per_output = layer.weight[0].numel()
                flops += 2 * per_output * (read if transposed else written)
                elements += layer.weight.numel()
            if isinstance(layer, nn.MultiheadAttention):
                flops += _flops_of_attention_layer(layer, inputs)
                elements += sum(p.numel() for p in layer.parameters())
                read, written = sum(map(_numel, dict.fromkeys(inputs))), _numel(outputs[0])
            elements += read + written
            elements += sum(3 * written if part == "add" else 2 * written for part in parts[1:])
        return flops, elements * self.dtype.itemsize

    def attention_cost(self, path: str) -> tuple[int | None, int | None]:
        """FLOPs and bytes of the calls of attention in the forward at ``path``."""
        if not self.known:
            return None, None
        flops = elements = 0
        for q, k, v, y in self.attention.get(path, []):
            flops += 2 * _numel(q[:-1]) * k[-2] * (q[-1] + v[-1])
            elements += sum(map(_numel, (q, k, v, y)))
        return flops, elements * self.dtype.itemsize


class _AttentionCalls(TorchFunctionMode):
    """Records calls of attention that no layer makes; PyTorch's own layers run their code that a graph of
    shapes can follow."""

    def __init__(self, shapes: _Shapes):
        super().__init__()
        self.shapes = shapes

    def __enter__(self):
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and len(args) >= 3:
            path = self.shapes.running[-1] if self.shapes.running else ""
            shapes = [tuple(t.shape) for t in (*args[:3], result)]
            self.shapes.attention.setdefault(path, []).append(shapes)
        return result


def _flops_of_attention_layer(layer: nn.MultiheadAttention, inputs: list[tuple]) -> int:
    """Of the projections and of attention, for inputs of these shapes."""
    query, key, value = (inputs + inputs[-1:] * 2)[:3]
    E, q, k = layer.embed_dim, _numel(query[:-1]), _numel(key[:-1])
    dim = (1 if layer.batch_first else 0) if len(query) == 3 else 0
    keys = key[dim] + (layer.bias_k is not None) + layer.add_zero_attn
    projections = 2 * E * (2 * q * E + k * (key[-1] + value[-1]))
    return projections + 4 * q * keys * E


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy on the meta device, without hooks."""
    memo: dict[int, object] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return twin


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _numel(shape: tuple) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
