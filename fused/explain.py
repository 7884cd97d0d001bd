"""``explain``: what runs instead of each layer, by which implementation, and why not where nothing does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastnets.fused import batch_norm, conv, cuda_graphs, dispatch
from fastnets.fused.capture import CaptureError, capture, has_hooks
from fastnets.fused.layout import is_stock
from fastnets.fused.optimize import restore
from fastnets.fused.patterns import Fusion, Left, is_batch_norm, is_convolution
from fastnets.fused.saved import SavedBytes
from fastnets.fused.swap import Rewritten, blueprint_of, is_sequential, variants_in_force

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_LAYERS = (*_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.Linear)


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
        counts: it is a convolution, or something after one that a fused call could do.
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
        coverage_by: shares in fused layers, 0 to 1. "layers": of the convolutions, and of the batch norms,
            additions and activations that follow one; "flops" and "bytes": of all convolutions, linear layers
            and batch norms of the network, present where the shapes are known.
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
        convs = [row for row in counted if row.kind.startswith("conv")]
        text = (
            f"convolutions fused: {sum(r.fused for r in convs)} of {len(convs)}; "
            f"convolutions with what follows them: {self.coverage_by['layers']:.1%} of "
            f"{sum(r.layers for r in counted)} operations"
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
    ``TypeError`` where ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastnets.explain expects an nn.Module, got {type(model).__name__}")
    notes: list[str] = []
    shapes = _Shapes(model, example_inputs, notes)
    rows = _Rows(model, shapes).collect()
    if not any(isinstance(m, Rewritten) for m in model.modules()):
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
    report = Report(f"{type(model).__name__}", rows, notes=notes)
    counted = [row for row in rows if row.counts]
    report.coverage_by["layers"] = _share(counted, "layers")
    if shapes.known:
        report.coverage_by["flops"] = _share(rows, "flops")
        report.coverage_by["bytes"] = _share(rows, "bytes")
        report.saved_bytes = shapes.saved_bytes(model, notes)
    return report


def _share(rows: list[Row], what: str) -> float:
    total = sum(getattr(row, what) or 0 for row in rows)
    return sum(getattr(row, what) or 0 for row in rows if row.fused) / total if total else 0.0


class _Rows:
    """Collects the rows, outer containers first: the outermost graph that runs a layer speaks for it."""

    def __init__(self, model: nn.Module, shapes: _Shapes):
        self.model = model
        self.shapes = shapes
        self.claimed: set[nn.Module] = set()
        self.gone_through: set[nn.Module] = set()
        self.found: dict[str, list[Row]] = {}
        self.reasons: dict[nn.Module, str] = {}

    def collect(self) -> list[Row]:
        named = list(self.model.named_modules())
        for path, module in named:
            if isinstance(module, Rewritten) and module not in self.gone_through:
                self._from_container(path, module)
        for path, module in named:
            if isinstance(module, _LAYERS) and module not in self.claimed:
                self._add(path, self._stock_row(path, module))
        order = {path: i for i, (path, _) in enumerate(named)}
        paths = sorted(self.found, key=lambda path: order.get(path, len(order)))
        return [row for path in paths for row in self.found[path]]

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
        layers = [
            None if p is None else module.get_submodule(p) for p in (fusion.conv, fusion.bn, fusion.act)
        ]
        head = layers[0] if layers[0] is not None else layers[1]
        if head in self.claimed:
            return
        self.claimed.update(layer for layer in layers if layer is not None)
        path = _join(prefix, fusion.head)
        reason = self._why_stock_now(fusion, *layers)
        parts = fusion.kind.split("+")
        backend = module._fastnets.recipe.backend
        row = Row(path, fusion.kind, not reason, "stock", reason, len(parts), fusion.conv is not None)
        if not reason:
            row.implementation = self._implementation(path, fusion, layers, backend)
        row.flops, row.bytes = self.shapes.cost(_join(prefix, fusion.head), head, parts)
        self._add(path, row)

    @staticmethod
    def _why_stock_now(fusion: Fusion, conv_layer, bn_layer, act_layer) -> str:
        """Why a fused call runs the stock layers as things stand; empty where it fuses."""
        paths = (fusion.conv, fusion.bn, fusion.act)
        for path, layer in zip(paths, (conv_layer, bn_layer, act_layer)):
            if layer is not None and has_hooks(layer):
                return f"{path} carries hooks"
        if conv_layer is not None and type(conv_layer) is not nn.Conv2d:
            return f"{fusion.conv} is parametrized ({type(conv_layer).__name__})"
        if conv_layer is not None and type(conv_layer._parameters.get("weight")) is not nn.Parameter:
            kind = type(conv_layer._parameters.get("weight")).__name__
            return f"{fusion.conv}'s weight is a {kind} now; fused where a forward finds a plain parameter"
        return ""

    def _implementation(self, path: str, fusion: Fusion, layers, backend: str) -> str:
        conv_layer, bn_layer, act_layer = layers
        x = self.shapes.example_for(path, conv_layer if conv_layer is not None else bn_layer)
        training = [m for m in (bn_layer,) if m is not None and m.training]
        for m in training:
            m.__dict__["training"] = False
        try:
            with torch.no_grad(), dispatch.assume_device_type(_device_of(layers)):
                if conv_layer is None:
                    return batch_norm.choose(x, backend)
                return conv.implementation_of(conv_layer, bn_layer, act_layer, fusion.activation, x, backend)
        except dispatch.UnsupportedByBackend as error:
            return f"raises: {error}"
        finally:
            for m in training:
                m.__dict__["training"] = True

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
        if isinstance(layer, _CONVOLUTIONS):
            kind, counts = "conv", True
        elif isinstance(layer, nn.Linear):
            kind, counts = "linear", False
        else:
            kind, counts = "bn", False
        flops, moved = self.shapes.cost(path, layer, [kind])
        return Row(path, kind, False, "stock", self._reason(path, layer), 1, counts, flops, moved)

    def _reason(self, path: str, layer: nn.Module) -> str:
        if isinstance(layer, nn.Linear):
            return "linear layers have no fused form yet"
        if not is_convolution(layer) and not is_batch_norm(layer):
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
        if is_batch_norm(layer):
            return "nothing stands before or after it that it could fuse with"
        return "its container does not call it as a layer"

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


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _device_of(layers) -> str:
    for layer in layers:
        for tensor in () if layer is None else layer.parameters():
            return tensor.device.type
    return "cpu"


class _Shapes:
    """Shapes of every layer's inputs and outputs, from one run of a stock copy on meta tensors."""

    def __init__(self, model: nn.Module, example_inputs: object, notes: list[str]):
        self.calls: dict[str, list[tuple[list[tuple], list[tuple]]]] = {}
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
            arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
            return pytree.tree_map(to_meta, arguments)
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
            module.register_forward_hook(self._recorder(path))
        with torch.no_grad():
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

    def _recorder(self, path: str):
        def record(module, args, output):
            inputs = [tuple(x.shape) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
            outputs = [tuple(y.shape) for y in pytree.tree_leaves(output) if isinstance(y, Tensor)]
            self.calls.setdefault(path, []).append((inputs, outputs))

        return record

    def example_for(self, path: str, layer: nn.Module) -> Tensor:
        """A meta tensor like the layer's input; a guess of 14 by 14 pixels where shapes are unknown."""
        calls = self.calls.get(path)
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.num_features
        shape = calls[0][0][0] if calls and calls[0][0] else (1, channels, 14, 14)
        return torch.empty(shape, dtype=self.dtype, device="meta")

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
            elements += read + written
            elements += sum(3 * written if part == "add" else 2 * written for part in parts[1:])
        return flops, elements * self.dtype.itemsize


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
